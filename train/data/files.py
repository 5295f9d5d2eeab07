"""Reading single files, with errors that name the path and what was wrong with it.

What a file is, is said by one table of suffixes, CONTENT: the finders look for them, and the readers here ask it. Files are
data: nothing in them is executed, no other program is started, and nothing is unpacked before its size is known.
"""

import math
import re
import stat
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

Source = Path | BinaryIO

MAX_PIXELS = 178_956_970  # Pillow's own limit: 512 MiB of RGB
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")  # none of them starts another program; JPEG includes MPO
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".webp", ".gif",
)  # fmt: skip
ARRAY_SUFFIXES = (".npy", ".npz")
CONTENT = {**dict.fromkeys(IMAGE_SUFFIXES, "image"), ".pfm": "map", **dict.fromkeys(ARRAY_SUFFIXES, "array")}
MASK_SUFFIXES = tuple(suffix for suffix, content in CONTENT.items() if content != "map")
DEPTH_SUFFIXES = tuple(CONTENT)
# depth formats that need a package of their own
FOREIGN = {".exr": "OpenEXR", ".h5": "HDF5", ".hdf5": "HDF5", ".mat": "MATLAB", ".dpt": "Sintel"}
ORIENTATION = 0x0112  # the EXIF entry
DEEP = ("I", "F")  # first letter of Pillow's modes with more than 8 bits


class Unreadable(ValueError):
    """A file that is there and is damaged: truncated, empty, no image at all. data.skip_unreadable can pass over it."""


class TooLarge(ValueError):
    """A file with more pixels than the limit. It is not damaged, so nothing passes over it in silence."""


@dataclass
class FileNotes:
    """What the files of a split are, counted while its samples are read."""

    types: Counter[str] = field(default_factory=Counter)  # "uint16, 1 channel" -> images
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)  # the same -> smallest and largest value
    levels: np.ndarray = field(default_factory=lambda: np.zeros(256, bool))  # values of 0..255 that any image has
    turned: list[str] = field(default_factory=list)  # images with an EXIF orientation
    lossy_masks: list[tuple[str, str]] = field(default_factory=list)  # (mask, its format)

    def add(self, values: np.ndarray, channels: int, pixels: np.ndarray) -> None:
        """An image: the values and the number of channels that its file has, and the pixels that it became."""
        self.levels |= np.bincount(pixels.reshape(-1), minlength=256) > 0
        name = f"{values.dtype.name}, {channels} channel{'s' * (channels != 1)}"
        low, high = finite_range(values)
        before = self.ranges.get(name, (low, high))
        self.types[name] += 1
        self.ranges[name] = min(low, before[0]), max(high, before[1])


@dataclass(frozen=True)
class PixelRules:
    """How the pixels of image files become the uint8 channels of a sample.

    Attributes:
        channels: how many: 1 is grey (a colour image is converted), 3 is RGB (grey is repeated, transparency dropped), any
            other number is what the files must have.
        image_range: the values of the files that become 0 and 255, for files that are not 8 bit; None = such files are refused
            unless they use all of 16 bits.
        max_pixels: largest height x width.
    """

    channels: int = 3
    image_range: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS


RGB = PixelRules()


# ---------------------------------------------------------------------------------------------------------------- opening


_pillow = threading.Lock()


