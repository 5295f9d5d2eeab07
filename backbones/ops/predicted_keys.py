"""Attention of each query to a few keys that a low-rank estimate of the attention map chose (Sparsifiner).

Computed densely under a mask, as the authors do. Nothing here has weights: `backbones/sparsifiner.py` holds them.

Shapes: B batch, h heads, N tokens with the class token first, n those of them that are left, d head width, r reduced tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from backbones.layers import sdpa
from backbones.tracing import leaf
from weights.resample import is_open, resample_predictor


class Rule(NamedTuple):
    """How keys are chosen from the estimate of an attention map; fields as in `backbones.sparsifiner.MaskPredictor`."""

    scale: float
    keep_rate: float
    basis_threshold: float
    coef_top: int
    coef_threshold: float
    score_threshold: float | None


@leaf
def choose_keys(
    q: Tensor,
    k: Tensor,
    down: Tensor,
    back: Tensor,
    rule: Rule,
    native: tuple[int, int],
    grid: tuple[int, int],
    kept: Tensor | None,
    alive: Tensor | None,
    raw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The keys of each patch query.

    Args:
        q: reduced queries of the patches, B h n-1 d'.
        k: reduced keys, B h n d'.
        down: N r, sums the keys; made for `native`, resampled for `grid`.
        back: N r, the basis of the estimate; likewise.
        rule: of the choice.
        native: (rows, columns) of patches for which down and back are made.
        grid: (rows, columns) of patches of these images.
        kept: B n, which of the N tokens are in q and k where the dropped ones are not; None for all.
        alive: B N bool, which tokens count where the dropped ones are still in q and k; None for all.
        raw: signed basis and all coefficients, as while the estimate is trained to reconstruct attention.

    Returns mask B h n-1 n (bool), scores of the same shape, coefficients B h n-1 r, basis.
    """
    down, basis = fit_matrices(down, back, native, grid)
    budget = 0 if is_open(grid) else math.ceil(rule.keep_rate * (1 + grid[0] * grid[1]))
    if kept is not None:
        down, basis = down[kept][:, None], basis[kept][:, None]  # B 1 n r
        budget = min(budget, kept.shape[1] - 1)
    if alive is not None:
        q, k = q * alive[:, None, 1:, None], k * alive[:, None, :, None]
        budget = min(budget, int(alive[0, 1:].sum()))
    coef = (q @ (k.mT @ down) * rule.scale).softmax(-1)
    if not raw:
        basis = basis.abs()
        basis = basis * (basis > rule.basis_threshold)
        coef = strongest(coef, rule)
    scores = coef @ basis.mT
    chosen = scores.detach()  # no gradient passes the choice
    if alive is not None:
        chosen = chosen.masked_fill(~alive[:, None, None], -math.inf)
    if rule.score_threshold is not None:
        return chosen > rule.score_threshold, scores, coef, basis
    if is_open(grid):  # a budget that depends on the size is a tensor
        count = torch.ones_like(basis[..., 0], dtype=torch.float64).sum(-1, keepdim=True)
        ranks = chosen.argsort(dim=-1, descending=True).argsort(dim=-1)
        return ranks < (rule.keep_rate * count).ceil(), scores, coef, basis
    index = chosen.topk(budget, dim=-1, sorted=False).indices
    return torch.zeros_like(chosen, dtype=torch.bool).scatter(-1, index, True), scores, coef, basis


def strongest(coef: Tensor, rule: Rule) -> Tensor:
    """Coefficients with the weak ones zero, not renormalised."""
    if not rule.coef_top:
        return coef * (coef > rule.coef_threshold) if rule.coef_threshold > 0 else coef
    values, index = coef.topk(min(rule.coef_top, coef.shape[-1]), dim=-1)
    return torch.zeros_like(coef).scatter(-1, index, values)


def fit_matrices(down: Tensor, back: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A predictor's matrices proj_n and proj_back_n, made for the grid `native`, for another.

    The first sums over keys: with more patches each counts less. The second holds scores of single keys, whose thresholds keep
    their meaning only if it is not rescaled.

    Args:
        down: proj_n, N r.
        back: proj_back_n, N r.
        native: (rows, columns) of patches for which they are made.
        grid: (rows, columns) for which they are wanted.
    """
    if not is_open(grid) and tuple(grid) == tuple(native):
        return down, back
    return resample_predictor(down, grid, True, native), resample_predictor(back, grid, False, native)


@leaf
def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, may_be_empty: bool) -> Tensor:
    """Attention under a mask.

    Args:
        q: B h m d.
        k: B h n d.
        v: B h n d.
        mask: B h m n bool, True where a key is attended to.
        scale: of the products.
        may_be_empty: some queries may have no key; they give zeros, not NaN.
    """
    if not may_be_empty:
        bias = torch.where(mask, q.new_zeros(()), q.new_full((), -math.inf))  # the kernel's own way from bool costs twice this
        return sdpa(q, k, v, bias, scale)
    some = mask.any(-1, keepdim=True)
    return sdpa(q, k, v, mask | ~some, scale) * some


@leaf
def class_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropped: int) -> tuple[Tensor, Tensor]:
    """The class token's attention to all that is left: output B h 1 d and weights B h 1 n.

    Args:
        q: B h 1 d.
        k: B h n d.
        v: B h n d.
        scale: of the products.
        dropped: how many tokens were dropped. In the source they have zero keys and values, so each still takes exp(0) of the
            softmax's sum.
    """
    scores = q @ k.mT * scale
    if dropped:
        scores = torch.cat([scores, scores.new_full((*scores.shape[:-1], 1), math.log(dropped))], -1)
    attention = scores.softmax(-1)[..., : k.shape[2]]
    return attention @ v, attention
