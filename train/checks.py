"""Names and arguments that a user wrote, checked against what there is, with the nearest valid one in the error.

Also the two errors of a run that are no mistake of the user.
"""

import argparse
import contextlib
import difflib
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any


class RunError(RuntimeError):
    """Something the machine did not allow (memory, disk, a killed worker), as a sentence that says what to change."""


class NonFiniteLoss(RunError):
    """The loss, or the gradient, of a step is NaN or infinite."""


class Mistakes(ValueError):
    """Several mistakes of one configuration, a line each; `sentences` holds them."""

    def __init__(self, sentences: Sequence[str]):
        self.sentences = list(sentences)
        lines = self.sentences if len(self.sentences) == 1 else [f"{len(self.sentences)} mistakes", *self.sentences]
        super().__init__("\n  ".join(lines))


class Collected:
    """Errors of checks that do not need each other, kept until `done` raises them together."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    @contextlib.contextmanager
    def check(self, reword: Callable[[str], str] = str) -> Iterator[None]:
        """Keeps a ValueError that is raised inside; `reword` changes each of its sentences."""
        try:
            yield
        except ValueError as error:
            self.sentences += map(reword, sentences_of(error))

    def done(self) -> None:
        """Raises Mistakes if there were any."""
        if self.sentences:
            raise Mistakes(list(dict.fromkeys(self.sentences)))


def sentences_of(error: Exception) -> list[str]:
    """The mistakes that an error names, one or several."""
    return error.sentences if isinstance(error, Mistakes) else [str(error)]


def require_known(where: str, name: Any, names: Iterable[str]) -> None:
    """Raises ValueError with the nearest valid name unless `name` is one of `names`. where: the key it was given for."""
    names = list(names)
    if name not in names:
        raise ValueError(f"{where}: unknown name {name!r}; {nearest(str(name), names)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the nearest valid names, or all of a short list."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    if len(names) > 30:
        return f"there are {len(names)} valid names, e.g. {', '.join(names[:3])}"
    return f"valid: {', '.join(names) or 'none'}"


def checked_arguments(cls: Callable, values: Mapping[str, Any], where: str, skip: Sequence[str] = ()) -> dict[str, Any]:
    """`values` checked against the signature of a class or function, converted to its annotated types, defaults filled in.

    Args:
        cls: the class or function.
        values: what the configuration gives it.
        where: the section, for errors.
        skip: arguments that do not come from the configuration.

    Raises Mistakes naming every key with its value and what it should be, or the nearest valid key.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected keys and values, got {values!r}")
    present = inspect.signature(cls).parameters
    parser = _parser(cls, frozenset(name for name in skip if name in present))
    valid = list(vars(parser.get_defaults()))
    found = [
        f"{where}: unknown key {key!r} for {cls.__name__}; {nearest(str(key), valid)}" for key in values if key not in valid
    ]
    for name, parameter in present.items():
        if name not in skip and name not in values and parameter.default is parameter.empty and name in valid:
            found.append(f"{where}: {cls.__name__} needs {name!r}")
    given = {key: value for key, value in values.items() if key in valid}
    for key, value in list(given.items()):
        if value is None and key in present and not _takes_none(cls, key):
            found.append(f"{where}.{key}: null is not {spelled(_annotation(cls, key))}")
            del given[key]
    checked = None
    while checked is None:
        try:
            checked = parser.parse_object(dict(given))
        except Exception as error:  # jsonargparse raises several kinds, all of them meaning: wrong type
            match = re.search(r'key "([^"]+)"', str(error))
            bad = match[1].split(".")[0] if match else None
            if bad is None or bad not in given:
                if not found:  # else it is what is missing
                    found.append(f"{where}: {' '.join(str(error).split())}")
                break
            wanted = _annotation(cls, bad) if bad in present else "another type"
            found.append(f"{where}.{bad}: {given.pop(bad)!r} is not {spelled(wanted)}")
    if found or checked is None:
        raise Mistakes(found)
    return {key: checked[key] for key in valid}


@functools.cache  # a configuration asks for ten of them, and every further one for the same
def _parser(cls: Callable, skip: frozenset[str]) -> Any:
    """jsonargparse's parser of the arguments of a class or function."""
    from jsonargparse import ArgumentParser  # one of the packages that only training needs

    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(cls) else parser.add_function_arguments
    add(cls, skip=set(skip), fail_untyped=False)
    return parser


def _annotation(cls: Callable, name: str) -> Any:
    """The type of an argument; its text where it cannot be evaluated."""
    function = cls.__init__ if inspect.isclass(cls) else cls
    try:
        return typing.get_type_hints(function)[name]
    except (NameError, TypeError, KeyError):
        return inspect.signature(cls).parameters[name].annotation


def _takes_none(cls: Callable, name: str) -> bool:
    """Whether null is a value of an argument, or its type does not say."""
    kind = _annotation(cls, name)
    if kind is Any or kind is inspect.Parameter.empty or isinstance(kind, str):
        return not isinstance(kind, str) or "None" in kind
    return kind is type(None) or type(None) in typing.get_args(kind) or inspect.signature(cls).parameters[name].default is None


def within(kind: type[int] | type[float], low: float, high: float = math.inf) -> Callable[[str], Any]:
    """The type of a flag that is a number from `low` to `high`, both included; others end the program with the range."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high:
            return value
        limits = f"of {low:g} to {high:g}" if math.isfinite(high) else f"from {low:g} on"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number {limits}")

    return convert


SIDE = within(int, 1, 32768)  # of an image, pixels


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
