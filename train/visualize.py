"""Pictures: masks and depth in colour, and the sheet of predictions a run leaves behind.

Images are uint8 H W 3 arrays from here on; `to_rgb` makes one from whatever a batch holds. Nothing here touches matplotlib's
global state, so it works in a thread, on a server and inside a notebook alike.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.depth import DepthSpec

Color = tuple[int, int, int]
VOID: Color = (0, 0, 0)
MISSING: Color = (40, 40, 40)
GOOD, BAD = "#15803d", "#b91c1c"


@dataclass
class Panel:
    """One cell of a sheet: uint8 H W 3, a title above it, and the title's colour."""

    image: np.ndarray
    title: str = ""
    color: str = "black"


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
    colors = []
    for i in range(count):
        hue, light, strength = (0.58 + i * 0.6180339887) % 1, (0.50, 0.36, 0.66)[i % 3], (0.75, 0.6)[i % 2]
        colors.append(tuple(round(255 * value) for value in colorsys.hls_to_rgb(hue, light, strength)))
    return colors


def color_mask(mask: Tensor | np.ndarray, palette: Sequence[Color]) -> np.ndarray:
    """Class ids H W -> uint8 H W 3; an id without a colour (void) is black."""
    ids = np.asarray(torch.as_tensor(mask).cpu()).astype(np.int64)
    table = np.array([*palette, VOID], np.uint8)
    return table[np.where((ids >= 0) & (ids < len(palette)), ids, len(palette))]


def overlay(image: np.ndarray, mask: Tensor | np.ndarray, palette: Sequence[Color], strength: float = 0.55) -> np.ndarray:
    """The mask's colours over a uint8 H W 3 image, which is resized to the mask; void pixels show the image, darkened."""
    colors = color_mask(mask, palette).astype(np.float32)
    under = resize_rgb(image, colors.shape[:2]).astype(np.float32)
    return ((1 - strength) * under + strength * colors).round().astype(np.uint8)


