"""FAN and TAP-FAN: transformers whose channels attend as well, and token-aware average pooling before their token mixing.

Paper:  Zhou et al. 2022, "Understanding The Robustness in Vision Transformers", https://arxiv.org/abs/2204.12451 (FAN), and
        Guo et al. 2023, "Robustifying Token Attention for Vision Transformers", https://arxiv.org/abs/2303.11126 (TAP, ADL).
Source: github.com/NVlabs/FAN @ ee1b7df (NVIDIA Source Code License, non-commercial; its weights state nothing of their own)
        and github.com/guoyongcs/TAPADL @ 6e4dbff (MIT). Written anew from a description of what they compute.
        Released weights load through weights/convert/fan.py.
Differs from the source: accepts any H, W (images of the hybrid models are padded to whole tokens with zeros); TAP accepts maps
that are not square.

The authors' channel norm in the hybrid stem has two code paths: on a map that lies in memory NCHW it divides by C, as any layer
norm, on any other by C - 1. Which of them made the published numbers is not known; ours divides by C, and
`unbiased_stem_norm=True` by C - 1. Their dense code has other position frequencies: `dense_positions=True`.

Shapes: B batch, H W map height and width, N = H * W tokens, C channels, h heads, d = C // h, K pooling scales.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from backbones.base import Stage, StagedBackbone, State, init_linear, register_variants
from backbones.layers import covering, pad_to_multiple
from backbones.tracing import leaf
from weights.manifest import default_cfgs as _default_cfgs

default_cfgs = _default_cfgs("fan") | _default_cfgs("tap_fan")

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class UnbiasedNorm2d(LayerNorm2d):
    """Layer norm over the channels of B C H W with the variance divided by C - 1: the authors' path for channels-last maps."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=1)
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def conv_stem(in_chans: int, dim: int, patch_size: int) -> nn.Sequential:
    """3x3 convolutions of stride 2 without bias, each with BatchNorm, GELU between them."""
    widths = {16: (8, 4, 2, 1), 8: (4, 2, 1), 4: (4, 1)}
    if patch_size not in widths:
        raise ValueError(f"patch_size must be 4, 8 or 16, got {patch_size}")
    layers: list[nn.Module] = []
    for divisor in widths[patch_size]:
        conv = nn.Conv2d(in_chans, dim // divisor, 3, stride=2, padding=1, bias=False)
        layers += [nn.Sequential(conv, nn.BatchNorm2d(dim // divisor)), nn.GELU()]
        in_chans = dim // divisor
    return nn.Sequential(*layers[:-1])


class ConvBlock(nn.Module):
    """ConvNeXt's block: 7x7 depth-wise, channel norm, MLP, layer scale (1e-6 at first), residual."""

    def __init__(self, dim: int, norm: type[nn.Module]):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.mlp = norm(dim, eps=1e-6), Mlp(dim, 4 * dim, use_conv=True)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        return torch.addcmul(x, self.gamma[:, None, None], self.mlp(self.norm(self.conv_dw(x))))


@leaf
def fourier_map(like: Tensor, dense: bool) -> Tensor:
    """Sines and cosines of the row (32 channels) and the column (32), 1 64 H W, of a map B C H W; dense: the dense code's."""
    height, width = like.shape[-2:]
    channel = torch.arange(32, device=like.device, dtype=torch.float32)
    exponent = channel if dense else 2 * torch.div(channel, 2, rounding_mode="floor")
    frequency = 10000 ** (exponent / 32)
    axes = []
    for side in (height, width):
        place = torch.arange(1, side + 1, device=like.device, dtype=torch.float32) / (side + 1e-6) * (2 * math.pi)
        angle = place[:, None] / frequency
        axes.append(torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1).T)  # 32 side
    rows = axes[0][:, :, None].expand(-1, -1, width)
    columns = axes[1][:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns])[None].to(like.dtype)


class Positions(nn.Module):
    """The map, by `proj` where there is one, plus a learned linear map of its Fourier positions."""

    def __init__(self, dim: int, proj: nn.Module, dense: bool):
        super().__init__()
        self.proj, self.dense = proj, dense
        self.token_projection = nn.Conv2d(64, dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B D H W
        x = self.proj(x)
        return x + self.positions(x)

    def positions(self, like: Tensor) -> Tensor:
        return self.token_projection(fourier_map(like, self.dense))


class TokenMixing(nn.Module):
    """Self-attention over all tokens. With `fused_attn` off, the softmax passes through `attn_drop`, where it can be read.

    Args:
        dim: channels.
        heads: number of heads.
        qkv_bias: whether q, k and v have a bias.
        attn_drop: dropout of the weights.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool, attn_drop: float):
        super().__init__()
        self.heads, self.fused_attn = heads, True
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.attn_drop, self.proj = nn.Dropout(attn_drop), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        size = x.shape[1:3]
        x = x.flatten(1, 2)
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            out = self.attn_drop((q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)) @ v
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, size)


class DepthwiseConvs(nn.Module):
    """3x3 depth-wise, GELU, BatchNorm, 3x3 depth-wise."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        x = self.conv2(self.bn(F.gelu(self.conv1(x.permute(0, 3, 1, 2)))))
        return x.permute(0, 2, 3, 1)


class SpatialMlp(nn.Module):
    """Two linear layers, and between them x + gamma * depth-wise convolutions of x; no other activation."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2, self.dwconv = nn.Linear(dim, hidden), nn.Linear(hidden, dim), DepthwiseConvs(hidden)
        self.gamma = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        x = self.fc1(x)
        return self.fc2(torch.addcmul(x, self.gamma, self.dwconv(x)))


class ChannelProcessing(nn.Module):
    """An MLP whose output channels are scaled by their affinity with the tokens (FAN, eq. 5 f.).

    Args:
        dim: channels.
        heads: number of heads.
        hidden: channels inside the MLP.
        qkv_bias: whether the queries' projection has a bias.
    """

    def __init__(self, dim: int, heads: int, hidden: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.mlp_v, self.norm_v = SpatialMlp(dim, hidden), nn.LayerNorm(dim, eps=1e-5)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        tokens = x.flatten(1, 2)
        q, k = (t.softmax(1).unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (self.q(tokens), tokens))  # B h N d
        scale = torch.sigmoid(q.mT @ k.mean(-1, keepdim=True)) * self.temperature  # B h d 1
        return self.norm_v(self.mlp_v(x)) * scale.flatten(1)[:, None, None]


class Pooling(nn.Module):
    """Token-aware average pooling: each token a mixture of itself and 3x3 means of growing dilation (TAP, eq. 2).

    Means divide by 9 at borders too, where zeros stand outside the map.
    """

    def __init__(self, dim: int, scales: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(dim, scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(scales),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        x = x.permute(0, 3, 1, 2)
        return mixed_means(x, self.proj(x).softmax(1)).permute(0, 2, 3, 1)


@leaf
def mixed_means(x: Tensor, shares: Tensor) -> Tensor:
    """x, B C H W, and its 3x3 means of dilation 1, 2, ..., weighted by shares, B K H W, and summed."""
    kernel = x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
    out = shares[:, :1] * x
    for i in range(1, shares.shape[1]):
        out = torch.addcmul(out, shares[:, i : i + 1], F.conv2d(x, kernel, padding=i, dilation=i, groups=x.shape[1]))
    return out


class Block(nn.Module):
    """x + g1 DP(mix(norm1 x)), the mixed tokens pooled first where there is TAP; then x + g2 DP(channels(norm2 x)).

    Args:
        dim: channels.
        heads: of both attentions.
        mlp_ratio: hidden channels per channel.
        qkv_bias: whether projections have a bias.
        scales: of token-aware average pooling; 1 for none.
        attn_drop: dropout of the attention's weights.
        drop_path: stochastic depth.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool, scales: int, attn_drop: float, drop_path: float):
        super().__init__()
        self.dilation_predictor = Pooling(dim, scales) if scales > 1 else None
        self.norm1, self.attn = LayerNorm(dim), TokenMixing(dim, heads, qkv_bias, attn_drop)
        self.norm2, self.mlp = LayerNorm(dim), ChannelProcessing(dim, heads, int(dim * mlp_ratio), qkv_bias)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # B H W C -> B H W C
        mixed = x if self.dilation_predictor is None else self.dilation_predictor(x)
        x = torch.addcmul(x, self.gamma1, self.drop_path(self.attn(self.norm1(mixed))))
        return torch.addcmul(x, self.gamma2, self.drop_path(self.mlp(self.norm2(x))))


class ClassAttention(nn.Module):
    """The first token attends to all; the others do not attend."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # B N C -> B 1 C
        pairs = ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        q, k, v = (layer(t).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, t in pairs)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ClassBlock(nn.Module):
    """Class attention as FAN has it: the other tokens add their normed value, and the normed stream replaces the residual one.

    So the other tokens leave it doubled.

    Args:
        dim: channels.
        heads: of the attention.
        mlp_ratio: hidden channels per channel.
        qkv_bias: whether projections have a bias.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool):
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim), ClassAttention(dim, heads, qkv_bias)
        self.norm2, self.mlp = LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio))
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # B N C -> B N C
        normed = self.norm1(x)
        x = x + self.gamma1 * torch.cat([self.attn(normed), normed[:, 1:]], 1)
        x = self.norm2(x)
        return x + torch.cat([self.gamma2 * self.mlp(x[:, :1]), x[:, 1:]], 1)


