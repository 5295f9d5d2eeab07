"""Registering our models takes no name from timm and warns of nothing."""

import json
import subprocess
import sys

import timm

import backbones

CODE = """
import json, warnings
import timm
before = timm.list_models()
owner = {name: timm.model_entrypoint(name).__module__ for name in before}
groups = set(timm.list_modules())
warnings.simplefilter("error")
import backbones
print(json.dumps({
    "lost": [name for name in before if not timm.is_model(name) or timm.model_entrypoint(name).__module__ != owner[name]],
    "added": [name for name in timm.list_models() if name not in owner],
    "ours": backbones.list_models(),
    "merged": sorted(groups & {timm.model_entrypoint(name).__module__.split(".")[-1] for name in backbones.list_models()}),
}))
"""


def test_the_import_adds_our_names_and_changes_none_of_timms():
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True)
    if done.returncode and "import backbones" not in done.stderr:  # a library's own import may warn; ours may not
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["lost"] == []
    assert seen["added"] == seen["ours"] == backbones.list_models()
    # timm groups models by the last part of the module's name; only PiT's file shares one with timm, whose names start alike
    assert set(seen["merged"]) <= {"pit"}


def test_names_are_the_papers():
    ours = set(backbones.list_models())
    sizes = {
        "nat": "mini tiny small base isotropic_small isotropic_base",
        "dinat": "mini tiny small base large large_384 large_384_11x11 s_tiny s_small s_base s_large s_large_384 "
        "isotropic_small isotropic_base",
        "vitrpb": "small base",
        "lit": "ti s m b",
        "litv2": "s m b b_384",
        "cvt": "13 21 13_384 21_384 w24_384",
        "sparsifiner": "deit_s lvvit_s",
        "swin": "t s b l b_384 l_384",
        "pit": "ti xs s b ti_distilled xs_distilled s_distilled b_distilled",
        "poolformer": "s12_gn s24_gn s36_gn m36_gn m48_gn",
        "hvt": "ti_1 s_0 s_1 s_2 s_3 s_4",
        "fcaformer": "l1 l2 l3 l4",
        "sret": "t t_distill t_wo_slice t_wo_slice_distill t_wo_slice_384 lt lt_distill lt_16_14_1 lt_wo_slice "
        "lt_wo_slice_distill s s_wo_slice s_wo_slice_384 s_wo_slice_512",
        "fan": "tiny_12_p16_224 small_12_p16_224 base_18_p16_224 large_24_p16_224 tiny_8_p4_hybrid small_12_p4_hybrid "
        "base_16_p4_hybrid large_16_p4_hybrid xlarge_16_p4_hybrid",
        "deit": "tiny_irpe_ctx_product_50_shared_k small_irpe_ctx_product_50_shared_k small_irpe_ctx_product_50_shared_qk "
        "small_irpe_ctx_product_50_shared_qkv base_irpe_ctx_product_50_shared_k base_irpe_ctx_product_50_shared_qkv "
        "small_irpe_ctx_euc_20_shared_k small_irpe_ctx_quant_51_shared_k small_irpe_ctx_cross_56_shared_k",
        "lite": "mono_tiny mono_tiny_1024 mono_small mono_small_1024 mono_base mono_base_1024 mono_8m",
        "tap": "fan_base_16_p4_hybrid",
        "flatten": "swin_t swin_s swin_b swin_b_384 pvt_t pvt_s pvt_m pvt_b pvt_v2_b0 pvt_v2_b1 pvt_v2_b2 pvt_v2_b3 pvt_v2_b4 "
        "pvt_v2_b5 cswin_t cswin_s cswin_b cswin_b_384",
        "slab": "deit_t deit_s deit_t_prepbn deit_s_prepbn "
        "swin_t swin_s swin_b swin_t_prepbn pvt_t pvt_s pvt_m pvt_l pvt_t_prepbn pvt_s_prepbn pvt_m_prepbn cswin_t "
        "cswin_s",
        "stvit": "small base large",
        "vit": "small_patch14_ttreg_dinov2 base_patch14_ttreg_dinov2 large_patch14_ttreg_dinov2",
    }
    promised = {f"{family}_{size}" for family, all_sizes in sizes.items() for size in all_sizes.split()}
    assert promised <= ours


def test_filters_and_tags_are_timms():
    assert backbones.list_models("poolformer_s*") == ["poolformer_s12_gn", "poolformer_s24_gn", "poolformer_s36_gn"]
    assert backbones.list_models("resnet*") == []
    assert "dinat_large.in22k" in timm.list_pretrained("dinat_large*")
