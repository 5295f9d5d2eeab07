"""FLatten checkpoints: the authors', by host network."""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from weights.convert import swin
from weights.resample import resample_position_embedding
from weights.rules import Rules, rename

PVT: Rules = [  # authors' name -> ours, as regular expressions
    (r"^patch_embed1\.", "patch_embed."),
    (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
    (r"^block(\d)\.(\d+)\.mlp\.dwconv\.dwconv\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.mlp.dwconv."),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.pos_embed"),
    (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    (r"^norm\.(weight|bias)$", r"unused_norm_\1"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
FROM_PVT: Rules = [  # ours -> the authors'
    (r"^patch_embed\.", "patch_embed1."),
    (r"^stages\.(\d)\.downsample\.", lambda m: f"patch_embed{int(m[1]) + 1}."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.mlp\.dwconv\.", lambda m: f"block{int(m[1]) + 1}.{m[2]}.mlp.dwconv.dwconv."),
    (r"^stages\.(\d)\.blocks\.", lambda m: f"block{int(m[1]) + 1}."),
    (r"^stages\.(\d)\.pos_embed$", lambda m: f"pos_embed{int(m[1]) + 1}"),
    (r"^stages\.(\d)\.norm\.", lambda m: f"norm{int(m[1]) + 1}."),
    (r"^unused_norm_", "norm."),
    (r"^head\.fc\.", "head."),
]
CSWIN: Rules = [
    (r"^stage1_conv_embed\.0\.", "patch_embed.proj."),
    (r"^stage1_conv_embed\.2\.", "patch_embed.norm."),
    (r"^merge(\d)\.conv\.", r"stages.\1.downsample.proj."),
    (r"^merge(\d)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^stage(\d)\.(\d+)\.(qkv|proj|attns)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.attn.{m[3]}."),
    (r"^stage(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
FROM_CSWIN: Rules = [
    (r"^patch_embed\.proj\.", "stage1_conv_embed.0."),
    (r"^patch_embed\.norm\.", "stage1_conv_embed.2."),
    (r"^stages\.(\d)\.downsample\.proj\.", r"merge\1.conv."),
    (r"^stages\.(\d)\.downsample\.norm\.", r"merge\1.norm."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.attn\.", lambda m: f"stage{int(m[1]) + 1}.{m[2]}."),
    (r"^stages\.(\d)\.blocks\.", lambda m: f"stage{int(m[1]) + 1}."),
    (r"^head\.fc\.", "head."),
]
ENCODING = ".positional_encoding"


def source_format(keys: Iterable[str]) -> str:
    """Which program wrote a state dict with these keys."""
    keys = list(keys)
    if any(re.match(r"block\d\.|stage1_conv_embed\.|stage\d\.\d", key) for key in keys):
        return "official"
    return swin.source_format(keys)


def to_native(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    if source_format(state_dict) == "native":
        return dict(state_dict)
    if model.host == "swin":
        return swin.to_native(state_dict, model)
    rules = PVT if model.host == "pvt" else CSWIN
    return {rename(key, rules): value for key, value in state_dict.items()}


def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    if model.host == "swin":
        return swin.to_official(state_dict, model)
    rules = FROM_PVT if model.host == "pvt" else FROM_CSWIN
    return {rename(key, rules): value for key, value in state_dict.items()}


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    """Encodings for the model's maps, square in the file (bicubic, as the authors' at 384); the rest as Swin's."""
    if name.endswith(ENCODING):
        return resample_position_embedding(value, model.get_submodule(name.removesuffix(ENCODING)).keys)
    if model.host == "pvt":
        stage = model.stages[int(name.split(".")[1])] if name.endswith(".pos_embed") else None
        return value if stage is None else resample_position_embedding(value, stage.grid, mode="bilinear")
    return swin.resize(name, value, model) if model.host == "swin" else value
