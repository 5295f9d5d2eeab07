"""DPT heads: isl-org's (DPT and MiDaS), Depth-Anything-V2's and mmsegmentation's (also DINOv3's and AnyDepth's) names."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from weights.rules import Rules, rename_all


def shifted(pattern: str) -> Callable[[re.Match], str]:
    """The replacement `pattern` with {0} standing for the first group minus one: the authors count levels from 1."""
    return lambda m: m.expand(pattern.replace("{0}", str(int(m[1]) - 1)))


SCRATCH: Rules = [  # shared by isl-org and Depth-Anything
    (r"^scratch\.layer(\d)_rn\.", shifted("layers.{0}.")),
    (r"^scratch\.refinenet(\d)\.resConfUnit(\d)\.", shifted(r"fusions.{0}.unit\2.")),
    (r"^scratch\.refinenet(\d)\.out_conv\.", shifted("fusions.{0}.out.")),
]
ISL: Rules = [
    (r"^(?:pretrained\.)?act_postprocess(\d)\.0\.project\.0\.", shifted("reassembles.{0}.readout.0.")),
    (r"^(?:pretrained\.)?act_postprocess(\d)\.3\.", shifted("reassembles.{0}.project.")),
    (r"^(?:pretrained\.)?act_postprocess(\d)\.4\.", shifted("reassembles.{0}.resample.")),
    (r"^scratch\.stem_transpose\.0\.c\.", "stem.0.conv."),
    (r"^scratch\.stem_transpose\.0\.bn\.", "stem.0.bn."),
    (r"^scratch\.stem_transpose\.2\.c\.", "stem.1.conv."),
    (r"^scratch\.stem_transpose\.2\.bn\.", "stem.1.bn."),
    *SCRATCH,
]
ISL_DEPTH: Rules = [(rf"^scratch\.output_conv\.{2 * i}\.", f"predictor.conv{i + 1}.") for i in range(3)]
ISL_SEGMENTATION: Rules = [
    (r"^scratch\.output_conv\.0\.", "predictor.block.conv."),
    (r"^scratch\.output_conv\.1\.", "predictor.block.bn."),
    (r"^scratch\.output_conv\.4\.", "predictor.classify."),
]
DEPTH_ANYTHING: Rules = [
    (r"^(?:depth_head\.)?readout_projects\.(\d)\.0\.", r"reassembles.\1.readout.0."),
    (r"^(?:depth_head\.)?projects\.(\d)\.", r"reassembles.\1.project."),
    (r"^(?:depth_head\.)?resize_layers\.(\d)\.", r"reassembles.\1.resample."),
    (r"^(?:depth_head\.)?scratch\.", "scratch."),
    (r"^scratch\.output_conv1\.", "predictor.conv1."),
    (r"^scratch\.output_conv2\.0\.", "predictor.conv2."),
    (r"^scratch\.output_conv2\.2\.", "predictor.conv3."),
    *SCRATCH,
]
MMSEG: Rules = [
    (r"^(?:decode_head\.)?reassemble_blocks\.readout_projects\.(\d)\.0\.", r"reassembles.\1.readout.0."),
    (r"^(?:decode_head\.)?reassemble_blocks\.projects\.(\d)\.conv\.", r"reassembles.\1.project."),
    (r"^(?:decode_head\.)?reassemble_blocks\.resize_layers\.(\d)\.", r"reassembles.\1.resample."),
    (r"^(?:decode_head\.)?reassemble_blocks\.batchnorm_layers\.(\d)\.", r"reassembles.\1.norm."),
    (r"^(?:decode_head\.)?convs\.(\d)\.conv\.", r"layers.\1."),
    (r"^(?:decode_head\.)?fusion_blocks\.", "fusion_blocks."),
    (r"^(fusion_blocks\.\d)\.project\.conv\.", r"\1.out."),
    (r"^(fusion_blocks\.\d)\.res_conv_unit(\d)\.conv(\d)\.conv\.", r"\1.unit\2.conv\3."),
    (r"^(fusion_blocks\.\d)\.res_conv_unit(\d)\.conv(\d)\.bn\.", r"\1.unit\2.bn\3."),
    (r"^decode_head\.project\.", "project."),
    (r"^(?:decode_head\.)?conv_depth\.head\.0\.", "predictor.conv1."),
    (r"^(?:decode_head\.)?conv_depth\.head\.2\.", "predictor.conv2."),
    (r"^(?:decode_head\.)?conv_depth\.head\.4\.", "predictor.conv3."),
    (r"^(?:decode_head\.)?conv_seg\.", "predictor.1."),
]


def source_format(keys: Iterable[str]) -> str:
    """ "isl", "depth-anything", "mmsegmentation", or "native"."""
    keys = list(keys)
    if any("reassemble_blocks." in key or key.startswith(("fusion_blocks.", "conv_depth.")) for key in keys):
        return "mmsegmentation"
    if any(re.match(r"(depth_head\.)?(projects\.\d|scratch\.output_conv1)\.", key) for key in keys):
        return "depth-anything"
    if any(re.match(r"scratch\.|(pretrained\.)?act_postprocess", key) for key in keys):
        return "isl"
    return "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Our names. Dropped: what the authors store and never run, `auxlayer` and the coarsest block's first residual unit."""
    levels = len(model.fusions)
    form = source_format(state_dict)
    rules = {"isl": ISL, "depth-anything": DEPTH_ANYTHING, "mmsegmentation": MMSEG, "native": []}[form]
    if form == "isl":
        segmentation = any(key.startswith("scratch.output_conv.1.") for key in state_dict)
        rules = [*rules, *(ISL_SEGMENTATION if segmentation else ISL_DEPTH)]
    native = {}
    for key, value in state_dict.items():
        key = rename_all(key, rules)
        if form == "mmsegmentation":  # counts from the coarsest
            key = re.sub(r"^fusion_blocks\.(\d)\.", lambda m: f"fusions.{levels - 1 - int(m[1])}.", key)
        if not key.startswith(("auxlayer.", f"fusions.{levels - 1}.unit1.")):
            native[key] = value
    return native


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The names of the program whose head this one is: mmsegmentation's with a `project` convolution or a linear predictor,
    Depth-Anything's with a patch size, else isl-org's (with `pretrained.` before act_postprocess, as in whole files)."""
    levels = len(model.fusions)
    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]]
    if any(key.startswith(("project.", "predictor.1.")) for key in state_dict):
        rules = [
            (r"^reassembles\.(\d)\.readout\.", r"reassemble_blocks.readout_projects.\1."),
            (r"^reassembles\.(\d)\.project\.", r"reassemble_blocks.projects.\1.conv."),
            (r"^reassembles\.(\d)\.resample\.", r"reassemble_blocks.resize_layers.\1."),
            (r"^reassembles\.(\d)\.norm\.", r"reassemble_blocks.batchnorm_layers.\1."),
            (r"^layers\.(\d)\.", r"convs.\1.conv."),
            (r"^fusions\.(\d)\.", lambda m: f"fusion_blocks.{levels - 1 - int(m[1])}."),
            (r"^(fusion_blocks\.\d)\.out\.", r"\1.project.conv."),
            (r"^(fusion_blocks\.\d)\.unit(\d)\.conv(\d)\.", r"\1.res_conv_unit\2.conv\3.conv."),
            (r"^(fusion_blocks\.\d)\.unit(\d)\.bn(\d)\.", r"\1.res_conv_unit\2.conv\3.bn."),
            (r"^predictor\.conv(\d)\.", lambda m: f"conv_depth.head.{2 * int(m[1]) - 2}."),
            (r"^predictor\.1\.", "conv_seg."),
        ]
    else:
        rules = [
            (r"^layers\.(\d)\.", lambda m: f"scratch.layer{int(m[1]) + 1}_rn."),
            (r"^fusions\.(\d)\.unit(\d)\.", lambda m: f"scratch.refinenet{int(m[1]) + 1}.resConfUnit{m[2]}."),
            (r"^fusions\.(\d)\.out\.", lambda m: f"scratch.refinenet{int(m[1]) + 1}.out_conv."),
        ]
        if model.patch_size is not None:
            rules += [
                (r"^reassembles\.(\d)\.readout\.", r"readout_projects.\1."),
                (r"^reassembles\.(\d)\.project\.", r"projects.\1."),
                (r"^reassembles\.(\d)\.resample\.", r"resize_layers.\1."),
                (r"^predictor\.conv1\.", "scratch.output_conv1."),
                (r"^predictor\.conv([23])\.", lambda m: f"scratch.output_conv2.{2 * int(m[1]) - 4}."),
            ]
        else:
            part = {"readout": "0.project", "project": "3", "resample": "4"}
            rules += [
                (
                    r"^reassembles\.(\d)\.(readout|project|resample)\.",
                    lambda m: f"pretrained.act_postprocess{int(m[1]) + 1}.{part[m[2]]}.",
                ),
                (r"^stem\.(\d)\.conv\.", lambda m: f"scratch.stem_transpose.{2 * int(m[1])}.c."),
                (r"^stem\.(\d)\.bn\.", lambda m: f"scratch.stem_transpose.{2 * int(m[1])}.bn."),
                (r"^predictor\.conv(\d)\.", lambda m: f"scratch.output_conv.{2 * int(m[1]) - 2}."),
                (r"^predictor\.block\.conv\.", "scratch.output_conv.0."),
                (r"^predictor\.block\.bn\.", "scratch.output_conv.1."),
                (r"^predictor\.classify\.", "scratch.output_conv.4."),
            ]
    official = {}
    for key, value in state_dict.items():
        official[rename_all(key, rules)] = value
    return official
