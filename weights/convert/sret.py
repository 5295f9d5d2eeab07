"""SReT checkpoints: the authors', which hold a block's weights once for each of its passes."""

import re
from typing import Any

import torch
from torch import Tensor

from weights.resample import resample_position_embedding
from weights.rules import Rules, rename

OFFICIAL: Rules = [  # authors' name -> ours, as regular expressions
    (r"^pools\.(\d+)\.conv\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
NATIVE: Rules = [  # ours -> the authors'
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"pools.{int(m[1]) - 1}.conv."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
]


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    return "official" if any(key.startswith("transformers.") for key in keys) else "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """One copy of each block; ValueError if the file's copies differ, as one set of weights cannot be both."""
    native: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if found := re.match(r"transformers\.(\d+)\.blocks\.(\d+)\.(.*)", key):
            stage, place, name = int(found[1]), int(found[2]), found[3]
            loops = len(model.stages[stage].blocks[0].projections)
            block, step = divmod(place // 2, loops)
            part = "block" if place % 2 == 0 else f"projections.{step}"
            new = f"stages.{stage}.blocks.{block}.{part}.{name}"
            if new in native and not (value.is_meta or torch.equal(native[new], value)):
                raise ValueError(
                    f"{key} differs from the same block's weights at an earlier pass; a recursive block has one set"
                )
        else:
            new = rename(key, OFFICIAL if source_format(state_dict) == "official" else [])
        native[new] = value
    return native


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The authors' names, every pass of a block with its copy of the weights."""
    official: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if not (found := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.(?:block|projections\.(\d+))\.(.*)", key)):
            official[rename(key, NATIVE)] = value
            continue
        stage, block, step, name = int(found[1]), int(found[2]), found[3], found[4]
        loops = len(model.stages[stage].blocks[block].projections)
        steps = range(loops) if step is None else [int(step)]
        for i in steps:
            official[f"transformers.{stage}.blocks.{2 * (block * loops + i) + (step is not None)}.{name}"] = value
    return official


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    return resample_position_embedding(value, model.pos_embed.shape[-2:]) if name == "pos_embed" else value
