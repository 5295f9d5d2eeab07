"""SLAB: simplified linear attention, and a norm that turns from LayerNorm into one that can be merged into its neighbours.

Paper:  Guo et al. 2024, "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
        Normalization", https://arxiv.org/abs/2405.11582
Source: github.com/xinghaochen/SLAB @ f58db00 (no licence file). Released weights load through weights/convert/slab.py.
Its networks are FLatten's Swin, PVT and CSwin with a plain ReLU in the linear attention and another norm, and DeiT.
The norm is backbones/prepbn.py's.
Differs from the source: its schedule goes on once an optimiser step; in a loop that does not call `begin_step`, once a training
forward of the whole model, also under gradient checkpointing, where the authors' counts twice.

Shapes: B batch, H W map height and width, C channels.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from backbones.arguments import BUILT_IN, NO_SCORE_DROPOUT
from backbones.base import (
    Stage,
    StagedBackbone,
    State,
    TokenStage,
    as_state,
    check_img_size,
    check_size,
    init_linear,
    register_variants,
)
from backbones.flatten import Block, FlattenCSwin, FlattenPVT, FlattenSwin, LinearAttention, is_linear
from backbones.layers import PatchMerging, drop_path_rates, pad_to_multiple
from backbones.prepbn import PRepBN, RepBN
from backbones.tracing import leaf
from weights.manifest import default_cfgs as _default_cfgs
from weights.resample import resample_position_embedding

default_cfgs = _default_cfgs("slab")


class Norms(StagedBackbone):
    """What the three hosts share: which norm they have, and its schedule. Stands before the host among the bases."""

    norm_kind: str
    norm_steps: int | None
    norm_warm: int

    def new_norm(self, dim: int, eps: float) -> nn.Module:
        if self.norm_kind == "repbn":
            return RepBN(dim)
        return PRepBN(nn.LayerNorm(dim, eps=eps), self.norm_steps, self.norm_warm)

    def set_schedule(self, norm: str, steps: int | None, warm: int) -> None:
        if norm not in ("prepbn", "repbn"):
            raise ValueError(f"norm must be 'prepbn' or 'repbn', got {norm!r}")
        if (steps is not None and steps < 1) or warm < 0:
            raise ValueError(f"norm_steps must be at least 1 and norm_warm at least 0, got {steps} and {warm}")
        self.norm_kind, self.norm_steps, self.norm_warm = norm, steps, warm

    def drive(self) -> None:
        """Let the model count for its norms."""
        for module in self.scheduled():
            module.driven = True

    def scheduled(self) -> list[PRepBN]:
        return [module for module in self.modules() if isinstance(module, PRepBN)]

    def embed(self, x: Tensor) -> Tensor | State:
        if self.training:
            for module in self.scheduled():
                if not module.stepped:
                    module.begin()
        return super().embed(x)

    @torch.jit.ignore
    def set_norm_schedule(self, steps: int, step: int = 0, warm: int = 0) -> None:
        """Length of the schedule in training steps, `warm` steps of LayerNorm alone before it, and how many steps are done."""
        self.set_schedule(self.norm_kind, steps, warm)
        for module in self.scheduled():
            module.to_the_end = False
            module.set_schedule(steps, step, warm)


class SlabSwin(Norms, FlattenSwin):
    """FLatten's Swin with simplified linear attention and PRepBN.

    Args:
        img_size: as FlattenSwin's.
        norm: "prepbn", or "repbn" without a LayerNorm.
        norm_steps: schedule of "prepbn" in training steps; None for to the end of the run.
        norm_warm: steps of LayerNorm alone before it.
        depths: blocks of each stage.
        kwargs: further arguments of FlattenSwin; with dense (or feature_norms) it follows the authors' detection code: linear
            windows of 56, 28.
    """

    family = "slab"

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        norm: str = "prepbn",
        norm_steps: int | None = 60_000,
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
    """FLatten's PVT with simplified linear attention and PRepBN; arguments as FlattenPVT's and SlabSwin's.

    Args:
        img_size: as FlattenPVT's.
        norm: as SlabSwin's.
        norm_steps: as SlabSwin's.
        norm_warm: as SlabSwin's.
        depths: blocks of each stage.
        kwargs: further arguments of FlattenPVT.
    """

    family = "slab"
    keeps_unused_norm = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        norm: str = "prepbn",
        norm_steps: int | None = 300_000,
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
    """FLatten's CSwin with simplified linear attention and PRepBN; arguments as FlattenCSwin's and SlabSwin's.

    Args:
        img_size: as FlattenCSwin's.
        norm: as SlabSwin's.
        norm_steps: as SlabSwin's.
        norm_warm: as SlabSwin's.
        depths: blocks of each stage.
        kwargs: further arguments of FlattenCSwin.
    """

    family = "slab"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        norm: str = "prepbn",
        norm_steps: int | None = 120_000,
        norm_warm: int = 0,
        depths: Sequence[int] = (2, 4, 18, 1),
        **kwargs: Any,
    ):
        self.set_schedule(norm, norm_steps, norm_warm)
        super().__init__(img_size=img_size, depths=depths, focusing_factor=None, **kwargs)
        self.drive()

    def make_norm(self, dim: int) -> nn.Module:
        return self.new_norm(dim, 1e-5)


class MapLinearAttention(LinearAttention):
    """Simplified linear attention over a whole map.

    Args:
        dim: channels.
        num_heads: of the attention.
        keys: (rows, columns) for which the encoding is made.
        qkv_bias: whether q, k and v have a bias.
    """

    def __init__(self, dim: int, num_heads: int, keys: tuple[int, int], qkv_bias: bool):
        super().__init__(dim, num_heads, keys, focusing=None)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, -1)
        return self.proj(self.mix(q, k, v, x, x)).view_as(x)


class PassingStage(TokenStage):
    """A stage to which the class token comes from the stage before."""

    def start(self, x: Tensor, tokens: Tensor | None) -> State:
        return x, tokens


@leaf
def positions(embedding: Tensor, like: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """The position embedding 1 prefix+n C of a grid as a map 1 H W C of the size of `like`, B H W C, resized (bicubic).

    Args:
        embedding: of prefix tokens and patches, 1 N C.
        like: a map of the size that is wanted.
        grid: (rows, columns) for which it is made.
        prefix: entries before the patches'.
    """
    resized = resample_position_embedding(embedding, tuple(like.shape[1:3]), prefix, old_grid=grid)
    return resized[:, prefix:].unflatten(1, like.shape[1:3])


class SlabDeiT(Norms, StagedBackbone):
    """DeiT with PRepBN, in four runs of blocks, after each of which a map of stride `patch_size` is returned.

    Args:
        img_size: side, or (height, width), for which positions and encodings are made; other sizes run too.
        linear: simplified linear attention, no class token, the mean of the tokens is classified; else DeiT's softmax attention
            and class token.
        patch_size, embed_dim, num_heads, mlp_ratio, qkv_bias: of the transformer.
        depths: blocks of the four runs.
        norm, norm_steps, norm_warm: as SlabSwin's.
        in_chans, num_classes, global_pool, drop_rate: as timm's.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
    """

    family = "slab"
    host = "deit"
    nhwc = True
    min_size = 1
    authors_others = {
        "depth": "is `depths` here, the blocks up to each returned map: (3, 3, 3, 3) makes 12",
        "attn_drop_rate": NO_SCORE_DROPOUT,
        "qk_scale": BUILT_IN,
        "norm_layer": "is `norm` here, 'prepbn' or 'repbn'",
    }

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        linear: bool = True,
        patch_size: int = 16,
        embed_dim: int = 192,
        depths: Sequence[int] = (3, 3, 3, 3),
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm: str = "prepbn",
        norm_steps: int | None = 60_000,
        norm_warm: int = 0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        self.set_schedule(norm, norm_steps, norm_warm)
        super().__init__()
        self.patch_size, self.prefix = patch_size, 0 if linear else 1
        self.img_size = check_img_size(img_size, self.min_size)
        rates = drop_path_rates(drop_path_rate, depths)

        def block(rate: float) -> nn.Module:
            attn: nn.Module = (
                MapLinearAttention(embed_dim, num_heads, self.grid(), qkv_bias)
                if linear
                else Attention(embed_dim, num_heads, qkv_bias=qkv_bias)
            )
            norm1, norm2 = self.new_norm(embed_dim, 1e-6), self.new_norm(embed_dim, 1e-6)
            return Block(norm1, attn, norm2, Mlp(embed_dim, int(embed_dim * mlp_ratio)), rate)

        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        count = self.prefix + self.grid()[0] * self.grid()[1]
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, embed_dim), std=0.02))
        if linear:  # the authors' files hold one, which their sequence lacks; kept to be written back
            self.register_buffer("unused_cls_token", torch.zeros(1, 1, embed_dim))
        else:
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.stages = nn.ModuleList()
        for run in rates:
            blocks = [block(rate) for rate in run]
            self.stages.append(Stage(nn.Identity(), blocks) if linear else PassingStage(nn.Identity(), blocks, nhwc=True))
        self.norm = self.new_norm(embed_dim, 1e-6)
        runs = len(depths)
        tokens = [self.prefix] * runs
        self.finish([embed_dim] * runs, [patch_size] * runs, num_classes, global_pool, drop_rate, tokens=tokens)
        self.apply(init_linear)
        self.drive()

    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of an image of img_size."""
        return -(-self.img_size[0] // self.patch_size), -(-self.img_size[1] // self.patch_size)

    def embed(self, x: Tensor) -> Tensor | State:
        x, _ = as_state(super().embed(pad_to_multiple(check_size(x, self.min_size), self.patch_size)))
        x = x.permute(0, 2, 3, 1)
        x = x + positions(self.pos_embed, x, self.grid(), self.prefix)
        if not self.prefix:
            return x
        return x, (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)

    def final_norm(self, x: Tensor, tokens: Tensor | None) -> State:
        """Over map and class token together: its statistics are of all tokens."""
        if tokens is None:
            return self.norm(x), None
        normed = self.norm(torch.cat([tokens, x.flatten(1, 2)], 1))
        return normed[:, 1:].view_as(x), normed[:, :1]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize positions and encodings for images of this size, in place."""
        old, self.img_size = self.grid(), check_img_size(img_size, self.min_size)
        resized = resample_position_embedding(self.pos_embed.detach(), self.grid(), self.prefix, old_grid=old)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        for module in self.modules():
            if isinstance(module, MapLinearAttention):
                module.set_keys(self.grid())

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return super().group_matcher(coarse) | {"stem": r"^(?:patch_embed|pos_embed|cls_token)"}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"} | ({"cls_token"} if self.prefix else set())


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
        assert isinstance(stage, Stage)
        if isinstance(stage.downsample, PatchMerging):
            stage.downsample.norm = _into_next(stage.downsample.norm, stage.downsample.reduction)
        block: Any
        for block in stage.blocks:
            block.norm1 = _into_next(block.norm1, block.attn.qkv)
            block.norm2 = _into_next(block.norm2, block.mlp.fc1)
    embed: Any = model.patch_embed
    conv, (a, b) = embed.proj, embed.norm.affine()
    alpha = getattr(embed.norm, "norm2", embed.norm).alpha.double()
    bias = (a - alpha if authors else a) * conv.bias.double() + b
    conv.weight.copy_(a[:, None, None, None] * conv.weight.double())
    conv.bias.copy_(bias)
    embed.norm = nn.Identity()
    if isinstance(model.head.fc, nn.Linear):
        model.norm = _into_next(model.norm, model.head.fc)  # the mean over the tokens between them is linear
    return model


def _into_next(norm: nn.Module, layer: nn.Linear) -> nn.Module:
    """Fold a norm into the linear layer that follows it, in place; returns what takes the norm's place."""
    assert isinstance(norm, (RepBN, PRepBN))
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
SWIN_VARIANTS: dict[str, dict[str, Any]] = {
    "slab_swin_t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "slab_swin_s": S_SWIN,
    "slab_swin_b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "slab_swin_t_prepbn": {"depths": (2, 2, 6, 2), "attn_type": "SSSS", "norm": "repbn"},
}
PVT_VARIANTS: dict[str, dict[str, Any]] = {
    "slab_pvt_t": {"depths": (2, 2, 2, 2)},
    "slab_pvt_s": {"depths": (3, 4, 6, 3)},
    "slab_pvt_m": {"depths": (3, 4, 18, 3)},
    "slab_pvt_l": {"depths": (3, 8, 27, 3)},
    "slab_pvt_t_prepbn": {"depths": (2, 2, 2, 2), "attn_type": "SSSS"},
    "slab_pvt_s_prepbn": {"depths": (3, 4, 6, 3), "attn_type": "SSSS"},
    "slab_pvt_m_prepbn": {"depths": (3, 4, 18, 3), "attn_type": "SSSS"},
}
CSWIN_VARIANTS: dict[str, dict[str, Any]] = {
    "slab_cswin_t": {"depths": (2, 4, 18, 1)},
    "slab_cswin_s": {"depths": (2, 4, 32, 2)},
}
DEIT_VARIANTS: dict[str, dict[str, Any]] = {
    "slab_deit_t": {"embed_dim": 192, "num_heads": 3},
    "slab_deit_s": {"embed_dim": 384, "num_heads": 6},
    "slab_deit_t_prepbn": {"embed_dim": 192, "num_heads": 3, "linear": False, "norm": "repbn"},
    "slab_deit_s_prepbn": {"embed_dim": 384, "num_heads": 6, "linear": False, "norm_steps": 300_000},
}
register_variants(SlabDeiT, DEIT_VARIANTS)
register_variants(SlabSwin, SWIN_VARIANTS)
register_variants(SlabPVT, PVT_VARIANTS)
register_variants(SlabCSwin, CSWIN_VARIANTS)
