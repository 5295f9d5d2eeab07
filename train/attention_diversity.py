"""Attention diversification: a loss that keeps the tokens of a ViT from all looking at the same few."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention_diversification(attentions: Sequence[Tensor], threshold: float = 2.0) -> Tensor:
    """Cosine similarity of each query's attention with the average query's, over all layers (Guo et al. 2023, eq. 6).

    attentions: a layer's softmax attention each, B heads N N, rows the queries; threshold: entries up to threshold / N are
    taken for zero, in the maps and in the average. Heads are averaged first. Returns a 0-d tensor, the mean over queries,
    images and layers; it is to be lowered. Raises ValueError if there are no attentions.
    """
    if not len(attentions):
        raise ValueError("no attention was read: attention diversification needs a model with softmax attention")
    total = attentions[0].new_zeros((), dtype=torch.float32)
    for attention in attentions:
        maps = attention.float().mean(1)  # B N N
        average = maps.mean(1, keepdim=True)
        least = threshold / maps.shape[-1]
        maps, average = (x * (x > least) for x in (maps, average))
        total = total + F.cosine_similarity(average, maps, dim=-1).mean()
    return total / (len(attentions) + 1e-6)


@contextlib.contextmanager
def reading_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, every forward adds its layers' softmax attention (B heads N N, with gradient) to the list that this gives.

    Read where timm's attentions, and those written like them, pass it through `attn_drop`; they compute it unfused meanwhile,
    which costs the memory of the attention matrices. ValueError if the model has no such module.
    """
    found: list[Any] = [m for m in model.modules() if hasattr(m, "fused_attn") and hasattr(m, "attn_drop")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention that can be read (no fused_attn and attn_drop as timm's)")
    read: list[Tensor] = []
    before = [module.fused_attn for module in found]

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        read.append(output)

    handles = [module.attn_drop.register_forward_hook(keep) for module in found]
    try:
        for module in found:
            module.fused_attn = False
        yield read
    finally:
        for module, fused in zip(found, before):
            module.fused_attn = fused
        for handle in handles:
            handle.remove()
