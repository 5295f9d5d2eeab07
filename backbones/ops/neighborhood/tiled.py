"""Neighbourhood attention in plain torch: tiles of queries against the window of keys they can see, through SDPA.

Any device, forward and backward by autograd, standard operators only (this is the path that exports). An axis is cut into its
residue groups (one per residue of the dilation) and each group into tiles of T neighbouring queries; the keys of a tile lie
in one window of S <= T + k - 1 positions, and an additive mask [heads, tile, T T', S S'] holds the bias, with -inf at keys
that a query does not see. A group of up to WHOLE positions is one tile. Nothing of the size N x N exists unless the whole map
is one tile.

Ragged ends (groups that differ by one position, tiles that do not divide a group) repeat their last query, and the repeats
are never read back; window positions past the end of a group are masked.

In a compiled graph the whole of it is one operator (tiled_operator.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import open_size, reference, tiled_operator
from .call import Call

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


@dataclass(frozen=True)
class Cut:
    """How a map is cut, as indices for `_select`: numpy arrays, or tensors while a program is traced.

    A pair picks columns, n runs of them, and then pieces of rows: piece r n + c is run c of row r. They come out in the order
    of the tiles, so that nothing large is permuted.
    """

    rows: Axis
    columns: Axis
    queries: tuple[Any, Any]  # columns; pieces [row tiles, column tiles, T], each of T' queries
    keys: tuple[Any, Any]  # columns; pieces [row tiles, column tiles, S], each of S' keys
    entries: tuple[Any, Any]  # columns; pieces [row patterns, column patterns, T, T', S], each of S' entries of the bias
    patterns: Any  # [row tiles, column tiles], pairs of patterns
    outputs: tuple[Any, Any]  # rows; columns


def _cut(size: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int], array: Callable) -> Cut:
    """The cut of a map; `array` makes an array or tensor of a list."""
    rows, columns = (_cut_axis(size[i], kernel[i], dilation[i]) for i in (0, 1))
    n, kinds, lines = columns.tiles, len(columns.patterns), len(columns.patterns) * columns.tile
    run, line = array(list(range(n)))[:, None], array(list(range(lines))).reshape(kinds, 1, columns.tile, 1)
    return Cut(
        rows,
        columns,
        queries=(array(columns.queries), array(rows.queries).reshape(-1, 1, rows.tile) * n + run),
        keys=(array(columns.keys), array(rows.keys).reshape(-1, 1, rows.window) * n + run),
        entries=(array(columns.patterns), array(rows.patterns)[:, None, :, None] * lines + line),
        patterns=array(rows.pattern)[:, None] * kinds + array(columns.pattern),
        outputs=(array(rows.outputs), array(columns.outputs)),
    )


@functools.lru_cache(maxsize=256)
def _cached_cut(size: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int]) -> Cut:
    """Of arrays: a tensor of inference mode or a fake one would come back in other calls."""
    import numpy  # comes with torchvision

    return _cut(size, kernel, dilation, numpy.array)


def refuses(call: Call) -> str | None:
    """None: tiles run every valid call."""
    return None


def run(call: Call) -> Tensor:  # B H W heads dim -> B H W heads dim
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        _register_operator()
        numbers = list(call.kernel), list(call.dilation), call.scale
        return torch.ops.backbones.neighborhood_tiled(call.q, call.k, call.v, call.bias, *numbers)
    batch, height, width, heads, dim = call.q.shape
    if not torch.compiler.is_exporting() and batch == 0:
        return reference.run(call)  # the gradient that SDPA gives the mask of an empty batch is uninitialised memory
    if torch.compiler.is_exporting() and open_size.is_open(call):
        return open_size.run(call)
    if torch.compiler.is_exporting():  # a tracing compiler warns about lru_cache
        cut = _cut((height, width), call.kernel, call.dilation, functools.partial(torch.tensor, device=call.q.device))
    else:
        cut = _cached_cut((int(height), int(width)), call.kernel, call.dilation)  # torch.jit.trace has sizes in tensors
    rows, columns = cut.rows, cut.columns
    mask = _mask(call, cut)  # heads, pairs of patterns, TT', SS'
    if rows.tiles == columns.tiles == 1:  # the whole map, nothing to pick
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (call.q, call.k, call.v))
        return _attend(q, k, v, mask, call.scale).transpose(1, 2).unflatten(1, (height, width))
    q, k, v = (  # (B heads) (H column tiles) (T' dim), or S' for T'
        _select(t.movedim(3, 1), picked, 3).reshape(batch * heads, height * columns.tiles, -1)
        for t, (picked, _) in ((call.q, cut.queries), (call.k, cut.keys), (call.v, cut.keys))
    )

    # The batch counts only in eager mode: an exported program keeps it symbolic.
    images = 1 if torch.compiler.is_exporting() else max(batch, 1)
    row_bytes = images * columns.tiles * rows.window * columns.window * heads * dim * q.element_size()
    step = max(1, min(rows.tiles, CHUNK_BYTES // row_bytes))
    parts = []
    for first in range(0, rows.tiles, step):
        part = slice(first, min(first + step, rows.tiles))
        qt = _select(q, cut.queries[1][part], 1).reshape(batch, -1, rows.tile * columns.tile, dim)
        kt, vt = (_select(t, cut.keys[1][part], 1).reshape(batch, -1, rows.window * columns.window, dim) for t in (k, v))
        tile = _attend(qt, kt, vt, _select(mask, cut.patterns[part], 1), call.scale)
        tile = tile.unflatten(2, (rows.tile, columns.tile)).unflatten(1, (heads, -1, columns.tiles))
        parts.append(tile.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # B tiles*T tiles*T' heads dim
    # without dilation the outputs are in order, repeats at the end
    out = out[:, :height] if call.dilation[0] == 1 else _select(out, cut.outputs[0], 1)
    return out[:, :, :width] if call.dilation[1] == 1 else _select(out, cut.outputs[1], 2)


@torch.compiler.assume_constant_result
def _register_operator() -> None:
    """Not at every import of ours: only who compiles needs it."""
    tiled_operator.register(
        lambda q, k, v, bias, kernel, dilation, scale: run(
            Call(q, k, v, (kernel[0], kernel[1]), (dilation[0], dilation[1]), bias, scale)
        )
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """SDPA of B (heads tiles) N dim under a mask [heads, tiles, N, N']."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(0, 1)[None], scale=scale)
    if torch.compiler.is_exporting():  # the fused kernel's memory layout is not that of its ONNX decomposition
        out = out.clone(memory_format=torch.contiguous_format)
    return out


def _mask(call: Call, cut: Cut) -> Tensor:
    """The additive mask of every pair of patterns: [heads, pairs, T T', S S'] in q's dtype."""
    q, heads, rows, columns = call.q, call.q.shape[3], cut.rows, cut.columns
    if call.bias is None:
        table = q.new_zeros(heads, 2 * call.kernel[0] - 1, 2 * call.kernel[1] - 1)
    else:
        table = call.bias.to(q.dtype)
    table = F.pad(table, (0, 1, 0, 1), value=float("-inf"))  # the last entry of each axis marks "out of sight"
    table = _select(table, cut.entries[0], 2).reshape(heads, -1, columns.window)
    return _select(table, cut.entries[1], 1).reshape(heads, -1, rows.tile * columns.tile, rows.window * columns.window)


def _select(x: Tensor, indices: Any, axis: int) -> Tensor:
    """x at `indices` of one axis. On a CPU, small pieces are picked up to 4 times faster from three axes than from four."""
    return x.index_select(axis, torch.as_tensor(indices, device=x.device).flatten())
