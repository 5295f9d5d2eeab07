"""Batch norm over the images of all processes, on any device.

torch's SyncBatchNorm leaves CPU tensors unsynchronised without saying so; this one is written with differentiable all-reduce
and gives one process's numbers on any backend.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Total(torch.autograd.Function):
    """Sum over processes, whose gradient is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Total.apply(gradient.contiguous())


class SyncBatchNorm(_BatchNorm):
    """What `synchronise` turns a batch norm into. Also stands for timm's BatchNormAct2d, whose `drop` and `act` it keeps."""

    def forward(self, x: Tensor) -> Tensor:  # B C ... -> B C ...
        x = self.normalised(x)
        return cast(Any, self).act(cast(Any, self).drop(x)) if hasattr(self, "act") else x

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"batch norm needs B C ..., got {tuple(x.shape)}")

    def normalised(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        if not self.training and self.track_running_stats:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        wide = x.float()
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        if count == 1:  # one value per channel has no variance
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        mean = _Total.apply(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = _Total.apply((centred * centred).sum(axes)) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)


def synchronise(model: nn.Module) -> int:
    """Turns every batch norm of a model into a SyncBatchNorm, in place, weights and names kept; returns how many."""
    found = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for module in found:
        module.__class__ = SyncBatchNorm
    return len(found)
