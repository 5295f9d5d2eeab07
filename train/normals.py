"""Surface normals: losses, and how far off a prediction is.

Shapes: B images; normals B 3 H W, unit vectors (x right, y down, z into the image), 0 where there is none.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.metrics import Metric

BINS = 18000  # of the angles 0..180 degrees, for the median
LIMITS = {"within_11": 11.25, "within_22": 22.5, "within_30": 30.0}  # degrees


def has_normal(target: Tensor) -> Tensor:
    """Where a map B 3 H W has a normal: B H W."""
    return (target != 0).any(1)


def valid_normals(target: Tensor) -> Tensor:
    """How many pixels of B 3 H W have a normal: 0-d float."""
    return has_normal(target).sum().float()


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of the prediction, made a unit vector, from the normal; 0 if none is valid."""
    valid = has_normal(target)
    distance = (F.normalize(prediction, dim=1) - target).square().sum(1)
    return torch.where(valid, distance, 0).sum() / valid.sum().clamp_min(1)


def angular(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean angle in radians between the prediction and the normal; 0 if none is valid."""
    valid = has_normal(target)
    cosine = F.cosine_similarity(prediction, target, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)  # at +-1 the gradient is infinite
    return torch.where(valid, cosine.acos(), 0).sum() / valid.sum().clamp_min(1)


NORMAL_LOSSES: dict[str, Callable[..., Tensor]] = {"l2": l2, "angular": angular}


class NormalMetric(Metric):
    """Mean and median angle in degrees, and the shares below 11.25, 22.5 and 30 (Fouhey et al. 2013), all pixels pooled."""

    def __init__(self) -> None:
        super().__init__(
            count=torch.zeros((), dtype=torch.int64),
            total=torch.zeros((), dtype=torch.float64),
            below=torch.zeros(len(LIMITS), dtype=torch.int64),
            histogram=torch.zeros(BINS, dtype=torch.int64),
        )
        self.protocol = "angles of surface normals in degrees, all valid pixels pooled, median to 0.01 degrees"

    def update(self, prediction: Tensor, batch: dict[str, Any]) -> None:
        """prediction and batch["normal"]: B 3 H W of one size. ValueError if they differ in size."""
        target = torch.as_tensor(batch["normal"]).to(prediction.device)
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and normals {tuple(target.shape)} differ in size")
        valid = has_normal(target)
        own, true = (F.normalize(x.double(), dim=1).movedim(1, -1)[valid] for x in (prediction, target))
        # the angle between unit vectors that stays exact near 0, where the cosine does not
        degrees = torch.rad2deg(2 * torch.atan2((own - true).norm(dim=1), (own + true).norm(dim=1)))
        self.add("count", torch.tensor(len(degrees)))
        self.add("total", degrees.sum())
        self.add("below", torch.stack([(degrees < limit).sum() for limit in LIMITS.values()]))
        self.add("histogram", torch.bincount((degrees * (BINS / 180)).long().clamp_max(BINS - 1), minlength=BINS))

    def compute(self) -> dict[str, float]:
        """mean_angle and median_angle in degrees, within_11, within_22 and within_30 in 0..1."""
        count = self.sums["count"]
        if not count:
            return dict.fromkeys(["mean_angle", "median_angle", *LIMITS], float("nan"))
        middle = torch.searchsorted(self.sums["histogram"].cumsum(0).double(), count.double() / 2)
        shares = self.sums["below"].double() / count
        return {
            "mean_angle": float(self.sums["total"] / count),
            "median_angle": (float(middle) + 0.5) * 180 / BINS,
            **{name: float(share) for name, share in zip(LIMITS, shares, strict=True)},
        }
