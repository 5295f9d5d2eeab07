"""What two or more families share and timm.layers lacks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, resample_abs_pos_embed, to_2tuple
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from backbones.fuse import fold_batch_norm
from backbones.tracing import leaf
from weights.resample import resample_position_embedding


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth per block, rising linearly from 0 at the first block of the network to `rate` at the last one.

    Plain numbers, so that it also works while a model is made on the meta device.
    """
    step = rate / max(sum(depths) - 1, 1)
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [[step * (start + i) for i in range(depth)] for start, depth in zip(starts, depths)]


def covering(side: int, unit: int) -> int:
    """How many units cover a side, which may be open. In this form because ONNX rounds every quotient of sizes towards zero."""
    return (side + unit - 1) // unit


@leaf
def pad_to_multiple(x: Tensor, multiple: int | tuple[int, int], nhwc: bool = False) -> Tensor:
    """Zeros added at the bottom and on the right until both sides of a map are multiples; B C H W, or B H W C if nhwc.

    multiple: of both sides, or of the (height, width).
    """
    sides = x.shape[1:3] if nhwc else x.shape[2:]
    # In this form an exported program can see that the padded sides are multiples.
    bottom, right = (covering(side, unit) * unit - side for side, unit in zip(sides, to_2tuple(multiple)))
    if torch.compiler.is_exporting() or bottom or right:  # an exported program may keep the sizes open
        x = F.pad(x, (0, 0, 0, right, 0, bottom) if nhwc else (0, right, 0, bottom))
    return x


@leaf
def channels_last_on_cpu(x: Tensor) -> Tensor:
    """The image in the layout that the device's convolutions prefer."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


@leaf
def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The first `height` rows and `width` columns of B H W C."""
    if torch.compiler.is_exporting():  # a slice of open size would need a proof that it lies inside
        x = x.index_select(1, torch.arange(height, device=x.device))
        return x.index_select(2, torch.arange(width, device=x.device))
    return x[:, :height, :width]


class OpenWindows(NamedTuple):
    """Where the tokens of a map's n windows of L tokens lie, all tensors of whole numbers; see `open_windows`.

    Attributes:
        source: place of each token in the map, row-major, 0 for padding; (n L).
        exists: whether it has one; (n L), bool.
        places: of each place of the map, which token of the windows it is; (H W).
        row: of each token in the padded and rolled map; (n L).
        column: likewise.
        number: n.
        length: L.
        sides: rows and columns of the padded map.
    """

    source: Tensor
    exists: Tensor
    places: Tensor
    row: Tensor
    column: Tensor
    number: int
    length: int
    sides: tuple[int, int]

    def cut(self, tokens: Tensor) -> Tensor:  # B H*W C -> B n L C
        """The windows' tokens, zeros where they are padding."""
        tokens = tokens.index_select(1, self.source) * self.exists[:, None].to(tokens.dtype)
        return tokens.reshape(tokens.shape[0], self.number, self.length, tokens.shape[2])

    def joined(self, windows: Tensor) -> Tensor:  # B n L C -> B H*W C
        """The map's tokens, from where they are in the windows."""
        return windows.flatten(1, 2).index_select(1, self.places)


