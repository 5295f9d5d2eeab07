"""One class per pixel, by queries that each draw a mask and name its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heads
from heads.kmax import KMax
from train.checks import checked_arguments
from train.matching import Draw, Masks, PanopticLosses, PointLosses, seeded
from train.tasks.dense import backbone_arguments, resized
from train.tasks.segmentation import Segmentation

if TYPE_CHECKING:
    from train.schema import ModelConfig

POINT_WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}
PANOPTIC_WEIGHTS = {"class": 3.0, "mask": 0.3, "dice": 3.0, "pixels": 1.0, "semantic": 1.0}


class MaskClassification(Segmentation):
    """Semantic segmentation by mask classification; for the heads mask2former and kmax, each with its published losses.

    Each class that occurs in an image is one mask. The masks are matched with the queries, and the terms compare what was
    matched; the terms of the layers before the last are summed as aux_NAME. What is drawn at random depends on the sample's
    place in the run alone.

    Args:
        num_classes: of the data, void not counted.
        ignore_index: the mask value of void.
        weights: of the terms; Mask2Former has class, mask and dice (2, 5, 5), kMaX class, mask, dice, pixels and semantic
            (3, 0.3, 3, 1, 1).
        losses: other arguments of the published losses (train.matching.PointLosses, PanopticLosses), e.g. {points: 2048}.
    """

    average: Any = "values"  # the scores are shares already
    void: int  # of the target

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        weights: dict[str, float] | None = None,
        losses: dict[str, Any] | None = None,
    ):
        super().__init__(num_classes, ignore_index)
        self.void = ignore_index
        self.given_weights, self.given_losses = dict(weights or {}), dict(losses or {})
        self.weights: dict[str, float] = {}
        self.points: PointLosses | None = None
        self.panoptic: PanopticLosses | None = None
        self.queries = 0
        self.layers = 0

    def build(self, model: ModelConfig) -> nn.Module:
        """A heads.DensePredictor. Raises ValueError for a head without queries, and for an auxiliary head."""
        if model.aux_head is not None:
            raise ValueError("model.aux_head: the layers of a mask head are its own auxiliary heads; set it to null")
        predictor = heads.DensePredictor(
            model.backbone,
            model.head,
            self.num_classes,
            head_args=model.head_args,
            neck=model.neck,
            **backbone_arguments(model),
        )
        head: Any = predictor.head
        if not hasattr(head, "queries"):
            raise ValueError(
                f"task mask_classification trains heads with queries (mask2former, kmax), got model.head {model.head!r}"
            )
        self.queries, self.layers = int(head.queries), int(head.layers)
        defaults: Mapping[str, float]
        if isinstance(head, KMax):
            self.panoptic, defaults = (
                PanopticLosses(**checked_arguments(PanopticLosses, self.given_losses, "task.losses")),
                PANOPTIC_WEIGHTS,
            )
            if not head.semantic:
                defaults = {name: weight for name, weight in defaults.items() if name != "semantic"}
        else:
            defaults = POINT_WEIGHTS
            self.points = PointLosses(**checked_arguments(PointLosses, self.given_losses, "task.losses"))
        unknown = [name for name in self.given_weights if name not in defaults]
        if unknown:
            raise ValueError(f"task.weights: {model.head} has no term {unknown[0]!r}; it has {', '.join(defaults)}")
        self.weights = {**defaults, **self.given_weights}
        return predictor

    def sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Adds the seed of what the losses draw."""
        return {**sample, "seed": int(torch.randint(2**62, ()))}

    def augment(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds the masks of each image."""
        return {**batch, "masks": [self.masks(target) for target in batch[self.target]]}

    def masks(self, target: Tensor) -> Masks:
        """The masks of one target H W."""
        return Masks.of_classes(target, self.ignore_index)

    def classes(self, target: Tensor) -> Tensor:
        """The class ids of targets, `ignore_index` for void."""
        return target

    def losses(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Tensor]:
        output = outputs["main"]
        draw = seeded(batch["seed"].tolist(), batch[self.target].device)
        found = self.point_terms(output, batch["masks"], draw) if self.points else self.panoptic_terms(output, batch, draw)
        return {name: self.weights[name.removeprefix("aux_")] * loss for name, loss in found.items()}

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.points:
            counts = self.points.counts(self.queries, batch["masks"])
        else:
            counts = dict.fromkeys(self.weights, len(batch["masks"]))
        named = {name: torch.tensor(float(count), device=batch[self.target].device) for name, count in counts.items()}
        return named | {f"aux_{name}": count for name, count in named.items() if self.layers and name != "semantic"}

    def probabilities(self, output: Tensor, size: tuple[int, int], averaged: bool) -> Tensor:
        """B K H W: each class's part of what all queries say of a pixel."""
        shares = resized(output, size)
        return shares / shares.sum(1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)

    def point_terms(self, output: dict[str, Any], masks: Sequence[Masks], draw: Draw) -> dict[str, Tensor]:
        """Mask2Former's terms; every layer is matched anew."""
        assert self.points is not None
        targets = [padded(target, output["size"]) for target in masks]
        found = self.points(output, targets, named(draw, "last"))
        for layer, prediction in enumerate(output["aux"]):
            for name, loss in self.points(prediction, targets, named(draw, f"layer {layer}")).items():
                found[f"aux_{name}"] = found.get(f"aux_{name}", 0) + loss
        return found

    def panoptic_terms(self, output: dict[str, Any], batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        """kMaX-DeepLab's terms; the last prediction's matching serves every layer."""
        assert self.panoptic is not None
        height, width = output["size"]
        target = batch[self.target]
        target = F.pad(target, (0, width - target.shape[-1], 0, height - target.shape[-2]), value=self.void)
        rows, columns = (steps(n, k) for n, k in zip((height, width), output["mask_logits"].shape[-2:], strict=True))
        target = target[:, rows.to(target.device)][:, :, columns.to(target.device)]
        matched = self.panoptic.match(output, [self.masks(each) for each in target])
        found = self.panoptic(output, matched, named(draw, "last"))
        for layer, prediction in enumerate(output["aux"]):
            for name, loss in self.panoptic(prediction, matched, named(draw, f"layer {layer}")).items():
                found[f"aux_{name}"] = found.get(f"aux_{name}", 0) + loss
        if "semantic" in self.weights:
            labels = self.classes(target)
            semantic = torch.where(labels == self.ignore_index, self.num_classes, labels)
            found["semantic"] = self.panoptic.semantic(output["semantic"], semantic, self.num_classes, matched, draw)
        return found


def named(draw: Draw, place: str) -> Draw:
    """Numbers of their own for one prediction among several."""
    return lambda purpose, image, shape: draw(f"{place}: {purpose}", image, shape)


def padded(target: Masks, size: Sequence[int]) -> Masks:
    """The masks at the size of padded images, empty to the right and below."""
    height, width = target.masks.shape[-2:]
    return Masks(target.labels, F.pad(target.masks, (0, size[1] - width, 0, size[0] - height)))


def steps(length: int, count: int) -> Tensor:
    """`count` of `length` positions: every s-th from the first where that is possible, as published, else evenly spaced."""
    step = -(-length // count)
    if len(range(0, length, step)) == count:
        return torch.arange(0, length, step)
    return torch.arange(count) * length // count
