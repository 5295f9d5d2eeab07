"""Depth: near light, far dark, and metres in files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.depth import DepthSpec
from train.show.base import Moving, Names, Show
from train.show.sheet import Panel, depth_to_rgb, percentiles, resize_rgb
from train.show.strip import with_scale


class DepthMaps(Show):
    """Metres, or relative inverse depth, B 1 H W. spec: what the numbers mean."""

    def __init__(self, spec: DepthSpec):
        self.spec = spec

    def panels(self, image: np.ndarray, batch: dict[str, Any], prediction: Sequence[Tensor], names: Names) -> list[Panel]:
        """Image, truth and prediction; the title of a metric one has its AbsRel.

        A relative prediction is stretched to its own range, and shown with the sign of a depth: near light, far dark.
        """
        values = prediction[0][0].float().cpu()
        values = values[0] if values.ndim == 3 else values
        panels, title = [Panel(resize_rgb(image, (values.shape[0], values.shape[1])), "image")], "prediction"
        truth = torch.as_tensor(batch["depth"][0]).float().cpu().reshape(values.shape) if "depth" in batch else None
        if truth is not None:
            panels.append(metric_panel(truth, "truth"))
        if not self.spec.metric:
            return [*panels, Panel(depth_to_rgb(as_depth(values, self.spec)), "prediction (relative)")]
        if truth is not None and (valid := self.spec.valid(truth)).any():
            title = f"prediction, AbsRel {float(((values - truth).abs()[valid] / truth[valid]).mean()):.3f}"
        return [*panels, metric_panel(values, title)]

    def outputs(self, stem: Path) -> list[Path]:
        names = ["depth.npy", "depth.png", "depth_coloured.png"]
        return [stem.with_name(f"{stem.name}_{name}") for name in (names if self.spec.metric else names[::2])]

    def write(self, stem: Path, image: np.ndarray, prediction: Tensor, names: Names) -> list[Path]:
        """Write float32 H W as .npy; metres also as a 16-bit PNG, 1000 units per metre (256 above 65 m); and the picture."""
        files, values = self.outputs(stem), prediction[0, 0].float().cpu()
        np.save(files[0], values.numpy())
        if self.spec.metric:
            units = 1000 if self.spec.max_depth <= 65 else 256
            Image.fromarray((values.numpy() * units).round().clip(0, 65535).astype(np.uint16)).save(files[1])
        Image.fromarray(self.picture(image, prediction, names)).save(files[-1])
        return files

    def fields(self, prediction: Tensor) -> dict[str, Tensor]:
        """depth: metres H W; what has no scale has another name, so that nobody takes it for metres."""
        name = "depth" if self.spec.metric else "inverse_depth" if self.spec.inverse else "relative_depth"
        return {name: prediction[0, 0].float().cpu()}

    def picture(self, image: np.ndarray, prediction: Tensor, names: Names, legend: bool = True) -> np.ndarray:
        """Depth in colours between its 2nd and 98th percentile, near light, and their scale."""
        values = as_depth(prediction[0, 0].float().cpu(), self.spec)
        drawn = resize_rgb(depth_to_rgb(values), (image.shape[0], image.shape[1]))
        return with_scale(drawn, *percentiles([values.numpy()]), metric=self.spec.metric) if legend else drawn

    def moving(self, names: Names) -> Moving:
        """Frames over one scale, which follows slowly what they show: a range of each frame's own would flicker."""
        seen: list[tuple[float, float]] = []

        def draw(image: np.ndarray, prediction: Tensor) -> np.ndarray:
            values = as_depth(prediction[0, 0].float().cpu(), self.spec)
            low, high = percentiles([values.numpy()])
            before = seen[0] if seen else (low, high)
            low, high = 0.9 * before[0] + 0.1 * low, 0.9 * before[1] + 0.1 * high
            seen[:] = [(low, high)]
            drawn = resize_rgb(depth_to_rgb(values, low, high), (image.shape[0], image.shape[1]))
            return with_scale(drawn, low, high, metric=self.spec.metric, fits=True)

        return draw


def metric_panel(depth: Tensor | np.ndarray, title: str) -> Panel:
    """Metres H W (0, NaN, inf: missing) as a panel; a sheet colours all of its panels over one range."""
    values = torch.as_tensor(depth).float().cpu().numpy()
    return Panel(depth_to_rgb(values), title, depth=values)


def as_depth(values: Tensor, spec: DepthSpec) -> Tensor:
    """A prediction with the sign of a depth: relative inverse depth is turned round."""
    return values.max() - values + 1e-6 if spec.inverse and not spec.metric else values
