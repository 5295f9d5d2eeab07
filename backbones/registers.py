"""DINOv2's vision transformers with test-time registers, at any image size.

Papers: Darcet et al. 2023, "Vision Transformers Need Registers", https://arxiv.org/abs/2309.16588 (trained registers: timm's
        `vit_*_reg4_dinov2`, used as they are)
        Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", https://arxiv.org/abs/2506.08010
Source: github.com/nickjiang2378/test-time-registers @ 860df43; DINOv2: github.com/facebookresearch/dinov2 @ b8931f7
        (Apache-2.0). Released DINOv2 weights load through weights/convert/registers.py.

The edit for any timm ViT is backbones/edits/registers.py, the search for the neurons backbones/analysis/registers.py; both
are importable from here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from backbones.analysis.registers import (
    Artefacts,
    RegisterNeurons,
    find_register_neurons,
    measure_artefacts,
    outlier_scores,
)
from backbones.base import OpenNames, register_variants
from backbones.edits.registers import RegisterEdit, add_test_time_registers
from backbones.tracing import leaf
from weights.manifest import default_cfgs as _default_cfgs
from weights.resample import dino_positions as _dino_positions

__all__ = [
    "Artefacts",
    "RegisterEdit",
    "RegisterNeurons",
    "RegisterViT",
    "add_test_time_registers",
    "find_register_neurons",
    "measure_artefacts",
    "outlier_scores",
]  # register_model appends the models

default_cfgs = _default_cfgs("registers")


dino_positions = leaf(_dino_positions)


class RegisterViT(OpenNames, VisionTransformer):
    """DINOv2's ViT with test-time registers, at any image size: padded to whole patches, positions resized as DINOv2 does.

    Args:
        img_size: side, or (height, width), for which the positions are made.
        register_neurons: layer -> neurons, None for none.
        num_registers: tokens added at test time.
        register_scale: see add_test_time_registers.
        register_rule: see add_test_time_registers.
        register_patches: see add_test_time_registers.
        interpolate_antialias: of the positions, as DINOv2 names it (models with trained registers: True).
        interpolate_offset: of the positions, as DINOv2 names it (models with trained registers: 0).
        vit: further arguments of timm's VisionTransformer; dynamic_img_size=False binds the model to img_size.
    """

    family = "registers"
    default_out_indices = 3  # the last three blocks, as timm's ViTs
    min_size = 1  # pixels; padded to a patch

    def __init__(
        self,
        img_size: int | tuple[int, int] = 518,
        *,
        register_neurons: Mapping[int, Sequence[int]] | None = None,
        num_registers: int = 1,
        register_scale: float | Sequence[float] = 1.0,
        register_rule: str = "code",
        register_patches: str = "zero",
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        **vit,
    ):
        super().__init__(img_size, **{"no_embed_class": True, "dynamic_img_size": True, "dynamic_img_pad": True} | vit)
        self.antialias, self.offset = interpolate_antialias, interpolate_offset
        self.test_time_registers = 0
        if num_registers:
            add_test_time_registers(
                self, register_neurons or {}, num_registers, register_scale, register_rule, register_patches
            )
        elif register_neurons:
            raise ValueError("register_neurons need num_registers of at least 1")

    def resize_positions(self, table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        """A position embedding of patches, 1 (h w) C, for another grid."""
        return dino_positions(table, old, new, self.antialias, self.offset)

    def _pos_embed(self, x: Tensor) -> Tensor:  # B h w C (one image size: B hw C) -> B P+hw C
        if not self.dynamic_img_size:
            return super()._pos_embed(x)
        grid, table = (x.shape[1], x.shape[2]), self.pos_embed
        assert table is not None
        x = x.flatten(1, 2) + dino_positions(table, self.patch_embed.grid_size, grid, self.antialias, self.offset)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        return self.pos_drop(torch.cat([*prefix, x], 1))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name in ("pos_embed", "cls_token", "reg_token") if getattr(self, name) is not None}

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resize the position embedding itself to images of this size, so that no resize is left for run time."""
        old, table = self.patch_embed.grid_size, self.pos_embed
        assert table is not None
        super().set_input_size(cast(Any, img_size), cast(Any, patch_size))  # timm takes a side too
        table = nn.Parameter(self.resize_positions(table.detach(), old, self.patch_embed.grid_size), table.requires_grad)
        self.pos_embed = table


# The neurons of the authors' released `dinov2_vitl14_tt_reg` (their list, 45 in six layers); none are published for S and B:
# find_register_neurons finds them.
LARGE_NEURONS = {
    12: (3168,),
    13: (2400,),
    14: (2110, 1510, 1082, 2711, 2464, 147, 543, 581),
    15: (1714, 3507, 2492, 2680, 131, 720, 3499, 3062, 2625),
    16: (2301, 3576, 1940, 3463, 1244, 407, 3152, 2517, 3465),
    17: (884, 133, 1427, 3464, 2373, 2436, 841, 3574, 2129, 3355, 4047, 3341, 1330, 4031, 844, 944, 464),
}
SMALL = {"patch_size": 14, "init_values": 1e-5, "embed_dim": 384, "depth": 12, "num_heads": 6}
BASE = {"patch_size": 14, "init_values": 1e-5, "embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"patch_size": 14, "init_values": 1e-5, "embed_dim": 1024, "depth": 24, "num_heads": 16}

VARIANTS: dict[str, dict[str, Any]] = {
    "vit_small_patch14_ttreg_dinov2": SMALL,
    "vit_base_patch14_ttreg_dinov2": BASE,
    "vit_large_patch14_ttreg_dinov2": LARGE | {"register_neurons": LARGE_NEURONS},
}
register_variants(RegisterViT, VARIANTS)
