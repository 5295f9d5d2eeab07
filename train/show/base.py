"""What a kind of prediction must be able to do to be seen."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from train.show.sheet import Color, Panel, make_palette

Moving = Callable[[np.ndarray, Any], np.ndarray]


@dataclass
class Names:
    """What class ids are called and how they are coloured; None where a task has no classes."""

    classes: list[str] | None = None
    palette: list[Color] | None = None

    @classmethod
    def of(cls, dataset: Any) -> Names:
        """Those of a dataset; colours are made where it has none."""
        palette = dataset.palette or (make_palette(len(dataset.classes)) if dataset.classes else None)
        return cls(dataset.classes, [tuple(color) for color in palette] if palette else None)


class Show(abc.ABC):
    """Pictures and files of one kind of prediction."""

    @abc.abstractmethod
    def panels(self, image: np.ndarray, batch: dict[str, Any], prediction: Any, names: Names) -> list[Panel]:
        """Image, truth where the batch has it, and prediction of one sample.

        Args:
            image: uint8 H W 3.
            batch: of one sample.
            prediction: as the task's `measure` returns it for that batch.
            names: of the classes.
        """

    @abc.abstractmethod
    def outputs(self, stem: Path) -> list[Path]:
        """The files that `write` makes."""

    @abc.abstractmethod
    def write(self, stem: Path, image: np.ndarray, prediction: Any, names: Names) -> list[Path]:
        """Write the prediction for one image, at its size, to `stem` plus suffixes; returns the files.

        Args:
            stem: path without a suffix.
            image: uint8 H W 3.
            prediction: as the task's `predict` returns it for that image and its size.
            names: of the classes.
        """

    def fields(self, prediction: Any) -> dict[str, Tensor]:
        """What the prediction of one image holds, by the name under which a person asks for it: "mask", "depth"."""
        return {}

    def picture(self, image: np.ndarray, prediction: Any, names: Names, legend: bool = True) -> np.ndarray:
        """The prediction over the photograph, uint8 H W 3 at its size; a legend or scale takes a strip below.

        Args:
            image: uint8 H W 3.
            prediction: as the task's `predict` returns it for that image and its size.
            names: of the classes.
            legend: whether the strip is there.
        """
        raise ValueError(f"{type(self).__name__} draws no picture of a prediction: it has no method `picture`")

    def moving(self, names: Names) -> Moving:
        """What draws the frames of a video one after another: (frame, prediction) -> picture, all of one size.

        A kind whose legend depends on the picture says here what the whole video shows.
        """
        return lambda image, prediction: self.picture(image, prediction, names, legend=False)


class Several(Show):
    """The parts of a multi-task prediction, {part: prediction}, side by side."""

    def __init__(self, parts: Mapping[str, Show]):
        self.parts = dict(parts)

    def panels(self, image: np.ndarray, batch: dict[str, Any], prediction: Any, names: Names) -> list[Panel]:
        rows = [part.panels(image, batch, prediction[name], names) for name, part in self.parts.items()]
        return rows[0] + [panel for row in rows[1:] for panel in row[1:]]  # the image once

    def outputs(self, stem: Path) -> list[Path]:
        return [path for part in self.parts.values() for path in part.outputs(stem)]

    def write(self, stem: Path, image: np.ndarray, prediction: Any, names: Names) -> list[Path]:
        return [path for name, part in self.parts.items() for path in part.write(stem, image, prediction[name], names)]

    def fields(self, prediction: Any) -> dict[str, Tensor]:
        return {key: value for name, part in self.parts.items() for key, value in part.fields(prediction[name]).items()}

    def picture(self, image: np.ndarray, prediction: Any, names: Names, legend: bool = True) -> np.ndarray:
        """The pictures of the parts from left to right; shorter ones end in white."""
        return joined([part.picture(image, prediction[name], names, legend) for name, part in self.parts.items()])

    def moving(self, names: Names) -> Moving:
        """The frames of the parts from left to right."""
        parts = {name: part.moving(names) for name, part in self.parts.items()}
        return lambda image, prediction: joined([part(image, prediction[name]) for name, part in parts.items()])


def joined(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 H W 3 pictures from left to right; shorter ones end in white."""
    tall = max(len(one) for one in pictures)
    return np.concatenate([np.pad(one, ((0, tall - len(one)), (0, 0), (0, 0)), constant_values=255) for one in pictures], 1)
