"""Small vision transformers of every kind that timm has, by the names of its registry."""

import re

import timm
import torch
from torch import nn

# One name for each class of model, block and attention, kind of positions, prefix and pooling.
KINDS = {
    "class token": "vit_tiny_patch16_224",
    "norm before, CLIP": "vit_base_patch16_clip_224",
    "LayerScale, DINOv2": "vit_small_patch14_dinov2",
    "registers, DINOv2": "vit_small_patch14_reg4_dinov2",
    "registers, average": "vit_medium_patch16_reg4_gap_256",
    "average, no class token": "vit_base_patch16_gap_224",
    "map pooling, SigLIP": "vit_base_patch16_siglip_224",
    "SwiGLU, DINOv2": "vit_giant_patch14_dinov2",
    "norm after": "vit_base_patch16_rpn_224",
    "RMSNorm, AIMv2": "vit_large_patch14_clip_224",
    "InternViT": "vit_intern300m_patch14_448",
    "hybrid": "vit_tiny_r_s16_p8_224",
    "DeiT-III": "deit3_small_patch16_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "relative bias, BEiT": "beit_base_patch16_224",
    "relative bias, BEiT-2": "beitv2_base_patch16_224",
    "rotary, EVA-02": "eva02_tiny_patch14_224",
    "EVA": "eva_large_patch14_196",
    "EVA norm after": "eva02_enormous_patch14_clip_224",
    "rotary, DINOv3": "vit_small_patch16_dinov3",
    "rotary, separate bias": "vit_small_patch16_dinov3_qkvb",
    "rotary": "vit_small_patch16_rope_224",
    "rotary and positions": "vit_small_patch16_rope_ape_224",
    "rotary of each block": "vit_small_patch16_rope_mixed_224",
    "grouped queries, Sapiens-2": "vit_base_patch16_sapiens2",
    "perception encoder": "vit_pe_core_tiny_patch16_384",
}
# Models that are no plain sequence of tokens and blocks.
OTHERS = {
    "parallel": "vit_base_patch16_xp_224",
    "parallel things": "vit_small_patch16_18x2_224",
    "differential": "vit_dwee_patch16_reg1_gap_256",
    "relative positions": "vit_relpos_small_patch16_224",
}


# What the shape of the small models would contradict: arguments to give instead, None to leave one as it is.
OWN_SHAPE: dict[str, dict] = {
    "sapiens2": {"num_kv_heads": 1},
    "ttreg": {"register_neurons": {}},
    "vitamin": {"embed_dim": None},
    "_mci_": {"embed_dim": None},
}


def patch_of(name: str) -> int:
    """Pixels of a patch, from the name."""
    found = re.search(r"_patch(\d+)", name)
    return int(found[1]) if found else 32  # hybrids: a strided network before the patches


def small(name: str, seed: int = 0, **kwargs) -> tuple[nn.Module, torch.Tensor]:
    """(the model of this name with three blocks of width 48 and random weights, two images of 4 x 5 patches)."""
    torch.manual_seed(seed)
    size = {"img_size": (4 * patch_of(name), 5 * patch_of(name))}
    shape = {"embed_dim": 48, "depth": 3, "num_heads": 2, "num_classes": 7}
    for part, own in OWN_SHAPE.items():
        shape = {k: v for k, v in (shape | own).items() if v is not None} if part in name else shape
    for drop in ((), ("img_size",)):
        try:
            given = {**size, **shape, **kwargs}
            model = timm.create_model(name, pretrained=False, **{k: v for k, v in given.items() if k not in drop})
        except TypeError:
            continue
        break
    with torch.no_grad():  # nothing that is zero or one at the start may hide a term
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pixels = getattr(model.patch_embed, "img_size", None) or size["img_size"]
    return model.eval(), torch.randn(2, 3, *pixels)
