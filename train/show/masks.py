"""One class per pixel: colours, beside and over the photograph, and the ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.show.base import Moving, Names, Show
from train.show.sheet import Color, Legend, Panel, make_palette, resize_rgb
from train.show.strip import with_legend

VOID: Color = (0, 0, 0)


class Masks(Show):
    """Class ids B H W. num_classes: of the data; ignore_index: the mask value of void."""

    def __init__(self, num_classes: int, ignore_index: int = 255):
        self.num_classes, self.ignore_index = num_classes, ignore_index

    def panels(self, image: np.ndarray, batch: dict[str, Any], prediction: Sequence[Tensor], names: Names) -> list[Panel]:
        """Image, truth and prediction at the size of the prediction; the title has the share of right pixels."""
        ids, palette = prediction[0][0].cpu(), self.palette(names)
        panels, title = [Panel(resize_rgb(image, (ids.shape[0], ids.shape[1])), "image")], "prediction"
        if "mask" in batch:
            truth = torch.as_tensor(batch["mask"][0]).cpu()
            panels.append(Panel(color_mask(truth, palette), "truth", legend=class_legend(names.classes, palette, truth)))
            counted = truth != self.ignore_index
            if counted.any():
                title = f"prediction, {float((truth[counted] == ids[counted]).float().mean()):.0%} right"
        return [*panels, Panel(color_mask(ids, palette), title, legend=class_legend(names.classes, palette, ids))]

    def outputs(self, stem: Path) -> list[Path]:
        return [stem.with_name(f"{stem.name}_classes.png"), stem.with_name(f"{stem.name}_overlay.png")]

    def write(self, stem: Path, image: np.ndarray, prediction: Tensor, names: Names) -> list[Path]:
        """Class ids as a PNG that viewers show in the classes' colours (above 256 classes 16 bit, grey), and the overlay."""
        raw, coloured = self.outputs(stem)
        ids = prediction[0].cpu().numpy()
        picture = Image.fromarray(ids.astype(np.uint8 if self.num_classes <= 256 else np.uint16))
        if self.num_classes <= 256:
            picture.putpalette(np.array(self.palette(names), np.uint8).tobytes())  # the indices are the ids
        picture.save(raw)
        Image.fromarray(self.picture(image, prediction, names)).save(coloured)
        return [raw, coloured]

    def fields(self, prediction: Tensor) -> dict[str, Tensor]:
        """mask: class ids H W."""
        return {"mask": prediction[0].cpu()}

    def picture(self, image: np.ndarray, prediction: Tensor, names: Names, legend: bool = True) -> np.ndarray:
        """The colours over the photograph, and the classes that occur."""
        ids, palette = prediction[0].cpu(), self.palette(names)
        drawn = overlay(image, ids, palette)
        return with_legend(drawn, list(class_legend(names.classes, palette, ids).values())) if legend else drawn

    def moving(self, names: Names) -> Moving:
        """Frames with a legend of the classes that each shows; a strip of two lines, filled in the order of the classes."""

        def draw(image: np.ndarray, prediction: Tensor) -> np.ndarray:
            ids, palette = prediction[0].cpu(), self.palette(names)
            drawn = overlay(image, ids, palette)
            if not names.classes:
                return drawn
            return with_legend(drawn, list(class_legend(names.classes, palette, ids).values()), lines=2)

        return draw

    def palette(self, names: Names) -> Sequence[Color]:
        return names.palette or make_palette(self.num_classes)


def color_mask(mask: Tensor | np.ndarray, palette: Sequence[Color]) -> np.ndarray:
    """Class ids H W -> uint8 H W 3; an id without a colour (void) is black."""
    ids = np.asarray(torch.as_tensor(mask).cpu()).astype(np.int64)
    table = np.array([*palette, VOID], np.uint8)
    return table[np.where((ids >= 0) & (ids < len(palette)), ids, len(palette))]


def overlay(image: np.ndarray, mask: Tensor | np.ndarray, palette: Sequence[Color], strength: float = 0.55) -> np.ndarray:
    """The mask's colours over a uint8 H W 3 image, which is resized to the mask; void pixels show the image, darkened.

    Args:
        image: uint8 H W 3; it is resized to the mask.
        mask: class ids h w.
        palette: a colour per class.
        strength: share of the colour.
    """
    colors = color_mask(mask, palette).astype(np.float32)
    under = resize_rgb(image, (colors.shape[0], colors.shape[1])).astype(np.float32)
    return ((1 - strength) * under + strength * colors).round().astype(np.uint8)


def class_legend(classes: Sequence[str] | None, palette: Sequence[Color], mask: Tensor | np.ndarray) -> Legend:
    """Class id -> (name, colour) of the classes that a mask has; nothing where the classes have no names."""
    if not classes:
        return {}
    present = np.unique(np.asarray(torch.as_tensor(mask).cpu()))
    return {int(i): (classes[int(i)], palette[int(i)]) for i in present if 0 <= i < min(len(classes), len(palette))}
