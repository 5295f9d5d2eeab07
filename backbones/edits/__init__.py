"""Changes to an existing model, by name: EDITS[name](model, **args) -> model.

    model = timm.create_model("vit_small_patch14_dinov2", pretrained=True)
    model = edits.apply(model, [{"name": "test_time_registers", "neurons": {9: [12, 40]}}])

An edit changes the model it is given, in place where it can, and returns it; it refuses a model that it does not understand
with a ValueError that names what is missing. Edits are applied in the order of the list, to a model that already has its
weights: many of them rename or reshape parameters, so a checkpoint of the plain model no longer fits afterwards.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from backbones.arguments import nearest
from backbones.edits.depth import drop_blocks, expand_depth, repeat_blocks
from backbones.edits.initialisation import deepnet, mimetic_init, sub_ln
from backbones.edits.merging import token_merging
from backbones.edits.progressive_norm import prepbn
from backbones.edits.pruning import prune
from backbones.edits.registers import add_test_time_registers
from backbones.edits.relative_position import irpe
from backbones.edits.relu_attention import relu_attention
from backbones.edits.sigma import sigma_reparam
from backbones.edits.sparsity import topk_mlp

EDITS: dict[str, Callable[..., nn.Module]] = {
    "deepnet": deepnet,
    "drop_blocks": drop_blocks,
    "expand_depth": expand_depth,
    "irpe": irpe,
    "mimetic_init": mimetic_init,
    "prepbn": prepbn,
    "prune": prune,
    "relu_attention": relu_attention,
    "repeat_blocks": repeat_blocks,
    "sigma_reparam": sigma_reparam,
    "sub_ln": sub_ln,
    "test_time_registers": add_test_time_registers,
    "token_merging": token_merging,
    "topk_mlp": topk_mlp,
}


def apply(model: nn.Module, edits: Iterable[Mapping[str, Any]]) -> nn.Module:
    """Apply edits in the given order; returns the edited model, which may be another object.

    Args:
        model: a timm model or one of ours, with its weights loaded; under a head (`.backbone`) or a feature wrapper (`.model`)
            the edits find it inside.
        edits: for each edit its "name" and its arguments, e.g. {"name": "test_time_registers", "neurons": {9: [12]}}.

    Raises ValueError for an unknown name or argument, and for a model that an edit cannot change, before a later edit runs.
    """
    steps = []
    for i, entry in enumerate(edits):
        if "name" not in entry:
            raise ValueError(f"edit {i} has no name; {nearest('', EDITS)}")
        name, args = entry["name"], {key: value for key, value in entry.items() if key != "name"}
        if name not in EDITS:
            raise ValueError(f"unknown edit {name!r}: {nearest(name, EDITS)}")
        valid = [key for key in inspect.signature(EDITS[name]).parameters if key != "model"]
        for key in args:
            if key not in valid:
                raise ValueError(f"edit {name!r} has no argument {key!r}: {nearest(key, valid)}")
        steps.append((name, args))
    return _edited(model, steps)


def _edited(model: nn.Module, steps: Sequence[tuple[str, dict[str, Any]]]) -> nn.Module:
    for wrapped in ("backbone", "model"):
        if isinstance(inner := getattr(model, wrapped, None), nn.Module):
            depth = len(getattr(inner, "feature_info", ()))
            edited = _edited(inner, steps)
            if len(getattr(edited, "feature_info", ())) != depth:
                raise ValueError("the number of blocks changes, and with it the levels under a head: edit the backbone first")
            setattr(model, wrapped, edited)
            return model
    for name, args in steps:
        model = EDITS[name](model, **args)
    return model