class FANStage(Stage):
    """A stage of FAN blocks, which take B H W C; the stages around it pass B C H W."""

    def run_blocks(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        if not len(self.blocks):
            return x
        return super().run_blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ClassStage(FANStage):
    """The last stage: after its blocks the class token joins, and the class blocks run over both.

    Args:
        downsample: of the map.
        blocks: on the map's tokens.
        class_blocks: on class token and map's tokens.
        dim: channels of the class token.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], class_blocks: Sequence[nn.Module], dim: int):
        super().__init__(downsample, blocks)
        self.class_blocks = nn.Sequential(*class_blocks)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))

    def forward(self, x: Tensor) -> State:  # B C H W -> B C H W, B 1 C
        x = super().forward(x)
        size = x.shape[-2:]
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).mT], 1)
        tokens = self.class_blocks(tokens)
        return tokens[:, 1:].mT.unflatten(2, size), tokens[:, :1]


class Halving(nn.Module):
    """3x3 convolution of stride 2 to another width, LayerNorm (eps 1e-5)."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1), LayerNorm2d(out_dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B D H/2 W/2
        return self.norm(self.proj(x))


class FAN(StagedBackbone):
    """Four stages, whose maps are the authors' dense ones: of the hybrid models two ConvNeXt stages (strides 4 and 8) and the
    tokens (16, 16), of the others the tokens after some blocks (16 each); the last stage ends in the class attention. Maps have
    no norm. `forward_features` returns all normalised tokens, the class token first."""

    family = "fan"
    zeros = ("depths",)  # a 0 stands for a stage without
    min_size = 1
    authors_names = {"num_scales": "scales", "cls_attn_layers": "class_depth"}
    authors_others = {
        "depth": "is the sum of `depths` here, the blocks up to each returned map",
        "out_idx": "is `depths` here, the blocks up to each returned map",
        "hybrid_backbone": "is `conv_dims` and the first two of `depths` here",
        "backbone": "is `conv_dims` and the first two of `depths` here",
        "sr_ratio": "has no counterpart: it is 1 in every published model",
        "eta": "has no counterpart: scales start at 1",
        "tokens_norm": "has no counterpart: it is true in every published model",
        "sharpen_attn": "has no counterpart: it is false in every published model",
    }

    def __init__(
        self,
        embed_dim: int = 384,
        depths: Sequence[int] = (5, 3, 4, 0),
        num_heads: int = 8,
        conv_dims: tuple[int, int] | None = None,
        late: tuple[int, int] | None = None,
        patch_size: int = 16,
        scales: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_depth: int = 2,
        dense_positions: bool = False,
        unbiased_stem_norm: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        """Set up the network.

        Args:
            embed_dim, num_heads: of the tokens.
            depths: blocks of the four stages; a map is returned after each.
            conv_dims: channels of the two ConvNeXt stages of a hybrid model; None for a stem of convolutions only.
            late: (channels, heads) of the last stage where it has a smaller and wider map; None for none.
            patch_size: of the stem of convolutions: 4, 8 or 16.
            scales: of token-aware average pooling; 1 for none.
            mlp_ratio, qkv_bias: of all transformer blocks.
            class_depth: blocks of class attention.
            dense_positions: the position frequencies of the authors' dense code, which weights fine-tuned there expect.
            unbiased_stem_norm: divide by C - 1 in the hybrid stem's norms.
            in_chans, num_classes, drop_rate: as timm's.
            global_pool: None for the class token, "avg" or "".
            attn_drop_rate: dropout of the attention of FAN blocks.
            drop_path_rate: stochastic depth, the same in every FAN block; none in the stem and the class attention.
        """
        super().__init__()
        wide, wide_heads = late or (embed_dim, num_heads)
        rest: dict[str, Any] = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias}
        fan = rest | {"scales": scales, "attn_drop": attn_drop_rate, "drop_path": drop_path_rate}
        first = 0 if conv_dims is None else 2  # the stage where the tokens begin
        norm = UnbiasedNorm2d if unbiased_stem_norm else LayerNorm2d
        positions = partial(Positions, embed_dim, dense=dense_positions)
        self.stages = nn.ModuleList()
        if conv_dims is None:
            self.patch_embed = conv_stem(in_chans, embed_dim, patch_size)
            strides, dims = [patch_size] * 4, [embed_dim] * 3 + [wide]
        else:
            self.patch_embed = nn.Sequential(nn.Conv2d(in_chans, conv_dims[0], 4, stride=4), norm(conv_dims[0], eps=1e-6))
            between = nn.Sequential(norm(conv_dims[0], eps=1e-6), nn.Conv2d(conv_dims[0], conv_dims[1], 2, stride=2))
            for downsample, dim, depth in zip((nn.Identity(), between), conv_dims, depths):
                self.stages.append(Stage(downsample, [ConvBlock(dim, norm) for _ in range(depth)]))
            strides, dims = [4, 8, 16, 16], [*conv_dims, embed_dim, wide]
        strides[3] *= 2 if late else 1
        self.hybrid = conv_dims is not None
        for i in range(first, 3):
            proj = nn.Conv2d(dims[1], embed_dim, 2, stride=2) if self.hybrid else nn.Identity()
            downsample = positions(proj) if i == first else nn.Identity()
            self.stages.append(FANStage(downsample, [Block(embed_dim, num_heads, **fan) for _ in range(depths[i])]))
        halving = Halving(embed_dim, wide) if late else nn.Identity()
        blocks = [Block(wide, wide_heads, **fan) for _ in range(depths[3])]
        self.stages.append(
            ClassStage(halving, blocks, [ClassBlock(wide, wide_heads, **rest) for _ in range(class_depth)], wide)
        )
        self.norm = LayerNorm(wide)
        self.finish(dims, strides, num_classes, global_pool, drop_rate, tokens=(0, 0, 0, 1))
        self.apply(init_linear)

    def embed(self, x: Tensor) -> Tensor | State:
        return super().embed(pad_to_multiple(x, 16) if self.hybrid else x)

    def final_norm(self, x: Tensor, tokens: Tensor | None) -> State:
        normed = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed, None if tokens is None else self.norm(tokens)

    @torch.jit.ignore
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As of every staged backbone; maps of a hybrid model are cropped to the image where it was padded to 16 pixels."""
        found = super().forward_intermediates(x, *args, **kwargs)
        final, maps = (None, found) if isinstance(found, list) else found
        indices = kwargs.get("indices", args[0] if args else None)
        take, _ = feature_take_indices(len(self.stages), indices)
        height, width = x.shape[-2:]
        info: Any = self.feature_info
        cut = []
        for i, entry in zip(take, maps, strict=True):
            stride = info[i]["reduction"]
            rows, columns = covering(height, stride), covering(width, stride)
            pair = isinstance(entry, tuple)
            own = (entry[0] if pair else entry)[..., :rows, :columns]
            cut.append((own, entry[1]) if pair else own)
        return cut if final is None else (final, cut)

    def block_places(self) -> list[tuple[int, int]]:
        """(stage, block) of every FAN block, in order."""
        stages = [(i, stage) for i, stage in enumerate(self.stages) if isinstance(stage, FANStage)]
        return [(i, j) for i, stage in stages for j in range(len(stage.blocks))]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        groups = super().group_matcher(coarse)
        if not coarse:
            last = len(self.stages) - 1
            groups["blocks"].insert(2, (rf"^stages\.{last}\.(?:class_blocks|cls_token)", (99998,)))
        return groups

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}


BASE_HYBRID = {"embed_dim": 448, "depths": (3, 3, 16, 0), "num_heads": 8, "conv_dims": (128, 256)}

VARIANTS: dict[str, dict[str, Any]] = {
    "fan_tiny_12_p16_224": {"embed_dim": 192, "depths": (5, 3, 4, 0), "num_heads": 4},
    "fan_small_12_p16_224": {"embed_dim": 384, "depths": (5, 3, 4, 0), "num_heads": 8},
    "fan_base_18_p16_224": {"embed_dim": 448, "depths": (5, 3, 4, 6), "num_heads": 8},
    "fan_large_24_p16_224": {"embed_dim": 480, "depths": (5, 3, 4, 12), "num_heads": 10},
    "fan_tiny_8_p4_hybrid": {"embed_dim": 192, "depths": (3, 3, 8, 0), "num_heads": 8, "conv_dims": (128, 256)},
    "fan_small_12_p4_hybrid": {"embed_dim": 384, "depths": (3, 3, 10, 0), "num_heads": 8, "conv_dims": (128, 256)},
    "fan_base_16_p4_hybrid": BASE_HYBRID,
    "fan_large_16_p4_hybrid": {"embed_dim": 480, "depths": (3, 5, 19, 3), "num_heads": 10, "conv_dims": (128, 256)},
    "fan_xlarge_16_p4_hybrid": {
        "embed_dim": 528, "depths": (3, 7, 20, 3), "num_heads": 11, "conv_dims": (128, 256), "late": (768, 16),
    },
    "tap_fan_base_16_p4_hybrid": BASE_HYBRID | {"scales": 4},
}  # fmt: skip
register_variants(FAN, VARIANTS)
