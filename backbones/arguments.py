"""Constructor arguments that no model can be built with, and the names nearest to a wrong one."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

Rule = tuple[Callable[[Any], bool], str]

POSITIVE: Rule = (lambda value: _whole(value) and value >= 1, "a whole number, at least 1")
POSITIVES: Rule = (
    lambda value: _all(value, lambda item: _whole(item) and item >= 1),
    "whole numbers, each at least 1, one for every stage",
)
RATE: Rule = (lambda value: _real(value) and 0 <= value < 1, "a number from 0 to less than 1")
RATIO: Rule = (lambda value: _real(value) and value > 0, "a number above 0")
RATIOS: Rule = (lambda value: _all(value, RATIO[0]), "numbers above 0, one for every stage")
ODD: Rule = (lambda value: _whole(value) and value >= 1 and value % 2 == 1, "an odd whole number, at least 1")
COUNT: Rule = (lambda value: _whole(value) and value >= 0, "a whole number, 0 for no classifier")

# Argument -> what it must be, whichever family takes it. `heads` is one number or one for every stage.
RULES: dict[str, Rule] = {
    "in_chans": POSITIVE,
    "num_classes": COUNT,
    **dict.fromkeys(("embed_dim", "depth", "patch_size", "window_size", "stride", "kv_stride", "projection"), POSITIVE),
    **dict.fromkeys(("depths", "dims", "base_dims"), POSITIVES),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), RATE),
    **dict.fromkeys(("kernel_size", "pool_size"), ODD),
    "mlp_ratio": RATIO,
    "mlp_ratios": RATIOS,
}
HEADS = ("num_heads", "heads")


def check_arguments(name: str, arguments: Mapping[str, Any], zeros: Iterable[str] = ()) -> None:
    """Raise ValueError, with model, argument, value and what it must be, for an argument that makes no model.

    zeros: arguments that say by a 0 that a stage has none of it.
    """
    for key, value in arguments.items():
        if key in zeros and isinstance(value, (list, tuple)) and any(value):
            value = [item for item in value if item != 0]
        rule = RULES.get(key)
        if key in HEADS:
            rule = POSITIVE if isinstance(value, Real) else POSITIVES
        if rule is not None and value is not None and not rule[0](value):
            raise ValueError(f"{name}: {key} must be {rule[1]}, got {value!r}")


def nearest(name: Any, names: Iterable[str]) -> str:
    """The end of an error message: the nearest valid name, or all of them."""
    names = sorted(names)
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(names)}"


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _all(values: Any, test: Callable[[Any], bool]) -> bool:
    """Whether `values` is a sequence of one or more that pass, nested ones too (groups of a stage)."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        return False
    items = list(values)
    return bool(items) and all(_all(item, test) if isinstance(item, (list, tuple)) else test(item) for item in items)
