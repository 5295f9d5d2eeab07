"""`zoo bench claims`: what papers say of speed and cost, measured with the zoo's own modules (docs/benchmarks/claims.md)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

import backbones
from backbones.flatten import ReducedAttention
from backbones.litv2 import HiLo
from backbones.swin import WindowAttention
from train.bench.clock import interleaved, ratio
from train.bench.models import build, multiply_adds

Call = Callable[[], Any]


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how it is measured.

    Args:
        title: in words, with the paper's number.
        make: device -> name of a contender -> a call of it; the others are set beside the first.
        source: the paper.
    """

    title: str
    make: Callable[[str], dict[str, Call]]
    source: str


def attentions(side: int, device: str, dim: int = 384, heads: int = 12) -> dict[str, Call]:
    """HiLo, spatial reduction (to 7 x 7 keys) and windows of 7 x 7 on a square map.

    Args:
        side: rows and columns of the map.
        device: where the modules run.
        dim: channels.
        heads: heads of each attention.
    """
    x = torch.randn(1, side, side, dim, device=device)
    modules: dict[str, nn.Module] = {
        "HiLo": HiLo(dim, heads, window=2, alpha=0.5),
        "spatial reduction": ReducedAttention(dim, heads, True, side // 7),
        "windows of 7": WindowAttention(dim, heads, 7, False, None, True, None, 0.0),
    }
    return {name: forward(module.to(device), x) for name, module in modules.items()}


def networks(subjects: Sequence[tuple[str, int, bool]], device: str) -> dict[str, Call]:
    """Models by name at a square image's side, folded for inference where the third value says so."""
    calls = {}
    for name, side, fused in subjects:
        model = build(name, (side, side))[0]
        model = backbones.fuse(model, keep=False) if fused else model
        label = f"{name}{', folded' if fused else ''} at {side}"
        calls[label] = forward(model.to(device), torch.randn(1, 3, side, side, device=device))
    return calls


def forward(module: nn.Module, x: Tensor) -> Call:
    """A call of a module in evaluation."""
    return functools.partial(module.eval(), x)


CLAIMS = (
    Claim(
        "HiLo is 1.4 times as fast as spatial reduction and 1.6 times as windows, 14 x 14, 384 channels, 12 heads",
        functools.partial(attentions, 14),
        "Pan et al. 2022, LITv2, abstract",
    ),
    Claim(
        "the same on 56 x 56",
        functools.partial(attentions, 56),
        "Pan et al. 2022, LITv2, abstract",
    ),
    Claim(
        "LeViT is 5 times as fast as EfficientNet at 80 % top-1 on a CPU",
        functools.partial(networks, (("levit_192", 224, False), ("efficientnet_b2", 260, False))),
        "Graham et al. 2021, LeViT, abstract",
    ),
    Claim(
        "linear attention's time grows with the pixels, 20.9 times as many from 224 to 1024",
        functools.partial(networks, (("flatten_pvt_v2_b1", 224, False), ("flatten_pvt_v2_b1", 1024, False))),
        "Han et al. 2023, FLatten",
    ),
    Claim(
        "its host's softmax attention with spatial reduction, for comparison",
        functools.partial(networks, (("pvt_v2_b1", 224, False), ("pvt_v2_b1", 1024, False))),
        "Wang et al. 2022, PVTv2",
    ),
    Claim(
        "merged norms make DeiT-T faster: 0.87 of the time with LayerNorm",
        functools.partial(networks, (("slab_deit_t_prepbn", 224, True), ("deit_tiny_patch16_224", 224, False))),
        "Guo et al. 2024, SLAB",
    ),
)
# what is counted, not timed: (title, subject, beside)
COUNTS = (
    ("PoolFormer-M36 has 35 % fewer parameters and 50 % fewer MACs than DeiT-B", "poolformer_m36_gn", "deit_base_patch16_224"),
    ("PoolFormer-S24 beside ResNet-50 (1.0 in the paper's plot)", "poolformer_s24_gn", "resnet50"),
)


def bench_claims(
    rounds: int = 7, device: str = "cpu", threads: int = 1, claims: Sequence[Claim] = CLAIMS
) -> list[dict[str, str]]:
    """A row per claim and contender: milliseconds, and its time over that of the first, with quartiles.

    One image, float32, random weights; ratios are of neighbouring rounds.

    Args:
        rounds: timed calls of each contender.
        device: where the models run.
        threads: of the CPU.
        claims: what to measure.
    """
    rows = []
    for claim in claims:
        calls = claim.make(device)
        with torch.inference_mode():
            times = interleaved(calls, rounds, device, threads)
        first = next(iter(calls))
        for name, spent in times.items():
            against = "" if name == first else "{:.2f} ({:.2f} to {:.2f})".format(*ratio(spent, times[first]))
            rows.append(
                {
                    "claim": f"{claim.title} ({claim.source})" if name == first else "",
                    "contender": name,
                    "ms (min)": f"{sorted(spent)[len(spent) // 2]:.2f} ({min(spent):.2f})",
                    "times the first's time": against,
                }
            )
    return rows


def count_claims(counts: Sequence[tuple[str, str, str]] = COUNTS) -> list[dict[str, str]]:
    """A row per claim of parameters and multiply-adds at 224 x 224, and by how much the first has fewer. Counted exactly."""
    rows = []
    for title, *names in counts:
        found = []
        for name in names:
            model = timm.create_model(name)
            found.append((sum(p.numel() for p in model.parameters()) / 1e6, multiply_adds(model, 3, (224, 224))))
        (params, macs), (more_params, more_macs) = found
        rows.append(
            {
                "claim": title,
                "parameters (M)": f"{params:.1f}, {more_params:.1f}",
                "fewer": f"{100 * (1 - params / more_params):.0f} %",
                "GMACs": f"{macs:.2f}, {more_macs:.2f}",
                "fewer ": f"{100 * (1 - macs / more_macs):.0f} %",
            }
        )
    return rows
