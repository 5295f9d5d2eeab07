"""Surface normals as colours: red to the right, green upwards, blue towards the camera."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.normals import NormalMetric
from train.show.base import Names, Show
from train.show.sheet import MISSING, Panel, resize_rgb


class NormalMaps(Show):
    """Unit normals B 3 H W."""

    def panels(self, image: np.ndarray, batch: dict[str, Any], prediction: Sequence[Tensor], names: Names) -> list[Panel]:
        """Image, truth and prediction at the size of the prediction; the title has the mean angle between them."""
        found = prediction[0][0].float().cpu()
        panels, title = [Panel(resize_rgb(image, (found.shape[1], found.shape[2])), "image")], "prediction"
        if "normal" in batch:
            truth = torch.as_tensor(batch["normal"][0]).float().cpu()
            panels.append(Panel(color_normals(truth), "truth"))
            metric = NormalMetric()
            metric.update(found[None], {"normal": truth[None]})
            title = f"prediction, {metric.compute()['mean_angle']:.1f} degrees off"
        return [*panels, Panel(color_normals(found), title)]

    def outputs(self, stem: Path) -> list[Path]:
        return [stem.with_name(f"{stem.name}_normal.npy"), stem.with_name(f"{stem.name}_normal.png")]

    def write(self, stem: Path, image: np.ndarray, prediction: Tensor, names: Names) -> list[Path]:
        """float32 3 H W as .npy (x right, y down, z into the image), and its colours."""
        files, values = self.outputs(stem), prediction[0].float().cpu()
        np.save(files[0], values.numpy())
        Image.fromarray(color_normals(values)).save(files[1])
        return files

    def fields(self, prediction: Tensor) -> dict[str, Tensor]:
        """normal: 3 H W, x right, y down, z into the image."""
        return {"normal": prediction[0].float().cpu()}

    def picture(self, image: np.ndarray, prediction: Tensor, names: Names, legend: bool = True) -> np.ndarray:
        """The colours of the normals, which need no legend."""
        return color_normals(prediction[0])


def color_normals(normals: Tensor | np.ndarray) -> np.ndarray:
    """Normals 3 H W -> uint8 H W 3; a pixel without a normal is grey."""
    x, y, z = torch.as_tensor(normals).float().cpu()
    colors = ((torch.stack([x, -y, -z], -1) + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).numpy()
    colors[((x == 0) & (y == 0) & (z == 0)).numpy()] = MISSING
    return colors
