"""Heads and hidden neurons taken out of a ViT for good: the shapes shrink, and so does the time.

backbones.analysis.heads finds the least important ones on a user's own data:

    chosen = head_importance(model, images, labels).least(12)
    model = edits.apply(model, [{"name": "prune", "heads": chosen}])
"""

from collections.abc import Sequence

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.beit import Attention as BeitAttention
from torch import Tensor, nn

from backbones.vit import Part, blocks_of, finish, mix, mixed_into, plain_weights, position_bias, project, rotate

MLPS: tuple[Part, ...] = (Mlp, GluMlp, SwiGLU)


class ByParts(nn.Module):
    """A mixin over timm's attentions: their forward with any number of heads, whatever the width of the tokens."""

    by_parts = True
    num_heads: int

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """The attention's output, B T C; arguments are those of timm's attentions.

        Args:
            x: tokens, B T C.
            rope: rotary table, None for none.
            attn_mask: None for none.
            is_causal: refused, as a pruned attention takes a mask.
            shared_rel_pos_bias: of a Beit, None for none.
        """
        if is_causal:
            raise ValueError("a pruned attention takes a mask, not is_causal")
        q, k, v = rotate(self, *project(self, x), rope)
        bias = position_bias(self, shared_rel_pos_bias)
        return finish(self, x, mix(self, q, k, v, attn_mask if bias is None else bias))


@torch.no_grad()
def prune(
    model: nn.Module, heads: dict[int, list[int]] | None = None, neurons: dict[int, list[int]] | None = None
) -> nn.Module:
    """Take heads and hidden neurons out of a ViT, in place. The output is that of the model with them at zero.

    Args:
        model: timm's VisionTransformer, Eva or Beit.
        heads: block -> heads to take out; one at least stays in each block.
        neurons: block -> hidden units of its MLP to take out.
    """
    blocks = blocks_of(model)
    plain_weights(model, "prune")
    jobs: list[tuple[Part, list[int]]] = []
    for what, table, count_of in (("heads", heads, head_count), ("neurons", neurons, neuron_count)):
        for key, given in (table or {}).items():
            layer = int(key)  # JSON spells the keys as text
            if not 0 <= layer < len(blocks) or not hasattr(blocks[layer], "attn"):
                raise ValueError(f"{what}: block {layer} does not exist; this model has blocks 0 to {len(blocks) - 1}")
            count = count_of(model, blocks[layer], layer)
            gone = sorted(set(given))
            if len(gone) != len(given) or not all(0 <= i < count for i in gone) or len(gone) >= count:
                raise ValueError(f"block {layer} has {what} 0 to {count - 1}, of which one must stay; cannot take out {given}")
            jobs.append((blocks[layer], [i for i in range(count) if i not in gone]))
            if any(other.attn is blocks[layer].attn for other, _ in jobs[len(heads or {}) if what == "neurons" else 0 : -1]):
                raise ValueError(f"{what}: block {layer} repeats another of the list and shares its weights: name it once")
    split = len(heads or {})
    for block, keep in jobs[:split]:
        prune_heads(block.attn, keep)
    for block, keep in jobs[split:]:
        prune_neurons(block.mlp, keep)
    return model


def head_count(model: Part, block: Part, layer: int) -> int:
    """Heads of a block. ValueError if its attention cannot lose one."""
    attn: Part = block.attn
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        raise ValueError(f"blocks.{layer}.attn has a norm over all heads, which taking one out would change")
    if getattr(attn, "num_kv_groups", 1) > 1:
        raise ValueError(f"blocks.{layer}.attn shares keys among heads, so one cannot be taken out by itself")
    if getattr(model, "rel_pos_bias", None) is not None or getattr(model, "rope_mixed", False):
        raise ValueError(
            "positions of this model are tables with an entry for each head of every block: heads cannot be taken out"
        )
    return int(attn.num_heads)


def neuron_count(model: Part, block: Part, layer: int) -> int:
    """Hidden units of a block's MLP. ValueError if it cannot lose one."""
    mlp: Part = block.mlp
    if not isinstance(mlp, MLPS) or not isinstance(mlp.norm, nn.Identity):
        raise ValueError(
            f"blocks.{layer}.mlp is no plain Mlp, GluMlp or SwiGLU without a norm: its neurons cannot be taken out"
        )
    return mlp.fc2.in_features


def rows(layer: nn.Linear, keep: Tensor) -> None:
    """Keep these outputs of a linear layer."""
    layer.weight = nn.Parameter(layer.weight[keep], layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[keep], layer.bias.requires_grad)
    layer.out_features = len(keep)


def columns(layer: nn.Linear, keep: Tensor) -> None:
    """Keep these inputs of a linear layer."""
    layer.weight = nn.Parameter(layer.weight[:, keep], layer.weight.requires_grad)
    layer.in_features = len(keep)


def prune_heads(attn: Part, keep: Sequence[int]) -> None:
    """Keep these heads of a timm attention, in place."""
    device = attn.proj.weight.device
    width = attn.proj.in_features // attn.num_heads
    places = torch.tensor([head * width + i for head in keep for i in range(width)], device=device)
    old = attn.proj.in_features
    if attn.qkv is not None:
        rows(attn.qkv, torch.cat([places + i * old for i in range(3)]))
        if getattr(attn, "q_bias", None) is not None:
            attn.q_bias = nn.Parameter(attn.q_bias[places], attn.q_bias.requires_grad)
            attn.v_bias = nn.Parameter(attn.v_bias[places], attn.v_bias.requires_grad)
            attn.register_buffer("k_bias", attn.k_bias[places], persistent=False)
    else:
        for layer in (attn.q_proj, attn.k_proj, attn.v_proj):
            rows(layer, places)
    if getattr(attn, "gate", None) is not None:
        rows(attn.gate, places)
    columns(attn.proj, places)
    if isinstance(attn, BeitAttention) and attn.relative_position_bias_table is not None:
        table = attn.relative_position_bias_table
        attn.relative_position_bias_table = nn.Parameter(table[:, list(keep)], table.requires_grad)
    attn.num_heads = len(keep)
    for name, value in (("num_kv_heads", len(keep)), ("attn_dim", len(places)), ("kv_dim", len(places))):
        if hasattr(attn, name):
            setattr(attn, name, value)
    if not getattr(attn, "by_parts", False):
        mixed_into(attn, ByParts)


def prune_neurons(mlp: Part, keep: Sequence[int]) -> None:
    """Keep these hidden units of a timm MLP, in place."""
    places = torch.tensor(keep, device=mlp.fc2.weight.device)
    old = mlp.fc2.in_features
    if isinstance(mlp, SwiGLU):
        rows(mlp.fc1_g, places)
        rows(mlp.fc1_x, places)
    else:
        rows(mlp.fc1, torch.cat([places, places + old]) if isinstance(mlp, GluMlp) else places)
    columns(mlp.fc2, places)
