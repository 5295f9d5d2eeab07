"""What the numbers of a depth map mean, said once and carried from the files to the loss, the metric and the picture."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DepthSpec:
    """The unit and range of a depth map.

    Targets inside a sample are always metres with 0 for a missing reading, whatever the file holds. The last two fields
    describe what a model trained on them predicts.

    unit: of the targets after reading; "m" is the only one the metrics accept.
    divisor: file units per metre: 1000 for millimetre PNGs, 256 for KITTI, 1 for float metres.
    min_depth, max_depth: valid range in metres; readings outside (the bounds excluded) count as missing in loss and metric.
    metric: the prediction has a true scale; False: it is known up to scale (and shift), so a metric must align it first.
    inverse: the model predicts 1 / depth (disparity), not depth.

    Raises ValueError for an unknown unit, a divisor that is not positive, or an empty range.
    """

    unit: str = "m"
    divisor: float = 1.0
    min_depth: float = 1e-3
    max_depth: float = 10.0
    metric: bool = True
    inverse: bool = False

    def __post_init__(self):
        if self.unit != "m":
            raise ValueError(f"depth unit must be 'm' (readers convert with `divisor`), got {self.unit!r}")
        if not self.divisor > 0:
            raise ValueError(f"depth divisor (file units per metre) must be positive, got {self.divisor}")
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(f"need 0 < min_depth < max_depth, got {self.min_depth} and {self.max_depth} m")

    def valid(self, depth: Tensor) -> Tensor:
        """Boolean mask of the readings strictly inside the range; NaN and missing readings are outside."""
        return (depth > self.min_depth) & (depth < self.max_depth)

    def target(self, depth: Tensor) -> Tensor:
        """Metres -> the quantity the model predicts (1 / m if `inverse`); readings outside the range become 0, missing."""
        valid = self.valid(depth)
        if not self.inverse:
            return torch.where(valid, depth, 0)
        return torch.where(valid, 1 / torch.where(valid, depth, 1), 0)

    def prediction(self, output: Tensor) -> Tensor:
        """Model output -> prediction for `DepthMetric` and the pictures: metres if `metric`, else the output unchanged."""
        if not (self.metric and self.inverse):
            return output
        return 1 / output.clamp(1 / self.max_depth, 1 / self.min_depth)

    def __str__(self) -> str:
        kind = ("" if self.metric else "relative ") + ("inverse depth" if self.inverse else "depth")
        return f"{kind} {self.min_depth:g}-{self.max_depth:g} {self.unit}"
