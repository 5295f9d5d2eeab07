"""LITv2 checkpoints: the authors', classification and dense."""

import re
from typing import Any

from torch import Tensor

from weights.rules import Rules, rename

OFFICIAL: Rules = [  # authors' name -> ours, as regular expressions
    (r"^layers\.(\d)\.downsample\.dconv\.conv_offset\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.offset."),
    (r"^layers\.(\d)\.downsample\.dconv\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv."),
    (r"^layers\.(\d)\.downsample\.norm_layer\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm."),
    (r"^layers\.(\d)\.(blocks\.\d+\.mlp\.dwconv)\.dwconv\.", r"stages.\1.\2."),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"^norm(\d)\.", r"feature_norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
NATIVE: Rules = [  # ours -> the authors'
    (r"^stages\.(\d)\.downsample\.offset\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.dconv.conv_offset."),
    (r"^stages\.(\d)\.downsample\.conv\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.dconv."),
    (r"^stages\.(\d)\.downsample\.norm\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.norm_layer."),
    (r"^stages\.(\d)\.(blocks\.\d+\.mlp\.dwconv)\.", r"layers.\1.\2.dwconv."),
    (r"^stages\.(\d)\.blocks\.", r"layers.\1.blocks."),
    (r"^feature_norms\.(\d)\.", r"norm\1."),
    (r"^head\.fc\.", "head."),
]


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    keys = list(keys)
    if any(key.startswith("layers.") for key in keys):
        return "official-dense" if any(re.match(r"norm\d\.", key) for key in keys) else "official"
    return "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {rename(key, OFFICIAL): value for key, value in state_dict.items()}


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {rename(key, NATIVE): value for key, value in state_dict.items()}
