"""Neighbourhood attention in plain torch: tiles of queries against the window of keys they can see, through SDPA.

Any device, forward and backward by autograd, standard operators only (this is the path that exports). An axis is cut into its
residue groups (one per residue of the dilation) and each group into tiles of T neighbouring queries; the keys of a tile lie
in one window of S <= T + k - 1 positions, and an additive mask [tile, heads, T T', S S'] holds the bias, with -inf at keys
that a query does not see. A group of up to WHOLE positions is one tile. Nothing of the size N x N exists unless the whole map
is one tile.

Ragged ends (groups that differ by one position, tiles that do not divide a group) repeat their last query, and the repeats
are never read back; window positions past the end of a group are masked.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

if TYPE_CHECKING:
    from . import Call

WHOLE = 14  # groups of up to this many positions are one tile: dense attention with a bias is then fastest
TILE = 8  # queries per axis in a tile otherwise
CHUNK_BYTES = 16 << 20  # of gathered keys per pass: allocations above 32 MB cost page faults at every call


@dataclass(frozen=True)
class Axis:
    """How one axis is cut. Lists, not tensors: they may be built while a program is traced under fake tensors."""

    tiles: int
    tile: int  # T
    window: int  # S
    queries: list[int]  # tiles * T indices into the axis
    keys: list[int]  # tiles * S indices into the axis
    outputs: list[int]  # for each index of the axis, its place in `queries`
    patterns: list[list[list[int]]]  # the distinct T x S tables of bias entries; 2 k - 1 marks a key out of sight
    pattern: list[int]  # which of them each tile has


def _cut_axis(length: int, kernel: int, dilation: int) -> Axis:
    """The cut of an axis of `length` positions, length >= kernel * dilation."""
    longest = -(-length // dilation)
    per_group = 1 if longest <= WHOLE else -(-longest // TILE)
    tile = -(-longest // per_group)
    window = min(tile + kernel - 1, longest)
    queries, keys, patterns, pattern = [], [], [], []
    for residue in range(dilation):
        size = -(-(length - residue) // dilation)
        for first in range(0, per_group * tile, tile):
            positions = [min(first + i, size - 1) for i in range(tile)]
            start = max(0, min(first - kernel // 2, size - window))
            queries += [residue + p * dilation for p in positions]
            keys += [residue + min(start + j, size - 1) * dilation for j in range(window)]
            table = []
            for p in positions:
                seen = min(max(p - kernel // 2, 0), size - kernel)
                places = range(start, start + window)
                table.append([c - p + kernel - 1 if seen <= c < seen + kernel else 2 * kernel - 1 for c in places])
            if table not in patterns:
                patterns.append(table)
            pattern.append(patterns.index(table))
    outputs = [((i % dilation) * per_group + i // dilation // tile) * tile + i // dilation % tile for i in range(length)]
    return Axis(per_group * dilation, tile, window, queries, keys, outputs, patterns, pattern)


_cached_cut_axis = functools.lru_cache(maxsize=256)(_cut_axis)  # a tracing compiler warns about lru_cache


def refuses(call: Call) -> str | None:
    """None: tiles run every valid call."""
    return None


def run(call: Call) -> Tensor:  # B H W heads dim -> B H W heads dim
    batch, height, width, heads, dim = call.q.shape
    if not torch.compiler.is_compiling() and batch == 0:
        return reference.run(call)  # the gradient that SDPA gives the mask of an empty batch is uninitialised memory
    cut_axis = _cut_axis if torch.compiler.is_compiling() else _cached_cut_axis
    rows, columns = cut_axis(height, call.kernel[0], call.dilation[0]), cut_axis(width, call.kernel[1], call.dilation[1])
    mask = _mask(call, rows, columns)  # row patterns, column patterns, heads, TT', SS'
    if rows.tiles == columns.tiles == 1:  # the whole map, nothing to pick
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (call.q, call.k, call.v))
        return _attend(q, k, v, mask, call.scale).transpose(1, 2).unflatten(1, (height, width))
    q = _select(_select(call.q, rows.queries, 1), columns.queries, 2)
    k, v = (_select(t, columns.keys, 2) for t in (call.k, call.v))

    # The batch counts only in eager mode: a traced program keeps it symbolic.
    images = 1 if torch.compiler.is_compiling() else max(batch, 1)
    row_bytes = images * columns.tiles * rows.window * columns.window * heads * dim * q.element_size()
    step = max(1, min(rows.tiles, CHUNK_BYTES // row_bytes))
    out = []
    for first in range(0, rows.tiles, step):
        count = min(step, rows.tiles - first)
        picked = slice(first * rows.window, (first + count) * rows.window)
        kt, vt = (_tiles(_select(t, rows.keys[picked], 1), count, rows.window, columns.tiles, columns.window) for t in (k, v))
        qt = _tiles(q[:, first * rows.tile : (first + count) * rows.tile], count, rows.tile, columns.tiles, columns.tile)
        picked_mask = _select(_select(mask, rows.pattern[first : first + count], 0), columns.pattern, 1)
        tile = _attend(qt, kt, vt, picked_mask, call.scale)
        tile = tile.unflatten(2, (rows.tile, columns.tile)).unflatten(1, (count, columns.tiles, heads))
        out.append(tile.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2))
    out = out[0] if len(out) == 1 else torch.cat(out, 1)  # B tiles*T tiles*T' heads dim
    return _select(_select(out, rows.outputs, 1), columns.outputs, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """SDPA of B (tiles heads) N dim under a mask [row tiles, column tiles, heads, N, N']."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(0, 2)[None], scale=scale)
    if torch.compiler.is_exporting():  # the fused kernel's memory layout is not that of its ONNX decomposition
        out = out.clone(memory_format=torch.contiguous_format)
    return out


def _tiles(x: Tensor, rows: int, height: int, columns: int, width: int) -> Tensor:
    """B (rows height) (columns width) heads dim -> B (rows columns heads) (height width) dim, the layout of SDPA."""
    x = x.unflatten(2, (columns, width)).unflatten(1, (rows, height)).permute(0, 1, 3, 5, 2, 4, 6)
    return x.flatten(4, 5).flatten(1, 3)


def _mask(call: Call, rows: Axis, columns: Axis) -> Tensor:
    """The additive mask of every pair of patterns: [row patterns, column patterns, heads, T T', S S'] in q's dtype."""
    q, heads = call.q, call.q.shape[3]
    if call.bias is None:
        table = q.new_zeros(heads, 2 * call.kernel[0] - 1, 2 * call.kernel[1] - 1)
    else:
        table = call.bias.to(q.dtype)
    table = F.pad(table, (0, 1, 0, 1), value=float("-inf"))  # the last entry of each axis marks "out of sight"
    entries = [[e for pattern in axis.patterns for line in pattern for e in line] for axis in (rows, columns)]
    table = _select(_select(table, entries[1], 2), entries[0], 1)
    table = table.unflatten(2, (len(columns.patterns), columns.tile, columns.window))
    table = table.unflatten(1, (len(rows.patterns), rows.tile, rows.window))
    return table.permute(1, 4, 0, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def _select(x: Tensor, indices: list[int], axis: int) -> Tensor:
    """x at `indices` of one axis; x itself when they are all of the axis in order."""
    if len(indices) == x.shape[axis] and indices == list(range(len(indices))):
        return x
    return x.index_select(axis, torch.tensor(indices, device=x.device))