def resize_rgb(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A uint8 H W 3 image at another height and width."""
    if image.shape[:2] == tuple(size):
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def depth_to_rgb(depth: Tensor | np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """A depth map H W or 1 H W -> uint8 H W 3, near light and far dark between low and high; missing (0, NaN, inf) is grey.

    Without low and high the map's own 2nd and 98th percentiles are taken, which is what a relative depth needs.
    """
    from matplotlib import colormaps

    values = torch.as_tensor(depth).detach().cpu().float().numpy()
    values = values[0] if values.ndim == 3 else values
    valid = np.isfinite(values) & (values > 0)
    if low is None or high is None:
        low, high = np.percentile(values[valid], [2, 98]) if valid.any() else (0.0, 1.0)
    share = np.clip((np.where(valid, values, low) - low) / max(high - low, 1e-12), 0, 1)
    colors = (colormaps["magma_r"](share)[..., :3] * 255).round().astype(np.uint8)
    colors[~valid] = MISSING
    return colors


def label_panels(
    image: np.ndarray, truth: int | None, scores: Tensor, classes: Sequence[str] | None = None, top: int = 1
) -> list[Panel]:
    """One panel: the image under its true and its predicted label(s), green if the best one is right.

    scores: C probabilities; truth: None where it is not known.
    """

    def name(index: int) -> str:
        return classes[index] if classes is not None else str(index)

    best = scores.float().cpu().topk(min(top, len(scores)))
    guesses = ", ".join(f"{name(int(i))} {float(p):.0%}" for p, i in zip(best.values, best.indices, strict=True))
    if truth is None:
        return [Panel(image, guesses)]
    right = int(best.indices[0]) == int(truth)
    return [Panel(image, guesses if right else f"{guesses}\n(is {name(int(truth))})", GOOD if right else BAD)]


def mask_panels(
    image: np.ndarray, truth: Tensor | None, prediction: Tensor, palette: Sequence[Color], ignore_index: int = 255
) -> list[Panel]:
    """Image, truth (where known) and prediction, at the prediction's size; titles carry the pixel accuracy."""
    size = tuple(prediction.shape[-2:])
    panels = [Panel(resize_rgb(image, size), "image")]
    title = "prediction"
    if truth is not None:
        panels.append(Panel(color_mask(truth, palette), "truth"))
        counted = truth.cpu() != ignore_index
        if counted.any():
            share = (truth.cpu()[counted] == prediction.cpu()[counted]).float().mean()
            title = f"prediction, {float(share):.0%} right"
    return [*panels, Panel(color_mask(prediction, palette), title)]


def depth_panels(image: np.ndarray, truth: Tensor | None, prediction: Tensor, spec: DepthSpec) -> list[Panel]:
    """Image, truth (where known) and prediction (H W or 1 H W) in one colour range, that of the spec.

    A relative prediction is stretched to its own range, and shown with the sign of a depth: near light, far dark.
    """
    size = tuple(prediction.shape[-2:])
    panels = [Panel(resize_rgb(image, size), "image")]
    if truth is not None:
        panels.append(Panel(depth_to_rgb(truth, spec.min_depth, spec.max_depth), "truth"))
    if spec.metric:
        title = "prediction"
        if truth is not None:
            true, guess = truth.cpu().float().reshape(size), prediction.cpu().float().reshape(size)
            valid = spec.valid(true)
            if valid.any():
                title = f"prediction, AbsRel {float(((guess - true).abs()[valid] / true[valid]).mean()):.3f}"
        return [*panels, Panel(depth_to_rgb(prediction, spec.min_depth, spec.max_depth), title)]
    relative = prediction.float()
    if spec.inverse:
        relative = relative.max() - relative + 1e-6
    return [*panels, Panel(depth_to_rgb(relative), "prediction (relative)")]


def save_predictions(
    path: str | Path,
    rows: Sequence[Sequence[Panel]],
    legend: Sequence[tuple[str, Color]] = (),
    depth_range: tuple[float, float] | None = None,
    title: str = "",
) -> None:
    """Write a sheet of panels, one row per sample, with class colours and a depth scale below. PNG, or what the suffix says.

    Samples of a single panel each are set side by side, six in a row.
    Raises ValueError if there is nothing to show.
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
    shapes = [panel.image.shape for row in rows for panel in row]
    aspect = float(np.median([shape[0] / shape[1] for shape in shapes]))
    width = 2.6 if columns > 1 else 1.8
    total_width = max(columns * width, 4.0)
    entries = int(total_width / 1.3)
    foot = 0.28 * -(-len(legend) // entries) + (0.6 if depth_range else 0.0) + (0.15 if legend else 0)
    height = len(rows) * (width * aspect + 0.32) + foot + (0.35 if title else 0)
    figure = Figure(figsize=(total_width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, row in zip(axes, rows, strict=True):
        for axis, panel in zip(line, row, strict=False):
            axis.imshow(panel.image, interpolation="nearest")
            axis.set_title(panel.title, fontsize=8, color=panel.color)
    if title:
        figure.suptitle(title, fontsize=10)
    if legend:
        patches = [Patch(facecolor=[c / 255 for c in color], edgecolor="gray", label=name) for name, color in legend]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(entries, len(legend)), fontsize=7, frameon=False)
    if depth_range:
        scale = ScalarMappable(Normalize(*depth_range), "magma_r")
        bar = figure.colorbar(scale, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.01)
        bar.set_label("depth (m); grey: missing", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)


def in_columns(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    """A flat list of panels as rows of a sheet."""
    return [list(panels[i : i + columns]) for i in range(0, len(panels), columns)]


def class_legend(
    classes: Sequence[str], palette: Sequence[Color], present: Sequence[int] | None = None
) -> list[tuple[str, Color]]:
    """(name, colour) of the classes, of those in `present` alone if given (150 entries are no legend)."""
    chosen = range(len(classes)) if present is None else sorted({int(i) for i in present if 0 <= i < len(classes)})
    return [(classes[i], palette[i]) for i in chosen]
