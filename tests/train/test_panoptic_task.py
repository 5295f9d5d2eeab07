"""Panoptic segmentation through the loop: things and stuff, prediction files, what is refused."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from heads.matrix import NARROW
from train import engine, evaluation, results
from train.predict import predict
from train.tasks import TASKS

pytest.importorskip("scipy")
THINGS = [2, 3, 4, 5]
ARGS = {"mask2former": NARROW["mask2former"], "kmax": NARROW["kmax"] | {"layers": [1, 1, 0]}}
LOSSES = {"mask2former": {"points": 32}, "kmax": {"pixels": 32, "semantic_pixels": 32}}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(results, "curves", lambda folder: None)


def config(folder, head, **task):
    values = tiny.values(model={"head": head, "head_args": ARGS[head]}, optim={"steps": 2, "warmup_steps": 0})
    values["task"] = {"name": "panoptic", "num_classes": 6, "things": THINGS, "losses": LOSSES[head], **task}
    values["augment"] = {"hflip": 0.5}
    resolved = engine.configuration.resolve(values)
    resolved.run.dir = str(folder)
    return resolved


@pytest.mark.parametrize(
    "head, merge",
    [("mask2former", {"score": 0.0, "overlap": 0.0}), ("kmax", {"pixel": 0.2, "thing": 0.0, "stuff": 0.0, "overlap": 0.0})],
)
def test_a_run_trains_evaluates_and_predicts(head, merge, tmp_path):
    summary = engine.fit(config(tmp_path / "run", head, merge=merge))
    names = {f"{name}{kind}" for name in ("pq", "sq", "rq") for kind in ("", "_things", "_stuff")}
    assert names == set(summary["best"]) and (tmp_path / "run" / "predictions.png").is_file()
    assert "4 of them things" in evaluation.evaluate_run(tmp_path / "run")["protocol"]
    (tmp_path / "in").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(tmp_path / "in" / "a.png")
    predict(tmp_path / "run", tmp_path / "in", tmp_path / "out")
    colours = np.asarray(Image.open(tmp_path / "out" / "a_panoptic.png")).astype(int)
    ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
    rows = json.loads((tmp_path / "out" / "a_segments.json").read_text())["segments_info"]
    assert ids.shape == (40, 56) and rows
    assert {row["id"]: row["area"] for row in rows} == {int(i): int((ids == i).sum()) for i in np.unique(ids) if i}
    for row in rows:
        x, y, width, height = row["bbox"]
        inside = ids == row["id"]
        assert inside[y : y + height, x : x + width].sum() == row["area"] and row["isthing"] == (row["category_id"] in THINGS)
        assert row["id"] == row["category_id"] * 1000 + 1 + (row["id"] - 1) % 1000


def outputs(queries, size=(4, 8)):
    """What a perfect head of mask2former gives for (label, box of columns) queries."""
    classes, masks = torch.full((1, len(queries), 4), -20.0), torch.full((1, len(queries), *size), -20.0)
    for i, (label, (left, right)) in enumerate(queries):
        classes[0, i, label] = 20.0
        masks[0, i, :, left:right] = 20.0
    return {"main": {"class_logits": classes, "mask_logits": masks, "size": size}, "image_size": (4, 7)}


def test_queries_become_numbered_things_and_one_stuff():
    task = TASKS["panoptic"](3, [1])
    output = outputs([(1, (0, 2)), (0, (2, 4)), (1, (4, 5)), (0, (5, 8))])
    expected = [1001, 1001, 0, 0, 1002, 0, 0]  # the last column is padding
    assert task.predict(output)[0].tolist() == [expected] * 4
    assert task.predict(output, (8, 14))[0, 0, ::2].tolist() == expected
    truth = torch.tensor([[expected] * 4])
    metric = task.metric()
    task.measure(metric, output, {"panoptic": truth})
    assert metric.compute()["pq"] == 1


def test_losses_see_each_thing_once_and_no_void():
    task = TASKS["panoptic"](3, [1])
    target = torch.tensor([[1001, 1001, 1002, 0], [-1, 1000, 1002, 0]])
    found = task.augment({"panoptic": target[None]})["masks"][0]
    assert found.labels.tolist() == [0, 1, 1] and found.masks.sum((1, 2)).tolist() == [2, 2, 2]
    assert task.classes(target).tolist() == [[1, 1, 1, 0], [255, 1, 1, 0]]


@pytest.mark.parametrize(
    "head, task, words",
    [
        ("mask2former", {"things": [2, 3]}, r"set task.things=\[2, 3, 4, 5\]"),
        ("mask2former", {"things": [2, 9]}, "different class ids of 0..5"),
        ("mask2former", {"num_classes": 7}, "set task.num_classes=6"),
        ("mask2former", {"merge": {"pixel": 0.4}}, "pixel"),
        ("kmax", {"merge": {"score": 0.4}}, "score"),
    ],
)
def test_what_does_not_fit_is_refused(head, task, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        engine.fit(config(tmp_path / "run", head, **task))
    assert not (tmp_path / "run").exists()


def test_windows_and_flips_are_refused(tmp_path):
    values = tiny.values(model={"head": "mask2former", "head_args": ARGS["mask2former"]}, infer={"flip": True})
    values["task"] = {"name": "panoptic", "num_classes": 6, "things": THINGS}
    with pytest.raises(ValueError, match="panoptic runs whole images once"):
        engine.configuration.resolve(values)


def test_data_without_segments_are_refused():
    from train.data import DATASETS

    with pytest.raises(ValueError, match="Digits has no segments"):
        TASKS["panoptic"](3, [1]).check(DATASETS["digits"]("train", ("label",)))
