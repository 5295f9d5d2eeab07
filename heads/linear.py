"""Linear probe on dense features (Oquab et al. 2023, section 7.4): batch norm and one 1x1 convolution over all maps."""

from collections.abc import Sequence

from torch import Tensor, nn

from .base import Head
from .blocks import BatchNorm2d, fuse


class Linear(Head):
    """All maps resized to the finest and concatenated, batch norm, dropout, 1x1 convolution.

    Args:
        channels: of each map, finest first, any number of levels.
        out_channels: classes, or what the depth rule reads.
        dropout: probability of dropping a whole channel before the convolution.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.bn = BatchNorm2d(sum(channels))
        self.dropout = nn.Dropout2d(dropout)
        self.predict = nn.Conv2d(sum(channels), out_channels, 1)

    def get_classifier(self) -> nn.Module:
        return self.predict

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # [B C_i H_i W_i] -> B K H_0 W_0
        return self.predict(self.dropout(self.bn(fuse(maps))))
