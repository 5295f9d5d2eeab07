"""UPerNet (Xiao et al. 2018, https://arxiv.org/abs/1807.10221) with the semantics of mmsegmentation 1.2.2 (Apache-2.0)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Head
from .blocks import ConvNormAct, top_down


class UPerNet(Head):
    """Pyramid pooling on the coarsest map, feature pyramid, all levels fused at the finest, 1x1 classifier.

    Parameter names are those of mmsegmentation's UPerHead, so its checkpoints load as they are.

    Args:
        channels: of each map, finest first, any number of levels, any sizes (also all equal).
        out_channels: classes.
        width: of pooling, pyramid and fusion.
        pool_scales: bins of the pooling.
        dropout: before the classifier.
        align_corners: of every resize.
    """

    pyramid = True

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        width: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        align_corners: bool = False,
    ):
        super().__init__()
        self.pool_scales, self.align_corners = tuple(pool_scales), align_corners
        # index 0 is the pooling, which has no parameters: the checkpoints count it
        self.psp_modules = nn.ModuleList(nn.Sequential(nn.Identity(), ConvNormAct(channels[-1], width)) for _ in pool_scales)
        self.bottleneck = ConvNormAct(channels[-1] + len(pool_scales) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(c, width) for c in channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvNormAct(width, width, 3) for _ in channels[:-1])
        self.fpn_bottleneck = ConvNormAct(len(channels) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(width, out_channels, 1)

    def pool(self, coarsest: Tensor) -> Tensor:  # B C h w -> B width h w
        """Averages over 1, 4, 9 and 36 bins, each projected, resized back, mixed with the map (Zhao et al. 2017, s. 3.2)."""
        pools = [
            project(F.adaptive_avg_pool2d(coarsest, bins))
            for bins, project in zip(self.pool_scales, self.psp_modules, strict=True)
        ]
        return self.bottleneck([coarsest, *pools], self.align_corners)

    def get_classifier(self) -> nn.Module:
        return self.conv_seg

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # [B C_i H_i W_i] -> B K H_0 W_0
        laterals = [lateral(m) for lateral, m in zip(self.lateral_convs, maps[:-1], strict=True)]
        sums = top_down([*laterals, self.pool(maps[-1])], self.align_corners)
        levels = [conv(x) for conv, x in zip(self.fpn_convs, sums[:-1], strict=True)] + sums[-1:]
        return self.conv_seg(self.dropout(self.fpn_bottleneck(levels, self.align_corners)))
