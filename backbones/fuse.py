"""Folding for inference: BatchNorm into the convolution before it, and what a module offers by its own `fused`.

A module that knows a cheaper equal of itself in evaluation defines `fused(self) -> nn.Module`. It works on a copy, so it may
change and return itself; what it returns takes its place and is not searched further.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Conv2d | nn.Linear)


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference, in evaluation mode, with equal outputs up to rounding; the model itself is not changed.

    Folded: modules with a `fused` method, and in every nn.Sequential a BatchNorm that follows a convolution or linear layer. A
    BatchNorm without running statistics stays. Parameter names differ from the model's: load weights first, then fuse.
    """
    return _fused(copy.deepcopy(model).eval())


def fold_batch_norm(layer: Layer, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Layer:
    """`layer` with the BatchNorm that follows it folded in, changed in place: norm(layer(x)) in evaluation, one pass less."""
    bias = torch.zeros(norm.num_features, device=layer.weight.device) if layer.bias is None else layer.bias
    weight, bias = folded(layer.weight, bias, norm)
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    return layer


@torch.no_grad()
def folded(weight: Tensor, bias: Tensor, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a layer with a BatchNorm folded in; output channels are the weight's first axis.

    In float64, so that the only rounding is the one back to the weight's type. Raises ValueError if the BatchNorm has no
    running statistics: what it does then depends on the batch.
    """
    if norm.running_var is None or norm.running_mean is None:
        raise ValueError("this BatchNorm has no running statistics (track_running_stats=False) and cannot be folded")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        shift = shift + norm.bias.double()
    new_weight = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return new_weight.to(weight.dtype), (bias.double() * scale + shift).to(weight.dtype)


def _fused(module: nn.Module) -> nn.Module:
    """`module` with everything in it replaced that can be."""
    fused = getattr(module, "fused", None)
    if fused is not None:
        return fused()
    for name, child in module.named_children():
        setattr(module, name, _fused(child))
    return _fold_sequence(module) if type(module) is nn.Sequential else module


def _fold_sequence(sequence: nn.Sequential) -> nn.Sequential:
    """BatchNorms become Identity, so that the indices of what follows stay."""
    for i in range(1, len(sequence)):
        layer, norm = sequence[i - 1], sequence[i]
        pairs = ((nn.Conv2d, nn.BatchNorm2d), (nn.Linear, nn.BatchNorm1d))
        # exact types: a transposed convolution has its output channels elsewhere, timm's BatchNorms add an activation
        if (type(layer), type(norm)) in pairs and norm.running_var is not None:
            assert isinstance(layer, (nn.Conv2d, nn.Linear)) and isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
            sequence[i - 1], sequence[i] = fold_batch_norm(layer, norm), nn.Identity()
    return sequence
