"""PolyMaX: k-means clusters that each carry a value, so that one head serves classes, depth and surface normals.

Paper:  Yang et al. 2024, https://arxiv.org/abs/2311.05770. Its authors published no code: this follows the paper, on the exact
        kMaX-DeepLab of heads/kmax.py, and no published file loads into it.

Shapes: B batch, N clusters, K values of a cluster.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Head
from .kmax import LEVELS, KMeansDecoder, PixelDecoder


class PolyMax(Head):
    """Axial pixel decoder and k-means layers; a pixel's value is the mean of the clusters' values by its shares of them.

    `forward` returns {"map": B K h w at the finest map's size, "layers": the same of each k-means layer, which are trained with
    the same loss (section 3.3)}.

    Args:
        channels: of each map, finest first.
        out_channels: K: classes, 1 for depth, 3 for normals.
        queries: N.
        widths: of the pixel decoder's stages, coarsest first; a stage gives 4 times its width.
        blocks: of each stage.
        layers: k-means layers on each of the three coarsest maps.
        base: widths of the k-means layers are 1 and 2 times this.
        ffn: hidden width of their MLPs.
        heads: of their self-attention.
        head_width: width of the convolutions before the masks.
        embedding: channels that pixels and mask kernels are compared in.
        drop_path: of the three residuals of a k-means layer.
        axial: how many of the coarsest stages are axial.
    """

    pyramid = True
    returns_names = True
    returns_layers = True

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        queries: int = 128,
        widths: Sequence[int] = (512, 256, 128, 64, 32),
        blocks: Sequence[int] = (1, 5, 1, 1, 1),
        layers: Sequence[int] = (2, 2, 2),
        base: int = 128,
        ffn: int = 2048,
        heads: int = 8,
        head_width: int = 256,
        embedding: int = 128,
        drop_path: float = 0.2,
        axial: int = 2,
    ):
        super().__init__()
        levels = len(channels)
        widths = [*widths, *[widths[-1]] * (levels - len(widths))][:levels]
        blocks = [*blocks, *[blocks[-1]] * (levels - len(blocks))][:levels]
        self.pixel_decoder = PixelDecoder(channels[::-1], widths, blocks, axial)
        outputs = [4 * width for width in widths]
        self.predictor = KMeansDecoder(
            [*outputs[:LEVELS], outputs[-1]],
            out_channels,
            queries=queries,
            layers=layers[: min(levels, LEVELS)],
            base=base,
            ffn=ffn,
            heads=heads,
            head_width=head_width,
            embedding=embedding,
            drop_path=drop_path,
            aux=None,
            void=False,
        )
        self.layers = len(self.predictor.level)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Every layer that depends on K: one a prediction."""
        return tuple(self.predictor.classifiers())

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Any]:
        stages = self.pixel_decoder(maps[::-1])
        output = self.predictor([*stages[:LEVELS], stages[-1]], maps)
        return {"map": mixed(output), "layers": [mixed(prediction) for prediction in output["aux"]]}

    def scores(self, output: dict[str, Any] | Tensor) -> Tensor:
        """The last map, of what `forward` returned or by itself."""
        return output if isinstance(output, Tensor) else output["map"]


def mixed(prediction: dict[str, Tensor]) -> Tensor:
    """B K h w: the clusters' values by each pixel's shares of the clusters (eq. 4)."""
    return torch.einsum("bnk,bnhw->bkhw", prediction["class_logits"], prediction["mask_logits"].softmax(1))
