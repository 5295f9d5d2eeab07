"""Lite-Mono: dilated convolutions and attention between channels, for depth on small devices.

Paper:  Zhang et al. 2023, https://arxiv.org/abs/2211.13202
Source: github.com/noahzn/Lite-Mono @ 4874b35 (MIT; its training code derives from monodepth2, whose licence is non-commercial;
written from its behaviour). The released encoder.pth loads through weights/convert/monodepth.py.
Differs from the source: any size (the authors' code knows two), any number of image channels, and a classifier, whose linear
layer on the mean of the last map is ours: the authors publish none.

Shapes: B batch, H W map height and width, C channels, N positions of a map, h heads.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.base import Stage, StagedBackbone, State, register_variants
from backbones.layers import drop_path_rates
from backbones.tracing import leaf
from weights.manifest import default_cfgs as _default_cfgs

default_cfgs = _default_cfgs("monodepth")

FREQUENCIES = 32  # of the position encoding, for each axis


class ConvNormAct(nn.Sequential):
    """3x3 convolution without bias, batch norm, GELU."""

    def __init__(self, in_channels: int, dim: int, stride: int):
        conv = nn.Conv2d(in_channels, dim, 3, stride, 1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(dim), nn.GELU())


class Stem(nn.Module):
    """Image -> (first map, image at its size): three convolutions, then one that also sees the image at half its size.

    The image that later layers see has always three channels: those of an RGB image, else the mean of the channels three times.
    """

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.rgb = in_chans == 3
        self.layers = nn.Sequential(*(ConvNormAct(dim if i else in_chans, dim, 1 if i else 2) for i in range(3)))
        self.conv = nn.Conv2d(dim + 3, dim, 3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> State:  # B 3 H W -> B C H/4 W/4, B 3 H/4 W/4
        small = halved(x if self.rgb else x.mean(1, keepdim=True).expand(-1, 3, -1, -1))
        return self.conv(torch.cat([self.layers(x), small], 1)), halved(small)


def halved(x: Tensor) -> Tensor:
    """The map at half its size; zeros beyond the border count, as published."""
    return F.avg_pool2d(x, 3, 2, 1)


class DilatedBlock(nn.Module):
    """A dilated depth-wise 3x3 convolution, batch norm, MLP, all added to the input (paper, eq. 1).

    Args:
        dim: channels.
        dilation: of the convolution.
        mlp_ratio: hidden channels per channel.
        layer_scale: initial value.
        drop_path: stochastic depth.
    """

    def __init__(self, dim: int, dilation: int, mlp_ratio: float, layer_scale: float, drop_path: float):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=dilation, dilation=dilation, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.fc1, self.fc2 = nn.Linear(dim, int(mlp_ratio * dim)), nn.Linear(int(mlp_ratio * dim), dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        y = self.norm(self.conv(x)).permute(0, 2, 3, 1)
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ChannelAttention(nn.Module):
    """Attention between channels over all positions, with a temperature per head (paper, eq. 4; XCiT's)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # B N C -> B N C
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)  # 3 B h d N
        q, k = F.normalize(qkv[0], dim=-1), F.normalize(qkv[1], dim=-1)
        attention = (q @ k.mT * self.temperature).softmax(-1)  # B h d d
        return self.proj((attention @ qkv[2]).permute(0, 3, 1, 2).flatten(2))


