"""Names and arguments that a user wrote, checked against what there is, with the nearest valid one in the error.

Also the two errors of a run that are no mistake of the user.
"""

import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser


class RunError(RuntimeError):
    """Something the machine did not allow (memory, disk, a killed worker), as a sentence that says what to change."""


class NonFiniteLoss(RunError):
    """The loss, or the gradient, of a step is NaN or infinite."""


def known(where: str, name: Any, names: Iterable[str]) -> None:
    """ValueError with the nearest valid name unless `name` is one of `names`."""
    names = list(names)
    if name not in names:
        raise ValueError(f"{where}: unknown name {name!r}; {hint(str(name), names)}")


def hint(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the nearest valid names, or all of a short list."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    if len(names) > 30:
        return f"there are {len(names)} valid names, e.g. {', '.join(names[:3])}"
    return f"valid: {', '.join(names) or 'none'}"


def arguments(cls: Callable, values: Mapping[str, Any], where: str, skip: Sequence[str] = ()) -> dict[str, Any]:
    """`values` checked against the signature of a class or function, converted to its annotated types, defaults filled in.

    skip: arguments that do not come from the config. Raises ValueError naming the key, the value and the nearest valid key.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected keys and values, got {values!r}")
    present = inspect.signature(cls).parameters
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(cls) else parser.add_function_arguments
    add(cls, skip={name for name in skip if name in present}, fail_untyped=False)
    valid = list(vars(parser.get_defaults()))
    for key in values:
        if key not in valid:
            raise ValueError(f"{where}: unknown key {key!r} for {cls.__name__}; {hint(str(key), valid)}")
    for name, parameter in present.items():
        if name not in skip and name not in values and parameter.default is parameter.empty and name in valid:
            raise ValueError(f"{where}: {cls.__name__} needs {name!r}")
    try:
        checked = parser.parse_object(dict(values))
    except Exception as error:  # jsonargparse raises several kinds, all of them meaning: wrong type
        key = re.search(r'key "([^"]+)"', str(error))
        if key is None or key[1].split(".")[0] not in values:
            raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
        name = key[1].split(".")[0]
        wanted = present[name].annotation if name in present else "another type"
        raise ValueError(f"{where}.{name}: {values[name]!r} is not {spelled(wanted)}") from error
    return {key: checked[key] for key in valid}


def spelled(kind: Any) -> str:
    """A type annotation as a user would say it."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(map(spelled, parts))
    if kind is type(None):
        return "null"
    return kind.__name__ if isinstance(kind, type) and not parts else str(kind)
