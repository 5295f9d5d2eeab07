"""Every head on a representative of each kind of backbone: output size, gradients, sizes that need padding.

The matrix over all of timm's modules is measured by tests/heads/test_matrix.py (slow).
"""

import functools

import pytest
import timm
import torch

import backbones  # noqa: F401  (registers the zoo's models)
from heads import HEADS, DensePredictor, FeatureBackbone
from heads.base import tensors
from heads.matrix import NARROW
from heads.model import at_image_size

SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}
BACKBONES = {  # kind -> (name, arguments that make it small, levels)
    "convolutional, five levels": ("test_resnet", {}, 4),
    "convolutional, four levels": ("test_convnext", {}, 4),
    "channels last": ("swin_tiny_patch4_window7_224", SMALL_SWIN, 4),
    "plain ViT": ("test_vit", {}, 4),
    "plain ViT, registers, patch 14": (
        "vit_small_patch14_reg4_dinov2",
        {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": (70, 98)},
        4,
    ),
    "bound to its size": (
        "pit_ti_224",
        {"img_size": (64, 96), "depth": (1, 1, 1), "base_dims": (8, 8, 8), "heads": (1, 2, 4)},
        3,
    ),
    "bound to its size, no position in the constructor": (
        "beit_base_patch16_224",
        {"embed_dim": 32, "depth": 4, "num_heads": 2},
        4,
    ),
    "two scales": (
        "crossvit_tiny_240",
        {"depth": ((1, 1, 0),), "embed_dim": (16, 32), "num_heads": (2, 2), "mlp_ratio": (2, 2, 1)},
        2,
    ),
    "starts at stride 16": ("levit_128s", {"img_size": 96, "embed_dim": (16, 24, 32), "depth": (1, 1, 1)}, 3),
    "six levels, multiples of 32 only": ("dla34", {"channels": (8, 8, 8, 16, 16, 16)}, 4),
    "ours, four levels": ("poolformer_s12_gn", {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}, 4),
    "ours, neighbourhoods": ("nat_mini", {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}, 4),
}
SIZE = (64, 90)  # not square, not a multiple of any patch


@functools.cache
def features(kind: str) -> FeatureBackbone:
    name, args, _ = BACKBONES[kind]
    torch.manual_seed(0)
    return FeatureBackbone(name, **args)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_every_head_on_every_kind(kind, head):
    backbone = features(kind).train()
    torch.manual_seed(0)
    channels = HEADS[head].only_channels or 3
    model = DensePredictor(backbone, head, channels, NARROW.get(head, {"width": 8}))
    model.zero_grad()
    images = torch.randn(2, 3, *SIZE)
    found = model.train()(images)
    main = found["main"]
    out = at_image_size(model.head.scores(main), backbone.padded_size(*SIZE), images)
    assert out.shape == (2, channels, *SIZE)
    sum(part.square().mean() for part in [out, *tensors(found)]).backward()
    lost = [name for name, p in model.head.named_parameters() if p.grad is None]
    assert not lost and out.isfinite().all()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


@pytest.mark.parametrize("kind", BACKBONES)
def test_maps_are_as_described(kind):
    backbone = features(kind).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, *SIZE))
    assert len(maps) == BACKBONES[kind][2] == len(backbone.strides)
    assert [m.shape[1] for m in maps] == backbone.channels
    heights = [m.shape[2] for m in maps]
    assert heights == sorted(heights, reverse=True), "finest first"
    assert backbone.one_scale == (len({m.shape[-2:] for m in maps}) == 1)


def test_every_parameter_of_the_backbone_is_used():
    for kind in BACKBONES:
        backbone = features(kind).train()
        backbone.zero_grad()
        sum(m.square().mean() for m in backbone(torch.randn(2, 3, *SIZE))).backward()
        lost = [name for name, p in backbone.named_parameters() if p.grad is None]
        assert not lost, f"{kind}: {lost} would stop distributed training"


def test_the_default_blocks_of_a_vit_are_evenly_spaced():
    assert FeatureBackbone("test_vit", depth=12).out_indices == [2, 5, 8, 11]
    with torch.device("meta"):
        assert FeatureBackbone("vit_large_patch16_384").out_indices == [5, 11, 17, 23]


def test_a_module_is_taken_as_it_is():
    model = timm.create_model("test_resnet")
    names = set(model.state_dict())
    backbone = FeatureBackbone(model, out_indices=(1, -1))
    assert set(model.state_dict()) == names and backbone.out_indices == [1, 4]
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[-2:]) for m in maps] == [(16, 24), (2, 3)]


def test_prefix_tokens_come_with_their_maps():
    backbone = FeatureBackbone("test_vit", prefix_tokens=True, out_indices=(0, 1))
    model = backbone.model
    images = torch.randn(1, 3, 32, 48)
    (first, prefix), _ = backbone(images)
    want = model.forward_intermediates(images, indices=[0], return_prefix_tokens=True, intermediates_only=True)[0]
    assert torch.equal(first, want[0]) and torch.equal(prefix, want[1]) and prefix.shape[1] == model.num_prefix_tokens
    with pytest.raises(ValueError, match="no prefix tokens"):
        FeatureBackbone("test_resnet", prefix_tokens=True)


