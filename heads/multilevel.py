"""MultiLevelNeck: maps of a plain ViT at other sizes, for mmsegmentation's UPerNet on ViT and DeiT.

Source: open-mmlab/mmsegmentation 1.2.2 (Apache-2.0), mmseg/models/necks/multilevel_neck.py. Parameter names are its own.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import BatchNorm2d

SCALES = (4, 2, 1, 0.5)  # of the published files


class MultiLevelNeck(nn.Module):
    """Each map through a 1x1 convolution, resized by its factor, and through a 3x3 convolution.

    The resize is by factor and not by size: half of a side of 5 is 2 pixels with their centres at 0.5 and 2.5, not those of the
    ratio 2.5. A single map serves every scale.

    Args:
        channels: of each incoming map.
        out_channels: of each result; None: those of its map.
        scales: factor of each result.
        norm: batch norm after every convolution, which then has no bias (the published files have none).
        act: ReLU after every convolution.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int | None = None,
        scales: Sequence[float] = SCALES,
        norm: bool = False,
        act: bool = False,
    ):
        super().__init__()
        if len(channels) not in (1, len(scales)):
            raise ValueError(f"MultiLevelNeck has {len(channels)} maps for {len(scales)} scales: give one map, or one a scale")
        self.scales = tuple(scales)
        widths = [out_channels or c for c in channels]
        self.lateral_convs = nn.ModuleList(Conv(c, width, 1, norm, act) for c, width in zip(channels, widths, strict=True))
        self.channels = [widths[min(i, len(widths) - 1)] for i in range(len(scales))]
        self.convs = nn.ModuleList(Conv(width, width, 3, norm, act) for width in self.channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        laterals = [lateral(m) for lateral, m in zip(self.lateral_convs, maps, strict=True)]
        found = []
        for i, (scale, conv) in enumerate(zip(self.scales, self.convs, strict=True)):
            x = laterals[min(i, len(laterals) - 1)]
            least = max(scale, 1 / min(x.shape[-2:]))  # a side of one pixel stays one
            found.append(conv(F.interpolate(x, scale_factor=least, mode="bilinear", align_corners=False)))
        return found


class Conv(nn.Module):
    """A convolution with bias, or without and with batch norm; then ReLU where asked for: `conv`, `bn`.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: odd; the size of the map stays.
        norm: with batch norm.
        act: with ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: bool, act: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.bn = BatchNorm2d(out_channels) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))
