"""Our models inside the libraries that take timm names: segmentation_models_pytorch and mmsegmentation."""

import importlib
import importlib.util

import families
import pytest
import timm
import torch

import backbones  # noqa: F401

PYRAMIDS = families.every("pyramid")  # strides 4, 8, 16, 32: what SMP reads as a transformer pyramid
FEW = {"depths": (1, 1, 1, 1)}


def test_a_family_with_that_pattern_has_a_model_among_the_pyramids():
    for row in families.FAMILIES.values():
        for name in row.pyramid or row.promised():
            info = timm.create_model(name, device="meta").feature_info
            found = [entry["reduction"] for entry in info] == [4, 8, 16, 32]
            assert found == bool(row.pyramid), f"{name}: `pyramid` in tests/families.py"


@pytest.fixture(scope="module")
def smp():
    return pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")


@pytest.mark.parametrize("name", PYRAMIDS)
def test_smp_takes_the_model_as_an_encoder(smp, name):
    encoder = smp.encoders.get_encoder(f"tu-{name}", in_channels=4, depth=5, weights=None, **FEW).eval()
    with torch.no_grad():
        maps = encoder(torch.randn(2, 4, 64, 96))
    assert encoder.out_channels[0] == 4 and encoder.out_channels[1] == 0
    assert [m.shape[1] for m in maps] == encoder.out_channels
    assert [tuple(m.shape[2:]) for m in maps] == [(64 >> i, 96 >> i) for i in range(6)]


@pytest.mark.parametrize("architecture", ["Unet", "FPN", "UPerNet", "Segformer"])
def test_smp_decoders_train_on_ours(smp, architecture):
    model = getattr(smp, architecture)("tu-nat_mini", encoder_weights=None, classes=3, **FEW)
    out = model(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 3, 64, 96)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.encoder.model.model.patch_embed.parameters())


def test_smp_reads_the_preprocessing_of_our_weights(smp):
    params = smp.encoders.get_preprocessing_params("tu-swin_t")
    assert list(params["mean"]) == [0.485, 0.456, 0.406] and list(params["std"]) == [0.229, 0.224, 0.225]


def test_smp_takes_three_stages_at_depth_four(smp):
    encoder = smp.encoders.get_encoder("tu-cvt_13", depth=4, weights=None, depths=(1, 1, 1)).eval()
    with torch.no_grad():
        maps = encoder(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps] == [(64, 96), (32, 48), (16, 24), (8, 12), (4, 6)]


@pytest.fixture(scope="module")
def timm_backbone():
    """mmsegmentation's TIMMBackbone, with mmcv-lite if need be."""
    missing = [name for name in ("mmseg", "mmengine", "mmcv", "ftfy", "regex") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'backbone-zoo[mmseg]'")
    importlib.import_module("heads.mmseg")  # stands in for compiled mmcv, and registers what mmsegmentation has
    from mmseg.registry import MODELS

    return lambda **cfg: MODELS.build({"type": "TIMMBackbone"} | cfg)


@pytest.mark.parametrize("name", [*PYRAMIDS, "cvt_13", "pit_ti"])
def test_mmsegmentation_takes_the_model_through_timm(timm_backbone, name):
    few = FEW if name in PYRAMIDS else {"depths": (1, 1, 1)}
    model = timm_backbone(model_name=name, features_only=True, pretrained=False, in_channels=3, **few).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == model.timm_model.feature_info.channels()
    assert all(m.shape[3] > m.shape[2] for m in maps), "B C H W, wider than high as the image"


def test_mmsegmentation_trains_a_head_on_ours(timm_backbone):
    from mmseg.registry import MODELS

    model = timm_backbone(model_name="nat_mini", features_only=True, pretrained=False, **FEW)
    head = MODELS.build(
        {
            "type": "FPNHead",
            "in_channels": model.timm_model.feature_info.channels(),
            "in_index": [0, 1, 2, 3],
            "feature_strides": [4, 8, 16, 32],
            "channels": 8,
            "num_classes": 3,
            "norm_cfg": {"type": "BN"},
            "loss_decode": {"type": "CrossEntropyLoss"},
        }
    )
    out = head(model(torch.randn(2, 3, 64, 96)))
    assert out.shape == (2, 3, 16, 24)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.timm_model.model.patch_embed.parameters())