def test_taps_reach_modules_and_survive_a_copy():
    import copy

    backbone = FeatureBackbone("test_vit", taps=("blocks.1", "blocks.3"))
    images = torch.randn(1, 3, 32, 48)
    got, again = backbone.eval()(images), copy.deepcopy(backbone)(images)
    want = backbone.model.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)
    assert backbone.channels == [64, 64] and backbone.strides == [16, 16]
    with pytest.raises(ValueError, match=r"'blocks.3'"):
        FeatureBackbone("test_vit", taps=("blocks3",))
    with pytest.raises(TypeError, match="one of them"):
        FeatureBackbone("test_vit", taps=("blocks.1",), out_indices=(1,))


def test_padding_is_to_the_right_and_below_and_cropped_from_the_result():
    torch.manual_seed(0)
    model = DensePredictor("test_vit", "linear", 2).eval()
    images = torch.randn(1, 3, 40, 50)
    padded = torch.nn.functional.pad(images, (0, 14, 0, 8))
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(padded)[..., :40, :50])
    assert model.backbone.multiple == 16 and model.backbone.padded_size(40, 50) == (48, 64)


def test_a_size_that_does_not_fit_is_explained():
    backbone = features("bound to its size")
    backbone(torch.randn(1, 3, 64, 96))
    backbone(torch.randn(1, 3, 50, 60))  # smaller ones are padded
    assert backbone.fixed_size == (64, 96)
    with pytest.raises(
        ValueError, match=r"built for images of 64 x 96 and cannot take 64 x 100; build it with img_size=\(64, 100\)"
    ):
        backbone(torch.randn(1, 3, 64, 100))
    with pytest.raises(ValueError, match="takes images B 3 H W"):
        backbone(torch.randn(1, 4, 64, 96))


def test_a_size_that_is_too_small_is_explained():
    class Valid(torch.nn.Conv2d):  # like Inception's convolutions without padding
        feature_info = [{"num_chs": 4, "reduction": 1, "module": ""}]

        def forward_intermediates(self, x, **_):
            return [self(x)]

    backbone = FeatureBackbone(Valid(3, 4, 41))
    with pytest.raises(ValueError, match="cannot take images of 40 x 40: larger ones fit"):
        backbone(torch.randn(1, 3, 40, 40))
    assert backbone(torch.randn(1, 3, 50, 41))[0].shape == (1, 4, 10, 1)


def test_a_size_can_be_settled_before_tracing():
    backbone = FeatureBackbone("dla34", channels=(8, 8, 8, 16, 16, 16)).eval()
    assert backbone.fit(64, 90) == (64, 96) == backbone.padded_size(64, 90) and backbone.multiple == 32
    program = torch.export.export(backbone, (torch.randn(1, 3, 64, 90),))
    assert [tuple(m.shape[-2:]) for m in program.module()(torch.randn(1, 3, 64, 90))] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_other_errors_than_the_size_pass_through():
    backbone = FeatureBackbone("test_resnet").double()
    with pytest.raises(RuntimeError, match="(?i)double|dtype|type"):
        backbone(torch.randn(1, 3, 64, 64))


def test_wrong_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown backbone 'resnet19'.*resnet18"):
        DensePredictor("resnet19", "linear", 2)
    with pytest.raises(ValueError, match="unknown head 'upnet': did you mean 'upernet'"):
        DensePredictor("test_resnet", "upnet", 2)
    with pytest.raises(TypeError, match="head 'upernet' has no argument 'widht': did you mean 'width'"):
        DensePredictor("test_resnet", "upernet", 2, {"widht": 8})
    with pytest.raises(TypeError, match="embed_dmi"):
        DensePredictor("test_vit", "linear", 2, backbone_args={"embed_dmi": 8})
    with pytest.raises(ValueError, match="out_indices has 7; the model has maps 0 to 4"):
        FeatureBackbone("test_resnet", out_indices=(7,))
    with pytest.raises(TypeError, match="no forward_intermediates"):
        FeatureBackbone(torch.nn.Conv2d(3, 8, 1))


def test_measuring_sizes_leaves_shared_modules_alone():
    """CoaT uses one module in several blocks; measuring once swapped its weights for shapes and left them there."""

    class Shared(torch.nn.Module):
        feature_info = [{"num_chs": 4, "reduction": 1, "module": "first"}]

        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 4, 1)
            self.second = torch.nn.Sequential(self.first)
            self.register_buffer("size", torch.zeros(8, 12))

        def forward_intermediates(self, x, **_):
            return [self.second(x) + self.size]

    backbone = FeatureBackbone(Shared(), img_size=(8, 12))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert backbone(torch.randn(1, 3, 5, 7))[0].shape == (1, 4, 8, 12)  # refused, measured, padded
    assert backbone.fixed_size == (8, 12) and backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
