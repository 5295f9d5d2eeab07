"""Tables of names: rows that other installed packages add by entry points, and the nearest name to a wrong one."""

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the nearest valid name, or all of a short list."""
    names = sorted(names)
    near = difflib.get_close_matches(str(name), names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return (
        f"valid: {', '.join(names) or 'none'}" if len(names) <= 30 else f"there are {len(names)}, e.g. {', '.join(names[:3])}"
    )


@cache
def entries(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name. Nothing is imported."""
    return {entry.name: entry for entry in entry_points(group=group)}


def load(entry: EntryPoint) -> Any:
    """What an entry point names. Raises ImportError with the package's name if it cannot be imported."""
    try:
        return entry.load()
    except Exception as error:
        whose = entry.dist.name if entry.dist else entry.value
        cause = f"{type(error).__name__}: {error}"
        raise ImportError(
            f"the package {whose} adds {entry.name!r} ({entry.group}) and fails to load {entry.value}: {cause}; "
            "mend or uninstall it"
        ) from error


class Table(MutableMapping[str, Kind]):
    """Classes by name: ours, and those of other packages, which are imported when they are first looked up.

    Args:
        group: of the entry points.
        base: the class that every row derives from.
        own: our rows; another package's row of the same name is left out with a warning.
    """

    def __init__(self, group: str, base: type, own: Mapping[str, Kind]):
        self.group, self.base, self.rows = group, base, dict(own)

    def __getitem__(self, name: str) -> Kind:
        if name not in self.rows:
            found = load(self._foreign()[name])
            if not (isinstance(found, type) and issubclass(found, self.base)):
                raise ImportError(f"{name!r} ({self.group}) is {found!r}, which does not derive from {self.base.__name__}")
            self.rows[name] = found  # type: ignore[assignment]  # the base class is what Kind stands for
        return self.rows[name]

    def __setitem__(self, name: str, value: Kind) -> None:
        self.rows[name] = value

    def __delitem__(self, name: str) -> None:
        del self.rows[name]

    def __contains__(self, name: object) -> bool:
        return name in self.rows or name in self._foreign()

    def __iter__(self) -> Iterator[str]:
        return iter([*self.rows, *(name for name in self._foreign() if name not in self.rows)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _foreign(self) -> dict[str, EntryPoint]:
        for name, entry in entries(self.group).items():
            if name in self.rows and getattr(self.rows[name], "__module__", "").partition(".")[0] in ("heads", "train"):
                warnings.warn(f"{entry.value} ({self.group}) has the name of our own {name!r} and is left out", stacklevel=3)
        return entries(self.group)
