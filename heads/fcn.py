"""Fully convolutional head on one map (Long et al. 2015), mostly the auxiliary head beside UPerNet."""

from collections.abc import Sequence

from torch import Tensor, nn

from .base import Head
from .blocks import ConvNormAct


class FCN(Head):
    """`depth` 3x3 convolutions with batch norm and ReLU on the map `index`, then a 1x1 classifier.

    Parameter names are those of mmsegmentation's FCNHead (`convs.0.conv`, `conv_cat.conv`, `conv_seg`).

    Args:
        channels: of each map, finest first.
        out_channels: classes.
        width: of the convolutions.
        depth: how many 3x3 convolutions.
        index: which map is read; negative counts from the coarsest (the published auxiliary heads read the third of four, -2).
        concat_input: one more such convolution, over the map and the result of the others (in mmsegmentation on in the main
            head of its FCN baselines, off in auxiliary heads).
        dropout: before the classifier.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        width: int = 256,
        depth: int = 1,
        index: int = -2,
        concat_input: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        if not -len(channels) <= index < len(channels):
            raise ValueError(f"fcn: index is {index}; with {len(channels)} maps use {-len(channels)} to {len(channels) - 1}")
        self.index = index
        sizes = [channels[index], *[width] * depth]
        self.convs = nn.Sequential(*(ConvNormAct(a, b, 3) for a, b in zip(sizes, sizes[1:], strict=False)))
        self.conv_cat = ConvNormAct(channels[index] + sizes[-1], sizes[-1], 3) if concat_input else None
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(sizes[-1], out_channels, 1)

    def get_classifier(self) -> nn.Module:
        return self.conv_seg

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # [B C_i H_i W_i] -> B K H_index W_index
        x = self.convs(maps[self.index])
        if self.conv_cat is not None:
            x = self.conv_cat([maps[self.index], x])
        return self.conv_seg(self.dropout(x))
