"""SLAB checkpoints: the authors', whose norms stand in the files in one of two forms."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weights.convert import flatten
from weights.resample import resample_position_embedding

COUNTERS = ("warm", "iter", "total_step")


def source_format(keys: Iterable[str]) -> str:
    """Which program wrote a state dict with these keys."""
    keys = list(keys)
    return "official" if any(key.startswith("blocks.") for key in keys) else flatten.source_format(keys)


def to_native(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """FLatten's names, then the norms in the model's form: PRepBN (norm1, norm2, counters) or bare RepBN.

    A bare RepBN in the file fills the norm2 of a PRepBN, whose LayerNorm and counters stay as they are: evaluation does not use
    them. Detection files lack `warm`, which is 0.
    """
    native = deit_names(state_dict, model) if model.host == "deit" else flatten.to_native(state_dict, model)
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
    if model.host == "deit":
        return deit_official(state_dict, model)
    official = flatten.to_official(state_dict, model)
    if getattr(model, "dense", False):
        official = {key: value for key, value in official.items() if not key.endswith(".warm")}
    return official


def deit_places(model: Any) -> list[str]:
    """Where block 0, 1, ... of the authors' DeiT stands."""
    return [f"stages.{i}.blocks.{j}." for i, stage in enumerate(model.stages) for j in range(len(stage.blocks))]


def deit_names(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    places = deit_places(model)
    native = {}
    for key, value in state_dict.items():
        if found := re.match(r"blocks\.(\d+)\.(.*)", key):
            if int(found[1]) >= len(places):
                raise ValueError(f"the file has a block {found[1]}, the model {len(places)}: it is of another size")
            key = places[int(found[1])] + found[2]
        elif key == "cls_token" and not model.prefix:
            key = "unused_cls_token"
        elif key.startswith("patch_embed.proj."):
            key = key.replace(".proj", "")
        elif re.match(r"head\.(weight|bias)$", key):
            key = key.replace("head.", "head.fc.")
        native[key] = value
    return native


def deit_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    places = {place: f"blocks.{i}." for i, place in enumerate(deit_places(model))}
    official = {}
    for key, value in state_dict.items():
        if found := re.match(r"(stages\.\d+\.blocks\.\d+\.)(.*)", key):
            key = places[found[1]] + found[2]
        elif key.startswith("patch_embed."):
            key = key.replace("patch_embed.", "patch_embed.proj.")
        official[key.replace("unused_cls_token", "cls_token").replace("head.fc.", "head.")] = value
    return official


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    if name == "pos_embed":
        return resample_position_embedding(value, model.grid(), model.prefix)
    return flatten.resize(name, value, model)
