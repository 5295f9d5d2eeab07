"""kMaX-DeepLab and Mask2Former on their published backbones: whole models against the authors', and their files' names."""

import functools

import golden
import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

import backbones  # noqa: F401  (registers the zoo's models)
import weights
from heads import DensePredictor, FeatureBackbone, published
from heads.kmax import KMax

NORM = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


def small_backbone(spec):
    """timm's network in the fixture's sizes, which no name has."""
    if spec["type"] == "convnext":
        net = ConvNeXt(depths=tuple(spec["depths"]), dims=tuple(spec["dims"]))
        net.prune_intermediate_layers([0, 1, 2, 3], prune_norm=True)
        return FeatureBackbone(net, pad_patches=True)
    channels = spec["channels"]
    net = ResNet(
        Bottleneck, tuple(spec["blocks"]), channels=tuple(c // 4 for c in channels), norm_layer=NORM, zero_init_last=False
    )
    stem, first = spec["stem_channels"], net.layer1[0]
    net.conv1, net.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), NORM(stem)
    first.conv1 = nn.Conv2d(stem, channels[0] // 4, 1, bias=False)
    first.downsample = nn.Sequential(nn.Conv2d(stem, channels[0], 1, bias=False), NORM(channels[0]))
    net.prune_intermediate_layers([1, 2, 3, 4])
    return FeatureBackbone(net)


@pytest.mark.parametrize("case", golden.cases("kmax_model"))
def test_the_whole_of_kmax_is_the_authors(case):
    info, tensors = golden.load(case)
    kwargs = info["kwargs"]
    assert kwargs["layer_types"] == ["axial", "axial", "bottleneck", "bottleneck"]
    head_args = {
        "queries": kwargs["num_queries"],
        "widths": kwargs["dec_channels"],
        "blocks": kwargs["pixel_dec_layers"],
        "layers": kwargs["dec_layers"],
        "base": kwargs["base_filters"],
        "ffn": kwargs["ffn"],
        "heads": kwargs["num_heads"],
        "head_width": kwargs["head_channels"],
        "embedding": kwargs["embedding"],
        "aux_width": kwargs["aspp"],
        "aux_projections": (kwargs["project_os8"], kwargs["project_os4"]),
    }
    model = DensePredictor(small_backbone(info["backbone"]), KMax, kwargs["num_classes_without_void"], head_args).eval()
    report = weights.load_checkpoint(model, {"model": golden.state(tensors)})
    assert report.format == "official-dense" and not report.missing and not report.unexpected
    assert len(report.loaded) == len(model.state_dict())
    images = tensors["input"] / 127.5 - 1
    with torch.no_grad():
        maps, output, scores = model.backbone(images), model.outputs(images)["main"], model(images)
    for level, found in zip(("res2", "res3", "res4", "res5"), maps, strict=True):
        torch.testing.assert_close(found, tensors[f"stage/{level}"], **golden.tolerance(info))
    for name in ("class_logits", "mask_logits"):
        torch.testing.assert_close(output[name], tensors[f"output/{name}"], **golden.tolerance(info))
    torch.testing.assert_close(scores, tensors["output/semantic"], **golden.tolerance(info))


FILES = {  # in keys_kmax.json and keys_mask2former.json -> in heads.published
    "kmax_r50_coco": "kmax_r50_coco",
    "kmax_r50_cityscapes": "kmax_r50_cityscapes",
    "kmax_convnext_tiny_coco": "kmax_convnext_tiny_coco",
    "mask2former_swin_tiny_ade20k_semantic": "mask2former_swin_t_ade20k",
    "mask2former_swin_base_ade20k_semantic": "mask2former_swin_b_ade20k",
    "mask2former_resnet_head_ade20k_semantic": "mask2former_r50_ade20k",
}


def files():
    found = [(family, name) for family in ("kmax", "mask2former") for name in golden.official(family)]
    return found or [pytest.param(None, None, marks=pytest.mark.skip(reason="no facts/keys_*.json beside the fixtures"))]


@pytest.mark.parametrize("family, name", files())
def test_a_published_file_fits_its_model(family, name):
    facts = golden.official(family)[name]
    with torch.device("meta"):
        model = published.build(FILES[name])
    part = model if any(key.startswith("backbone.") for key in facts["keys"]) else model.head
    assert sum(p.numel() for p in part.parameters()) == facts["params"]
    state = {key: torch.empty(shape, device="meta") for key, shape in facts["keys"].items()}
    state["criterion.empty_weight"] = torch.empty(part.out_channels + 1 if part is model else 151, device="meta")
    report = weights.load_checkpoint(part, {"model": state, "__author__": "x"})
    assert not report.missing and not report.unexpected and len(report.loaded) == len(part.state_dict())
    back = weights.convert.converter(part).to_official(part.state_dict(), part)
    own = {key: tuple(value.shape) for key, value in back.items() if not key.startswith("backbone.")}
    prefix = "sem_seg_head." if part is model.head else ""
    assert {prefix + key: shape for key, shape in own.items()} == {
        key: tuple(shape) for key, shape in facts["keys"].items() if key.startswith("sem_seg_head.")
    }


def test_frozen_norms_without_counters_and_old_names_load():
    with torch.device("meta"):
        model, other = (published.build("mask2former_r50_ade20k") for _ in range(2))
    state = {}
    for key, value in weights.convert.converter(model).to_official(model.state_dict(), model).items():
        key = key.replace("predictor.query_feat.", "predictor.static_query.")
        if m := key.startswith("backbone."):
            key = to_detectron(key)
        if not key.endswith("num_batches_tracked"):
            state[key] = value
        assert m == key.startswith("backbone.")
    assert "backbone.res2.0.shortcut.norm.running_var" in state and "backbone.stem.conv1.norm.weight" in state
    report = weights.load_checkpoint(other, state)
    assert not report.unexpected and all(key.endswith("num_batches_tracked") for key in report.missing)


def to_detectron(key):
    """timm's name of a ResNet's weight in detectron2."""
    key = key.replace("backbone.conv1.", "backbone.stem.conv1.").replace("backbone.bn1.", "backbone.stem.conv1.norm.")
    for i in range(1, 5):
        key = key.replace(f"backbone.layer{i}.", f"backbone.res{i + 1}.").replace(f".bn{i}.", f".conv{i}.norm.")
    return key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def test_every_entry_builds_and_names_its_backbone():
    names = [name for name in published.PUBLISHED if name.startswith(("kmax_", "mask2former_"))]
    assert len(names) == 9 + 18
    for name in ("kmax_convnext_large_cityscapes", "mask2former_swin_l_coco"):
        with torch.device("meta"):
            model = published.build(name)
        if name.startswith("kmax"):
            assert model.backbone.channels == [192, 192, 384, 768, 1536]
            total = sum(p.numel() for p in model.parameters())
            assert total == 232102413
        else:
            assert model.head.queries == 200


def test_images_are_padded_as_the_authors_pad_them():
    with torch.device("meta"):
        model = published.build("mask2former_r50_ade20k")
        assert model.outputs(torch.zeros(1, 3, 65, 100))["main"]["size"] == (96, 128)
        assert [tuple(m.shape[2:]) for m in FeatureBackbone("convnext_atto", pad_patches=True)(torch.zeros(1, 3, 65, 97))] == [
            (17, 25),
            (9, 13),
            (5, 7),
            (3, 4),
        ]
    with pytest.raises(ValueError, match="not for ResNet"):
        FeatureBackbone("resnet18", pad_patches=True)
    with pytest.raises(ValueError, match="multiple is 0"):
        FeatureBackbone("resnet18", multiple=0)
