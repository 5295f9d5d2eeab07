"""HVT checkpoints: our names are the authors'."""

import torch.nn.functional as F
from torch import Tensor, nn

from weights.convert import note, resample_position_embedding


def source_format(keys) -> str:
    """Always the authors' names."""
    return "official"


def resample_sequence(embedding: Tensor, length: int) -> Tensor:
    """Position embedding 1 n C of a sequence -> 1 length C, linearly (align_corners False); the same tensor if it fits."""
    if embedding.shape[1] == length:
        return embedding
    resized = F.interpolate(embedding.float().mT, length, mode="linear", align_corners=False).mT
    return note(resized.to(embedding.dtype), embedding)


def to_native(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Position embeddings of another token count are resampled: of the patches as an image, square in the file, of pooled
    tokens along their sequence."""
    if model is None:
        return dict(state_dict)
    own, native = dict(model.named_parameters()), {}
    for key, value in state_dict.items():
        if key in own and key.endswith("pos_embed") and own[key].shape != value.shape:
            if key == "pos_embed":
                value = resample_position_embedding(value, model.patch_embed.grid_size, antialias=True)
            else:
                value = resample_sequence(value, own[key].shape[1])
        native[key] = value
    return native


def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return dict(state_dict)
