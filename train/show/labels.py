"""One label per image: the photograph under its name, and the five best as a table."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from train.show.base import Moving, Names, Show
from train.show.sheet import Panel, save_sheet
from train.show.strip import with_lines

GOOD, BAD = "#15803d", "#b91c1c"


class Labels(Show):
    """Class probabilities B K."""

    def panels(self, image: np.ndarray, batch: dict[str, Any], prediction: Tensor, names: Names) -> list[Panel]:
        """One panel: the image under the best label, green if it is right, red with the true one if not."""
        share, best = (value.item() for value in prediction[0].float().cpu().max(0))
        title = f"{named(int(best), names)} {share:.0%}"
        if "label" not in batch:
            return [Panel(image, title)]
        truth = int(batch["label"][0])
        if truth == int(best):
            return [Panel(image, title, GOOD)]
        return [Panel(image, f"{title}\n(is {named(truth, names)})", BAD)]

    def outputs(self, stem: Path) -> list[Path]:
        return [stem.with_name(f"{stem.name}_top5.csv"), stem.with_name(f"{stem.name}_labelled.png")]

    def write(self, stem: Path, image: np.ndarray, prediction: Tensor, names: Names) -> list[Path]:
        """The five best classes with their probabilities as CSV, and the image under the best one."""
        table, picture = self.outputs(stem)
        best = prediction[0].float().cpu().topk(min(5, prediction.shape[1]))
        lines = [
            f"{int(i)},{names.classes[int(i)] if names.classes else ''},{float(p):.6f}"
            for p, i in zip(best.values, best.indices, strict=True)
        ]
        table.write_text("\n".join(["id,class,probability", *lines]) + "\n", encoding="utf-8")
        save_sheet(picture, [self.panels(image, {}, prediction, names)])
        return [table, picture]

    def fields(self, prediction: Tensor) -> dict[str, Tensor]:
        """probabilities: one per class."""
        return {"probabilities": prediction[0].float().cpu()}

    def picture(self, image: np.ndarray, prediction: Tensor, names: Names, legend: bool = True) -> np.ndarray:
        """The photograph, and below it the five best classes."""
        best = prediction[0].float().cpu().topk(min(5, prediction.shape[1]))
        lines = [f"{named(int(i), names)} {float(p):.0%}" for p, i in zip(best.values, best.indices, strict=True)]
        return with_lines(image, lines) if legend else image

    def moving(self, names: Names) -> Moving:
        """Frames with the best classes below, each line cut at the width of the frame."""

        def draw(image: np.ndarray, prediction: Tensor) -> np.ndarray:
            return self.picture(image, prediction, names)[:, : image.shape[1]]

        return draw


def named(index: int, names: Names) -> str:
    """A class by its name, by its number where it has none."""
    return names.classes[index] if names.classes else str(index)
