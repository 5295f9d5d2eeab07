"""Heads and whole dense models against stored tensors of the authors' code, built from the kwargs of each fixture."""

from functools import partial

import golden
import pytest
import timm
import torch
from timm.layers import GroupNormAct, LayerNorm, StdConv2dSame
from timm.models.beit import Beit
from timm.models.levit import Levit
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import nn

import weights
from heads import HEADS, DensePredictor, FeatureBackbone
from heads.depth import DepthRule
from heads.published import input_size
from heads.sdt import DySample


def compare(case: str, name: str, got: torch.Tensor, want: torch.Tensor, tolerance: dict) -> None:
    assert got.shape == want.shape, f"{case} {name}: {tuple(got.shape)} for {tuple(want.shape)}"
    # Another order of the same sums inside a ViT (q scaled first, threads) moves what follows the fusions by up to 7e-5.
    if name.startswith("stage/path_") or name in ("stage/head_out", "output"):
        tolerance = tolerance | {"atol": max(tolerance["atol"], 1e-4)}
    # Single precision of the largest values also limits the small ones beside them: LeViT's stored maps reach 48 and are
    # themselves 4e-5 away from a run in double precision.
    tolerance = tolerance | {"atol": max(tolerance["atol"], 1e-6 * want.abs().max().item())}
    torch.testing.assert_close(got, want, **tolerance, msg=lambda text: f"{case} {name}: {text}")


def check(case: str, info: dict, tensors: dict, places: dict[str, nn.Module], run) -> None:
    """Run, and compare the output and the outputs of modules with every stored tensor that is not an input or a weight."""
    outputs = {}
    for name, module in places.items():
        module.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out))
    with torch.no_grad():
        outputs["output"] = run()
    stored = {name for name in tensors if not name.startswith(("input", "state/"))}
    assert stored <= outputs.keys(), f"{case}: nothing compares {sorted(stored - outputs.keys())}"
    for name in sorted(stored):
        compare(case, name, outputs[name], tensors[name], golden.tolerance(info))


def features(tensors: dict) -> list[torch.Tensor]:
    return [tensors[name] for name in sorted(tensors) if name.startswith("input/features_")]


def load(model: nn.Module, tensors: dict) -> nn.Module:
    weights.load_checkpoint(model, golden.state(tensors))
    return model.eval()


# UPerNet and its auxiliary head


@pytest.mark.parametrize("case", golden.cases("upernet_head"))
def test_upernet(case):
    info, tensors = golden.load(case)
    kwargs = info["kwargs"]
    args = {"width": kwargs["channels"], "pool_scales": kwargs["pool_scales"], "align_corners": kwargs["align_corners"]}
    head = load(HEADS["upernet"](kwargs["in_channels"], kwargs["num_classes"], **args), tensors)
    names = ("lateral_convs.", "psp_modules.", "bottleneck", "fpn_convs.", "fpn_bottleneck")
    places = {f"stage/{name}": module for name, module in head.named_modules() if name.startswith(names)}
    maps = [features(tensors)[i] for i in kwargs["in_index"]]
    check(case, info, tensors, places, lambda: head(maps))


@pytest.mark.parametrize("case", golden.cases("upernet_fcn"))
def test_fcn(case):
    info, tensors = golden.load(case)
    kwargs, maps = info["kwargs"], features(tensors)
    args = {"width": kwargs["channels"], "depth": kwargs["num_convs"], "index": kwargs["in_index"]}
    head = load(HEADS["fcn"]([m.shape[1] for m in maps], kwargs["num_classes"], **args), tensors)
    check(case, info, tensors, {}, lambda: head(maps))


# DPT: the authors' whole models


