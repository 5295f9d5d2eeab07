"""What the tests must know of a family of backbones and cannot read off its models: one row a family.

A test over all families takes its part from here, so a new family is one row. `tests/test_contracts.py` checks the rows
against the models: a family without a row, a name that no row promises and a flag that the models do not bear out each fail.
"""

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import timm


@dataclass(frozen=True)
class Family:
    """A family's part in the tests.

    Attributes:
        names: beginning of the names -> their ends, separated by blanks: every name that the family registers.
        narrow: pattern of names -> arguments that make those models narrow; the last pattern that fits counts.
        kinds: names of which one of each kind of network is computed in the contracts; all names if empty.
        free_size: names of the kinds that export with free height and width (docs/export.md).
        pyramid: of the kinds with maps of strides 4, 8, 16 and 32, those run as encoders of other libraries.
        tokens: patterns of names whose forward_features gives tokens B N C.
        float64: outputs are compared in float64, as the network divides by sums that come near 0.
        unpublished: the authors published no weights for some of the names.
    """

    names: dict[str, str]
    narrow: dict[str, dict[str, Any]]
    kinds: tuple[str, ...] = ()
    free_size: tuple[str, ...] = ()
    pyramid: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    float64: bool = False
    unpublished: bool = False

    def promised(self) -> list[str]:
        """Every name of the family."""
        return [f"{start}_{end}" for start, ends in self.names.items() for end in ends.split()]


FLAT = {"embed_dim": 32, "num_heads": 2}
TIMM: dict[str, dict[str, Any]] = {  # file of timm -> what makes its models narrow, where that can be told them
    "vision_transformer": FLAT,
    "eva": FLAT,
    "cait": FLAT,
    "convnext": {"dims": [16, 16, 32, 32]},
    "levit": {"embed_dim": [32, 48, 64]},
    "tnt": {"embed_dim": 32, "inner_dim": 8, "num_heads_outer": 2, "num_heads_inner": 2},
}
PVT = {"dims": [16, 16, 32, 32], "num_heads": [2, 2, 4, 4]}
WINDOWS = {"embed_dim": 16, "num_heads": [2, 2, 4, 4]}

