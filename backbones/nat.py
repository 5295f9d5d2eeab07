"""NAT and DiNAT: every pixel attends to its nearest neighbours, in a window that slides inwards at the borders.

Papers: Hassani et al. 2023, "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143;
        Hassani and Shi 2022, "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001
Source: github.com/SHI-Labs/Neighborhood-Attention-Transformer @ d334f5b (MIT), with NATTEN 0.14 for the attention.
        Released weights load through weights/convert/nat.py.
Differs from the source: the isotropic models take any image size (the authors' take the constructed one).

DiNAT is NAT with dilated neighbourhoods; dilations are not stored in checkpoints, and dense prediction uses others than
classification with the same weights (DENSE_DILATIONS). DiNAT_s has Swin's stem and downsampling. An exported program may keep
the batch and the image size open.

Shapes: B batch, H W map height and width, C channels, h heads, d = C // h.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, to_2tuple
from torch import Tensor, nn

from backbones.arguments import nearest
from backbones.base import Stage, StagedBackbone, init_linear, register_variants
from backbones.layers import PatchEmbed, PatchMerging, crop, drop_path_rates, relative_bias, sdpa
from backbones.ops.neighborhood import neighborhood_attention
from backbones.tracing import leaf
from weights.manifest import default_cfgs as _default_cfgs
from weights.resample import resample_bias_table

default_cfgs = _default_cfgs("nat")

_ADE20K_640 = (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5)
DENSE_DILATIONS = {  # the authors' recipes for dense prediction, by data set and crop; dinat_s_* for DiNAT_s
    "ade20k_512": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "ade20k_640": ((1, 20), (1, 5, 1, 10), _ADE20K_640, (1, 2)),
    "dinat_s_ade20k_512": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "dinat_s_ade20k_640": ((1, 20), (1, 10), _ADE20K_640, (1, 2)),
    "coco": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "mask2former": ((1, 14), (1, 4, 1, 7), (1, 2, 1, 3) * 4 + (1, 3), (1,)),
}


@leaf
def pad_to_least(x: Tensor, least: int) -> Tensor:
    """Zeros at the bottom and on the right of B H W C until both sides have `least` rows."""
    height, width = x.shape[1:3]
    if torch.compiler.is_exporting():  # an exported program may keep the sizes open
        missing: list[Any] = [torch.sym_max(side, least) - side for side in (height, width)]
        return F.pad(x, (0, 0, 0, missing[1], 0, missing[0]))
    if height < least or width < least:
        x = F.pad(x, (0, 0, 0, max(least - width, 0), 0, max(least - height, 0)))
    return x


@leaf
def attend(
    qkv: Tensor, like: Tensor, kernel_size: int, dilation: int, bias: Tensor, scale: float, backend: str | None
) -> Tensor:  # B H' W' 3 h d, B H W C -> B H W C
    """Neighbourhood attention on a padded map, cropped to the size of `like`."""
    q, k, v = qkv.unbind(3)  # each B H' W' h d
    out = neighborhood_attention(q, k, v, kernel_size, dilation, bias, scale, backend)
    return crop(out.flatten(3), *like.shape[1:3])


class NeighborhoodAttention(nn.Module):
    """Attention of every pixel to its kernel_size x kernel_size neighbours, `dilation` apart, with a relative position bias.

    Args:
        dim: channels.
        num_heads: of the attention.
        kernel_size: side of a neighbourhood, odd.
        dilation: between neighbours, pixels of the map.
        qkv_bias: whether q, k and v have a bias.
        qk_scale: factor of the scores, d ** -0.5 unless given.
        proj_drop: dropout of the output.
        backend: of the attention, None for the fastest one that can run.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__()
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        # As in the NATTEN of the released weights: zeros before the linear layer, so that padded keys and values are its bias,
        # and nothing is masked.
        qkv = self.qkv(pad_to_least(x, self.kernel_size * self.dilation))
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        out = attend(qkv, x, self.kernel_size, self.dilation, self.rpb, self.scale, self.backend)
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}"


