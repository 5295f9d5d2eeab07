"""How alike the layers of a ViT are, and into which phases its depth falls.

Papers: Kornblith et al. 2019, https://arxiv.org/abs/1905.00414 (CKA); Nguyen et al. 2021, https://arxiv.org/abs/2010.15327
        (over minibatches, unbiased); Jacobs et al. 2025, https://arxiv.org/abs/2512.19941 (distance and phases)
Source: google-research/representation_similarity @ 10bf941 (Apache-2.0), github.com/KempnerInstitute/raptor @ ba3b53f (MIT).

Shapes: n samples, d features, L layers. Everything is done in float64: CKA is a difference of large sums.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.analysis.run import batches, evaluation, layers, vit_of

EXHAUSTIVE = 20  # layers of a cluster up to which every cut is tried, 2^19 of them


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Biased linear CKA of features n d and n e; 0-d, in 0..1."""
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    return (x.mT @ y).norm() ** 2 / ((x.mT @ x).norm() * (y.mT @ y).norm())


def hsic(features: Sequence[Tensor]) -> Tensor:
    """Unbiased HSIC_1 of every pair of layers: L L. features: for each layer n d, the same n samples, at least four.

    Raises ValueError for fewer samples.
    """
    n = len(features[0])
    if n < 4:
        raise ValueError(f"unbiased CKA needs at least 4 images in a batch, got {n}")
    grams = torch.stack([x.double() @ x.double().mT for x in features])  # L n n
    grams.diagonal(dim1=1, dim2=2).zero_()
    sums, totals = grams.sum(1), grams.sum((1, 2))
    flat = grams.flatten(1)
    result = flat @ flat.mT + totals[:, None] * totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * sums @ sums.mT
    return result / (n * (n - 3))


def cka_of(matrix: Tensor) -> Tensor:
    """HSIC of every pair of layers, L L, maybe averaged over batches, -> CKA."""
    scale = matrix.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return matrix / (scale[:, None] * scale)


def distances(tokens: Sequence[Tensor], prefix: int) -> dict[str, Tensor]:
    """Between block outputs B N C, by class token and mean patch: "cosine" and "mse" B L L, "norms" B L.

    Each is the mean over the two vectors, or the mean patch alone where there is no class token.
    """
    vectors = torch.stack([torch.stack([*([x[:, 0]] if prefix else []), x[:, prefix:].mean(1)], 1) for x in tokens], 2)
    vectors = vectors.double()  # B v L C
    unit = F.normalize(vectors, dim=-1, eps=1e-8)
    cosine = (1 - (unit @ unit.mT).clamp(-1, 1)).mean(1)
    mse = (vectors[:, :, :, None] - vectors[:, :, None]).square().mean(-1).mean(1)
    return {"cosine": cosine, "mse": mse, "norms": vectors.norm(dim=-1).mean(1)}


def best_cut(weights: Tensor) -> tuple[float, list[bool]]:
    """(weight, side of each vertex) of the heaviest cut of a graph n n; the first vertex is on side False.

    Exact up to EXHAUSTIVE vertices, the first found of equals; for more only cuts between neighbours are tried.
    """
    n = len(weights)
    if n <= EXHAUSTIVE:
        patterns = torch.arange(2 ** (n - 1))
        sides = torch.stack([patterns * 0, *((patterns >> i) & 1 for i in range(n - 1))], 1).double()
    else:
        sides = (torch.arange(n) >= torch.arange(1, n)[:, None]).double()
    cuts = ((sides @ weights) * (1 - sides)).sum(1)
    best = int(torch.nonzero(cuts >= cuts.max() - 1e-12)[0])
    return cuts[best].item(), sides[best].bool().tolist()


def phases(weights: Tensor, fraction: float = 0.2, min_size: int = 2) -> list[list[int]]:
    """Layers grouped by recursive maximum cuts of their distances L L, in the order in which the cuts found them.

    Args:
        weights: distances, e.g. "cosine" of layer_similarity.
        fraction: a cluster is cut while the last cut that made it weighs more than this share of all distances (published
            for DINOv2-B: 0.2 gives two phases, 0.1 three, 0.09 four).
        min_size: clusters of fewer than twice as many layers stay whole.
    """
    weights = weights.double().cpu()
    limit = fraction * weights.sum().item() / 2
    clusters, gains = [list(range(len(weights)))], [float("inf")]
    while (gain := max(gains)) > limit:
        chosen = gains.index(gain)
        members = clusters[chosen]
        gains[chosen] = -float("inf")
        if len(members) < 2 * min_size:
            continue
        cut, sides = best_cut(weights[members][:, members])
        if cut <= limit:
            continue
        clusters[chosen] = [m for m, side in zip(members, sides, strict=True) if not side]
        clusters.append([m for m, side in zip(members, sides, strict=True) if side])
        gains[chosen] = cut
        gains.append(cut)
    return clusters


@dataclass
class Similarity:
    """Of the outputs of all blocks.

    Attributes:
        layers: numbers of the blocks.
        cka: L L, unbiased, minibatch; a sample is the mean patch of an image (or its class token).
        cosine: L L, 1 - cosine, mean over images and over class token and mean patch.
        mse: L L, likewise.
        norms: L, likewise.
        images: how many were measured.
    """

    layers: list[int]
    cka: Tensor
    cosine: Tensor
    mse: Tensor
    norms: Tensor
    images: int


@torch.no_grad()
def layer_similarity(model: nn.Module, images: Tensor | Iterable, sample: str = "patches", batch_size: int = 16) -> Similarity:
    """CKA and distances between all blocks of a ViT.

    Args:
        model: a timm ViT (VisionTransformer, Eva, Beit), also inside a dense predictor.
        images: n 3 H W, at least four, or batches of at least four, see run.batches; the rest of `images` that is smaller
            than four counts for the distances alone.
        sample: "patches" takes the mean patch of an image as its feature for CKA, "class" its class token.
        batch_size: images at a time where `images` is a tensor; CKA averages over batches.
    """
    vit = vit_of(model)
    prefix = vit.num_prefix_tokens
    if sample not in ("patches", "class"):
        raise ValueError(f"sample must be 'patches' or 'class', got {sample!r}")
    if sample == "class" and not prefix:
        raise ValueError("this model has no class token; use sample='patches'")
    sums: dict[str, Tensor] = {}
    compared = seen = 0
    with evaluation(vit):
        for batch in batches(vit, images, batch_size):
            found = list(layers(vit, batch))
            tokens = [layer.tokens for layer in found]
            values = {key: value.sum(0) for key, value in distances(tokens, prefix).items()}
            seen += len(batch)
            if len(batch) >= 4:
                features = [x[:, 0] if sample == "class" else x[:, prefix:].mean(1) for x in tokens]
                values["hsic"] = hsic(features) * len(batch)
                compared += len(batch)
            for key, value in values.items():
                sums[key] = sums[key] + value.cpu() if key in sums else value.cpu()
    if not compared:
        raise ValueError(f"CKA compares images: it needs at least 4 in a batch, got {seen}")
    means = {key: (value / seen).float() for key, value in sums.items() if key != "hsic"}
    cka = cka_of(sums["hsic"] / compared).float()
    return Similarity([layer.index for layer in found], cka, means["cosine"], means["mse"], means["norms"], seen)
