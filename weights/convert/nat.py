"""NAT, DiNAT and isotropic checkpoints: the authors' (classification and dense) and Hugging Face's."""

import re
from typing import Any

import torch
from torch import Tensor

from weights.resample import resample_bias_table
from weights.rules import Rules, rename

OFFICIAL: Rules = [  # authors' name -> ours, as regular expressions
    (r"^(?:levels|layers)\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^(?:levels|layers)\.(\d+)\.blocks\.(\d+)\.gamma(\d)$", r"stages.\1.blocks.\2.scale\3.gamma"),
    (r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.", r"stages.\1.blocks.0."),  # isotropic: a stage is one block
    (r"^norm(\d)\.", r"feature_norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
HUGGINGFACE: Rules = [  # Hugging Face's name -> the authors', after query, key and value are one again
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.downsample\.", r"levels.\1.downsample."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.layernorm_before\.", r"levels.\1.blocks.\2.norm1."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.layernorm_after\.", r"levels.\1.blocks.\2.norm2."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.attention\.self\.", r"levels.\1.blocks.\2.attn."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.attention\.output\.dense\.", r"levels.\1.blocks.\2.attn.proj."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.intermediate\.dense\.", r"levels.\1.blocks.\2.mlp.fc1."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.output\.dense\.", r"levels.\1.blocks.\2.mlp.fc2."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.(gamma\d)$", r"levels.\1.blocks.\2.\3"),
    (r"^hidden_states_norms\.stage(\d)\.", lambda m: f"norm{int(m[1]) - 1}."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]
NATIVE: Rules = [  # ours -> the authors'
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"levels.{int(m[1]) - 1}.downsample."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.scale(\d)\.gamma$", r"levels.\1.blocks.\2.gamma\3"),
    (r"^stages\.(\d+)\.blocks\.", r"levels.\1.blocks."),
    (r"^feature_norms\.(\d)\.", r"norm\1."),
    (r"^head\.fc\.", "head."),
]
ISOTROPIC: Rules = [(r"^stages\.(\d+)\.blocks\.0\.", r"layers.\1."), *NATIVE]


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    keys = list(keys)
    if any(re.match(r"(?:(?:di)?nat\.)?encoder\.levels\.", key) for key in keys):
        return "huggingface"
    if any(re.match(r"(?:levels|layers)\.\d", key) for key in keys):
        return "official-dense" if any(re.match(r"norm\d\.", key) for key in keys) else "official"
    return "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Our names; the index buffers of vitrpb dropped."""
    if source_format(state_dict) == "huggingface":
        state_dict = from_huggingface(state_dict)
    native = {rename(key, OFFICIAL): value for key, value in state_dict.items()}
    return {key: value for key, value in native.items() if not key.endswith("relative_position_index")}


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    """Bias tables for the model's kernel or grid."""
    return resample_bias_table(value, model.get_parameter(name).shape[-2:]) if name.endswith(".rpb") else value


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The authors' names, with the index buffers that vitrpb's files hold."""
    official = {}
    for key, value in state_dict.items():
        name = rename(key, ISOTROPIC if model.layout in ("isotropic", "vitrpb") else NATIVE)
        if model.layout == "dinat_s":
            name = re.sub(r"^levels\.", "layers.", name)
        official[name] = value
        if model.layout == "vitrpb" and name.endswith(".rpb"):
            height, width = ((side + 1) // 2 for side in value.shape[1:])
            index = relative_position_index(height, width, device=value.device)
            official[name.removesuffix("rpb") + "relative_position_index"] = index
    return official


def relative_position_index(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """For every query (row) and key (column) of a grid, row-major, its entry in the flattened table; key minus query."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    rows = rows - rows[:, None] + height - 1
    columns = columns - columns[:, None] + width - 1
    return (rows[:, None, :, None] * (2 * width - 1) + columns[None, :, None, :]).reshape(height * width, height * width)


def from_huggingface(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names and split tensors -> the authors'."""
    official: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        key = re.sub(r"^(di)?nat\.", "", key)
        if match := re.match(r"(.*attention\.self\.)(query|key|value)\.(weight|bias)$", key):
            parts.setdefault(f"{match[1]}qkv.{match[3]}", {})[match[2]] = value
        elif key.endswith(".layer_scale_parameters"):
            stem = key.removesuffix("layer_scale_parameters")
            official |= {rename(f"{stem}gamma{i + 1}", HUGGINGFACE): row for i, row in enumerate(value)}
        else:
            official[rename(key, HUGGINGFACE)] = value
    for key, part in parts.items():
        official[rename(key, HUGGINGFACE)] = torch.cat([part[name] for name in ("query", "key", "value")])
    return official