@contextmanager
def _own_limit() -> Iterator[None]:
    """Takes Pillow's limit off: ours is per data set, and an image above it is not damaged."""
    with _pillow, warnings.catch_warnings():
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def check_regular(path: Path) -> None:
    """FileNotFoundError if there is no file, Unreadable for a folder, pipe, socket or device, which could block for ever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise Unreadable(f"{path}: cannot be opened ({error})") from error
    if not stat.S_ISREG(mode):
        raise Unreadable(f"{path}: not a file but a {'folder' if stat.S_ISDIR(mode) else 'pipe, socket or device'}")


def open_image(source: Source, place: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A decoded PIL image, upright as its EXIF entry says.

    Its `info` keeps what decoding loses: "orientation" (EXIF, 1 = upright), "maximum" (the largest value of a grey file that
    Pillow has scaled to 8 or 16 bits), "deep_colour" (16 bits per colour, of which Pillow reads 8) and "lossy" (a format).
    Raises FileNotFoundError if there is no file, Unreadable if it is not a readable image, TooLarge above max_pixels.

    Args:
        source: a path, or an open file.
        place: what errors call an image that has no path of its own.
        max_pixels: largest height x width.
    """
    if isinstance(source, Path):
        check_regular(source)
    name = place or str(source)
    try:
        with _own_limit():
            image = Image.open(source, formats=FORMATS)
        width, height = image.size
        if min(width, height) < 1:
            raise ValueError(f"it is {height}x{width} pixels")
        if width * height > max_pixels:
            raise TooLarge(
                f"{name}: {height}x{width} are {width * height} pixels, more than data.max_pixels="
                f"{max_pixels} allows (a small file can unpack to fill the memory): raise it if you trust the file"
            )
        info = {"maximum": _maximum(image), "deep_colour": _deep_colour(image), "lossy": _lossy(image)}
        orientation = _orientation(image) if image.format == "TIFF" else 0  # Pillow turns these while it decodes
        image.load()
        info["orientation"] = orientation or _orientation(image)
        upright = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
    except (TooLarge, MemoryError):
        raise
    except Exception as error:  # damaged bytes make Pillow's plugins raise anything
        text = "in none of the formats " + ", ".join(FORMATS) if isinstance(error, UnidentifiedImageError) else str(error)
        raise Unreadable(f"{name}: not a readable image ({text or type(error).__name__})") from error
    upright.info.update(info)
    return upright


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or it is no number of 1..8."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing, and the pixels may be whole
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _raw(image: ImageFile) -> tuple[str, int | None]:
    """(how the pixels lie in the file, largest value of a PPM file) of an image that is not decoded yet."""
    if not image.tile:
        return "", None
    codec, args = image.tile[0][0], image.tile[0][3]
    args = args if isinstance(args, tuple) else (args,)
    maximum = args[1] if codec in ("ppm", "ppm_plain") and len(args) > 1 and isinstance(args[1], int) else None
    return (args[0] if args and isinstance(args[0], str) else ""), maximum


def _maximum(image: ImageFile) -> int | None:
    raw, maximum = _raw(image)
    bits = re.match(r"L;([24])", raw)
    return maximum if bits is None else 2 ** int(bits[1]) - 1


def _deep_colour(image: ImageFile) -> bool:
    return ";16" in _raw(image)[0] and not image.mode.startswith(DEEP)


def _lossy(image: ImageFile) -> str | None:
    if image.format in ("JPEG", "MPO"):
        return "JPEG"
    if image.format != "WEBP" or image.fp is None:
        return None
    place = image.fp.tell()
    image.fp.seek(12)
    found = None
    while len(head := image.fp.read(8)) == 8:  # RIFF chunks: name, size
        if head[:4] in (b"VP8 ", b"VP8L"):
            found = "lossy WebP" if head[:4] == b"VP8 " else None
            break
        image.fp.seek(int.from_bytes(head[4:], "little") + 1 & ~1, 1)
    image.fp.seek(place)
    return found


def load_array(source: Source, place: str | None = None, max_numbers: int = 4 * MAX_PIXELS) -> np.ndarray:
    """The array of a .npy file, or the only one of a .npz file; nothing in it is executed.

    Raises FileNotFoundError, Unreadable if it is no such array or its header says more than the file holds, and TooLarge for
    more than max_numbers numbers.
    """
    if isinstance(source, Path):
        check_regular(source)
    name = place or str(source)
    try:
        if not name.lower().endswith(".npz"):
            with source.open("rb") if isinstance(source, Path) else source as file:
                start = file.tell()
                held = file.seek(0, 2)
                file.seek(start)
                return _array(file, held - start, name, max_numbers)
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
            if len(members) != 1:
                names = ", ".join(member.filename for member in members[:5])
                raise ValueError(f"it holds {len(members)} arrays ({names}), and one is wanted")
            with archive.open(members[0]) as file:
                return _array(file, members[0].file_size, name, max_numbers)
    except (TooLarge, MemoryError):
        raise
    except Exception as error:  # damaged bytes make NumPy's parser and zipfile raise anything
        raise Unreadable(f"{name}: not a readable array ({error or type(error).__name__})") from error


