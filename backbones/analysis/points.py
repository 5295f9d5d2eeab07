"""What one place of an image attends to, in every block of a vision transformer of any kind.

Read without a change to the model, whichever kernel its attention runs on: calls of the fused kernel are seen by a torch
function mode, windows and neighbourhoods are computed anew from what their modules were given. Only modules whose tokens are
known to lie row by row are read: where an attention permutes tokens or makes new ones, its map would look right and be wrong.

Shapes: B = 1 image, H W map height and width, h heads, d channels of a head, P prefix tokens (class token, registers).
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm.layers
import timm.models.pvt_v2
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backbones import cvt, fan, lit, mvit, nat
from backbones.analysis.run import evaluation, layers
from backbones.edits.relative_position import RelativeAttention, tables_for
from backbones.fcaformer import FcaBlock, keys_and_values, offset_bias, split
from backbones.fcaformer import to_windows as to_fca_windows
from backbones.layers import pad_to_multiple
from backbones.litv2 import HiLo
from backbones.nat import NeighborhoodAttention, pad_to_least
from backbones.ops.neighborhood.reference import neighbours
from backbones.sparsifiner import Sparsifiner
from backbones.sret import GroupAttention
from backbones.swin import WindowAttention, shift_mask, to_windows
from backbones.vit import Part, TokenStream, blocks_of, project, rotate

Place = tuple[float, float]  # x to the right, y down, shares of the image's sides


@dataclass
class PointAttention:
    """What one position attends to in one block.

    Attributes:
        name: of the attention module, or of the block.
        kind: in words, e.g. "window 7, shifted by 3".
        stage: number of the stage, in a flat network of the block.
        weights: h H W over the keys, each head's sum at most one: prefix tokens and padding take the rest.
        kept: h H W bool, keys that the block chose among all, or None where all are there.
        dense: h H W, attention as it were without the choice, or None.
    """

    name: str
    kind: str
    stage: int
    weights: Tensor
    kept: Tensor | None = None
    dense: Tensor | None = None


def cell(at: Place, height: int, width: int) -> tuple[int, int]:
    """(row, column) of a map at a place."""
    x, y = at
    return min(int(y * height), height - 1), min(int(x * width), width - 1)


@torch.no_grad()
def point_attention(
    model: nn.Module, image: Tensor, at: Place, sizes: Mapping[int, tuple[int, int]], run: Callable[[Tensor], Any] | None = None
) -> list[PointAttention]:
    """Every readable attention of a model for one image, first block first; empty for a model without any.

    Read are timm's flat ViTs, also with iRPE, windows (Swin and its hosts' variants), HiLo, neighbourhoods, SReT's slices,
    FcaFormer's windows, Sparsifiner, and the modules of CELLS, which attend over all cells of a
    map, also with pooled keys. `why_unread` says why it is none.

    Args:
        model: a backbone, in any mode; runs in evaluation.
        image: 1 3 H W.
        at: the place that looks, x and y.
        sizes: stage -> (H, W) of its feature map; attention of other stages is left out.
        run: how the model runs on the image; default: `model.forward_features`.
    """
    run = run or model.forward_features  # type: ignore[assignment]
    with evaluation(model):
        if isinstance(model, Sparsifiner):
            return list(of_sparsifiner(model, image, at))
        if flat(model):
            return list(of_vit(model, image, at))
        calls = Fused()
        with given(model, calls) as inputs, calls:
            assert run is not None
            run(image)
        found = list(of_calls(calls.seen, at, sizes, prefix_counts(model)))
        for name, module, given_here in inputs:
            if (size := sizes.get(stage_of(name))) is not None:
                here = Given(name, given_here, size)
                for kind, weights in READERS[type(module).forward](module, here, at):
                    found.append(PointAttention(name, kind, stage_of(name), weights))
    return [one for one in sorted(found, key=lambda one: one.stage) if one.stage in sizes]


def why_unread(model: nn.Module) -> str:
    """Why `point_attention` finds nothing in a model, in words that follow its name."""
    if isinstance(model, TokenStream):
        return f"it {model.differs}, so that what a block's attention sees is no map of the image"
    if any(name.rpartition(".")[2] in ("attn", "attention", "token_mixer") for name, _ in model.named_modules()):
        return "its attention makes no weights between places, or none that are read here"
    return "it has no attention"


def flat(model: nn.Module) -> bool:
    """Whether the model is a flat ViT whose blocks can be walked through."""
    try:
        blocks_of(model)
    except ValueError:
        return False
    return not isinstance(model, TokenStream)


def stage_of(name: str) -> int:
    """The number of the stage, or of a flat network's block, in a module's name; -1 where there is none."""
    found = re.match(r"(?:stages|layers|blocks)[._](\d+)", name)
    return int(found[1]) if found else -1


# ---------------------------------------------------------------------------------------------------------------- flat ViTs


def of_vit(model: Any, image: Tensor, at: Place) -> Iterator[PointAttention]:
    """The blocks of a timm ViT; stage = block."""
    grid = model.patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))
    row, column = cell(at, *grid)
    prefix = model.num_prefix_tokens
    for layer in layers(model, image):
        weights = layer.attention[0, :, prefix + row * grid[1] + column, prefix:]
        yield PointAttention(f"blocks.{layer.index}", "all patches", layer.index, weights.unflatten(1, grid))


def of_sparsifiner(model: Any, image: Tensor, at: Place) -> Iterator[PointAttention]:
    """The blocks of a Sparsifiner with the keys that each head keeps; stage = block."""
    grid = model.start(image).grid
    row, column = cell(at, *grid)
    query = 1 + row * grid[1] + column
    for i, block in enumerate(model.details(image).blocks):
        maps = [None if one is None else one[0, :, query, 1:].unflatten(1, grid) for one in
                (block.masked_attn, block.attn_mask, block.unmasked_attn)]  # fmt: skip
        assert maps[0] is not None
        share = "all keys" if maps[1] is None else f"{float(maps[1].float().mean()):.0%} of the keys"
        yield PointAttention(f"blocks.{i}", share, i, maps[0], maps[1], None if maps[1] is None else maps[2])


# ------------------------------------------------------------------------------------------------ windows and neighbourhoods


@dataclass
class Given:
    """What a module was given: its name, its inputs and the (H, W) of its stage's feature map."""

    name: str
    inputs: tuple[Any, ...]
    size: tuple[int, int]


