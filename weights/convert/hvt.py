"""HVT checkpoints: our names are the authors'."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from weights.resample import is_open, resample_position_embedding


def source_format(keys) -> str:
    """Always the authors' names."""
    return "official"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return dict(state_dict)


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return dict(state_dict)


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    """A position embedding of another token count: of the patches as an image, square in the file, of pooled tokens along
    their sequence."""
    if name == "pos_embed":
        return resample_position_embedding(value, model.patch_embed.grid_size, antialias=True)
    if name.endswith(".pos_embed"):
        return resample_sequence(value, model.get_parameter(name).shape[1])
    return value


def resample_sequence(embedding: Tensor, length: int) -> Tensor:
    """Position embedding 1 n C of a sequence -> 1 length C, linearly (align_corners False); the same tensor if it fits."""
    if not is_open((length,)) and embedding.shape[1] == length:
        return embedding
    resized = F.interpolate(embedding.float().mT, length, mode="linear", align_corners=False).mT
    return resized.to(embedding.dtype)
