"""Sparsifiner checkpoints: our names are the authors', and those of the DeiT and LV-ViT from which training starts."""

import re

from torch import Tensor, nn

from weights.convert import note, resample_position_embedding


def source_format(keys) -> str:
    """Always the authors' names."""
    return "official"


def to_native(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Position embedding and predictors of another token count are resampled, a square grid assumed in the file.

    Predictors keep the file's number of reduced tokens, which the model's `adapt` makes room for.
    """
    own, grid = dict(model.named_parameters(remove_duplicate=False)), model.patch_embed.grid_size
    native = {}
    for key, value in state_dict.items():
        if key == "pos_embed" and own[key].shape != value.shape:
            value = resample_position_embedding(value, grid, 1, antialias=True)
        elif key in own and re.search(r"\.proj(_back)?_n$", key) and len(own[key]) != len(value):
            if own[re.sub(r"_back_n$", "_n", key)] is own[re.sub(r"proj_n$", "proj_back_n", key)]:
                raise ValueError(
                    f"{key} is for {len(value)} tokens, the model's for {len(own[key])}, and with share_proj it cannot be "
                    "resampled for good: create the model at the file's image size, it runs any other as well"
                )
            value = resample_predictor(value, grid, summing=key.endswith("proj_n"))
        native[key] = value
    return native


def resample_predictor(matrix: Tensor, grid: tuple[int, int], summing: bool) -> Tensor:
    """N r over class token and patches -> for another grid. summing: it sums over patches, so more of them count less each."""
    new = resample_position_embedding(matrix[None], grid, 1, antialias=True)[0]
    if summing:
        new[1:] *= (len(matrix) - 1) / (len(new) - 1)
    return note(new, matrix)


def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return dict(state_dict)
