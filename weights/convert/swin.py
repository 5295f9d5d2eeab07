"""Swin checkpoints: the authors' (classification and dense) and timm's."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from weights.resample import resample_bias_table, resample_position_embedding, square
from weights.rules import Rules, rename

COMMON: Rules = [  # equal in the authors' files and timm's
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^norm(\d)\.", r"feature_norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^absolute_pos_embed$", "patch_embed.absolute_pos_embed"),
]
OFFICIAL: Rules = [(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."), *COMMON]
TIMM: Rules = [(r"^layers\.(\d+)\.downsample\.", r"stages.\1.downsample."), *COMMON]  # timm, too, downsamples before the blocks
NATIVE: Rules = [  # ours -> the authors'
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
    (r"^stages\.(\d+)\.blocks\.", r"layers.\1.blocks."),
    (r"^feature_norms\.(\d)\.", r"norm\1."),
    (r"^head\.fc\.", "head."),
    (r"^patch_embed\.absolute_pos_embed$", "absolute_pos_embed"),
]
TABLE = "relative_position_bias_table"
POSITIONS = "patch_embed.absolute_pos_embed"


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    keys = list(keys)
    if not any(key.startswith("layers.") for key in keys):
        return "native"
    if any(re.match(r"norm\d\.", key) for key in keys):
        return "official-dense"
    merges = any(key.startswith("layers.0.downsample.") for key in keys)  # at the end of a stage, so only the authors'
    return "official" if merges or not any(re.match(r"head\.fc\.|layers\.\d+\.downsample\.", key) for key in keys) else "timm"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Our names; masks and indices dropped, absolute positions laid out as a map."""
    rules = {"native": [], "timm": TIMM}.get(source_format(state_dict), OFFICIAL)
    own = dict(model.named_parameters())
    native = {}
    for key, value in state_dict.items():
        key = rename(key, rules)
        if key.endswith(("relative_position_index", "attn_mask")):
            continue
        if key == POSITIONS and key in own:
            value = position_map(value, tuple(own[key].shape[2:]))
        native[key] = value
    return native


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    """Bias tables for the model's window, absolute positions for its grid."""
    own = model.get_parameter(name)
    if name.endswith(TABLE):
        return resample_bias_table(value, (math.isqrt(len(own)),) * 2)
    return resample_position_embedding(value, own.shape[2:]) if name == POSITIONS else value


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The authors' names, with the indices and masks that their files hold; the dense code's where the model follows it."""
    official = {}
    for key, value in state_dict.items():
        name = rename(key, NATIVE)
        if name == "absolute_pos_embed" and not model.dense:
            value = value.flatten(2).mT
        official[name] = value
        if name.endswith(TABLE):
            index = relative_position_index((math.isqrt(len(value)) + 1) // 2, value.device)
            official[name.removesuffix(TABLE) + "relative_position_index"] = index
    for i, stage in enumerate(() if model.dense else model.stages):
        for j, block in enumerate(stage.blocks):
            mask = block.attn.mask(*model.grid(i))
            if mask is not None:
                official[f"layers.{i}.blocks.{j}.attn_mask"] = mask
    return official


def relative_position_index(window: int, device: torch.device | None = None) -> Tensor:
    """For every query (row) and key (column) of a window, row-major, its entry in the flattened table; query minus key."""
    axis = torch.arange(window, device=device)
    axis = axis[:, None] - axis + window - 1
    return (axis[:, None, :, None] * (2 * window - 1) + axis[None, :, None, :]).reshape(window**2, window**2)


def position_map(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Absolute positions, 1 L C of the classification code or 1 C h w of the dense code, as 1 C h w.

    grid: the model's, which L positions are taken for if they fill it; any others are taken for a square.
    """
    if embedding.ndim != 3:
        return embedding
    tokens = embedding.shape[1]
    return embedding.mT.unflatten(2, grid if tokens == grid[0] * grid[1] else square(tokens, "a position embedding"))
