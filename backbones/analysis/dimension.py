"""How many dimensions the patch tokens of each block use.

Paper:  effective embedding dimension, https://arxiv.org/abs/2512.07331 (uncentred; the formula as its summaries give it);
        centred it is the effective rank of Roy and Vetterli 2007 with squared singular values.

Shapes: n tokens, C channels, L blocks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backbones.analysis.run import batches, evaluation, layers, vit_of


@dataclass
class EffectiveDimension:
    """Per block: exp of the entropy of the spectrum of the tokens' second moment, between 1 and C.

    Attributes:
        layers: numbers of the blocks.
        uncentred: L, dominated by the mean token and by massive activations.
        centred: L, with the mean token removed.
        channels: C, the largest there can be.
        tokens: how many patch tokens were measured.
    """

    layers: list[int]
    uncentred: Tensor
    centred: Tensor
    channels: int
    tokens: int


def spectral_entropy(moment: Tensor) -> Tensor:
    """Entropy in nats of the eigenvalues of a second moment C C, as shares of their sum; 0-d."""
    values = torch.linalg.eigvalsh(moment.double()).clamp_min(0)
    shares = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return -torch.xlogy(shares, shares).sum()


@torch.no_grad()
def effective_dimension(model: nn.Module, images: Tensor | Iterable, batch_size: int = 8) -> EffectiveDimension:
    """Effective dimension of the patch tokens of all images, block by block; sums are kept in float64, C C for each block.

    Args:
        model: a timm ViT (VisionTransformer, Eva, Beit), also inside a dense predictor.
        images: n 3 H W, or batches, see run.batches.
        batch_size: images at a time where `images` is a tensor.
    """
    vit = vit_of(model)
    moments: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}
    count = 0
    with evaluation(vit):
        for batch in batches(vit, images, batch_size):
            for layer in layers(vit, batch):
                tokens = layer.tokens[:, vit.num_prefix_tokens :].flatten(0, 1).double()
                moment, total = tokens.mT @ tokens, tokens.sum(0)
                moments[layer.index] = moments[layer.index] + moment if layer.index in moments else moment
                sums[layer.index] = sums[layer.index] + total if layer.index in sums else total
            count += len(tokens)
    if count < 2:
        raise ValueError("one patch token has no spectrum: give more or larger images")
    plain, centred = [], []
    for index, moment in moments.items():
        mean = sums[index] / count
        plain.append(spectral_entropy(moment / count).exp())
        centred.append(spectral_entropy(moment / count - mean[:, None] * mean).exp())
    return EffectiveDimension(list(moments), torch.stack(plain).cpu(), torch.stack(centred).cpu(), len(mean), count)
