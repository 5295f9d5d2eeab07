"""A legend or a scale on a white strip below a picture, which keeps every pixel of its own."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.show.sheet import DEPTH_COLORS, Color

SMALLEST = 12  # pixels of the smallest letters that can be read
PER_SIDE = 36  # lines of text that would fill the shorter side of a larger picture


@lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The letters of matplotlib, whose file is there wherever matplotlib is, at a size in pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def letter_size(shape: Sequence[int]) -> int:
    """Pixels of the letters below a picture H W 3."""
    return max(SMALLEST, round(min(shape[0], shape[1]) / PER_SIDE))


def on_canvas(image: np.ndarray, width: int, strip: int) -> Any:
    """A white PIL image with a picture H W 3 at its top left: `strip` pixels higher, and at least `width` wide."""
    canvas = Image.new("RGB", (max(width, image.shape[1]), image.shape[0] + strip), "white")
    canvas.paste(Image.fromarray(image), (0, 0))
    return canvas


def with_legend(image: np.ndarray, entries: Sequence[tuple[str, Color]], lines: int | None = None) -> np.ndarray:
    """uint8 H W 3 with coloured squares and names below; the picture itself without any entry.

    A picture narrower than a name gets white beside it.

    Args:
        image: uint8 H W 3.
        entries: name and colour of each.
        lines: that the strip has, whatever the entries need; those that do not fit are left out. None: as many as they need.
    """
    if not entries and lines is None:
        return image
    size = letter_size(image.shape)
    letters, gap, tall = font(size), size // 2, round(1.5 * size)
    widths = [round(letters.getlength(name)) + size + 3 * gap for name, _ in entries]
    wide = max([image.shape[1], *(width + gap for width in widths)]) if lines is None else image.shape[1]
    rows: list[list[int]] = [[]]
    used = gap
    for i, width in enumerate(widths):
        if rows[-1] and used + width > wide:
            rows.append([])
            used = gap
        rows[-1].append(i)
        used += width
    rows = rows[:lines]
    canvas = on_canvas(image, wide, (len(rows) if lines is None else lines) * tall + gap)
    draw = ImageDraw.Draw(canvas)
    for number, row in enumerate(rows):
        x, y = gap, image.shape[0] + gap + number * tall
        for i in row:
            name, color = entries[i]
            draw.rectangle((x, y, x + size - 1, y + size - 1), fill=tuple(color), outline="gray")
            draw.text((x + size + gap, y + size // 2), name, fill="black", font=letters, anchor="lm")
            x += widths[i]
    return np.asarray(canvas)


def with_lines(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """uint8 H W 3 with lines of text below, widened where one is longer than the picture."""
    size = letter_size(image.shape)
    letters, gap, tall = font(size), size // 2, round(1.5 * size)
    wide = max((round(letters.getlength(line)) + 2 * gap for line in lines), default=0)
    canvas = on_canvas(image, wide, len(lines) * tall + gap)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((gap, image.shape[0] + gap + number * tall), line, fill="black", font=letters, anchor="lt")
    return np.asarray(canvas)


def with_scale(image: np.ndarray, low: float, high: float, metric: bool = True, fits: bool = False) -> np.ndarray:
    """uint8 H W 3 with the colours of depth below.

    Args:
        image: uint8 H W 3.
        low: depth of the first colour.
        high: depth of the last.
        metric: whether they are metres; else the ends say near and far.
        fits: never wider than the picture, whatever is cut then.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    size = letter_size(image.shape)
    letters, gap = font(size), size // 2
    if metric:
        places = [value for value in MaxNLocator(4).tick_values(low, high) if low <= value <= high]
        marks = [((value - low) / max(high - low, 1e-12), f"{value:g}") for value in places]
        marks[-1:] = [(share, f"{text} m") for share, text in marks[-1:]]
    else:
        marks = [(0.0, "near"), (1.0, "far")]
    least = 0 if fits else round(sum(letters.getlength(text) + 2 * gap for _, text in marks)) + 2 * size
    canvas = on_canvas(image, least, size + 3 * gap + round(1.2 * size))
    wide = canvas.width - 2 * size
    colors = (colormaps[DEPTH_COLORS](np.linspace(0, 1, wide))[None, :, :3] * 255).round().astype(np.uint8)
    top = image.shape[0] + gap
    canvas.paste(Image.fromarray(np.repeat(colors, size, 0)), (size, top))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((size - 1, top - 1, size + wide, top + size), outline="gray")
    for share, text in marks:
        x, half = size + share * (wide - 1), letters.getlength(text) / 2
        draw.line((x, top + size, x, top + size + gap // 2), fill="black")
        middle = min(max(x, half + 1), canvas.width - half - 1)
        draw.text((middle, top + size + gap), text, fill="black", font=letters, anchor="mt")
    return np.asarray(canvas)
