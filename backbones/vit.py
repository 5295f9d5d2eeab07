"""A timm ViT by its parts: embedding, blocks, attention, and a runner that carries merged tokens through them.

What edits and analyses share. Understood are the classes whose forward these functions repeat: VisionTransformer (also DeiT
with its distillation token, and subclasses of ours), Eva and Beit with their usual blocks. Anything else is refused by name.

Shapes: B batch, N tokens of the image (prefix tokens first, then patches row-major), T tokens now, P prefix tokens (class
token, distillation token, registers), C channels, h heads, d channels of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models._features import feature_take_indices
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

Part = Any  # an nn.Module of timm, whose attributes timm does not declare
HOSTS = (VisionTransformer, Eva, Beit)
POST_NORM = (ResPostBlock, EvaBlockPostNorm)
BLOCKS = (Block, EvaBlock, BeitBlock, *POST_NORM)
ATTENTIONS = (Attention, AttentionRope, EvaAttention, BeitAttention)


def blocks_of(model: Part) -> nn.Sequential:
    """The blocks of a flat ViT; ValueError, with the reason, for a model that the functions of this file do not describe."""
    name = type(model).__name__
    hosts = [host for host in HOSTS if isinstance(model, host)]
    if not hosts:
        raise ValueError(f"{name} is not one of timm's {', '.join(host.__name__ for host in HOSTS)}: its tokens run otherwise")
    own = [f for f in ("forward_features", "forward_intermediates") if getattr(type(model), f) is not getattr(hosts[0], f)]
    if own and not isinstance(model, TokenStream):
        raise ValueError(f"{name} has a {own[0]} of its own, not {hosts[0].__name__}'s")
    for i, block in enumerate(model.blocks):
        if isinstance(block, Skip):
            continue
        if type(block) not in BLOCKS:
            kinds = ", ".join(kind.__name__ for kind in BLOCKS)
            own_kind = f"{type(block).__module__}.{type(block).__name__}"
            raise ValueError(f"blocks.{i} of this {name} is a {own_kind}; understood are timm's {kinds}")
        if type(block.attn) not in ATTENTIONS and not getattr(block.attn, "by_parts", False):
            kinds = ", ".join(kind.__name__ for kind in ATTENTIONS)
            raise ValueError(f"blocks.{i}.attn of this {name} is a {type(block.attn).__name__}; understood are {kinds}")
    return model.blocks


def plain_weights(model: nn.Module, edit: str) -> None:
    """ValueError if a layer's weight is computed from others, so that what `edit` writes into it would be lost."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(f"{edit} needs plain weights, and {name} is parametrised: apply {edit} before sigma_reparam")


class Skip(nn.Module):
    """A block left out: tokens pass as they are, so the numbers of the other blocks stay."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


# ------------------------------------------------------------------------------------------------------------- attention


def project(attn: Part, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of tokens B T C after q/k norm, before rotation: each B h T d, keys and values as stored."""
    if attn.qkv is None:
        q = attn.q_proj(x).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        heads = getattr(attn, "num_kv_heads", attn.num_heads)
        k, v = (layer(x).unflatten(2, (heads, -1)).transpose(1, 2) for layer in (attn.k_proj, attn.v_proj))
    else:
        if getattr(attn, "q_bias", None) is None:
            qkv = attn.qkv(x)
        else:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            qkv = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if not isinstance(attn, BeitAttention):
        q, k = attn.q_norm(q), attn.k_norm(k)
    return q, k, v


def rotate(attn: Part, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as attention meets them: patches rotated by `rope`, keys and values repeated for their group.

    Args:
        attn: the attention of a block.
        q: queries, B h T d.
        k: keys, as they are stored.
        v: values, as they are stored.
        rope: rotary table, None for none.
    """
    if rope is not None:
        skip, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        q, k = (torch.cat([t[:, :, :skip], apply_rot_embed_cat(t[:, :, skip:], rope, half=half)], 2).type_as(v) for t in (q, k))
    if (groups := getattr(attn, "num_kv_groups", 1)) > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return q, k, v


def mix(attn: Part, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(scale q k' + mask) v, B h T d, fused where the module is; mask is additive and broadcasts to B h T T.

    Args:
        attn: the attention of a block.
        q: queries, B h T d.
        k: keys, B h T d.
        v: values, B h T d.
        mask: added to the scores, broadcast to B h T T; None for none.
    """
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.to(q.dtype), dropout, scale=attn.scale)
    scores = (q * attn.scale) @ k.mT
    return attn.attn_drop((scores if mask is None else scores + mask).softmax(-1)) @ v


