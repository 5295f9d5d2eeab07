"""PolyMaX: k-means clusters that each carry a value, so that one head serves classes, depth and surface normals.

Paper:  Yang et al. 2024, https://arxiv.org/abs/2311.05770. Its authors published no code: this follows the paper, on the exact
        kMaX-DeepLab of heads/kmax.py, and no published file loads into it.

Shapes: B batch, N clusters, K values of a cluster.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kmax import ClusterHead


class PolyMax(ClusterHead):
    """Axial pixel decoder and k-means layers; a pixel's value is the mean of the clusters' values by its shares of them.

    `forward` returns {"map": B K h w at the finest map's size, "layers": the same of each k-means layer, which are trained with
    the same loss (section 3.3)}.

    Arguments are those of `ClusterHead`; `out_channels` is K: classes, 1 for depth, 3 for normals.
    """

    returns_layers = True
    void = False

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Any]:
        output = super().forward(maps)
        return {"map": mixed(output), "layers": [mixed(prediction) for prediction in output["aux"]]}

    def scores(self, output: dict[str, Any] | Tensor) -> Tensor:
        """The last map, of what `forward` returned or by itself."""
        return output if isinstance(output, Tensor) else output["map"]


def mixed(prediction: dict[str, Tensor]) -> Tensor:
    """B K h w: the clusters' values by each pixel's shares of the clusters (eq. 4)."""
    return torch.einsum("bnk,bnhw->bkhw", prediction["class_logits"], prediction["mask_logits"].softmax(1))
