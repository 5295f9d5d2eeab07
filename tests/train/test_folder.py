"""The run folder: one owner, a start that can be repeated whatever an earlier one left, and damage said in a sentence."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import golden
import pytest
import saved
import tiny
import torch

from train import checkpoint, config, engine, evaluation, log, results
from train import folder as run_folder
from train.checks import RunError
from train.tasks.segmentation import Segmentation
from weights.read import digest

SHORT = {"optim": {"steps": 2, "warmup_steps": 0}, "run": {"save_every": 1, "eval_every": 1}}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(results, "curves", lambda folder: None)
    monkeypatch.setattr(results, "pictures", lambda *args: None)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A finished run of two steps with a checkpoint at each, to be copied."""
    folder = tmp_path_factory.mktemp("two") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "curves", lambda folder: None)
        patch.setattr(results, "pictures", lambda *args: None)
        engine.fit(tiny.make(folder, **SHORT))
    return folder


@pytest.fixture
def copied(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run"


@contextlib.contextmanager
def held(folder):
    """The number of another process that holds the lock of a run folder; it is killed at the end."""
    ready, started = os.pipe()
    child = os.fork()
    if not child:
        run_folder.Lock(folder / run_folder.LOCK).acquire()
        os.write(started, b"x")
        signal.pause()
    try:
        assert os.read(ready, 1) == b"x"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready), os.close(started)


@pytest.mark.parametrize("how", ["resume", "plain", "overwrite"])
@pytest.mark.parametrize("case", ["breaker_stuck_folder"])
def test_a_run_killed_before_its_first_file_starts_again(tmp_path, case, how):
    assert "touch RUN/.config.yaml.tmp" in (golden.case(case) / "case.json").read_text()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.tmp").touch()
    (tmp_path / "run" / run_folder.LOCK).write_text("process 1 on elsewhere since 2026\n")
    made = tiny.make(tmp_path / "run", optim=SHORT["optim"], run={"overwrite": how == "overwrite"})
    assert engine.fit(made, resume=how == "resume")["step"] == 2
    assert log.read(tmp_path / "run" / "log.csv")["step"] == [1, 2]


def test_a_run_that_fails_in_its_first_step_does_not_block_the_next(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, "losses" if hasattr(Segmentation, "losses") else "loss", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.fit(tiny.make(tmp_path / "run", **SHORT))
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert engine.fit(tiny.make(tmp_path / "run", **SHORT, data={"eval_batch": 2}))["step"] == 2
    assert config.load_run(tmp_path / "run").data.eval_batch == 2


def test_an_overwrite_that_was_killed_can_be_repeated(copied, monkeypatch):
    again = tiny.make(copied, optim={"steps": 1, "warmup_steps": 0}, run={"overwrite": True})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            engine.fit(again)
    assert (copied / "config.yaml").is_file(), "it goes last: what has steps says what made them"
    assert engine.fit(again)["step"] == 1


def test_a_second_start_is_told_who_has_the_folder(copied):
    with held(copied) as process:
        for resume in (False, True):
            with pytest.raises(RunError, match=rf"is in use by another run \(process {process} on .* since"):
                engine.fit(tiny.make(copied, **SHORT), resume=resume)
    assert (copied / run_folder.LOCK).is_file(), "a killed process leaves its file, which locks nothing"
    assert engine.fit(tiny.make(copied, **SHORT), resume=True)["step"] == 2
    assert not (copied / run_folder.LOCK).exists()


def test_a_lock_is_held_once_in_a_process_too(tmp_path):
    first, second = run_folder.Lock(tmp_path / ".lock"), run_folder.Lock(tmp_path / ".lock")
    assert first.acquire() is None and "this process" in second.acquire()
    first.release()
    assert second.acquire() is None
    second.release()
    assert not list(tmp_path.iterdir())


def test_without_record_locks_the_living_process_counts(tmp_path, monkeypatch):
    with held(tmp_path) as process:
        monkeypatch.setattr(run_folder, "_record_lock", lambda handle: None)
        assert f"process {process} on" in run_folder.Lock(tmp_path / ".lock").acquire()
    lock = run_folder.Lock(tmp_path / ".lock")
    assert lock.acquire() is None
    lock.release()


def test_a_start_that_fails_leaves_no_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="the warm-up takes 9 of 2 steps"):
        engine.fit(tiny.make(tmp_path / "runs" / "a" / "b", optim={"steps": 2, "warmup_steps": 9}))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunError, match=r"the run folder .*file cannot be used"):
        engine.fit(tiny.make(tmp_path / "file", **SHORT))


