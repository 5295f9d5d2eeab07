"""Sparsifiner checkpoints: our names are the authors', and those of the DeiT and LV-ViT from which training starts."""

import re
from typing import Any

from torch import Tensor

from weights.resample import resample_position_embedding, resample_predictor


def source_format(keys) -> str:
    """Always the authors' names."""
    return "official"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return dict(state_dict)


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    """Position embedding and predictors of another token count, a square grid assumed in the file.

    Predictors keep the file's number of reduced tokens, which the model's `adapt` makes room for.
    """
    grid = model.patch_embed.grid_size
    if name == "pos_embed":
        return resample_position_embedding(value, grid, 1, antialias=True)
    own = model.get_parameter(name)
    if not re.search(r"\.proj(_back)?_n$", name) or len(own) == len(value):
        return value
    if model.get_parameter(re.sub(r"_back_n$", "_n", name)) is model.get_parameter(re.sub(r"proj_n$", "proj_back_n", name)):
        raise ValueError(
            f"{name} is for {len(value)} tokens, the model's for {len(own)}, and with share_proj it cannot be "
            "resampled for good: create the model at the file's image size, it runs any other as well"
        )
    return resample_predictor(value, grid, summing=name.endswith("proj_n"))


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return dict(state_dict)
