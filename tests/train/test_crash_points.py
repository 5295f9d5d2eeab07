"""A run that is killed before any one of its file operations goes on with --resume and ends bit for bit the same."""

import os
import sys
import traceback
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from train import checkpoint, engine, log, results

CHANGES = {"optim": {"steps": 3, "warmup_steps": 0}, "run": {"save_every": 1, "eval_every": 2}}
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")


def forked(folder: Path, resume: bool, kill_at: int | None = None) -> int:
    """Trains in a fork that dies before its file operation number `kill_at` inside the folder; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        seen = 0

        def reached(path: object) -> None:
            nonlocal seen
            if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(str(folder)):
                return
            if seen == kill_at:
                os._exit(9)
            seen += 1

        def hook(event: str, arguments: tuple) -> None:
            if event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                reached(arguments[0])

        sync = checkpoint._sync
        checkpoint._sync = lambda path: (reached(path), sync(path))
        results.curves = results.pictures = lambda *args: None
        sys.addaudithook(hook)
        engine.fit(tiny.make(folder, **CHANGES), resume)
        Path(f"{folder}.count").write_text(str(seen))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert forked(folder, resume=False) == 0
    return folder


def check(folder, whole, at):
    assert forked(folder, resume=False, kill_at=at) == 9
    assert forked(folder, resume=True) == 0, f"killed before operation {at}"
    for name in ("last.safetensors", "model.safetensors"):
        ours, theirs = (load_file(place / name) for place in (folder, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs), (at, name)
    for column in ("step", "loss", "lr"):
        assert log.read(folder / "log.csv")[column] == log.read(whole / "log.csv")[column], at
    assert (folder / "metrics.csv").read_text() == (whole / "metrics.csv").read_text(), at
    assert (folder / "summary.json").is_file()


@pytest.mark.parametrize("share", [0.0, 0.06, 0.5, 0.97])
def test_a_run_killed_at_a_file_operation_goes_on(tmp_path, whole, share):
    count = int(Path(f"{whole}.count").read_text())
    assert count > 60, "the hook sees the operations"
    check(tmp_path / "run", whole, int(share * count))


@pytest.mark.slow
def test_a_run_killed_at_every_file_operation_goes_on(tmp_path, whole):
    for at in range(int(Path(f"{whole}.count").read_text())):
        check(tmp_path / f"run{at}", whole, at)
