"""Every pixel belongs to a thing or to stuff: a class and, of things, a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from heads import kmax, mask2former
from train.checks import Collected, checked_arguments
from train.matching import Masks
from train.panoptic import PanopticQuality, QueryOrder, ScoreOrder, encode
from train.sample import SEGMENTS, VOID
from train.show import Segments
from train.tasks.base import check_classes
from train.tasks.mask_classification import MaskClassification

if TYPE_CHECKING:
    from train.data import ImageDataset
    from train.schema import ModelConfig


class Panoptic(MaskClassification):
    """Panoptic segmentation by mask classification; for the heads mask2former and kmax, each with its published losses.

    Each segment of an image is one mask: every thing, and all stuff of one class. Crowds of things and void teach nothing.

    Args:
        num_classes: of the data, things and stuff together, void not counted.
        things: which of them are countable; the others are stuff.
        weights: of the losses' terms, as for mask_classification.
        losses: other arguments of the published losses, as for mask_classification.
        merge: other arguments of the rule that makes a map of the queries (train.panoptic.QueryOrder for mask2former: score,
            overlap; ScoreOrder for kmax: pixel, thing, stuff, overlap, class_power, mask_power).
    """

    target = "panoptic"
    best = ("pq", "max")
    average = None  # queries of two passes do not correspond
    gives_probabilities = False

    def __init__(
        self,
        num_classes: int,
        things: list[int],
        weights: dict[str, float] | None = None,
        losses: dict[str, Any] | None = None,
        merge: dict[str, Any] | None = None,
    ):
        super().__init__(num_classes, weights=weights, losses=losses)
        if len(set(things)) != len(things) or not all(0 <= thing < num_classes for thing in things):
            raise ValueError(f"task.things must be different class ids of 0..{num_classes - 1}, got {things}")
        self.things, self.void, self.given_merge = frozenset(things), VOID, dict(merge or {})
        self.merge: QueryOrder | ScoreOrder = QueryOrder()
        self.full_masks: Callable[..., Tensor] = mask2former.full_masks
        self.show = Segments(num_classes, self.things)

    def build(self, model: ModelConfig) -> nn.Module:
        """A heads.DensePredictor, as for mask_classification."""
        predictor = super().build(model)
        rule: type = ScoreOrder if self.panoptic else QueryOrder
        self.merge = rule(**checked_arguments(rule, self.given_merge, "task.merge"))
        self.full_masks = kmax.full_masks if self.panoptic else mask2former.full_masks
        return predictor

    def check(self, dataset: ImageDataset) -> None:
        name = type(dataset).__name__
        if "panoptic" not in dataset.provides:
            raise ValueError(f"{name} has no segments (target panoptic); it provides {', '.join(dataset.provides)}")
        found = Collected()
        with found.check():
            check_classes(dataset, self.num_classes)
        if set(dataset.things) != self.things:
            found.sentences.append(f"the things of the data are other classes, set task.things={sorted(dataset.things)}")
        found.done()

    def masks(self, target: Tensor) -> Masks:
        return Masks.of_segments(target, self.things)

    def classes(self, target: Tensor) -> Tensor:
        return torch.where(target < 0, self.ignore_index, target.div(SEGMENTS, rounding_mode="floor"))

    def forward(self, model: Callable[..., Any], batch: dict[str, Any]) -> dict[str, Any]:
        """The head's named outputs in evaluation too, with the images' size."""
        return {**model(batch["image"], named=True), "image_size": tuple(batch["image"].shape[-2:])}

    def predict(self, output: dict[str, Any], size: tuple[int, int] | None = None) -> Tensor:
        """B H W: class * 1000 + number, -1 where no segment is; at `size`, or the images' own."""
        count = len(output["main"]["class_logits"])
        return torch.stack([self.segments(output, i, size or output["image_size"]) for i in range(count)])

    def segments(self, output: dict[str, Any], image: int, size: tuple[int, int]) -> Tensor:
        """The panoptic map H W of one image of the batch."""
        main = output["main"]
        logits = main["mask_logits"][image : image + 1].float()
        masks = self.full_masks(logits, main["size"], output["image_size"], size)[0]
        return encode(*self.merge(main["class_logits"][image].float(), masks, self.things))

    def measure(self, metric: Any, output: dict[str, Any], batch: dict[str, Any]) -> list[Tensor]:
        """Image by image, because each target has its own size, at which the map is made."""
        predictions = []
        for i, target in enumerate(batch["panoptic"]):
            height, width = target.shape
            predictions.append(self.segments(output, i, (height, width))[None])
            metric.update(predictions[-1], {"panoptic": target[None]})
        return predictions

    def metric(self) -> Any:
        return PanopticQuality(self.num_classes, self.things)
