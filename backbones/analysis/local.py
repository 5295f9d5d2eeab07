"""How far and how evenly the heads look in networks whose attention is local: windows, neighbourhoods, HiLo.

Papers: Park et al. 2023, https://arxiv.org/abs/2305.00729 (distance); Zhai et al. 2023, https://arxiv.org/abs/2303.06296
        (entropy)
As attention.py has them for flat ViTs, over the keys that a query has. Normalised mutual information is not defined here: it
compares what all queries make of the same keys.

Shapes: B batch, h heads, H W map height and width, Q queries (the places of the map), K keys of each.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.analysis.run import batches, evaluation
from backbones.layers import pad_to_multiple, relative_bias
from backbones.litv2 import HiLo
from backbones.nat import FullAttention, NeighborhoodAttention, pad_to_least
from backbones.ops.neighborhood.reference import neighbours
from backbones.swin import WindowAttention, to_windows
from backbones.vit import Part


@dataclass
class LocalAttention:
    """Per attention of the network, in the order in which they run; means over images and over the places of the map.

    Attributes:
        layers: names of the modules; of HiLo "NAME hi" (windows) and "NAME lo" (averages of windows).
        distance: of each h, pixels between a place and what it looks at; averages of windows lie at their centres.
        entropy: of each h, nats, over all keys of a place, those of padding included.
        uniform_distance: of each, pixels, for attention that is the same for all keys of a place.
        uniform_entropy: of each, nats, likewise: the largest there is.
        images: how many were measured.
    """

    layers: list[str]
    distance: list[Tensor]
    entropy: list[Tensor]
    uniform_distance: list[float]
    uniform_entropy: list[float]
    images: int


@dataclass
class Look:
    """What the places of a map see.

    Attributes:
        part: "" or which of several attentions of the module.
        weights: B h Q K, softmax.
        rows: Q K, distance of each key in rows of the map.
        columns: Q K, in columns.
        real: Q K, whether a key lies on the image and not on padding.
        seen: Q K, whether a query may see a key at all.
        queries: Q, whether a query lies on the image.
    """

    part: str
    weights: Tensor
    rows: Tensor
    columns: Tensor
    real: Tensor
    seen: Tensor
    queries: Tensor


def windows(attn: Part, x: Tensor) -> list[Look]:
    """Swin: the windows of a map B H W C, padded and rolled."""
    height, width = x.shape[1:3]
    how = attn.window, attn.shifted, attn.unshifted
    q, k, _ = attn.qkv(to_windows(x, *how)).unflatten(-1, (3, attn.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)  # B n h L d
    scores = q * attn.scale @ k.mT + attn.bias()
    mask = attn.mask(height, width)
    if mask is not None:
        scores = scores + mask[:, None]
    rolled = attn.window, attn.shift(height, width) > 0, None  # places are padded already
    rows, columns = (to_windows(place, *rolled)[0, :, :, 0] for place in places(height, width, attn.window, x.device))  # n L
    seen = torch.ones_like(scores[0, :, 0], dtype=torch.bool) if mask is None else mask == 0
    weights = scores.softmax(-1).transpose(1, 2).flatten(2, 3)
    return [looked("", weights, rows, columns, seen, (height, width))]


def places(height: int, width: int, multiple: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every place of a map padded to a multiple, each 1 H' W' 1.

    Args:
        height: of the map.
        width: of the map.
        multiple: that the padded sides are of.
        device: of the result.
    """
    down, across = (-(-side // multiple) * multiple for side in (height, width))
    rows, columns = torch.meshgrid(torch.arange(down, device=device), torch.arange(across, device=device), indexing="ij")
    return rows[None, :, :, None].float(), columns[None, :, :, None].float()


def looked(part: str, weights: Tensor, rows: Tensor, columns: Tensor, seen: Tensor, size: tuple[int, int]) -> Look:
    """The Look of windows n L that attend in themselves; rows, columns: n L, places of their tokens; seen: n L L."""
    on = (rows < size[0]) & (columns < size[1])
    apart = [(line[:, None] - line[:, :, None]).flatten(0, 1) for line in (rows, columns)]
    real = on[:, None].expand_as(seen).flatten(0, 1)
    return Look(part, weights, apart[0], apart[1], real, seen.flatten(0, 1), on.flatten())


def neighbourhoods(attn: Part, x: Tensor) -> list[Look]:
    """NAT and DiNAT: the neighbourhoods of a map B H W C, padded to the least that has them."""
    height, width = x.shape[1:3]
    side, apart = attn.kernel_size, attn.dilation
    padded = pad_to_least(x, side * apart)
    q, k, _ = attn.qkv(padded).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    (rows, row_entries), (columns, column_entries) = (neighbours(length, side, apart, x.device) for length in padded.shape[1:3])
    keys = k[:, rows[:, None, :, None], columns[None, :, None, :]]  # B H W i j h d
    scores = torch.einsum("bhwnd,bhwijnd->bnhwij", q * attn.scale, keys)
    bias = attn.rpb[:, row_entries[:, None, :, None], column_entries[None, :, None, :]]
    weights = (scores + bias).flatten(-2).softmax(-1).flatten(2, 3)
    down, across = rows[:, None, :, None], columns[None, :, None, :]
    real = ((down < height) & (across < width)).flatten(2).flatten(0, 1)
    line = [torch.arange(length, device=x.device) for length in padded.shape[1:3]]
    shape = (*padded.shape[1:3], side, side)
    far = [
        (down - line[0][:, None, None, None]).expand(shape).flatten(2).flatten(0, 1),
        (across - line[1][None, :, None, None]).expand(shape).flatten(2).flatten(0, 1),
    ]
    on = ((line[0] < height)[:, None] & (line[1] < width)).flatten()
    return [Look("", weights, far[0].float(), far[1].float(), real, torch.ones_like(real), on)]


def whole(attn: Part, x: Tensor) -> list[Look]:
    """The ViT that NAT's authors compare with: all places of a map B H W C."""
    size = (x.shape[1], x.shape[2])
    q, k, _ = attn.qkv(x).flatten(1, 2).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    sides, table = [2 * side - 1 for side in size], attn.rpb
    if list(table.shape[1:]) != sides:
        table = F.interpolate(table[None], sides, mode="bicubic", align_corners=False)[0]
    weights = (q * attn.scale @ k.mT + relative_bias(table, *size)).softmax(-1)
    rows, columns = (place.flatten()[None] for place in places(*size, 1, x.device))
    seen = torch.ones(1, rows.shape[1], rows.shape[1], dtype=torch.bool, device=x.device)
    return [looked("", weights, rows, columns, seen, size)]


def high_and_low(attn: Part, x: Tensor) -> list[Look]:
    """HiLo: heads inside windows of a map B H W C, and heads that see the averages of all windows."""
    height, width = x.shape[1:3]
    w, found = attn.window, []
    padded = pad_to_multiple(x, w, nhwc=True) if w > 1 else x
    if attn.hi_heads:
        qkv = attn.h_qkv(to_windows(padded, w, False, None)).unflatten(-1, (3, attn.hi_heads, -1))
        q, k, _ = qkv.permute(3, 0, 1, 4, 2, 5)  # B n h L d
        weights = (q @ k.mT * attn.scale).softmax(-1).transpose(1, 2).flatten(2, 3)
        rows, columns = (to_windows(place, w, False, None)[0, :, :, 0] for place in places(height, width, w, x.device))
        seen = torch.ones(*rows.shape, rows.shape[1], dtype=torch.bool, device=x.device)
        found.append(looked("hi", weights, rows, columns, seen, (height, width)))
    if attn.lo_heads:
        q = attn.l_q(x).flatten(1, 2).unflatten(-1, (attn.lo_heads, -1)).transpose(1, 2)
        pooled = F.avg_pool2d(padded.permute(0, 3, 1, 2), w).permute(0, 2, 3, 1)
        k = attn.l_kv(pooled).flatten(1, 2).unflatten(-1, (2, attn.lo_heads, -1))[:, :, 0].transpose(1, 2)
        weights = (q @ k.mT * attn.scale).softmax(-1)
        query, key = places(height, width, 1, x.device), places(pooled.shape[1], pooled.shape[2], 1, x.device)
        far = [w * there.flatten() + (w - 1) / 2 - here.flatten()[:, None] for here, there in zip(query, key, strict=True)]
        all_of_them = torch.ones_like(far[0], dtype=torch.bool)
        found.append(Look("lo", weights, far[0], far[1], all_of_them, all_of_them, all_of_them[:, 0]))
    return found


READERS: dict[type[nn.Module], Callable[[Part, Tensor], list[Look]]] = {
    WindowAttention: windows,
    NeighborhoodAttention: neighbourhoods,
    FullAttention: whole,
    HiLo: high_and_low,
}


def local_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attentions of a network that READERS read, by name; empty for a flat ViT."""
    return {name: module for name, module in model.named_modules() if type(module) in READERS}


def measured(look: Look, pixels: tuple[float, float]) -> tuple[Tensor, Tensor, float, float]:
    """(distance B h, entropy B h, uniform distance, uniform entropy) of what the places of a map see.

    As for flat ViTs distance counts keys on the image, rows made to sum to one again, and entropy all keys.
    """
    far = torch.hypot(look.rows * pixels[0], look.columns * pixels[1])[look.queries]
    weights, real, seen = look.weights[:, :, look.queries].float(), look.real[look.queries], look.seen[look.queries]

    def distance(weights: Tensor) -> Tensor:
        on = weights * real
        return ((on * far).sum(-1) / on.sum(-1).clamp_min(torch.finfo(on.dtype).tiny)).mean(-1)

    entropy = -torch.xlogy(weights, weights).sum(-1).mean(-1)
    uniform = seen.float()
    return distance(weights), entropy, distance(uniform).item(), uniform.sum(-1).log().mean().item()


@torch.no_grad()
def local_attention_statistics(model: nn.Module, images: Tensor | Iterable, batch_size: int = 8) -> LocalAttention:
    """Distance and entropy of every head of a network with local attention. One attention's maps are in memory at a time.

    Args:
        model: one of our Swin, NAT, DiNAT, ViT-RPB or LITv2, or a network that has their attentions; also in a dense predictor.
        images: n 3 H W of one size, or batches, see run.batches.
        batch_size: images at a time where `images` is a tensor.
    """
    attentions = local_attentions(model)
    if not attentions:
        kinds = ", ".join(kind.__name__ for kind in READERS)
        raise ValueError(f"{type(model).__name__} has no local attention that can be read; understood are {kinds}")
    sums: dict[str, Any] = {}
    uniform: dict[str, tuple[float, float]] = {}
    sizes: set[tuple[int, ...]] = set()
    seen = 0

    def note(module: nn.Module, inputs: tuple[Any, ...], name: str) -> None:
        x = inputs[0]
        pixels = batch.shape[2] / x.shape[1], batch.shape[3] / x.shape[2]
        for look in READERS[type(module)](module, x):
            key = f"{name} {look.part}".strip()
            distance, entropy, *reference = measured(look, pixels)
            total = torch.stack([distance, entropy]).double().sum(1).cpu()
            sums[key] = sums[key] + total if key in sums else total
            uniform[key] = (reference[0], reference[1])

    handles = [module.register_forward_pre_hook(partial(note, name=name)) for name, module in attentions.items()]
    try:
        with evaluation(model):
            for batch in batches(model, images, batch_size):
                sizes.add(tuple(batch.shape[-2:]))
                if len(sizes) > 1:
                    raise ValueError(f"all images must have one size, got {sorted(sizes)}: resize them first")
                seen += len(batch)
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    means = [(total / seen).float() for total in sums.values()]
    return LocalAttention(
        list(sums),
        [mean[0] for mean in means],
        [mean[1] for mean in means],
        [pair[0] for pair in uniform.values()],
        [pair[1] for pair in uniform.values()],
        seen,
    )