@pytest.mark.parametrize("damage", [b"", b"task: {name: [", b"\xff\xfe\x00garbage", b"- 1\n- 2\n", b"run: 3\noptim: 4\n"])
def test_a_damaged_configuration_is_a_sentence(copied, damage):
    (copied / "config.yaml").write_bytes(damage)
    with pytest.raises(ValueError, match=r"config.yaml is damaged .*--accept-changes"):
        engine.fit(tiny.make(copied, **SHORT), resume=True)
    assert engine.fit(tiny.make(copied, **SHORT), resume=True, accept_changes=True)["step"] == 2
    assert config.load_run(copied).optim.steps == 2


def edited(pattern, to):
    def damage(path):
        text = (path / "checkpoint.json").read_text()
        assert pattern in text
        (path / "checkpoint.json").write_text(text.replace(pattern, to))

    return damage


class Payload:
    def __reduce__(self):
        return os.mkdir, ("should-not-exist",)


def payload(path):
    """A state.pt that asks to run code, with the digest that belongs to it."""
    torch.save({"progress": Payload()}, path / "state.pt")
    about = json.loads((path / "checkpoint.json").read_text())
    size, sha256 = (path / "state.pt").stat().st_size, digest(path / "state.pt")
    about["files"]["state.pt"] = {"bytes": size, "sha256": sha256}
    (path / "checkpoint.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    "damage",
    [edited('"bytes"', '"bites"'), edited('"files"', '"fires"'), edited('"state.pt"', '"stale.pt"'), payload],
    ids=["size", "list", "name", "payload"],
)
def test_any_damage_to_a_checkpoint_falls_back_to_the_one_before(copied, capsys, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    damage(checkpoint.steps(copied / "checkpoints")[-1])
    assert engine.fit(tiny.make(copied, **SHORT), resume=True)["step"] == 2
    said = capsys.readouterr().out
    assert "step_00000002 is damaged" in said and "going on from step 1" in said
    assert not (tmp_path / "should-not-exist").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "2 rows up to step 2 are missing, the first of step 1, 0 lines"),
        (lambda path: path.write_bytes(b""), "2 rows up to step 2 are missing"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-30]),
            "1 rows up to step 2 are missing, the first of step 2, 1 l",
        ),
        (lambda path: path.write_bytes(b"\xff\x00\xfe" * 9 + b"\n" + path.read_bytes()), "2 rows up to step 2 are missing"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"\n2,", b"\n\xb2,")),
            "1 rows up to step 2 are missing, the first of step 2, 1 l",
        ),
    ],
    ids=["gone", "empty", "cut", "garbage first", "a flipped bit"],
)
@pytest.mark.parametrize("name", ["log.csv", "metrics.csv"])
def test_missing_rows_are_said(copied, capsys, name, damage, said):
    damage(copied / name)
    run_folder.repair_rows(copied, 2, {"log.csv": 1, "metrics.csv": 1}, print)
    assert f"{copied / name} is damaged: {said}" in capsys.readouterr().out.replace("\n", " ")
    run_folder.repair_rows(copied, 2, {}, print)
    assert not capsys.readouterr().out
    rows = log.read(copied / name)
    assert rows.get("step", []) in ([], [1.0])


def test_intact_rows_are_kept_without_a_word(copied, capsys):
    before = [(copied / name).read_bytes() for name in ("log.csv", "metrics.csv")]
    run_folder.repair_rows(copied, 2, {"log.csv": 1, "metrics.csv": 1}, print)
    assert not capsys.readouterr().out and [(copied / name).read_bytes() for name in ("log.csv", "metrics.csv")] == before
    run_folder.repair_rows(copied, 1, {"log.csv": 1, "metrics.csv": 1}, print)
    assert log.read(copied / "log.csv")["step"] == [1]


@pytest.mark.parametrize("case", ["windows_directory_fsync"])
def test_files_are_written_where_folders_have_no_sync(case):
    script = golden.case(case) / "simulate.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize("content", [b"", b"{}", b"text of another file\n" * 9, None])
def test_damaged_weights_of_a_run_are_named(tmp_path, content):
    run = saved.run(tmp_path / "run", tiny.values())
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[:-100] if content is None else content)
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file, perhaps an incomplete one"):
        evaluation.open_run(run)
