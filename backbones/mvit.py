"""MViT (version 1) for images: attention whose queries, keys and values are pooled, with more channels where there are fewer.

Paper:  Fan et al. 2021, "Multiscale Vision Transformers", https://arxiv.org/abs/2104.11227 (its image model, MViT-B-16)
Source: github.com/facebookresearch/SlowFast @ 287ec00, configs/ImageNet/MVIT_B_16_CONV.yaml (Apache-2.0). Released weights load
    through weights/convert/mvit.py.
Differs from the source: any H, W (positions are resized bilinearly, as its own resizing does with one frame); logits in
evaluation, where the source gives their softmax; the pooling convolutions are two-dimensional, as there is one frame.

A stage begins with the block that pools its queries; its last block widens the channels for the next one. The authors published
no dense code for this version: the maps are those that the last block of each stage leaves.

Shapes: B batch, H W map height and width, N = H W, C channels, h heads, d = C // h.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from backbones.base import Stage, StagedBackbone, State, check_img_size, check_size, register_variants
from backbones.layers import drop_path_rates, sdpa
from backbones.tracing import leaf
from weights.manifest import default_cfgs as _default_cfgs
from weights.resample import resample_position_embedding

default_cfgs = _default_cfgs("mvit")

Size = tuple[int, int]
EPS = 1e-6


def pooled_size(size: Size, stride: int) -> Size:
    """(rows, columns) that a 3x3 pooling with this stride leaves of a map."""
    return (size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1


@leaf
def pool(x: Tensor, weight: Tensor, size: Size, stride: int) -> Tensor:
    """Tokens B 1+N C, class token first -> B 1+n h d: the map under a depth-wise 3x3 convolution, the same for every head.

    Args:
        x: B 1+N C.
        weight: d 1 3 3.
        size: (rows, columns) of the map.
        stride: of the convolution.
    """
    heads = x.shape[2] // len(weight)
    image = x[:, 1:].unflatten(1, size).permute(0, 3, 1, 2)
    image = F.conv2d(image, weight.repeat(heads, 1, 1, 1), stride=stride, padding=1, groups=x.shape[2])
    return torch.cat([x[:, :1], image.flatten(2).mT], 1).unflatten(2, (heads, -1))


@leaf
def pool_skip(x: Tensor, size: Size, stride: int) -> Tensor:
    """Tokens B 1+N C -> B 1+n C, the map under a 3x3 maximum."""
    image = F.max_pool2d(x[:, 1:].unflatten(1, size).permute(0, 3, 1, 2), 3, stride, padding=1)
    return torch.cat([x[:, :1], image.flatten(2).mT], 1)


@leaf
def as_tokens(image: Tensor, token: Tensor) -> Tensor:  # B H W C and B 1 C -> B 1+N C
    return torch.cat([token, image.flatten(1, 2)], 1)


@leaf
def as_map(x: Tensor, size: Size) -> Tensor:  # B 1+N C -> B H W C
    return x[:, 1:].unflatten(1, size)


class PoolingAttention(nn.Module):
    """Self-attention with pooled queries, keys and values, each normalised after its pooling (paper, section 3.1).

    Args:
        dim: channels.
        num_heads: of the attention.
        qkv_bias: whether q, k and v have a bias.
        stride: of the pooling of queries; 1 for none.
        kv_stride: of the pooling of keys and values, which is there at 1 too.
    """

    pool_q: nn.Conv2d
    pool_k: nn.Conv2d
    pool_v: nn.Conv2d
    norm_q: nn.LayerNorm
    norm_k: nn.LayerNorm
    norm_v: nn.LayerNorm

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, stride: int, kv_stride: int):
        super().__init__()
        width = dim // num_heads
        self.num_heads, self.stride, self.kv_stride = num_heads, stride, kv_stride
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        for name in ("k", "v", *("q" if stride > 1 else "")):
            step = stride if name == "q" else kv_stride
            setattr(self, f"pool_{name}", nn.Conv2d(width, width, 3, step, 1, groups=width, bias=False))
            setattr(self, f"norm_{name}", nn.LayerNorm(width, eps=EPS))

    def forward(self, x: Tensor, size: Size) -> Tensor:  # B 1+N C -> B 1+n C, the map pooled by the stride
        q, k, v = self.qkv(x).chunk(3, -1)
        k = self.norm_k(pool(k, self.pool_k.weight, size, self.kv_stride))
        v = self.norm_v(pool(v, self.pool_v.weight, size, self.kv_stride))
        if self.stride > 1:
            q = self.norm_q(pool(q, self.pool_q.weight, size, self.stride))
        else:
            q = q.unflatten(2, (self.num_heads, -1))
        out = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """skip(x) + DP(attn(norm1 x)), then widen(norm2 x) + DP(mlp(norm2 x)), where a block that keeps its width skips plainly."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        stride: int,
        kv_stride: int,
        drop_path: float,
    ):
        """Set up the block.

        Args:
            dim: channels that come in and are attended to.
            out_dim: channels after the MLP.
            num_heads: of the attention.
            mlp_ratio: hidden channels per channel.
            qkv_bias: whether q, k and v have a bias.
            stride: of the pooling of queries; 1 for none.
            kv_stride: of the pooling of keys and values, which is there at 1 too.
            drop_path: stochastic depth.
        """
        super().__init__()
        self.stride = stride
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = PoolingAttention(dim, num_heads, qkv_bias, stride, kv_stride)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), out_dim)
        self.proj: nn.Module | None = nn.Linear(dim, out_dim) if dim != out_dim else None
        self.drop_path = DropPath(drop_path)

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # map B H W C and class token B 1 C
        image, token = state
        size, x = (image.shape[1], image.shape[2]), as_tokens(image, token)
        attended = self.drop_path(self.attn(self.norm1(x), size))
        if self.stride > 1:
            x, size = pool_skip(x, size, self.stride), pooled_size(size, self.stride)
        x = x + attended
        inside = self.norm2(x)
        x = (x if self.proj is None else self.proj(inside)) + self.drop_path(self.mlp(inside))
        return as_map(x, size), x[:, :1]


