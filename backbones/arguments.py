"""Constructor arguments: those of the authors' names, those that no model can be built with, and names near to a wrong one."""

import difflib
import inspect
import math
import re
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

# Ends of sentences for a family's `authors_others`.
BUILT_IN = "has no counterpart: every published model has the value that is built in"
CHECKPOINTING = "is model.set_grad_checkpointing() here"
NO_SCORE_DROPOUT = "has no counterpart: no published model drops attention scores"
NO_SCORES = "has no counterpart: linear attention has no scores"


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


def from_authors(name: str, cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` for `cls`, where those that its authors call by another name have ours.

    A class may have two tables. `authors_names`: their name -> our name of an argument that takes the same value.
    `authors_others`: their name -> the end of a sentence that says what to do instead.

    Args:
        name: of the model, for the message.
        cls: class of the model.
        arguments: as the user gave them.

    Raises TypeError with that sentence, and for an argument that is given under both names.
    """
    names: Mapping[str, str] = getattr(cls, "authors_names", {})
    others: Mapping[str, str] = getattr(cls, "authors_others", {})
    ours = {}
    for key, value in arguments.items():
        if key in others:
            raise TypeError(f"{name}: the authors' argument `{key}` {others[key]}")
        known = names.get(key, key)
        if known in ours:
            both = sorted(given for given in arguments if names.get(given, given) == known)
            raise TypeError(f"{name}: {' and '.join(f'`{given}`' for given in both)} are one argument: give one of them")
        ours[known] = value
    return ours


def taken(cls: type) -> set[str]:
    """Names of the arguments that the constructors of a class and of its bases take."""
    found: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base) and base.__module__.startswith("backbones."):
            found |= {p.name for p in inspect.signature(base).parameters.values() if p.kind is not p.VAR_KEYWORD}
    return found


def unknown_argument(name: str, cls: type, arguments: Mapping[str, Any], error: TypeError) -> TypeError:
    """Python's error for an argument that the constructor of `cls` lacks, as a sentence with the nearest name; else `error`.

    Args:
        name: of the model, for the message.
        cls: class of the model.
        arguments: that were given; the error must be about one of them.
        error: what the constructor raised.
    """
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found is None or found[1] not in arguments:
        return error
    return TypeError(f"{name} has no argument {found[1]!r}: {nearest(found[1], taken(cls))}")


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