Reader = Callable[[Any, Given, Place], Iterator[tuple[str, Tensor]]]  # (kind, h H W) of each attention of the module


def of_map(read: Callable[[Any, Tensor, Place], Iterator[tuple[str, Tensor]]]) -> Reader:
    """A reader that needs nothing but the map B H W C that its module is given."""
    return lambda module, given, at: read(module, given.inputs[0], at)


def of_windows(attn: WindowAttention, x: Tensor, at: Place) -> Iterator[tuple[str, Tensor]]:
    """Swin: the keys of the place's window, which a roll may have brought together."""
    height, width = x.shape[1:3]
    how = attn.window, attn.shifted, attn.unshifted
    places = torch.arange(1, height * width + 1, device=x.device, dtype=torch.float64).view(1, height, width, 1)
    places = to_windows(places, *how)[0, :, :, 0].long()  # n L, 0 where padded
    row, column = cell(at, height, width)
    number, token = (places == row * width + column + 1).nonzero()[0].tolist()
    qkv = attn.qkv(to_windows(x, *how)[:, number]).unflatten(-1, (3, attn.num_heads, -1))  # 1 L 3 h d
    q, k = qkv[0, token, 0], qkv[0, :, 1]
    scores = attn.scale * torch.einsum("hd,lhd->hl", q, k) + attn.bias()[:, token]
    shift = attn.shift(height, width)
    if shift:
        counts = -(-height // attn.window), -(-width // attn.window)
        scores = scores + shift_mask(*counts, attn.window, shift, x.device, scores.dtype)[number, token]
    flat_map = x.new_zeros(attn.num_heads, height * width + 1)
    flat_map.index_add_(1, places[number], scores.softmax(-1))
    shifted = f", shifted by {shift}" if shift else ""
    yield f"window {attn.window}{shifted}", flat_map[:, 1:].unflatten(1, (height, width))


def of_neighbourhood(attn: NeighborhoodAttention, x: Tensor, at: Place) -> Iterator[tuple[str, Tensor]]:
    """NAT and DiNAT: kernel x kernel neighbours, `dilation` apart."""
    height, width = x.shape[1:3]
    row, column = cell(at, height, width)
    padded = pad_to_least(x, attn.kernel_size * attn.dilation)
    q, k, _ = attn.qkv(padded)[0].unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # each H' W' h d
    rows, row_entries = (t[row] for t in neighbours(padded.shape[1], attn.kernel_size, attn.dilation, x.device))
    columns, column_entries = (t[column] for t in neighbours(padded.shape[2], attn.kernel_size, attn.dilation, x.device))
    scores = attn.scale * torch.einsum("hd,ijhd->hij", q[row, column], k[rows][:, columns])
    scores = scores + attn.rpb[:, row_entries][:, :, column_entries]
    weights = x.new_zeros(attn.num_heads, *padded.shape[1:3])
    weights[:, rows[:, None], columns] = scores.flatten(1).softmax(-1).view_as(scores)
    kind = f"{attn.kernel_size}x{attn.kernel_size} neighbours, {attn.dilation} apart"
    yield kind, weights[:, :height, :width]


def of_hilo(attn: HiLo, x: Tensor, at: Place) -> Iterator[tuple[str, Tensor]]:
    """LITv2: the place's own window in the high-frequency heads, the means of all windows in the others."""
    (height, width), side = x.shape[1:3], attn.window
    row, column = cell(at, height, width)
    padded = pad_to_multiple(x, side, nhwc=True)
    if attn.hi_heads:
        top, left = row // side * side, column // side * side
        window = padded[0, top : top + side, left : left + side]
        q, k, _ = attn.h_qkv(window).unflatten(-1, (3, attn.hi_heads, attn.width)).unbind(2)  # each w w h d
        scores = attn.scale * torch.einsum("hd,ijhd->hij", q[row - top, column - left], k)
        weights = x.new_zeros(attn.hi_heads, *padded.shape[1:3])
        weights[:, top : top + side, left : left + side] = scores.flatten(1).softmax(-1).view_as(scores)
        yield f"high: window {side}", weights[:, :height, :width]
    if attn.lo_heads:
        q = attn.l_q(x[0, row, column]).unflatten(-1, (attn.lo_heads, attn.width))
        means = F.avg_pool2d(padded.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)[0]
        k = attn.l_kv(means).unflatten(-1, (2, attn.lo_heads, attn.width))[:, :, 0]
        scores = attn.scale * torch.einsum("hd,ijhd->hij", q, k)
        kind = "all cells" if side == 1 else f"low: means of {side}x{side}"
        yield kind, scores.flatten(1).softmax(-1).view_as(scores)


def of_relative(attn: Part, given: Given, at: Place) -> Iterator[tuple[str, Tensor]]:
    """iRPE in a flat ViT: all patches, with what relative positions add to the scores."""
    (x, *others), (height, width) = given.inputs, given.size
    if any(one is not None and one is not False for one in others) or x.shape[1] != attn.rpe_skip + height * width:
        return  # rotary tables, masks, a Beit's bias: another program's scores
    q, k, v = project(attn, x)
    q, k, _ = rotate(attn, q, k, v, None)
    method, ratio = attn.rpe
    ids = tables_for(method, ratio, attn.rpe_skip, height, width, height * width, x)[: 2 if method == "cross" else 1]
    row, column = cell(at, height, width)
    scores = attn.scores(q, k, ids)[0, :, attn.rpe_skip + row * width + column]
    yield "all patches, relative positions", scores.softmax(-1)[:, attn.rpe_skip :].unflatten(1, (height, width))


def of_slices(attn: GroupAttention, given: Given, at: Place) -> Iterator[tuple[str, Tensor]]:
    """SReT: the tokens of the place's slice of the sequence, which may have been permuted before it was cut."""
    x, groups, permutation = given.inputs
    (height, width), count = given.size, x.shape[1]
    row, column = cell(at, height, width)
    tokens = torch.arange(count, device=x.device) if permutation is None else permutation
    groups, place = min(groups, count), int((tokens == row * width + column).nonzero())
    number = ((place + 1) * groups - 1) // count
    inside = tokens[number * count // groups : (number + 1) * count // groups]
    q, k, _ = attn.qkv(x[0]).unflatten(-1, (3, attn.heads, -1)).unbind(1)  # each N h d
    scores = q.shape[-1] ** -0.5 * torch.einsum("hd,lhd->hl", q[row * width + column], k[inside])
    weights = x.new_zeros(attn.heads, count)
    weights[:, inside] = scores.softmax(-1)
    kind = "all tokens" if groups == 1 else f"one of {groups} slices{'' if permutation is None else ' of permuted tokens'}"
    yield kind, weights.unflatten(1, (height, width))


def of_fca(block: FcaBlock, given: Given, at: Place) -> Iterator[tuple[str, Tensor]]:
    """FcaFormer: the place's window; tokens that earlier blocks left behind, which have no place, take the rest."""
    (tiles, *others), (height, width) = given.inputs, given.size
    left = others[0] if others else None
    places = torch.arange(1, height * width + 1, device=tiles.device, dtype=torch.float64).view(1, 1, height, width)
    front = int(given.name.rpartition(".")[2]) % 2 == 0  # as FcaStage lays its windows
    places = to_fca_windows(places, block.size, front).flatten(1).long()  # n L, 0 where padded
    row, column = cell(at, height, width)
    number, token = (places == row * width + column + 1).nonzero()[0].tolist()
    q, k, _ = (split(part, block.heads)[0] for part in block.qkv(block.norm1(tiles[[number]].flatten(2).mT)).chunk(3, -1))
    scores = q.shape[-1] ** -0.5 * torch.einsum("hd,hnd->hn", q[:, token], k)
    scores = scores + offset_bias(block.attention_biases, block.size)[:, token]
    if left is not None:
        behind = keys_and_values(block.s_norm(left[[number]] * block.s_scale_factors), block.qkv.weight, block.qkv.bias)
        k = split(behind.chunk(2, -1)[0], block.heads)[0]
        more = q.shape[-1] ** -0.5 * torch.einsum("hd,hnd->hn", q[:, token], k) + block.s_token_bias[0, :, 0]
        scores = torch.cat([scores, more], 1)
    flat_map = tiles.new_zeros(block.heads, height * width + 1)
    flat_map.index_add_(1, places[number], scores.softmax(-1)[:, : places.shape[1]])
    beside = "" if left is None else " and tokens left behind"
    yield f"window {block.size[0]}x{block.size[1]}{beside}", flat_map[:, 1:].unflatten(1, (height, width))


# By the forward that the reader repeats: a subclass with another one is left to the fused kernel.
READERS: dict[Any, Reader] = {
    WindowAttention.forward: of_map(of_windows),
    NeighborhoodAttention.forward: of_map(of_neighbourhood),
    HiLo.forward: of_map(of_hilo),
    RelativeAttention.forward: of_relative,
    GroupAttention.forward: of_slices,
    FcaBlock.forward: of_fca,
}


# ----------------------------------------------------------------------------------------------------------- fused attention


# Modules that call the fused kernel once, with the cells of a map, row by row behind prefix tokens, as queries.
CELLS = (
    timm.layers.Attention,
    timm.models.pvt_v2.Attention,
    cvt.Attention,
    fan.TokenMixing,
    lit.Attention,
    mvit.PoolingAttention,
    nat.FullAttention,
)


@dataclass
class Call:
    """One call of the fused kernel: the module's name, queries, keys, mask and scale."""

    name: str
    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float


class Fused(TorchFunctionMode):
    """Inside, notes the calls of torch's fused attention by a module of CELLS; they run as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Call] = []
        self.within: str | None = None  # the module that runs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.within is not None:
            self.note(self.within, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def note(
        self, name: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *others: Any, **named: Any
    ) -> None:
        """Keep a call of one image with as many heads of keys as of queries.

        Args:
            name: of the module that runs.
            query: B h N d, as torch's function takes it.
            key: B h n d.
            value: B h n e.
            attn_mask: as torch's function takes it.
            others: its further arguments.
            named: its further arguments by name.
        """
        if query.ndim == 4 and query.shape[:2] == key.shape[:2] and query.shape[0] == 1:
            self.seen.append(Call(name, query, key, attn_mask, named.get("scale") or query.shape[-1] ** -0.5))


@contextmanager
def given(model: nn.Module, calls: Fused) -> Iterator[list[tuple[str, nn.Module, tuple[Any, ...]]]]:
    """Inside, collects (name, module, inputs) of every module that has a reader, and tells `calls` which of CELLS runs."""
    found: list[tuple[str, nn.Module, tuple[Any, ...]]] = []

    def read(module: nn.Module, inputs: tuple[Any, ...], name: str) -> None:
        found.append((name, module, inputs))

    def enter(module: nn.Module, inputs: tuple[Any, ...], name: str) -> None:
        calls.within = name

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls.within = None

    handles = []
    for name, module in model.named_modules():
        if type(module).forward in READERS:
            handles.append(module.register_forward_pre_hook(partial(read, name=name)))
        elif type(module) in CELLS:
            handles.append(module.register_forward_pre_hook(partial(enter, name=name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def prefix_counts(model: nn.Module) -> set[int]:
    """How many prefix tokens may stand before the cells of a map: what the model says of itself and of its stages, or none."""
    info: Any = getattr(model, "feature_info", ())
    stages = [entry.get("prefix_tokens", 0) for entry in getattr(info, "info", info)]
    return {0, int(getattr(model, "num_prefix_tokens", 0)), *stages}


def of_calls(
    calls: Sequence[Call], at: Place, sizes: Mapping[int, tuple[int, int]], prefixes: Collection[int]
) -> Iterator[PointAttention]:
    """Attention over all cells of a stage's map, read from calls of the fused kernel; calls of other tokens are passed over.

    Queries are the cells behind prefix tokens; keys the same, or those of a smaller map.

    Args:
        calls: in their order.
        at: the place that looks.
        sizes: stage -> (H, W) of its map.
        prefixes: how many prefix tokens there may be.
    """
    for call in calls:
        stage = stage_of(call.name)
        if stage not in sizes:
            continue
        height, width = sizes[stage]
        prefix = call.q.shape[2] - height * width
        pooled = pooled_size(call.k.shape[2], height, width, prefix)
        if prefix not in prefixes or pooled is None:
            continue
        ahead = call.k.shape[2] - math.prod(pooled)
        row, column = cell(at, height, width)
        query = prefix + row * width + column
        scores = call.scale * torch.einsum("hd,hnd->hn", call.q[0, :, query], call.k[0])
        if call.mask is not None:
            mask = call.mask.expand(1, call.q.shape[1], call.q.shape[2], -1)[0, :, query]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1)[:, ahead:].unflatten(1, pooled)
        kind = "all cells" if pooled == (height, width) else f"{pooled[0]}x{pooled[1]} pooled keys of {height}x{width}"
        yield PointAttention(call.name, kind, stage, weights)


def pooled_size(keys: int, height: int, width: int, prefix: int) -> tuple[int, int] | None:
    """(rows, columns) of the keys of a map: its own size, or the size that pooling leaves of it; None if nothing fits."""
    for count in dict.fromkeys((prefix, 0)):
        for side in range(1, max(height, width) + 1):
            for size in ((-(-height // side), -(-width // side)), (height // side, width // side)):
                if min(size) > 0 and math.prod(size) == keys - count:
                    return size
    return None


# ------------------------------------------------------------------------------------------------------------------ features


def principal_colors(features: Tensor) -> Tensor:
    """The three main components of a map C H W as colours, H W 3 in 0..1, each from its 2nd to its 98th percentile."""
    channels, height, width = features.shape
    cells = features.float().flatten(1).T
    cells = cells - cells.mean(0)
    count = min(3, channels, height * width)
    _, _, directions = torch.linalg.svd(cells, full_matrices=False)
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    parts = cells @ (directions * largest.sign()).T  # a sign that the solver cannot change
    low, high = torch.quantile(parts, torch.tensor([0.02, 0.98], device=parts.device, dtype=parts.dtype), dim=0)
    colors = ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return F.pad(colors, (0, 3 - count), value=0.5).view(height, width, 3)


def most_salient(features: Tensor) -> Place:
    """The place of a map C H W whose features differ most in direction from the rest, averaged over its neighbours.

    Directions, not lengths, so that a ViT's few tokens of enormous norm do not win.
    """
    cells = F.normalize(features.float().flatten(1), dim=0)
    distance = (cells - cells.mean(1, keepdim=True)).norm(dim=0).view(1, 1, *features.shape[1:])
    around = F.avg_pool2d(distance, 3, 1, 1, count_include_pad=False)[0, 0]
    row, column = divmod(int(around.argmax()), around.shape[1])
    return (column + 0.5) / around.shape[1], (row + 0.5) / around.shape[0]
