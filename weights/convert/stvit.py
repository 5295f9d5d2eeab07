"""STViT checkpoints: the authors'."""

import re
from typing import Any

import torch
from torch import Tensor

from weights.rules import Rules, rename

OFFICIAL: Rules = [  # authors' name -> ours, as regular expressions
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^layers\.(\d+)\.downsample\.proj\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.(\d+\.blocks\.\d+)\.gamma_(\d)$", r"stages.\1.scale\2.gamma"),
    (r"^layers\.(\d+\.blocks\.\d+)\.pos_embed\.conv\.", r"stages.\1.pos_embed."),
    (r"^layers\.(\d+\.blocks\.\d+)\.norm1\.norm\.", r"stages.\1.norm1."),
    (r"^layers\.(\d+\.blocks\.\d+)\.mlp2\.conv\.conv\.", r"stages.\1.mlp.conv."),
    (r"^layers\.(\d+\.blocks\.\d+)\.mlp2\.", r"stages.\1.mlp."),
    (r"^layers\.(\d+\.blocks\.\d+)\.attn\.stoken_refine\.", r"stages.\1.attn.refine."),
    (r"^layers\.(\d+\.blocks\.\d+)\.", r"stages.\1."),
    (r"^proj\.", "norm.0."),
    (r"^norm\.(?!\d)", "norm.1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
NATIVE: Rules = [  # ours -> the authors'
    (r"^patch_embed\.", "patch_embed.proj."),
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.proj."),
    (r"^stages\.(\d+\.blocks\.\d+)\.scale(\d)\.gamma$", r"layers.\1.gamma_\2"),
    (r"^stages\.(\d+\.blocks\.\d+)\.pos_embed\.", r"layers.\1.pos_embed.conv."),
    (r"^stages\.(\d+\.blocks\.\d+)\.norm1\.", r"layers.\1.norm1.norm."),
    (r"^stages\.(\d+\.blocks\.\d+)\.mlp\.conv\.", r"layers.\1.mlp2.conv.conv."),
    (r"^stages\.(\d+\.blocks\.\d+)\.mlp\.", r"layers.\1.mlp2."),
    (r"^stages\.(\d+\.blocks\.\d+)\.attn\.refine\.", r"layers.\1.attn.stoken_refine."),
    (r"^stages\.(\d+\.blocks\.\d+)\.", r"layers.\1."),
    (r"^norm\.0\.", "proj."),
    (r"^norm\.1\.", "norm."),
    (r"^head\.fc\.", "head."),
]
KERNELS = r"\.attn\.(?:un)?fold\.weights$"  # frozen identity kernels, 9 1 3 3


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    return "official" if any(key.startswith("layers.") for key in keys) else "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    if source_format(state_dict) == "native":
        return state_dict
    native = {}
    for key, value in state_dict.items():
        if re.search(KERNELS, key):
            continue
        if re.search(r"\.stoken_refine\.(qkv|proj)\.weight$", key):
            value = value.flatten(1)  # a 1x1 convolution there, a linear layer here
        elif re.search(r"\.gamma_\d$", key):
            value = value.flatten()
        native[rename(key, OFFICIAL)] = value
    return native


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    official = {}
    for key, value in state_dict.items():
        if re.search(r"\.refine\.(qkv|proj)\.weight$", key):
            value = value[:, :, None, None]
        elif key.endswith(".gamma"):
            value = value[None, :, None, None]
        official[name := rename(key, NATIVE)] = value
        if name.endswith(".attn.stoken_refine.proj.weight"):
            kernels = torch.eye(9, dtype=value.dtype, device=value.device).view(9, 1, 3, 3)
            block = name.removesuffix("stoken_refine.proj.weight")
            official |= {f"{block}unfold.weights": kernels, f"{block}fold.weights": kernels.clone()}
    return official
