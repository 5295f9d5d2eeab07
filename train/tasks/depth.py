"""Metres, or relative inverse depth, per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from train import losses
from train.data.depth import DepthSpec
from train.metrics import DepthMetric
from train.tasks.base import Names
from train.tasks.dense import DenseTask, forward, resized
from train.visualize import Panel, depth_panels


class Depth(DenseTask):
    """Monocular depth.

    min_depth, max_depth: metres; readings outside count as missing in loss and metric.
    activation: how the head's number x becomes the prediction. "sigmoid": max_depth * sigmoid(x) (Kim et al. 2022); "log":
        min_depth * (max_depth / min_depth) ** sigmoid(x), even in relative error over the range; "relu": x where positive, for
        relative inverse depth; "none".
    inverse: x is inverse depth; metric: the prediction has a true scale. Relative inverse depth (false) needs align "affine".
    loss: "silog" (lam as in train/losses.py), "l1" or "berhu", on depth, or on inverse depth if `inverse`; loss_scale: factor.
    over: "image": the loss of each image, averaged over the images that have readings; the same for any cut of the total batch.
        "batch": one loss over the pixels of a micro-batch, as published code does; silog and berhu then depend on the cut.
    aux_weight: of the auxiliary head's loss.
    crop, align, average, clamp: of the metric (train/metrics.py DepthMetric).
    """

    targets = ("depth",)
    best = ("abs_rel", "min")
    out_channels = 1

    def __init__(
        self,
        max_depth: float,
        min_depth: float = 1e-3,
        activation: Literal["sigmoid", "log", "relu", "none"] = "sigmoid",
        inverse: bool = False,
        metric: bool = True,
        loss: Literal["silog", "l1", "berhu"] = "silog",
        loss_scale: float = 1.0,
        lam: float = 0.5,
        over: Literal["image", "batch"] = "image",
        aux_weight: float = 0.4,
        crop: Literal["eigen", "garg", "nyu"] | None = None,
        align: Literal["median", "affine"] | None = None,
        average: Literal["image", "pixel"] = "image",
        clamp: bool = False,
    ):
        self.spec = DepthSpec(min_depth=min_depth, max_depth=max_depth, metric=metric, inverse=inverse)
        self.activation, self.over, self.aux_weight, self.loss_scale = activation, over, aux_weight, loss_scale
        self.function = {"silog": lambda p, t: losses.silog(p, t, lam=lam), "l1": losses.l1, "berhu": losses.berhu}[loss]
        self.protocol = {"crop": crop, "align": align, "average": average, "clamp": clamp}
        self.metric()  # raises now for settings that contradict each other

    def check(self, dataset: Any) -> None:
        if "depth" not in dataset.provides:
            raise ValueError(f"{type(dataset).__name__} has no depth; it provides {', '.join(dataset.provides)}")
        spec = dataset.depth
        if spec is not None and (self.spec.max_depth > spec.max_depth or self.spec.min_depth < spec.min_depth):
            raise ValueError(
                f"{type(dataset).__name__} has depth from {spec.min_depth:g} to {spec.max_depth:g} m, the task asks for "
                f"{self.spec.min_depth:g} to {self.spec.max_depth:g} m: set task.min_depth and task.max_depth inside that range"
            )

    def activate(self, output: Tensor) -> Tensor:
        """Head output B 1 H W -> depth in metres, or inverse depth, float32."""
        x, low, high = output.float(), self.spec.min_depth, self.spec.max_depth
        if self.spec.inverse:
            low, high = 1 / high, 1 / low
        if self.activation == "sigmoid":
            return high * x.sigmoid()
        if self.activation == "log":
            return low * (high / low) ** x.sigmoid()
        return x.relu() if self.activation == "relu" else x

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        target = self.spec.target(batch["depth"])
        main, auxiliary = forward(model, batch["image"], model.training)
        loss = self.pixels(main, target)
        return loss if auxiliary is None else loss + self.aux_weight * self.pixels(auxiliary, target)

    def pixels(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of a head's output B 1 H W against what it should become, B 1 H W, 0 = missing."""
        prediction = self.activate(output)
        if self.over == "batch":
            return self.loss_scale * self.function(prediction, target)
        each = [self.function(p[None], t[None]) for p, t in zip(prediction, target, strict=True)]
        return self.loss_scale * torch.stack(each).sum() / self._images(target).clamp_min(1)

    def _images(self, target: Tensor) -> Tensor:
        return (target > 0).flatten(1).any(1).sum().float()

    def weight(self, batch: dict[str, Any]) -> Tensor:
        target = self.spec.target(batch["depth"])
        return self._images(target) if self.over == "image" else (target > 0).sum().float()

    def predict(self, output: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """B 1 H W: metres, or relative inverse depth."""
        return resized(self.spec.prediction(self.activate(output)), size)

    def metric(self) -> DepthMetric:
        return DepthMetric(self.spec, **self.protocol)

    def picture(self, image: np.ndarray, batch: dict[str, Any], prediction: Sequence[Tensor], names: Names) -> list[Panel]:
        return depth_panels(image, batch["depth"][0] if "depth" in batch else None, prediction[0][0], self.spec)

    def legend(self, names: Names) -> dict[str, Any]:
        return {"depth_range": (self.spec.min_depth, self.spec.max_depth)} if self.spec.metric else {}
