"""What a kind of prediction must be able to do to be seen."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.show.sheet import Color, Panel, make_palette


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
