"""DeiT-with-iRPE checkpoints: our names are the authors'; relative tables fit every image size."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from weights.resample import resample_position_embedding


def source_format(keys: Iterable[str]) -> str:
    """Always the authors' names."""
    return "official"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return dict(state_dict)


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    """A position embedding of another grid, square in the file; the tables count offsets and fit every grid."""
    if name != "pos_embed":
        return value
    return resample_position_embedding(value, model.patch_embed.grid_size, model.num_prefix_tokens, antialias=True)


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return dict(state_dict)
