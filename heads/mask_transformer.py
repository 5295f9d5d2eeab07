"""Mask transformer with k-means cross-attention, plain torch.

Papers: kMaX-DeepLab (Yu et al. 2022, https://arxiv.org/abs/2207.04044, section 3.2) for the update of the cluster centres,
PolyMaX (Yang et al. 2023, https://arxiv.org/abs/2311.05770, section 3.2) for one head on segmentation and depth.
Differs from kMaX: the assignment of pixels to clusters gets its gradient straight through softmax, where the authors supervise
every layer's masks; so one loss on the output trains all of it, under any task.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Head
from .blocks import ConvNormAct, top_down


class MaskTransformer(Head):
    """A pixel decoder (feature pyramid) and `queries` cluster centres that are refined on its maps, coarse to fine.

    Every pixel of the finest map is a mixture of clusters (softmax over the centres), and every centre carries one output
    vector: the result is their product, so logits or depths are shared within a cluster (PolyMaX, section 3.2).

    channels: of each map, finest first, any number of levels; out_channels: classes, or what the depth rule reads.
    width: of the pixel decoder and the centres; queries: how many centres; depth: k-means layers on each map but the finest.
    heads: of the self-attention among centres; they divide the width.
    """

    pyramid = True

    def __init__(
        self, channels: Sequence[int], out_channels: int, width: int = 256, queries: int = 128, depth: int = 2, heads: int = 8
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"mask_transformer: width {width} is not divisible by {heads} heads")
        self.lateral = nn.ModuleList(ConvNormAct(c, width, act=False) for c in channels)
        self.smooth = nn.ModuleList(ConvNormAct(width, width, 3) for _ in channels)
        self.queries = nn.Parameter(torch.randn(queries, width))
        steps = max(1, len(channels) - 1)
        self.layers = nn.ModuleList(
            nn.ModuleList(KMeansLayer(width, heads) for _ in range(depth)) for _ in range(steps)
        )  # coarse to fine
        self.norm = nn.LayerNorm(width)
        self.mask_query = nn.Linear(width, width)
        self.mask_pixel = nn.Conv2d(width, width, 1)
        self.predict = nn.Linear(width, out_channels)

    def get_classifier(self) -> nn.Module:
        return self.predict

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # [B C_i H_i W_i] -> B K H_0 W_0
        maps = top_down([lateral(m) for lateral, m in zip(self.lateral, maps, strict=True)])
        maps = [smooth(m) for smooth, m in zip(self.smooth, maps, strict=True)]
        centres = self.queries.expand(len(maps[0]), -1, -1)  # B N C
        for layers, pixels in zip(self.layers, reversed(maps[1:] or maps), strict=True):
            for layer in layers:
                centres = layer(centres, pixels)
        centres = self.norm(centres)
        mixture = similarity(self.mask_query(centres), self.mask_pixel(maps[0])).softmax(1)  # B N H W
        return torch.einsum("bnhw,bnk->bkhw", mixture, self.predict(centres))


class KMeansLayer(nn.Module):
    """One k-means step on the pixels, then self-attention and an MLP among the centres; pre-norm residuals."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_centre, self.norm_update = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.update = nn.Linear(width, width)
        self.norm_self = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, centres: Tensor, pixels: Tensor) -> Tensor:  # B N C, B C H W -> B N C
        centres = centres + self.kmeans(centres, pixels)
        batch, count, width = centres.shape
        qkv = self.qkv(self.norm_self(centres)).view(batch, count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each B heads N C / heads
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, width)
        centres = centres + self.proj(attended)
        return centres + self.mlp(centres)

    def kmeans(self, centres: Tensor, pixels: Tensor) -> Tensor:
        """argmax over the CENTRES of q k^T, times v (kMaX, section 3.2): each pixel belongs to one centre, each centre receives
        the sum of its pixels. The norm after it makes sum and mean the same, so the number of pixels does not matter."""
        soft = similarity(self.query(self.norm_centre(centres)), self.key(pixels)).flatten(2).softmax(1)  # B N HW
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
        assignment = hard + soft - soft.detach()  # value: hard; gradient: of soft
        return self.update(self.norm_update(assignment @ self.value(pixels).flatten(2).mT))


def similarity(centres: Tensor, pixels: Tensor) -> Tensor:
    """Scaled inner products: B N C and B C H W -> B N H W."""
    return torch.einsum("bnc,bchw->bnhw", centres, pixels) * centres.shape[-1] ** -0.5
