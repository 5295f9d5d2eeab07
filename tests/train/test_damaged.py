"""Damaged images: an error that names the file, or skipped and counted while they are few."""

import json

import numpy as np
import processes
import pytest
import tiny
from PIL import Image
from safetensors.torch import load_file
from torch import equal

from train import engine, evaluation, failures, log, results
from train.checks import RunError

MODEL = {"backbone": "nat_mini", "backbone_args": tiny.VALUES["model"]["backbone_args"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """20 training and 5 validation images of two classes; a truncated JPEG, a truncated PNG and an empty file among them."""
    monkeypatch.setattr(results, "pictures", lambda *args: None)
    monkeypatch.setattr(results, "curves", lambda folder: None)
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for i in range(count):
            place = tmp_path / "data" / split / ("even", "odd")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(generator.integers(0, 255, (40, 40, 3), np.uint8))
            image.save(place / f"{i:02}.{'png' if i % 3 else 'jpg'}")
    cut(tmp_path / "data/train/even/06.jpg", 700)
    cut(tmp_path / "data/train/odd/13.png", 2000)
    cut(tmp_path / "data/val/even/04.png", 0)
    return tmp_path


def cut(path, size):
    assert path.stat().st_size > size
    path.write_bytes(path.read_bytes()[:size])


def changes(folder, **data):
    return {
        "task": {"name": "classification", "num_classes": 2},
        "model": MODEL,
        "data": {"name": "class_folder", "root": str(folder / "data"), "args": {}, "size": [32, 32], **data},
        "optim": {"steps": 10},
        "run": {"eval_every": 5, "save_every": 4},
    }


def make(folder, name, **data):
    return tiny.make(folder / name, **changes(folder, **data))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_an_error_with_its_path(folder, workers, monkeypatch):
    monkeypatch.setattr(engine, "refuse", lambda *args, **kwargs: [])  # which would meet it first
    with pytest.raises(ValueError, match=r"(06.jpg|13.png|04.png): not a readable image"):
        engine.fit(make(folder, "run", workers=workers))


def test_few_are_skipped_and_counted_alike_by_workers_and_processes(folder):
    summary = engine.fit(make(folder, "alone", skip_unreadable=0.2))
    assert summary["unreadable"] == {"train": 2, "val": 1}
    listed = (folder / "alone" / "unreadable.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == ["train", "train", "val"]
    assert [name in line for name, line in zip(("06.jpg", "13.png", "04.png"), listed, strict=True)] == [True] * 3
    assert json.loads((folder / "alone" / "summary.json").read_text())["unreadable"] == {"train": 2, "val": 1}
    again = engine.fit(make(folder, "workers", skip_unreadable=0.2, workers=2))
    assert again["unreadable"] == summary["unreadable"] and again["last"] == summary["last"]
    assert log.read(folder / "alone" / "log.csv")["loss"] == log.read(folder / "workers" / "log.csv")["loss"]
    processes.fit(2, folder / "two", changes(folder, skip_unreadable=0.2))
    assert json.loads((folder / "two" / "summary.json").read_text())["unreadable"] == summary["unreadable"]
    assert (folder / "two" / "unreadable.txt").read_text().splitlines() == listed
    metrics = evaluation.evaluate_run(folder / "alone", weights="last.safetensors")
    assert metrics["unreadable"] == 1 and metrics["samples"] == 5 and metrics["top1"] == summary["last"]["top1"]
    assert metrics["top1"] * 4 == round(metrics["top1"] * 4), "four of the five images count"


def test_a_resumed_run_skips_and_counts_the_same(folder, monkeypatch):
    whole = engine.fit(make(folder, "whole", skip_unreadable=0.2))
    stopped = make(folder, "run", skip_unreadable=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(failures.Stop, "agreed", lambda self, accelerator, now: (folder / "run" / "checkpoints").is_dir())
        assert engine.fit(stopped)["stopped"]
    summary = engine.fit(stopped, resume=True)
    assert summary["unreadable"] == whole["unreadable"]
    ours, theirs = (load_file(folder / name / "last.safetensors") for name in ("run", "whole"))
    assert all(equal(ours[name], theirs[name]) for name in theirs)


def test_too_many_end_with_their_names(folder):
    Image.new("RGB", (40, 40)).save(folder / "data/val/even/04.png")
    message = r"(?s)2 of 20 train files cannot be read, more than data.skip_unreadable=0.05 allows.*06.jpg"
    with pytest.raises(RunError, match=message):
        engine.fit(make(folder, "run", skip_unreadable=0.05))
    with pytest.raises(ValueError, match=r"skip_unreadable must be a share .* got 1.5"):
        make(folder, "run", skip_unreadable=1.5)
