"""Attention by ReLU: no softmax, a gated norm after it keeps the scale. For training from scratch.

Paper:  Zhang, Titov and Sennrich 2021, "Sparse Attention with Linear Units", https://arxiv.org/abs/2104.07012 (ReLA-g)
Source: github.com/bzhangGo/zero @ 22a9201, modules/rela.py (read for the rule only; all code here is our own).
Differs from the source: an attention of timm's ViTs; the gate starts at zero, which makes it one half everywhere, where the
authors leave it to their framework's random default.

Shapes: B batch, N tokens, C channels of all heads together.
"""

import torch
from timm.models.beit import Attention as BeitAttention
from torch import Tensor, nn

from backbones.edits.relative_position import masked
from backbones.vit import Part, TokenStream, blocks_of, finish, mixed_into, project, rotate


class GatedNorm(nn.Module):
    """weight * x / rms(x) * sigmoid(gate * x) over all heads of a token (the paper's RMSNorm with a gate)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.gate = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # ... C -> ... C
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (self.weight * wide * scale * (self.gate * wide).sigmoid()).to(x.dtype)


class ReluAttention(nn.Module):
    """A mixin over timm's attentions: relu(scale q k') v, then the norm, gate and projection of the attention."""

    by_parts = False  # also over a pruned attention: who runs its parts would take a softmax

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The attention's output, B N C; arguments are those of timm's attentions, a masked pair weighs nothing.

        Args:
            x: tokens, B N C.
            rope: rotary table, None for none.
            attn_mask: additive, or True for the pairs that count; None for none.
            is_causal: as timm's.
        """
        attn: Part = self
        q, k, v = rotate(attn, *project(attn, x), rope)
        weights = masked((q * attn.scale) @ k.mT, attn_mask, is_causal).relu()
        return finish(attn, x, attn.attn_drop(weights) @ v)


def relu_attention(model: nn.Module) -> nn.Module:
    """Replace the softmax of every attention of a ViT by a ReLU and a gated norm, in place. From scratch only.

    Most weights are exactly zero, and a query may attend to nothing. A trained model loses its function.

    Args:
        model: timm's VisionTransformer or Eva, whose attentions have no norm yet and whose tokens are not merged.
    """
    if isinstance(model, TokenStream):
        raise ValueError(f"this model {model.differs}, and its steps have a softmax of their own: apply relu_attention first")
    attentions: dict[int, Part] = {id(block.attn): block.attn for block in blocks_of(model) if hasattr(block, "attn")}
    for attn in attentions.values():  # each once, however many blocks share it
        if isinstance(attn, BeitAttention) or not isinstance(attn.norm, nn.Identity):
            raise ValueError(f"relu_attention needs attentions with a free place for its norm; {type(attn).__name__} has none")
    for attn in attentions.values():
        attn.norm = GatedNorm(attn.proj.in_features).to(attn.proj.weight)
        mixed_into(attn, ReluAttention)
    return model
