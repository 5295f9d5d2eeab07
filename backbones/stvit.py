"""STViT: attention among super tokens, which are sampled from the map and scattered back to it.

Paper:  Huang et al. 2023, "Vision Transformer with Super Token Sampling", https://arxiv.org/abs/2211.11167
Source: github.com/hhb072/STViT @ c9ed9a4 (its files say MIT, "see LICENSE"; the repository holds no licence file).
    Released weights load through weights/convert/stvit.py.
Differs from the source: the frozen identity kernels that unfold and fold the super tokens are no parameters here.
Dense use: the same network at any H, W, maps before each merging; the authors publish no dense code. The maps have no norm.

Shapes: B batch, H W map height and width, C channels, h heads, r c rows and columns of the super tokens' grid, P pixels of one
super token's cell.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, LayerScale2d, to_2tuple
from torch import Tensor, nn

from backbones.arguments import BUILT_IN, CHECKPOINTING, NO_SCORE_DROPOUT
from backbones.base import Stage, StagedBackbone, init_linear, register_variants
from backbones.layers import channels_last_on_cpu, crop, drop_path_rates, pad_to_multiple, sdpa
from weights.manifest import default_cfgs as _default_cfgs

default_cfgs = _default_cfgs("stvit")

LAYER_SCALE = 1e-6  # initial value, in the stages that have one


class Stem(nn.Sequential):
    """Four 3x3 convolutions, the first and third of stride 2, each followed by GELU and then BatchNorm.

    On a CPU its map, and so every later one, lies in memory channels-last.
    """

    def __init__(self, in_chans: int, dim: int):
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((in_chans, dim // 2, 2), (dim // 2, dim // 2, 1), (dim // 2, dim, 2), (dim, dim, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GELU(), nn.BatchNorm2d(outputs)]
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:  # B 3 H W -> B C H/4 W/4, rounded up
        return super().forward(channels_last_on_cpu(x))


class Attention(nn.Module):
    """Multi-head self-attention over all positions of a map.

    The rows of `qkv` are head-major, and within a head q, then k, then v.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # B C r c -> B C r c
        size = x.shape[-2:]
        tokens = x.flatten(2).mT  # B N C
        q, k, v = self.qkv(tokens).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)  # each B h N d
        out = sdpa(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2)).mT.unflatten(2, size)


def neighbours(grid: Tensor) -> Tensor:
    """The 3x3 super tokens around each one, row-major, zeros outside: B C r c -> B rc C 9."""
    return F.unfold(grid, 3, padding=1).unflatten(1, (grid.shape[1], 9)).permute(0, 3, 1, 2)


def collect(shares: Tensor, rows: int, columns: int) -> Tensor:
    """The sum of what the 9 cells around each super token give it, B rc C 9 -> B C r c; gifts to the outside are lost."""
    return F.fold(shares.permute(0, 2, 3, 1).flatten(1, 2), (rows, columns), 3, padding=1)


