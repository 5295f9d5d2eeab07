"""iRPE: relative positions of image patches that act on queries, keys and values.

Paper:  Wu et al. 2021, "Rethinking and Improving Relative Position Encoding for Vision Transformer",
        https://arxiv.org/abs/2107.14222
Source: github.com/microsoft/Cream @ 4a13c40 (MIT), iRPE/DeiT-with-iRPE; names of the tables are the authors'.
Differs from the source: any grid (the authors infer a square one), any number of prefix tokens, timm's other attentions (RoPE:
the tables meet rotated queries and keys), no compiled op.

Shapes: B batch, N tokens, h heads, d channels of a head, P prefix tokens, R buckets.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.attention import resolve_self_attn_mask
from torch import Tensor, nn

from backbones.tracing import leaf
from backbones.vit import Part, TokenStream, blocks_of, finish, mixed_into, position_bias, project, rotate
from weights.resample import is_open

METHODS = ("product", "euc", "quant", "cross")


def piecewise(offset: Tensor, ratio: float) -> Tensor:
    """Offsets -> whole numbers: as they are up to `ratio`, then by their logarithm, at most 2 * ratio (paper, eq. 18)."""
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    offset = offset.float()
    size = offset.abs()
    far = alpha + (size.clamp_min(1e-12) / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
    far = offset.sign() * far.round().clamp_max(beta)  # of the float beta: with 1.9 a 4 becomes 3.8, then 3
    return torch.where(size <= alpha, offset.round(), far).trunc().long()


def buckets(method: str, height: int, width: int, skip: int, ratio: float) -> tuple[Tensor, ...]:
    """Bucket of every pair (query, key), N N; two tables for "cross", rows and columns. skip: prefix tokens."""
    if torch.compiler.is_compiling():  # tensors of a trace must not stay in the cache
        return _buckets.__wrapped__(method, height, width, skip, ratio)
    with torch.inference_mode(False), torch.device("cpu"):  # nor those of a mode or a default device that ends
        return _buckets(method, height, width, skip, ratio)


@functools.lru_cache(maxsize=64)
def _buckets(method: str, height: int, width: int, skip: int, ratio: float) -> tuple[Tensor, ...]:
    reach = int(2 * ratio)
    places = torch.arange(height * width)
    rows = places // width
    columns = places - rows * width  # no remainder of a size: an exchange format has none
    down, right = rows[:, None] - rows, columns[:, None] - columns
    if method == "product":
        found = [(piecewise(down, ratio) + reach) * (2 * reach + 1) + piecewise(right, ratio) + reach]
    elif method == "euc":
        found = [piecewise((down.square() + right.square()).float().sqrt().round(), ratio) + reach]
    elif method == "quant":
        found = [piecewise(down.square() + right.square(), ratio) + reach]
    else:
        found = [piecewise(down, ratio) + reach, piecewise(right, ratio) + reach]
    if skip:
        found = [F.pad(table, (skip, 0, skip, 0), value=bucket_count(method, 0, ratio)) for table in found]
    return tuple(found)


def bucket_count(method: str, skip: int, ratio: float) -> int:
    """Columns of a table: one more where there are prefix tokens, for every pair with one of them."""
    side = 2 * int(2 * ratio) + 1
    return (side**2 if method == "product" else side) + (skip > 0)


class Table(nn.Module):
    """Learnt entries by bucket; zeros at the start.

    Args:
        heads: 1 where all heads share them.
        width: d for contextual entries, None for plain biases.
        count: buckets.
        values: entries are added to values, so their axes are turned.
    """

    def __init__(self, heads: int, width: int | None, count: int, values: bool = False):
        super().__init__()
        self.values = values
        if width is None:
            self.lookup_table_bias = nn.Parameter(torch.zeros(heads, count))
        else:
            shape = (heads, count, width) if values else (heads, width, count)
            self.lookup_table_weight = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x: queries or keys B h N d -> scores B h N N; with `values`: attention B h N N -> what to add, B h N d."""
        if self.values:
            table = self.lookup_table_weight
            sums = x.new_zeros(x.shape[0], x.shape[1], x.shape[2], table.shape[1]).scatter_add(3, ids.expand_as(x), x)
            return sums @ table
        if not hasattr(self, "lookup_table_weight"):
            return self.lookup_table_bias[:, ids][None]
        return (x @ self.lookup_table_weight).gather(3, ids.expand(x.shape[0], x.shape[1], -1, -1))