class MViTStage(Stage):
    """Blocks on a map and its class token; the first one pools."""

    def forward(self, x: Any) -> Any:
        return self.run_blocks(x)


@leaf
def with_positions(image: Tensor, token: Tensor, positions: Tensor, grid: Size) -> tuple[Tensor, Tensor]:
    """The map B H W C and the class token 1 1 C -> B 1 C with their positions, 1 1+N C, made for `grid`."""
    positions = resample_position_embedding(positions, image.shape[1:3], 1, old_grid=grid, mode="bilinear")
    placed = image + positions[:, 1:].unflatten(1, image.shape[1:3])
    return placed, (token + positions[:, :1]).expand(image.shape[0], -1, -1)


class MViT(StagedBackbone):
    """MViT version 1 on one frame. The class token is classified; `forward_features` gives it before the last map's tokens."""

    family = "mvit"
    nhwc = True
    min_size = 1

    def __init__(
        self,
        img_size: int | Size = 224,
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 2, 11, 2),
        num_heads: int = 1,
        kv_stride: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        """Set up the network.

        Args:
            img_size: side, or (height, width), for which the positions are made; other sizes run too.
            embed_dim: channels in the first stage's blocks, doubled by the last block of every stage but the last.
            depths: blocks of each stage.
            num_heads: of the first stage, doubled by each next one.
            kv_stride: of the pooling of keys and values in the first stage, halved by each next one down to 1.
            mlp_ratio: hidden channels per channel.
            qkv_bias: whether q, k and v have a bias.
            in_chans: image channels.
            num_classes: 0 for no classifier.
            global_pool: "token", "avg" (of the map) or "".
            drop_rate: dropout before the classifier.
            drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        """
        super().__init__()
        self.img_size = check_img_size(img_size, self.min_size)
        last, rates = len(depths) - 1, drop_path_rates(drop_path_rate, depths)

        def block(i: int, j: int) -> Block:
            dim, widens = embed_dim * 2**i, j == depths[i] - 1 and i < last
            stride, keys = 2 if i and j == 0 else 1, max(kv_stride >> i, 1)
            return Block(dim, 2 * dim if widens else dim, num_heads * 2**i, mlp_ratio, qkv_bias, stride, keys, rates[i][j])

        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(in_chans, embed_dim, 7, stride=4, padding=3))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.stages = nn.ModuleList(
            MViTStage(nn.Identity(), [block(i, j) for j in range(depth)]) for i, depth in enumerate(depths)
        )
        dims = [embed_dim * 2 ** min(i + 1, last) for i in range(len(depths))]
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        strides, tokens = [4 * 2**i for i in range(len(depths))], [1] * len(depths)
        self.finish(dims, strides, num_classes, global_pool, drop_rate, tokens=tokens)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.apply(_init)

    @property
    def grid(self) -> Size:
        """(rows, columns) of the first map for images of img_size."""
        return pooled_size(self.img_size, 4)

    def embed(self, x: Tensor) -> State:
        image = self.patch_embed(check_size(x, self.min_size)).permute(0, 2, 3, 1)
        placed = with_positions(image, self.cls_token, self.pos_embed, self.grid)
        return placed[0], placed[1]

    def set_input_size(self, img_size: int | Size) -> None:
        """Resize the positions for images of this size, in place."""
        old, self.img_size = self.grid, check_img_size(img_size, self.min_size)
        resized = resample_position_embedding(self.pos_embed.detach(), self.grid, 1, old_grid=old, mode="bilinear")
        self.pos_embed = nn.Parameter(resized, self.pos_embed.requires_grad)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return super().group_matcher(coarse) | {"stem": r"^(?:patch_embed|pos_embed|cls_token)"}


def _init(module: nn.Module) -> None:
    """The authors' initialisation: weights from a normal of std 0.02, biases 0.02."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
        nn.init.constant_(module.bias, 0.02)


VARIANTS: dict[str, dict[str, Any]] = {
    "mvit_v1_b_16": {"embed_dim": 96, "depths": (1, 2, 11, 2)},
}
register_variants(MViT, VARIANTS)
