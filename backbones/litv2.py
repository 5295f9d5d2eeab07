"""LITv2: HiLo attention, some heads inside small windows, the others over a pooled map.

Paper:  Pan et al. 2022, "Fast Vision Transformers with HiLo Attention", https://arxiv.org/abs/2205.13213
Source: github.com/ziplab/LITv2 @ 7501c86 (Apache-2.0). Released weights load through weights/convert/litv2.py.
Differs from the source: any image size in the one model, by the rules of the authors' dense-prediction code (images padded with
zeros at the right and bottom to multiples of 4, maps to multiples of the window; merging drops an odd last row or column).

Shapes: B batch, H W map height and width, C channels, h heads, d head width, w window side.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from backbones.arguments import BUILT_IN, CHECKPOINTING, NO_SCORE_DROPOUT
from backbones.base import Stage, StagedBackbone, init_linear, register_variants
from backbones.layers import Block, DeformableMerge, crop, drop_path_rates, pad_to_multiple, sdpa
from weights.manifest import default_cfgs as _default_cfgs

default_cfgs = _default_cfgs("litv2")


class HiLo(nn.Module):
    """Attention split by heads (paper, section 3.2): high frequencies within windows, low ones against the averages of windows.

    Of `heads` heads the first int(heads * alpha) are Lo-Fi (the product is cut, not rounded), the rest Hi-Fi; with window 1 all
    are Lo-Fi and nothing is pooled, which is ordinary attention. A map that windows do not divide is padded with zeros that
    take part as keys, without a mask. qkv_bias: of queries, keys and values; the two output projections always have one.

    Args:
        dim: channels.
        heads: number of heads, Hi-Fi and Lo-Fi together.
        window: side of a window, positions.
        alpha: share of Lo-Fi heads.
        qkv_bias: of queries, keys and values; the two output projections always have one.
        qk_scale: factor of the scores, d ** -0.5 unless given.
    """

    def __init__(
        self, dim: int, heads: int, window: int = 2, alpha: float = 0.5, qkv_bias: bool = True, qk_scale: float | None = None
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} cannot be split among {heads} heads")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha, the share of Lo-Fi heads, must be within 0 and 1, got {alpha}")
        self.width, self.window = dim // heads, window
        self.scale = self.width**-0.5 if qk_scale is None else qk_scale
        self.lo_heads = heads if window == 1 else int(heads * alpha)
        self.hi_heads = heads - self.lo_heads
        lo, hi = self.lo_heads * self.width, self.hi_heads * self.width
        if lo:
            self.l_q = nn.Linear(dim, lo, bias=qkv_bias)
            self.l_kv = nn.Linear(dim, 2 * lo, bias=qkv_bias)
            self.l_proj = nn.Linear(lo, lo)
        if hi:
            self.h_qkv = nn.Linear(dim, 3 * hi, bias=qkv_bias)
            self.h_proj = nn.Linear(hi, hi)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        padded = pad_to_multiple(x, self.window, nhwc=True) if self.window > 1 else x
        parts = [self.hi(padded, x.shape[1], x.shape[2])] if self.hi_heads else []
        parts += [self.lo(x, padded)] if self.lo_heads else []
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]  # Hi-Fi channels first

    def hi(self, x: Tensor, height: int, width: int) -> Tensor:  # B H' W' C -> B H W h*d
        """Attention inside each window of a padded map, cropped to height x width."""
        w = self.window
        qkv = self.h_qkv(x).unflatten(1, (-1, w)).unflatten(3, (-1, w)).unflatten(-1, (3, self.hi_heads, self.width))
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).unbind(0)  # each B H'/w W'/w h w*w d
        # Written out: windows have 4 or 16 tokens, too few for the fused kernel to pay for its calls.
        out = (q @ k.mT * self.scale).softmax(-1) @ v
        out = out.unflatten(4, (w, w)).permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return self.h_proj(crop(out, height, width))

    def lo(self, x: Tensor, padded: Tensor) -> Tensor:  # B H W C, B H' W' C -> B H W h*d
        """Attention of every position with the averages of all windows of the padded map."""
        q = self.l_q(x).flatten(1, 2).unflatten(-1, (self.lo_heads, -1)).transpose(1, 2)  # B h H*W d
        if self.window > 1:
            padded = F.avg_pool2d(padded.permute(0, 3, 1, 2), self.window).permute(0, 2, 3, 1)
        kv = self.l_kv(padded).flatten(1, 2).unflatten(-1, (2, self.lo_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # each B h H'/w*W'/w d
        out = sdpa(q, k, v, scale=self.scale)
        return self.l_proj(out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))


class ConvMlp(nn.Module):
    """Linear, 3x3 depth-wise convolution (zero padding, no residual), exact GELU, linear.

    Its zero padding is all that tells positions apart.
    """

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # views: the convolution runs channels-last
        return self.drop(self.fc2(self.drop(F.gelu(x))))


class LITv2(StagedBackbone):
    """LITv2; sequences have an entry a stage.

    Args:
        depths: blocks.
        dims: channels.
        heads: of the attentions; those of the first two stages are unused, as they have no attention.
        windows: of the third and fourth stage, the only ones with attention.
        alpha: share of Lo-Fi heads.
        mlp_ratio: hidden channels per channel.
        qkv_bias: whether q, k and v have a bias.
        in_chans: image channels.
        num_classes: 0 for no classifier.
        global_pool: "avg", or another of timm's for maps.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        feature_norms: a LayerNorm on each returned map, as the authors' segmentation code has, or the stages that have one
            ((1, 2, 3) in their detection code, which also publishes windows (4, 1)).
    """

    family = "litv2"
    nhwc = True
    min_size = 29  # eight rows of patches, so that the last map has one
    authors_names = {"num_heads": "heads"}
    authors_others = {
        "embed_dim": "is `dims` here, the channels of every stage: (96, 192, 384, 768) for 96",
        "local_ws": "is `windows` here, without the two zeros of the stages that have no attention",
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
        windows: Sequence[int] = (2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool | Sequence[int] = False,
    ):
        super().__init__()
        if len(windows) != 2 or min(windows) < 1:
            raise ValueError(f"windows must be two sides, of the third and fourth stage, at least 1, got {tuple(windows)}")
        rates = drop_path_rates(drop_path_rate, depths)

        def block(i: int, rate: float) -> Block:
            attn = HiLo(dims[i], heads[i], windows[i - 2], alpha, qkv_bias) if i > 1 else None
            return Block(dims[i], attn, ConvMlp(dims[i], int(dims[i] * mlp_ratio), proj_drop_rate), rate)

        self.patch_embed = PatchEmbed(
            None, 4, in_chans, dims[0], norm_layer=nn.LayerNorm, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True
        )
        self.stages = nn.ModuleList(
            Stage(DeformableMerge(dims[i - 1], dim) if i else nn.Identity(), [block(i, rate) for rate in rates[i]])
            for i, dim in enumerate(dims)
        )
        self.norm = nn.LayerNorm(dims[-1])
        normed = range(4) if feature_norms is True else feature_norms or ()
        norms = [nn.LayerNorm(dim) if i in normed else nn.Identity() for i, dim in enumerate(dims)] if normed else None
        self.finish(dims, [4, 8, 16, 32], num_classes, global_pool, drop_rate, norms)
        self.apply(init_weights)


def init_weights(module: nn.Module) -> None:
    """Linear layers as everywhere; depth-wise convolutions from a normal whose variance is 2 / fan-out (9 each)."""
    init_linear(module)
    if isinstance(module, ConvMlp):
        nn.init.normal_(module.dwconv.weight, std=(2 / 9) ** 0.5)
        assert module.dwconv.bias is not None
        nn.init.zeros_(module.dwconv.bias)


VARIANTS = {
    "litv2_s": {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "heads": (3, 6, 12, 24)},
    "litv2_m": {"depths": (2, 2, 18, 2), "dims": (96, 192, 384, 768), "heads": (3, 6, 12, 24)},
    "litv2_b": {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "heads": (4, 8, 16, 32)},
    "litv2_b_384": {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "heads": (4, 8, 16, 32)},
}
register_variants(LITv2, VARIANTS)
