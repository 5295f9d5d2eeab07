"""PRepBN: a LayerNorm that becomes, over the training, a BatchNorm which inference can fold into its neighbours.

Paper:  Guo et al. 2024, "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
        Normalization", https://arxiv.org/abs/2405.11582, section 3.1
Source: github.com/xinghaochen/SLAB @ f58db00 (no licence file; read for the rule only, all code here is our own).
Differs from the source: the schedule goes on once an optimiser step where a training loop calls `begin_step`, however many
forwards a step has; the authors' goes on at every call of a norm.

Shapes: C channels, last.
"""

import warnings

import torch
from torch import Tensor, nn


class Affine(nn.Module):
    """scale * x + shift by channel: what is left of a norm that no linear layer takes in."""

    def __init__(self, scale: Tensor, shift: Tensor, like: Tensor):
        super().__init__()
        self.scale, self.shift = (nn.Parameter(t.detach().to(like), like.requires_grad) for t in (scale, shift))

    def forward(self, x: Tensor) -> Tensor:  # ... C -> ... C
        return torch.addcmul(self.shift, self.scale, x)


class RepBN(nn.Module):
    """BatchNorm over all tokens plus alpha times the input (paper, eq. 6)."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha, self.bn = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:  # ... C -> ... C
        return self.bn(x.flatten(0, -2)).view_as(x) + self.alpha * x

    def affine(self) -> tuple[Tensor, Tensor]:
        """(a, b), each C, of the equal a * x + b in evaluation, float64."""
        bn = self.bn
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError("this BatchNorm has no running statistics and cannot be folded")
        scale = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
        return scale + self.alpha.double(), bn.bias.double() - scale * bn.running_mean.double()

    def fused(self) -> nn.Module:
        """Two numbers a channel, for evaluation (backbones.fuse)."""
        return Affine(*self.affine(), like=self.bn.weight)


class PRepBN(nn.Module):
    """LayerNorm at the beginning of training, RepBN at its end and in evaluation, a mixture in between.

    While `warm` steps are left, LayerNorm alone; then its share is r0 * iter / total_step, and iter falls by 1 a step. These
    counters are buffers, so a resumed run goes on. A step is what `begin_step` begins, which our training loop calls once an
    optimiser step, and which another loop must go on calling once it has begun to. Without it, a step is a training forward: of
    the whole model where that counts for its norms (`driven`), else of the norm.

    Args:
        norm: the LayerNorm.
        steps: of the schedule; None: to the end of the run, whose length `begin_step` brings.
        warm: steps before it.
        r0: share of the LayerNorm at the start.
    """

    warm: Tensor
    iter: Tensor
    total_step: Tensor
    share: Tensor  # of the LayerNorm in this step

    def __init__(self, norm: nn.LayerNorm, steps: int | None, warm: int = 0, r0: float = 1.0):
        super().__init__()
        self.norm1, self.norm2 = norm, RepBN(norm.normalized_shape[0]).to(norm.weight)
        self.before, self.to_the_end, self.r0 = warm, steps is None, r0
        for name, value in (("warm", warm), ("iter", steps or 0), ("total_step", steps or 0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.int64, device=norm.weight.device))
        # A buffer that is filled in place: torch.fx would leave a proxy of any new value in the module.
        self.register_buffer("share", torch.ones((), device=norm.weight.device), persistent=False)
        self.driven = self.stepped = self.warming = False

    def begin_step(self, step: int, steps: int) -> None:
        """Settle the mixture of an optimiser step; forwards until the next one share it.

        Args:
            step: steps that the run has made.
            steps: of the whole run.
        """
        first, self.stepped, self.driven = not self.stepped, True, True
        if not self.training:  # a frozen norm
            return
        if self.to_the_end:
            self.set_schedule(max(steps - self.before, 1), step, self.before)
        if first and (left := int(self.warm + self.iter)) > steps - step:
            warnings.warn(
                f"PRepBN has {left} steps of its schedule left and the run {steps - step}: it ends with LayerNorms, which "
                "evaluation does not use; give a shorter schedule (steps, norm_steps), or null to reach the end of the run",
                stacklevel=2,
            )
        self.begin()

    def set_schedule(self, steps: int, step: int = 0, warm: int = 0) -> None:
        """A schedule of `steps` after `warm`, of which `step` are done."""
        self.total_step.fill_(steps)
        self.warm.fill_(max(warm - step, 0))
        self.iter.fill_(steps - min(max(step - warm, 0), steps))

    @torch.no_grad()
    def begin(self) -> None:
        """Settle a step's mixture and count it. ValueError where the schedule ends with a run that nobody has told of."""
        if self.to_the_end and not self.stepped:
            raise ValueError("PRepBN without a number of steps needs the run's: give one, or call begin_step once a step")
        self.warming = bool(self.warm > 0)
        if self.warming:
            self.warm -= 1
            return
        self.share.copy_(self.r0 * self.iter / self.total_step)
        self.iter.sub_(1).clamp_(min=0)

    def forward(self, x: Tensor) -> Tensor:  # ... C -> ... C
        if not self.training:
            return self.norm2(x)
        if not self.driven:
            self.begin()
        if self.warming:
            return self.norm1(x)
        after = self.norm2(x)
        return after + self.share * (self.norm1(x) - after)  # 1 - share would be a constant of its own on a traced model

    def affine(self) -> tuple[Tensor, Tensor]:
        """(a, b), each C, of the equal a * x + b in evaluation, float64."""
        return self.norm2.affine()

    def fused(self) -> nn.Module:
        """Two numbers a channel, for evaluation (backbones.fuse)."""
        return self.norm2.fused()
