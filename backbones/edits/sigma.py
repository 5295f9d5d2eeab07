"""sigmaReparam: every linear layer's weight divided by its spectral norm and given one learned factor.

Paper:  Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
        https://arxiv.org/abs/2303.06296
Source: github.com/apple/ml-sigma-reparam @ fea4e35 (read for the rule only; all code here is our own).
Differs from the source: a form that keeps trained weights (gamma = sigma at the start), the names of timm's layers, float32 for
the spectral norm under autocast.

The stored singular vector moves one step of the power iteration at every forward in training; where a training loop calls
`begin_step`, as ours does, once an optimiser step, so that micro-batches and recomputed activations see the same weights. In
evaluation a step is taken and not stored, so outputs do not depend on calls.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from backbones.vit import Part

KINDS = (nn.Linear, nn.Conv2d)


class SpectralScale(nn.Module):
    """weight -> gamma * weight / sigma(weight), as a parametrization of a layer's weight, out first.

    Args:
        weight: at the start; `u` and gamma are its largest right singular vector and value.
        stats_only: follow sigma without changing the weight.
    """

    def __init__(self, weight: Tensor, stats_only: bool = False):
        super().__init__()
        self.u: Tensor
        self.before: Tensor  # u at the start of the step
        matrix = weight.detach().flatten(1).double()
        u = torch.linalg.svd(matrix.cpu(), full_matrices=False)[2][0] if not matrix.is_meta else matrix[0]
        self.register_buffer("u", u.to(weight))
        self.register_buffer("before", self.u.clone(), persistent=False)
        self.stepped = self.due = False
        self.gamma = nn.Parameter(weight.new_ones(1))
        self.stats_only = stats_only
        if not stats_only:
            with torch.no_grad():
                self.gamma.copy_(self.sigma(weight.detach(), self.u)[0])

    def begin_step(self, step: int, steps: int) -> None:
        """The next forward in training moves u, the others until the next call do not."""
        self.stepped = self.due = True

    def sigma(self, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """(spectral norm after one step from u, 1, with its gradient; the next u)."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
            with torch.no_grad():
                v = F.normalize(matrix @ u.to(matrix.dtype), dim=0)
                moved = F.normalize(matrix.mT @ v, dim=0)
            return (v @ (matrix @ moved))[None], moved

    def forward(self, weight: Tensor) -> Tensor:
        within = self.training and self.stepped
        if within and self.due:
            self.before.copy_(self.u)
        sigma, u = self.sigma(weight, self.before if within else self.u)
        if self.training and (self.due or not self.stepped):
            self.u.copy_(u)
            self.due = False
        return weight if self.stats_only else weight * (self.gamma / sigma).to(weight.dtype).view(*[1] * weight.ndim)


def sigma_reparam(
    model: nn.Module,
    init: Literal["keep", "authors"] = "keep",
    remove_norms: bool = False,
    conv_init_gain: float = 1.0,
    stats_only: bool = False,
) -> nn.Module:
    """Reparametrise every Linear and Conv2d of a model, in place, the head included; returns the model.

    Args:
        model: any model; grouped convolutions are refused.
        init: "keep" leaves the function as it is up to rounding; "authors" draws weights anew, normal of std 0.02, and biases
            as torch does, for training from scratch.
        remove_norms: every LayerNorm becomes the identity, the paper's recipe for ViTs; with init "authors" only.
        conv_init_gain: of convolutions under init "authors"; 0.125 for ViT-L and larger.
        stats_only: weights stay as they are, and only their spectral norms are followed.
    """
    if init not in ("keep", "authors"):
        raise ValueError(f"init must be 'keep' or 'authors', got {init!r}")
    if init == "keep" and (remove_norms or conv_init_gain != 1.0):
        raise ValueError("remove_norms and conv_init_gain change the function: they need init='authors'")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, KINDS)]
    for name, layer in layers:
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise ValueError(f"{name} is a convolution with {layer.groups} groups, for which the rule is not defined")
        if parametrize.is_parametrized(layer):
            raise ValueError(f"{name} is parametrised already")
    for _, layer in layers:
        if init == "authors":
            draw(layer, 0.02 * (conv_init_gain if isinstance(layer, nn.Conv2d) else 1.0))
        scale = SpectralScale(layer.weight, stats_only).train(layer.training)
        parametrize.register_parametrization(layer, "weight", scale, unsafe=True)  # unsafe: do not run it now
    if remove_norms:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.LayerNorm):
                    setattr(module, name, nn.Identity())
    return model


@torch.no_grad()
def draw(layer: nn.Linear | nn.Conv2d, std: float) -> None:
    """The authors' initial weights: normal, and torch's uniform biases."""
    nn.init.trunc_normal_(layer.weight, std=std, a=-2.0, b=2.0)  # cut at two, that is never
    if layer.bias is not None:
        bound = layer.weight.flatten(1).shape[1] ** -0.5
        nn.init.uniform_(layer.bias, -bound, bound)


@torch.no_grad()
def merge_sigma(model: nn.Module) -> nn.Module:
    """Plain weights again, in place, with the names of the plain model and the function of its evaluation mode."""
    found = False
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module, "weight"):
            continue
        layer: Part = module
        scale = layer.parametrizations["weight"][0]
        if isinstance(scale, SpectralScale):
            mode, found = scale.training, True
            scale.eval()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            scale.train(mode)
    if not found:
        raise ValueError("this model has no reparametrised layer to merge")
    return model
