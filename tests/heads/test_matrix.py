"""Every module of timm and every family of the zoo under every head; the measured table is docs/heads_matrix.md.

All of it is slow (15 minutes on two cores): python -m pytest -m slow tests/heads/test_matrix.py
"""

import datetime
from pathlib import Path

import pytest
import timm
import torch

import backbones
from heads import HEADS, matrix

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "heads_matrix.md"
SIZE = (96, 128)
NEEDED = 0.95  # share of the modules that work under every head

# module of timm -> a small architecture of it; modules of other timm versions fall back to their first name
ARCHITECTURES = {
    "beit": "beit_base_patch16_224", "byoanet": "eca_halonext26ts", "byobnet": "test_byobnet", "cait": "cait_xxs24_224",
    "coat": "coat_lite_tiny", "convit": "convit_tiny", "convmixer": "convmixer_768_32", "convnext": "test_convnext",
    "cpubone": "cpubone_nano", "crossvit": "crossvit_tiny_240", "csatv2": "csatv2", "cspnet": "cspresnet50",
    "cspnext": "cspnext_tiny", "davit": "davit_tiny", "deit": "deit_tiny_patch16_224", "densenet": "densenet121",
    "dla": "dla46x_c", "dpn": "dpn48b", "edgenext": "edgenext_xx_small", "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0", "efficientnet": "test_efficientnet", "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0", "efficientvit_msra": "efficientvit_m0", "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0", "fastvit": "fastvit_t8", "focalnet": "focalnet_tiny_srf", "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050", "hardcorenas": "hardcorenas_a", "hgnet": "hgnet_tiny", "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny", "hrnet": "hrnet_w18_small", "iformer": "iformer_t",
    "inception_next": "inception_next_atto", "lcnetv2": "lcnetv2_small", "levit": "levit_128s", "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout", "maxxvit": "test_maxvit", "metaformer": "poolformer_s12", "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "lcnet_050", "mobilenetv5": "mobilenetv5_base", "mobilevit": "mobilevit_xxs", "mvitv2": "mvitv2_tiny",
    "nest": "nest_tiny", "nextvit": "nextvit_small", "nfnet": "test_nfnet", "pit": "pit_ti_224", "pvt_v2": "pvt_v2_b0",
    "rdnet": "rdnet_tiny", "regnet": "regnetx_002", "repghost": "repghostnet_050", "repvit": "repvit_m0_9",
    "res2net": "res2net50_48w_2s", "resnest": "resnest14d", "resnet": "test_resnet", "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100", "selecsls": "selecsls42", "senet": "legacy_seresnet18", "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1", "sknet": "skresnet18", "starnet": "starnet_s050", "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224", "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224", "tiny_vit": "tiny_vit_5m_224", "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m", "twins": "twins_svt_small", "vgg": "vgg11", "visformer": "visformer_tiny",
    "vision_transformer": "test_vit", "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos", "vitamin": "vitamin_small_224", "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim", "xcit": "xcit_nano_12_p16_224", "qwen3_vit": "qwen3_vit_88m",
    "naflexvit": "naflexvit_base_patch16_gap", "vision_transformer_sam": "samvit_base_patch16",
}  # fmt: skip


def architectures() -> dict[str, str]:
    """ "timm: module" or "zoo: module" -> model name."""
    ours = set(backbones.list_models())
    found = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        own = sorted(name for name in names if name in ours)
        theirs = [name for name in names if name not in ours]
        if theirs:
            name = ARCHITECTURES.get(module, theirs[0])
            found[f"timm: {module}"] = name if name in theirs else theirs[0]
        if own:
            found[f"zoo: {module}"] = own[0]
    return found


@pytest.mark.slow
def test_at_least_95_percent_of_the_modules_work_under_every_head():
    torch.manual_seed(0)
    rows = {}
    for place, name in architectures().items():
        rows[place] = (name, matrix.row(name, SIZE))
        print(place, name, {head: text for head, text in rows[place][1].items() if text != "ok"} or "ok", flush=True)
    good = sum(all(text == "ok" for text in results.values()) for _, results in rows.values())
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(rows, good))
    assert good >= NEEDED * len(rows)


def document(rows: dict[str, tuple[str, dict[str, str]]], good: int) -> str:
    """The table in Markdown, with what it was measured with and the reason of every exception."""
    lines = [
        "# Every backbone under every head",
        "",
        f"One step forward and backward on two {SIZE[0]} x {SIZE[1]} images, random weights, narrow heads, one small model of",
        f"each module of timm and of the zoo: **{good} of {len(rows)}** work under all {len(HEADS)} heads.",
        "",
        f"Measured {datetime.date.today()} with timm {timm.__version__} and torch {torch.__version__} on CPU:",
        "`python -m pytest -m slow tests/heads/test_matrix.py`",
        "",
        "| module | architecture | " + " | ".join(HEADS) + " |",
        "|---|---|" + "---|" * len(HEADS),
    ]
    reasons: dict[str, list[str]] = {}
    for place, (name, results) in rows.items():
        marks = []
        for head, text in results.items():
            if text != "ok":
                reasons.setdefault(text, []).append(f"{name} under {head}")
            marks.append("yes" if text == "ok" else "no")
        lines.append(f"| {place} | {name} | " + " | ".join(marks) + " |")
    if reasons:
        lines += ["", "## Exceptions", ""]
        for text, where in reasons.items():
            names = sorted({one.partition(" under ")[0] for one in where})
            heads = sorted({one.partition(" under ")[2] for one in where})
            lines.append(f"- {', '.join(names)} ({'every head' if len(heads) == len(HEADS) else ', '.join(heads)}): {text}")
    return "\n".join(lines) + "\n"


def test_a_row_names_what_does_not_work():
    assert set(matrix.row("test_resnet", (64, 96)).values()) == {"ok"}
    assert matrix.row("test_resnet", (64, 96), ["fpn"]) == {"fpn": "ok"}
    assert "unknown backbone 'resnet19'" in matrix.row("resnet19")["linear"]


def test_the_document_counts_and_explains():
    results = dict.fromkeys(HEADS, "ok")
    text = document({"timm: a": ("a_1", results), "timm: b": ("b_1", results | {"dpt": "too small"})}, 1)
    assert "**1 of 2**" in text and "- b_1 (dpt): too small" in text
    assert text.count("| yes") == 2 * len(HEADS) - 1


def test_the_command_prints_a_models_row(capsys):
    from train.cli import main

    main(["info", "test_resnet", "--size", "64", "96", "--heads"])
    printed = capsys.readouterr().out
    assert all(f"under {head}: ok" in printed for head in HEADS)
