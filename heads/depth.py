"""What the channels of a depth head mean: raw output -> metres, or inverse relative depth."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RULES = ("relu", "sigmoid", "softplus", "invert", "bins", "log_bins")


@dataclass(frozen=True)
class DepthRule:
    """Head output B K H W -> B 1 H W. Calling it applies the rule; `channels` is the K it needs.

    name:
        "relu"      relu(x) + min_depth. Inverse relative depth with min_depth 0 (DPT, MiDaS, Depth-Anything); metres in
                    AnyDepth (min_depth 0.001).
        "sigmoid"   max_depth * sigmoid(x), metres (GLPN, Depth-Anything metric).
        "softplus"  min_depth + softplus(x), metres: positive with a gradient everywhere, so a new head never dies.
        "invert"    1 / max(scale * relu(x) + shift, 1e-8), metres from inverse relative depth (DPT on NYU and KITTI).
        "bins"      expectation over `bins` depths evenly spaced in [min_depth, max_depth]; probabilities are relu(x) + 0.1,
                    normalised (AdaBins' linear norm, used by DINOv2's dense heads).
        "log_bins"  the same with bins evenly spaced in log depth.
    min_depth, max_depth: metres; scale, shift: of "invert"; signed: leave out the ReLU of "relu" and "invert".

    Raises ValueError for an unknown name or an empty range.
    """

    name: str = "relu"
    min_depth: float = 0.0
    max_depth: float = 10.0
    scale: float = 1.0
    shift: float = 0.0
    bins: int = 256
    signed: bool = False

    def __post_init__(self):
        if self.name not in RULES:
            raise ValueError(f"depth rule {self.name!r} is unknown; use one of {', '.join(RULES)}")
        if not 0 <= self.min_depth < self.max_depth:
            raise ValueError(f"need 0 <= min_depth < max_depth, got {self.min_depth} and {self.max_depth} m")
        if self.name == "log_bins" and self.min_depth == 0:
            raise ValueError("log_bins needs min_depth above 0: the logarithm of 0 is no bin")

    @property
    def channels(self) -> int:
        """How many output channels the head must have."""
        return self.bins if self.name in ("bins", "log_bins") else 1

    def __call__(self, output: Tensor) -> Tensor:  # B K H W -> B 1 H W
        if output.shape[1] != self.channels:
            raise ValueError(f"depth rule {self.name!r} reads {self.channels} channels, the head gives {output.shape[1]}")
        if self.name == "relu":
            return (output if self.signed else F.relu(output)) + self.min_depth
        if self.name == "sigmoid":
            return self.max_depth * output.sigmoid()
        if self.name == "softplus":
            return self.min_depth + F.softplus(output)
        if self.name == "invert":
            inverse = self.scale * (output if self.signed else F.relu(output)) + self.shift
            return 1 / inverse.clamp(min=1e-8)
        weights = F.relu(output) + 0.1
        return (weights * self.centres(output)).sum(1, keepdim=True) / weights.sum(1, keepdim=True)

    def centres(self, like: Tensor) -> Tensor:
        """The bins' depths in metres, bins 1 1."""
        if self.name == "bins":
            depths = torch.linspace(self.min_depth, self.max_depth, self.bins, device=like.device, dtype=like.dtype)
        else:
            depths = torch.logspace(0, 1, self.bins, self.max_depth / self.min_depth, device=like.device, dtype=like.dtype)
            depths = depths * self.min_depth
        return depths[:, None, None]
