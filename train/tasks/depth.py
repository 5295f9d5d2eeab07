"""Metres, or relative inverse depth, per pixel."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from heads.depth import DepthRule
from train.checks import Collected, checked_arguments
from train.data.files import Unreadable
from train.depth import DepthSpec
from train.losses import DEPTH_LOSSES
from train.metrics import DepthMetric, crop_rows_columns
from train.show import DepthMaps
from train.tasks.dense import DenseTask, Losses, resized

if TYPE_CHECKING:
    from train.data import ImageDataset


class Depth(DenseTask):
    """Monocular depth.

    Args:
        max_depth: metres; readings beyond it count as missing in loss and metric.
        min_depth: likewise, on the near side.
        rule: what the head's channels mean, a name of heads.depth.RULES.
        rule_args: its other arguments (bins, scale, shift, signed; min_depth and max_depth unless they are the task's).
        inverse: the rule gives inverse depth.
        metric: the prediction has a true scale. Relative inverse depth (false) needs align "affine".
        losses: names of DEPTH_LOSSES, each with its arguments (train/losses.py) and a factor, on depth, or on inverse depth if
            `inverse`: {silog: {lam: 0.85, factor: 10.0}}.
        over: "image": the loss of each image, averaged over the images that have readings; the same for any cut of the total
            batch. "batch": one loss over the pixels of a micro-batch, as published code does; all but l1 then depend on the
            cut.
        aux_weight: of the auxiliary head's loss.
        crop, align, average, clamp: of the metric (train/metrics.py DepthMetric).
    """

    target = "depth"
    best = ("abs_rel", "min")
    average = "values"

    def __init__(
        self,
        max_depth: float,
        min_depth: float = 1e-3,
        rule: Literal["relu", "sigmoid", "softplus", "invert", "bins", "log_bins"] = "sigmoid",
        rule_args: dict[str, Any] | None = None,
        inverse: bool = False,
        metric: bool = True,
        losses: dict[str, Any] | None = None,
        over: Literal["image", "batch"] = "image",
        aux_weight: float = 0.4,
        crop: Literal["eigen", "garg", "nyu"] | None = None,
        align: Literal["median", "affine"] | None = None,
        average: Literal["image", "pixel"] = "image",
        clamp: bool = False,
    ):
        self.spec = DepthSpec(min_depth=min_depth, max_depth=max_depth, metric=metric, inverse=inverse)
        self.show = DepthMaps(self.spec)
        values = {"min_depth": min_depth if metric else 0.0, "max_depth": max_depth, **(rule_args or {})}
        self.rule = DepthRule(**checked_arguments(DepthRule, {"name": rule, **values}, "task.rule_args"))
        self.out_channels = self.rule.channels
        self.over, self.aux_weight = over, aux_weight
        count = images_with_readings if over == "image" else readings
        self.terms = Losses(losses or {"silog": {}}, DEPTH_LOSSES, {}, {None: count})
        self.crop = crop
        self.protocol: dict[str, Any] = {"crop": crop, "align": align, "average": average, "clamp": clamp}
        self.metric()  # raises now for settings that contradict each other

    def check(self, dataset: ImageDataset) -> None:
        if "depth" not in dataset.provides:
            raise ValueError(f"{type(dataset).__name__} has no depth; it provides {', '.join(dataset.provides)}")
        found, spec = Collected(), dataset.depth
        if spec is not None and (self.spec.max_depth > spec.max_depth or self.spec.min_depth < spec.min_depth):
            found.sentences.append(
                f"{type(dataset).__name__} has depth from {spec.min_depth:g} to {spec.max_depth:g} m, the task asks for "
                f"{self.spec.min_depth:g} to {self.spec.max_depth:g} m: set task.min_depth and task.max_depth inside that range"
            )
        if self.crop is not None and dataset.split == "val" and len(dataset):
            with found.check(), contextlib.suppress(Unreadable):  # counted and reported elsewhere
                crop_rows_columns(self.crop, *dataset.read(0)["depth"].shape[-2:])  # raises now, not after an epoch
        found.done()

    def head_losses(self, output: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        prediction, target = self.rule(output.float()), self.spec.target(batch["depth"])
        if self.over == "batch":
            return self.terms(prediction, target)
        each = [self.terms(p[None], t[None]) for p, t in zip(prediction, target, strict=True)]
        images = images_with_readings(target).clamp_min(1)
        return {name: torch.stack([terms[name] for terms in each]).sum() / images for name in self.terms.terms}

    def head_counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.terms.counts(self.spec.target(batch["depth"]))

    def predict(self, output: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """B 1 H W: metres, or relative inverse depth."""
        return resized(self.spec.prediction(self.rule(output.float())), size)

    def metric(self) -> DepthMetric:
        return DepthMetric(self.spec, **self.protocol)


def readings(target: Tensor) -> Tensor:
    """How many pixels of B 1 H W have a depth: 0-d float."""
    return (target > 0).sum().float()


def images_with_readings(target: Tensor) -> Tensor:
    """How many images of B 1 H W have a depth somewhere: 0-d float."""
    return (target > 0).flatten(1).any(1).sum().float()
