"""SLAB: simplified linear attention, and a norm that turns from LayerNorm into one that can be merged into its neighbours.

Paper:  Guo et al. 2024, "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
        Normalization", https://arxiv.org/abs/2405.11582
Source: github.com/xinghaochen/SLAB @ f58db00 (no licence file). Released weights load through weights/convert/slab.py.
Its networks are FLatten's Swin, PVT and CSwin with a plain ReLU in the linear attention and another norm; its DeiT forms are
not here. Differs from the source: the schedule of the norm goes on once a training forward of the whole model, also under
gradient checkpointing, where the authors' counts twice.

Shapes: B batch, H W map height and width, C channels.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbones.base import register_variants
from backbones.flatten import FlattenCSwin, FlattenPVT, FlattenSwin, is_linear
from weights.manifest import default_cfgs as _default_cfgs

default_cfgs = _default_cfgs("slab")


class RepBN(nn.Module):
    """BatchNorm over all tokens plus alpha times the input (paper, eq. 6)."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha, self.bn = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:  # ... C -> ... C
        return self.bn(x.flatten(0, -2)).view_as(x) + self.alpha * x

    def affine(self) -> tuple[Tensor, Tensor]:
        """(a, b) of the equal a * x + b in evaluation, float64."""
        bn = self.bn
        scale = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
        return scale + self.alpha.double(), bn.bias.double() - scale * bn.running_mean.double()

    def fused(self) -> nn.Module:
        """Two numbers a channel, for evaluation (backbones.fuse)."""
        return Affine(*self.affine(), like=self.bn.weight)


class PRepBN(nn.Module):
    """LayerNorm at the beginning of training, RepBN at its end and in evaluation, a mixture in between (paper, sec. 3.1).

    While `warm` calls are left, LayerNorm alone; then its share is iter / total_step, and iter falls by 1 a call. The counters
    are buffers, so that a resumed run goes on. A model calls `begin` once a step; used alone, the norm does so itself.
    """

    def __init__(self, dim: int, eps: float, steps: int, warm: int = 0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), RepBN(dim)
        for name, value in (("warm", warm), ("iter", steps), ("total_step", steps)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.int64))
        self.driven, self.warming, self.share = False, False, None

    @torch.no_grad()
    def begin(self) -> None:
        """Settle this step's mixture and count it."""
        self.warming = bool(self.warm > 0)
        if self.warming:
            self.warm -= 1
            return
        self.share = self.iter.to(self.norm1.weight.dtype) / self.total_step
        self.iter.sub_(1).clamp_(min=0)

    def forward(self, x: Tensor) -> Tensor:  # ... C -> ... C
        if not self.training:
            return self.norm2(x)
        if not self.driven:
            self.begin()
        if self.warming:
            return self.norm1(x)
        return self.share * self.norm1(x) + (1 - self.share) * self.norm2(x)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(a, b) of the equal a * x + b in evaluation, float64."""
        return self.norm2.affine()

    def fused(self) -> nn.Module:
        return self.norm2.fused()


class Affine(nn.Module):
    """scale * x + shift per channel."""

    def __init__(self, scale: Tensor, shift: Tensor, like: Tensor):
        super().__init__()
        self.scale, self.shift = (nn.Parameter(t.detach().to(like), requires_grad=False) for t in (scale, shift))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, self.scale, x)


class Norms:
    """What the three hosts share: which norm they have, and its schedule. Stands before the host among the bases."""

    norm_kind: str
    norm_steps: int
    norm_warm: int

    def new_norm(self, dim: int, eps: float) -> nn.Module:
        if self.norm_kind == "repbn":
            return RepBN(dim)
        return PRepBN(dim, eps, self.norm_steps, self.norm_warm)

    def set_schedule(self, norm: str, steps: int, warm: int) -> None:
        if norm not in ("prepbn", "repbn"):
            raise ValueError(f"norm must be 'prepbn' or 'repbn', got {norm!r}")
        if steps < 1 or warm < 0:
            raise ValueError(f"norm_steps must be at least 1 and norm_warm at least 0, got {steps} and {warm}")
        self.norm_kind, self.norm_steps, self.norm_warm = norm, steps, warm

    def drive(self) -> None:
        """Let the model count for its norms."""
        for module in self.scheduled():
            module.driven = True

    def scheduled(self) -> list[PRepBN]:
        return [module for module in self.modules() if isinstance(module, PRepBN)]

    def embed(self, x: Tensor) -> Tensor:
        if self.training:
            for module in self.scheduled():
                module.begin()
        return super().embed(x)

    @torch.jit.ignore
    def set_norm_schedule(self, steps: int, step: int = 0, warm: int = 0) -> None:
        """Length of the schedule in training steps, `warm` steps of LayerNorm alone before it, and how many steps are done."""
        self.set_schedule(self.norm_kind, steps, warm)
        for module in self.scheduled():
            module.total_step.fill_(steps)
            module.warm.fill_(max(warm - step, 0))
            module.iter.fill_(steps - min(max(step - warm, 0), steps))


class SlabSwin(Norms, FlattenSwin):
    """FLatten's Swin with simplified linear attention and PRepBN.

    norm: "prepbn", or "repbn" without a LayerNorm; norm_steps, norm_warm: schedule of the former, in training steps. Other
    arguments are FlattenSwin's. With dense (or feature_norms) it follows the authors' detection code: linear windows of 56, 28.
    """

    family = "slab"

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        norm: str = "prepbn",
        norm_steps: int = 60_000,
        norm_warm: int = 0,
        depths: Sequence[int] = (2, 2, 6, 2),
        **kwargs: Any,
    ):
        self.set_schedule(norm, norm_steps, norm_warm)
        super().__init__(img_size=img_size, depths=depths, focusing_factor=None, **kwargs)
        self.drive()

    def make_norm(self, dim: int) -> nn.Module:
        return self.new_norm(dim, 1e-5)

    def window_side(self, stage: int, block: int) -> int:
        if self.dense and is_linear(self.attn_type, self.count, stage, block):
            return self.window_size // 2**stage
        return super().window_side(stage, block)


class SlabPVT(Norms, FlattenPVT):
    """FLatten's PVT with simplified linear attention and PRepBN; arguments as FlattenPVT's and SlabSwin's."""

    family = "slab"
    keeps_unused_norm = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        norm: str = "prepbn",
        norm_steps: int = 300_000,
        norm_warm: int = 0,
        depths: Sequence[int] = (2, 2, 2, 2),
        **kwargs: Any,
    ):
        self.set_schedule(norm, norm_steps, norm_warm)
        super().__init__(img_size=img_size, depths=depths, focusing_factor=None, **kwargs)
        self.drive()

    def make_norm(self, dim: int, eps: float) -> nn.Module:
        return self.new_norm(dim, 1e-6)


