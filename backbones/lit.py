"""LIT: no attention where maps are large, full attention where they are small, merging that learns where to look.

Paper:  Pan et al. 2022, "Less is More: Pay Less Attention in Vision Transformers", https://arxiv.org/abs/2105.14217
Source: github.com/ziplab/LIT @ 742e961 (Apache-2.0). Released weights load through weights/convert/lit.py.
The authors' LIT-Ti and their LIT-S/M/B are two networks: `LITTi` (absolute positions, class token) and `LIT` (relative
position bias, mean over positions).
Differs from the source: any image size, by the rules of the authors' dense-prediction code. `LIT` pads images with zeros at
the right and bottom to multiples of 4 and resizes its bias tables bicubically to the map; `LITTi` drops the up to 3 pixels that
fill no patch and resizes its position embeddings bilinearly, comparing rows and columns (the source compares token counts and
crashes on 448x448). Merging drops the last row or column of an odd map.

Shapes: B batch, H W map height and width, N = H * W, C channels, h heads, d = C // h.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from backbones.arguments import BUILT_IN, CHECKPOINTING, NO_SCORE_DROPOUT
from backbones.base import Stage, StagedBackbone, State, TokenStage, check_img_size, init_linear, register_variants
from backbones.layers import Block, DeformableMerge, drop_path_rates, relative_bias, sdpa
from backbones.tracing import leaf
from weights.manifest import default_cfgs as _default_cfgs
from weights.resample import resample_bias_table, resample_position_embedding

default_cfgs = _default_cfgs("lit")


def map_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """(rows, columns) of the four maps when the first is height x width."""
    return [(height >> i, width >> i) for i in range(4)]


def resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """1 C h w -> 1 C of `size`, align_corners False, not antialiased; the same tensor if it has that size."""
    if not torch.compiler.is_exporting() and image.shape[-2:] == size:  # an exported program may keep the size open
        return image
    return F.interpolate(image.float(), size, mode=mode, align_corners=False).to(image.dtype)


@leaf
def position_bias(table: Tensor, native: tuple[int, int], height: int, width: int) -> Tensor:
    """Bias between all pairs of positions of a map, h N N (query, key), from a table of the differences query - key.

    Args:
        table: (2 rows - 1) * (2 columns - 1) x h, row-major; resized bicubically, as an image per head and without
            antialiasing, when the map is another.
        native: (rows, columns) of the map for which the table is made.
        height: of the map.
        width: of the map.
    """
    image = table.T.reshape(1, -1, 2 * native[0] - 1, 2 * native[1] - 1)
    image = resize(image, (2 * height - 1, 2 * width - 1), "bicubic")[0]
    return relative_bias(image.flip(1, 2), height, width)  # that one counts key - query


class Attention(nn.Module):
    """Self-attention over the whole map.

    Args:
        dim: channels.
        heads: number of heads.
        qkv_bias: whether q, k and v have a bias.
        size: (rows, columns) of its relative position bias, or None for no bias.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, size: tuple[int, int] | None = None):
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if size is not None:
            self.bias_table = nn.Parameter(torch.empty((2 * size[0] - 1) * (2 * size[1] - 1), heads))
            nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C; without bias also B N C -> B N C
        bias = None if self.size is None else position_bias(self.bias_table, self.size, x.shape[1], x.shape[2])
        qkv = self.qkv(x).flatten(1, -2).unflatten(-1, (3, self.heads, -1))  # B N 3 h d
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each B h N d
        # four axes: a mask of three makes torch leave its fused kernel on a CPU
        out = sdpa(q, k, v, None if bias is None else bias.to(q.dtype)[None])
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def resize(self, size: tuple[int, int]) -> None:
        """Make `size` the native map of the bias table."""
        assert self.size is not None
        shape, old = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (size, self.size))
        table = resample_bias_table(self.bias_table.detach(), shape, old)
        self.bias_table, self.size = nn.Parameter(table, self.bias_table.requires_grad), size


