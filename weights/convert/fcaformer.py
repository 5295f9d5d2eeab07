"""FcaFormer checkpoints: the authors' (classification and dense)."""

import math
import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from weights.rules import Rules, rename

OFFICIAL: Rules = [  # authors' name -> ours, as regular expressions
    (r"^patch_embed\.seq\.", "patch_embed."),
    (r"^layer_(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layer_(\d)\.", r"stages.\1."),
    (r"^norm_head\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^head(\d)\.weight$", r"feature_norms.\1.0.weight"),
    (r"^norm(\d)\.", r"feature_norms.\1.1."),
]
NATIVE: Rules = [  # ours -> the authors'
    (r"^patch_embed\.", "patch_embed.seq."),
    (r"^stages\.(\d)\.downsample\.", lambda m: f"layer_{int(m[1]) - 1}.downsample."),
    (r"^stages\.(\d)\.", r"layer_\1."),
    (r"^head\.norm\.", "norm_head."),
    (r"^head\.fc\.", "head."),
    (r"^feature_norms\.(\d)\.0\.", r"head\1."),
    (r"^feature_norms\.(\d)\.1\.", r"norm\1."),
]


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    keys = list(keys)
    if not any(key.startswith("layer_") for key in keys):
        return "native"
    return "official-dense" if any(re.match(r"head\d\.", key) for key in keys) else "official"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    rules = [] if source_format(state_dict) == "native" else OFFICIAL
    return {rename(key, rules): value for key, value in state_dict.items()}


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {rename(key, NATIVE): value for key, value in state_dict.items()}


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    """What belongs to the positions of a window of another size, which is taken for square in the file."""
    kind = name.rsplit(".", 1)[-1]
    if kind not in POSITIONS:
        return value
    size = model.stages[int(name.split(".")[1])].size
    axis = POSITIONS[kind]
    if kind == "attention_biases":
        side = math.isqrt(value.shape[axis])
    else:  # one block of the file leaves this many tokens
        blocks = model.get_parameter(name).shape[axis] // left_behind(size)
        side = 4 * math.isqrt(value.shape[axis] // blocks)
    return resize_positions(kind, value, (side, side), size)


POSITIONS = {"attention_biases": 1, "s_scale_factors": 1, "s_token_bias": 3}  # parameter -> the axis of positions


def left_behind(size: tuple[int, int]) -> int:
    """How many tokens a block leaves behind of a window of this size."""
    return -(-size[0] // 4) * -(-size[1] // 4)


def resize_positions(kind: str, value: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A parameter of POSITIONS for windows of another size, as an image per head (and per earlier block), bilinear.

    Args:
        kind: a name of POSITIONS.
        value: the parameter.
        old: (rows, columns) of the window it is for.
        new: (rows, columns) of the window it is wanted for.
    """
    axis = POSITIONS[kind]
    if kind != "attention_biases":
        old, new = ((-(-size[0] // 4), -(-size[1] // 4)) for size in (old, new))
    if old == new or value.shape[axis] % (old[0] * old[1]):
        return value
    images = value.movedim(axis, -1)
    flat = images.reshape(-1, 1, *old).float()
    # Offsets of a bias table and left tokens both begin in the corner, so the corners stay where they are.
    resized = F.interpolate(flat, new, mode="bilinear", align_corners=True).to(value.dtype)
    return resized.reshape(*images.shape[:-1], -1).movedim(-1, axis)