class Cross(nn.Module):
    """Rows and columns with a table each, results added.

    Args:
        heads: tables, one a head.
        width: channels of a head, None for a bias.
        count: buckets of an axis.
        values: the tables are of values.
    """

    def __init__(self, heads: int, width: int | None, count: int, values: bool = False):
        super().__init__()
        self.rp_rows = Table(heads, width, count, values)
        self.rp_cols = Table(heads, width, count, values)

    def forward(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return self.rp_rows(x, rows) + self.rp_cols(x, columns)


class RelativeAttention(nn.Module):
    """A mixin over timm's attentions: their forward with iRPE's terms, and unfused where values have one."""

    by_parts = False  # also over a pruned attention: its parts alone would leave the terms out
    rpe: tuple[str, float]  # method, ratio
    grid_source: list[Part]  # the patch embedding, in a list so that it is no submodule here
    rpe_skip: int

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """The attention's output, B N C; arguments are those of timm's attentions.

        Args:
            x: tokens, B N C.
            rope: rotary table, None for none.
            attn_mask: None for none.
            is_causal: as timm's.
            shared_rel_pos_bias: of a Beit, None for none.
        """
        attn: Part = self
        q, k, v = rotate(attn, *project(attn, x), rope)
        method, ratio = self.rpe
        height, width = grid_of(self.grid_source[0])
        tables = tables_for(method, ratio, self.rpe_skip, height, width, x.shape[1] - self.rpe_skip, x)
        ids = [tables[i] for i in range(2 if method == "cross" else 1)]
        scores = self.scores(q, k, ids)
        if (bias := position_bias(attn, shared_rel_pos_bias)) is not None:
            scores = scores + bias
        attention = attn.attn_drop(masked(scores, attn_mask, is_causal).softmax(-1))
        mixed = attention @ v
        if attn.rpe_v is not None:
            mixed = mixed + attn.rpe_v(attention, *ids)
        return finish(attn, x, mixed)

    def scores(self, q: Tensor, k: Tensor, ids: Sequence[Tensor]) -> Tensor:
        """What the softmax takes, B h N N, of queries and keys B h N d and the buckets of every pair."""
        attn: Part = self
        q = q * attn.scale
        scores = q @ k.mT
        if attn.rpe_k is not None:
            scores = scores + attn.rpe_k(q, *ids)
        if attn.rpe_q is not None:
            scores = scores + attn.rpe_q(k * attn.scale, *ids).mT
        return scores


def grid_of(embed: Part) -> tuple[int, int]:
    """Height and width of the grid at hand: that of the last image where sizes change, else the one it was built for."""
    rows, columns = getattr(embed, "last_grid", None) or embed.grid_size
    return rows, columns


@leaf
def tables_for(method: str, ratio: float, skip: int, height: int, width: int, patches: int, x: Tensor) -> tuple[Tensor, ...]:
    """The buckets of a grid where `x` is.

    Args:
        method: of the relative positions.
        ratio: of the buckets' number.
        skip: tokens before the patches.
        height: rows of the grid.
        width: columns of the grid.
        patches: how many there are.
        x: a tensor on the device.

    Raises ValueError if the patches do not lie on the grid.
    """
    if not is_open((height, width)) and height * width != patches:
        raise ValueError(f"{patches} patches do not lie on a grid of {height} x {width}: relative positions are not known")
    return tuple(table.to(x.device) for table in buckets(method, height, width, skip, ratio))


@leaf  # a tracer has stand-ins for the mask and for is_causal too
def masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scores B h N N under a mask, additive or True for the pairs that count, or causal: as timm's attention reads them."""
    bias = resolve_self_attn_mask(scores.shape[-1], scores, mask, is_causal)
    return scores if bias is None else scores + bias


class NotedGrid(nn.Module):
    """A mixin over a patch embedding that notes the grid of the image it has just embedded."""

    last_grid: tuple[int, int]

    def __getstate__(self) -> dict[str, Any]:
        """Without the grid: it belongs to a call, and after a trace it is a stand-in that holds the whole graph."""
        return {name: value for name, value in vars(self).items() if name != "last_grid"}

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.last_grid = (out.shape[1], out.shape[2])
        return out


def irpe(
    model: nn.Module,
    rpe_on: Literal["q", "k", "v", "qk", "kv", "qv", "qkv"] = "k",
    method: Literal["product", "euc", "quant", "cross"] = "product",
    mode: Literal["ctx", "bias"] = "ctx",
    ratio: float = 1.9,
    shared_head: bool = True,
) -> nn.Module:
    """Give every attention of a ViT relative positions of its patches, in place; tables of zeros change nothing at first.

    Args:
        model: timm's VisionTransformer, Eva or Beit, whose tokens are not merged.
        rpe_on: what the tables act on; "v" needs mode "ctx".
        method: how offsets fall into buckets; the authors' ratio is 1.9 for "product", 20 for "euc", "cross", 33 for "quant".
        mode: entries that meet queries, keys or attention ("ctx"), or plain biases.
        ratio: offsets up to this many patches are told apart exactly, "quant": of squared distances.
        shared_head: all heads of a block share a table.
    """
    if method not in METHODS or mode not in ("ctx", "bias"):
        raise ValueError(f"method must be one of {', '.join(METHODS)} and mode ctx or bias, got {method!r}, {mode!r}")
    if not rpe_on or set(rpe_on) - set("qkv") or len(set(rpe_on)) != len(rpe_on):
        raise ValueError(f"rpe_on takes some of q, k and v, e.g. 'qk', got {rpe_on!r}")
    if mode == "bias" and "v" in rpe_on:
        raise ValueError("values take contextual entries only: rpe_on without 'v', or mode 'ctx'")
    if ratio <= 0:
        raise ValueError(f"ratio must be positive, got {ratio}")
    if isinstance(model, TokenStream):
        raise ValueError(f"this model {model.differs}, where tables of the grid are not seen: apply irpe to a plain model")
    vit: Part = model
    attentions: dict[int, Part] = {id(block.attn): block.attn for block in blocks_of(model) if hasattr(block, "attn")}
    if getattr(vit, "dynamic_img_size", False):
        mixed_into(vit.patch_embed, NotedGrid)
    for attn in attentions.values():  # each once, however many blocks share it
        add_tables(attn, vit.num_prefix_tokens, rpe_on, method, mode, ratio, shared_head)
        attn.grid_source = [vit.patch_embed]
    return model


def add_tables(attn: Part, skip: int, rpe_on: str, method: str, mode: str, ratio: float, shared_head: bool) -> None:
    """Tables for one attention and the forward that uses them, in place; see irpe for the arguments, skip = prefix tokens."""
    kind = Cross if method == "cross" else Table
    heads, width = 1 if shared_head else attn.num_heads, attn.proj.in_features // attn.num_heads
    like = attn.proj.weight
    for name in "qkv":
        table = kind(heads, width if mode == "ctx" else None, bucket_count(method, skip, ratio), values=name == "v")
        setattr(attn, f"rpe_{name}", table.to(like) if name in rpe_on else None)
    mixed_into(attn, RelativeAttention)
    attn.rpe, attn.rpe_skip = (method, ratio), skip
