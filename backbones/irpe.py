"""DeiT with iRPE: relative positions of patches inside every attention.

Paper:  Wu et al. 2021, "Rethinking and Improving Relative Position Encoding for Vision Transformer",
        https://arxiv.org/abs/2107.14222
Source: github.com/microsoft/Cream @ 4a13c40 (MIT), iRPE/DeiT-with-iRPE. Names of weights are the authors'.
Differs from the source: any H, W (padded to whole patches, positions resized); the relative tables need no resizing.

The mathematics, for any ViT, is backbones/edits/relative_position.py.
"""

from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from backbones.base import register_variants
from backbones.edits.relative_position import irpe
from backbones.layers import vit_positions
from weights.manifest import default_cfgs as _default_cfgs

default_cfgs = _default_cfgs("irpe")


class RelativeViT(VisionTransformer):
    """timm's VisionTransformer with iRPE in every attention, at any image size.

    Args:
        img_size: side, or height and width, of the images that the absolute positions are stored for.
        rpe_on: what the tables act on: some of "q", "k", "v".
        method: how offsets fall into buckets, see backbones.edits.relative_position.irpe.
        mode: "ctx" or "bias", likewise.
        ratio: likewise.
        shared_head: all heads of a block share a table.
        vit: arguments of timm's VisionTransformer.
    """

    family = "irpe"
    default_out_indices = 3  # the last three blocks, as timm's ViTs
    min_size = 1  # pixels; padded to a patch

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        *,
        rpe_on: Literal["q", "k", "v", "qk", "kv", "qv", "qkv"] = "k",
        method: Literal["product", "euc", "quant", "cross"] = "product",
        mode: Literal["ctx", "bias"] = "ctx",
        ratio: float = 1.9,
        shared_head: bool = True,
        **vit: Any,
    ):
        super().__init__(img_size, **{"dynamic_img_size": True, "dynamic_img_pad": True} | vit)
        irpe(self, rpe_on, method, mode, ratio, shared_head)

    def _pos_embed(self, x: Tensor) -> Tensor:  # B h w C -> B P+hw C
        if self.pos_embed is None or not self.dynamic_img_size:
            return super()._pos_embed(x)
        new, old = (x.shape[1], x.shape[2]), self.patch_embed.grid_size
        positions = vit_positions(self.pos_embed, new, old, 0 if self.no_embed_class else self.num_prefix_tokens)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = x.flatten(1, 2)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*prefix, x + positions], 1))
        return self.pos_drop(torch.cat([*prefix, x], 1) + positions)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name in ("pos_embed", "cls_token", "reg_token") if getattr(self, name) is not None}


# name: width, heads, and what differs from product buckets on keys
VARIANTS: dict[str, dict[str, Any]] = {
    "deit_tiny_irpe_ctx_product_50_shared_k": {"embed_dim": 192, "num_heads": 3},
    "deit_small_irpe_ctx_product_50_shared_k": {"embed_dim": 384, "num_heads": 6},
    "deit_small_irpe_ctx_product_50_shared_qk": {"embed_dim": 384, "num_heads": 6, "rpe_on": "qk"},
    "deit_small_irpe_ctx_product_50_shared_qkv": {"embed_dim": 384, "num_heads": 6, "rpe_on": "qkv"},
    "deit_base_irpe_ctx_product_50_shared_k": {"embed_dim": 768, "num_heads": 12},
    "deit_base_irpe_ctx_product_50_shared_qkv": {"embed_dim": 768, "num_heads": 12, "rpe_on": "qkv"},
    "deit_small_irpe_ctx_euc_20_shared_k": {"embed_dim": 384, "num_heads": 6, "method": "euc", "ratio": 20.0},
    "deit_small_irpe_ctx_quant_51_shared_k": {"embed_dim": 384, "num_heads": 6, "method": "quant", "ratio": 33.0},
    "deit_small_irpe_ctx_cross_56_shared_k": {"embed_dim": 384, "num_heads": 6, "method": "cross", "ratio": 20.0},
}
register_variants(RelativeViT, VARIANTS)