def attention_map(attn: Part, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(scale q k' + mask), B h T T, row = query, before dropout.

    Args:
        attn: the attention of a block.
        q: queries, B h T d.
        k: keys, B h T d.
        mask: added to the scores, None for none.
    """
    scores = (q * attn.scale) @ k.mT
    return (scores if mask is None else scores + mask).softmax(-1)


def finish(attn: Part, x: Tensor, mixed: Tensor) -> Tensor:
    """Heads B h T d -> the attention's output B T C: norm, gate (of its input x), projection, dropout."""
    out = mixed.transpose(1, 2).flatten(2)
    if not isinstance(attn, BeitAttention):
        out = attn.norm(out)
        if attn.gate is not None:
            out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def position_bias(attn: Part, shared: Tensor | None) -> Tensor | None:
    """What Beit adds to its scores, 1 h N N: the block's own table and the one all blocks share; None elsewhere."""
    if not isinstance(attn, BeitAttention):
        return None
    own = None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()
    return own if shared is None else shared if own is None else own + shared


# ----------------------------------------------------------------------------------------------------------------- blocks


def attention_input(block: Part, x: Tensor) -> Tensor:
    """What a block's attention takes of its tokens B T C."""
    return x if isinstance(block, POST_NORM) else block.norm1(x)


def attention_output(block: Part, inside: Tensor, mixed: Tensor) -> Tensor:
    """Heads B h T d, of the attention of `inside`, -> what the block adds to its tokens."""
    out = finish(block.attn, inside, mixed)
    return block.drop_path1(scaled(block, 1, block.norm1(out) if isinstance(block, POST_NORM) else out))


def attention_branch(block: Part, x: Tensor, rope: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(what a block's attention adds to its tokens, its keys before rotation B h T d).

    Args:
        block: of a flat ViT.
        x: tokens, B T C.
        rope: rotary table, None for none.
        mask: added to the scores, None for none.
    """
    inside = attention_input(block, x)
    q, keys, v = project(block.attn, inside)
    q, k, v = rotate(block.attn, q, keys, v, rope)
    return attention_output(block, inside, mix(block.attn, q, k, v, mask)), keys


def mlp_branch(block: Part, x: Tensor) -> Tensor:
    """What a block's MLP adds to its tokens."""
    out = block.norm2(block.mlp(x)) if isinstance(block, POST_NORM) else block.mlp(block.norm2(x))
    return block.drop_path2(scaled(block, 2, out))


def scaled(block: Part, branch: int, out: Tensor) -> Tensor:
    """A branch's output under the block's LayerScale, whichever form it has."""
    if isinstance(block, Block):
        return getattr(block, f"ls{branch}")(out)
    gamma = getattr(block, f"gamma_{branch}", None)
    return out if gamma is None else gamma * out


# ----------------------------------------------------------------------------------------------------------------- runner


@dataclass
class Tokens:
    """Tokens on their way through a ViT, and where each came from.

    Attributes:
        x: B T C.
        prefix: P, number of prefix tokens; they stay first.
        rope: the model's rotary table, None without one; rows are patches of the image.
        bias: the relative position bias that all blocks of a Beit share, or None.
        group: B N, the token that now holds each token of the image; None while all are there.
        leader: B T, the token of the image whose position a token keeps; None while all are there.
        size: B T float32, how many tokens of the image each holds; None while all are there.
        aside: what a stream's own steps need of the images besides.
    """

    x: Tensor
    prefix: int
    rope: Tensor | None = None
    bias: Tensor | None = None
    group: Tensor | None = None
    leader: Tensor | None = None
    size: Tensor | None = None
    aside: Any = None

    def full(self) -> Tensor:
        """B N C: every token of the image gets the token that holds it."""
        return self.x if self.group is None else self.x.gather(1, self.group[..., None].expand(-1, -1, self.x.shape[2]))

    def block_rope(self, depth: int, mixed: bool) -> Tensor | None:
        """The rotary rows of the tokens that are left, as block `depth` takes them; mixed: each block has its own table."""
        table = self.rope if self.rope is None or not mixed else self.rope[depth]
        if table is None or self.leader is None:
            return table
        rows = self.leader[:, self.prefix :] - self.prefix  # B T-P
        if table.ndim == 4:  # B (1 or h) N-P dim: patch dropout has already chosen rows for each image
            return table.gather(2, rows[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))
        return table[rows][:, None] if table.ndim == 2 else table[:, rows].transpose(0, 1)

    def mask(self, attn: Part, proportional: bool = False) -> Tensor | None:
        """What is added to the scores: Beit's bias between the tokens that are left, and the logarithm of the keys' sizes."""
        bias = position_bias(attn, self.bias)
        if self.leader is None:
            return bias
        if bias is not None:
            bias = bias[0][:, self.leader[:, :, None], self.leader[:, None]].transpose(0, 1)
        sizes = self.size.log()[:, None, None] if proportional and self.size is not None else None
        return bias if sizes is None else sizes if bias is None else bias + sizes


def embed(model: Part, images: Tensor) -> Tokens:
    """Images B 3 H W -> the tokens that the first block takes."""
    x = model.patch_embed(images)
    if isinstance(model, Beit):
        x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)
        return Tokens(x, model.num_prefix_tokens, bias=None if model.rel_pos_bias is None else model.rel_pos_bias())
    if isinstance(model, Eva):
        x, rope = model._pos_embed(x)
        return Tokens(model.norm_pre(x), model.num_prefix_tokens, rope)
    return Tokens(model.norm_pre(model.patch_drop(model._pos_embed(x))), model.num_prefix_tokens)


def run_block(model: Part, index: int, tokens: Tokens) -> Tokens:
    """One block by its own forward, all tokens there: the same bits as in the model."""
    given: dict[str, Any] = {}
    if isinstance(model, Beit):
        given = {"shared_rel_pos_bias": tokens.bias}
    elif isinstance(model, Eva):
        given = {"rope": tokens.block_rope(index, getattr(model, "rope_mixed", False))}
    return replace(tokens, x=model.blocks[index](tokens.x, **given))


def checkpointed(enabled: bool, step: Callable[..., Any], *inputs: Any) -> Any:
    """step(*inputs), computed again in the backward pass where checkpointing of activations is enabled."""
    # not timm's checkpoint: the reentrant form sees no gradient inside Tokens
    return checkpoint(step, *inputs, use_reentrant=False) if enabled else step(*inputs)


class TokenStream(nn.Module):
    """A mixin over a ViT's class: the model runs through `step`, and what leaves it has the tokens of the whole image.

    A subclass says in `step` what happens at a block, in `start` what comes before them, and in `differs` what that makes of
    the model. `restream` puts it over a model in place; a family of ours names it among its bases.
    """

    differs = "runs through steps of its own"
    blocks: nn.Sequential
    norm: nn.Module
    patch_embed: Part
    num_prefix_tokens: int
    grad_checkpointing: bool

    def start(self, images: Tensor) -> Tokens:
        """Images B 3 H W -> the tokens that the first block takes."""
        return embed(self, images)

    def step(self, index: int, tokens: Tokens) -> Tokens:
        """The tokens after block `index`."""
        return run_block(self, index, tokens)

    def stream(self, images: Tensor, depth: int | None = None) -> Iterator[Tokens]:
        """The tokens before the first block, then after each of the first `depth` blocks (default: all)."""
        tokens = self.start(images)
        yield tokens
        for i in range(len(self.blocks) if depth is None else depth):
            tokens = checkpointed(self.grad_checkpointing, self.step, i, tokens)
            yield tokens

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # -> B N C
        refuse_masks(attn_mask, is_causal)
        for tokens in self.stream(x):
            last = tokens
        return self.norm(last.full())

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> list | tuple[Tensor, list]:
        """timm's forward_intermediates, maps in the order of `indices`; each is filled from the tokens left after its block.

        Args:
            x: images, B 3 H W.
            indices: last n blocks (int), block numbers (negative from the end), or all (None).
            return_prefix_tokens: pairs (map, prefix tokens B P C).
            norm: final norm on each.
            stop_early: do not run blocks after the last one asked for.
            output_fmt: "NCHW", or "NLC" for patch tokens.
            intermediates_only: the maps alone, else (output of `forward_features`, maps).
            attn_mask: refused unless it is None.
            is_causal: refused unless it is False.
        """
        refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, deepest = feature_take_indices(
            len(self.blocks), indices if indices is None or isinstance(indices, int) else list(indices)
        )
        found: dict[int, Tensor] = {}
        for i, tokens in enumerate(self.stream(x, deepest + 1 if stop_early else None)):
            if i - 1 in take:
                found[i - 1] = self.norm(tokens.full()) if norm else tokens.full()
        prefix = [found[i][:, : self.num_prefix_tokens] for i in take]
        outputs: list[Any] = [found[i][:, self.num_prefix_tokens :] for i in take]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            outputs = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in outputs]
        if return_prefix_tokens and self.num_prefix_tokens:
            outputs = list(zip(outputs, prefix, strict=True))
        return outputs if intermediates_only else (self.norm(tokens.full()), outputs)


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    """ValueError for an attention mask: its rows and columns are the tokens of the image."""
    if attn_mask is not None or is_causal:
        raise ValueError("a model whose tokens run through steps of their own takes no attention mask")


_mixed: dict[tuple[type, type], type] = {}


def mixed_into(module: nn.Module, mixin: type) -> None:
    """Put a mixin over a module's class, in place; names, weights and everything else of the module stay."""
    key = (mixin, type(module))
    if key not in _mixed:  # one class for each pair, so that copies and equal modules share it
        _mixed[key] = type(f"{mixin.__name__}{key[1].__name__}", key, {"__module__": mixin.__module__})
    module.__class__ = _mixed[key]


def restream(model: nn.Module, stream: type[TokenStream]) -> Part:
    """Put a TokenStream over a model in place."""
    blocks_of(model)
    if isinstance(model, TokenStream):
        raise ValueError(f"this model {model.differs} already: {stream.__name__} needs a plain one")
    mixed_into(model, stream)
    return model