def vit(info: dict, state: dict, size: tuple[int, int]) -> FeatureBackbone:
    """timm's ViT in the shape of the fixture's, also with a distillation token, also behind a ResNet."""
    spec = info["backbone"]
    args = spec.get("timm_kwargs") or {
        "img_size": spec["img_size"],
        "embed_dim": spec["dim"],
        "depth": spec["depth"],
        "num_heads": spec["heads"],
        "mlp_ratio": state["pretrained.model.blocks.0.mlp.fc1.weight"].shape[0] / spec["dim"],
        "num_classes": len(state["pretrained.model.head.weight"]),
    }
    args = args | {"img_size": size, "norm_layer": partial(LayerNorm, eps=1e-6)}
    if spec["type"] == "beit":
        return FeatureBackbone(Beit(**args), out_indices=spec["hooks"])
    if spec["type"] == "deit_distilled":
        return FeatureBackbone(timm.models.deit.VisionTransformerDistilled(**args), out_indices=spec["hooks"])
    if spec["type"] == "hybrid":
        resnet = ResNetV2(
            layers=spec["resnet_layers"],
            channels=spec["resnet_channels"],
            stem_chs=spec["stem_chs"],
            num_classes=0,
            global_pool="",
            preact=False,
            stem_type="same",
            conv_layer=partial(StdConv2dSame, eps=1e-8),
            norm_layer=partial(GroupNormAct, num_groups=spec["num_groups"]),
        )
        model = VisionTransformer(**args, patch_size=1, embed_layer=partial(HybridEmbed, backbone=resnet))
        taps = [f"patch_embed.backbone.stages.{i}" for i in spec["hooks"][:2]] + [f"blocks.{i}" for i in spec["hooks"][2:]]
        return FeatureBackbone(model, taps=taps)
    return FeatureBackbone(VisionTransformer(**args), out_indices=spec["hooks"])


def dpt_places(model: DensePredictor) -> dict[str, nn.Module]:
    head = model.head
    places = {f"stage/reassembled_{i + 1}": module for i, module in enumerate(head.reassembles)}
    places |= {f"stage/layer{i + 1}_rn": module for i, module in enumerate(head.layers)}
    return places | {f"stage/path_{i + 1}": module for i, module in enumerate(head.fusions)}