class LIT(StagedBackbone):
    """LIT-S/M/B; sequences have an entry a stage.

    Args:
        depths: blocks.
        dims: channels.
        heads: of the attentions; those of the first two stages are unused, as they have no attention.
        mlp_ratio: hidden channels per channel.
        qkv_bias: whether q, k and v have a bias.
        img_size: side, or (height, width), for whose maps the bias tables are made; other images resize them.
        in_chans: image channels.
        num_classes: 0 for no classifier.
        global_pool: "avg", or another of timm's for maps.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        feature_norms: a LayerNorm on each returned map, as the authors' segmentation code has, or the stages that have one
            ((1, 2, 3) in their detection code).
    """

    family = "lit"
    nhwc = True
    min_size = 29  # eight rows of patches, so that the last map has one
    authors_names = {"num_heads": "heads"}
    authors_others = {
        "embed_dim": "is `dims` here, the channels of every stage: (96, 192, 384, 768) for 96",
        "patch_size": "has no counterpart: it is 4",
        "qk_scale": BUILT_IN,
        "ape": "has no counterpart: no published model has it",
        "patch_norm": BUILT_IN,
        "use_checkpoint": CHECKPOINTING,
        "norm_layer": BUILT_IN,
        "attn_drop_rate": NO_SCORE_DROPOUT,
    }

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool | Sequence[int] = False,
    ):
        super().__init__()
        rates, sizes = drop_path_rates(drop_path_rate, depths), self.sizes(img_size)

        def block(i: int, rate: float) -> Block:
            attn = Attention(dims[i], heads[i], qkv_bias, sizes[i]) if i > 1 else None
            return Block(dims[i], attn, Mlp(dims[i], int(dims[i] * mlp_ratio), drop=proj_drop_rate), rate)

        self.patch_embed = patches(in_chans, dims[0], pad=True)
        self.stages = nn.ModuleList(
            Stage(DeformableMerge(dims[i - 1], dim) if i else nn.Identity(), [block(i, rate) for rate in rates[i]])
            for i, dim in enumerate(dims)
        )
        self.norm = nn.LayerNorm(dims[-1])
        normed = range(4) if feature_norms is True else feature_norms or ()
        norms = [nn.LayerNorm(dim) if i in normed else nn.Identity() for i, dim in enumerate(dims)] if normed else None
        self.finish(dims, [4, 8, 16, 32], num_classes, global_pool, drop_rate, norms)
        self.apply(init_linear)

    @classmethod
    def sizes(cls, img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Maps of the four stages for an image of this size."""
        height, width = check_img_size(img_size, cls.min_size)
        return map_sizes(-(-height // 4), -(-width // 4))

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the bias tables for images of this size, so that no forward has to."""
        for stage, size in zip(self.stages, self.sizes(img_size)):
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                attn: Any = block.attn  # None in the first two stages
                if attn is not None:
                    attn.resize(size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("bias_table")}


def patches(in_chans: int, dim: int, pad: bool) -> PatchEmbed:
    """4x4 patches, then LayerNorm (eps 1e-5 in all LITs): B 3 H W -> B H/4 W/4 C."""
    return PatchEmbed(
        None, 4, in_chans, dim, norm_layer=nn.LayerNorm, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=pad
    )


@leaf
def positions(embedding: Tensor, native: tuple[int, int], height: int, width: int) -> Tensor:
    """Position embedding of a map, 1 H W C; an entry before the map's (of the class token) is left out.

    Args:
        embedding: 1 (1 +) rows * columns C; resized bilinearly when the map is another.
        native: (rows, columns) of the map for which it is made.
        height: of the map.
        width: of the map.
    """
    embedding = embedding[:, embedding.shape[1] - native[0] * native[1] :]
    image = embedding.mT.reshape(1, -1, *native)
    return resize(image, (height, width), "bilinear").permute(0, 2, 3, 1)


@leaf
def with_first_position(tokens: Tensor, embedding: Tensor) -> Tensor:
    """Class tokens B 1 C plus the first entry of the position embedding."""
    return tokens + embedding[:, :1]


class TiStage(TokenStage):
    """A stage of LIT-Ti: downsampling, position embedding, blocks; the last stage may hold the class token.

    Args:
        downsample: of the map, B H W C.
        blocks: on tokens.
        dim: channels.
        size: (rows, columns) of the position embedding.
        tokens: how many entries it has before the map's (1 in the last stage).
        class_token: whether a class token begins here.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        dim: int,
        size: tuple[int, int],
        tokens: int = 0,
        class_token: bool = False,
    ):
        super().__init__(downsample, blocks, nhwc=True, class_token=dim if class_token else None)
        self.size = size
        self.pos_embed = nn.Parameter(torch.empty(1, tokens + size[0] * size[1], dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def start(self, x: Tensor, tokens: Tensor | None) -> State:  # B 2H 2W D -> B H W C, B 1 C
        x, tokens = super().start(x, tokens)
        x = x + positions(self.pos_embed, self.size, x.shape[1], x.shape[2])
        return x, None if tokens is None else with_first_position(tokens, self.pos_embed)

    def resize(self, size: tuple[int, int]) -> None:
        """Make `size` the native map of the position embedding."""
        tokens = self.pos_embed.shape[1] - self.size[0] * self.size[1]
        embedding = resample_position_embedding(self.pos_embed.detach(), size, tokens, self.size, "bilinear")
        self.pos_embed, self.size = nn.Parameter(embedding, self.pos_embed.requires_grad), size


class LITTi(StagedBackbone):
    """LIT-Ti. As in a ViT, `forward_features` gives tokens, B 1+N C, the class token first; its maps are NCHW.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        heads: of each stage; those of the first two are unused, as they have no attention.
        mlp_ratios: hidden channels per channel, of each stage.
        qkv_bias: whether q, k and v have a bias.
        class_token: False leaves it out, as the authors' dense-prediction code does; then `forward_features` gives a map and
            global_pool must be "avg" or "".
        img_size: side, or (height, width), for whose maps the position embeddings are made; other images resize them.
        in_chans: image channels.
        num_classes: 0 for no classifier.
        global_pool: "token", "avg" (over the map's positions) or "".
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
    """

    family = "lit"
    nhwc = True
    min_size = 32
    authors_names = {"embed_dims": "dims", "num_heads": "heads"}
    authors_others = {
        "patch_size": "has no counterpart: it is 4",
        "norm_layer": BUILT_IN,
        "qk_scale": BUILT_IN,
        "attn_drop_rate": NO_SCORE_DROPOUT,
    }

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        dims: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        qkv_bias: bool = True,
        class_token: bool = True,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        rates = drop_path_rates(drop_path_rate, depths)

        def block(i: int, rate: float) -> Block:
            attn = Attention(dims[i], heads[i], qkv_bias) if i > 1 else None
            mlp = Mlp(dims[i], int(dims[i] * mlp_ratios[i]), drop=proj_drop_rate)
            return Block(dims[i], attn, mlp, rate, partial(nn.LayerNorm, eps=1e-6))

        self.patch_embed = patches(in_chans, dims[0], pad=False)
        self.stages = nn.ModuleList(
            TiStage(
                DeformableMerge(dims[i - 1], dim) if i else nn.Identity(),
                [block(i, rate) for rate in rates[i]],
                dim,
                size,
                tokens=int(i == 3),
                class_token=class_token and i == 3,
            )
            for i, (dim, size) in enumerate(zip(dims, self.sizes(img_size)))
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.class_token = class_token
        self.finish(dims, [4, 8, 16, 32], num_classes, global_pool, drop_rate, tokens=(0, 0, 0, int(class_token)))
        self.apply(init_linear)

    @classmethod
    def sizes(cls, img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Maps of the four stages for an image of this size."""
        height, width = check_img_size(img_size, cls.min_size)
        return map_sizes(height // 4, width // 4)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the position embeddings for images of this size, so that no forward has to."""
        for stage, size in zip(self.stages, self.sizes(img_size)):
            assert isinstance(stage, TiStage)
            stage.resize(size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The class token; the authors do decay the position embeddings."""
        return {"stages.3.cls_token"}


TI_VARIANTS = {
    "lit_ti": {"depths": (3, 4, 6, 3), "dims": (64, 128, 320, 512), "heads": (1, 2, 5, 8), "mlp_ratios": (8, 8, 4, 4)},
}
register_variants(LITTi, TI_VARIANTS)

VARIANTS = {
    "lit_s": {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "heads": (3, 6, 12, 24)},
    "lit_m": {"depths": (2, 2, 18, 2), "dims": (96, 192, 384, 768), "heads": (3, 6, 12, 24)},
    "lit_b": {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "heads": (4, 8, 16, 32)},
}
register_variants(LIT, VARIANTS)
