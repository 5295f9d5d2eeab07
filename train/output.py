"""Where commands write: folders that are there before long work begins, and files that are whole or not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def make_folder(path: str | Path, option: str = "--out") -> Path:
    """The folder for results, made if need be. ValueError, naming the option, if it cannot be made or written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = "is a file" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror or str(error)
        raise ValueError(f"cannot write to {folder} ({why}): choose another {option}") from error
    return folder


def check_writable(path: str | Path, option: str = "--out") -> None:
    """ValueError, before long work, if `make_folder` would fail later; leaves no folder behind that was not there."""
    new = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    try:
        make_folder(path, option)
    finally:
        for folder in new:
            if folder.is_dir():
                folder.rmdir()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A hidden path beside `path`, with its suffix, that becomes `path` at the end, or is removed if something goes wrong."""
    hidden = path.with_name(f".part_{path.name}")
    try:
        yield hidden
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)
