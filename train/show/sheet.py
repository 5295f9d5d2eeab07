"""Panels in rows on one sheet: titles above, class colours and a depth scale below."""

import colorsys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Color = tuple[int, int, int]
Legend = dict[int, tuple[str, Color]]  # class id -> name and colour
MISSING: Color = (40, 40, 40)
DEPTH_COLORS = "magma_r"


@dataclass
class Panel:
    """One cell of a sheet.

    Args:
        image: uint8 H W 3.
        title: above the image.
        color: of the title.
        depth: metres H W, if the image shows depth: the sheet colours all such panels over one range and says which.
        legend: the classes that the image shows.
    """

    image: np.ndarray
    title: str = ""
    color: str = "black"
    depth: np.ndarray | None = None
    legend: Legend = field(default_factory=dict)


def to_rgb(image: Tensor | np.ndarray, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> np.ndarray:
    """uint8 3 H W, or a normalised float 3 H W with the mean and std it was normalised with -> uint8 H W 3.

    Floats without mean and std are taken as 0..1. One channel becomes grey; of more than three the first three are shown.
    """
    pixels = torch.as_tensor(image).detach().cpu()
    if pixels.is_floating_point():
        pixels = pixels.float()
        if mean is not None and std is not None:
            pixels = pixels * torch.tensor(list(std)).view(-1, 1, 1) + torch.tensor(list(mean)).view(-1, 1, 1)
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    return pixels.permute(1, 2, 0).numpy()


def make_palette(count: int) -> list[Color]:
    """Distinct colours for `count` classes: hues a golden angle apart, in three lightnesses; always the same."""
    colors: list[Color] = []
    for i in range(count):
        hue, light, strength = (0.58 + i * 0.6180339887) % 1, (0.50, 0.36, 0.66)[i % 3], (0.75, 0.6)[i % 2]
        red, green, blue = (round(255 * value) for value in colorsys.hls_to_rgb(hue, light, strength))
        colors.append((red, green, blue))
    return colors


def resize_rgb(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A uint8 H W 3 image at another height and width."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def depth_to_rgb(depth: Tensor | np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """A depth map H W or 1 H W -> uint8 H W 3, near light and far dark between low and high; missing (0, NaN, inf) is grey.

    Without low and high the map's own 2nd and 98th percentiles are taken, which is what a relative depth needs.
    """
    from matplotlib import colormaps

    values = torch.as_tensor(depth).detach().cpu().float().numpy()
    values = values[0] if values.ndim == 3 else values
    if low is None or high is None:
        low, high = percentiles([values])
    share = np.clip((np.where(valid := known(values), values, low) - low) / max(high - low, 1e-12), 0, 1)
    colors = (colormaps[DEPTH_COLORS](share)[..., :3] * 255).round().astype(np.uint8)
    colors[~valid] = MISSING
    return colors


def known(depth: np.ndarray) -> np.ndarray:
    """Where a depth map has a reading."""
    return np.isfinite(depth) & (depth > 0)


def percentiles(maps: Sequence[np.ndarray]) -> tuple[float, float]:
    """The 2nd and the 98th percentile of the readings of depth maps; (0, 1) if there is none."""
    readings = np.concatenate([values[known(values)] for values in maps])
    low, high = np.percentile(readings, [2, 98]) if len(readings) else (0.0, 1.0)
    return float(low), float(high)


# Inches and points of a sheet. The places of all parts are computed, so that no title is cut off however many lines it has.
POINT = 1 / 72
TITLE, SMALL = 8, 7
MARGIN, GAP = 0.1, 0.08
MOST = 40  # classes that a legend shows
CHARACTER = 0.56  # mean width of a character, of its size


def save_sheet(path: str | Path, rows: Sequence[Sequence[Panel]], title: str = "", cell: float | None = None) -> None:
    """Write a sheet of panels, one row per sample, with the classes and the depth scale they show below. PNG, or the suffix.

    Samples of a single panel each are set side by side, six in a row. Raises ValueError if there is nothing to show.

    Args:
        path: of the file.
        rows: panels from left to right.
        title: above all.
        cell: inches (of 110 pixels) of a panel's width; None: 2.6, or 4 for panels below each other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not rows or not any(rows):
        raise ValueError(f"nothing to show in {path}: no rows")
    if all(len(row) == 1 for row in rows):
        rows = in_columns([row[0] for row in rows], 6)
    columns = max(len(row) for row in rows)
    cell = cell or (2.6 if columns > 1 else 4.0)
    width = 2 * MARGIN + columns * cell + (columns - 1) * GAP
    titles = [[wrapped(panel.title, cell, TITLE) for panel in row] for row in rows]
    heading = wrapped(title, width, 10)
    depths = [panel.depth for row in rows for panel in row if panel.depth is not None]
    found = {i: entry for row in rows for panel in row for i, entry in panel.legend.items()}
    legend = dict(sorted(found.items())[:MOST])
    names = [name for name, _ in legend.values()]
    entries = max(1, int(width / (max(map(len, names), default=0) * CHARACTER * SMALL * POINT + 0.5)))  # a line of the legend

    tops = [max(lines(text) for text in row) * TITLE * 1.3 * POINT + 0.06 for row in titles]
    sizes = [[fitted(panel.image.shape, cell) for panel in row] for row in rows]
    heights = [max(height for height, _ in row) for row in sizes]
    head = lines(heading) * 13 * POINT + 0.1 if title else MARGIN
    foot = (-(-len(names) // entries) * 0.19 + 0.12 if names else 0.0) + (0.55 if depths else 0.0) + MARGIN
    height = head + sum(tops) + sum(heights) + (len(rows) - 1) * GAP + foot

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    if title:
        figure.text(0.5, 1 - 0.05 / height, heading, fontsize=10, ha="center", va="top")
    scale = percentiles(depths) if depths else (0.0, 1.0)
    y = head
    for row, texts, shapes, top, tall in zip(rows, titles, sizes, tops, heights, strict=True):
        for i, (panel, text, (h, w)) in enumerate(zip(row, texts, shapes, strict=True)):
            x = MARGIN + i * (cell + GAP)
            left = x + (cell - w) / 2
            axis = figure.add_axes((left / width, 1 - (y + top + h) / height, w / width, h / height))
            axis.axis("off")
            axis.imshow(panel.image if panel.depth is None else depth_to_rgb(panel.depth, *scale), "gray", aspect="auto")
            figure.text(
                (x + cell / 2) / width,
                1 - (y + top - 0.04) / height,
                text,
                fontsize=TITLE,
                color=panel.color,
                ha="center",
                va="bottom",
            )
        y += top + tall + GAP
    if names:
        patches = [
            Patch(facecolor=f"#{red:02x}{green:02x}{blue:02x}", edgecolor="gray", label=name)
            for name, (red, green, blue) in legend.values()
        ]
        low = (MARGIN / 2 + (0.55 if depths else 0.0)) / height
        figure.legend(
            handles=patches, loc="lower center", bbox_to_anchor=(0.5, low), ncols=entries, fontsize=SMALL, frameon=False
        )
    if depths:
        bar = figure.add_axes((0.25, (MARGIN + 0.33) / height, 0.5, 0.1 / height))
        figure.colorbar(ScalarMappable(Normalize(*scale), DEPTH_COLORS), cax=bar, orientation="horizontal", extend="both")
        bar.tick_params(labelsize=SMALL)
        bar.set_xlabel("depth (m); grey: missing", fontsize=SMALL, labelpad=1)
    figure.savefig(path, dpi=110)


def wrapped(text: str, width: float, size: int) -> str:
    """Text in lines that fit `width` inches at a font size in points."""
    characters = max(8, int(width / (CHARACTER * size * POINT)))
    return "\n".join("\n".join(textwrap.wrap(line, characters)) for line in text.split("\n"))


def lines(text: str) -> int:
    return text.count("\n") + 1


def fitted(shape: Sequence[int], cell: float) -> tuple[float, float]:
    """(height, width) in inches of an image H W 3 in a cell, which may be twice as high as wide."""
    height = min(cell * shape[0] / shape[1], 2 * cell)
    return height, height * shape[1] / shape[0]


def in_columns(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    """A flat list of panels as rows of a sheet."""
    return [list(panels[i : i + columns]) for i in range(0, len(panels), columns)]
