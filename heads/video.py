"""Depth and the motion of the camera from frames of a video: two networks that are trained as one model.

Source: monodepth2 (Godard et al. 2019, https://arxiv.org/abs/1806.01260; written from its behaviour). Any timm model may be the
encoder of either network; the published ones are `resnet18`, and Lite-Mono's for depth.

Shapes: B batch, C channels, H W image, S pairs of frames.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .disparity import DisparityDecoder, PoseDecoder
from .features import FeatureBackbone
from .model import DensePredictor


class PoseNetwork(nn.Module):
    """Two images in temporal order -> the motion between them: axis-angle and translation, both B 3.

    Args:
        backbone: timm name of the encoder, built for twice the channels; pretrained weights of its first layer are repeated and
            halved.
        pretrained: load the encoder's released weights.
        in_chans: channels of one image.
        width: of the decoder's hidden convolutions.
        backbone_args: of `timm.create_model`.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        pretrained: bool = False,
        in_chans: int = 3,
        width: int = 256,
        backbone_args: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.encoder = FeatureBackbone(backbone, pretrained, in_chans=2 * in_chans, **(backbone_args or {}))
        self.decoder = PoseDecoder(self.encoder.channels[-1], width=width)

    def forward(self, pair: Tensor) -> tuple[Tensor, Tensor]:  # B 2C H W -> B 3, B 3
        last = self.encoder(pair)[-1]
        axis, shift = self.decoder(last if isinstance(last, Tensor) else last[0])
        return axis[:, 0], shift[:, 0]  # of two predicted motions published training reads the first


class VideoPredictor(DensePredictor):
    """A `DensePredictor` of disparities with a pose network beside it.

    Called with images alone it is the depth network: the finest disparity B 1 H W in evaluation.

    Args:
        pose: the pose network; None where the motions are known.
        args: of `DensePredictor`; the head gives disparities (monodepth2, lite_mono).
    """

    def __init__(self, *args: Any, pose: PoseNetwork | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.head, DisparityDecoder):
            raise ValueError(
                f"depth from video needs a head with disparities (monodepth2, lite_mono), got {type(self.head).__name__}"
            )
        self.pose = pose

    def forward(self, images: Tensor, pairs: Tensor | None = None, *, named: bool = False) -> Any:
        """With pairs B S 2C H W also {"disparities": finest first, "motions": [(axis-angle, translation)] of the S pairs}."""
        if pairs is None:
            return super().forward(images, named=named)
        found = self.outputs(images)["main"]
        motions = [] if self.pose is None else [self.pose(pair) for pair in pairs.unbind(1)]
        return {"disparities": found["disparities"], "size": found["size"], "motions": motions}


def blended(disparity: Tensor, mirrored: Tensor) -> Tensor:
    """The disparity B 1 H W and that of the mirrored image, mirrored back: their mean, and near a border the one that saw more.

    The post-processing of monodepth (Godard et al. 2017, section 3.3): the left 5 % of the columns come from the mirrored
    image, the right 5 % from the plain one.
    """
    width = disparity.shape[-1]
    place = torch.linspace(0, 1, width, device=disparity.device, dtype=disparity.dtype)
    left = 1 - (20 * (place - 0.05)).clamp(0, 1)
    right = left.flip(0)
    return right * disparity + left * mirrored + (1 - left - right) * (disparity + mirrored) / 2
