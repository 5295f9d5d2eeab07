"""Finding files: folders, lists, and the partner of each image. Errors say what was looked for, where, and what is there."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.data.files import ARRAY_SUFFIXES, CONTENT, FOREIGN, IMAGE_SUFFIXES

# What file managers and storage systems leave beside the data. Names that start with a dot are passed over too.
FOREIGN_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


def hidden(name: str) -> bool:
    """Whether a file or folder belongs to another program: .ipynb_checkpoints, .Trash, ._photo.jpg, __MACOSX."""
    return name.startswith(".") or name in FOREIGN_FOLDERS


def walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, hidden ones left out and linked folders followed, as `find -L` counts them.

    A link that leads back to a folder above it is not followed. Pipes, devices and links to nothing are among the files:
    reading them says what they are. Raises OSError for a folder that may not be read, as its files would be missing in silence.
    """

    def refuse(error: OSError) -> None:
        raise error

    above: dict[str, tuple[tuple[int, int], ...]] = {}  # folder -> identities of the folders that lead to it
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        identity = os.stat(place)
        chain = (*above.pop(place, ()), (identity.st_dev, identity.st_ino))
        entered = []
        for name in sorted(folders):
            path = os.path.join(place, name)
            found = os.stat(path)
            if not hidden(name) and (found.st_dev, found.st_ino) not in chain:
                entered.append(name)
                above[path] = chain
        folders[:] = entered
        for name in sorted(files):
            if not hidden(name):
                yield Path(place, name)


def need(path: Path, what: str, dataset: str) -> Path:
    """The path, or a FileNotFoundError that says what was looked for, where, and what is there instead."""
    if path.exists():
        return path
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    there = sorted(entry.name for entry in parent.iterdir())[:8] if parent.is_dir() else []
    listing = f"; {parent} holds {', '.join(there)}" if there else f"; {parent} is empty" if parent.is_dir() else ""
    raise FileNotFoundError(f"{dataset}: looked for {what} at {path}, which does not exist{listing}")


def root_folder(root: str | Path | None, dataset: str) -> Path:
    """The folder of a data set as a path. ValueError without one, FileNotFoundError if it is not a folder."""
    if root is None:
        raise ValueError(f"{dataset} needs a folder: set data.root")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{dataset}: data.root is {path}, which is not a folder (current folder: {Path.cwd()})")
    return path


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, links to folders among them, hidden ones left out; sorted."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not hidden(entry.name))


def images_in(folder: Path, what: str, dataset: str) -> list[Path]:
    """All image files below a folder, sorted by path, or its arrays where it has no image; FileNotFoundError if there is none.

    Arrays come second because many a folder has the depth maps of its images beside them.
    """
    need(folder, what, dataset)
    suffixes = image_suffixes(folder)
    found = sorted(path for path in walk(folder) if path.suffix.lower() in suffixes)
    if not found:
        raise FileNotFoundError(f"{dataset}: looked for {what} in {folder}: {none_of(IMAGE_SUFFIXES, list(walk(folder)))}")
    return found


def image_suffixes(folder: Path) -> Sequence[str]:
    """What image files of a folder end in: those of images or, where it has none, those of arrays."""
    pictures = any(path.suffix.lower() in IMAGE_SUFFIXES for path in walk(folder)) if folder.is_dir() else True
    return IMAGE_SUFFIXES if pictures else ARRAY_SUFFIXES


def none_of(suffixes: Sequence[str], there: Sequence[Path]) -> str:
    """Why none of the files will do: what they should end in, and what they end in instead."""
    text = f"no file ends in {', '.join(suffixes)}"
    counts = Counter(path.suffix.lower() for path in there)
    foreign = [suffix for suffix in counts if suffix in FOREIGN]
    if foreign:
        suffix = foreign[0]
        return (
            f"{text}; its {counts[suffix]} {suffix} files are {FOREIGN[suffix]}, which is not read: convert them with "
            f"numpy.save('name.npy', array), one H x W array per image, read with the package that made them"
        )
    if counts:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in counts.most_common(4))
        return f"{text}; it holds {kinds}"
    return text


