"""kMaX-DeepLab's ConvNeXt: zeros around the image and beside every map before a convolution cuts it into patches.

So a side of n pixels gives ceil(n / 4) rows instead of floor, and no size equals timm's maps. Names and shapes of the weights
do not change.
"""

from typing import Any

import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn


def pad_patches(model: Any) -> Any:
    """Make a timm ConvNeXt pad as bytedance/kmax-deeplab @ f8e1d04 does, in place; returns the model.

    Raises ValueError for another model, or one whose stem is not a single 4x4 convolution.
    """
    if (
        not isinstance(model, ConvNeXt)
        or type(model.stem) not in (nn.Sequential, PaddedStem)
        or model.stem[0].kernel_size != (4, 4)
    ):
        raise ValueError(f"pad_patches is for timm's ConvNeXts with a stem of 4x4 patches, not for {type(model).__name__}")
    # the classes are changed in place because timm builds a model by its name alone
    model.stem.__class__ = PaddedStem
    for stage in model.stages:
        if isinstance(stage.downsample, nn.Sequential):
            stage.downsample.__class__ = PaddedDownsample
    return model


class PaddedStem(nn.Sequential):
    """One row and column of zeros above and to the left, two below and to the right."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 2, 1, 2)))


class PaddedDownsample(nn.Sequential):
    """One row and column of zeros below and to the right, before the norm, which turns them into its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))