def compare_features(tensors: dict, model: DensePredictor, images: torch.Tensor) -> None:
    """Compare the backbone's maps with the hooked block outputs: tokens with their prefix, or maps."""
    with torch.no_grad():
        maps = model.backbone(images)
    for i, found in enumerate(maps, 1):
        x, prefix = found if isinstance(found, tuple) else (found, None)
        want = tensors[f"stage/features_{i}"]
        if want.ndim == 3:
            x = x.flatten(2).mT
            want = want if prefix is not None else want[:, -x.shape[1] :]
            x = x if prefix is None else torch.cat([prefix, x], 1)
        compare("maps", f"stage/features_{i}", x, want, {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.parametrize("case", golden.cases("dpt_depth", exclude="dpt_depth_anything") + golden.cases("dpt_seg"))
def test_dpt(case):
    info, tensors = golden.load(case)
    spec, kwargs, images = info["backbone"], info["kwargs"], tensors["input"]
    segmentation = info["official_class"] == "DPTSegmentationModel"
    args = {
        "width": kwargs["features"],
        "readout": info["readout"],
        "reassemble": spec["features"],
        "fusion": "double",
        "norm": segmentation,
        "predictor": "segmentation" if segmentation else "depth",
    }
    if spec["type"] == "hybrid":
        args["factors"] = (None, None, 1, 0.5)
    backbone = vit(info, golden.state(tensors), tuple(images.shape[-2:]))
    model = load(DensePredictor(backbone, "dpt", kwargs.get("num_classes", 1), args), tensors)
    compare_features(tensors, model, images)
    tensors = {name: value for name, value in tensors.items() if not name.startswith("stage/features_")}
    scale = {name: kwargs[name] for name in ("scale", "shift") if name in kwargs}
    rule = DepthRule("invert" if kwargs.get("invert") else "relu", signed=not kwargs.get("non_negative", True), **scale)
    raw = {}
    model.head.register_forward_hook(lambda _, __, out: raw.__setitem__("out", out))

    def run():
        out = model(images)
        return out if segmentation else rule(out)[:, 0]

    places = dpt_places(model)
    if "stage/head_out" in tensors:
        # the authors' head ends in its ReLU
        head_out = tensors.pop("stage/head_out")
        check(case, info, tensors, places, run)
        out = raw["out"] if segmentation or rule.signed else raw["out"].relu()
        compare(case, "stage/head_out", out, head_out, golden.tolerance(info))
    else:
        check(case, info, tensors, places, run)


# MiDaS 3.1: the same head on other encoders


def midas_backbone(info: dict, state: dict, size: tuple[int, int]) -> FeatureBackbone:
    spec = info["backbone"]
    kwargs = dict(spec["timm_kwargs"])
    if spec["type"] in ("vit", "beit"):
        return vit(info, state, size)
    if spec["type"] == "levit":
        kwargs.pop("down_ops")  # sub-sampling by 2 between stages, which is what timm's LeViT does
        kwargs |= {"mlp_ratio": 2.0, "attn_ratio": 2.0}
        return FeatureBackbone(Levit(**kwargs), taps=levit_taps(spec["hooks"], kwargs["depth"]), img_size=kwargs["img_size"])
    kind = {"swin": SwinTransformer, "swin2": SwinTransformerV2}[spec["type"]]
    model = kind(**kwargs)
    return FeatureBackbone(model, taps=[f"layers.{i}.blocks.{j}" for i, j in enumerate(spec["hooks"])])


def levit_taps(hooks: list[int], depths: list[int]) -> list[str]:
    """Indices into the authors' flat list of attention and MLP halves (two more between stages) -> timm's blocks."""
    names = []
    for stage, depth in enumerate(depths):
        names += [None, f"stages.{stage}.downsample"] if stage else []
        for block in range(depth):
            names += [None, f"stages.{stage}.blocks.{block}"]
    return [names[hook] for hook in hooks]


@pytest.mark.parametrize("case", golden.cases("midas_"))
def test_midas(case):
    info, tensors = golden.load(case)
    spec, kwargs, images = info["backbone"], info["kwargs"], tensors["input"]
    state = golden.state(tensors)
    backbone = midas_backbone(info, state, tuple(images.shape[-2:]))
    tokens = spec["type"] in ("vit", "beit")
    args = {"width": kwargs["features"], "readout": info["readout"] if tokens else "ignore"}
    if tokens:
        args["reassemble"] = spec["features"]
    first, second = state["scratch.output_conv.0.weight"], state["scratch.output_conv.2.weight"]
    args["predictor_widths"] = (first.shape[0], second.shape[0])
    if "scratch.stem_transpose.0.c.weight" in state:
        args["stem"] = [state[f"scratch.stem_transpose.{i}.c.weight"].shape[1] for i in (0, 2)]
    model = load(DensePredictor(backbone, "dpt", 1, args), tensors)
    compare_features(tensors, model, images)
    tensors = {name: value for name, value in tensors.items() if not name.startswith("stage/features_")}
    places = dpt_places(model) | {"stage/stem_transpose": model.head.stem}
    check(case, info, tensors, places, lambda: model(images).relu()[:, 0])


# Depth-Anything-V2 and mmsegmentation's DPT: heads on stored features


@pytest.mark.parametrize("case", golden.cases("dpt_depth_anything"))
def test_depth_anything_head(case):
    info, tensors = golden.load(case)
    kwargs, grid = info["kwargs"], info["patch_grid"]
    names = sorted(name for name in tensors if name.startswith("input/tokens_"))
    maps = [tensors[name].mT.unflatten(2, grid) for name in names]
    maps = [(m, tensors[name.replace("tokens", "cls")][:, None]) for m, name in zip(maps, names, strict=True)]
    args = {
        "width": kwargs["features"],
        "one_scale": True,
        "reassemble": kwargs["out_channels"],
        "readout": "project" if kwargs["use_clstoken"] else "ignore",
        "norm": kwargs["use_bn"],
        "unit_bias": True,
        "patch_size": 14,
    }
    head = load(HEADS["dpt"]([kwargs["in_channels"]] * len(maps), 1, **args), tensors)
    places = {f"stage/reassembled_{i + 1}": module for i, module in enumerate(head.reassembles)}
    places |= {f"stage/path_{i + 1}": module for i, module in enumerate(head.fusions)}
    check(case, info, tensors, places, lambda: head(maps).relu())


@pytest.mark.parametrize("case", golden.cases("dpt_dinov3") + golden.cases("dpt_mmseg"))
def test_mmsegmentation_dpt_head(case):
    info, tensors = golden.load(case)
    kwargs, maps = info["kwargs"], features(tensors)
    maps = [(m, tensors[f"input/cls_{i}"][:, None]) for i, m in enumerate(maps)]
    depth = "n_output_channels" in kwargs
    args = {
        "width": kwargs["channels"],
        "one_scale": True,
        "reassemble": kwargs["post_process_channels"],
        "readout": kwargs["readout_type"],
        "norm": "norm_cfg" in kwargs,
        "unit_bias": False,
        "reassemble_norm": kwargs.get("use_batchnorm", False),
        "fusion": "double",
        "project": True,
        "predictor": "depth" if depth else "linear",
    }
    head = load(HEADS["dpt"](kwargs["in_channels"], kwargs.get("n_output_channels") or kwargs["num_classes"], **args), tensors)
    places = {f"stage/reassembled_{i}": module for i, module in enumerate(head.reassembles)}
    places |= {f"stage/fusion_{j}": module for j, module in enumerate(reversed(head.fusions))}
    check(case, info, tensors, places | {"stage/project": head.project}, lambda: head(maps))


@pytest.mark.parametrize("case", golden.cases("dpt_resize_sizes"))
def test_network_input_sizes(case):
    _, tensors = golden.load(case)
    for name, want in tensors.items():
        if name.startswith("output/"):
            target, *method, keep, multiple = name.removeprefix("output/").split("_")
            width, height = (int(n) for n in target.split("x"))
            for (w, h), size in zip(tensors["input"].tolist(), want.tolist(), strict=True):
                got = input_size(h, w, (height, width), int(multiple[1:]), "_".join(method), keep == "keep")
                assert got == (size[1], size[0]), f"{name}: image {w}x{h}"


# SDT and GLPN


@pytest.mark.parametrize("case", golden.cases("sdt_", exclude="sdt_dysample"))
def test_sdt(case):
    info, tensors = golden.load(case)
    kwargs, maps = info["kwargs"], features(tensors)
    if f"input/cls_{len(maps) - 1}" in tensors:
        maps = [(m, tensors[f"input/cls_{i}"][:, None]) for i, m in enumerate(maps)]
    args = {"width": kwargs["fusion_channels"], "readout": "project" if isinstance(maps[0], tuple) else "ignore"}
    head = load(HEADS["sdt"](kwargs["in_channels"], kwargs["n_output_channels"], **args), tensors)
    places = {f"stage/{name}": module for name, module in head.named_modules() if name}
    tensors["stage/weighted_fusion"] = tensors["stage/weighted_fusion"].mT.unflatten(2, features(tensors)[0].shape[-2:])
    check(case, info, tensors, places, lambda: head(maps))


@pytest.mark.parametrize("case", golden.cases("sdt_dysample"))
def test_dysample(case):
    info, tensors = golden.load(case)
    kwargs = info["kwargs"]
    model = DySample(kwargs["in_channels"], kwargs["scale"], kwargs["style"], kwargs["groups"], kwargs["dyscope"])
    model.load_state_dict(golden.state(tensors))
    check(case, info, tensors, {}, lambda: model(tensors["input"]))


@pytest.mark.parametrize("case", golden.cases("glpn_decoder"))
def test_glpn_decoder(case):
    info, tensors = golden.load(case)
    kwargs, maps = info["kwargs"], features(tensors)
    head = load(HEADS["glpn"]([m.shape[1] for m in maps], 1, width=kwargs["out_channels"]), tensors)
    rule = DepthRule("sigmoid", max_depth=kwargs["max_depth"])
    places = {f"stage/{name}": module for name, module in head.decoder.named_modules() if name.startswith("fusion")}
    check(case, info, tensors, places | {"stage/decoder": head.decoder}, lambda: rule(head(maps)))


@pytest.mark.parametrize("case", golden.cases("glpn_model"))
def test_glpn_model(case):
    info, tensors = golden.load(case)
    kwargs = info["kwargs"]
    names = ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios", "qkv_bias")
    encoder = PyramidVisionTransformerV2(
        **{name: kwargs[name] for name in names}, norm_layer=partial(LayerNorm, eps=kwargs["norm_eps"]), num_classes=0
    )
    model = load(DensePredictor(encoder, "glpn", 1, {"width": kwargs["channels_out"]}), tensors)
    rule = DepthRule("sigmoid", max_depth=kwargs["max_depth"])
    places = {f"stage/encoder_{i}": stage for i, stage in enumerate(encoder.stages)}
    check(case, info, tensors, places, lambda: rule(model(tensors["input"])))
