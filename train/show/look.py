"""What a backbone sees, drawn: features in colours, attention over the photograph, heads side by side."""

import math

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbones.analysis.points import Place, PointAttention
from train.show.analysis import heat
from train.show.sheet import Panel

SIDE = 330  # pixels of the longer side of a panel, about what a sheet shows of it
MOST_HEADS = 16
MARK = (255, 255, 255)


def scaled(image: np.ndarray) -> np.ndarray:
    """A photograph uint8 H W 3 at the size of a panel."""
    factor = SIDE / max(image.shape[:2])
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def marked(image: np.ndarray, at: Place) -> np.ndarray:
    """The picture with a ring around a place."""
    height, width = image.shape[:2]
    rows, columns = np.ogrid[:height, :width]
    distance = np.hypot(rows + 0.5 - at[1] * height, columns + 0.5 - at[0] * width)
    radius = max(3.0, max(height, width) / 45)
    drawn = image.copy()
    drawn[abs(distance - radius) < radius / 2] = 0
    drawn[abs(distance - radius) < radius / 4] = MARK
    return drawn


def enlarged(values: Tensor, height: int, width: int) -> Tensor:
    """A map H W at another size, cells kept sharp."""
    return F.interpolate(values[None, None].float(), (height, width), mode="nearest-exact")[0, 0]


def attended(image: np.ndarray, weights: Tensor, at: Place) -> np.ndarray:
    """Attention H W over a photograph, from nothing (the photograph, darkened) to its largest value, with the place."""
    values = enlarged(weights / weights.max().clamp_min(1e-12), image.shape[0], image.shape[1])
    strength = values.sqrt()[..., None].numpy() * 0.85  # the root shows small weights too
    dark = 0.45 * image
    return marked(((1 - strength) * dark + strength * heat(values, 0.0, 1.0)).round().astype(np.uint8), at)


def mosaic(tiles: list[np.ndarray]) -> np.ndarray:
    """Pictures of one size in a square, thin white lines between them."""
    columns = math.ceil(len(tiles) ** 0.5)
    height, width = tiles[0].shape[:2]
    rows = math.ceil(len(tiles) / columns)
    canvas = np.full((rows * (height + 3) - 3, columns * (width + 3) - 3, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + 3), i % columns * (width + 3)
        canvas[top : top + height, left : left + width] = tile
    return canvas


def heads_of(image: np.ndarray, weights: Tensor, at: Place) -> np.ndarray:
    """Every head's attention h H W over a small copy of the photograph."""
    small = np.asarray(Image.fromarray(image).resize((max(1, image.shape[1] // 2), max(1, image.shape[0] // 2))))
    return mosaic([attended(small, one, at) for one in weights[:MOST_HEADS]])


def attention_panels(image: np.ndarray, one: PointAttention, at: Place) -> list[Panel]:
    """The mean over the heads, the heads, and where a block chooses its keys how many heads keep each."""
    heads = len(one.weights)
    shown = f"{min(heads, MOST_HEADS)} of {heads} heads" if heads > MOST_HEADS else f"{heads} head{'s' * (heads > 1)}"
    title = f"{one.name}: {one.kind}"
    panels = [Panel(attended(image, one.weights.mean(0), at), f"{title}\nmean")]
    if heads > 1:
        panels.append(Panel(heads_of(image, one.weights, at), f"{title}\n{shown}"))
    if one.kept is not None:
        counts = one.kept.float().mean(0)
        panels.append(Panel(attended(image, counts, at), f"{title}\nshare of the heads that keep a key"))
        panels.append(Panel(heads_of(image, one.kept.float(), at), f"{title}\nkept keys, {shown}"))
    if one.dense is not None:
        panels.append(Panel(attended(image, one.dense.mean(0), at), f"{one.name}: without the choice\nmean"))
    return panels


def norm_panel(norms: Tensor, image: np.ndarray, title: str, high: float | None = None) -> Panel:
    """Norms H W of tokens in colours, from their smallest to `high` or their largest.

    Args:
        norms: H W, of tokens.
        image: the photograph.
        title: above the panel.
        high: the norm at the end of the colours, None for the largest.
    """
    drawn = heat(enlarged(norms, image.shape[0], image.shape[1]), float(norms.min()), high or float(norms.max()))
    return Panel(drawn, f"{title}\nlargest {norms.max():.3g}, median {norms.median():.3g}")