def open_windows(like: Tensor, window: tuple[int, int], shift: int | Tensor = 0, front: bool = False) -> OpenWindows:
    """The windows of a map as indices, for a program that keeps its size open: exact for every size, also below a window.

    The form with padding, rolling and reshaping, which is faster, would fix how many windows there are.

    Args:
        like: H W, for the size and the device.
        window: (rows, columns) of a window.
        shift: by how much the padded map is rolled up and to the left.
        front: padding is at the top and on the left, else at the bottom and on the right.
    """
    (height, width), (high, wide), device = like.shape, window, like.device
    rows, columns = covering(height, high), covering(width, wide)
    down, right = (rows * high - height, columns * wide - width) if front else (0, 0)
    token = torch.arange(rows * columns * (high * wide), device=device)
    which, inside = token // (high * wide), token % (high * wide)
    above = which // columns  # no remainder of a size: an exchange format has none
    row, column = above * high + inside // wide, (which - above * columns) * wide + inside % wide
    y, x = around(row + shift, rows * high) - down, around(column + shift, columns * wide) - right
    exists = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    index = torch.where(exists, y * width + x, 0)
    place = torch.arange(height * width, device=device)
    y = place // width
    x = around(place - y * width + right + columns * wide - shift, columns * wide)
    y = around(y + down + rows * high - shift, rows * high)
    places = (y // high * columns + x // wide) * (high * wide) + y % high * wide + x % wide
    sides = (rows * high, columns * wide)
    return OpenWindows(index, exists, places, row, column, rows * columns, high * wide, sides)


def around(place: Tensor, side: int) -> Tensor:
    """Places below twice a side, with those beyond it going on from 0."""
    return torch.where(place >= side, place - side, place)


MakeNorm = Callable[[int], nn.Module]  # channels -> a norm over the last axis
layer_norm: MakeNorm = partial(nn.LayerNorm, eps=1e-5)


class Block(nn.Module):
    """x + DP(attn(norm1 x)) where there is attention, then x + DP(mlp(norm2 x)); tokens in any layout, channels last.

    Args:
        dim: channels.
        attn: of normalised tokens, None for no attention.
        mlp: of normalised tokens.
        drop_path: stochastic depth.
        make_norm: channels -> a norm over the last axis.
    """

    def __init__(self, dim: int, attn: nn.Module | None, mlp: nn.Module, drop_path: float, make_norm: MakeNorm = layer_norm):
        super().__init__()
        self.norm1: nn.Module | None = None if attn is None else make_norm(dim)
        self.attn = attn
        self.norm2 = make_norm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None and self.norm1 is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PooledNormHead(ClassifierHead):
    """Global average pooling, LayerNorm of the pooled vector (of every position where nothing is pooled), classifier.

    Args:
        dim: channels.
        num_classes: 0 for no classifier.
        pool_type: timm's name of the pooling.
        drop_rate: dropout before the classifier.
        eps: of the norm.
    """

    def __init__(self, dim: int, num_classes: int, pool_type: str, drop_rate: float, eps: float):
        super().__init__(dim, num_classes, pool_type=pool_type, drop_rate=drop_rate)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # B C H W -> B num_classes
        x = self.global_pool(x)
        x = self.norm(x) if self.global_pool.pool_type else self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.drop(x)
        return self.flatten(x if pre_logits else self.fc(x))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each mapped to `dim` channels, then a norm; the image is padded to whole patches.

    Args:
        in_chans: image channels.
        dim: channels of a token.
        patch_size: side of a patch, pixels.
        make_norm: channels -> a norm over the last axis.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, make_norm: MakeNorm = layer_norm):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = make_norm(dim)

    def forward(self, x: Tensor) -> Tensor:  # B 3 H W -> B H/p W/p C
        return self.norm(self.proj(pad_to_multiple(x, self.patch_size)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Swin's downsampling: each 2x2 block of tokens becomes one, norm of 4C, Linear 4C -> 2C; odd maps are padded."""

    def __init__(self, dim: int, make_norm: MakeNorm = layer_norm):
        super().__init__()
        self.norm = make_norm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H/2 W/2 2C
        x = pad_to_multiple(x, 2, nhwc=True)
        batch, height, width, dim = x.shape
        # (even row, even column), (odd, even), (even, odd), (odd, odd): the order of the released weights
        x = x.reshape(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """F.scaled_dot_product_attention; in an exported program its result lies in memory as the ONNX decomposition's does.

    Args:
        q: queries, ... N d.
        k: keys, ... n d.
        v: values, ... n e.
        bias: added to the scores, or a bool mask.
        scale: of the scores, d ** -0.5 unless given.
        dropout_p: dropout of the weights.
    """
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    return out.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else out


def relative_bias(table: Tensor, height: int, width: int) -> Tensor:
    """A bias per relative position -> a bias per pair of tokens of a height x width grid.

    table: heads x (2 height - 1) x (2 width - 1), entry = key position - query position + side - 1 on each axis.
    Returns heads x queries x keys, tokens row-major. Views, a flip and one copy: no index tensor to store or to rebuild.
    """
    if torch.compiler.is_exporting():  # Tensor.unfold would fix the grid, and so would the division of height ** 2 by height
        rows, columns = (torch.arange(side, device=table.device) for side in (height, width))
        table = table[:, rows - rows[:, None] + height - 1]
        pairs = table[..., columns - columns[:, None] + width - 1].transpose(2, 3)
        return pairs.reshape(-1).view(-1, height * width, height * width)
    pairs = table.unfold(1, height, 1).unfold(2, width, 1)  # heads, -query row, -query column, key row, key column
    return pairs.flip(1, 2).flatten(3).flatten(1, 2)


@leaf
def vit_positions(embedding: Tensor, size: tuple[int, int], native: tuple[int, int], prefix: int) -> Tensor:
    """A ViT's position embedding 1 P+n C for another grid, as timm resizes it.

    Args:
        embedding: of prefix tokens and patches, 1 P+n C.
        size: (rows, columns) that are wanted.
        native: (rows, columns) for which it is made.
        prefix: P, entries that are kept as they are.
    """
    if torch.compiler.is_exporting():  # timm's antialiased resize is no operator of every program
        return resample_position_embedding(embedding, size, prefix, native, antialias=True)
    return resample_abs_pos_embed(embedding, list(size), list(native), prefix)


@leaf
def deformable_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """2x2 stride-2 deformable convolution without modulation, B C H W and B 8 H/2 W/2 -> B D H/2 W/2.

    Channel 2t of `offset` moves tap t (row-major) downwards, channel 2t + 1 to the right, in pixels; outside the map is zero.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)  # half precisions have no CPU kernel, and the authors' op casts too
    x, offset, weight, bias = (t.to(dtype) for t in (x, offset, weight, bias))
    if torch.compiler.is_exporting():
        return gathered_merge(x, offset, weight, bias)
    return deform_conv2d(x, offset, weight, bias, stride=2)


def gathered_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`deformable_merge` in operators that every exchange format has; an exported program holds this."""
    (batch, _, height, width), (rows, columns) = x.shape, offset.shape[2:]
    tap = torch.arange(4, device=x.device)[:, None]
    cell = torch.arange(rows * columns, device=x.device)
    moved = offset.reshape(batch, 4, 2, rows * columns)
    y = moved[:, :, 0] + (2 * (cell // columns) + tap // 2)  # B 4 N
    x_ = moved[:, :, 1] + (2 * (cell - cell // columns * columns) + tap % 2)
    pixels, parts = x.flatten(2), []
    for down in (0, 1):  # the four pixels around each place, weighted bilinearly; those outside the map count nothing
        for right in (0, 1):
            row, column = y.floor() + down, x_.floor() + right
            share = (1 - (y - row).abs()) * (1 - (x_ - column).abs())
            share = share * ((row >= 0) & (row < height) & (column >= 0) & (column < width))
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long().flatten(1)[:, None]
            parts.append(pixels.gather(2, index.expand(-1, x.shape[1], -1)) * share.flatten(1)[:, None])
    sampled = parts[0] + parts[1] + parts[2] + parts[3]
    taps = sampled.unflatten(2, (4, -1)).flatten(1, 2)  # B 4C N, tap fastest, as the weights have it
    merged = weight.flatten(1) @ taps + bias[:, None]
    return merged.reshape(batch, -1, rows, columns)


class DeformableMerge(nn.Module):
    """Deformable token merging (LIT, section 3.3): a 2x2 stride-2 convolution that learns where its four taps look.

    BatchNorm and exact GELU come after the convolution, nothing before it. An odd map loses its last row or column, which the
    offsets can still reach. New modules merge like an ordinary convolution, as the offsets start at zero; the authors train
    `offset.weight` with a hundredth of the learning rate.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 2, stride=2)  # never called: holds the weights of the deformable convolution
        self.offset = nn.Conv2d(dim, 8, 2, stride=2)
        self.norm: nn.Module = nn.BatchNorm2d(out_dim)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H/2 W/2 D
        x = x.permute(0, 3, 1, 2)
        assert self.conv.bias is not None
        merged = deformable_merge(x, self.offset(x), self.conv.weight, self.conv.bias).to(x.dtype)
        # One copy here, else the blocks' residual sums keep the convolution's layout and each of their norms copies.
        merged = merged.contiguous(memory_format=torch.channels_last)
        return F.gelu(self.norm(merged)).permute(0, 2, 3, 1)

    def fused(self) -> "DeformableMerge":
        """With the BatchNorm folded in; it follows the sampling, so the offsets do not change."""
        assert isinstance(self.norm, nn.BatchNorm2d)
        self.conv, self.norm = fold_batch_norm(self.conv, self.norm), nn.Identity()
        return self