@leaf
def attend_fully(qkv: Tensor, table: Tensor, heads: int, scale: float) -> Tensor:  # B H W 3C -> B H W C
    """Attention among all pixels with a bias from `table`, h rows columns, resampled where the map is another."""
    size, sides = qkv.shape[1:3], [2 * side - 1 for side in qkv.shape[1:3]]
    if torch.compiler.is_exporting() or list(table.shape[1:]) != sides:
        table = F.interpolate(table[None], sides, mode="bicubic", align_corners=False)[0]
    bias = relative_bias(table, *size)
    q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each B h HW d
    x = sdpa(q, k, v, bias.to(q.dtype)[None], scale)
    return x.transpose(1, 2).flatten(2).unflatten(1, size)


class FullAttention(nn.Module):
    """Attention among all pixels with a bias per relative position; on another grid than `grid` the table is resampled.

    Args:
        dim: channels.
        num_heads: of the attention.
        grid: (rows, columns) for which the table is made.
        qkv_bias: whether q, k and v have a bias.
        qk_scale: factor of the scores, d ** -0.5 unless given.
        proj_drop: dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * grid[0] - 1, 2 * grid[1] - 1))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        return self.proj_drop(self.proj(attend_fully(self.qkv(x), self.rpb, self.num_heads, self.scale)))

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Make `grid` the size at which the table is used as it is."""
        self.rpb = nn.Parameter(resample_bias_table(self.rpb, (2 * grid[0] - 1, 2 * grid[1] - 1)), self.rpb.requires_grad)


