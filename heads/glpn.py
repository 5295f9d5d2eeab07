"""GLPN's decoder (Kim et al. 2022, https://arxiv.org/abs/2201.07436; vinvino02/GLPDepth @ a048528): light, selective fusion."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Head
from .blocks import BatchNorm2d, resize


class GLPN(Head):
    """Coarse to fine: each level is mixed with the path by two learned attention maps; then 4 times larger, two convolutions.

    The authors add no convolution to the finest map, so its channels are the width there (64 in MiT); where they differ a 1x1
    convolution brings them to it. The result has no final activation (GLPN: sigmoid times the largest depth, `heads.depth`).
    Parameter names are the authors' (`decoder.bot_conv`, `decoder.fusion1.conv1.0`, `last_layer_depth.0`).

    Args:
        channels: of each map, finest first, two or more levels.
        out_channels: classes, or what the depth rule reads.
        width: of the decoder.
    """

    pyramid = True

    def __init__(self, channels: Sequence[int], out_channels: int, width: int = 64):
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"glpn fuses maps of growing size: it needs at least 2, got {len(channels)}")
        self.decoder = Decoder(channels, width)
        self.last_layer_depth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, out_channels, 3, padding=1)
        )

    def get_classifier(self) -> nn.Module:
        return self.last_layer_depth[2]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # [B C_i H_i W_i] -> B K 4H_0 4W_0
        return self.last_layer_depth(self.decoder(maps))


class Decoder(nn.Module):
    """The path from the coarsest map to four times the size of the finest (figure 2)."""

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.bot_conv = nn.Conv2d(channels[-1], width, 1)
        for i, c in enumerate(channels[-2:0:-1], 1):  # 1 is the second coarsest
            setattr(self, f"skip_conv{i}", nn.Conv2d(c, width, 1))
        self.finest_conv = nn.Identity() if channels[0] == width else nn.Conv2d(channels[0], width, 1)
        for i in range(1, len(channels)):
            setattr(self, f"fusion{i}", SelectiveFusion(width))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        path = self.bot_conv(maps[-1])
        for i, fine in enumerate(maps[-2::-1], 1):
            skip = getattr(self, f"skip_conv{i}", self.finest_conv)(fine)
            path = getattr(self, f"fusion{i}")(skip, resize(path, like=fine))
        for _ in range(2):  # twice 2, as published: not the same as once 4
            path = resize(path, like=[2 * n for n in path.shape[-2:]])
        return path


class SelectiveFusion(nn.Module):
    """local * a0 + path * a1, the two attention maps read from both (section 3.3)."""

    def __init__(self, width: int):
        super().__init__()

        def block(a: int, b: int) -> nn.Sequential:  # the convolutions keep their bias before the norm, as published
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), BatchNorm2d(b), nn.ReLU(inplace=True))

        self.conv1 = block(2 * width, width)
        self.conv2 = block(width, width // 2)
        self.conv3 = nn.Conv2d(width // 2, 2, 3, padding=1)

    def forward(self, local: Tensor, path: Tensor) -> Tensor:
        attention = self.conv3(self.conv2(self.conv1(torch.cat([local, path], dim=1)))).sigmoid()
        return local * attention[:, :1] + path * attention[:, 1:]
