"""Swin Transformer: attention in square windows that shift by half a window from block to block.

Paper:  Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", https://arxiv.org/abs/2103.14030
Source: github.com/microsoft/Swin-Transformer @ f82860b (classification) and
        github.com/SwinTransformer/Swin-Transformer-Semantic-Segmentation @ 87e6f90 (dense prediction), both MIT.
        Released weights, and timm's, load through weights/convert/swin.py.

The authors have two programs, which differ in more than the norms of the returned maps. Classification takes one image size;
where the shorter side of a map is not longer than the window, the window shrinks to it and nothing is shifted. Dense prediction
takes any size, pads maps to whole windows before it rolls them, never shrinks a window and shifts every second block, even on a
map of one window. Here maps of the constructed size follow the first program and all others the second; `dense=True` follows
the second always. Differs from timm's `swin_*`, which decide per axis on maps that are not square and roll before they pad.
An exported program may keep batch and size open.

Shapes: B batch, H W map height and width, C channels, h heads, d = C // h, n windows, L = window ** 2.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, to_2tuple
from torch import Tensor, nn

from backbones.arguments import CHECKPOINTING, NO_SCORE_DROPOUT
from backbones.base import Stage, StagedBackbone, init_linear, register_variants
from backbones.layers import (
    Block,
    MakeNorm,
    PatchEmbed,
    PatchMerging,
    covering,
    crop,
    drop_path_rates,
    layer_norm,
    open_windows,
    pad_to_multiple,
    relative_bias,
    sdpa,
)
from backbones.tracing import leaf
from weights.manifest import default_cfgs as _default_cfgs
from weights.resample import is_open, resample_bias_table, resample_position_embedding

default_cfgs = _default_cfgs("swin")


def shift_of(height: int, width: int, window: int, shifted: bool, unshifted: tuple[int, int] | None) -> int:
    """By how many tokens a map is rolled: half a window, or nothing on the map size `unshifted`.

    Args:
        height: of the map.
        width: of the map.
        window: tokens per side of a window.
        shifted: whether the block shifts.
        unshifted: map size on which it does not, None for none.
    """
    return window // 2 if shifted and unshifted != (height, width) else 0


def open_shift(like: Tensor, window: int, shifted: bool, unshifted: tuple[int, int] | None) -> int | Tensor:
    """shift_of for a map whose size a program keeps open: a tensor where it depends on the size.

    Args:
        like: H W, of the map's size.
        window: tokens per side of a window.
        shifted: whether the block shifts.
        unshifted: map size on which it does not, None for none.
    """
    if not shifted or unshifted is None:
        return shift_of(0, 0, window, shifted, unshifted)
    height, width = (torch.ones(side, device=like.device, dtype=torch.int64).sum() for side in like.shape)
    return torch.where((height == unshifted[0]) & (width == unshifted[1]), 0, window // 2)


@leaf
def to_windows(x: Tensor, window: int, shifted: bool, unshifted: tuple[int, int] | None) -> Tensor:  # B H W C -> B n L C
    """The windows of a map, padded with zeros to whole windows and then rolled.

    Args:
        x: B H W C.
        window: tokens per side of a window.
        shifted: whether the block shifts.
        unshifted: map size on which it does not, None for none.
    """
    (_, height, width, _) = x.shape
    if is_open((height, width)):
        like = x[0, :, :, 0]
        return open_windows(like, (window, window), open_shift(like, window, shifted, unshifted)).cut(x.flatten(1, 2))
    shift = shift_of(height, width, window, shifted, unshifted)
    rows, columns = covering(height, window), covering(width, window)
    x = pad_to_multiple(x, window, nhwc=True)
    x = x.roll((-shift, -shift), (1, 2)) if shift else x
    x = x.unflatten(2, (columns, window)).unflatten(1, (rows, window)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


@leaf
def attend(
    qkv: Tensor,
    like: Tensor,
    table: Tensor,
    heads: int,
    scale: float,
    window: int,
    shifted: bool,
    unshifted: tuple[int, int] | None,
) -> Tensor:  # B n L 3C -> B H W C
    """Attention inside the windows of a map of the size of `like`, B H W C, put back where they were."""
    batch, height, width, dim = like.shape
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)  # each B n h L d
    bias = window_bias(table, window).to(q.dtype)
    if is_open((height, width)):
        return open_attend(q, k, v, bias, like[0, :, :, 0], scale, window, shifted, unshifted)
    shift = shift_of(height, width, window, shifted, unshifted)
    rows, columns = covering(height, window), covering(width, window)
    if shift:
        # Every window has its own mask: windows and heads share an axis, so that the batch needs no copy of the masks.
        cached = type(qkv) is Tensor and not torch.compiler.is_compiling()  # not under tracing or fake tensors
        mask = (cached_shift_mask if cached else shift_mask)(rows, columns, window, shift, qkv.device, q.dtype)
        q, k, v, bias = (t.flatten(1, 2) for t in (q, k, v, (bias + mask[:, None])[None]))
    else:
        q, k, v, bias = (t.flatten(0, 1) for t in (q, k, v, bias[None, None]))
    x = sdpa(q, k, v, bias, scale)
    x = x.view(batch, rows, columns, heads, window, window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(-1, dim).view(batch, rows * window, columns * window, dim)  # in two steps, as export asks
    x = x.roll((shift, shift), (1, 2)) if shift else x
    return crop(x, height, width)


def open_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    like: Tensor,
    scale: float,
    window: int,
    shifted: bool,
    unshifted: tuple[int, int] | None,
) -> Tensor:  # B n h L d -> B H W C
    """`attend` in a program that keeps the size of the map open.

    Args:
        q: queries, B n h L d.
        k: keys.
        v: values.
        bias: of a window, h L L.
        like: a map of the size, H W.
        scale: of the scores.
        window: as in `attend`.
        shifted: likewise.
        unshifted: likewise.
    """
    batch, count, heads, length, _ = q.shape
    windows = open_windows(like, (window, window), shift := open_shift(like, window, shifted, unshifted))
    if shifted:
        row, column = (
            bands(place, side, window, shift) for place, side in zip((windows.row, windows.column), windows.sides, strict=True)
        )
        regions = (3 * row + column).view(count, length)
        mask = (regions[:, None] != regions[:, :, None]).to(q.dtype) * -100.0
        bias = (bias + mask[:, None])[None].flatten(1, 2)
        q, k, v = (t.flatten(1, 2) for t in (q, k, v))
    else:
        q, k, v, bias = (t.flatten(0, 1) for t in (q, k, v, bias[None, None]))
    x = sdpa(q, k, v, bias, scale).reshape(batch, count, heads, length, -1).transpose(2, 3).flatten(3)
    return windows.joined(x).unflatten(1, like.shape)


def bands(place: Tensor, side: int, window: int, shift: int | Tensor) -> Tensor:
    """The bands of `shift_mask`: 0, in the last window 1, its last `shift` tokens 2.

    Args:
        place: of tokens on an axis of the rolled map.
        side: its length, a multiple of the window.
        window: tokens per side of a window.
        shift: by how many tokens the map is rolled.
    """
    return (place >= side - window) * (1 + (place >= side - shift).long())


def window_bias(table: Tensor, window: int) -> Tensor:
    """The learned bias of each pair of tokens of a window, h L L. The table counts query minus key, hence the transpose."""
    side = 2 * window - 1
    return relative_bias(table.T.unflatten(1, (side, side)), window, window).mT


class WindowAttention(nn.Module):
    """Attention inside windows, shifted by half a window or not.

    Args:
        dim: channels.
        num_heads: of the attention.
        window: tokens per side of a window.
        shifted: whether windows are shifted.
        unshifted: the map size on which the authors' classification code does not shift, None for none.
        qkv_bias: whether q, k and v have a bias.
        qk_scale: factor of the scores, d ** -0.5 unless given.
        proj_drop: dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        shifted: bool,
        unshifted: tuple[int, int] | None,
        qkv_bias: bool,
        qk_scale: float | None,
        proj_drop: float,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the channels of its stage, got {num_heads} heads for {dim} channels")
        self.num_heads, self.shifted = num_heads, shifted
        self.window, self.unshifted = window, unshifted
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def shift(self, height: int, width: int) -> int:
        """By how many tokens a map of this size is rolled."""
        return shift_of(height, width, self.window, self.shifted, self.unshifted)

    def bias(self) -> Tensor:
        """The learned bias of each pair of tokens of a window, h L L."""
        return window_bias(self.relative_position_bias_table, self.window)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        how = self.window, self.shifted, self.unshifted
        # Zeros are padded before the linear layer: padded keys are its bias, and not masked.
        qkv = self.qkv(to_windows(x, *how))
        return self.proj_drop(self.proj(attend(qkv, x, self.relative_position_bias_table, self.num_heads, self.scale, *how)))

    def mask(self, height: int, width: int) -> Tensor | None:
        """The mask for a map of this size, n L L, or None where nothing is shifted."""
        shift, table = self.shift(height, width), self.relative_position_bias_table
        rows, columns = -(-height // self.window), -(-width // self.window)
        return shift_mask(rows, columns, self.window, shift, table.device, table.dtype) if shift else None

    @torch.no_grad()
    def set_window(self, window: int, unshifted: tuple[int, int] | None) -> None:
        """Another window, with the bias table resampled for it, in place."""
        table = resample_bias_table(self.relative_position_bias_table, (2 * window - 1, 2 * window - 1))
        if window != self.window:
            self.relative_position_bias_table = nn.Parameter(table, self.relative_position_bias_table.requires_grad)
        self.window, self.unshifted = window, unshifted

    def extra_repr(self) -> str:
        return f"window={self.window}, shifted={self.shifted}"


def shift_mask(rows: int, columns: int, window: int, shift: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What a rolled map of rows x columns windows adds to the scores, n L L.

    -100 between tokens that were not neighbours before the roll, else 0.

    Args:
        rows: of windows.
        columns: of windows.
        window: tokens per side of a window.
        shift: by how many tokens the map is rolled.
        device: of the result.
        dtype: of the result.
    """
    place = torch.arange(window, device=device)
    # Bands of the rolled axis: 0, in the last window 1, its last `shift` tokens, which came from the other end, 2.
    row, column = (
        ((torch.arange(windows, device=device) == windows - 1)[:, None] * (1 + (place >= window - shift)))
        for windows in (rows, columns)
    )
    regions = (3 * row[:, None, :, None] + column[None, :, None, :]).reshape(rows * columns, window * window)
    return (regions[:, None] != regions[:, :, None]).to(dtype) * -100.0


@functools.lru_cache(maxsize=16)  # a 1024 x 1024 image has masks of 13 MB in its first stage
def cached_shift_mask(rows: int, columns: int, window: int, shift: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """shift_mask, kept for the next block and image; made outside inference mode, as training may meet it again."""
    with torch.inference_mode(False), torch.no_grad():
        return shift_mask(rows, columns, window, shift, device, dtype)


@leaf
def with_positions(x: Tensor, position: Tensor) -> Tensor:
    """A map B H W C plus an embedding 1 C h w, resized where its size is another."""
    if torch.compiler.is_exporting() or x.shape[1:3] != position.shape[2:]:
        position = F.interpolate(position, x.shape[1:3], mode="bicubic", align_corners=False)
    return x + position.permute(0, 2, 3, 1).to(x.dtype)


class PositionedPatchEmbed(PatchEmbed):
    """Patches plus a learned embedding of their absolute position, resized bicubically for maps of another size than `grid`.

    Args:
        in_chans: image channels.
        dim: channels of a token.
        patch_size: side of a patch, pixels.
        make_norm: channels -> a norm over the last axis.
        grid: (rows, columns) for which positions are made.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, make_norm: MakeNorm, grid: tuple[int, int]):
        super().__init__(in_chans, dim, patch_size, make_norm)
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, dim, *grid))
        nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # B 3 H W -> B H/p W/p C
        return with_positions(super().forward(x), self.absolute_pos_embed)

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Make `grid` the map size at which the embedding is used as it is."""
        new = resample_position_embedding(self.absolute_pos_embed, grid)
        if new is not self.absolute_pos_embed:
            self.absolute_pos_embed = nn.Parameter(new, self.absolute_pos_embed.requires_grad)


class Swin(StagedBackbone):
    """Swin, and the host of families that vary it.

    Such a family subclasses it and overrides `make_attn` (the attention of a block), `make_norm` (all norms but feature_norms)
    and `window_side`. What these read must be set before Swin's constructor runs. An attention maps B H W C to the same shape,
    at any size, and has `set_window(window, unshifted)` as WindowAttention has it.

    Args:
        img_size: side, or (height, width), of the images at which the model does what the authors' classification code does.
            Images of another size run too.
        patch_size: side of a patch, pixels.
        embed_dim: channels of the first stage, doubled by each next one.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        window_size: tokens per side of a window.
        mlp_ratio: hidden channels of an MLP per channel.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the scores, d ** -0.5 unless given.
        ape: add a learned absolute position.
        patch_norm: norm after the patch embedding.
        in_chans: channels of an image.
        num_classes: 0 for no classifier.
        global_pool: "avg", or "" for none.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections and inside MLPs.
        drop_path_rate: stochastic depth at the last block, rising linearly from 0.
        dense: follow the authors' dense-prediction code at every size.
        feature_norms: a norm for each returned map as in that code; implies dense.
    """

    family = "swin"
    nhwc = True
    min_size = 1
    authors_others = {
        "attn_drop_rate": NO_SCORE_DROPOUT,
        "use_checkpoint": CHECKPOINTING,
        "fused_window_process": "has no counterpart: windows are not copied here",
    }

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        ape: bool = False,
        patch_norm: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dense: bool = False,
        feature_norms: bool = False,
    ):
        super().__init__()
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must name {len(depths)} stages like depths {tuple(depths)}, got {tuple(num_heads)}")
        self.patch_size, self.window_size, self.dense = patch_size, window_size, dense or feature_norms
        self.img_size = to_2tuple(img_size)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, depths)
        attention = {"qkv_bias": qkv_bias, "qk_scale": qk_scale, "proj_drop": proj_drop_rate}
        stem_norm = self.make_norm if patch_norm else identity
        if ape:
            self.patch_embed = PositionedPatchEmbed(in_chans, embed_dim, patch_size, stem_norm, self.grid(0))
        else:
            self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, stem_norm)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = []
            for j, rate in enumerate(rates[i]):
                attn = self.make_attn(i, j, dim, num_heads[i], **attention)
                blocks.append(Block(dim, attn, Mlp(dim, int(dim * mlp_ratio), drop=proj_drop_rate), rate, self.make_norm))
            self.stages.append(Stage(PatchMerging(dims[i - 1], self.make_norm) if i else nn.Identity(), blocks))
        self.norm = self.make_norm(dims[-1])
        norms = [layer_norm(dim) for dim in dims] if feature_norms else None
        self.finish(dims, [patch_size * 2**i for i in range(len(dims))], num_classes, global_pool, drop_rate, norms)
        self.apply(init_linear)

    def make_norm(self, dim: int) -> nn.Module:
        """A norm over the last axis; all but those of returned maps."""
        return layer_norm(dim)

    def make_attn(self, stage: int, block: int, dim: int, num_heads: int, **attention: Any) -> nn.Module:
        """The attention of a block.

        Args:
            stage: number of the stage.
            block: number of the block in it.
            dim: channels.
            num_heads: of the attention.
            attention: qkv_bias, qk_scale and proj_drop, as WindowAttention takes them.
        """
        side, unshifted = self.window(stage, block)
        return WindowAttention(dim, num_heads, side, block % 2 == 1, unshifted, **attention)

    def window_side(self, stage: int, block: int) -> int:
        """Window side of a block on maps that are larger."""
        return self.window_size

    def grid(self, stage: int) -> tuple[int, int]:
        """Map size of a stage for images of img_size."""
        stride = self.patch_size * 2**stage
        return -(-self.img_size[0] // stride), -(-self.img_size[1] // stride)

    def window(self, stage: int, block: int) -> tuple[int, tuple[int, int] | None]:
        """Window side of a block, and the map size on which it does not shift: the authors' rule for small maps."""
        grid, side = self.grid(stage), self.window_side(stage, block)
        return (side, None) if self.dense or min(grid) > side else (min(grid), grid)

    def set_input_size(self, img_size: int | Sequence[int] | None = None, window_size: int | None = None) -> None:
        """Another native image size (side, or height and width) or window: tables and embedding are resampled, in place."""
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        self.window_size = window_size or self.window_size
        if isinstance(self.patch_embed, PositionedPatchEmbed):
            self.patch_embed.set_grid(self.grid(0))
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            for j, block in enumerate(stage.blocks):
                attn: Any = block.attn  # has set_window, whoever made it
                attn.set_window(*self.window(i, j))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        kept = ("relative_position_bias_table", "absolute_pos_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(kept)}


def identity(dim: int) -> nn.Module:
    """No norm where one could be."""
    return nn.Identity()


T = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
S = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
B = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
L = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
AT_384 = {"img_size": 384, "window_size": 12}

VARIANTS = {
    "swin_t": T,
    "swin_s": S,
    "swin_b": B,
    "swin_l": L,
    "swin_b_384": B | AT_384,
    "swin_l_384": L | AT_384,
}
register_variants(Swin, VARIANTS)
