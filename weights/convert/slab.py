"""SLAB checkpoints: the authors', whose norms stand in the files in one of two forms."""

import re

import torch
from torch import Tensor, nn

from weights.convert import flatten

COUNTERS = ("warm", "iter", "total_step")


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    return flatten.source_format(keys)


def to_native(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """FLatten's names, then the norms in the model's form: PRepBN (norm1, norm2, counters) or bare RepBN.

    A bare RepBN in the file fills the norm2 of a PRepBN, whose LayerNorm and counters stay as they are: evaluation does not use
    them. Detection files lack `warm`, which is 0.
    """
    native = flatten.to_native(state_dict, model)
    own = model.state_dict()
    result = {}
    for key, value in native.items():
        if key not in own:
            inner = re.sub(r"\.(alpha|bn\..*)$", r".norm2.\1", key)
            bare = re.sub(r"\.norm2\.(alpha|bn\..*)$", r".\1", key)
            if inner in own:
                key = inner
            elif bare in own:
                key = bare
            elif bare_norm(key, own) or key.endswith(".scale"):
                continue
        result[key] = value
    for key in own:
        if key.rsplit(".", 1)[-1] in COUNTERS and key not in result:
            result[key] = torch.zeros_like(own[key]) if key.endswith("warm") else own[key]
        elif re.search(r"\.norm1\.(weight|bias)$", key) and key not in result and key.replace("norm1", "norm2") not in own:
            layer = key.rsplit(".", 2)[0]
            if f"{layer}.norm2.alpha" in result:
                result[key] = own[key]
    return result


def bare_norm(key: str, own: dict[str, Tensor]) -> bool:
    """Whether a key is the LayerNorm or a counter of a PRepBN where the model has a bare RepBN."""
    layer = re.sub(rf"\.(norm1\.(weight|bias)|{'|'.join(COUNTERS)})$", "", key)
    return layer != key and f"{layer}.alpha" in own


def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    official = flatten.to_official(state_dict, model)
    if getattr(model, "dense", False):
        official = {key: value for key, value in official.items() if not key.endswith(".warm")}
    return official


def resize(name: str, value: Tensor, model: nn.Module) -> Tensor:
    return flatten.resize(name, value, model)
