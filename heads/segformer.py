"""SegFormer's all-MLP head (Xie et al. 2021, https://arxiv.org/abs/2105.15203, section 3.2) as in mmsegmentation 1.2.2."""

from collections.abc import Sequence

from torch import Tensor, nn

from .base import Head
from .blocks import ConvNormAct


class SegFormer(Head):
    """Every map projected to one width, resized to the finest, concatenated, mixed by one 1x1 convolution, classified.

    Parameter names are those of mmsegmentation's SegformerHead (`convs.0.conv`, `fusion_conv.conv`, `conv_seg`).

    Args:
        channels: of each map, finest first, any number of levels.
        out_channels: classes.
        width: of the projections (256 for MiT-B0 and B1, else 768).
        dropout: before the classifier.
        linear: projections without norm and activation, as in the authors' own code and Hugging Face's.
    """

    pyramid = True

    def __init__(
        self, channels: Sequence[int], out_channels: int, width: int = 256, dropout: float = 0.1, linear: bool = False
    ):
        super().__init__()
        self.convs = nn.ModuleList(Projection(c, width) if linear else ConvNormAct(c, width) for c in channels)
        self.fusion_conv = ConvNormAct(len(channels) * width, width)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(width, out_channels, 1)

    def get_classifier(self) -> nn.Module:
        return self.conv_seg

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # [B C_i H_i W_i] -> B K H_0 W_0
        maps = [conv(m) for conv, m in zip(self.convs, maps, strict=True)]
        return self.conv_seg(self.dropout(self.fusion_conv(maps)))


class Projection(nn.Module):
    """A linear layer at every position, under the name it has inside ConvNormAct."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
