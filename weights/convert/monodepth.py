"""Lite-Mono checkpoints: the authors' encoder.pth."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from weights.rules import Rules, rename

BLOCK = r"^stages\.(\d)\.(\d+)\."
OFFICIAL: Rules = [  # authors' name -> ours, as regular expressions
    (r"^downsample_layers\.0\.(\d)\.conv\.", r"patch_embed.layers.\1.0."),
    (r"^downsample_layers\.0\.(\d)\.bn_gelu\.bn\.", r"patch_embed.layers.\1.1."),
    (r"^stem2\.0\.conv\.", "patch_embed.conv."),
    (r"^downsample_layers\.(\d)\.0\.conv\.", r"stages.\1.downsample."),
    (BLOCK + r"ddwconv\.conv\.", r"stages.\1.blocks.\2.conv."),
    (BLOCK + r"bn1\.", r"stages.\1.blocks.\2.norm."),
    (BLOCK + r"gamma_xca$", r"stages.\1.blocks.\2.gamma1"),
    (BLOCK + r"pos_embd\.token_projection\.", r"stages.\1.blocks.\2.pos_embed."),
    (BLOCK + r"norm_xca\.", r"stages.\1.blocks.\2.norm1."),
    (BLOCK + r"norm\.", r"stages.\1.blocks.\2.norm2."),
    (BLOCK + r"xca\.", r"stages.\1.blocks.\2.attn."),
    (BLOCK + r"pwconv([12])\.", r"stages.\1.blocks.\2.fc\3."),
    (BLOCK + r"gamma$", r"stages.\1.blocks.\2.gamma"),
]
OWN = r"^stages\.(\d)\.blocks\.(\d+)\."
NATIVE: Rules = [  # ours -> the authors'
    (r"^patch_embed\.layers\.(\d)\.0\.", r"downsample_layers.0.\1.conv."),
    (r"^patch_embed\.layers\.(\d)\.1\.", r"downsample_layers.0.\1.bn_gelu.bn."),
    (r"^patch_embed\.conv\.", "stem2.0.conv."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.0.conv."),
    (OWN + r"conv\.", r"stages.\1.\2.ddwconv.conv."),
    (OWN + r"norm\.", r"stages.\1.\2.bn1."),
    (OWN + r"gamma1$", r"stages.\1.\2.gamma_xca"),
    (OWN + r"gamma2?$", r"stages.\1.\2.gamma"),
    (OWN + r"pos_embed\.", r"stages.\1.\2.pos_embd.token_projection."),
    (OWN + r"norm1\.", r"stages.\1.\2.norm_xca."),
    (OWN + r"norm2\.", r"stages.\1.\2.norm."),
    (OWN + r"attn\.", r"stages.\1.\2.xca."),
    (OWN + r"fc([12])\.", r"stages.\1.\2.pwconv\3."),
    (r"^head\.fc\.", "head."),
]


def source_format(keys: Iterable[str]) -> str:
    """Which program wrote a state dict with these keys."""
    return "official" if any(key.startswith(("downsample_layers.", "stem2.")) for key in keys) else "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Our names. A dilated block's LayerNorm, which the authors' code makes and never calls, is left out."""
    if source_format(state_dict) == "native":
        return dict(state_dict)
    whole = {match[0] for key in state_dict if (match := re.match(BLOCK + "(?=gamma_xca)", key))}  # the global blocks
    found = {}
    for key, value in state_dict.items():
        match = re.match(BLOCK, key)
        if match and match[0] not in whole and key.startswith(f"{match[0]}norm."):
            continue
        name = rename(key, OFFICIAL)
        if match and match[0] in whole and key.endswith(".gamma"):
            name = f"{name}2"
        found[re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)] = value
    return found


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The authors' names, with a fresh LayerNorm where their code has one that it never calls: it loads strictly."""
    found = {}
    for key, value in state_dict.items():
        name = rename(key, NATIVE)
        found[name] = value
        if name.endswith(".ddwconv.conv.weight"):
            block = name.removesuffix("ddwconv.conv.weight")
            found[f"{block}norm.weight"] = torch.ones_like(value[:, 0, 0, 0])
            found[f"{block}norm.bias"] = torch.zeros_like(value[:, 0, 0, 0])
    return found
