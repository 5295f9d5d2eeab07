"""FLatten: focused linear attention inside Swin, PVT, PVTv2 and CSwin.

Paper:  Han et al. 2023, "FLatten Transformer: Vision Transformer using Focused Linear Attention",
        https://arxiv.org/abs/2308.00442
Source: github.com/LeapLabTHU/FLatten-Transformer @ abdb115 (no licence file; its Swin and CSwin code says MIT, Microsoft).
    Released weights load through weights/convert/flatten.py.
Differs from the source, which takes the constructed image size alone: any H, W. At other sizes the Swin forms follow Swin's
dense rules (windows of the constructed size, padded maps), the others attend over the whole map with resized encodings, and
stripes of CSwin are padded and the padding masked. Maps are those after the last block of a stage; PVTv2's have their norm.

Letters of `attn_type`, one a stage: L linear attention, S the host's softmax attention, M linear in the first k blocks and
softmax in the others, where k is the number after the letters ("LMSS2").

Shapes: B batch (windows count as images), H W map height and width, N queries, n keys, C channels, h heads, d = C // h.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, to_2tuple
from torch import Tensor, nn

from backbones.arguments import BUILT_IN, CHECKPOINTING, NO_SCORES
from backbones.base import Stage, StagedBackbone, check_img_size, init_linear, register_variants
from backbones.layers import covering, crop, drop_path_rates, layer_norm, open_windows, pad_to_multiple, sdpa
from backbones.ops.linear_attention import linear_attention
from backbones.swin import Swin, open_shift, shift_mask, shift_of, to_windows
from backbones.tracing import leaf
from weights.manifest import default_cfgs as _default_cfgs
from weights.resample import is_open, resample_position_embedding

default_cfgs = _default_cfgs("flatten")

Size = tuple[int, int]


def is_linear(attn_type: str, stages: int, stage: int, block: int) -> bool:
    """Whether a block attends linearly; ValueError for letters that say nothing.

    Args:
        attn_type: letters, see the top of the file.
        stages: how many there are.
        stage: number of the stage.
        block: number of the block in it.
    """
    letters, count = attn_type[:stages], attn_type[stages:]
    if (
        len(letters) != stages
        or set(letters) - set("LSM")
        or (count and not count.isdigit())
        or ("M" in letters) != bool(count)
    ):
        raise ValueError(
            f"attn_type must have a letter L, S or M for each of {stages} stages, and a number of blocks after them if there "
            f"is an M, got {attn_type!r}"
        )
    return letters[stage] == "L" or (letters[stage] == "M" and block < int(count))


@leaf
def fitted(encoding: Tensor, grid: Size, size: Size) -> Tensor:
    """An encoding 1 n C of the positions of `grid`, resized (bicubic) for `size`; the same tensor if it fits."""
    return resample_position_embedding(encoding, size, old_grid=grid)


def split(x: Tensor, heads: int) -> Tensor:  # B n C -> B h n d
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def activated(x: Tensor, scale: Tensor | None, power: float | None) -> Tensor:
    """Features that are not negative, B n C: plain ReLU, or with a power the focused map of the paper (eq. 5 and 6)."""
    x = F.relu(x)
    if scale is None or power is None:
        return x
    # The norm is of all heads together. In float32: the powers of half precisions would overflow.
    x = (x.float() + 1e-6) / F.softplus(scale.float())
    norm = x.norm(dim=-1, keepdim=True)
    x = x**power
    return x * (norm / x.norm(dim=-1, keepdim=True))


@leaf
def mixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    like: Tensor,
    keys_like: Tensor,
    encoding: Tensor,
    grid: Size,
    scale: Tensor | None,
    power: float | None,
    heads: int,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Linear attention and the convolution of the values.

    Args:
        q: queries of a map of the size of `like`, B N C.
        k, v: keys and values of a map of the size of `keys_like`, B n C.
        like, keys_like: maps . H W ., for their sizes.
        encoding, grid: added to the keys, 1 n C, and the size of map it is for.
        scale, power: of the focused activation, or None.
        heads: attention heads.
        weight, bias: of the depth-wise convolution that all heads share.
    """
    size, keys = (like.shape[1], like.shape[2]), (keys_like.shape[1], keys_like.shape[2])
    k = k + fitted(encoding, grid, keys)
    q, k = (split(activated(x, scale, power), heads) for x in (q, k))
    # FLatten divides the sums of the weights by the number of keys before it adds 1e-6, SLAB does not.
    out = linear_attention(q, k, split(v, heads), 1e-6, per_key=power is not None)
    if size != keys:  # stretched along the sequence, not as an image
        v = F.interpolate(v.mT, size[0] * size[1], mode="linear", align_corners=False).mT
    # One convolution of all channels of the map as it lies, channels last, with the heads' weights repeated.
    weight, bias = weight.repeat(heads, 1, 1, 1), bias.repeat(heads)
    maps = F.conv2d(v.unflatten(1, size).permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return out.transpose(1, 2).flatten(2) + maps.permute(0, 2, 3, 1).flatten(1, 2)


class LinearAttention(nn.Module):
    """What the linear attentions of all hosts share: encoding, activation, attention and the convolution of the values.

    Args:
        dim: channels.
        num_heads: of the attention.
        keys: the map of keys for which the encoding is made.
        kernel_size: of the convolution.
        focusing: the power of the focused activation, None for a plain ReLU without learned scale, which is SLAB's.
    """

    def __init__(self, dim: int, num_heads: int, keys: Size, kernel_size: int = 5, focusing: float | None = 3):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the channels of its stage, got {num_heads} heads for {dim} channels")
        head = dim // num_heads
        self.num_heads, self.keys, self.focusing = num_heads, (keys[0], keys[1]), focusing
        self.positional_encoding = nn.Parameter(torch.zeros(1, keys[0] * keys[1], dim))
        self.scale = None if focusing is None else nn.Parameter(torch.zeros(1, 1, dim))
        self.dwc = nn.Conv2d(head, head, kernel_size, padding=kernel_size // 2, groups=head)  # holds the weights only

    def mix(self, q: Tensor, k: Tensor, v: Tensor, like: Tensor, keys_like: Tensor) -> Tensor:
        """B N C and twice B n C -> B N C; like, keys_like: maps of their sizes, . H W .

        Args:
            q: B N C.
            k: B n C.
            v: B n C.
            like: a map of the queries' size, . H W .
            keys_like: a map of the keys' size.
        """
        weight, bias = self.dwc.weight, self.dwc.bias
        assert bias is not None
        encoding, keys, scale, power = self.positional_encoding, self.keys, self.scale, self.focusing
        return mixed(q, k, v, like, keys_like, encoding, keys, scale, power, self.num_heads, weight, bias)

    @torch.no_grad()
    def set_keys(self, keys: Size) -> None:
        """Another grid of keys, with the encoding resized for it, in place."""
        if tuple(keys) != self.keys:
            resized = resample_position_embedding(self.positional_encoding, keys, old_grid=self.keys)
            self.positional_encoding = nn.Parameter(resized, self.positional_encoding.requires_grad)
            self.keys = (keys[0], keys[1])


# ---------------------------------------------------------------- Swin


@leaf
def from_windows(x: Tensor, like: Tensor, window: int, shifted: bool, unshifted: Size | None) -> Tensor:
    """Windows B n L C put back where they were in a map of the size of `like`, B H W C."""
    batch, height, width, dim = like.shape
    if is_open((height, width)):
        like = like[0, :, :, 0]
        windows = open_windows(like, (window, window), open_shift(like, window, shifted, unshifted))
        return windows.joined(x).unflatten(1, (height, width))
    shift = shift_of(height, width, window, shifted, unshifted)
    rows, columns = covering(height, window), covering(width, window)
    x = x.view(batch, rows, columns, window, window, dim).transpose(2, 3)
    x = x.reshape(batch, rows * window, columns * window, dim)
    x = x.roll((shift, shift), (1, 2)) if shift else x
    return crop(x, height, width)


class WindowLinearAttention(LinearAttention):
    """Linear attention inside Swin's windows. Where the map is rolled, its ends meet: as in the source, nothing is masked."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        shifted: bool,
        unshifted: Size | None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        **linear: Any,
    ):
        """As Swin's WindowAttention, and `kernel_size` and `focusing` of LinearAttention; qk_scale has no meaning here.

        Args:
            dim: channels.
            num_heads: of the attention.
            window: tokens per side of a window.
            shifted: whether windows are shifted by half a window.
            unshifted: map size on which nothing is shifted, None for none.
            qkv_bias: whether q, k and v have a bias.
            qk_scale: has no meaning here, taken as a host gives it.
            proj_drop: dropout of the output.
            linear: `kernel_size` and `focusing` of LinearAttention.
        """
        super().__init__(dim, num_heads, (window, window), **linear)
        self.window, self.shifted, self.unshifted = window, shifted, unshifted
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        windows = to_windows(x, self.window, self.shifted, self.unshifted)
        q, k, v = self.qkv(windows.flatten(0, 1)).chunk(3, -1)  # B*n L C
        like = q.unflatten(1, self.keys)
        out = self.mix(q, k, v, like, like).view_as(windows)
        return self.proj_drop(self.proj(from_windows(out, x, self.window, self.shifted, self.unshifted)))

    def mask(self, height: int, width: int) -> Tensor | None:
        """The mask that the authors' files hold for a map of this size though they do not use it, or None."""
        shift = shift_of(height, width, self.window, self.shifted, self.unshifted)
        rows, columns = -(-height // self.window), -(-width // self.window)
        like = self.positional_encoding
        return shift_mask(rows, columns, self.window, shift, like.device, like.dtype) if shift else None

    def set_window(self, window: int, unshifted: Size | None) -> None:
        """Another window, with the encoding resized for it, in place."""
        self.set_keys((window, window))
        self.window, self.unshifted = window, unshifted


class FlattenSwin(Swin):
    """Swin, some of whose blocks attend linearly in large windows.

    Args:
        img_size: as Swin's.
        attn_type: see the top of the file.
        window_size: of the linear blocks; the others have 7, or 12 if it is larger than 56.
        focusing_factor: of the linear attention.
        kernel_size: of the linear attention.
        depths: blocks of each stage.
        kwargs: further arguments of Swin.
    """

    family = "flatten"
    host = "swin"

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        attn_type: str = "LLSS",
        window_size: int = 56,
        focusing_factor: float | None = 3,
        kernel_size: int = 5,
        depths: Sequence[int] = (2, 2, 6, 2),
        **kwargs: Any,
    ):
        self.attn_type, self.count = attn_type, len(depths)
        self.linear: dict[str, Any] = {"kernel_size": kernel_size, "focusing": focusing_factor}
        super().__init__(img_size=img_size, window_size=window_size, depths=depths, **kwargs)

    def window_side(self, stage: int, block: int) -> int:
        if is_linear(self.attn_type, self.count, stage, block):
            return self.window_size
        return 7 if self.window_size <= 56 else 12

    def make_attn(self, stage: int, block: int, dim: int, num_heads: int, **attention: Any) -> nn.Module:
        if not is_linear(self.attn_type, self.count, stage, block):
            return super().make_attn(stage, block, dim, num_heads, **attention)
        side, unshifted = self.window(stage, block)
        return WindowLinearAttention(dim, num_heads, side, block % 2 == 1, unshifted, **attention, **self.linear)


# ---------------------------------------------------------------- PVT and PVTv2

MakeNorm = Callable[[int, float], nn.Module]  # channels, eps -> a norm over the last axis


def plain_norm(dim: int, eps: float) -> nn.Module:
    return nn.LayerNorm(dim, eps=eps)


class Embed(nn.Module):
    """A strided convolution and a norm; `overlap` pads it like PVTv2's, else the map is padded to whole patches.

    Args:
        inputs: channels that come in.
        dim: channels that leave.
        kernel: side of the convolution.
        stride: of the convolution.
        norm: of the result.
        overlap: zeros at each side, 0 to pad to whole patches instead.
    """

    def __init__(self, inputs: int, dim: int, kernel: int, stride: int, norm: nn.Module, overlap: int = 0):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(inputs, dim, kernel, stride=stride, padding=overlap), norm
        self.multiple = 1 if overlap else stride

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B H/s W/s D
        return self.norm(self.proj(pad_to_multiple(x, self.multiple)).permute(0, 2, 3, 1))


class MapEmbed(Embed):
    """The same between stages, whose maps are B H W C."""

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H/s W/s D
        return super().forward(x.permute(0, 3, 1, 2))


def reduced(grid: Size, ratio: int) -> Size:
    """Size of the map of keys."""
    return max(grid[0] // ratio, 1), max(grid[1] // ratio, 1)


@leaf
def at_least(x: Tensor, side: int) -> Tensor:
    """B C H W padded with zeros at the bottom and on the right so that no side is shorter than `side`."""
    if torch.compiler.is_exporting():  # an exported program may keep the sizes open
        missing: list[Any] = [torch.sym_max(n, side) - n for n in x.shape[2:]]
        return F.pad(x, (0, missing[1], 0, missing[0]))
    down, right = (max(side - n, 0) for n in x.shape[2:])
    return F.pad(x, (0, right, 0, down)) if down or right else x


class ReducedKeys(nn.Module):
    """What PVT's attentions share: projections, and keys and values from a map reduced by a strided convolution."""

    sr: nn.Conv2d
    norm: nn.Module

    def add_projections(self, dim: int, qkv_bias: bool, ratio: int, norm: MakeNorm) -> None:
        """Add the layers.

        Args:
            dim: channels.
            qkv_bias: whether q, k and v have a bias.
            ratio: side of the patch that becomes a key.
            norm: of the reduced map, from channels and eps.
        """
        self.ratio = ratio
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if ratio > 1:
            self.sr, self.norm = nn.Conv2d(dim, dim, ratio, stride=ratio), norm(dim, 1e-5)

    def reduce(self, x: Tensor) -> Tensor:  # B H W C -> B h w C
        """The map of which keys and values are made."""
        if self.ratio == 1:
            return x
        return self.norm(self.sr(at_least(x.permute(0, 3, 1, 2), self.ratio)).permute(0, 2, 3, 1))


class ReducedLinearAttention(ReducedKeys, LinearAttention):
    """Linear attention over the whole map with reduced keys and values.

    Args:
        dim: channels.
        num_heads: of the attention.
        grid: (rows, columns) of the map.
        qkv_bias: whether q, k and v have a bias.
        ratio: side of the patch that becomes a key.
        norm: of the reduced map, from channels and eps.
        linear: `kernel_size` and `focusing` of LinearAttention.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: Size, qkv_bias: bool, ratio: int, norm: MakeNorm = plain_norm, **linear: Any
    ):
        super().__init__(dim, num_heads, reduced(grid, ratio), **linear)
        self.add_projections(dim, qkv_bias, ratio, norm)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        keys = self.reduce(x)
        k, v = self.kv(keys.flatten(1, 2)).chunk(2, -1)
        return self.proj(self.mix(self.q(x.flatten(1, 2)), k, v, x, keys)).view_as(x)


class ReducedAttention(ReducedKeys):
    """PVT's softmax attention over the whole map with reduced keys and values.

    Args:
        dim: channels.
        num_heads: of the attention.
        qkv_bias: whether q, k and v have a bias.
        ratio: side of the patch that becomes a key.
        norm: of the reduced map, from channels and eps.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, ratio: int, norm: MakeNorm = plain_norm):
        super().__init__()
        self.num_heads = num_heads
        self.add_projections(dim, qkv_bias, ratio, norm)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        q = self.q(x.flatten(1, 2)).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(self.reduce(x).flatten(1, 2)).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(sdpa(q, k, v).transpose(1, 2).flatten(2)).view_as(x)


class DepthwiseMlp(nn.Module):
    """PVTv2's MLP, with a 3x3 depth-wise convolution before its activation."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    """x + DP(attn(norm1 x)), then x + DP(mlp(norm2 x)).

    Args:
        norm1: before the attention.
        attn: of a map B H W C.
        norm2: before the MLP.
        mlp: of a map B H W C.
        drop_path: stochastic depth.
    """

    def __init__(self, norm1: nn.Module, attn: nn.Module, norm2: nn.Module, mlp: nn.Module, drop_path: float):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@leaf
def with_encoding(x: Tensor, encoding: Tensor, grid: Size) -> Tensor:
    """A map B H W C plus an encoding 1 n C of the positions of `grid`, resized (bilinear) where the map has another size."""
    resized = resample_position_embedding(encoding, tuple(x.shape[1:3]), old_grid=grid, mode="bilinear")
    return x + resized.unflatten(1, x.shape[1:3])


class PVTStage(Stage):
    """A stage of PVT: positions are added before its blocks (PVT), or a norm follows them (PVTv2).

    Args:
        downsample: of the map.
        blocks: on B H W C.
        dim: channels.
        grid: (rows, columns) for which positions are made, None for no positions.
        norm: after the blocks, None for none.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], dim: int, grid: Size | None, norm: nn.Module | None):
        super().__init__(downsample, blocks)
        self.grid, self.norm = grid, norm
        self.pos_embed: nn.Parameter | None = None
        if grid is not None:
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, grid[0] * grid[1], dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H/2 W/2 D
        x = self.downsample(x)
        if self.pos_embed is not None and self.grid is not None:
            x = with_encoding(x, self.pos_embed, self.grid)
        x = self.run_blocks(x)
        return x if self.norm is None else self.norm(x)


