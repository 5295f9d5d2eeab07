"""A surface normal per pixel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from train.normals import NORMAL_LOSSES, NormalMetric, valid_normals
from train.show import NormalMaps
from train.tasks.dense import DenseTask, Losses, resized

if TYPE_CHECKING:
    from train.data import ImageDataset


class Normals(DenseTask):
    """Surface normals: three values per pixel, made a unit vector (x right, y down, z into the image).

    Windows, scales and flips at evaluation average unit vectors.

    Args:
        losses: names of NORMAL_LOSSES, each with a factor: {l2: {}, angular: {factor: 0.5}}; means over pixels, which do not
            depend on how the total batch is cut.
        aux_weight: of the auxiliary head's loss.
    """

    target = "normal"
    best = ("mean_angle", "min")
    average = "vectors"
    out_channels = 3

    def __init__(self, losses: dict[str, Any] | None = None, aux_weight: float = 0.4):
        self.aux_weight = aux_weight
        self.show = NormalMaps()
        self.terms = Losses(losses or {"l2": {}}, NORMAL_LOSSES, {}, {None: valid_normals})

    def check(self, dataset: ImageDataset) -> None:
        if "normal" not in dataset.provides:
            raise ValueError(f"{type(dataset).__name__} has no surface normals; it provides {', '.join(dataset.provides)}")

    def head_losses(self, output: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.terms(output.float(), batch["normal"])

    def head_counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.terms.counts(batch["normal"])

    def predict(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """B 3 H W unit normals."""
        return F.normalize(resized(output, size), dim=1)

    def metric(self) -> NormalMetric:
        return NormalMetric()
