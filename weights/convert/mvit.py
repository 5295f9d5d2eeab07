"""MViT (version 1) checkpoints: SlowFast's image model, and torchvision's video model with one frame."""

import re
from typing import Any

import torch
from torch import Tensor

from weights.resample import resample_position_embedding
from weights.rules import Rules, rename

OFFICIAL: Rules = [(r"^head\.projection\.", "head.fc.")]
NATIVE: Rules = [(r"^head\.fc\.", "head.projection.")]
TORCHVISION: Rules = [
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^head\.1\.", "head.fc."),
    (r"\.attn\.project\.0\.", ".attn.proj."),
    (r"\.attn\.pool_([qkv])\.pool\.", r".attn.pool_\1."),
    (r"\.attn\.pool_([qkv])\.norm_act\.0\.", r".attn.norm_\1."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^(blocks\.\d+)\.project\.", r"\1.proj."),
]


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    keys = list(keys)
    if any(key.startswith("pos_encoding.") for key in keys):
        return "torchvision"
    return "official" if any(key.startswith("blocks.") for key in keys) else "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Our names, and convolutions without the axis of time."""
    written_by = source_format(state_dict)
    if written_by == "native":
        return dict(state_dict)
    rules = OFFICIAL
    if written_by == "torchvision":
        state_dict, rules = _one_position_table(state_dict), TORCHVISION
    places = _places(model)
    return {_place(rename(key, rules), places): _without_time(key, value) for key, value in state_dict.items()}


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """SlowFast's names, and its pooling convolutions over one frame."""
    starts = [0]
    for stage in model.stages:
        starts.append(starts[-1] + len(stage.blocks))
    official = {}
    for key, value in state_dict.items():
        name = re.sub(r"^stages\.(\d+)\.blocks\.(\d+)", lambda m: f"blocks.{starts[int(m[1])] + int(m[2])}", key)
        official[rename(name, NATIVE)] = value[:, :, None] if ".pool_" in key else value
    return official


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    """Positions of another image size, a square one in the file."""
    return resample_position_embedding(value, model.grid, 1, mode="bilinear") if name == "pos_embed" else value


def _places(model: Any) -> list[str]:
    """Our name of each block of the authors' one list."""
    return [f"stages.{i}.blocks.{j}" for i, stage in enumerate(model.stages) for j in range(len(stage.blocks))]


def _place(key: str, places: list[str]) -> str:
    """A name that begins with an authors' block, in ours; unchanged for a block that the model does not have."""
    found = re.match(r"^blocks\.(\d+)(?=\.)", key)
    return key if found is None or int(found[1]) >= len(places) else places[int(found[1])] + key[found.end() :]


def _without_time(key: str, value: Tensor) -> Tensor:
    """A convolution's weight without the axis of time. Raises ValueError for kernels over several frames."""
    if value.ndim != 5:
        return value
    if value.shape[2] != 1:
        raise ValueError(f"{key} is a kernel over {value.shape[2]} frames; mvit takes weights for images, of one frame")
    return value[:, :, 0]


def _one_position_table(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's class token and its positions of class, space and time -> SlowFast's cls_token and pos_embed."""
    parts = {key.removeprefix("pos_encoding."): value for key, value in state_dict.items() if key.startswith("pos_encoding.")}
    state = {key: value for key, value in state_dict.items() if not key.startswith("pos_encoding.")}
    if frames := parts["temporal_pos"].shape[0] - 1:
        raise ValueError(f"these positions are of {frames + 1} frames; mvit takes weights for images, of one frame")
    state["cls_token"] = parts["class_token"][None, None]
    state["pos_embed"] = torch.cat([parts["class_pos"][None], parts["spatial_pos"] + parts["temporal_pos"]])[None]
    return state
