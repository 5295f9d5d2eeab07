"""FcaFormer: every attention block also looks at a few tokens that the blocks before it left behind.

Paper:  Zhang et al. 2022, "Fcaformer: Forward Cross Attention in Hybrid Vision Transformer", https://arxiv.org/abs/2211.07198
Source: github.com/hkzhang-git/FcaFormer @ 7dcd8e0 (no licence file), its classification and its segmentation code.
    Released weights load through weights/convert/fcaformer.py.

Stages 1 and 2 are ConvNeXt's, stages 3 and 4 attend. The authors have two programs: classification attends over the whole map
and takes one image size; dense prediction attends inside windows of 14 and 7 tokens, at any size. A map of the constructed size
is one window, so here both are one program: windows as large as the maps for images of `img_size`, and maps of another size are
padded to whole windows, at the top and left before blocks 0, 2, ... and at the bottom and right before blocks 1, 3, ... so that
the windows' borders move. Padding is not masked. Tokens left behind stay with the number of their window.

Shapes: B batch (windows count as images), H W map height and width, C channels, h heads, N tokens, S tokens left behind.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.base import Stage, StagedBackbone, check_img_size, register_variants
from backbones.layers import PooledNormHead, channels_last_on_cpu, covering, drop_path_rates, open_windows, relative_bias, sdpa
from backbones.tracing import leaf
from weights.convert.fcaformer import resize_positions
from weights.manifest import default_cfgs as _default_cfgs
from weights.resample import is_open

default_cfgs = _default_cfgs("fcaformer")

LayerNorm = partial(nn.LayerNorm, eps=1e-5)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, padded by half its kernel, then BatchNorm; named c and bn as the authors' are."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(c=conv, bn=nn.BatchNorm2d(outputs)))


class Stem(nn.Sequential):
    """Two 3x3 convolutions of stride 2 with BatchNorm, GELU between; on a CPU its map lies in memory channels-last."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__(conv_norm(in_chans, dim // 2, 3, stride=2), nn.GELU(), conv_norm(dim // 2, dim, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:  # B 3 H W -> B C H/4 W/4, rounded up
        return super().forward(channels_last_on_cpu(x))


class Merging(nn.Module):
    """Half the sides, rounded up: 1x1 to the new width, GELU, 3x3 depth-wise of stride 2, GELU, 1x1."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv1 = conv_norm(dim, out_dim, 1)
        self.conv2 = conv_norm(out_dim, out_dim, 3, stride=2, groups=out_dim)
        self.conv3 = conv_norm(out_dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B D H/2 W/2
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class ConvBlock(nn.Module):
    """ConvNeXt's block: 7x7 depth-wise, LayerNorm (eps 1e-6), MLP, layer scale, residual.

    Args:
        dim: channels.
        mlp_ratio: hidden channels per channel.
        layer_scale: initial value.
        drop_path: stochastic depth.
    """

    def __init__(self, dim: int, mlp_ratio: float, layer_scale: float, drop_path: float):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, int(mlp_ratio * dim))
        self.pwconv2 = nn.Linear(int(mlp_ratio * dim), dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        out = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        out = self.drop_path(self.pwconv2(F.gelu(self.pwconv1(out))))
        return torch.addcmul(x, self.gamma[:, None, None], out.permute(0, 3, 1, 2))


class NormMlp(nn.Module):
    """An MLP with a LayerNorm of its own in front."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # B N C -> B N C
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


