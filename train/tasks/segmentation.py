"""One class per pixel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from train.checks import Collected
from train.losses import SEGMENTATION_LOSSES, cross_entropy_divisor, valid_pixels
from train.metrics import SegmentationMetric
from train.show import Masks
from train.tasks.base import check_classes
from train.tasks.dense import DenseTask, Losses, resized

if TYPE_CHECKING:
    from train.data import ImageDataset


class Segmentation(DenseTask):
    """Semantic segmentation.

    Args:
        num_classes: of the data, void not counted.
        ignore_index: the mask value of void.
        losses: names of SEGMENTATION_LOSSES, each with its arguments (train/losses.py) and a factor: {cross_entropy: {}, dice:
            {factor: 3.0}}. cross_entropy and focal are means over pixels and do not depend on how the total batch is cut; dice,
            lovasz and ohem are taken over a micro-batch.
        aux_weight: of the auxiliary head's loss.
        class_weights: one per class, for the losses that take them.
    """

    target = "mask"
    best = ("miou", "max")
    average = "probabilities"
    gives_probabilities = True

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        losses: dict[str, Any] | None = None,
        aux_weight: float = 0.4,
        class_weights: list[float] | None = None,
    ):
        found = Collected()
        if num_classes < 2:
            found.sentences.append(f"task.num_classes must be at least 2, got {num_classes}")
        if class_weights is not None and len(class_weights) != num_classes:
            found.sentences.append(f"task.class_weights has {len(class_weights)} values for {num_classes} classes")
        self.out_channels = self.num_classes = num_classes
        self.ignore_index, self.aux_weight, self.class_weights = ignore_index, aux_weight, class_weights
        self.show = Masks(num_classes, ignore_index)
        shared = {"ignore_index": ignore_index, "class_weight": class_weights}
        counts = {"cross_entropy": cross_entropy_divisor, None: valid_pixels}
        with found.check():
            self.terms = Losses(losses or {"cross_entropy": {}}, SEGMENTATION_LOSSES, shared, counts)
        found.done()

    def check(self, dataset: ImageDataset) -> None:
        if "mask" not in dataset.provides:
            raise ValueError(f"{type(dataset).__name__} has no masks; it provides {', '.join(dataset.provides)}")
        found, void = Collected(), dataset.ignore_index
        with found.check():
            check_classes(dataset, self.num_classes)
        if void != self.ignore_index:
            found.sentences.append(f"the data mark void with {void}, set task.ignore_index={void}")
        found.done()

    def head_losses(self, output: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.terms(output, batch["mask"])

    def head_counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.terms.counts(batch["mask"])

    def predict(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """B K H W scores -> B H W class ids."""
        return resized(output, size).argmax(1)

    def probabilities(self, output: Tensor, size: tuple[int, int], averaged: bool) -> Tensor:
        """B K H W, the softmax of the scores; what was averaged is made of probabilities already."""
        scores = resized(output, size)
        return scores if averaged else scores.softmax(1)

    def metric(self) -> SegmentationMetric:
        return SegmentationMetric(self.num_classes, self.ignore_index)
