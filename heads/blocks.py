"""What two or more heads share. Sizes come from tensors, never from a backbone's stated strides."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn


def resize(x: Tensor, like: Tensor | Sequence[int], align_corners: bool = False, mode: str = "bilinear") -> Tensor:
    """Resize x to the height and width of `like`.

    Args:
        x: B C h w.
        like: a tensor, whose last two sizes are read, or (H, W).
        align_corners: of the interpolation.
        mode: of the interpolation.
    """
    size = tuple(like.shape[-2:]) if isinstance(like, Tensor) else tuple(like)
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode=mode, align_corners=None if mode == "nearest" else align_corners)


def resize_double(x: Tensor) -> Tensor:
    """x (B C h w) at exactly twice its size, corners aligned: the up-sampling step of every DPT."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that uses its running statistics where a batch has a single value per channel.

    torch raises there; a pooled 1 x 1 map of one image (pyramid pooling, micro-batch of 1) would stop training.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, ReLU: `conv`, `bn`, the names of mmsegmentation's checkpoints.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: odd; the size of the map stays.
        act: with the ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, act: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor | Sequence[Tensor], align_corners: bool = False) -> Tensor:  # B C H W -> B C' H W
        """A list of maps means `fuse(x, align_corners)`, for less work and memory."""
        x = self.conv(x) if isinstance(x, Tensor) else conv_over(self.conv, x, align_corners)
        return self.act(self.bn(x))


class Pyramid(nn.Module):
    """Maps of one size -> the same number of maps at 4, 2, 1 and 1/2 times that size (ViTDet, Li et al. 2022, section 3).

    channels: of each incoming map. Level i is made from map i (from the last one where there are fewer than four), so a ViT
    with 16-pixel patches yields strides 4, 8, 16, 32. `channels` of the result: C/4, C/2, C, C (rounded up to a multiple of 8).
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        c = [channels[min(i, len(channels) - 1)] for i in range(4)]
        half, quarter = [round_up(c[0], 2), round_up(c[1], 2)], round_up(c[0], 4)
        self.channels = [quarter, half[1], c[2], c[3]]
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(c[0], half[0], 2, 2),
                    LayerNorm2d(half[0]),
                    nn.GELU(),
                    nn.ConvTranspose2d(half[0], quarter, 2, 2),
                ),
                nn.ConvTranspose2d(c[1], half[1], 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, 2, ceil_mode=True),  # ceil: a 1 x 1 map stays one
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(maps[min(i, len(maps) - 1)]) for i, level in enumerate(self.levels)]


def round_up(channels: int, divisor: int) -> int:
    """channels / divisor, rounded up to a multiple of 8 (group counts and vector widths like it)."""
    return -(-channels // (8 * divisor)) * 8


def top_down(maps: Sequence[Tensor], align_corners: bool = False, mode: str = "bilinear") -> list[Tensor]:
    """Feature pyramid sum (Lin et al. 2017): each map plus the resized sum of all coarser ones. Finest first, in and out."""
    sums = [maps[-1]]
    for fine in reversed(maps[:-1]):
        sums.insert(0, fine + resize(sums[0], like=fine, align_corners=align_corners, mode=mode))
    return sums


def conv_over(conv: nn.Conv2d, maps: Sequence[Tensor], align_corners: bool = False) -> Tensor:
    """conv(fuse(maps)) for a convolution without stride, padded to keep the size: B K H_0 W_0.

    A resize is linear and treats all channels alike, so it can follow the products of each tap of the kernel instead of
    preceding them: a map of half the size then costs a quarter of the multiply-adds. The resize of the taps, their shift to
    their place in the kernel (zeros come in at the border, as the padding does) and their sum are two matrix products.
    """
    size, (high, wide) = tuple(maps[0].shape[-2:]), conv.kernel_size
    weights = conv.weight.split([m.shape[1] for m in maps], dim=1)
    same = [i for i, m in enumerate(maps) if tuple(m.shape[-2:]) == size]
    x = torch.cat([maps[i] for i in same], dim=1) if len(same) > 1 else maps[0]
    out = F.conv2d(x, torch.cat([weights[i] for i in same], dim=1), conv.bias, padding=conv.padding)
    tall, columns = [], []  # taps at the new height, and what brings them to the new width
    for i in range(len(maps)):
        if i in same:
            continue
        taps = F.conv2d(maps[i], weights[i].permute(3, 0, 2, 1).flatten(0, 2)[..., None, None])  # B (wide K high) h w
        if high == wide == 1:
            out += resize(taps, size, align_corners)
            continue
        rows = shifted_resize(maps[i].shape[-2], size[0], high, align_corners, taps)  # high h H
        taps = rows.permute(2, 0, 1).flatten(1) @ taps.unflatten(1, (wide, -1, high)).flatten(3, 4)  # B wide K H w
        tall += taps.unbind(1)
        columns.append(shifted_resize(maps[i].shape[-1], size[1], wide, align_corners, taps).flatten(0, 1))  # (wide w) W
    if tall:
        out += torch.cat(tall, dim=-1) @ torch.cat(columns)  # one product for all maps: a sum that half precision rounds once
    return out


def shifted_resize(old: int, new: int, kernel: int, align_corners: bool, like: Tensor) -> Tensor:
    """kernel x old x new: the weight of each old pixel in the new one that a tap of a centred kernel reads, 0 outside.

    Args:
        old: pixels of the side before the resize.
        new: pixels after it.
        kernel: taps of the convolution.
        align_corners: of the resize.
        like: a tensor whose device and type the weights get.
    """
    weights = F.interpolate(torch.eye(old, device=like.device)[None], size=new, mode="linear", align_corners=align_corners)[0]
    weights = F.pad(weights, (kernel // 2, kernel // 2)).to(like.dtype)
    return torch.stack([weights[:, i : i + new] for i in range(kernel)])


def fuse(maps: Sequence[Tensor], align_corners: bool = False) -> Tensor:
    """All maps at the size of the first, concatenated: B sum(C) H_0 W_0."""
    return torch.cat([resize(m, like=maps[0], align_corners=align_corners) for m in maps], dim=1)