@leaf
def waves(like: Tensor) -> Tensor:
    """Sines and cosines of the relative place of every position of a map B C H W: 1 64 H W, y first."""
    height, width = like.shape[-2:]
    power = 2 * (torch.arange(FREQUENCIES, device=like.device) // 2) / FREQUENCIES
    steps = (10000**power)[:, None]
    found = []
    for length in (height, width):
        place = (torch.arange(length, device=like.device) + 1) / (length + 1e-6) * 2 * math.pi
        angle = place / steps  # 32 length
        found.append(torch.stack([angle[0::2].sin(), angle[1::2].cos()], 1).flatten(0, 1))
    y, x = found
    both = torch.cat([y[:, :, None].expand(-1, -1, width), x[:, None].expand(-1, height, -1)])
    return both[None].to(like.dtype)


class GlobalBlock(nn.Module):
    """Channel attention, then an MLP, whose result is added to the block's input, not to the attention's (paper, fig. 3).

    Args:
        dim: channels.
        heads: of the channel attention.
        positions: whether positions are added before it.
        mlp_ratio: hidden channels per channel.
        layer_scale: initial value.
        drop_path: stochastic depth.
    """

    def __init__(self, dim: int, heads: int, positions: bool, mlp_ratio: float, layer_scale: float, drop_path: float):
        super().__init__()
        self.pos_embed = nn.Conv2d(2 * FREQUENCIES, dim, 1) if positions else None
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = ChannelAttention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, int(mlp_ratio * dim)), nn.Linear(int(mlp_ratio * dim), dim)
        self.gamma1, self.gamma2 = (nn.Parameter(layer_scale * torch.ones(dim)) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        tokens = x if self.pos_embed is None else x + self.pos_embed(waves(x))
        tokens = tokens.flatten(2).mT
        tokens = tokens + self.gamma1 * self.attn(self.norm1(tokens))
        tokens = self.gamma2 * self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        return x + self.drop_path(unflattened(tokens.mT, x))


@leaf
def unflattened(x: Tensor, like: Tensor) -> Tensor:
    """B C N as a map of the size of `like`."""
    return x.unflatten(2, like.shape[-2:])


class LiteMonoStage(Stage):
    """Downsampling of what the stage before was given, what it made of it and the image, side by side; then blocks.

    Takes and gives (map, what the next downsampling sees beside it): the stage's input and the image, B C+3 H W; the last one
    gives the map alone.

    Args:
        downsample: of what comes in, side by side.
        blocks: on the map.
        first: whether only the image comes in.
        last: whether only the map leaves.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], first: bool, last: bool):
        super().__init__(downsample, blocks)
        self.first, self.last = first, last

    def forward(self, x: State) -> Any:
        own, beside = x
        image = beside
        if not self.first:
            image = beside[:, -3:]  # type: ignore[index]  # there is one between stages
            own = self.downsample(torch.cat([beside[:, :-3], own, image], 1))  # type: ignore[index]
            image = halved(image)
        found = self.run_blocks(own)
        return found if self.last else (found, torch.cat([own, image], 1))  # type: ignore[list-item]


class LiteMono(StagedBackbone):
    """Maps at strides 4, 8 and 16, without a final norm. Images are normalised with mean 0.45 and std 0.225."""

    family = "monodepth"
    default_out_indices = (0, 1, 2)
    min_size = 1
    authors_names = {"depth": "depths", "expansion": "mlp_ratio", "position_embedding": "positions", "expan_ratio": "mlp_ratio"}

    def __init__(
        self,
        depths: Sequence[int] = (4, 4, 10),
        dims: Sequence[int] = (48, 80, 128),
        heads: Sequence[int] = (8, 8, 8),
        dilations: Sequence[Sequence[int]] = ((1, 2, 3), (1, 2, 3), (1, 2, 3, 1, 2, 3, 2, 4, 6)),
        positions: Sequence[bool] = (True, False, False),
        mlp_ratio: float = 6.0,
        layer_scale: float = 1e-6,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        """Set up the network; sequences have an entry a stage.

        Args:
            depths: blocks; the last of a stage is the global one, the others are dilated convolutions.
            dims, heads: channels and attention heads.
            dilations: of the dilated blocks, from the first on; repeated where there are more blocks.
            positions: whether the global block adds an encoding of the positions.
            mlp_ratio: hidden channels of an MLP per channel.
            layer_scale: initial value.
            in_chans, num_classes, global_pool, drop_rate: as timm's.
            drop_path_rate: stochastic depth of the last block, rising linearly from 0 (0.2 in the paper).
        """
        super().__init__()
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = Stem(in_chans, dims[0])
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            downsample = nn.Conv2d(2 * dims[i - 1] + 3, dim, 3, 2, 1, bias=False) if i else nn.Identity()
            steps = itertools.cycle(dilations[i])
            blocks: list[nn.Module] = [
                DilatedBlock(dim, step, mlp_ratio, layer_scale, rate) for step, rate in zip(steps, rates[i][:-1])
            ]
            blocks.append(GlobalBlock(dim, heads[i], positions[i], mlp_ratio, layer_scale, rates[i][-1]))
            self.stages.append(LiteMonoStage(downsample, blocks, i == 0, i == len(dims) - 1))
        self.norm = nn.Identity()
        self.finish(dims, [4 * 2**i for i in range(len(dims))], num_classes, global_pool, drop_rate)
        self.apply(init_weights)

    def final_norm(self, x: Tensor, tokens: Tensor | None) -> State:
        return self.norm(x), None

    def output(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        return super().output(x, None)

    def feature(self, x: Tensor, tokens: Tensor | None, index: int, norm: bool) -> tuple[Tensor, Tensor]:
        return super().feature(x, None, index, norm)


def init_weights(module: nn.Module) -> None:
    """Weights of convolutions and linear layers from a normal of std 0.02 cut at two std, biases zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


SHORT = ((1, 2, 3), (1, 2, 3), (1, 2, 3, 2, 4, 6))
LONG = ((1, 2, 3), (1, 2, 3), (1, 2, 3, 1, 2, 3, 2, 4, 6))
SHORT_1024 = ((1, 2, 5), (1, 2, 5), (1, 2, 5, 2, 4, 10))  # of the weights for 1024 x 320, whose names are those for 640 x 192
LONG_1024 = ((1, 2, 5), (1, 2, 5), (1, 2, 5, 1, 2, 5, 2, 4, 10))

VARIANTS: dict[str, dict[str, Any]] = {
    "lite_mono_tiny": {"depths": (4, 4, 7), "dims": (32, 64, 128), "dilations": SHORT},
    "lite_mono_tiny_1024": {"depths": (4, 4, 7), "dims": (32, 64, 128), "dilations": SHORT_1024},
    "lite_mono_small": {"depths": (4, 4, 7), "dims": (48, 80, 128), "dilations": SHORT},
    "lite_mono_small_1024": {"depths": (4, 4, 7), "dims": (48, 80, 128), "dilations": SHORT_1024},
    "lite_mono_base": {"depths": (4, 4, 10), "dims": (48, 80, 128), "dilations": LONG},
    "lite_mono_base_1024": {"depths": (4, 4, 10), "dims": (48, 80, 128), "dilations": LONG_1024},
    "lite_mono_8m": {"depths": (4, 4, 10), "dims": (64, 128, 224), "dilations": LONG},
}
register_variants(LiteMono, VARIANTS)
