"""Semantic FPN (Kirillov et al. 2019, "Panoptic Feature Pyramid Networks", section 3)."""

from collections.abc import Sequence

from torch import Tensor, nn

from .base import Head
from .blocks import ConvNormAct, resize, top_down


class FPN(Head):
    """Feature pyramid, then per level 3x3 convolutions that double the size until the finest, summed, 1x1 classifier.

    Parameter names are those of mmsegmentation's FPN neck and FPNHead (`lateral_convs.0.conv`, `scale_heads.1.0.conv`).

    Args:
        channels: of each map, finest first, any number of levels.
        out_channels: classes.
        width: of the pyramid.
        head_width: of the scale heads.
        smooth: a 3x3 convolution on every sum of the pyramid, as published; without it about half of the work is gone
            (segmentation_models_pytorch's FPN).
        dropout: before the classifier.
    """

    pyramid = True

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        width: int = 256,
        head_width: int = 128,
        smooth: bool = True,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.lateral_convs = nn.ModuleList(Conv(c, width, 1) for c in channels)
        self.fpn_convs = nn.ModuleList(Conv(width, width, 3) if smooth else nn.Identity() for _ in channels)
        # Level i is i doublings away from the finest; the finest gets one convolution and no doubling. Odd places hold the
        # resizing in the published checkpoints, so the convolutions sit at 0, 2, 4.
        self.scale_heads = nn.ModuleList()
        for level in range(len(channels)):
            steps: list[nn.Module] = []
            for step in range(max(1, level)):
                steps += [ConvNormAct(width if step == 0 else head_width, head_width, 3)] + [nn.Identity()] * (level > 0)
            self.scale_heads.append(nn.Sequential(*steps))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(head_width, out_channels, 1)

    def get_classifier(self) -> nn.Module:
        return self.conv_seg

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # [B C_i H_i W_i] -> B K H_0 W_0
        # nearest: what the published checkpoints were trained with
        maps = top_down([lateral(m) for lateral, m in zip(self.lateral_convs, maps, strict=True)], mode="nearest")
        maps = [conv(m) for conv, m in zip(self.fpn_convs, maps, strict=True)]
        total = self.scale_heads[0](maps[0])
        for level in range(1, len(maps)):
            x = maps[level]
            convs = [step for step in self.scale_heads[level].children() if isinstance(step, ConvNormAct)]
            for finer, conv in zip(reversed(maps[:level]), convs, strict=True):  # one level at a time, as sizes really are
                x = resize(conv(x), like=finer)
            total = total + x
        return self.conv_seg(self.dropout(total))


class Conv(nn.Module):
    """A convolution with bias and nothing else, under the name `conv` that the checkpoints use."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
