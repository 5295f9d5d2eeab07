"""CvT checkpoints: the authors' and Hugging Face's."""

import re
from typing import Any

from torch import Tensor

from weights.rules import Rules, rename

OFFICIAL: Rules = [  # authors' name -> ours, as regular expressions
    (r"^stage0\.patch_embed\.", "patch_embed."),
    (r"^stage(\d+)\.patch_embed\.", r"stages.\1.downsample."),
    (r"^stage(\d+)\.", r"stages.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
NATIVE: Rules = [  # ours -> the authors'
    (r"^patch_embed\.", "stage0.patch_embed."),
    (r"^stages\.(\d+)\.downsample\.", r"stage\1.patch_embed."),
    (r"^stages\.(\d+)\.", r"stage\1."),
    (r"^head\.fc\.", "head."),
]
HUGGINGFACE: Rules = [  # Hugging Face's name -> the authors', every rule in turn
    (r"^(?:cvt\.)?encoder\.stages\.(\d+)\.", r"stage\1."),
    (r"\.embedding\.convolution_embeddings\.projection\.", ".patch_embed.proj."),
    (r"\.embedding\.convolution_embeddings\.normalization\.", ".patch_embed.norm."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.convolution_projection_([qkv])\w+\.convolution_projection\.", r".attn.conv_proj_\1."),
    (r"(\.conv_proj_[qkv])\.convolution\.", r"\1.conv."),
    (r"(\.conv_proj_[qkv])\.normalization\.", r"\1.bn."),
    (r"\.attention\.attention\.projection_([qkv])\w+\.", r".attn.proj_\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    keys = list(keys)
    if any(re.match(r"(cvt\.)?encoder\.stages\.", key) for key in keys):
        return "huggingface"
    return "official" if any(re.match(r"stage\d+\.", key) for key in keys) else "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    source = source_format(state_dict)
    if source == "huggingface":
        for pattern, replacement in HUGGINGFACE:
            state_dict = {re.sub(pattern, replacement, key): value for key, value in state_dict.items()}
    rules = [] if source == "native" else OFFICIAL
    return {rename(key, rules): value for key, value in state_dict.items()}


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {rename(key, NATIVE): value for key, value in state_dict.items()}
