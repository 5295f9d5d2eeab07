"""`zoo bench`: what to measure, and the tables of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import timm
import torch
from rich.console import Console

from train.bench.clock import machine, table
from train.bench.heads import bench_heads
from train.bench.models import PEER, bench_model
from train.bench.ops import OPS, OPS_CUDA, bench_memory, bench_ops
from train.checks import nearest
from train.plugins import is_model


def run(
    what: str,
    size: tuple[int, int] | None = None,
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    device: str | None = None,
    training: bool = True,
    memory: bool = True,
) -> None:
    """Measures `what` ("ops", "heads" or the name of a model) and prints a table.

    size: (H, W) of the images or, for ops, of the only map; batches: for models; device: "cpu" or "cuda", by default the GPU
    where there is one; training: also forward + backward (ops, heads) or a training step (models); memory: for ops and heads,
    also the peak (on CUDA and on Linux).
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has room for a whole row
    if what == "ops":
        cases = OPS_CUDA if device == "cuda" else OPS
        if size is not None:
            cases = ((1, size, 2, 1),)
        console.print(machine(device))
        console.print(table(bench_ops(cases, rounds, device, training), "neighbourhood attention, kernel 7, head dim 32"))
        if memory and (device == "cuda" or sys.platform == "linux"):
            console.print(table(bench_memory(256, device), "peak memory beyond the inputs, 256x256, 2 heads, in sizes of q"))
    elif what == "heads":
        console.print(machine(device))
        rows = bench_heads(size or (512, 512), min(rounds, 3), device, training, memory)  # a round takes minutes of one core
        console.print(table(rows, "dense heads: time, peak memory in MB, share of the model's forward time"))
    elif is_model(what):
        console.print(machine(device))
        rows = bench_model(what, size or (224, 224), batches, rounds, device, training)
        console.print(table(rows, f"{what}, and {PEER} for comparison"))
    else:
        names = ["ops", "heads", *timm.list_models()]
        raise ValueError(f"nothing to measure is called {what!r}: 'ops', 'heads' or a model; {nearest(what, names)}")
