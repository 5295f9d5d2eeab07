"""Decoders of self-supervised depth: a disparity at several sizes, each a sigmoid.

monodepth2: Godard et al. 2019, https://arxiv.org/abs/1806.01260 (its code may not be used commercially; written from its
behaviour). Lite-Mono: Zhang et al. 2023, https://arxiv.org/abs/2211.13202; github.com/noahzn/Lite-Mono @ 4874b35 (MIT).
Parameter names are the authors', `decoder.<i>`.

Shapes: B batch, C channels; a disparity 0..1 means inverse depth (train.geometry.disparity_to_depth).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Head


class ReflectConv(nn.Module):
    """3x3 convolution with a reflected border under the name `conv`; a map of one pixel a side repeats it instead."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        mode = "reflect" if min(x.shape[-2:]) > 1 else "replicate"
        return self.conv(F.pad(x, (1, 1, 1, 1), mode))


class ConvBlock(nn.Module):
    """`ReflectConv` and ELU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = ReflectConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.conv(x))


class DisparityDecoder(Head):
    """What both decoders share: up from the coarsest map, the next finer one joined, a disparity at the last levels.

    `forward` returns {"disparities": [B 1 h w, finest first, each half the size of the one before]}.

    Args:
        channels: of each map, finest first.
        out_channels: 1.
        widths: of the decoder's levels, finest first.
        scales: how many of the finest levels give a disparity.
        mode: of the interpolation between levels.
    """

    pyramid = True
    returns_names = True

    def __init__(self, channels: Sequence[int], out_channels: int, widths: Sequence[int], scales: int, mode: str):
        super().__init__()
        levels = len(channels)
        if not 1 <= scales <= levels:
            raise ValueError(f"scales must lie in 1..{levels}, one per map at most, got {scales}")
        self.levels, self.scales, self.mode = levels, scales, mode
        blocks: list[nn.Module] = []
        for i in reversed(range(levels)):
            blocks.append(ConvBlock(widths[i + 1] if i + 1 < levels else channels[-1], widths[i]))
            blocks.append(ConvBlock(widths[i] + (channels[i - 1] if i else 0), widths[i]))
        blocks += [ReflectConv(widths[i], out_channels) for i in range(scales)]
        self.decoder = nn.ModuleList(blocks)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The convolutions that give the disparities."""
        return tuple(self.decoder[2 * self.levels :])

    def up(self, x: Tensor, like: Tensor | None) -> Tensor:
        """x at twice its size, or at the size of `like` where the sides of a map do not double."""
        size = [2 * side for side in x.shape[-2:]] if like is None else like.shape[-2:]
        return F.interpolate(x, size=size, mode=self.mode, align_corners=None if self.mode == "nearest" else False)

    def disparity(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Any]:
        x, found = maps[-1], []
        for step, i in enumerate(reversed(range(self.levels))):
            skip = maps[i - 1] if i else None
            x = self.up(self.decoder[2 * step](x), skip)
            x = self.decoder[2 * step + 1](x if skip is None else torch.cat([x, skip], 1))
            if i < self.scales:
                found.append(self.disparity(self.decoder[2 * self.levels + i](x)))
        return {"disparities": found[::-1]}

    def scores(self, output: Any) -> Tensor:
        """The finest disparity, B 1 h w."""
        return output["disparities"][0]


class Monodepth2(DisparityDecoder):
    """monodepth2's decoder: nearest neighbours up, skips from every finer map.

    Args:
        channels: of each map, finest first (a ResNet's five, from its stem on, in the published files).
        out_channels: 1.
        widths: of each level, finest first; the last one is repeated where there are more maps.
        scales: how many disparities.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        scales: int | None = None,
    ):
        widths = [*widths, *[widths[-1]] * (len(channels) - len(widths))]
        super().__init__(channels, out_channels, widths, min(4, len(channels)) if scales is None else scales, "nearest")


class LiteMonoDecoder(DisparityDecoder):
    """Lite-Mono's decoder: bilinear up, half the channels of each map, logits up-sampled once more before the sigmoid.

    Args:
        channels: of each map, finest first (three at strides 4, 8, 16 in the published files).
        out_channels: 1.
        widths: of each level, finest first; by default half of the map's channels.
        scales: how many disparities.
    """

    def __init__(
        self, channels: Sequence[int], out_channels: int, widths: Sequence[int] | None = None, scales: int | None = None
    ):
        widths = [max(c // 2, 1) for c in channels] if widths is None else widths
        super().__init__(channels, out_channels, widths, min(3, len(channels)) if scales is None else scales, "bilinear")

    def disparity(self, logits: Tensor) -> Tensor:
        return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False).sigmoid()


class PoseDecoder(nn.Module):
    """The coarsest map of a pair of frames -> their motions (monodepth2): axis-angle and translation, both B frames 3.

    Args:
        channels: of the map.
        motions: how many are predicted; published training reads the first of two.
        width: of the hidden convolutions.
    """

    def __init__(self, channels: int, motions: int = 2, width: int = 256):
        super().__init__()
        self.motions = motions
        last = nn.Conv2d(width, 6 * motions, 1)
        hidden = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        self.net = nn.ModuleList([nn.Conv2d(channels, width, 1), *hidden, last])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.net[:-1]:
            x = F.relu(layer(x))
        x = 0.01 * self.net[-1](x).mean((2, 3)).unflatten(1, (self.motions, 6))
        return x[..., :3], x[..., 3:]
