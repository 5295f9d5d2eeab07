"""How far, how evenly and how differently the heads of a ViT look.

Paper:  Park et al. 2023, "What Do Self-Supervised Vision Transformers Learn?", https://arxiv.org/abs/2305.00729 (distance,
        normalised mutual information); Zhai et al. 2023, https://arxiv.org/abs/2303.06296 (entropy)
Source: github.com/naver-ai/cl-vs-mim @ eafe516 (MIT).
Differs from the source: any number of prefix tokens, non-square grids, patches of unequal sides; images are weighted equally
whatever the batches.

Shapes: B batch, h heads, N tokens, n patches, P prefix tokens.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backbones.analysis.run import batches, evaluation, grid_of, layers, vit_of


@dataclass
class AttentionStatistics:
    """Per layer and head, means over images.

    Attributes:
        layers: numbers of the blocks, one for each row of what follows.
        distance: L h, pixels between a patch and what it looks at.
        nmi: L h, 0 where all patches look at the same place, 1 where each looks at another.
        entropy: L h, nats, over all keys, prefix tokens included.
        uniform_distance: pixels, the distance of attention that is the same everywhere.
        uniform_entropy: nats, likewise: the largest there is.
        images: how many were measured.
    """

    layers: list[int]
    distance: Tensor
    nmi: Tensor
    entropy: Tensor
    uniform_distance: float
    uniform_entropy: float
    images: int


def patch_distances(grid: tuple[int, int], patch: tuple[float, float]) -> Tensor:
    """Euclidean distances between the centres of all patches, n n; patch: height and width in pixels."""
    rows = torch.arange(grid[0], dtype=torch.float64).mul(patch[0]).repeat_interleave(grid[1])
    columns = torch.arange(grid[1], dtype=torch.float64).mul(patch[1]).repeat(grid[0])
    return torch.hypot(rows[:, None] - rows, columns[:, None] - columns)


def between_patches(attention: Tensor, prefix: int, epsilon: float = 0.0) -> Tensor:
    """The patches' part of a map B h N N, rows made to sum to one again: B h n n. epsilon: added first."""
    part = attention[:, :, prefix:, prefix:].float() + epsilon
    return part / part.sum(-1, keepdim=True).clamp_min(torch.finfo(part.dtype).tiny)


def attention_distance(attention: Tensor, prefix: int, distances: Tensor) -> Tensor:
    """Mean distance in pixels of a map B h N N, for each image and head: B h. distances: n n, see patch_distances."""
    return (between_patches(attention, prefix) * distances.to(attention.device, torch.float32)).sum(-1).mean(-1)


def attention_nmi(attention: Tensor, prefix: int) -> Tensor:
    """Mutual information of query and key patch over the root of the product of their entropies: B h, in 0..1."""
    rows = between_patches(attention, prefix, 1e-8)
    count = rows.shape[-1]
    keys = rows.mean(-2, keepdim=True)
    information = torch.xlogy(rows, rows / keys).sum((-2, -1)) / count
    entropy = -torch.xlogy(keys, keys).sum((-2, -1))
    return information / (math.log(count) * entropy).sqrt().clamp_min(1e-12)


def attention_entropy(attention: Tensor, prefix: int) -> Tensor:
    """Entropy in nats of what the patches look at, all keys counted, for each image and head: B h."""
    rows = attention[:, :, prefix:].float()
    return -torch.xlogy(rows, rows).sum(-1).mean(-1)


@torch.no_grad()
def attention_statistics(model: nn.Module, images: Tensor | Iterable, batch_size: int = 8) -> AttentionStatistics:
    """Distance, normalised mutual information and entropy of every head. One layer's maps are in memory at a time.

    Args:
        model: a timm ViT (VisionTransformer, Eva, Beit), also inside a dense predictor.
        images: n 3 H W of one size, or batches, see run.batches.
        batch_size: images at a time where `images` is a tensor.
    """
    vit = vit_of(model)
    sums: dict[int, Tensor] = {}
    seen, size, distances = 0, None, torch.empty(0)
    with evaluation(vit):
        for batch in batches(vit, images, batch_size):
            if size is None:
                size, grid = tuple(batch.shape[-2:]), grid_of(vit, batch)
                if math.prod(grid) < 2:
                    raise ValueError(f"images of {size[0]} x {size[1]} are one patch: attention has no distance there")
                distances = patch_distances(grid, (size[0] / grid[0], size[1] / grid[1]))
            if tuple(batch.shape[-2:]) != size:
                raise ValueError(f"all images must have one size, got {size} and {tuple(batch.shape[-2:])}: resize them first")
            seen += len(batch)
            for layer in layers(vit, batch):
                prefix, maps = vit.num_prefix_tokens, layer.attention
                found = (
                    attention_distance(maps, prefix, distances),
                    attention_nmi(maps, prefix),
                    attention_entropy(maps, prefix),
                )
                total = torch.stack([value.double().sum(0) for value in found]).cpu()
                sums[layer.index] = sums[layer.index] + total if layer.index in sums else total
    means = torch.stack(list(sums.values())).float() / seen
    tokens = len(distances) + vit.num_prefix_tokens
    return AttentionStatistics(
        list(sums), means[:, 0], means[:, 1], means[:, 2], distances.mean().item(), math.log(tokens), seen
    )