class SlabCSwin(Norms, FlattenCSwin):
    """FLatten's CSwin with simplified linear attention and PRepBN; arguments as FlattenCSwin's and SlabSwin's."""

    family = "slab"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        norm: str = "prepbn",
        norm_steps: int = 120_000,
        norm_warm: int = 0,
        depths: Sequence[int] = (2, 4, 18, 1),
        **kwargs: Any,
    ):
        self.set_schedule(norm, norm_steps, norm_warm)
        super().__init__(img_size=img_size, depths=depths, focusing_factor=None, **kwargs)
        self.drive()

    def make_norm(self, dim: int) -> nn.Module:
        return self.new_norm(dim, 1e-5)


@torch.no_grad()
def merge(model: SlabSwin, authors: bool = False) -> SlabSwin:
    """A copy of a SlabSwin with its norms folded into its linear layers, for evaluation; outputs equal up to rounding.

    authors: repeat the mistake of the authors' merge, which forgets alpha times the bias of the patch embedding.

    Exact where no map is padded to whole windows or merged at an odd side, so use it at img_size; elsewhere use
    `backbones.fuse`, which leaves two numbers a channel. Raises ValueError for other models.
    """
    if not isinstance(model, SlabSwin):
        raise ValueError(f"merge folds the norms of SlabSwin, got {type(model).__name__}: use backbones.fuse")
    model = copy.deepcopy(model).eval()
    for stage in model.stages:
        if hasattr(stage.downsample, "reduction"):
            stage.downsample.norm = _into_next(stage.downsample.norm, stage.downsample.reduction)
        for block in stage.blocks:
            block.norm1 = _into_next(block.norm1, block.attn.qkv)
            block.norm2 = _into_next(block.norm2, block.mlp.fc1)
    conv, (a, b) = model.patch_embed.proj, model.patch_embed.norm.affine()
    alpha = getattr(model.patch_embed.norm, "norm2", model.patch_embed.norm).alpha.double()
    bias = (a - alpha if authors else a) * conv.bias.double() + b
    conv.weight.copy_(a[:, None, None, None] * conv.weight.double())
    conv.bias.copy_(bias)
    model.patch_embed.norm = nn.Identity()
    if isinstance(model.head.fc, nn.Linear):
        model.norm = _into_next(model.norm, model.head.fc)  # the mean over the tokens between them is linear
    return model


def _into_next(norm: nn.Module, layer: nn.Linear) -> nn.Module:
    """Fold a norm into the linear layer that follows it, in place; returns what takes the norm's place."""
    a, b = norm.affine()
    weight = layer.weight.double()
    shift = weight @ b
    bias = shift if layer.bias is None else layer.bias.double() + shift
    layer.weight.copy_(weight * a)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight))
    else:
        layer.bias.copy_(bias)
    return nn.Identity()


S_SWIN = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
SWIN_VARIANTS = {
    "slab_swin_t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "slab_swin_s": S_SWIN,
    "slab_swin_b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "slab_swin_t_prepbn": {"depths": (2, 2, 6, 2), "attn_type": "SSSS", "norm": "repbn"},
}
PVT_VARIANTS = {
    "slab_pvt_t": {"depths": (2, 2, 2, 2)},
    "slab_pvt_s": {"depths": (3, 4, 6, 3)},
    "slab_pvt_m": {"depths": (3, 4, 18, 3)},
    "slab_pvt_l": {"depths": (3, 8, 27, 3)},
    "slab_pvt_t_prepbn": {"depths": (2, 2, 2, 2), "attn_type": "SSSS"},
    "slab_pvt_s_prepbn": {"depths": (3, 4, 6, 3), "attn_type": "SSSS"},
    "slab_pvt_m_prepbn": {"depths": (3, 4, 18, 3), "attn_type": "SSSS"},
}
CSWIN_VARIANTS = {
    "slab_cswin_t": {"depths": (2, 4, 18, 1)},
    "slab_cswin_s": {"depths": (2, 4, 32, 2)},
}
register_variants(SlabSwin, SWIN_VARIANTS)
register_variants(SlabPVT, PVT_VARIANTS)
register_variants(SlabCSwin, CSWIN_VARIANTS)
