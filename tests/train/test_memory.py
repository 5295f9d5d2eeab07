"""Memory does not grow with the number of steps, evaluations or predictions."""

import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from train import engine, prediction, results
from train.log import Log

ROOM = 8.0  # MB: what the allocator keeps varies by a few; one leaked batch a step would be hundreds


def resident() -> float:
    """This process's memory, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc to read a process's memory"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run of 3000 steps with 30 evaluations, memory in MB after each step)."""
    folder, seen = tmp_path_factory.mktemp("memory") / "run", {}
    step = Log.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "curves", lambda folder: None)
        patch.setattr(results, "pictures", lambda *args: None)

        def noted(log, number, *args, **options):
            seen[number] = resident()
            return step(log, number, *args, **options)

        patch.setattr(Log, "step", noted)
        often = {"log_every": 50, "eval_every": 100, "save_every": 500, "device": "cpu"}
        engine.fit(tiny.make(folder, optim={"steps": 3000}, run=often))
    return folder, seen


def test_training_and_evaluation_keep_nothing(run):
    _, seen = run
    assert seen[3000] - seen[500] < ROOM, {step: round(seen[step], 1) for step in range(500, 3001, 500)}


def test_predictions_of_images_of_many_sizes_keep_nothing(run):
    model, pipeline = prediction.open_model(run[0], device="cpu")
    draw, seen = np.random.default_rng(0), {}
    for i in range(1, 801):
        size = [int(side) for side in draw.integers(32, 161, 2)]
        pipeline.predict(model, draw.integers(0, 256, (*size, 3), dtype=np.uint8))
        seen[i] = resident()
    assert seen[800] - seen[300] < ROOM, {i: round(seen[i], 1) for i in range(100, 801, 100)}


def test_the_test_sees_a_leak():
    kept, before = [], resident()
    for _ in range(50):
        kept.append(torch.ones(100_000))
    assert resident() - before > ROOM, len(kept)