def _array(file: Any, held: int, name: str, max_numbers: int) -> np.ndarray:
    """One array in NumPy's format from a stream of `held` bytes."""
    version = npy.read_magic(file)
    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"version {version} of NumPy's format")
    shape, fortran, dtype = header(file)
    if dtype.hasobject or dtype.kind not in "biuf":
        raise ValueError(f"it holds {dtype}, not numbers")
    count = math.prod(shape)
    if not all(isinstance(side, int) and side >= 0 for side in shape) or count * dtype.itemsize > held:
        raise ValueError(f"its header says {'x'.join(map(str, shape))} numbers, and the file has {held} bytes")
    if count > max_numbers:
        raise TooLarge(
            f"{name}: {count / 1e6:.0f} million numbers are more than {max_numbers / 1e6:.0f} million: raise data.max_pixels"
        )
    content = file.read(count * dtype.itemsize)
    if len(content) != count * dtype.itemsize:
        raise ValueError("the file ends too early")
    values = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    return values.astype(dtype.newbyteorder("="))  # a copy that can be written to


# ----------------------------------------------------------------------------------------------------- the values of a file


def is_array(name: str) -> bool:
    """Whether a file of this name holds an array and no image."""
    return CONTENT.get(Path(name).suffix.lower()) == "array"


def array_values(source: Source, place: str, max_pixels: int) -> np.ndarray:
    """The array of a .npy or .npz file, H W; an axis of length 1 for the channel is taken away."""
    values = load_array(source, place, max_pixels)
    if values.ndim == 3:
        values = values[0] if len(values) == 1 else values[..., 0] if values.shape[-1] == 1 else values
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{place}: a map must be H W, got shape {values.shape}")
    return values