class SuperTokenAttention(nn.Module):
    """Pixels -> super tokens -> attention among these -> pixels (paper, sec. 3.2), linear in the number of pixels.

    Every pixel is shared among the 3x3 super tokens around its cell, by a softmax over its products with them (scale: the
    whole width, not one head's). A neighbour outside the grid is a zero super token that stays in the softmax. A map that is
    no multiple of the cell is padded with zeros at the bottom and on the right, and those pixels count like any other.
    No gradient flows through the shares, whatever the number of iterations.
    """

    def __init__(
        self, dim: int, heads: int, size: tuple[int, int], iterations: int = 1, qkv_bias: bool = True, refine: bool = True
    ):
        """Set up the attention.

        Args:
            dim: channels.
            heads: of the attention among super tokens.
            size: rows and columns of pixels of a super token's cell; (1, 1) leaves plain attention among the pixels.
            iterations: how often super tokens and shares are computed from each other.
            qkv_bias: whether the linear map to q, k and v has a bias.
            refine: False leaves out the attention; super tokens are sampled and scattered only.
        """
        super().__init__()
        self.size, self.iterations, self.scale = to_2tuple(size), iterations, dim**-0.5
        self.refine = Attention(dim, heads, qkv_bias) if refine else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        if self.size == (1, 1):
            return self.refine(x)
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.size)
        rows, columns = x.shape[2] // self.size[0], x.shape[3] // self.size[1]
        cells = x.unflatten(3, (columns, self.size[1])).unflatten(2, (rows, self.size[0])).permute(0, 2, 4, 3, 5, 1)
        pixels = cells.flatten(3, 4).flatten(1, 2)  # B rc P C
        shares, total = self.shares(pixels.detach(), rows, columns)
        grid = collect(pixels.mT @ shares, rows, columns) / total
        out = shares @ neighbours(self.refine(grid)).mT  # B rc P C
        out = out.unflatten(2, self.size).unflatten(1, (rows, columns)).transpose(2, 3)  # B r rows c columns C
        return crop(out.flatten(3, 4).flatten(1, 2), height, width).permute(0, 3, 1, 2)

    @torch.no_grad()
    def shares(self, pixels: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """What each pixel gives to the 9 super tokens around it, B rc P 9, and what each of these gets, B 1 r c."""
        grid = pixels.mean(2).mT.unflatten(2, (rows, columns))
        for i in range(self.iterations):
            shares = (pixels @ neighbours(grid) * self.scale).softmax(-1)
            total = collect(shares.sum(2, keepdim=True), rows, columns) + 1e-12
            if i < self.iterations - 1:
                grid = collect(pixels.mT @ shares, rows, columns) / total
        return shares, total


class ConvMlp(nn.Module):
    """1x1 convolution, GELU, a 3x3 depth-wise convolution with residual, 1x1 convolution."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.conv(x))


class Block(nn.Module):
    """x + depth-wise convolution of x, then x + DP(s1 * attn(LN x)), then x + DP(s2 * MLP(BN x)).

    Args:
        dim: channels.
        attn: of the map.
        mlp_ratio: hidden channels per channel.
        layer_scale: whether both branches are scaled.
        drop_path: stochastic depth.
    """

    layer_scales = (("mlp.fc2", "scale2"),)

    def __init__(self, dim: int, attn: SuperTokenAttention, mlp_ratio: float, layer_scale: bool, drop_path: float):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.attn = LayerNorm2d(dim, eps=1e-6), attn
        self.norm2, self.mlp = nn.BatchNorm2d(dim), ConvMlp(dim, int(dim * mlp_ratio))
        self.scale1, self.scale2 = (LayerScale2d(dim, LAYER_SCALE) if layer_scale else nn.Identity() for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        x = x + self.pos_embed(x)
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class STViT(StagedBackbone):
    """The map of `forward_features` is the projected one, with `projection` channels; the maps of the stages have no norm."""

    family = "stvit"
    min_size = 1
    authors_names = {
        "embed_dim": "dims",
        "num_heads": "heads",
        "n_iter": "iterations",
        "stoken_size": "super_tokens",
        "layerscale": "layer_scale",
    }
    authors_others = {
        "qk_scale": BUILT_IN,
        "init_values": "has no counterpart: learned scales start at 1e-6",
        "attn_drop_rate": NO_SCORE_DROPOUT,
        "use_checkpoint": CHECKPOINTING,
        "checkpoint_num": CHECKPOINTING,
        "freeze_bn": "is for a training loop to do: put the BatchNorms in evaluation mode",
    }

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        super_tokens: Sequence[int | tuple[int, int]] = (8, 4, 1, 1),
        iterations: Sequence[int] = (1, 1, 1, 1),
        layer_scale: Sequence[bool] = (False, False, False, False),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        projection: int = 1024,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        """Set up the network; sequences have an entry a stage.

        Args:
            dims, depths, heads: channels, blocks and attention heads.
            super_tokens: pixels a side of a super token's cell, or (rows, columns); 1 is plain attention. Larger cells are for
                larger images: the authors name 16, 8, 1, 1 for them.
            iterations: how often super tokens and shares are computed from each other.
            layer_scale: whether the branches have a learned scale per channel.
            mlp_ratio: hidden channels of the MLPs per channel.
            qkv_bias: whether q, k and v have a bias.
            projection: channels between the last stage and the classifier.
            in_chans, num_classes, global_pool, drop_rate: as timm's.
            drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        """
        super().__init__()
        rates = drop_path_rates(drop_path_rate, depths)

        def block(i: int, rate: float) -> Block:
            attn = SuperTokenAttention(dims[i], heads[i], to_2tuple(super_tokens[i]), iterations[i], qkv_bias)
            return Block(dims[i], attn, mlp_ratio, layer_scale[i], rate)

        def merging(i: int) -> nn.Module:
            if i == 0:
                return nn.Identity()
            return nn.Sequential(nn.Conv2d(dims[i - 1], dims[i], 3, stride=2, padding=1), nn.BatchNorm2d(dims[i]))

        self.patch_embed = Stem(in_chans, dims[0])
        self.stages = nn.ModuleList(Stage(merging(i), [block(i, rate) for rate in rates[i]]) for i in range(len(dims)))
        self.norm = nn.Sequential(nn.Conv2d(dims[-1], projection, 1), nn.BatchNorm2d(projection), nn.SiLU())
        head = ClassifierHead(projection, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.finish(dims, [4 * 2**i for i in range(len(dims))], num_classes, global_pool, drop_rate, head=head)
        self.num_features = self.head_hidden_size = projection
        self.head.apply(init_linear)

    def feature(self, x: Tensor, tokens: Tensor | None, index: int, norm: bool) -> tuple[Tensor, Tensor]:
        """The stage's map as it is: the network has no norm of its maps, only the projection before its classifier."""
        return super().feature(x, tokens, index, norm=False)


SCALED = (False, False, True, True)

VARIANTS: dict[str, dict[str, Any]] = {
    "stvit_small": {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "heads": (1, 2, 5, 8)},
    "stvit_base": {"dims": (96, 192, 384, 512), "depths": (4, 6, 14, 6), "heads": (2, 3, 6, 8), "layer_scale": SCALED},
    "stvit_large": {"dims": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "heads": (2, 3, 7, 10), "layer_scale": SCALED},
}
register_variants(STViT, VARIANTS)
