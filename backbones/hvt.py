"""HVT: a vision transformer whose token sequence is shortened by max pooling between blocks.

Paper:  Pan et al. 2021, "Scalable Vision Transformers with Hierarchical Pooling", https://arxiv.org/abs/2103.10619
Source: github.com/ziplab/HVT @ f32cc1c (Apache-2.0). Released weights load through weights/convert/hvt.py.
Differs from the source: any image size runs (the position embedding of the patches is resized as an image, those of pooled
tokens along their sequence; the authors refuse other sizes), and a model without pooling (`hvt_s_0`) can be built.

The pooling goes along the flattened sequence, so that rows run into each other: after it the tokens form no grid. The model
classifies; it has no feature maps, and `features_only` and dense heads are refused. `forward_intermediates(output_fmt="NLC")`
returns the tokens.

Shapes: B batch, N tokens (row-major patches, then what pooling leaves of them), C channels.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.arguments import BUILT_IN
from backbones.base import check_img_size, check_size, register_variants, take_indices
from backbones.layers import drop_path_rates, vit_positions
from backbones.tracing import leaf
from weights.convert.hvt import resample_sequence
from weights.manifest import default_cfgs as _default_cfgs

default_cfgs = _default_cfgs("hvt")

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def pooled(tokens: int, kernel: int) -> int:
    """How many of `tokens` a pooling of stride 2 without padding leaves."""
    return (tokens - kernel) // 2 + 1


@leaf
def fitted(embedding: Tensor, x: Tensor) -> Tensor:
    """Position embedding 1 n C resized to the sequence x, B N C; the same tensor if it fits."""
    return resample_sequence(embedding, x.shape[1])


@leaf
def with_positions(x: Tensor, embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches B H W C plus their position embedding 1 N C, of a grid that is resized to H W -> B N C."""
    return x.flatten(1, 2) + vit_positions(embedding, (x.shape[1], x.shape[2]), grid, 0)


class PoolBlock(Block):
    """A transformer block, then MaxPool1d (stride 2) along the sequence, then the pooled tokens' own position embedding.

    Args:
        tokens: how many come in, for which positions are made.
        dim: channels.
        num_heads: of the attention.
        pool_kernel: tokens under the maximum.
    """

    def __init__(self, tokens: int, dim: int, num_heads: int, pool_kernel: int, **kwargs: Any):
        super().__init__(dim, num_heads, **kwargs)
        self.pool_kernel = pool_kernel
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, pooled(tokens, pool_kernel), dim), std=0.02))

    # A mask, which timm's block and model take, has no meaning for pooled tokens.
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # B N C -> B (N - kernel) // 2 + 1 C
        x = F.max_pool1d(super().forward(x).mT, self.pool_kernel, stride=2).mT
        return x + fitted(self.pos_embed, x)