def stored_values(image: Image.Image) -> np.ndarray:
    """The numbers that the file holds, H W: Pillow has scaled a grey image of 2 or 4 bits, or a PGM, to the full range."""
    values = np.asarray(image)
    maximum = image.info.get("maximum")
    if maximum is None or image.mode == "1":
        return values
    full = 255 if image.mode == "L" else 65535
    return values if maximum == full else ((values.astype(np.int64) * maximum + full // 2) // full).astype(values.dtype)


def finite_range(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest finite value; (nan, nan) if there is none."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (math.nan, math.nan)


# ------------------------------------------------------------------------------------------------------------------ images


def read_rgb(path: Path) -> np.ndarray:
    """Read an image as RGB, uint8 3 H W; grey and palette images are converted."""
    return read_image(path)


def read_image(source: Source, place: str | None = None, rules: PixelRules = RGB, notes: FileNotes | None = None) -> np.ndarray:
    """The pixels of an image file, uint8 C H W, upright. What `open_image` raises, and ValueError for pixels the rules refuse.

    Args:
        source: a path, or an open file.
        place: what errors call it; its suffix says what it is where there is no path.
        rules: channels, range and size.
        notes: is told what the file is.
    """
    name = place or str(source)
    if is_array(name):
        return array_image(load_array(source, name, rules.max_pixels * rules.channels), name, rules, notes)
    image = open_image(source, name, rules.max_pixels)
    if notes is not None and image.info["orientation"] != 1:
        notes.turned.append(name)
    return image_array(image, name, rules, notes)


def image_array(image: Image.Image, place: str, rules: PixelRules = RGB, notes: FileNotes | None = None) -> np.ndarray:
    """A PIL image as uint8 C H W.

    Args:
        image: of Pillow.
        place: what errors call it.
        rules: channels and range.
        notes: what was seen is counted there.
    """
    bands = len(image.getbands())
    if image.mode.startswith(DEEP):
        values = np.asarray(image)[None]
        pixels = eight_bits(values, rules, place)
        pixels = change_channels(pixels, rules.channels, place)
    else:
        if image.info.get("deep_colour"):
            check_deep_colour(np.asarray(image), rules, place)
        if rules.channels == 3:
            image = image if image.mode == "RGB" else image.convert("RGB")  # convert would copy
        elif rules.channels == 1:
            image = image.convert("L")
        elif image.mode == "P" and rules.channels == 4 and "transparency" in image.info:
            image = image.convert("RGBA")
        elif bands != rules.channels:
            raise ValueError(channels_differ(place, bands, rules.channels))
        values = np.array(image)
        # a view: crops and resizes are faster on pixels that lie together
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        pixels = values if rules.image_range is None else eight_bits(values, rules, place)
    if notes is not None:
        notes.add(values, bands, pixels)
    return pixels


def array_image(values: np.ndarray, place: str, rules: PixelRules, notes: FileNotes | None = None) -> np.ndarray:
    """An array H W, C H W or H W C as uint8 C H W; the axis of channels is the one that has the wanted number of them.

    Args:
        values: of the file.
        place: what errors call it.
        rules: channels and range.
        notes: what was seen is counted there.
    """
    if values.ndim == 3:
        first, last = (values.shape[axis] in {rules.channels, 1, 3} for axis in (0, -1))
        exact = [axis for axis in (0, -1) if values.shape[axis] == rules.channels]
        if len(exact) == 1:
            first, last = exact == [0], exact == [-1]
        if first and last:
            raise ValueError(f"{place}: an array of shape {values.shape} could be C H W or H W C")
        values = np.ascontiguousarray(values.transpose(2, 0, 1)) if last else values
    elif values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"{place}: an image must be H W, C H W or H W C, got shape {values.shape}")
    if values.shape[-2] * values.shape[-1] > rules.max_pixels:
        raise TooLarge(
            f"{place}: {values.shape[-2]}x{values.shape[-1]} pixels are more than data.max_pixels={rules.max_pixels}"
        )
    pixels = change_channels(eight_bits(values, rules, place), rules.channels, place)
    if notes is not None:
        notes.add(values, len(values), pixels)
    return pixels


def eight_bits(values: np.ndarray, rules: PixelRules, place: str) -> np.ndarray:
    """Pixel values of any type as uint8, by the rules' range. ValueError if there is none and the values do not tell it."""
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    low, high = finite_range(values)
    if rules.image_range is None:
        if values.dtype == np.uint8:
            return values
        if not math.isfinite(low):
            raise ValueError(f"{place}: no pixel is a finite number")
        # all of 16 bits: the top one is set, and not so narrow a band that it would end in a few levels
        if values.dtype.kind != "f" and low >= 0 and 2**15 <= high < 2**16 and (high - low < 32 or high - low >= 32 * 257):
            return (values // 257).astype(np.uint8)
        if values.dtype.kind == "f":
            guess = "[0, 1]" if low >= 0 and high <= 1 else f"[{math.floor(low)}, {math.ceil(high)}]"
        else:
            guess = f"[{min(0, int(low))}, {2 ** max(8, int(high).bit_length()) - 1}]"
        raise ValueError(
            f"{place}: its {values.dtype.name} pixels of {low:g} to {high:g} do not say what is black and what is white; set "
            f"data.image_range to those two values, e.g. {guess}"
        )
    black, white = rules.image_range
    if values.dtype == np.uint8 and white > 255:
        raise ValueError(
            f"{place}: an 8-bit image, which cannot reach the {white:g} of data.image_range; keep files of one type together"
        )
    scaled = (np.nan_to_num(values.astype(np.float64), nan=black) - black) * (255 / (white - black))
    return scaled.clip(0, 255).round().astype(np.uint8)


def check_deep_colour(values: np.ndarray, rules: PixelRules, place: str) -> None:
    """ValueError for a colour image of 16 bits per channel whose upper 8 bits, all that Pillow reads, are not the image."""
    low, high = finite_range(values)
    if rules.image_range is not None or high < 128 or 0 < high - low < 32:
        raise ValueError(
            f"{place}: a colour image of 16 bits per channel, of which only files that use the whole range are read (this one: "
            f"about {256 * low:g} to {256 * high + 255:g} of 65535); save it with 8 bits, or as a .npy array and set "
            "data.image_range"
        )


def change_channels(pixels: np.ndarray, channels: int, place: str) -> np.ndarray:
    """Give pixels, uint8 C H W, another number of channels: grey is repeated, RGB becomes grey. ValueError for others."""
    if len(pixels) == channels:
        return pixels
    if len(pixels) == 1 and channels == 3:
        return np.repeat(pixels, 3, 0)
    if len(pixels) == 3 and channels == 1:
        red, green, blue = pixels.astype(np.uint32)
        return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)[None]  # as Pillow, ITU-R 601-2
    raise ValueError(channels_differ(place, len(pixels), channels))


def channels_differ(place: str, have: int, want: int) -> str:
    """What is wrong with an image of another number of channels."""
    return f"{place}: the image has {have} channel{'s' * (have != 1)}, and model.in_chans is {want}; set model.in_chans={have}"


# ------------------------------------------------------------------------------------------------------------------- masks


def read_ids(path: Path) -> np.ndarray:
    """Class ids, int64 H W, from a single-channel or palette image (whose indices are the ids), or an array.

    ValueError for an image with colours: those need a palette to become ids.
    """
    return read_mask(path)


def read_mask(
    source: Source,
    place: str | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    id_map: Mapping[int, int] | None = None,
    ignore_index: int = 255,
    max_pixels: int = MAX_PIXELS,
    notes: FileNotes | None = None,
) -> np.ndarray:
    """Class ids, int64 H W, of a mask file. ValueError names the file and what in it is no id.

    Args:
        source: a path, or an open file.
        place: what errors call it; its suffix says what it is where there is no path.
        palette: colours in class order, for masks in colour and for palette images; None = indices are the ids.
        id_map: file id -> class id, for masks without colours; None = file ids are class ids.
        ignore_index: the id that is void.
        max_pixels: largest height x width.
        notes: is told what the file is.
    """
    name = place or str(source)
    if is_array(name):
        values = array_values(source, name, max_pixels)
        if values.dtype.kind not in "biu":
            raise ValueError(f"{name}: a mask must hold whole numbers, and this array holds {values.dtype.name}: save integers")
        return map_ids(values.astype(np.int64), id_map, ignore_index, name)
    image = open_image(source, name, max_pixels)
    if notes is not None and image.info["lossy"] is not None:
        notes.lossy_masks.append((name, image.info["lossy"]))
    if palette is not None and image.mode in ("RGB", "RGBA"):
        return ids_from_colors(np.asarray(image.convert("RGB")).transpose(2, 0, 1), palette, ignore_index, name)
    ids = id_array(image, name)
    if palette is not None and image.mode == "P" and id_map is None:
        return ids_from_table(image, ids, palette, ignore_index, name)
    return map_ids(ids, id_map, ignore_index, name)


def id_array(image: Image.Image, path: Path | str) -> np.ndarray:
    """Class ids, int64 H W, of a decoded mask; path is for the error."""
    if image.mode == "F":
        raise ValueError(
            f"{path}: a mask must hold whole numbers, and this image holds floating-point ones: save it as PNG with 8 or 16 "
            "bits, or as an integer .npy array"
        )
    if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
        raise ValueError(
            f"{path}: a mask must hold one class id per pixel, this is an image of mode {image.mode} (colours). "
            "The folder data set turns colours into ids when it is given a palette"
        )
    return stored_values(image).astype(np.int64)


def ids_from_table(
    image: Image.Image, indices: np.ndarray, palette: Sequence[Sequence[int]], ignore_index: int, path: Path | str
) -> np.ndarray:
    """Class ids of a palette image, by the colours that its own table gives the indices.

    A table that agrees with `palette`, or is grey (no colours at all), makes the indices the ids. The ignore id may have a
    colour of its own. ValueError names the file (path) and the first unknown colour.

    Args:
        image: of Pillow, with its colour table.
        indices: H W, into that table.
        palette: colours in class order.
        ignore_index: void.
        path: for errors.
    """
    table = np.asarray(image.getpalette("RGB") or [], np.int64).reshape(-1, 3)
    used = [int(index) for index in np.unique(indices) if index != ignore_index]
    if any(index >= len(table) for index in used):
        raise ValueError(f"{path}: index {max(used)} is outside the image's own table of {len(table)} colours")
    if all(index < len(palette) and tuple(table[index]) == tuple(palette[index]) for index in used):
        return indices
    if all(tuple(table[index]) == (index, index, index) for index in used):
        return indices
    void = indices == ignore_index
    if ignore_index < len(table) and tuple(table[ignore_index]) in {tuple(color) for color in palette}:
        void[:] = False  # here this index is a class like any other
    ids = ids_from_colors(table[np.where(void, used[0], indices)].transpose(2, 0, 1), palette, ignore_index, path)
    ids[void] = ignore_index
    return ids


def ids_from_colors(colors: np.ndarray, palette: Sequence[Sequence[int]], ignore_index: int, path: Path | str) -> np.ndarray:
    """Class ids, int64 H W, of a colour mask uint8 3 H W: the position of each colour in `palette`.

    Black and white pixels that are not in the palette are void. ValueError names the file (path) and the first unknown colour,
    or two classes of one colour.

    Args:
        colors: uint8 3 H W.
        palette: colours in class order.
        ignore_index: void.
        path: for errors.
    """
    colors = colors.astype(np.int64)
    codes = (colors[0] << 16) + (colors[1] << 8) + colors[2]
    found, positions = np.unique(codes, return_inverse=True)
    table: dict[int, int] = {}
    for i, (r, g, b) in enumerate(palette):
        code = (r << 16) + (g << 8) + b
        if code in table and code in found:
            raise ValueError(f"{path}: classes {table[code]} and {i} have the same colour {(r, g, b)} in the palette")
        table[code] = i
    ids = np.array([table.get(int(code), ignore_index if code in (0, 0xFFFFFF) else -1) for code in found])
    if (ids < 0).any():
        code = int(found[ids < 0][0])
        color = (code >> 16, code >> 8 & 255, code & 255)
        raise ValueError(
            f"{path}: colour {color} ({int((codes == code).sum())} pixels) is not in the palette of {len(palette)} colours"
        )
    return ids[positions].reshape(codes.shape).astype(np.int64)


def map_ids(ids: np.ndarray, id_map: Mapping[int, int] | None, ignore_index: int, path: Path | str) -> np.ndarray:
    """File ids -> class ids; void stays void. ValueError names the file (path) and the first id that id_map leaves out.

    Args:
        ids: of the file.
        id_map: file id -> class id; None: they are class ids.
        ignore_index: void.
        path: for errors.
    """
    if id_map is None:
        return ids
    found, positions = np.unique(ids, return_inverse=True)
    unknown = [int(value) for value in found if int(value) not in id_map and value != ignore_index]
    if unknown:
        raise ValueError(f"{path}: id {unknown[0]} is not in id_map ({', '.join(map(str, sorted(id_map)))})")
    table = np.array([id_map.get(int(value), ignore_index) for value in found], np.int64)
    return table[positions].reshape(ids.shape)


# ------------------------------------------------------------------------------------------------------------------- depth


def read_depth(
    path: Path,
    divisor: float,
    invalid: Sequence[float] = (0,),
    content: BinaryIO | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Metres, float32 H W, 0 where missing, from a single-channel image, a .pfm, or a .npy or .npz array.

    Args:
        path: the file; its suffix says what it is.
        divisor: file units per metre.
        invalid: file values that mean "no reading"; negative and non-finite ones always do.
        content: the bytes, of which path is only the name then.
        max_pixels: largest height x width.
    """
    source: Source = path if content is None else content
    if is_array(path.name):
        values = array_values(source, str(path), max_pixels)
    else:
        image = open_image(source, str(path), max_pixels)
        if image.mode != "L" and not image.mode.startswith(DEEP):
            raise ValueError(f"{path}: a depth map must have one channel, this is an image of mode {image.mode}")
        values = stored_values(image)
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = values.astype(np.float32)  # what does not fit becomes infinite, which is missing
    missing = ~np.isfinite(numbers) | (numbers <= 0) | np.isin(numbers, np.asarray(invalid, np.float32))
    return np.where(missing, 0, numbers / np.float32(divisor)).astype(np.float32)
