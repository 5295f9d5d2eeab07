"""FAN and TAP-FAN checkpoints: the authors' (classification and dense)."""

import re
from typing import Any

from torch import Tensor

from weights.rules import Rules, rename

OLD: Rules = [(r"^pos_embeder\.", "pos_embed.")]  # a name of early files


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys."""
    return "official" if any(key.startswith("cls_attn_blocks.") for key in keys) else "native"


def rules(model: Any) -> list[tuple]:
    """Authors' name -> ours, as regular expressions."""
    places, last = model.block_places(), len(model.stages) - 1
    tokens = 2 if model.hybrid else 0

    def block(match: re.Match) -> str:
        index = int(match[1])
        if index >= len(places):
            raise ValueError(f"the file has a block {index}, the model {len(places)}: it is of another size")
        return "stages.{}.blocks.{}.".format(*places[index])

    stem = [
        (r"^patch_embed\.backbone\.stem\.", "patch_embed."),
        (r"^patch_embed\.backbone\.stages\.", "stages."),
        (r"^patch_embed\.proj\.", "stages.2.downsample.proj."),
    ]
    return [
        *(stem if model.hybrid else [(r"^patch_embed\.proj\.", "patch_embed.")]),
        (r"^pos_embed\.", f"stages.{tokens}.downsample."),
        (r"^blocks\.\d+\.downsample\.", f"stages.{last}.downsample."),
        (r"^blocks\.(\d+)\.", block),
        (r"^cls_attn_blocks\.", f"stages.{last}.class_blocks."),
        (r"^cls_token$", f"stages.{last}.cls_token"),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]


def native_rules(model: Any) -> list[tuple]:
    """Our name -> the authors', as regular expressions."""
    number = {place: i for i, place in enumerate(model.block_places())}
    last, tokens = len(model.stages) - 1, 2 if model.hybrid else 0
    before_last = max((i for (stage, _), i in number.items() if stage < last), default=0)
    stem = [
        (r"^patch_embed\.", "patch_embed.backbone.stem."),
        (r"^stages\.([01])\.", r"patch_embed.backbone.stages.\1."),
        (r"^stages\.2\.downsample\.proj\.", "patch_embed.proj."),
    ]
    return [
        *(stem if model.hybrid else [(r"^patch_embed\.", "patch_embed.proj.")]),
        (rf"^stages\.{tokens}\.downsample\.", "pos_embed."),
        (rf"^stages\.{last}\.downsample\.", f"blocks.{before_last}.downsample."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda m: f"blocks.{number[int(m[1]), int(m[2])]}."),
        (rf"^stages\.{last}\.class_blocks\.", "cls_attn_blocks."),
        (rf"^stages\.{last}\.cls_token$", "cls_token"),
        (r"^head\.fc\.", "head."),
    ]


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A `qkv` of class attention, as early files have it, becomes q, k and v."""
    if source_format(state_dict) == "native":
        return dict(state_dict)
    native, names = {}, rules(model)
    for key, value in state_dict.items():
        key = rename(key, OLD)
        if found := re.match(r"(cls_attn_blocks\.\d+\.attn\.)qkv\.(weight|bias)$", key):
            for letter, part in zip("qkv", value.chunk(3)):
                native[rename(f"{found[1]}{letter}.{found[2]}", names)] = part
        else:
            native[rename(key, names)] = value
    return native


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    names = native_rules(model)
    return {rename(key, names): value for key, value in state_dict.items()}