class HVT(VisionTransformer):
    """A ViT without class token whose blocks 0, n, 2n, ... end in a pooling of the sequence; the tokens' mean is classified.

    no_maps: the sentence that tells a dense head why it cannot stand on this model.
    """

    family = "hvt"
    no_maps = "its pooling flattens the grid of tokens; it classifies only"
    default_out_indices = ()
    min_size = 1  # of a model: what leaves tokens for every pooling
    authors_names = {"pool_block_width": "pool_every", "pool_kernel_size": "pool_kernel", "num_blocks": "depth"}
    authors_others = {
        "pool_stride": "has no counterpart: the authors' code always steps by 2",
        "head_dim": "is `embed_dim` over `num_heads` here",
        "qk_scale": BUILT_IN,
        "norm_eps": BUILT_IN,
        "norm_layer": BUILT_IN,
    }

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        pool_every: int | None = 12,
        pool_kernel: int = 3,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        """Set up the network.

        Args:
            img_size: side, or (height, width), for which the position embeddings are made; other sizes run too.
            patch_size: side of a patch, pixels.
            embed_dim, depth, num_heads, mlp_ratio, qkv_bias: of the transformer.
            pool_every: blocks 0, n, 2n, ... end in a pooling; None for no pooling.
            pool_kernel: tokens under the maximum; the stride is 2, as in the authors' code whatever their setting says.
            in_chans, num_classes, global_pool: as timm's; global_pool is "avg" or "".
            drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout.
            drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        """
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}: HVT has no class token")
        pools = [pool_every is not None and i % pool_every == 0 for i in range(depth)]
        least = 1
        for _ in range(sum(pools)):
            least = 2 * (least - 1) + pool_kernel
        # dynamic_img_pad fills the last patch, so that the side of a row of k patches begins at one pixel of the k-th
        min_size = patch_size * (math.ceil(math.sqrt(least)) - 1) + 1
        height, width = check_img_size(img_size, min_size)
        super().__init__(
            img_size=(height, width),
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=cast(Literal["avg", ""], global_pool),
            embed_dim=embed_dim,
            depth=0,
            num_heads=num_heads,
            class_token=False,
            fc_norm=False,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            norm_layer=LayerNorm,
        )
        self.min_size = min_size
        tokens, blocks = self.patch_embed.num_patches, list[Block]()
        shared: dict[str, Any] = {
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "proj_drop": proj_drop_rate,
            "attn_drop": attn_drop_rate,
        }
        for pools_here, rate in zip(pools, drop_path_rates(drop_path_rate, [depth])[0]):
            args = shared | {"drop_path": rate, "norm_layer": LayerNorm}
            if pools_here:
                blocks.append(PoolBlock(tokens, embed_dim, num_heads, pool_kernel, **args))
                tokens = pooled(tokens, pool_kernel)
            else:
                blocks.append(Block(embed_dim, num_heads, **args))
        self.blocks = nn.Sequential(*blocks)
        self.feature_info = []
        self.init_weights()

    def _pos_embed(self, x: Tensor) -> Tensor:  # B H W C -> B N C
        assert self.pos_embed is not None
        return self.pos_drop(with_positions(x, self.pos_embed, self.patch_embed.grid_size))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # B 3 H W -> B num_classes
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]  # B 3 H W -> B N C
        """The normalised tokens that the last pooling leaves."""
        return super().forward_features(check_size(x, self.min_size))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NLC",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Tokens, B N C, after the blocks `indices` (and their pooling), in that order.

        Args:
            x: images, B 3 H W.
            indices: last n blocks (int), block numbers (negative from the end), or all (None).
            norm: final norm on each.
            stop_early: do not run blocks after the last one asked for.
            output_fmt: "NLC" alone.
            intermediates_only: leave out the output of `forward_features`, which stands before them.

        Raises ValueError for output_fmt "NCHW": there are no maps.
        """
        if output_fmt != "NLC":
            raise ValueError(f"HVT gives no feature maps ({output_fmt}): {self.no_maps}; output_fmt='NLC' gives its tokens")
        take, last = take_indices(len(self.blocks), indices)
        x, found = self._pos_embed(self.patch_embed(check_size(x, self.min_size))), {}
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and self.training else block(x)
            if i in take:
                found[i] = self.norm(x) if norm else x
        tokens = [found[i] for i in take]
        return tokens if intermediates_only else (self.norm(x), tokens)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize every position embedding to images of this size, so that no resize is left for run time."""
        super().set_input_size(img_size=check_img_size(to_2tuple(img_size), self.min_size))
        tokens = self.patch_embed.num_patches
        for block in self.blocks:
            if isinstance(block, PoolBlock):
                tokens = pooled(tokens, block.pool_kernel)
                resized = resample_sequence(block.pos_embed.detach(), tokens)
                block.pos_embed = nn.Parameter(resized, requires_grad=block.pos_embed.requires_grad)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed")}


VARIANTS: dict[str, dict[str, Any]] = {
    "hvt_ti_1": {"embed_dim": 192, "num_heads": 3, "pool_every": 12},
    "hvt_s_0": {"embed_dim": 384, "num_heads": 6, "pool_every": None},
    "hvt_s_1": {"embed_dim": 384, "num_heads": 6, "pool_every": 12},
    "hvt_s_2": {"embed_dim": 384, "num_heads": 6, "pool_every": 6},
    "hvt_s_3": {"embed_dim": 384, "num_heads": 6, "pool_every": 4},
    "hvt_s_4": {"embed_dim": 384, "num_heads": 6, "pool_every": 3},
}
register_variants(HVT, VARIANTS)
