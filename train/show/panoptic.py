"""Segments: the colour of their class, a shade for each thing, and an outline."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from train.panoptic import PanopticQuality
from train.sample import SEGMENTS
from train.show.base import Moving, Names, Show
from train.show.masks import VOID, class_legend
from train.show.sheet import Color, Panel, make_palette, resize_rgb
from train.show.strip import with_legend

SHADES = (0.0, 0.4, -0.3, 0.65, -0.5, 0.2)  # of the things of one class, towards white and towards black, repeated
OUTLINE: Color = (255, 255, 255)


class Segments(Show):
    """Panoptic maps B H W of class * 1000 + number, -1 for none. num_classes: of the data; things: the countable ones."""

    def __init__(self, num_classes: int, things: Collection[int]):
        self.num_classes, self.things = num_classes, frozenset(things)

    def panels(self, image: np.ndarray, batch: dict[str, Any], prediction: Sequence[Tensor], names: Names) -> list[Panel]:
        """Image, truth and prediction at the size of the prediction; the title has the panoptic quality of this image."""
        found = prediction[0][0].cpu()
        panels, title = [Panel(resize_rgb(image, (found.shape[0], found.shape[1])), "image")], "prediction"
        if "panoptic" in batch:
            truth = torch.as_tensor(batch["panoptic"][0]).cpu()
            panels.append(self.panel(truth, "truth", names))
            metric = PanopticQuality(self.num_classes, self.things)
            metric.update([found], {"panoptic": [truth]})
            title = f"prediction, PQ {metric.compute()['pq']:.2f}"
        return [*panels, self.panel(found, title, names)]

    def panel(self, segments: Tensor, title: str, names: Names) -> Panel:
        palette = self.palette(names)
        legend = class_legend(names.classes, palette, segments.div(SEGMENTS, rounding_mode="floor"))
        return Panel(color_segments(segments, palette), title, legend=legend)

    def outputs(self, stem: Path) -> list[Path]:
        return [stem.with_name(f"{stem.name}_{name}") for name in ("panoptic.png", "segments.json", "overlay.png")]

    def write(self, stem: Path, image: np.ndarray, prediction: Tensor, names: Names) -> list[Path]:
        """The map as COCO writes it (id = red + 256 green + 65536 blue, 0 is void), what its ids are, and the overlay.

        An id is class * 1000 + number + 1. The list has for each its class, name, pixels and box (x, y, width, height).
        """
        files, segments = self.outputs(stem), prediction[0].cpu().numpy()
        ids = segments + 1
        Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(files[0])
        rows = [self.describe(segments == value, int(value), names) for value in np.unique(segments[segments >= 0])]
        files[1].write_text(json.dumps({"segments_info": rows}, indent=1) + "\n", encoding="utf-8")
        Image.fromarray(self.picture(image, prediction, names)).save(files[2])
        return files

    def fields(self, prediction: Tensor) -> dict[str, Tensor]:
        """panoptic: class * 1000 + number H W, -1 for none."""
        return {"panoptic": prediction[0].cpu()}

    def picture(self, image: np.ndarray, prediction: Tensor, names: Names, legend: bool = True) -> np.ndarray:
        """The segments over the photograph, and the classes that occur."""
        drawn = overlay_segments(image, prediction[0], self.palette(names))
        return with_legend(drawn, self.entries(prediction[0], names)) if legend else drawn

    def moving(self, names: Names) -> Moving:
        """Frames with a legend of the classes that each shows, in a strip of two lines."""

        def draw(image: np.ndarray, prediction: Tensor) -> np.ndarray:
            drawn = self.picture(image, prediction, names, legend=False)
            return with_legend(drawn, self.entries(prediction[0], names), lines=2) if names.classes else drawn

        return draw

    def entries(self, segments: Tensor, names: Names) -> list[tuple[str, Color]]:
        """Name and colour of the classes that occur."""
        labels = segments.cpu().div(SEGMENTS, rounding_mode="floor")
        return list(class_legend(names.classes, self.palette(names), labels).values())

    def describe(self, inside: np.ndarray, value: int, names: Names) -> dict[str, Any]:
        """One entry of segments_info."""
        label = value // SEGMENTS
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        top, left = int(rows[0]), int(columns[0])
        return {
            "id": value + 1,
            "category_id": label,
            "name": names.classes[label] if names.classes else str(label),
            "isthing": label in self.things,
            "area": int(inside.sum()),
            "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        }

    def palette(self, names: Names) -> Sequence[Color]:
        return names.palette or make_palette(self.num_classes)


def shaded(color: Color, shade: float) -> Color:
    """A colour nearer to white (shade > 0) or to black (shade < 0)."""
    red, green, blue = (round(c + (255 - c) * shade) if shade > 0 else round(c * (1 + shade)) for c in color)
    return red, green, blue


def color_segments(segments: Tensor | np.ndarray, palette: Sequence[Color]) -> np.ndarray:
    """A panoptic map H W -> uint8 H W 3, outlines in white; void, and a class without a colour, is black."""
    values, places = np.unique(np.asarray(segments), return_inverse=True)
    colors = np.array([segment_color(int(value), palette) for value in values], np.uint8)[places.reshape(np.shape(segments))]
    colors[outline(segments)] = OUTLINE
    return colors


def segment_color(value: int, palette: Sequence[Color]) -> Color:
    """The colour of class * 1000 + number."""
    label, number = divmod(value, SEGMENTS)
    if value < 0 or label >= len(palette):
        return VOID
    return shaded(palette[label], SHADES[max(number - 1, 0) % len(SHADES)])


def outline(segments: Tensor | np.ndarray) -> np.ndarray:
    """H W, True in the last pixel of a segment before another one begins, to the right or below."""
    values = np.asarray(segments)
    edge = np.zeros(values.shape, bool)
    edge[:, :-1] |= values[:, 1:] != values[:, :-1]
    edge[:-1] |= values[1:] != values[:-1]
    return edge


def overlay_segments(
    image: np.ndarray, segments: Tensor | np.ndarray, palette: Sequence[Color], strength: float = 0.5
) -> np.ndarray:
    """The colours of segments over an image; outlines are solid.

    Args:
        image: uint8 H W 3; it is resized to the segments.
        segments: h w, class * 1000 + number.
        palette: a colour per class.
        strength: share of the colour.
    """
    colors = color_segments(segments, palette)
    under = resize_rgb(image, (colors.shape[0], colors.shape[1]))
    mixed = ((1 - strength) * under.astype(np.float32) + strength * colors).round().astype(np.uint8)
    mixed[outline(segments)] = OUTLINE
    return mixed


def numbered_segments(image: np.ndarray, segments: np.ndarray, palette: Sequence[Color], least: int = 480) -> np.ndarray:
    """Segments over an image, each with its number class * 1000 + number written inside.

    Args:
        image: uint8 H W 3.
        segments: h w, class * 1000 + number.
        palette: a colour per class.
        least: width of the picture in pixels.
    """
    factor = max(1, -(-least // segments.shape[1]))
    large = np.repeat(np.repeat(segments, factor, 0), factor, 1)
    picture = Image.fromarray(overlay_segments(image, large, palette))
    pen = ImageDraw.Draw(picture)
    for value in np.unique(segments[segments >= 0]).tolist():
        y, x = inner_point(segments == value)
        place = ((x + 0.5) * factor, (y + 0.5) * factor)
        pen.text(place, str(value), fill=(255, 255, 255), anchor="mm", stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(picture)


def inner_point(inside: np.ndarray) -> tuple[int, int]:
    """(row, column) of a pixel of a mask H W that lies well inside: the middle of the longest run in its middle row."""
    counts = inside.sum(1)
    row = int(np.searchsorted(counts.cumsum(), counts.sum() / 2))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside[row].astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    best = int((ends - starts).argmax())
    return row, int(starts[best] + ends[best]) // 2