def by_name(folder: Path, suffix: str, extensions: Sequence[str], what: str, dataset: str) -> dict[str, Path]:
    """Path below the folder without `suffix` and extension -> file, sorted.

    Raises FileNotFoundError if there is none, ValueError if two files have one name: which one belongs to the image?

    Args:
        folder: where to look, at any depth.
        suffix: what follows the common name before the extension.
        extensions: of the files wanted, in lower case.
        what: is looked for, in words.
        dataset: that asks, for errors.
    """
    need(folder, what, dataset)
    found: dict[str, Path] = {}
    everything = sorted(walk(folder))
    for path in everything:
        name = str(path.relative_to(folder).with_suffix(""))
        if path.suffix.lower() not in extensions or not name.endswith(suffix):
            continue
        name = name.removesuffix(suffix)
        if name in found:
            raise ValueError(f"{dataset}: {found[name]} and {path} have the same name; keep one of them")
        found[name] = path
    if not found:
        wanted = [f"{suffix}{extension}" for extension in extensions]
        raise FileNotFoundError(f"{dataset}: looked for {what} in {folder}: {none_of(wanted, everything)}")
    return found


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark. ValueError names the file if it has another encoding."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "another encoding"
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}; {kind}?); save it as UTF-8") from error


def read_names(path: Path, dataset: str) -> list[str]:
    """The lines of a list with one name each, spaces inside a name kept; blank lines and lines that start with # are skipped.

    Raises FileNotFoundError if there is no list, ValueError if it is not UTF-8 or empty.
    """
    need(path, "a list of files", dataset)
    names = [line.strip() for line in read_text(path).splitlines()]
    names = [name for name in names if name and not name.startswith("#")]
    if not names:
        raise ValueError(f"{path}: the list is empty")
    return names


def read_list(path: Path, columns: int, dataset: str) -> list[list[str]]:
    """The rows of a text list, at least `columns` each; blank lines and lines that start with # are skipped.

    Columns are divided by tabs where a line has any, else by white space; there a file name with spaces ends with its suffix.
    Raises FileNotFoundError if there is no list, ValueError naming the line if a row is too short or the list empty.
    """
    need(path, "a list of files", dataset)
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        text = line.strip().rstrip(" \t;")  # SegNet's lists end their lines with a semicolon
        if not text or text.startswith("#"):
            continue
        words = [word.strip() for word in text.split("\t")] if "\t" in text else split_names(text, columns)
        if len(words) < columns:
            raise ValueError(f"{path}, line {number}: need {columns} columns, got {line.strip()!r}")
        rows.append(words)
    if not rows:
        raise ValueError(f"{path}: the list is empty")
    return rows


def split_names(text: str, columns: int) -> list[str]:
    """A line's columns: words, where those of a file name with spaces are put together up to its suffix."""
    words = text.split()
    names: list[str] = []
    start = 0
    for i, word in enumerate(words):
        if len(names) < columns and (Path(word).suffix.lower() in CONTENT or word == "None"):
            names.append(text_between(text, words, start, i))
            start = i + 1
    return [*names, *words[start:]] if len(names) == columns else words


def text_between(text: str, words: Sequence[str], first: int, last: int) -> str:
    """The part of a line from one word to another, with the spaces it has there.

    Args:
        text: the line.
        words: of the line, in order.
        first: position of the first word of the part.
        last: position of its last word.
    """
    places = [match.span() for match in re.finditer(r"\S+", text)]
    return text[places[first][0] : places[last][1]]


def part_of(names: Sequence[str], split: str, fraction: float, seed: int) -> list[str]:
    """The names of one split of data without one, in their order: `fraction` of them, at least one, are "val".

    Which ones depends on the names and the seed alone, not on their order or on the machine. Raises ValueError for a fraction
    outside (0, 1) and for a single name.

    Args:
        names: of all samples, different from each other.
        split: "train" or "val".
        fraction: share of "val".
        seed: another one gives another split.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"data.args.val_share is the share of the validation images, between 0 and 1; got {fraction}")
    if len(names) < 2:
        raise ValueError(f"data.args.val_share cannot divide {len(names)} image: a split needs two")
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    val = set(ranked[: min(max(1, round(fraction * len(names))), len(names) - 1)])
    return [name for name in names if (name in val) == (split == "val")]


def inside(root: Path, name: str) -> Path:
    """A path from a list, below root even where the list writes a leading slash."""
    return root / name.lstrip("/")


def fill_in(pattern: str, split: str, key: str) -> str:
    """The pattern with its "{split}" replaced. ValueError, naming the key, for other braces."""
    try:
        return pattern.format(split=split)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{key} is {pattern!r}: in braces only {{split}} can stand ({type(error).__name__}: {error}); "
            "write a brace of the name itself twice, as {{ or }}"
        ) from error
