"""Files of any bytes end in arrays or in the documented errors, never in another exception.

The gate runs 100 examples of each kind; ZOO_FUZZ=10000 pytest tests/fuzz runs as many as it says.
"""

import io
import os
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from train.data.files import PixelRules, TooLarge, Unreadable, read_depth, read_image, read_mask
from train.data.finding import read_list, read_names

MANY = settings(
    max_examples=int(os.environ.get("ZOO_FUZZ", 100)),
    deadline=None,
    derandomize="ZOO_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
RULES = PixelRules(max_pixels=10**6)
PALETTE = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]


def encoded(format, mode, height, width, **options):
    """An image in a format as bytes."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.arange(height * width * channels, dtype=np.uint32).astype(np.uint8)
    image = Image.frombytes(mode, (width, height), values.tobytes())
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


SEEDS = [
    *(encoded("PNG", mode, 5, 7) for mode in ("L", "P", "RGB", "RGBA", "LA")),
    *(encoded("TIFF", mode, 5, 7) for mode in ("L", "RGB", "RGBA", "CMYK")),
    encoded("TIFF", "RGB", 9, 9, compression="tiff_lzw"),
    encoded("JPEG", "RGB", 9, 9),
    encoded("JPEG", "L", 9, 9, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    encoded("WEBP", "RGB", 9, 9),
    encoded("WEBP", "RGBA", 9, 9, lossless=True),
    encoded("GIF", "P", 9, 9),
    encoded("BMP", "RGB", 5, 7),
    b"P5 3 2 21\n" + bytes(range(6)),
    b"P6 3 2 4095\n" + bytes(36),
    b"Pf 3 2 -1.0\n" + np.arange(6, dtype="<f4").tobytes(),
]
_buffer = io.BytesIO()
Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7)).save(_buffer, "PNG")
SEEDS.append(_buffer.getvalue())
ARRAYS = []
for _values in (
    np.arange(12, dtype=np.uint8).reshape(3, 4),
    np.ones((3, 4, 5), np.float32),
    np.asfortranarray(np.ones((2, 3))),
):
    _buffer = io.BytesIO()
    np.save(_buffer, _values)
    ARRAYS.append(_buffer.getvalue())
_buffer = io.BytesIO()
np.savez_compressed(_buffer, a=np.arange(12.0).reshape(3, 4))
ZIPPED = [_buffer.getvalue()]


@st.composite
def damaged(draw, seeds):
    """A file with some bytes changed, cut, doubled or put in; or bytes of its own."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        action = draw(st.sampled_from(["byte", "bit", "cut", "insert", "length", "double"]))
        if action == "byte":
            content[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif action == "bit" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del content[place : place + draw(st.integers(1, 40))]
        elif action == "insert":
            content[place:place] = draw(st.binary(max_size=8))
        elif action == "length":
            content[place : place + 4] = struct.pack(">I", draw(st.integers(0, 2**32 - 1)))
        else:
            content[place:place] = content[: draw(st.integers(0, 64))]
    return bytes(content)


def mended(content):
    """A PNG whose checksums are right again, so that damage reaches what lies behind them."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    out, place = content[:8], 8
    while place + 8 <= len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        kind = content[place + 4 : place + 8]
        data = content[place + 8 : place + 8 + size]
        out += content[place : place + 8] + data + struct.pack(">I", zlib.crc32(kind + data))
        place += 12 + size
    return out


def check(read):
    """Runs a reader; only arrays and the documented errors may come out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read()
        except (ValueError, FileNotFoundError) as error:  # Unreadable and TooLarge are ValueErrors
            assert "file" in str(error) and len(str(error)) < 2000, error
            return None
    assert isinstance(found, np.ndarray) and found.size > 0
    return found


def readers(path):
    """Every reader that a data set may use on a file."""
    for channels, limits in ((3, None), (1, (0, 255)), (4, None), (5, (0.0, 1.0))):
        rules = PixelRules(channels, limits, RULES.max_pixels)
        image = check(lambda rules=rules: read_image(path, rules=rules))
        assert image is None or image.dtype == np.uint8 and image.ndim == 3 and len(image) == channels
    for palette in (None, PALETTE):
        mask = check(lambda palette=palette: read_mask(path, palette=palette, max_pixels=RULES.max_pixels))
        assert mask is None or mask.dtype == np.int64 and mask.ndim == 2
    depth = check(lambda: read_depth(path, 1000.0, max_pixels=RULES.max_pixels))
    assert depth is None or depth.dtype == np.float32 and depth.ndim == 2 and np.isfinite(depth).all() and (depth >= 0).all()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@MANY
@given(content=damaged(SEEDS), mend=st.booleans(), suffix=st.sampled_from([".png", ".jpg", ".pfm", ".TIF"]))
def test_images_masks_and_depth_of_damaged_pictures(place, content, mend, suffix):
    path = place / f"file{suffix}"
    path.write_bytes(mended(content) if mend else content)
    readers(path)


@MANY
@given(content=damaged(ARRAYS))
def test_images_masks_and_depth_of_damaged_arrays(place, content):
    path = place / "file.npy"
    path.write_bytes(content)
    readers(path)


@MANY
@given(content=damaged(ZIPPED))
def test_images_masks_and_depth_of_damaged_archives(place, content):
    path = place / "file.npz"
    path.write_bytes(content)
    readers(path)


@MANY
@given(header=st.text(max_size=80), data=st.binary(max_size=40), archive=st.booleans())
def test_headers_of_arrays_are_data(place, header, data, archive):
    text = header.encode("latin-1", "replace")
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data
    path = place / ("file.npz" if archive else "file.npy")
    if archive:
        with zipfile.ZipFile(path, "w") as written:
            written.writestr("a.npy", content)
    else:
        path.write_bytes(content)
    readers(path)


@MANY
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "ignore"))))
def test_lists_of_any_bytes(place, content):
    path = place / "file.txt"
    path.write_bytes(content)
    for read in (lambda: read_names(path, "Folder"), lambda: read_list(path, 2, "Kitti")):
        try:
            rows = read()
        except ValueError as error:
            assert "file.txt" in str(error)
        else:
            assert rows and all(rows)


def test_the_fuzz_sees_an_error_that_is_not_documented(place):
    def broken():
        raise KeyError("x")

    with pytest.raises(KeyError):
        check(broken)
    for error in (Unreadable("file: x"), TooLarge("file: x")):

        def documented(error=error):
            raise error

        assert check(documented) is None
