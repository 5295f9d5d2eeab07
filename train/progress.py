"""A bar that shows how far a command is, on a terminal; elsewhere nothing."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int | None, text: str) -> Iterator[Item]:
    """The items, one after another.

    Args:
        items: what is worked through.
        total: how many there are; None or 0 where nobody knows.
        text: before the bar.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(items, total=total or None, description=text)
