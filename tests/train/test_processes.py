"""Real processes: two of them give one's run, and a killed one goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from train import engine, log

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
NO_PICTURES = (
    "import sys; from train import engine; engine.curves = engine.pictures = lambda *a: None; from train.cli import main; "
)


def command(*arguments: str, processes: int = 1) -> list[str]:
    """The zoo command in a fresh interpreter, or in several under torchrun."""
    if processes == 1:
        return [sys.executable, "-c", NO_PICTURES + "sys.exit(main())", *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*torchrun, "-m", "train", *arguments]


def run(*arguments: str, processes: int = 1) -> str:
    done = subprocess.run(
        command(*arguments, processes=processes), env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write(path: Path, **changes) -> str:
    path.write_text(yaml.safe_dump(tiny.values(**changes)))
    return str(path)


@pytest.mark.parametrize("micro", [None, 1], ids=["whole", "accumulated"])
def test_two_processes_give_the_losses_of_one(tmp_path, micro):
    """20 steps of float32, batch norm in the head (synchronised) unless micro-batches cut the batch otherwise."""
    head = {"head": "dpt", "head_args": {"width": 8}} if micro else {"head": "linear"}  # DPT has no batch norm
    model = {**tiny.VALUES["model"], **head}
    optim = {"steps": 20, "global_batch": 4, "micro_batch": micro, "ema_decay": None, "lr": 3e-4}
    changes = {"model": model, "optim": optim, "run": {"eval_every": 20, "save_every": 20}}
    path = write(tmp_path / "run.yaml", **changes)
    engine.fit(tiny.make(tmp_path / "one", **changes))
    said = run("train", path, f"--run.dir={tmp_path / 'two'}", processes=2)
    assert f"total batch 4 = 2 processes x {2 if micro else 1} micro-batch" in said
    assert said.count("step 20/20  evaluation") == 1, "only the main process writes"
    one, two = (log.read(tmp_path / name / "log.csv") for name in ("one", "two"))
    assert two["step"] == one["step"] == list(range(1, 21))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    if micro is None:  # 7 samples in batches of 3 do not divide; the same weights must score the same to the last digit
        alone = engine.evaluate_run(tmp_path / "two")
        together = yaml.safe_load(run("eval", str(tmp_path / "two"), processes=2))
        assert together == yaml.safe_load(
            "\n".join(f"{k}: {v:.6g}" if isinstance(v, float) else f"{k}: {v}" for k, v in alone.items())
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, workers):
    changes = {"optim": {"steps": 40}, "run": {"save_every": 4, "eval_every": 20}, "data": {"workers": workers}}
    path = write(tmp_path / "run.yaml", **changes)
    engine.fit(tiny.make(tmp_path / "whole", **changes))
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        command("train", path, f"--run.dir={folder}"), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while len(log.read(folder / "log.csv").get("step", [])) < 10 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must have been killed in the middle"
    engine.fit(tiny.make(folder, **changes), resume=True)
    for name in ("last.safetensors", "model.safetensors"):
        ours, theirs = load_file(folder / name), load_file(tmp_path / "whole" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert log.read(folder / "log.csv")["loss"] == log.read(tmp_path / "whole" / "log.csv")["loss"]
    assert (folder / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    states = [
        torch.load(next((p / "checkpoints").glob("*40")) / "state.pt", weights_only=True) for p in (folder, tmp_path / "whole")
    ]
    assert same(*states)


def same(a, b) -> bool:
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
