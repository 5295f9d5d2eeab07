"""PoolFormer checkpoints: the authors' (classification and dense) and timm's."""

import re
from typing import Any

from torch import Tensor

from weights.rules import Rules, rename

OFFICIAL: Rules = [  # authors' name -> ours, as regular expressions
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^network\.([0246])\.(\d+)\.layer_scale_(\d)$", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}.scale{m[3]}.gamma"),
    (r"^network\.([0246])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"^network\.([135])\.proj\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample."),
    (r"^norm([0246])\.", lambda m: f"feature_norms.{int(m[1]) // 2}."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
TIMM: Rules = [  # timm's name -> ours
    (r"^stem\.conv\.", "patch_embed."),
    (r"^(stages\.\d+)\.downsample\.conv\.", r"\1.downsample."),
    (r"^(stages\.\d+\.blocks\.\d+)\.layer_scale(\d)\.scale$", r"\1.scale\2.gamma"),
    (r"^head\.norm\.", "norm."),
]
NATIVE: Rules = [  # ours -> the authors'
    (r"^patch_embed\.", "patch_embed.proj."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.scale(\d)\.gamma$", lambda m: f"network.{2 * int(m[1])}.{m[2]}.layer_scale_{m[3]}"),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda m: f"network.{2 * int(m[1])}.{m[2]}."),
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"network.{2 * int(m[1]) - 1}.proj."),
    (r"^feature_norms\.(\d+)\.", lambda m: f"norm{2 * int(m[1])}."),
    (r"^head\.fc\.", "head."),
]


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    keys = list(keys)
    if any(key.startswith("network.") for key in keys):
        return "official-dense" if any(re.match(r"norm\d\.", key) for key in keys) else "official"
    return "timm" if any(key.startswith("stem.conv.") for key in keys) else "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    rules = {"official": OFFICIAL, "official-dense": OFFICIAL, "timm": TIMM, "native": []}[source_format(state_dict)]
    return {rename(key, rules): value for key, value in state_dict.items()}


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {rename(key, NATIVE): value for key, value in state_dict.items()}