FAMILIES: dict[str, Family] = {  # file in backbones/ -> its row
    "nat": Family(
        names={
            "nat": "mini tiny small base isotropic_small isotropic_base",
            "dinat": "mini tiny small base large large_384 large_384_11x11 s_tiny s_small s_base s_large s_large_384 "
            "isotropic_small isotropic_base",
            "vitrpb": "small base",
        },
        narrow={
            "*": {"embed_dim": 16, "num_heads": [1, 2, 4, 8]},
            "*isotropic*": {"embed_dim": 32, "num_heads": 1},
            "vitrpb*": {"embed_dim": 32, "num_heads": 1},
        },
        kinds=(
            "nat_mini",
            "nat_small",  # with LayerScale
            "dinat_mini",
            "dinat_s_tiny",
            "nat_isotropic_small",
            "dinat_isotropic_small",
            "vitrpb_small",
        ),
        free_size=("vitrpb_small",),
        pyramid=("nat_mini", "dinat_mini", "dinat_s_tiny"),
    ),
    "lit": Family(
        names={"lit": "ti s m b"},
        narrow={"*": {"dims": [16, 32, 32, 64], "heads": [1, 2, 2, 4]}},
        kinds=("lit_ti", "lit_s"),
        free_size=("lit_ti", "lit_s"),
        pyramid=("lit_ti", "lit_s"),
        tokens=("lit_ti*",),
    ),
    "litv2": Family(
        names={"litv2": "s m b b_384"},
        narrow={"*": {"dims": [32, 32, 64, 64], "heads": [2, 2, 4, 4]}},
        kinds=("litv2_s",),
        free_size=("litv2_s",),
        pyramid=("litv2_s",),
    ),
    "cvt": Family(
        names={"cvt": "13 21 13_384 21_384 w24_384"},
        narrow={"*": {"dims": [16, 32, 32], "heads": [1, 1, 1]}},
        kinds=("cvt_13",),
        free_size=("cvt_13",),
        tokens=("cvt_*",),
    ),
    "sparsifiner": Family(
        names={"sparsifiner": "deit_s lvvit_s"},
        narrow={"*": {"embed_dim": 32, "heads": 2}},
        tokens=("sparsifiner_*",),
        unpublished=True,
    ),
    "swin": Family(
        names={"swin": "t s b l b_384 l_384"},
        narrow={"*": {"embed_dim": 16, "num_heads": [1, 2, 4, 8]}},
        kinds=("swin_t",),
        pyramid=("swin_t",),
    ),
    "pit": Family(
        names={"pit": "ti xs s b ti_distilled xs_distilled s_distilled b_distilled"},
        narrow={"*": {"base_dims": [16, 16, 16], "heads": [1, 2, 4]}},
        kinds=("pit_ti", "pit_ti_distilled"),
        free_size=("pit_ti",),
        tokens=("pit_*",),
    ),
    "poolformer": Family(
        names={"poolformer": "s12_gn s24_gn s36_gn m36_gn m48_gn"},
        narrow={"*": {"dims": [16, 16, 32, 32]}},
        kinds=("poolformer_s12_gn",),
        free_size=("poolformer_s12_gn",),
        pyramid=("poolformer_s12_gn",),
    ),
    "registers": Family(
        names={"vit": "small_patch14_ttreg_dinov2 base_patch14_ttreg_dinov2 large_patch14_ttreg_dinov2"},
        narrow={"*": FLAT},
        kinds=("vit_small_patch14_ttreg_dinov2",),
        free_size=("vit_small_patch14_ttreg_dinov2",),
        tokens=("vit_*",),
    ),
    "irpe": Family(
        names={
            "deit": "tiny_irpe_ctx_product_50_shared_k small_irpe_ctx_product_50_shared_k "
            "small_irpe_ctx_product_50_shared_qk small_irpe_ctx_product_50_shared_qkv base_irpe_ctx_product_50_shared_k "
            "base_irpe_ctx_product_50_shared_qkv small_irpe_ctx_euc_20_shared_k small_irpe_ctx_quant_51_shared_k "
            "small_irpe_ctx_cross_56_shared_k",
        },
        narrow={"*": FLAT},
        kinds=("deit_small_irpe_ctx_product_50_shared_qkv",),
        free_size=("deit_small_irpe_ctx_product_50_shared_qkv",),
        tokens=("deit_*",),
        unpublished=True,
    ),
    "mvit": Family(
        names={"mvit_v1": "b_16"},
        narrow={"*": {"embed_dim": 16}},
        free_size=("mvit_v1_b_16",),
        pyramid=("mvit_v1_b_16",),
        tokens=("mvit_v1_*",),
    ),
    "hvt": Family(
        names={"hvt": "ti_1 s_0 s_1 s_2 s_3 s_4"},
        narrow={"*": FLAT},
        kinds=("hvt_s_4",),
        tokens=("hvt_*",),
    ),
    "fcaformer": Family(
        names={"fcaformer": "l1 l2 l3 l4"},
        narrow={"*": {"dims": [16, 16, 32, 32], "heads": [0, 0, 2, 2]}},
        kinds=("fcaformer_l1",),
        pyramid=("fcaformer_l2",),
        unpublished=True,
    ),
    "sret": Family(
        names={
            "sret": "t t_distill t_wo_slice t_wo_slice_distill t_wo_slice_384 lt lt_distill lt_16_14_1 lt_wo_slice "
            "lt_wo_slice_distill s s_wo_slice s_wo_slice_384 s_wo_slice_512",
        },
        narrow={"*": {"base_dims": [8, 8, 8], "heads": [1, 2, 4]}},
        kinds=("sret_t",),
    ),
    "fan": Family(
        names={
            "fan": "tiny_12_p16_224 small_12_p16_224 base_18_p16_224 large_24_p16_224 tiny_8_p4_hybrid small_12_p4_hybrid "
            "base_16_p4_hybrid large_16_p4_hybrid xlarge_16_p4_hybrid",
            "tap_fan": "base_16_p4_hybrid",
        },
        narrow={"*": {"embed_dim": 16, "num_heads": 2}},
        kinds=("tap_fan_base_16_p4_hybrid", "fan_tiny_12_p16_224"),
        free_size=("tap_fan_base_16_p4_hybrid", "fan_tiny_12_p16_224"),
        pyramid=("fan_xlarge_16_p4_hybrid",),
        tokens=("fan_*", "tap_fan_*"),
        unpublished=True,
    ),
    "monodepth": Family(
        names={"lite_mono": "tiny tiny_1024 small small_1024 base base_1024 8m"},
        narrow={"*": {"dims": [16, 16, 32]}},
        kinds=("lite_mono_tiny",),
        free_size=("lite_mono_tiny",),
    ),
    "stvit": Family(
        names={"stvit": "small base large"},
        narrow={"*": {"dims": [16, 16, 32, 32], "heads": [1, 1, 2, 2], "projection": 32}},
        kinds=("stvit_base",),  # with LayerScale
        free_size=("stvit_base",),
        pyramid=("stvit_small",),
    ),
    "flatten": Family(
        names={
            "flatten": "swin_t swin_s swin_b swin_b_384 pvt_t pvt_s pvt_m pvt_b pvt_v2_b0 pvt_v2_b1 pvt_v2_b2 pvt_v2_b3 "
            "pvt_v2_b4 pvt_v2_b5 cswin_t cswin_s cswin_b cswin_b_384",
        },
        narrow={"*": WINDOWS, "*pvt*": PVT},
        kinds=("flatten_cswin_t", "flatten_pvt_v2_b0", "flatten_pvt_t", "flatten_swin_t"),
        pyramid=("flatten_pvt_v2_b0",),
        unpublished=True,
    ),
    "slab": Family(
        names={
            "slab": "deit_t deit_s deit_t_prepbn deit_s_prepbn swin_t swin_s swin_b swin_t_prepbn pvt_t pvt_s pvt_m pvt_l "
            "pvt_t_prepbn pvt_s_prepbn pvt_m_prepbn cswin_t cswin_s",
        },
        narrow={"*": WINDOWS, "*pvt*": PVT, "*deit*": FLAT},
        kinds=("slab_cswin_t", "slab_pvt_t", "slab_swin_t", "slab_deit_t", "slab_deit_t_prepbn"),
        pyramid=("slab_pvt_t",),
        tokens=("slab_deit_*_prepbn",),
        float64=True,
        unpublished=True,
    ),
}


def file_of(name: str) -> str:
    """The file in backbones/ that registers a name of ours; of another name, timm's file."""
    return timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def family_of(name: str) -> Family:
    """The row of a name of ours; KeyError, saying what to do, without one."""
    if (file := file_of(name)) not in FAMILIES:
        raise KeyError(f"{name}: backbones/{file}.py has no row in tests/families.py")
    return FAMILIES[file]


def gives_tokens(name: str) -> bool:
    """Whether the row says that forward_features gives tokens B N C."""
    return any(fnmatch(name, pattern) for pattern in family_of(name).tokens)


def narrow(name: str) -> dict[str, Any]:
    """Arguments that make a model narrow: ours by its row, timm's by TIMM."""
    if not timm.model_entrypoint(name).__module__.startswith("backbones."):
        return TIMM.get(file_of(name), {})
    fitting: list[dict[str, Any]] = [args for pattern, args in family_of(name).narrow.items() if fnmatch(name, pattern)]
    return dict(fitting[-1])


def every(part: str) -> list[str]:
    """All rows' entries of a part that lists names, e.g. "kinds", whose empty form stands for all names of the family."""
    return [name for row in FAMILIES.values() for name in getattr(row, part) or (row.promised() if part == "kinds" else ())]
