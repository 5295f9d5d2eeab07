"""Real processes: two of them give one's run, and a killed one goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from train import checkpoint, config, engine, evaluation, log, results

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
NORM_FREE = {**tiny.VALUES["model"], "head": "dpt", "head_args": {"width": 8}}  # batch norm sees how a batch is cut


def torchrun(*arguments: str) -> str:
    """Output of the zoo command under torchrun with two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, "-m", "train", *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def write(path: Path, **changes) -> str:
    path.write_text(yaml.safe_dump(tiny.values(**changes)))
    return str(path)


@pytest.mark.parametrize("micro", [None, 1], ids=["whole", "accumulated"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(tmp_path, parallel, micro):
    """20 steps of float32, batch norm in the head (synchronised) unless micro-batches cut the batch otherwise."""
    optim = {"steps": 20, "global_batch": 4, "micro_batch": micro, "lr": 3e-4}
    changes = {"optim": optim, "run": {"eval_every": 20, "save_every": 10}}
    if micro:
        changes["model"] = NORM_FREE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "pictures", lambda *args: None)
        engine.fit(tiny.make(tmp_path / "one", **changes))
    changes["run"] |= {"parallel": parallel}
    said = processes.fit(2, tmp_path / "two", changes)
    assert f"total batch 4 = 2 processes x {2 if micro else 1} micro-batch" in said
    assert said.count("step 20/20  evaluation") == 1, "only the main process writes"
    one, two = (log.read(tmp_path / name / "log.csv") for name in ("one", "two"))
    assert two["step"] == one["step"] == list(range(1, 21))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


def test_torchrun_trains_and_two_processes_evaluate_like_one(tmp_path):
    """7 samples in batches of 3 do not divide; the same weights must score the same to the last digit."""
    path = write(tmp_path / "run.yaml", optim={"steps": 4})
    assert "no checkpoint in" in torchrun("train", path, "--resume", f"--run.dir={tmp_path / 'two'}")
    assert log.read(tmp_path / "two" / "log.csv")["step"] == [1, 2, 3, 4]
    assert processes.evaluate(2, tmp_path / "two") == evaluation.evaluate_run(tmp_path / "two")


KILLED = [(1, 0, "ddp"), (1, 2, "ddp"), (2, 0, "fsdp"), (2, 1, "ddp")]


@pytest.mark.parametrize(("world", "workers", "parallel"), KILLED, ids=lambda value: str(value))
def test_a_killed_run_resumes_bit_for_bit(tmp_path, world, workers, parallel):
    changes = {
        "optim": {"steps": 16},
        "run": {"save_every": 4, "eval_every": 8, "parallel": parallel},
        "data": {"workers": workers},
        "model": {**tiny.VALUES["model"], "backbone_args": {**tiny.VALUES["model"]["backbone_args"], "drop_path_rate": 0.3}},
    }
    processes.fit(world, tmp_path / "whole", changes)
    folder = tmp_path / "killed"
    found = processes.start(world, folder, changes)
    processes.wait_for_step(found, folder, 6)
    for process in found:
        process.kill()
    for process in found:
        process.join(60)
    assert [process.exitcode for process in found] == [-signal.SIGKILL] * world, "they must have been killed in the middle"
    assert "going on from step" in processes.fit(world, folder, changes, resume=True)
    for name in ("last.safetensors", "model.safetensors"):
        assert same(load_file(folder / name), load_file(tmp_path / "whole" / name)), name
    for column in ("step", "epoch", "loss", "lr", "grad_norm"):
        assert log.read(folder / "log.csv")[column] == log.read(tmp_path / "whole" / "log.csv")[column]
    assert (folder / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    (weights, state), (other_weights, other_state) = (
        checkpoint.load(checkpoint.latest(path / "checkpoints")) for path in (folder, tmp_path / "whole")
    )
    assert set(weights) == {"model", "averaged"} and same(weights, other_weights)
    assert set(state) >= {"progress", "optimizer", "parameters", "scaler"} and same(state, other_state)


def test_what_fsdp_saved_goes_on_in_one_process(tmp_path):
    """Checkpoints hold whole tensors: the second half in one process gives the losses of a run that had one from the start."""
    changes = {"optim": {"steps": 8, "lr": 3e-4}, "run": {"save_every": 4, "eval_every": 8}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "pictures", lambda *args: None)
        engine.fit(tiny.make(tmp_path / "one", **changes))
        split = {**changes, "run": {**changes["run"], "parallel": "fsdp"}}
        processes.fit(2, tmp_path / "two", split)
        last = checkpoint.steps(tmp_path / "two" / "checkpoints")[-1]
        (last / "state.pt").unlink()  # so that the one of step 4 is the newest
        engine.fit(tiny.make(tmp_path / "two", **changes), resume=True, accept_changes=True)
    one, two = (log.read(tmp_path / name / "log.csv")["loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-5) and len(two) == 8


def test_fsdp_refuses_what_it_cannot_do():
    for key, value, message in (("channels_last", True, "contiguous"), ("precision", "fp16", "bf16 or no")):
        with pytest.raises(ValueError, match=message):
            config.resolve(tiny.values(run={"parallel": "fsdp", key: value}))


def same(a, b) -> bool:
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
