"""PiT checkpoints: the authors' and timm's."""

import re
from typing import Any

from torch import Tensor

from weights.resample import resample_position_embedding
from weights.rules import Rules, rename

FOREIGN: Rules = [  # authors' or timm's name -> ours, as regular expressions
    (r"^patch_embed\.conv\.", "patch_embed."),
    (r"^transformers\.(\d+)\.pool\.", r"stages.\1.downsample."),  # timm's pool opens the next stage
    (r"^transformers\.", "stages."),
    (r"^pools\.(\d+)\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^head_dist\.(weight|bias)$", r"head.fc_dist.\1"),
]
NATIVE: Rules = [  # ours -> the authors'
    (r"^patch_embed\.", "patch_embed.conv."),
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"pools.{int(m[1]) - 1}."),
    (r"^stages\.", "transformers."),
    (r"^head\.fc_dist\.", "head_dist."),
    (r"^head\.fc\.", "head."),
]


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    keys = list(keys)
    if any(re.match(r"transformers\.\d+\.pool\.", key) for key in keys):
        return "timm"
    return "official" if any(key.startswith("transformers.") for key in keys) else "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    if source_format(state_dict) != "native":
        state_dict = {rename(key, FOREIGN): value for key, value in state_dict.items()}
    return state_dict


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    """The position embedding for the model's grid."""
    return resample_position_embedding(value, model.pos_embed.shape[-2:]) if name == "pos_embed" else value


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {rename(key, NATIVE): value for key, value in state_dict.items()}