class FlattenPVT(StagedBackbone):
    """PVT (version 1) or PVTv2 with linear attention. The mean of the last map is classified; PVT's has no norm.

    PVT has no class token, and the authors' files hold a final norm that their code never applies: it is kept as it is, to be
    written back.
    """

    family = "flatten"
    host = "pvt"
    nhwc = True
    min_size = 1
    authors_names = {"embed_dims": "dims"}
    authors_others = {
        "attn_drop_rate": NO_SCORES,
        "qk_scale": NO_SCORES,
        "linear": "has no counterpart: no published model pools its keys",
        "use_checkpoint": CHECKPOINTING,
        "norm_eps": BUILT_IN,
        "norm_layer": BUILT_IN,
    }

    def __init__(
        self,
        img_size: int | Size = 224,
        version: int = 1,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        la_sr_ratios: Sequence[int] | str = (1, 1, 1, 1),
        attn_type: str = "LLLL",
        focusing_factor: float | None = 3,
        kernel_size: int = 5,
        patch_size: int = 4,
        qkv_bias: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        """Set up the network; sequences have an entry a stage.

        Args:
            img_size: side, or (height, width), for which the encodings are made; other sizes run too.
            version: 1 or 2.
            dims, depths, num_heads, mlp_ratios: channels, blocks, heads, hidden channels per channel.
            sr_ratios, la_sr_ratios: sides of the patches that become a key, of softmax and of linear attention, the latter
                also as the authors write it, "1111".
            attn_type: see the top of the file.
            focusing_factor, kernel_size: of the linear attention.
            patch_size: of the first embedding, 4 in all published models.
            qkv_bias: whether q, k and v have a bias.
            in_chans, num_classes, global_pool, drop_rate: as timm's.
            drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        """
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {version}")
        self.version, self.patch_size = version, patch_size
        self.img_size = check_img_size(img_size, self.min_size)
        count, rates = len(dims), drop_path_rates(drop_path_rate, depths)
        linear: dict[str, Any] = {"kernel_size": kernel_size, "focusing": focusing_factor}
        self.strides = [patch_size * 2**i for i in range(count)]
        eps = 1e-6

        def embed(kind: type[Embed], i: int) -> Embed:
            stride, inputs = (2, dims[i - 1]) if i else (patch_size, in_chans)
            kernel = stride if version == 1 else 3 if i else 7
            return kind(inputs, dims[i], kernel, stride, self.make_norm(dims[i], 1e-5), 0 if version == 1 else kernel // 2)

        def block(i: int, j: int) -> nn.Module:
            norm = self.make_norm if version == 1 else plain_norm  # of the reduced map; SLAB's PVTv2 keeps LayerNorms there
            attn: nn.Module
            if is_linear(attn_type, count, i, j):
                attn = ReducedLinearAttention(
                    dims[i], num_heads[i], self.grid(i), qkv_bias, int(la_sr_ratios[i]), norm, **linear
                )
            else:
                attn = ReducedAttention(dims[i], num_heads[i], qkv_bias, sr_ratios[i], norm)
            hidden = int(dims[i] * mlp_ratios[i])
            mlp = Mlp(dims[i], hidden) if version == 1 else DepthwiseMlp(dims[i], hidden)
            return Block(self.make_norm(dims[i], eps), attn, self.make_norm(dims[i], eps), mlp, rates[i][j])

        self.patch_embed = embed(Embed, 0)
        self.stages = nn.ModuleList(
            PVTStage(
                embed(MapEmbed, i) if i else nn.Identity(),
                [block(i, j) for j in range(depth)],
                dims[i],
                self.grid(i) if version == 1 else None,
                None if version == 1 else self.make_norm(dims[i], eps),
            )
            for i, depth in enumerate(depths)
        )
        self.norm = nn.Identity()
        if version == 1 and self.keeps_unused_norm:
            self.register_buffer("unused_norm_weight", torch.ones(dims[-1]))
            self.register_buffer("unused_norm_bias", torch.zeros(dims[-1]))
        self.finish(dims, self.strides, num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    keeps_unused_norm = True

    def make_norm(self, dim: int, eps: float) -> nn.Module:
        """A norm over the last axis."""
        return plain_norm(dim, eps)

    def grid(self, stage: int) -> Size:
        """Size of a stage's map for images of img_size."""
        return -(-self.img_size[0] // self.strides[stage]), -(-self.img_size[1] // self.strides[stage])

    def set_input_size(self, img_size: int | Size) -> None:
        """Resize the encodings for images of this size, in place."""
        self.img_size = check_img_size(to_2tuple(img_size), self.min_size)
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, PVTStage)
            grid = self.grid(i)
            if stage.pos_embed is not None:
                resized = resample_position_embedding(stage.pos_embed.detach(), grid, old_grid=stage.grid, mode="bilinear")
                stage.pos_embed, stage.grid = nn.Parameter(resized, stage.pos_embed.requires_grad), grid
            for block in stage.blocks:
                if isinstance(block.attn, ReducedLinearAttention):
                    block.attn.set_keys(reduced(grid, block.attn.ratio))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        groups = super().group_matcher(coarse)
        if not coarse:
            groups["blocks"].insert(0, (r"^stages\.(\d+)\.norm", (99990,)))  # PVTv2: a stage's norm follows its blocks
        return groups


# ---------------------------------------------------------------- CSwin


@leaf
def stripes(x: Tensor, size: tuple[int | None, int | None]) -> Tensor:
    """B H W C -> B*n h w C, windows of `size` (None: the whole side), the map padded with zeros to whole windows."""
    rows, columns = size
    if rows is not None:
        x = pad_to_multiple(x, (rows, 1), nhwc=True).unflatten(1, (-1, rows))
        x = x.flatten(0, 1)
    if columns is not None:
        x = pad_to_multiple(x, (1, columns), nhwc=True).unflatten(2, (-1, columns))
        x = x.transpose(1, 2).flatten(0, 1)
    return x


@leaf
def unstripe(x: Tensor, like: Tensor, size: tuple[int | None, int | None]) -> Tensor:
    """B*n h w C, windows of `size`, -> B H W C, the size of `like`."""
    batch, height, width, _ = like.shape
    rows, columns = size
    if columns is not None:
        x = x.unflatten(0, (-1, covering(width, columns))).transpose(1, 2).flatten(2, 3)
    if rows is not None:
        x = x.unflatten(0, (batch, covering(height, rows))).flatten(1, 2)
    return crop(x, height, width)


@leaf
def stripe_attention(q: Tensor, k: Tensor, v: Tensor, exists: Tensor, heads: int) -> Tensor:
    """Softmax attention inside windows B*n h w C; exists, B*n h w 1, is 0 at padding, which no query sees."""
    size = q.shape[1:3]
    q, k, v = (split(x.flatten(1, 2), heads) for x in (q, k, v))
    mask = exists.flatten(1)[:, None, None] > 0
    whole = not torch.compiler.is_compiling() and not torch.compiler.is_exporting() and exists.device.type != "meta"
    out = sdpa(q, k, v, None if whole and bool(mask.all()) else mask)
    return out.transpose(1, 2).flatten(2).unflatten(1, size)


class InStripes(nn.Module):
    """What CSwin's attentions share: stripes, and a depth-wise 3x3 convolution of the values, padded inside each stripe."""

    def set_stripes(self, dim: int, size: tuple[int | None, int | None]) -> None:
        """Add the convolution; size: (rows, columns) of a stripe, None for the whole side."""
        self.size = size
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps B H W C -> their stripes B*n h w C, and what the convolution makes of those of v."""
        q, k, v = (stripes(x, self.size) for x in (q, k, v))
        return q, k, v, self.get_v(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class StripeAttention(InStripes):
    """Softmax attention inside stripes, plus the convolution of the values."""

    def __init__(self, dim: int, num_heads: int, size: tuple[int | None, int | None]):
        super().__init__()
        self.num_heads = num_heads
        self.set_stripes(dim, size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # each B H W C -> B H W C
        like, exists = q, stripes(torch.ones_like(q[..., :1]), self.size)
        q, k, v, local = self.cut(q, k, v)
        return unstripe(stripe_attention(q, k, v, exists, self.num_heads) + local, like, self.size)


class StripeLinearAttention(InStripes, LinearAttention):
    """Linear attention inside stripes, which share one encoding, plus both convolutions of the values.

    Args:
        dim: channels.
        num_heads: of the attention.
        size: (rows, columns) of a stripe, None for the whole side.
        keys: (rows, columns) for which the encoding is made.
        linear: `kernel_size` and `focusing` of LinearAttention.
    """

    def __init__(self, dim: int, num_heads: int, size: tuple[int | None, int | None], keys: Size, **linear: Any):
        super().__init__(dim, num_heads, keys, **linear)
        self.set_stripes(dim, size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # each B H W C -> B H W C
        like = q
        q, k, v, local = self.cut(q, k, v)
        out = self.mix(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), q, k)
        return unstripe(out.view_as(q) + local, like, self.size)


class CSwinAttention(nn.Module):
    """q, k and v of all channels; with two branches the first half of the channels goes to one, the second to the other."""

    def __init__(self, dim: int, branches: Sequence[nn.Module], qkv_bias: bool):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.attns = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        q, k, v = self.qkv(x).chunk(3, -1)
        ends = [i * self.proj.in_features // len(self.attns) for i in range(len(self.attns) + 1)]
        parts = zip(self.attns, ends, ends[1:])
        return self.proj(torch.cat([attn(q[..., a:b], k[..., a:b], v[..., a:b]) for attn, a, b in parts], -1))


class FlattenCSwin(StagedBackbone):
    """CSwin with linear attention."""

    family = "flatten"
    host = "cswin"
    nhwc = True
    min_size = 3  # the stem's 7x7 kernel with its padding of 2
    authors_names = {"depth": "depths"}
    authors_others = {
        "attn_drop_rate": NO_SCORES,
        "qk_scale": NO_SCORES,
        "use_checkpoint": CHECKPOINTING,
        "use_chk": CHECKPOINTING,
        "norm_eps": BUILT_IN,
        "norm_layer": BUILT_IN,
    }

    def __init__(
        self,
        img_size: int | Size = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_size: Sequence[int] = (1, 2, 7, 7),
        la_split_size: Sequence[int] | str = (56, 28, 14, 7),
        split_at: int = 224,
        attn_type: str = "LLSS",
        focusing_factor: float | None = 3,
        kernel_size: int = 5,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        """Set up the network; sequences have an entry a stage.

        Args:
            img_size: side, or (height, width), for which the encodings are made; other sizes run too.
            embed_dim: channels of the first stage, doubled by each next one.
            depths, num_heads: blocks and heads.
            split_size, la_split_size: width of the stripes of softmax and of linear attention, the latter also as the
                authors write it, "56-28-14-7".
            split_at: side of the images whose maps may be one stripe: a block whose stripes would be as wide as its map there
                has one branch over the whole map, at any size.
            attn_type: see the top of the file.
            focusing_factor, kernel_size: of the linear attention.
            mlp_ratio, qkv_bias: of all blocks.
            in_chans, num_classes, global_pool, drop_rate: as timm's.
            drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        """
        super().__init__()
        self.img_size = check_img_size(img_size, self.min_size)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates, count = drop_path_rates(drop_path_rate, depths), len(depths)
        linear_width = [int(side) for side in (la_split_size.split("-") if isinstance(la_split_size, str) else la_split_size)]
        linear: dict[str, Any] = {"kernel_size": kernel_size, "focusing": focusing_factor}

        def block(i: int, j: int) -> nn.Module:
            lines, grid = is_linear(attn_type, count, i, j), self.grid(i)
            width = (linear_width if lines else split_size)[i]
            whole = i == count - 1 or width == split_at // 4 // 2**i
            sizes = [(None, None)] if whole else [(None, width), (width, None)]
            dim, heads = dims[i] // len(sizes), num_heads[i] // len(sizes)
            branches: list[nn.Module] = []
            for size in sizes:
                if lines:
                    keys = (size[0] or grid[0], size[1] or grid[1])
                    branches.append(StripeLinearAttention(dim, heads, size, keys, **linear))
                else:
                    branches.append(StripeAttention(dim, heads, size))
            norm1, norm2 = self.make_norm(dims[i]), self.make_norm(dims[i])
            attn = CSwinAttention(dims[i], branches, qkv_bias)
            return Block(norm1, attn, norm2, Mlp(dims[i], int(dims[i] * mlp_ratio)), rates[i][j])

        def merging(i: int) -> nn.Module:
            return MapEmbed(dims[i - 1], dims[i], 3, 2, self.make_norm(dims[i]), overlap=1) if i else nn.Identity()

        self.patch_embed = Embed(in_chans, dims[0], 7, 4, self.make_norm(dims[0]), overlap=2)
        self.stages = nn.ModuleList(Stage(merging(i), [block(i, j) for j in range(n)]) for i, n in enumerate(depths))
        self.norm = self.make_norm(dims[-1])
        self.finish(dims, [4 * 2**i for i in range(count)], num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def make_norm(self, dim: int) -> nn.Module:
        """A norm over the last axis."""
        return layer_norm(dim)

    def grid(self, stage: int) -> Size:
        """Size of a stage's map for images of img_size: the stem does not pad to whole patches, each merging rounds up."""
        height, width = ((side - 3) // 4 + 1 for side in self.img_size)
        return -(-height // 2**stage), -(-width // 2**stage)

    def set_input_size(self, img_size: int | Size) -> None:
        """Resize the encodings for images of this size, in place."""
        self.img_size = check_img_size(to_2tuple(img_size), self.min_size)
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                branches: Any = block.attn
                for attn in branches.attns:
                    if isinstance(attn, StripeLinearAttention):
                        grid = self.grid(i)
                        attn.set_keys((attn.size[0] or grid[0], attn.size[1] or grid[1]))


SWIN = {"attn_type": "LLSS", "window_size": 56}
PVT: dict[str, Any] = {"attn_type": "LLLL", "la_sr_ratios": (1, 1, 1, 1)}
PVT_V2 = PVT | {"version": 2}
CSWIN = {"attn_type": "LLSS"}

SWIN_VARIANTS: dict[str, dict[str, Any]] = {
    "flatten_swin_t": SWIN | {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "flatten_swin_s": SWIN | {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "flatten_swin_b": SWIN | {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "flatten_swin_b_384": SWIN
    | {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "img_size": 384, "window_size": 96},
}
PVT_VARIANTS: dict[str, dict[str, Any]] = {
    "flatten_pvt_t": PVT | {"depths": (2, 2, 2, 2)},
    "flatten_pvt_s": PVT | {"depths": (3, 4, 6, 3)},
    "flatten_pvt_m": PVT | {"depths": (3, 4, 18, 3)},
    "flatten_pvt_b": PVT | {"depths": (3, 8, 27, 3)},
    "flatten_pvt_v2_b0": PVT_V2 | {"depths": (2, 2, 2, 2), "dims": (32, 64, 160, 256)},
    "flatten_pvt_v2_b1": PVT_V2 | {"depths": (2, 2, 2, 2)},
    "flatten_pvt_v2_b2": PVT_V2 | {"depths": (3, 4, 6, 3)},
    "flatten_pvt_v2_b3": PVT_V2 | {"depths": (3, 4, 18, 3)},
    "flatten_pvt_v2_b4": PVT_V2 | {"depths": (3, 8, 27, 3)},
    "flatten_pvt_v2_b5": PVT_V2 | {"depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4)},
}
CSWIN_VARIANTS: dict[str, dict[str, Any]] = {
    "flatten_cswin_t": CSWIN | {"depths": (2, 4, 18, 1)},
    "flatten_cswin_s": CSWIN | {"depths": (2, 4, 32, 2)},
    "flatten_cswin_b": CSWIN | {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)},
    "flatten_cswin_b_384": CSWIN
    | {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32), "img_size": 384}
    | {"split_size": (1, 2, 12, 12), "la_split_size": (96, 48, 24, 12), "split_at": 384},
}
register_variants(FlattenSwin, SWIN_VARIANTS)
register_variants(FlattenPVT, PVT_VARIANTS)
register_variants(FlattenCSwin, CSWIN_VARIANTS)