def split(x: Tensor, heads: int) -> Tensor:  # B n heads*d -> B heads n d
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def offset_bias(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Attention bias by unsigned offset, heads x queries x keys of a map of this size; table: heads x offsets."""
    table = table.unflatten(1, size)
    for axis in (1, 2):  # the signed offsets' table, in which both signs share their entries
        table = torch.cat([table.flip(axis).narrow(axis, 0, table.shape[axis] - 1), table], axis)
    return relative_bias(table, *size)


@leaf
def attend(
    qkv: Tensor, left: Tensor | None, table: Tensor, left_bias: Tensor | None, size: tuple[int, int], heads: int
) -> Tensor:  # B N 3C -> B N C
    """Attention of the tokens of a map to each other and to those left behind.

    Args:
        qkv: queries, keys and values of the map's tokens, B N 3C.
        left: keys and values of the tokens left behind, B S 2C, or None.
        table: bias of the map's keys by unsigned offset, heads x N.
        left_bias: of the keys left behind, 1 heads 1 S, or None.
        size: rows and columns of the map.
        heads: attention heads.
    """
    q, k, v = (split(part, heads) for part in qkv.chunk(3, -1))
    bias = offset_bias(table, size)[None]
    if left is not None and left_bias is not None:
        k, v = (torch.cat([own, split(other, heads)], 2) for own, other in zip((k, v), left.chunk(2, -1)))
        bias = torch.cat([bias, left_bias.expand(-1, -1, q.shape[2], -1)], -1)
    return sdpa(q, k, v, bias.to(q.dtype)).transpose(1, 2).flatten(2)


@leaf
def keys_and_values(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # B S C -> B S 2C
    """The last two thirds of a linear layer that gives queries, keys and values."""
    dim = x.shape[-1]
    return F.linear(x, weight[dim:], bias[dim:])


class FcaBlock(nn.Module):
    """Attention to the map and to tokens left behind, a 3x3 depth-wise convolution without residual, MLP (paper, sec. 3)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        size: tuple[int, int],
        earlier: int,
        leaves: bool,
        mlp_ratio: float,
        layer_scale: float,
        drop_path: float,
    ):
        """Set up the block.

        Args:
            dim, heads: channels and attention heads.
            size: rows and columns of the maps (windows) that it takes.
            earlier: how many blocks before it left the tokens that it is given.
            leaves: whether it leaves tokens behind (all but the last block of a stage).
            mlp_ratio, layer_scale, drop_path: as in any transformer; layer_scale is the initial value.
        """
        super().__init__()
        self.size, self.heads = size, heads
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, size[0] * size[1]))
        self.gamma_1, self.gamma_2 = (nn.Parameter(layer_scale * torch.ones(dim)) for _ in range(2))
        left = earlier * -(-size[0] // 4) * -(-size[1] // 4)
        if left:
            self.s_scale_factors = nn.Parameter(torch.ones(1, left, 1))
            self.s_token_bias = nn.Parameter(torch.zeros(1, heads, 1, left))
            self.s_norm = LayerNorm(dim)
        self.dw_conv = nn.Conv2d(dim, dim, 7, stride=4, padding=3, groups=dim, bias=False) if leaves else None
        self.local_conv = conv_norm(dim, dim, 3, groups=dim)
        self.mlp = NormMlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def attention(self, x: Tensor, left: Tensor | None) -> Tensor:
        """Normalised tokens B N C, and those left behind B S C or None -> B N C."""
        left_bias = None
        if left is not None:
            left = keys_and_values(self.s_norm(left * self.s_scale_factors), self.qkv.weight, self.qkv.bias)
            left_bias = self.s_token_bias
        return self.proj(attend(self.qkv(x), left, self.attention_biases, left_bias, self.size, self.heads))

    def forward(self, x: Tensor, left: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map B C H W and tokens left behind B S C or None -> map, and the B n C tokens that this block leaves (or None)."""
        size, tokens = x.shape[-2:], x.flatten(2).mT
        tokens = torch.addcmul(tokens, self.gamma_1, self.drop_path(self.attention(self.norm1(tokens), left)))
        x = tokens.mT.unflatten(2, size)
        leaves = None if self.dw_conv is None else self.dw_conv(x).flatten(2).mT
        tokens = self.local_conv(x).flatten(2).mT
        tokens = torch.addcmul(tokens, self.gamma_2, self.drop_path(self.mlp(self.norm2(tokens))))
        return tokens.mT.unflatten(2, size), leaves


def placed(like: Tensor, size: tuple[int, int], front: bool) -> tuple[int, int, int, int, int, int]:
    """How windows cover a map B C H W: rows and columns of windows; padding at the top, bottom, left and right."""
    (height, width), (h, w) = like.shape[-2:], size
    rows, columns = covering(height, h), covering(width, w)
    down, right = rows * h - height, columns * w - width
    return (rows, columns, down, 0, right, 0) if front else (rows, columns, 0, down, 0, right)


@leaf
def to_windows(x: Tensor, size: tuple[int, int], front: bool) -> Tensor:  # B C H W -> B*n C h w
    """The windows of a map padded with zeros, in front (top and left) or behind."""
    if is_open(x.shape[2:]):
        windows = open_windows(x[0, 0], size, front=front).cut(x.flatten(2).mT)
        return windows.flatten(0, 1).mT.unflatten(2, size)
    rows, columns, top, bottom, left, right = placed(x, size, front)
    x = F.pad(x, (left, right, top, bottom))
    x = x.unflatten(3, (columns, size[1])).unflatten(2, (rows, size[0]))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


@leaf
def from_windows(x: Tensor, like: Tensor, size: tuple[int, int], front: bool) -> Tensor:  # B*n C h w -> B C H W
    """The inverse of `to_windows` for the map `like`, B C H W."""
    if is_open(like.shape[2:]):
        windows = open_windows(like[0, 0], size, front=front)
        tokens = windows.joined(x.flatten(2).mT.unflatten(0, (like.shape[0], windows.number)))
        return tokens.mT.unflatten(2, like.shape[2:])
    rows, columns, top, _, left, _ = placed(like, size, front)
    x = x.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return x[:, :, top : top + like.shape[2], left : left + like.shape[3]]


class FcaStage(Stage):
    """Blocks in windows of `size` tokens, each given what the last `memory` blocks (None: all) left behind, oldest first.

    Args:
        downsample: of the map.
        blocks: in windows.
        size: tokens of a window, (rows, columns).
        memory: how many earlier blocks' tokens a block is given, None for all.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], size: tuple[int, int], memory: int | None):
        super().__init__(downsample, blocks)
        self.size, self.memory = size, memory

    def set_window(self, rows: int, columns: int) -> None:
        """Another window; tables and what belongs to the tokens left behind are resampled."""
        for block in self.blocks:
            for name in ("attention_biases", "s_scale_factors", "s_token_bias"):
                if (old := getattr(block, name, None)) is not None:
                    new = resize_positions(name, old.detach(), self.size, (rows, columns))
                    setattr(block, name, nn.Parameter(new, requires_grad=old.requires_grad))
            assert isinstance(block, FcaBlock)
            block.size = (rows, columns)
        self.size = (rows, columns)

    def run_blocks(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        left: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            tiles = to_windows(x, self.size, i % 2 == 0)
            recent = left if self.memory is None else left[max(0, i - self.memory) :]
            given = torch.cat(recent, 1) if recent else None
            if self.grad_checkpointing and self.training:
                tiles, leaves = checkpoint(block, tiles, given, use_reentrant=False)
            else:
                tiles, leaves = block(tiles, given)
            if leaves is not None:
                left.append(leaves)
            x = from_windows(tiles, x, self.size, i % 2 == 0)
        return x


class FcaFormer(StagedBackbone):
    """The final LayerNorm is of the pooled vector; maps have no norm unless `feature_dims` gives them one."""

    family = "fcaformer"
    zeros = ("heads",)  # a 0 stands for a stage without
    authors_names = {
        "embed_dims": "dims",
        "num_heads": "heads",
        "cab_max_d": "memory",
        "seg_head_dims": "feature_dims",
        "layer_scale_init_value": "layer_scale",
    }
    authors_others = {
        "head_init_scale": "has no counterpart: the classifier starts as timm's do",
    }
    min_size = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        dims: Sequence[int] = (96, 192, 320, 480),
        depths: Sequence[int] = (2, 2, 7, 2),
        heads: Sequence[int] = (0, 0, 10, 15),
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        memory: int | None = 12,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_dims: Sequence[int] | None = None,
    ):
        """Set up the network; sequences have an entry a stage.

        Args:
            img_size: side, or (height, width), of the images whose maps are one window; images of another size run too.
            dims, depths, heads: channels, blocks, and attention heads, 0 for a stage of convolutions.
            mlp_ratio: hidden channels of an MLP per channel.
            layer_scale: initial value; the authors fine-tune dense models from 1.0.
            memory: how many blocks back a block sees tokens left behind; None for all (the dense code).
            in_chans, num_classes, global_pool, drop_rate: as timm's.
            drop_path_rate: stochastic depth of the last block, rising linearly from 0.
            feature_dims: channels of the returned maps, by a 1x1 convolution and a LayerNorm each as in the authors' dense code
                (96, 192, 384, 768 there); None returns the maps as they are.
        """
        super().__init__()
        height, width = check_img_size(img_size, self.min_size)
        self.img_size = (height, width)
        rates = drop_path_rates(drop_path_rate, depths)
        strides = [4 * 2**i for i in range(len(dims))]
        self.patch_embed = Stem(in_chans, dims[0])
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            merging = Merging(dims[i - 1], dim) if i else nn.Identity()
            if not heads[i]:
                self.stages.append(Stage(merging, [ConvBlock(dim, mlp_ratio, layer_scale, rate) for rate in rates[i]]))
                continue
            size = -(-height // strides[i]), -(-width // strides[i])
            blocks = [
                FcaBlock(
                    dim,
                    heads[i],
                    size,
                    earlier=j if memory is None else min(j, memory),
                    leaves=j < depths[i] - 1,
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale,
                    drop_path=rate,
                )
                for j, rate in enumerate(rates[i])
            ]
            self.stages.append(FcaStage(merging, blocks, size, memory))
        self.norm = nn.Identity()
        norms = None
        if feature_dims is not None:
            norms = [
                nn.Sequential(nn.Conv2d(dim, out, 1, bias=False), LayerNorm2d(out, eps=1e-6))
                for dim, out in zip(dims, feature_dims)
            ]
        self.finish(dims, strides, num_classes, global_pool, drop_rate, norms)
        self.head = PooledNormHead(dims[-1], num_classes, global_pool, drop_rate, eps=1e-5)
        if feature_dims is not None:
            for entry, out in zip(self.feature_info, feature_dims):
                entry["num_chs"] = out
        self.apply(init_weights)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Windows as large as the maps for images of this size; what belongs to their positions is resampled, in place."""
        self.img_size = check_img_size(img_size, self.min_size)
        for stage, entry in zip(self.stages, self.feature_info):
            if isinstance(stage, FcaStage):
                stride = int(str(entry["reduction"]))
                stage.set_window(-(-self.img_size[0] // stride), -(-self.img_size[1] // stride))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("attention_biases", "s_token_bias"))}


def init_weights(module: nn.Module) -> None:
    """Weights of convolutions and linear layers from a normal of std 0.02 cut at two std, biases zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


VARIANTS: dict[str, dict[str, Any]] = {
    "fcaformer_l1": {"dims": (64, 128, 192, 320), "depths": (2, 2, 6, 2), "heads": (0, 0, 6, 10)},
    "fcaformer_l2": {"dims": (96, 192, 320, 480), "depths": (2, 2, 7, 2), "heads": (0, 0, 10, 15)},
    "fcaformer_l3": {"dims": (96, 192, 320, 512), "depths": (3, 6, 12, 3), "heads": (0, 0, 10, 16)},
    "fcaformer_l4": {"dims": (128, 256, 512, 768), "depths": (3, 6, 12, 3), "heads": (0, 0, 16, 24)},
}
register_variants(FcaFormer, VARIANTS)
