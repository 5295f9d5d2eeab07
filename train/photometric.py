"""Depth without labels: the losses of view synthesis.

Written from the published behaviour of monodepth2 (Godard et al. 2019, https://arxiv.org/abs/1806.01260, eq. 1-5).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.geometry import disparity_to_depth, scaled_camera, warp

Frame = int | str  # -1, 1: the frames before and after; "s": the other camera of a stereo pair


def dissimilarity(a: Tensor, b: Tensor) -> Tensor:
    """(1 - SSIM) / 2 of images B C H W in 0..1, over 3x3 windows, cut to 0..1."""
    a, b = F.pad(a, (1, 1, 1, 1), "reflect"), F.pad(b, (1, 1, 1, 1), "reflect")

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    first, second = 0.01**2, 0.03**2
    above = (2 * mean_a * mean_b + first) * (2 * covariance + second)
    below = (mean_a**2 + mean_b**2 + first) * (variance_a + variance_b + second)
    return ((1 - above / below) / 2).clamp(0, 1)


def photometric(prediction: Tensor, target: Tensor, ssim: bool = True) -> Tensor:
    """Difference of two images B C H W as a map B 1 H W: 0.85 of dissimilarity and 0.15 of L1, or L1 alone."""
    plain = (prediction - target).abs().mean(1, keepdim=True)
    if not ssim:
        return plain
    return 0.85 * dissimilarity(prediction, target).mean(1, keepdim=True) + 0.15 * plain


def smoothness(disparity: Tensor, image: Tensor) -> Tensor:
    """Mean slope of the disparity B 1 H W, less where the image B C H W has edges (eq. 3); 0-d."""

    def slope(x: Tensor, dim: int) -> Tensor:
        return x.diff(dim=dim).abs()

    total = disparity.new_zeros(())
    for dim in (3, 2):
        total = total + (slope(disparity, dim) * (-slope(image, dim).mean(1, keepdim=True)).exp()).mean()
    return total


@dataclass(frozen=True)
class ViewSynthesis:
    """Each pixel of the target compared with the source frames seen from its place; the best of them counts.

    Args:
        min_depth, max_depth: what disparities of 1 and 0 mean.
        auto_mask: pixels that look better in the source as it is (moving with the camera, no texture) do not count.
        ssim: compare by SSIM and L1; off: L1.
        average: mean over the source frames instead of the best of them.
        own_size: warp at the size of each disparity instead of the images' (monodepth v1).
        smooth: weight of the smoothness term at the finest disparity; halved at each coarser one.
        align_corners: of the sampling (train.geometry.warp).
    """

    min_depth: float = 0.1
    max_depth: float = 100.0
    auto_mask: bool = True
    ssim: bool = True
    average: bool = False
    own_size: bool = False
    smooth: float = 1e-3
    align_corners: bool = True

    def scale(
        self,
        index: int,
        disparity: Tensor,
        target: Sequence[Tensor],
        sources: Mapping[Frame, Sequence[Tensor]],
        motions: Mapping[Frame, Tensor],
        camera: Tensor,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(photometric, smoothness) means of one disparity, the second with its weight.

        Args:
            index: how often the disparity's size was halved.
            disparity: B 1 h w.
            target: the image at the full size and at every smaller one that is read.
            sources: the other frames, likewise.
            motions: target to each source.
            camera: B 3 3 at the full size.
            noise: normal numbers that break ties between frames as they are, B sources H W (1 if averaged).
        """
        level = index if self.own_size else 0
        image = target[level]
        size = image.shape[-2:]
        full = F.interpolate(disparity, size=size, mode="bilinear", align_corners=False)
        depth = disparity_to_depth(full, self.min_depth, self.max_depth)
        matrix = scaled_camera(camera, target[0].shape[-2:], size)
        warped = [warp(frames[level], depth, matrix, motions[name], self.align_corners) for name, frames in sources.items()]
        losses = self.compare(warped, image)
        if self.auto_mask:
            still = self.compare([frames[level] for frames in sources.values()], image)
            losses = torch.cat([still if noise is None else still + 1e-5 * noise, losses], 1)
        norm = disparity / (disparity.mean((2, 3), keepdim=True) + 1e-7)
        smooth = self.smooth / 2**index * smoothness(norm, target[index])
        return losses.amin(1).mean(), smooth

    def compare(self, images: Sequence[Tensor], target: Tensor) -> Tensor:
        """Photometric maps of several images, B n H W (B 1 H W if averaged)."""
        maps = torch.cat([photometric(image, target, self.ssim) for image in images], 1)
        return maps.mean(1, keepdim=True) if self.average else maps

    def __call__(
        self,
        disparities: Sequence[Tensor],
        target: Sequence[Tensor],
        sources: Mapping[Frame, Sequence[Tensor]],
        motions: Mapping[Frame, Tensor],
        camera: Tensor,
        noise: Callable[[int, tuple[int, ...]], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The terms "photometric" and "smoothness", each the mean over the disparities (finest first); arguments as in `scale`.

        noise: scale, shape -> normal numbers.
        """
        terms = []
        count = 1 if self.average else len(sources)
        for index, disparity in enumerate(disparities):
            height, width = target[index if self.own_size else 0].shape[-2:]
            drawn = noise(index, (len(disparity), count, height, width)) if noise and self.auto_mask else None
            terms.append(self.scale(index, disparity, target, sources, motions, camera, drawn))
        first, second = zip(*terms, strict=True)
        return {"photometric": torch.stack(first).mean(), "smoothness": torch.stack(second).mean()}


def halved(image: Tensor, times: int) -> list[Tensor]:
    """The image B C H W and `times` copies, each of half the size of the one before (area mean)."""
    found = [image]
    for _ in range(times):
        height, width = found[-1].shape[-2:]
        found.append(F.interpolate(found[-1], size=(max(height // 2, 1), max(width // 2, 1)), mode="area"))
    return found
