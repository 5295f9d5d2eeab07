"""`zoo bench`: what to measure, and the tables of it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from rich.console import Console

from train.bench import gpu
from train.bench.claims import bench_claims, count_claims
from train.bench.clock import machine, machine_facts, table
from train.bench.edits import bench_edits
from train.bench.heads import bench_heads, cases_of
from train.bench.linear import bench_linear
from train.bench.models import WHOLE, Settings, bench_models
from train.bench.ops import OPS, OPS_CUDA, bench_memory, bench_ops
from train.bench.training import bench_training
from train.halves import slow_bfloat16


def run(args: argparse.Namespace) -> int:
    """Measures what the options of `zoo bench` ask for and prints tables, or JSON. Returns the exit code.

    Raises ValueError for something that cannot be measured.
    """
    named = [what for what in args.what if what in WHOLE]
    if named and len(args.what) > 1 and args.what[0] != "heads":
        raise ValueError(f"{named[0]!r} is measured alone, got {' '.join(args.what)}")
    if args.script and named != ["train"]:
        raise ValueError("--script goes with `zoo bench train`")
    if named == ["gpu"]:
        return gpu.report(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    tables = _tables(named[0] if named else None, args, device)
    facts = machine_facts(device, args.threads)
    if args.json:
        print(json.dumps({"machine": facts, "command": ["zoo", "bench", *sys.argv[2:]], **tables}))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 170)  # a file has room for a whole row
    console.print(machine(device, args.threads))
    if args.dtype == "bfloat16" and device == "cpu" and (note := slow_bfloat16()):
        console.print(f"bfloat16: {note}")
    if limits := tables.get("ceilings"):
        console.print(
            f"this machine: matrix product {limits['matmul_gflops']:.0f} GFLOP/s in {args.dtype}, copy (read + write) "
            f"{limits['copy_gb_per_s']:.1f} GB/s"
        )
    for title, rows in tables.items():
        if title in ("ceilings", "settings"):
            continue
        console.print(table([_shown(row) for row in rows] if title == "rows" else rows, _title(title, tables)))
    return 0


def _tables(what: str | None, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Title -> rows, and for models also their settings and the machine's ceilings."""
    size = tuple(args.size) if args.size else None
    training, memory = not args.inference, not args.no_memory
    if what == "ops":
        cases = OPS_CUDA if device == "cuda" else OPS
        if size is not None:
            cases = ((1, size, 2, 1),)
        found = {"neighbourhood attention, kernel 7, head dim 32": bench_ops(cases, args.rounds, device, training)}
        if memory and (device == "cuda" or sys.platform == "linux"):
            found["peak memory beyond the inputs, 256x256, 2 heads, in sizes of q"] = bench_memory(256, device)
        return found
    if what == "heads":
        rounds = min(args.rounds, 3)  # a round of all takes minutes of one core
        rows = bench_heads(size or (512, 512), rounds, device, training, memory, cases_of(args.what[1:]))
        return {"dense heads: time, peak memory in MB, share of the model's forward time": rows}
    if what == "claims":
        return {
            "what papers say of speed: one image, float32": bench_claims(args.rounds, device, args.threads),
            "and of cost, counted at 224 x 224": count_claims(),
        }
    if what == "linear":
        if device != "cpu":
            raise ValueError("packed weights are oneDNN's, for the CPU: give --device cpu")
        return {"linear layers: weights packed once, and plain": bench_linear(args.rounds, args.threads)}
    if what == "edits":
        rows = bench_edits(args.batches, args.rounds, device, args.threads, size=size or (224, 224))
        return {"edits of a ViT: multiply-adds of an image and time of an inference, beside the plain model": rows}
    if what == "train":
        return {"training step in this program and in timm's": bench_training(args.script, args.rounds)}
    engine = args.engine
    if args.compile:
        if engine not in ("eager", "compile"):
            raise ValueError(f"--compile contradicts --engine {engine}")
        engine = "compile"
    settings = Settings(size, args.dtype, device, args.threads, engine, args.fuse, args.channels_last)
    return bench_models(args.what, settings, args.batches, args.rounds, training, memory)


def _title(title: str, tables: dict[str, Any]) -> str:
    if title != "rows":
        return title
    height, width = tables["settings"]["size"]
    return f"{height} x {width}, {tables['settings']['dtype']}; ratio: the first subject's time over this one's, with quartiles"


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """A row of bench_models as a table shows it."""

    def number(key: str, form: str, factor: float = 1) -> str:
        return "-" if row[key] is None else f"{row[key] * factor:{form}}"

    low_high = row["ratio_quartiles"]
    return {
        "subject": row["subject"],
        "pass": row["pass"],
        "batch": str(row["batch"]),
        "ms (min)": f"{row['ms']:.2f} ({row['ms_min']:.2f})",
        "images/s": number("images_per_s", ".1f"),
        "ratio": number("ratio", ".2f") + (f" ({low_high[0]:.2f} to {low_high[1]:.2f})" if low_high else ""),
        "GMACs": number("gmacs", ".2f"),
        "GFLOP/s": number("gflops", ".1f"),
        "of matmul": number("of_matmul", ".0f", 100) + (" %" if row["of_matmul"] is not None else ""),
        "error": number("error", ".0e"),
        "MB": number("memory_mb", ".0f"),
    }
