"""Sparsifiner checkpoints: our names are the authors', and those of the DeiT and LV-ViT from which training starts."""

import re

from torch import Tensor, nn

from weights.convert import resample_position_embedding


def source_format(keys) -> str:
    """Always the authors' names."""
    return "official"


def to_native(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Position embedding and predictors of another token count are resampled, a square grid assumed in the file."""
    own, grid = dict(model.named_parameters(remove_duplicate=False)), model.patch_embed.grid_size
    native = {}
    for key, value in state_dict.items():
        if key in own and own[key].shape != value.shape:
            if key == "pos_embed":
                value = resample_position_embedding(value, grid, 1, antialias=True)
            elif re.search(r"\.proj(_back)?_n$", key):
                value = resample_predictor(value, grid, own[key], summing=key.endswith("proj_n"))
        native[key] = value
    return native


def resample_predictor(matrix: Tensor, grid: tuple[int, int], like: Tensor, summing: bool) -> Tensor:
    """N r over class token and patches -> for another grid. `summing`: it sums over patches, so more of them count less each.

    The reduced count r keeps the file's; ValueError if the model (`like`) was built with another.
    """
    if matrix.shape[1] != like.shape[1]:
        raise ValueError(
            f"a predictor of {matrix.shape[1]} reduced tokens cannot become one of {like.shape[1]}: they have no order; "
            "create the model at the file's image size and call set_input_size"
        )
    new = resample_position_embedding(matrix[None], grid, 1, antialias=True)[0]
    if summing:
        new[1:] *= (len(matrix) - 1) / (len(new) - 1)
    return new


def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return dict(state_dict)
