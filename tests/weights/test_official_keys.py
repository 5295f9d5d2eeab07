"""Every published full-size model: its parameter count, and its checkpoint's names and shapes there and back (no values)."""

import re

import golden
import pytest
import timm
import torch

import backbones  # noqa: F401
import weights

FAMILIES = ("nat", "swin", "pit", "cvt", "lit", "litv2", "poolformer", "sparsifiner", "registers", "irpe")
REBUILT = ("relative_position_index", "attn_mask", "num_batches_tracked", "mask_token")  # made again, or used by nothing
SWIN_C24 = {"window_size": 8, "num_heads": (4, 8, 16, 32), "img_size": 256}  # published, without a name in the paper


def ours(family: str, variant: str) -> tuple[str, dict]:
    """(our name, arguments) of an official variant."""
    if family == "poolformer":
        return f"{variant}_gn", {}
    if family == "nat":
        return {"dinat_large_21k_11x11": "dinat_large_384_11x11"}.get(variant, variant.removesuffix("_21k")), {}
    if family == "swin":
        size = {"tiny": "t", "small": "s", "base": "b", "large": "l"}[variant.split("_")[1]]
        return f"swin_{size}{'_384' if '_384' in variant else ''}", SWIN_C24 if "c24" in variant else {}
    if family == "cvt":
        return variant.removesuffix("_224"), {}
    if family == "litv2" and "alpha" in variant:
        return "litv2_s", {"alpha": float(variant.split("_")[-1])}
    if family == "sparsifiner":
        return {"deit": "sparsifiner_deit_s", "lvvit": "sparsifiner_lvvit_s"}[variant.split("_")[1]], {}
    if family == "registers":
        return {"vits14": "vit_small", "vitb14": "vit_base"}[variant.split("_")[1]] + "_patch14_ttreg_dinov2", {}
    if family == "irpe":
        return variant.replace("_patch16_224_", "_irpe_"), {}
    return variant, {}


def official_only(family: str, variant: str) -> bool:
    """Whether the variant is one of this family's models (the lists also hold teachers, and timm's and trained registers)."""
    return not variant.startswith(("teacher_", "timm/")) and not (family == "registers" and variant.endswith("_reg"))


VARIANTS = [(family, variant) for family in FAMILIES for variant in golden.keys(family) if official_only(family, variant)]


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_the_official_checkpoint_loads_strictly_and_converts_back(family, variant):
    facts = golden.keys(family)[variant]
    state = {key: torch.empty(shape, device="meta") for key, shape in facts["keys"].items()}
    name, kwargs = ours(family, variant)
    heads = [shape[0] for key, shape in facts["keys"].items() if re.search(r"(^|\.)head\.weight$", key)]
    model = timm.create_model(name, **kwargs, num_classes=heads[0] if heads else 0, device="meta")
    report = weights.load_checkpoint(model, {"model": {f"module.{key}": value for key, value in state.items()}})
    assert report.format == "official" and not report.missing and not report.unexpected and not report.resized
    unused = sum(value.numel() for key, value in state.items() if key.endswith("mask_token"))
    assert sum(p.numel() for p in model.parameters()) + unused == facts["params"]
    back = weights.convert.converter(model).to_official(model.state_dict(), model)
    assert {key: list(value.shape) for key, value in back.items() if not key.endswith(REBUILT)} == {
        key: shape for key, shape in facts["keys"].items() if not key.endswith(REBUILT)
    }
