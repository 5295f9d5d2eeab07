"""`zoo bench train`: the CPU time of a training step in `zoo train` and in timm's train.py, on the same images and recipe.

Each program runs alone, with one thread, twice: for a few steps and for more of them. The difference of the CPU times over that
of the steps is a step, without the start, the data set's listing and the evaluation at the end. The programs take turns.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, TRAIN_IMAGES, VAL_IMAGES, BATCH = 10, 500, 100, 50
SHORT, LONG = 20, 50  # steps; whole passes over the images, the first of which warms up


@dataclass(frozen=True)
class Run:
    """A configuration of ours and the arguments of timm's script for the same model and recipe."""

    config: str
    timm_args: tuple[str, ...]


RUNS = (
    Run("cifar10/resnet18", ("--model", "resnet18", "--lr", "1e-3")),
    Run(
        "cifar10/vit_tiny",
        (
            "--model",
            "vit_tiny_patch16_224",
            "--model-kwargs",
            "img_size=32",
            "patch_size=8",
            "--lr",
            "5e-4",
            "--clip-grad",
            "1.0",
        ),
    ),
)
WHERE = "https://github.com/huggingface/pytorch-image-models"


def bench_training(script: str | None, rounds: int = 3, runs: tuple[Run, ...] = RUNS) -> list[dict[str, str]]:
    """A row per run: milliseconds of CPU time of a step in each program, and ours over timm's, medians of the rounds.

    script: the path of timm's train.py, which its package does not hold. Raises ValueError without it, RuntimeError with the
    last line of a program that fails.
    """
    if script is None or not Path(script).is_file():
        raise ValueError(
            f"timm's training script is not in its package: clone {WHERE} and give --script PATH/train.py, got {script}"
        )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        write_images(images)
        for run in runs:
            theirs, ours = [], []
            name = run.config.replace("/", "_")
            for turn in range(rounds):
                theirs.append(step_ms(partial(timm_command, run, script, images), folder, f"timm_{name}_{turn}"))
                ours.append(step_ms(partial(our_command, run, images), folder, f"ours_{name}_{turn}"))
            ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
            rows.append(
                {
                    "run": run.config,
                    "timm ms (min)": f"{statistics.median(theirs):.0f} ({min(theirs):.0f})",
                    "ours ms (min)": f"{statistics.median(ours):.0f} ({min(ours):.0f})",
                    "ours / timm": f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                }
            )
    return rows


def write_images(root: Path) -> None:
    """Noise as PNG files of 32 x 32 in class folders: what a step costs does not depend on what they show."""
    generator = np.random.default_rng(0)
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for index in range(count):
            folder = root / split / f"class{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")


def step_ms(command: Callable[[int, str], list[str]], folder: str, name: str) -> float:
    """CPU milliseconds of a step of a program. command: (steps, output folder) -> its command line."""
    short, long = (cpu_seconds(command(steps, str(Path(folder) / f"{name}_{steps}"))) for steps in (SHORT, LONG))
    return (long - short) / (LONG - SHORT) * 1e3


def cpu_seconds(command: list[str]) -> float:
    """CPU time (user + system) of a program and what it starts. RuntimeError with its last line if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{' '.join(command[:4])} ... failed: {last}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def timm_command(run: Run, script: str, images: Path, steps: int, out: str) -> list[str]:
    """The command line of timm's own script for a run.

    Args:
        run: which of RUNS.
        script: path of timm's train.py.
        images: folder of the images.
        steps: of the run, a multiple of a pass.
        out: folder for its results.
    """
    per_pass = TRAIN_IMAGES // BATCH
    return [
        *(sys.executable, script, "--data-dir", str(images), "--train-split", "train", "--val-split", "val"),
        *("--num-classes", str(CLASSES), *run.timm_args, "--epochs", str(steps // per_pass), "--output", out),
        *("--input-size", "3", "32", "32", "--crop-pct", "1.0", "--batch-size", str(BATCH)),
        *("--validation-batch-size", "100", "--opt", "adamw", "--weight-decay", "0.05", "--sched", "cosine"),
        *(
            "--sched-on-updates",
            "--warmup-epochs",
            "1",
            "--warmup-lr",
            "1e-5",
            "--scale",
            "0.5",
            "1.0",
            "--hflip",
            "0.5",
            "--color-jitter",
            "0",
        ),
        *("--train-interpolation", "bilinear", "--interpolation", "bilinear", "--smoothing", "0.1", "--workers", "0"),
        *("--no-prefetcher", "--device", "cpu", "--seed", "0", "--val-interval", str(max(steps // per_pass, 1))),
    ]


def our_command(run: Run, images: Path, steps: int, out: str) -> list[str]:
    """The command line of `zoo train` for the same run.

    Args:
        run: which of RUNS.
        images: folder of the images.
        steps: of the run, a multiple of a pass.
        out: run folder.
    """
    changes = {
        "data.name": "class_folder",
        "data.root": images,
        "data.workers": 0,
        "optim.epochs": steps // (TRAIN_IMAGES // BATCH),
        "optim.warmup_epochs": 1,
        "optim.global_batch": BATCH,
        "run.eval_every": steps,
        "run.threads": 1,
        "run.seed": 0,
        "run.dir": out,
    }
    return [sys.executable, "-m", "train", "train", run.config, *(f"--{key}={value}" for key, value in changes.items())]
