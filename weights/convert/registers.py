"""DINOv2 checkpoints for vision transformers with registers: the authors', with and without trained registers, and timm's.

Ours are timm's names for models with registers: the position embedding is of patches only, the class token's entry being
added to the class token. Registers that a checkpoint has not, those of test time, start as zeros.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from weights.resample import resample_position_embedding

ADDED = "test_time_register_tokens"  # 1 R C, in files of ours whose test-time registers were trained


def source_format(keys) -> str:
    """Which program wrote a state dict with these keys; "timm" for timm's models without registers."""
    keys = set(keys)
    if keys & {"mask_token", "register_tokens"} or any(".mlp.w12." in key for key in keys):
        return "official"
    return "native" if "reg_token" in keys else "timm"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    state = {rename(key): value for key, value in state_dict.items() if key != "mask_token"}
    table = state.get("pos_embed")
    if table is not None and getattr(model, "pos_embed", None) is not None:
        state["pos_embed"], entries = split_table(table, state_dict, model)
        if entries is not None:
            state["cls_token"] = state["cls_token"] + entries
    expected = getattr(model, "reg_token", None)
    if expected is not None and "cls_token" in state:
        have = state.get("reg_token", state["cls_token"][:, :0])
        if ADDED in state:
            have = state["reg_token"] = torch.cat([have, state.pop(ADDED)], 1)
        count = expected.shape[1] - have.shape[1]
        if 0 < count <= getattr(model, "test_time_registers", 0):
            state["reg_token"] = torch.cat([have, have.new_zeros(1, count, have.shape[2])], 1)
    return state


def split_table(table: Tensor, state_dict: dict[str, Tensor], model: Any) -> tuple[Tensor, Tensor | None]:
    """(positions of the patches, the class token's entry if the table has one)."""
    entry = None
    foreign = source_format(state_dict) == "official" or table.shape[1] not in (model.pos_embed.shape[1], square(table) ** 2)
    if foreign:
        entry, table = table[:, :1], table[:, 1:]
    return table, entry


def resize(name: str, value: Tensor, model: Any) -> Tensor:
    """The position embedding for the model's grid, by the model's own rule if it has one."""
    if name != "pos_embed":
        return value
    grid, old = model.patch_embed.grid_size, (square(value),) * 2
    if hasattr(model, "resize_positions"):
        return model.resize_positions(value, old, grid)
    return resample_position_embedding(value, grid, old_grid=old, antialias=True)  # a timm model: as timm does


def square(table: Tensor) -> int:
    """Side of the square grid that has at most as many positions as the table has entries."""
    return math.isqrt(table.shape[1])


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The authors' names; the class token's position is zero, as it is in the token.

    Test-time registers are zeros and left out; if they were trained since, they are kept under a name that the authors lack.
    """
    state = dict(state_dict)
    registers = state.pop("reg_token", None)
    if registers is not None:
        trained = registers.shape[1] - getattr(model, "test_time_registers", 0)
        if trained:
            state["register_tokens"] = registers[:, :trained]
        added = registers[:, trained:]
        if not added.is_meta and added.any():
            state[ADDED] = added
    token = state["cls_token"]
    state["pos_embed"] = torch.cat([torch.zeros_like(token), state["pos_embed"]], 1)
    state["mask_token"] = torch.zeros_like(token[:, 0])
    gated = (
        "blocks.0.mlp.fc1.weight" in state
        and len(state["blocks.0.mlp.fc1.weight"]) != state["blocks.0.mlp.fc2.weight"].shape[1]
    )
    if gated:
        swaps = (("mlp.fc1.", "mlp.w12."), ("mlp.fc2.", "mlp.w3."))
        for ours, theirs in swaps:
            state = {key.replace(ours, theirs): value for key, value in state.items()}
    return state


def rename(key: str) -> str:
    """Official name -> timm's."""
    key = re.sub(r"^register_tokens$", "reg_token", key)
    return key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
