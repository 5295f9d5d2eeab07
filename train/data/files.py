"""Reading single files and lists, with errors that name the path and what was wrong with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class Unreadable(ValueError):
    """A file that is there and is damaged: truncated, empty, no image at all. data.skip_unreadable can pass over it."""


def open_image(path: Path | BinaryIO, place: str | None = None) -> Image.Image:
    """A decoded PIL image. FileNotFoundError if there is no file, Unreadable if it is not a readable image.

    place: what errors call an image that has no path of its own.
    """
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError, EOFError) as error:
        raise Unreadable(f"{place or path}: not a readable image ({error})") from error
    return image


def read_rgb(path: Path) -> np.ndarray:
    """uint8 3 H W; grey and palette images are converted to RGB."""
    return rgb_array(open_image(path))


def rgb_array(image: Image.Image) -> np.ndarray:
    """A PIL image as uint8 3 H W; 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        return np.repeat((values.clip(0, 65535) // 257).astype(np.uint8)[None], 3, 0)
    image = image if image.mode == "RGB" else image.convert("RGB")  # convert would copy
    return np.array(image).transpose(2, 0, 1)  # a view: crops and resizes are faster on pixels that lie together


def read_ids(path: Path) -> np.ndarray:
    """Class ids, int64 H W, from a single-channel or palette image (whose indices are the ids).

    ValueError for an image with colours: those need a palette to become ids.
    """
    return id_array(open_image(path), path)


def id_array(image: Image.Image, path: Path | str) -> np.ndarray:
    """Class ids, int64 H W, of a decoded mask; path is for the error."""
    if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
        raise ValueError(
            f"{path}: a mask must hold one class id per pixel, this is an image of mode {image.mode} (colours). "
            "The folder data set turns colours into ids when it is given a palette"
        )
    return np.asarray(image).astype(np.int64)


def ids_from_colors(colors: np.ndarray, palette: list[tuple[int, int, int]], ignore_index: int, path: Path | str) -> np.ndarray:
    """Class ids, int64 H W, of a colour mask uint8 3 H W: the position of each colour in `palette`.

    Black and white pixels that are not in the palette are void. ValueError names the file (path) and the first unknown colour.
    """
    colors = colors.astype(np.int64)
    codes = (colors[0] << 16) + (colors[1] << 8) + colors[2]
    found, positions = np.unique(codes, return_inverse=True)
    table = {(r << 16) + (g << 8) + b: i for i, (r, g, b) in enumerate(palette)}
    ids = np.array([table.get(int(code), ignore_index if code in (0, 0xFFFFFF) else -1) for code in found])
    if (ids < 0).any():
        code = int(found[ids < 0][0])
        color = (code >> 16, code >> 8 & 255, code & 255)
        raise ValueError(
            f"{path}: colour {color} ({int((codes == code).sum())} pixels) is not in the palette of {len(palette)} colours"
        )
    return ids[positions].reshape(codes.shape).astype(np.int64)


def map_ids(ids: np.ndarray, id_map: Mapping[int, int] | None, ignore_index: int, path: Path | str) -> np.ndarray:
    """File ids -> class ids; void stays void. ValueError names the file (path) and the first id that id_map leaves out."""
    if id_map is None:
        return ids
    found, positions = np.unique(ids, return_inverse=True)
    unknown = [int(value) for value in found if int(value) not in id_map and value != ignore_index]
    if unknown:
        raise ValueError(f"{path}: id {unknown[0]} is not in id_map ({', '.join(map(str, sorted(id_map)))})")
    table = np.array([id_map.get(int(value), ignore_index) for value in found], np.int64)
    return table[positions].reshape(ids.shape)


def read_depth(path: Path, divisor: float, invalid: tuple[float, ...] = (0,), content: BinaryIO | None = None) -> np.ndarray:
    """Metres, float32 H W, 0 where missing, from a single-channel image or a .npy array.

    divisor: file units per metre; invalid: file values that mean "no reading" (negative and non-finite ones always do);
    content: the bytes, of which path is only the name then.
    """
    if path.suffix == ".npy":
        try:
            values = np.load(path if content is None else content, allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        except (ValueError, OSError, EOFError) as error:
            raise Unreadable(f"{path}: not a readable array ({error})") from error
        if values.ndim == 3:  # a channel axis, first or last
            values = values[0] if len(values) == 1 else values[..., 0] if values.shape[-1] == 1 else values
    else:
        image = open_image(path if content is None else content, str(path))
        if image.mode not in ("I", "I;16", "I;16B", "F", "L"):
            raise ValueError(f"{path}: a depth map must have one channel, this is an image of mode {image.mode}")
        values = np.asarray(image)
    if values.ndim != 2:
        raise ValueError(f"{path}: a depth map must be H W, got shape {values.shape}")
    values = values.astype(np.float32)
    missing = ~np.isfinite(values) | (values <= 0) | np.isin(values, np.float32(invalid))
    return np.where(missing, 0, values / np.float32(divisor)).astype(np.float32)


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


def images_in(folder: Path, what: str, dataset: str) -> list[Path]:
    """All image files below a folder, sorted by path; FileNotFoundError if there is none."""
    need(folder, what, dataset)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise FileNotFoundError(f"{dataset}: looked for {what} in {folder}: no file ends in {', '.join(IMAGE_SUFFIXES)}")
    return files


def read_list(path: Path, columns: int, dataset: str) -> list[list[str]]:
    """The rows of a text list, at least `columns` words each; blank lines and lines that start with # are skipped.

    Raises FileNotFoundError if there is no list, ValueError naming the line if a row is too short or the list empty.
    """
    need(path, "a list of files", dataset)
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.rstrip(" \t;").split()  # SegNet's lists end their lines with a semicolon
        if not words or words[0].startswith("#"):
            continue
        if len(words) < columns:
            raise ValueError(f"{path}, line {number}: need {columns} columns, got {line.strip()!r}")
        rows.append(words)
    if not rows:
        raise ValueError(f"{path}: the list is empty")
    return rows


def inside(root: Path, name: str) -> Path:
    """A path from a list, below root even where the list writes a leading slash."""
    return root / name.lstrip("/")