class Block(nn.Module):
    """x + DP(s1 * attention(norm1 x)), then x + DP(s2 * MLP(norm2 x)); without LayerScale s1 and s2 do not exist.

    Args:
        attn: of B H W C.
        dim: channels.
        mlp_ratio: hidden channels per channel.
        layer_scale: initial value, None for none.
        drop: dropout in the MLP.
        drop_path: stochastic depth.
    """

    layer_scales = (("attn.proj", "scale1"), ("mlp.fc2", "scale2"))

    def __init__(self, attn: nn.Module, dim: int, mlp_ratio: float, layer_scale: float | None, drop: float, drop_path: float):
        super().__init__()
        scale = nn.Identity if layer_scale is None else lambda: LayerScale(dim, layer_scale)
        self.norm1, self.attn, self.scale1 = nn.LayerNorm(dim, eps=1e-5), attn, scale()
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.scale2 = scale()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with nothing between them, then LayerNorm."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:  # B 3 H W -> B H/4 W/4 C
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """A 3x3 convolution of stride 2 without bias, then LayerNorm."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H/2 W/2 2C
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(StagedBackbone):
    """NAT, DiNAT and DiNAT_s; sequences have an entry a stage.

    Args:
        embed_dim: channels of the first stage, doubled by each next one.
        depths: blocks.
        num_heads: of the attentions.
        kernel_size: side of a neighbourhood, odd.
        dilations: block j of a stage takes entry j modulo their number; None for 1 everywhere, or a name of DENSE_DILATIONS.
        mlp_ratio: hidden channels per channel.
        layer_scale: initial value, None for none.
        overlap: stem and downsampling by the convolutions of NAT and DiNAT, or by the patches of DiNAT_s.
        qkv_bias: whether q, k and v have a bias.
        qk_scale: factor of the scores, d ** -0.5 unless given.
        in_chans: image channels.
        num_classes: 0 for no classifier.
        global_pool: "avg", or another of timm's for maps.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout of attention outputs and in MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        feature_norms: a norm for each returned map, as the authors' dense code has.
        backend: of the attention, None for the fastest one that can run.
    """

    family = "nat"
    nhwc = True
    min_size = 1

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | str | None = None,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        overlap: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        dims = [embed_dim * 2**i for i in range(len(depths))]
        steps = block_dilations(dilations, depths)
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must name {len(depths)} stages like depths {tuple(depths)}, got {tuple(num_heads)}")
        for dim, heads in zip(dims, num_heads):
            if dim % heads:
                raise ValueError(f"num_heads must divide the channels of their stage, got {heads} heads for {dim} channels")
        rates = drop_path_rates(drop_path_rate, depths)
        attn_args: dict[str, Any] = {
            "qkv_bias": qkv_bias,
            "qk_scale": qk_scale,
            "proj_drop": proj_drop_rate,
            "backend": backend,
        }
        self.layout = "dinat" if overlap else "dinat_s"  # of the authors' state dict
        self.patch_embed = ConvStem(in_chans, embed_dim) if overlap else PatchEmbed(in_chans, embed_dim, 4)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            attns = [NeighborhoodAttention(dim, num_heads[i], kernel_size, step, **attn_args) for step in steps[i]]
            blocks = [Block(attn, dim, mlp_ratio, layer_scale, proj_drop_rate, rate) for attn, rate in zip(attns, rates[i])]
            downsample = (ConvDownsample if overlap else PatchMerging)(dims[i - 1]) if i else nn.Identity()
            self.stages.append(Stage(downsample, blocks))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5)
        norms = [nn.LayerNorm(dim, eps=1e-5) for dim in dims] if feature_norms else None
        self.finish(dims, [4 * 2**i for i in range(len(dims))], num_classes, global_pool, drop_rate, norms)
        self.apply(init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


class Isotropic(StagedBackbone):
    """One map of stride `patch_size` through `depth` blocks, a stage each.

    Args:
        make_attn: a block's number -> its attention.
        embed_dim: channels.
        depth: blocks.
        patch_size: side of a patch, pixels.
        mlp_ratio: hidden channels per channel.
        in_chans: image channels.
        num_classes: 0 for no classifier.
        global_pool: "avg", or another of timm's for maps.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
    """

    family = "nat"
    nhwc = True
    min_size = 1
    layout = "isotropic"

    @staticmethod
    def default_out_indices(depth: int = 12, **others: Any) -> list[int]:
        """The ends of the four quarters of a network of `depth` blocks."""
        return sorted({-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})

    def __init__(
        self,
        make_attn: Callable[[int], nn.Module],
        embed_dim: int,
        depth: int,
        patch_size: int,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        blocks = [Block(make_attn(i), embed_dim, mlp_ratio, None, proj_drop_rate, rate) for i, rate in enumerate(rates)]
        self.stages = nn.ModuleList(Stage(nn.Identity(), [block]) for block in blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.finish([embed_dim] * depth, [patch_size] * depth, num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


class NATIsotropic(Isotropic):
    """A flat ViT with neighbourhood attention, for any image size.

    Args:
        embed_dim: channels.
        depth: blocks.
        num_heads: of the attentions.
        kernel_size: side of a neighbourhood, odd.
        dilation: of every second block; the others have 1.
        patch_size: side of a patch, pixels.
        qkv_bias: whether q, k and v have a bias.
        qk_scale: factor of the scores, d ** -0.5 unless given.
        proj_drop_rate: dropout of attention outputs and in MLPs.
        backend: of the attention, None for the fastest one that can run.
        kwargs: further arguments of Isotropic.
    """

    authors_others = {"layer": "is the model's name here: nat_isotropic_* and dinat_isotropic_* for 'na', vitrpb_* for 'vit'"}

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int = 7,
        dilation: int = 1,
        patch_size: int = 16,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop_rate: float = 0.0,
        backend: str | None = None,
        **kwargs,
    ):
        def make_attn(i: int) -> NeighborhoodAttention:
            step = dilation if i % 2 else 1
            return NeighborhoodAttention(embed_dim, num_heads, kernel_size, step, qkv_bias, qk_scale, proj_drop_rate, backend)

        super().__init__(make_attn, embed_dim, depth, patch_size, proj_drop_rate=proj_drop_rate, **kwargs)


class ViTRPB(Isotropic):
    """The authors' ViT for comparison: full attention with a relative position bias, no class token, no absolute positions.

    Args:
        img_size: side, or (height, width), at which the bias table is used as it is; any other image resamples it.
        embed_dim: channels.
        depth: blocks.
        num_heads: of the attentions.
        patch_size: side of a patch, pixels.
        qkv_bias: whether q, k and v have a bias.
        qk_scale: factor of the scores, d ** -0.5 unless given.
        proj_drop_rate: dropout of attention outputs and in MLPs.
        kwargs: further arguments of Isotropic.
    """

    layout = "vitrpb"
    authors_others = {
        "layer": "is the model's name here: nat_isotropic_* and dinat_isotropic_* for 'na', vitrpb_* for 'vit'",
        "kernel_size": "has no counterpart: every token sees all others",
        "dilation": "has no counterpart: every token sees all others",
    }

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        patch_size: int = 16,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop_rate: float = 0.0,
        **kwargs,
    ):
        grid = patch_grid(img_size, patch_size)

        def make_attn(i: int) -> FullAttention:
            return FullAttention(embed_dim, num_heads, grid, qkv_bias, qk_scale, proj_drop_rate)

        super().__init__(make_attn, embed_dim, depth, patch_size, proj_drop_rate=proj_drop_rate, **kwargs)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resample the bias tables for images of this size (side, or height and width), in place."""
        assert isinstance(self.patch_embed, PatchEmbed)
        for stage in self.stages:
            assert isinstance(stage, Stage)
            attn: Any = stage.blocks[0].attn
            attn.set_grid(patch_grid(img_size, self.patch_embed.patch_size))


