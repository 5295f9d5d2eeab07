"""`zoo bench gpu` without a GPU: the same code in Triton's interpreter, and what it says when it cannot run."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from train import cli
from train.bench import gpu


def images(root):
    """CIFAR-10 with four images a file."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    content = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 3]}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % i for i in range(10)]}, protocol=2))
    return root


def rehearse(tmp_path, *words):
    command = [sys.executable, "-m", "train.bench.gpu", "--rehearse", "--out", str(tmp_path / "found"), *words]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_every_part_runs_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    done = rehearse(tmp_path, "--cifar", str(images(tmp_path)), "--minutes", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rehearsal"] and not found["left_out"]
    assert [row["agrees"] for row in found["check"]] == [True] * len(gpu.REHEARSAL.checks)
    assert [row["backend"] for row in found["ops"]] == ["triton", "tiled"]
    assert [row["pass"] for row in found["models"]] == ["inference"] * 2 + ["training"] * 2
    assert found["syncs"]["synchronisations"] == []
    assert found["cifar"]["summary"]
    assert set(found["seconds"]) == set(gpu.PARTS)
    assert "| triton |" in done.stdout


def test_what_it_cannot_do_is_said(tmp_path, capsys):
    assert cli.main(["bench", "gpu", "--out", str(tmp_path / "x"), "--rehearse"]) == 2
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err
    (tmp_path / "x.json").touch()
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with pytest.raises(FileExistsError, match="choose another --out"):
            gpu.run(1, str(tmp_path / "x"), None, True)
        with pytest.raises(ValueError, match="unknown part 'opps'"):
            gpu.run(1, str(tmp_path / "y"), None, True, ("opps",))
    finally:
        del os.environ["TRITON_INTERPRET"]


def test_a_part_that_fails_or_comes_too_late_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "check", lambda plan, clock: 1 / 0)
    monkeypatch.setattr(gpu, "ops", lambda plan, clock: [{"backend": "triton"}])
    monkeypatch.setattr(gpu, "models", lambda plan, clock: setattr(clock, "began", -1e9))
    found = gpu.run(1, str(tmp_path / "x"), "nowhere", True)
    assert found["check"] == {"failed": "ZeroDivisionError: division by zero"} and found["ops"] == [{"backend": "triton"}]
    assert found["left_out"]["cifar"].startswith("out of time")
    assert json.loads((tmp_path / "x.json").read_text()) == json.loads(json.dumps(found))
    text = "\n".join(gpu.lines(found))
    assert "ZeroDivisionError" in text and "cifar: not run (out of time" in text
