"""Published dense checkpoints: which predictor loads each file, what its output means, how its images are prepared.

model = published.build("depth_anything_v2_vits")
weights.load_checkpoint(model, "depth_anything_v2_vits.pth")
inverse_depth = PUBLISHED["depth_anything_v2_vits"].rule(model(images))
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .depth import DepthRule
from .model import DensePredictor

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
RAW = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
ADE20K = 150  # classes; output channel 0 is class 1 of the annotation


@dataclass(frozen=True)
class Published:
    """A predictor as its authors trained it.

    neck: of DensePredictor. img_size: (H, W) the encoder's positions are for, where they are not timm's own.
    rule: what the output channels of a depth model mean; None: class scores. normalisation: mean and std of RGB in [0, 1].
    size: (H, W) the image is resized towards; multiple, method, keep_aspect: the other arguments of `input_size`.
    """

    backbone: str
    head: str
    source: str
    out_channels: int = 1
    head_args: dict = field(default_factory=dict)
    backbone_args: dict = field(default_factory=dict)
    aux_head: str | None = None
    aux_args: dict = field(default_factory=dict)
    neck: str | None = "pyramid"
    img_size: tuple[int, int] | None = None
    rule: DepthRule | None = None
    normalisation: tuple = HALF
    size: tuple[int, int] = (384, 384)
    multiple: int = 32
    method: str = "minimal"
    keep_aspect: bool = True


def build(name: str, img_size: int | Sequence[int] | None = None) -> DensePredictor:
    """The predictor of `PUBLISHED[name]`, with random weights.

    img_size: (H, W) of the images, for encoders bound to one size. Plain ViTs and BEiTs are built at their native size whatever
    it is: they take every size, and one resize of the stored positions is what their authors' code does. MiDaS on Swin, SwinV2
    and LeViT takes images of `size` alone (its authors' code stops at others); ValueError for another img_size.
    """
    spec = PUBLISHED[name]
    if "positions" in spec.backbone_args:
        img_size = spec.img_size
    return DensePredictor(
        spec.backbone,
        spec.head,
        spec.out_channels,
        spec.head_args,
        backbone_args=spec.backbone_args,
        aux_head=spec.aux_head,
        aux_args=spec.aux_args,
        neck=spec.neck,
        img_size=img_size,
    )


def input_size(
    height: int, width: int, target: Sequence[int], multiple: int = 32, method: str = "minimal", keep_aspect: bool = True
) -> tuple[int, int]:
    """The (H, W) to which DPT, MiDaS and Depth-Anything resize an image of height x width before the network.

    Args:
        height, width: of the image.
        target: (H, W).
        multiple: of which each side becomes one, rounded half to even.
        method: "minimal" scales both sides by the factor nearer to 1, "lower_bound" by the larger factor (no side below the
            target), "upper_bound" by the smaller one.
        keep_aspect: one factor for both sides; else each has its own.
    """
    scales = [target[0] / height, target[1] / width]
    if method not in ("minimal", "lower_bound", "upper_bound"):
        raise ValueError(f"method is {method!r}; use 'minimal', 'lower_bound' or 'upper_bound'")
    if keep_aspect:
        if method == "minimal":
            scales = [min(scales, key=lambda f: abs(1 - f))] * 2
        else:
            scales = [max(scales) if method == "lower_bound" else min(scales)] * 2

    def fit(length: float, bound: int) -> int:
        size = round(length / multiple) * multiple
        if method == "lower_bound" and size < bound:
            size = math.ceil(length / multiple) * multiple
        if method == "upper_bound" and size > bound:
            size = math.floor(length / multiple) * multiple
        return size

    return fit(scales[0] * height, target[0]), fit(scales[1] * width, target[1])


def _dpt() -> dict[str, Published]:
    """isl-org/DPT @ cd3fe90 (MIT). Depth is inverse and relative; the NYU and KITTI files are metric through other rules."""
    encoders: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "large": ("vit_large_patch16_384", {"out_indices": (5, 11, 17, 23)}, {"reassemble": (256, 512, 1024, 1024)}),
        "base": ("vit_base_patch16_384", {"out_indices": (2, 5, 8, 11)}, {"reassemble": (96, 192, 384, 768)}),
        "hybrid": (
            "vit_base_r50_s16_384",
            {"taps": ("patch_embed.backbone.stages.0", "patch_embed.backbone.stages.1", "blocks.8", "blocks.11")},
            {"reassemble": (256, 512, 768, 768), "factors": (None, None, 1, 0.5)},
        ),
    }
    found: dict[str, Published] = {}
    for size, (backbone, backbone_args, reassemble) in encoders.items():
        args: dict[str, Any] = {"readout": "project", "fusion": "double", **reassemble}
        shared: dict[str, Any] = {"source": "isl-org/DPT", "backbone_args": backbone_args | {"positions": "dpt"}}
        found[f"dpt_{size}_depth"] = Published(backbone, "dpt", head_args=args, rule=DepthRule("relu"), **shared)
        args = args | {"norm": True, "predictor": "segmentation"}
        found[f"dpt_{size}_ade20k"] = Published(backbone, "dpt", out_channels=ADE20K, head_args=args, size=(480, 480), **shared)
    for data, shift, scale, pixels in (("nyu", 0.1378, 0.000305, (480, 640)), ("kitti", 0.00579, 0.00006016, (352, 1216))):
        base = found["dpt_hybrid_depth"]
        rule = DepthRule("invert", scale=scale, shift=shift, max_depth=10.0 if data == "nyu" else 80.0)
        found[f"dpt_hybrid_{data}"] = Published(**{**vars(base), "rule": rule, "size": pixels})
    return found


def _midas() -> dict[str, Published]:
    """isl-org/MiDaS @ 4545977 (MIT): inverse relative depth."""
    shared: dict[str, Any] = {"head": "dpt", "source": "isl-org/MiDaS", "rule": DepthRule("relu")}
    found: dict[str, Published] = {}
    beits = (("large", 512, "large_patch16_512"), ("large", 384, "large_patch16_384"), ("base", 384, "base_patch16_384"))
    for size, pixels, name in beits:
        large = size == "large"
        found[f"dpt_beit_{size}_{pixels}"] = Published(
            f"beit_{name}",
            backbone_args={"out_indices": (5, 11, 17, 23) if large else (2, 5, 8, 11), "positions": "dpt"},
            head_args={"readout": "project", "reassemble": (256, 512, 1024, 1024) if large else (96, 192, 384, 768)},
            size=(pixels, pixels),
            **shared,
        )
    for name, backbone, pixels in (
        ("dpt_swin2_large_384", "swinv2_large_window12to24_192to384", 384),
        ("dpt_swin2_base_384", "swinv2_base_window12to24_192to384", 384),
        ("dpt_swin2_tiny_256", "swinv2_tiny_window16_256", 256),
        ("dpt_swin_large_384", "swin_large_patch4_window12_384", 384),
    ):
        square = (pixels, pixels)  # their windows and tables belong to it
        found[name] = Published(backbone, backbone_args={"exact_size": square}, size=square, keep_aspect=False, **shared)
    found["dpt_next_vit_large_384"] = Published("nextvit_large", **shared)
    found["dpt_levit_224"] = Published(
        "levit_384",
        backbone_args={
            "taps": ("stages.0.blocks.1", "stages.1.blocks.0", "stages.2.blocks.0"),
            "exact_size": (224, 224),
        },
        head_args={"stem": (128, 64), "predictor_widths": (32, 8)},
        size=(224, 224),
        keep_aspect=False,
        **shared,
    )
    for size in ("large", "hybrid"):  # DPT's own, refined for any size
        base = _dpt()[f"dpt_{size}_depth"]
        args = base.head_args | {"fusion": "next"}
        found[f"dpt_{size}_384"] = Published(**{**vars(base), "source": "isl-org/MiDaS", "head_args": args})
    return found


def _depth_anything() -> dict[str, Published]:
    """DepthAnything/Depth-Anything-V2 @ a561b84 (Small Apache-2.0, Base and Large CC BY-NC 4.0): inverse relative depth.

    The metric files (indoor 20 m, outdoor 80 m) give metres through a sigmoid.
    """
    found: dict[str, Published] = {}
    for letter, size, width, reassemble, blocks in (
        ("s", "small", 64, (48, 96, 192, 384), (2, 5, 8, 11)),
        ("b", "base", 128, (96, 192, 384, 768), (2, 5, 8, 11)),
        ("l", "large", 256, (256, 512, 1024, 1024), (4, 11, 17, 23)),
    ):
        for suffix, rule in (
            ("", DepthRule("relu")),
            ("_metric_indoor", DepthRule("sigmoid", max_depth=20.0)),
            ("_metric_outdoor", DepthRule("sigmoid", max_depth=80.0)),
        ):
            found[f"depth_anything_v2_vit{letter}{suffix}"] = Published(
                f"vit_{size}_patch14_dinov2",
                "dpt",
                "DepthAnything/Depth-Anything-V2",
                backbone_args={"out_indices": blocks, "norm": True, "positions": "dinov2"},
                head_args={"width": width, "reassemble": reassemble, "patch_size": 14},
                rule=rule,
                normalisation=IMAGENET,
                size=(518, 518),
                multiple=14,
                method="lower_bound",
            )
    return found


def _glpn() -> dict[str, Published]:
    """vinvino02/GLPDepth @ a048528 (no licence file): metres. The encoder, MiT-B4, is timm's PVTv2-B4 with other MLPs."""
    return {
        name: Published(
            "pvt_v2_b4",
            "glpn",
            "vinvino02/GLPDepth",
            backbone_args={"mlp_ratios": (4, 4, 4, 4)},
            rule=DepthRule("sigmoid", max_depth=depth),
            normalisation=RAW,
            size=size,
        )
        for name, depth, size in (("glpn_nyu", 10.0, (480, 640)), ("glpn_kitti", 80.0, (352, 1216)))
    }


def _mmsegmentation() -> dict[str, Published]:
    """UPerNet on the zoo's backbones (`import backbones` first) and on plain ViTs, and PoolFormer's semantic FPN, ADE20K.

    The plain ViTs are mmsegmentation's: "mln" has its MultiLevelNeck, "ln" a norm behind the last map.
    """
    upernet = ["swin_t", "swin_s", "swin_b", "swin_l", "nat_mini", "nat_tiny", "nat_small", "nat_base"]
    upernet += [f"dinat_{size}" for size in ("mini", "tiny", "small", "base", "large")]
    upernet += [f"dinat_s_{size}" for size in ("tiny", "small", "base", "large")] + ["litv2_s", "litv2_m", "litv2_b"]
    shared: dict[str, Any] = {
        "source": "open-mmlab/mmsegmentation",
        "out_channels": ADE20K,
        "backbone_args": {"feature_norms": True},
        "normalisation": IMAGENET,
        "size": (512, 512),
    }
    found = {f"upernet_{name}": Published(name, "upernet", aux_head="fcn", **shared) for name in upernet}
    for name, backbone in (
        ("vit_b16", "vit_base_patch16_224"),
        ("deit_s16", "deit_small_patch16_224"),
        ("deit_b16", "deit_base_patch16_224"),
    ):
        for form in ("", "_mln", "_ln_mln") if name != "vit_b16" else ("_mln", "_ln_mln"):
            last = "norm" if "ln" in form.split("_") else "blocks.11"
            args = {"positions": "mmsegmentation", "taps": ("blocks.2", "blocks.5", "blocks.8", last)}
            found[f"upernet_{name}{form}"] = Published(
                backbone,
                "upernet",
                aux_head="fcn",
                aux_args={"index": 3},
                neck="multilevel" if form else None,
                img_size=(512, 512),
                **shared | {"backbone_args": args},
            )
    for size in ("s12", "s24", "s36", "m36", "m48"):
        found[f"fpn_poolformer_{size}"] = Published(f"poolformer_{size}_gn", "fpn", **shared)
    return found


CLASSES = {"coco": 133, "ade20k": 150, "cityscapes": 19}


def _kmax() -> dict[str, Published]:
    """bytedance/kmax-deeplab @ f8e1d04 (Apache-2.0): panoptic.

    Its authors resize an image until it fits `size` and pad it to that, right and bottom, with zeros after the normalisation.
    On Cityscapes the head also reads the stem's map, before or after the first stage's as its authors sort them.
    """
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    backbones: dict[str, tuple[str, dict[str, Any], list[str]]] = {
        "r50": ("resnet50", {"norm_layer": norm}, ["layer1", "maxpool", "layer2", "layer3", "layer4"])
    }
    for size in ("tiny", "small", "base", "large"):
        taps = ["stem", "stages.0", "stages.1", "stages.2", "stages.3"]
        backbones[f"convnext_{size}"] = (f"convnext_{size}", {"pad_patches": True}, taps)
    found: dict[str, Published] = {}
    for name, (backbone, args, taps) in backbones.items():
        for data in CLASSES if name in ("r50", "convnext_large") else ["coco"]:
            five = data == "cityscapes"
            head_args: dict[str, Any] = (
                {"queries": 256, "aux": "plain"} if five else {"drop_path": 0.2 if data == "coco" else 0.0}
            )
            found[f"kmax_{name}_{data}"] = Published(
                backbone,
                "kmax",
                "bytedance/kmax-deeplab",
                out_channels=CLASSES[data],
                head_args=head_args,
                backbone_args=args | ({"taps": taps} if five else {}),
                size=(1025, 2049) if five else (1281, 1281),
                multiple=1,
                method="upper_bound",
            )
    return found


def _mask2former() -> dict[str, Published]:
    """facebookresearch/Mask2Former @ 9b0651c (MIT; weights CC BY-NC 4.0): semantic (ADE20K, Cityscapes) and panoptic (COCO).

    The network is one for all tasks: a file of another data set or task loads with its number of classes and of queries.
    "swin_b" stands for both of its pretrainings, ImageNet-1K and 22K.
    """
    backbones: dict[str, tuple[str, dict[str, Any]]] = {
        "r50": ("resnet50", {}),
        "r101": ("resnet101", {}),
        "swin_t": ("swin_t", {"feature_norms": True}),
        "swin_s": ("swin_s", {"feature_norms": True}),
        "swin_b": ("swin_b_384", {"feature_norms": True}),
        "swin_l": ("swin_l_384", {"feature_norms": True}),
    }
    sizes = {"ade20k": (512, 512), "cityscapes": (1024, 2048), "coco": (800, 800)}
    return {
        f"mask2former_{name}_{data}": Published(
            backbone,
            "mask2former",
            "facebookresearch/Mask2Former",
            out_channels=CLASSES[data],
            head_args={"queries": 200} if (name, data) == ("swin_l", "coco") else {},
            backbone_args=args | {"multiple": 32},
            normalisation=IMAGENET,
            size=size,
            multiple=1,
            method="lower_bound",
        )
        for name, (backbone, args) in backbones.items()
        for data, size in sizes.items()
    }


PUBLISHED: dict[str, Published] = _dpt() | _midas() | _depth_anything() | _glpn() | _mmsegmentation() | _kmax() | _mask2former()