def patch_grid(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of an image, counting the ones that its padding completes."""
    height, width = to_2tuple(img_size)
    return -(-height // patch_size), -(-width // patch_size)


def block_dilations(dilations: Sequence[Sequence[int]] | str | None, depths: Sequence[int]) -> list[list[int]]:
    """The dilation of every block, from NAT's argument. Raises ValueError for an unknown name or a wrong number of stages."""
    if dilations is None:
        dilations = [(1,)] * len(depths)
    if isinstance(dilations, str):
        if dilations not in DENSE_DILATIONS:
            raise ValueError(f"unknown dilations {dilations!r}; {nearest(dilations, DENSE_DILATIONS)}")
        dilations = DENSE_DILATIONS[dilations]
    if len(dilations) != len(depths):
        raise ValueError(f"dilations must have one entry for each of the {len(depths)} stages, got {dilations}")
    if not all(pattern and min(pattern) >= 1 for pattern in dilations):
        raise ValueError(f"every stage needs at least one dilation, each at least 1; got {dilations}")
    return [[pattern[j % len(pattern)] for j in range(depth)] for pattern, depth in zip(dilations, depths)]


TINY = {"embed_dim": 64, "depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3}
MINI = TINY | {"depths": (3, 4, 6, 5)}
SMALL = {"embed_dim": 96, "depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2}
BASE = {"embed_dim": 128, "depths": (3, 4, 18, 5), "num_heads": (4, 8, 16, 32), "mlp_ratio": 2}
LARGE = {"embed_dim": 192, "depths": (3, 4, 18, 5), "num_heads": (6, 12, 24, 48), "mlp_ratio": 2}
S_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "mlp_ratio": 4, "overlap": False}
S_SMALL = S_TINY | {"depths": (2, 2, 18, 2)}
S_BASE = S_SMALL | {"embed_dim": 128, "num_heads": (4, 8, 16, 32)}
S_LARGE = S_SMALL | {"embed_dim": 192, "num_heads": (6, 12, 24, 48)}
AT_224 = {"dilations": ((1, 8), (1, 4), (1, 2), (1,))}
AT_384 = {"dilations": ((1, 13), (1, 6), (1, 3), (1,))}
SCALE = {"layer_scale": 1e-5}

VARIANTS = {
    "nat_mini": MINI,
    "nat_tiny": TINY,
    "nat_small": SMALL | SCALE,
    "nat_base": BASE | SCALE,
    "dinat_mini": MINI | AT_224,
    "dinat_tiny": TINY | AT_224,
    "dinat_small": SMALL | AT_224,  # no LayerScale, unlike nat_small
    "dinat_base": BASE | AT_224 | SCALE,
    "dinat_large": LARGE | AT_224,
    "dinat_large_384": LARGE | AT_384,
    "dinat_large_384_11x11": LARGE | AT_224 | {"kernel_size": 11},
    "dinat_s_tiny": S_TINY | AT_224,
    "dinat_s_small": S_SMALL | AT_224,
    "dinat_s_base": S_BASE | AT_224,
    "dinat_s_large": S_LARGE | AT_224,
    "dinat_s_large_384": S_LARGE | AT_384,
}
register_variants(NAT, VARIANTS)

ISO_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 12}
ISO_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 24}

ISOTROPIC_VARIANTS = {
    "nat_isotropic_small": ISO_SMALL,
    "nat_isotropic_base": ISO_BASE,
    "dinat_isotropic_small": ISO_SMALL | {"dilation": 2},
    "dinat_isotropic_base": ISO_BASE | {"dilation": 2},
}
register_variants(NATIsotropic, ISOTROPIC_VARIANTS)

VITRPB_VARIANTS = {
    "vitrpb_small": ISO_SMALL,
    "vitrpb_base": ISO_BASE,
}
register_variants(ViTRPB, VITRPB_VARIANTS)
