"""`zoo bench edits`: a plain ViT beside itself with merged tokens, pruned, and with norms that are folded away."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from backbones import edits
from backbones.edits.progressive_norm import merge_prepbn
from backbones.vit import blocks_of
from train.bench.clock import interleaved, ratio
from train.bench.models import multiply_adds

MODELS = ("deit_small_patch16_224", "vit_small_patch16_dinov3")
MERGED = (4, 8, 16)  # pairs of patches a block


def pruned(model: nn.Module, share: float) -> nn.Module:
    """A ViT without this share of the heads and hidden neurons of every block; which ones does not matter for the time."""
    blocks: dict[int, Any] = dict(enumerate(blocks_of(model)))
    heads = {i: list(range(round(share * block.attn.num_heads))) for i, block in blocks.items()}
    neurons = {i: list(range(round(share * block.mlp.fc2.in_features))) for i, block in blocks.items()}
    return edits.apply(model, [{"name": "prune", "heads": heads, "neurons": neurons}])


def with_batch_norms(model: nn.Module, merged: bool) -> nn.Module:
    """A ViT with the edit prepbn as it stands after training, its norms folded or not."""
    model = edits.apply(model, [{"name": "prepbn", "steps": 1}])
    return merge_prepbn(model) if merged else model


def variants() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Name -> what makes the variant out of a copy of the plain model."""
    found: dict[str, Callable[[nn.Module], nn.Module]] = {"plain": lambda model: model}
    for r in MERGED:
        found[f"token_merging, r {r}"] = partial(edits.apply, edits=[{"name": "token_merging", "r": r}])
    for share in (1 / 3, 1 / 2):
        found[f"prune, {share:.0%} of heads and neurons"] = partial(pruned, share=share)
    found["prepbn, not folded"] = partial(with_batch_norms, merged=False)
    found["prepbn, folded"] = partial(with_batch_norms, merged=True)
    return found


def bench_edits(
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    device: str = "cpu",
    threads: int = 1,
    names: Sequence[str] = MODELS,
    size: tuple[int, int] = (224, 224),
) -> list[dict[str, str]]:
    """A row per model, batch and edit: multiply-adds of an image, time of an inference, and both over the plain model's.

    Weights are random: speed alone is measured, accuracy is not.

    Args:
        batches: sizes.
        rounds: measurements of each, interleaved.
        device: "cpu" or "cuda".
        threads: of a CPU.
        names: of the ViTs.
        size: (H, W) of the images.
    """
    rows = []
    for name in names:
        plain = timm.create_model(name, img_size=size).eval()
        models = {what: make(copy.deepcopy(plain)).to(device).eval() for what, make in variants().items()}
        macs = {what: multiply_adds(model, 3, size) for what, model in models.items()}
        for batch in batches:
            images = torch.randn(batch, 3, *size, device=device)
            with torch.inference_mode():
                runs: dict[str, Callable[[], Any]] = {what: partial(model, images) for what, model in models.items()}
                times = interleaved(runs, rounds, device, threads)
            for what in models:
                rows.append(
                    {
                        "model": name,
                        "batch": str(batch),
                        "edit": what,
                        "GMACs": f"{macs[what]:.2f}",
                        "of plain": f"{macs[what] / macs['plain']:.0%}",
                        "ms (min)": f"{sorted(times[what])[len(times[what]) // 2]:.2f} ({min(times[what]):.2f})",
                        "time / plain": "{:.2f} ({:.2f} to {:.2f})".format(*ratio(times[what], times["plain"])),
                    }
                )
    return rows
