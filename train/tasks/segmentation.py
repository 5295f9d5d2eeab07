"""One class per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from train import losses
from train.metrics import SegmentationMetric
from train.tasks.base import Names
from train.tasks.dense import DenseTask, forward, resized
from train.visualize import Panel, class_legend, make_palette, mask_panels


class Segmentation(DenseTask):
    """Semantic segmentation.

    num_classes: of the data, void not counted; ignore_index: the mask value of void.
    loss: a name of LOSSES. aux_weight: of the auxiliary head's loss. class_weights: one per class, or null.
    label_smoothing: share of the target spread over all classes (cross_entropy).
    """

    targets = ("mask",)
    best = ("miou", "max")

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        loss: Literal["cross_entropy"] = "cross_entropy",
        aux_weight: float = 0.4,
        class_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
    ):
        if num_classes < 2:
            raise ValueError(f"task.num_classes must be at least 2, got {num_classes}")
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(f"task.class_weights has {len(class_weights)} values for {num_classes} classes")
        self.out_channels = self.num_classes = num_classes
        self.ignore_index, self.aux_weight, self.label_smoothing = ignore_index, aux_weight, label_smoothing
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    def check(self, dataset: Any) -> None:
        if "mask" not in dataset.provides:
            raise ValueError(f"{type(dataset).__name__} has no masks; it provides {', '.join(dataset.provides)}")
        if dataset.classes is not None and len(dataset.classes) != self.num_classes:
            raise ValueError(f"the data have {len(dataset.classes)} classes, set task.num_classes={len(dataset.classes)}")
        if dataset.ignore_index != self.ignore_index:
            raise ValueError(f"the data mark void with {dataset.ignore_index}, set task.ignore_index={dataset.ignore_index}")

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        main, auxiliary = forward(model, batch["image"], model.training)
        loss = self.pixels(main, batch["mask"])
        return loss if auxiliary is None else loss + self.aux_weight * self.pixels(auxiliary, batch["mask"])

    def pixels(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Loss of logits B K H W against a mask B H W."""
        return losses.cross_entropy(logits, mask, self.ignore_index, self.class_weights, self.label_smoothing)

    def weight(self, batch: dict[str, Any]) -> Tensor:
        return losses.valid_weight(batch["mask"], self.ignore_index, self.class_weights)

    def predict(self, output: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """B K H W scores -> B H W class ids."""
        return resized(output, size).argmax(1)

    def metric(self) -> SegmentationMetric:
        return SegmentationMetric(self.num_classes, self.ignore_index)

    def picture(self, image: np.ndarray, batch: dict[str, Any], prediction: Sequence[Tensor], names: Names) -> list[Panel]:
        truth = batch["mask"][0] if "mask" in batch else None
        palette = names.palette or make_palette(self.num_classes)
        return mask_panels(image, truth, prediction[0][0], palette, self.ignore_index)

    def legend(self, names: Names) -> dict[str, Any]:
        if not names.classes or len(names.classes) > 40:
            return {}
        return {"legend": class_legend(names.classes, names.palette or make_palette(self.num_classes))}
