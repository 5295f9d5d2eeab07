"""PRepBN: every LayerNorm becomes, over the training, a BatchNorm that inference folds into the layer behind it.

Paper:  Guo et al. 2024, "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
        Normalization", https://arxiv.org/abs/2405.11582
Source: github.com/xinghaochen/SLAB @ f58db00 (no licence file; read for the rule only, all code here is our own).
Differs from the source: any timm ViT; folding is exact for every norm (the authors' fold of the patch embedding loses a term).

Shapes: B batch, N tokens, C channels.
"""

import torch
from torch import Tensor, nn

from backbones.prepbn import PRepBN
from backbones.vit import POST_NORM, Part, blocks_of, plain_weights


def prepbn(model: nn.Module, steps: int | None = None, r0: float = 1.0, warm: int = 0) -> nn.Module:
    """Replace every LayerNorm over channels of a ViT's blocks and end by a PRepBN, in place; then train.

    Before training the output is not that of the model: the BatchNorms have seen nothing. After it, merge_prepbn folds them.

    Args:
        model: timm's VisionTransformer, Eva or Beit.
        steps: training steps until the LayerNorms are gone (the authors: 60 000 of DeiT's ImageNet schedule); None: as many as
            the run has. A loop of your own calls backbones.prepbn.PRepBN.begin_step of each, or a forward is a step.
        r0: share of the LayerNorms at the start.
        warm: steps with the LayerNorms alone before that.
    """
    if (steps is not None and steps < 1) or warm < 0 or not 0 <= r0 <= 1:
        raise ValueError(f"prepbn needs steps of at least 1, warm of at least 0 and r0 in 0..1, got {steps}, {warm}, {r0}")
    vit: Part = model
    places = [(block, name) for block in blocks_of(model) if hasattr(block, "attn") for name in ("norm1", "norm2")]
    places += [(vit, name) for name in ("norm_pre", "norm", "fc_norm")]
    replaced = 0
    for owner, name in places:
        norm = getattr(owner, name, None)
        if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
            setattr(owner, name, PRepBN(norm, steps, warm, r0).train(norm.training))
            replaced += 1
    if not replaced:
        raise ValueError(f"this {type(model).__name__} has no LayerNorm that could become a BatchNorm")
    return model


@torch.no_grad()
def merge_prepbn(model: nn.Module) -> nn.Module:
    """Fold the BatchNorms into the layers behind them, in place: the function of evaluation mode without a norm in the blocks.

    Norms with no linear layer right behind them become an Affine.
    """
    plain_weights(model, "merge_prepbn")
    vit: Part = model
    found = False
    for block in blocks_of(model):
        for name, linears in (("norm1", attention_inputs(block)), ("norm2", mlp_inputs(block))):
            norm = getattr(block, name, None)
            if isinstance(norm, PRepBN):
                found = True
                a, b = norm.affine()
                if isinstance(block, POST_NORM) or not linears:
                    setattr(block, name, norm.fused())
                else:
                    for linear in linears:
                        fold(linear, a, b)
                    setattr(block, name, nn.Identity())
    for name in ("norm_pre", "norm", "fc_norm"):
        norm = getattr(vit, name, None)
        if isinstance(norm, PRepBN):
            found = True
            setattr(vit, name, norm.fused())
    if not found:
        raise ValueError("this model has no PRepBN to fold")
    return model


def attention_inputs(block: Part) -> list[nn.Linear]:
    """The linear layers that read a block's first norm; none where their bias lives elsewhere (Eva's separate biases)."""
    attn: Part = getattr(block, "attn", None)
    if attn is None or getattr(attn, "q_bias", None) is not None:
        return []
    layers = [attn.qkv] if attn.qkv is not None else [attn.q_proj, attn.k_proj, attn.v_proj]
    return layers + ([attn.gate] if getattr(attn, "gate", None) is not None else [])


def mlp_inputs(block: Part) -> list[nn.Linear]:
    """The linear layers that read a block's second norm."""
    mlp: Part = getattr(block, "mlp", None)
    layers = [getattr(mlp, name, None) for name in ("fc1", "fc1_g", "fc1_x")]
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def fold(linear: nn.Linear, a: Tensor, b: Tensor) -> None:
    """linear(a * x + b) as one linear layer, in place."""
    weight = linear.weight.double()
    bias = weight @ b + (0 if linear.bias is None else linear.bias.double())
    linear.bias = nn.Parameter(bias.to(linear.weight.dtype), linear.weight.requires_grad)
    linear.weight = nn.Parameter((weight * a).to(linear.weight.dtype), linear.weight.requires_grad)
