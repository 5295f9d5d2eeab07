"""Mask classification through the loop: terms, the same step however the batch is cut, what is refused."""

import pytest
import tiny
import torch

from heads.matrix import NARROW
from train import engine, log, results
from train.tasks import TASKS
from train.tasks.mask_classification import steps

pytest.importorskip("scipy")
TASK = {"name": "mask_classification", "num_classes": 6, "losses": {"points": 32}}
ARGS = {"mask2former": NARROW["mask2former"], "kmax": NARROW["kmax"] | {"layers": [1, 1, 0]}}
TERMS = {
    "mask2former": ["class", "mask", "dice", "aux_class", "aux_mask", "aux_dice"],
    "kmax": ["class", "mask", "dice", "pixels", "semantic", "aux_class", "aux_mask", "aux_dice", "aux_pixels"],
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(results, "curves", lambda folder: None)


def config(folder, head, task=None, **changes):
    args = {**ARGS[head]}
    changes = {"optim": {"steps": 2, "warmup_steps": 0}, **changes}
    values = tiny.values(model={"head": head, "head_args": args}, **changes)
    values["task"] = {**TASK, **({"losses": {"pixels": 32}} if head == "kmax" else {}), **(task or {})}
    values["augment"] = {"hflip": 0.5}
    resolved = engine.configuration.resolve(values)
    resolved.run.dir = str(folder)
    return resolved


@pytest.mark.parametrize("head", TERMS)
def test_a_run_trains_and_evaluates(head, tmp_path):
    summary = engine.fit(config(tmp_path / "run", head))
    columns = log.read(tmp_path / "run" / "log.csv")
    assert set(TERMS[head]) <= set(columns)
    for i, loss in enumerate(columns["loss"]):
        assert sum(columns[name][i] for name in TERMS[head]) == pytest.approx(loss, rel=1e-5)
    assert 0 <= summary["best"]["miou"] <= 1 and (tmp_path / "run" / "predictions.png").is_file()


@pytest.mark.parametrize("head", TERMS)
def test_the_terms_of_a_batch_are_those_of_its_parts(head, tmp_path):
    """Weighted with their counts; points and matching depend on the sample alone. (A whole run is equal to rounding only while
    no mask logit crosses 0, where the decoder of Mask2Former changes what a query sees.)"""
    resolved = config(tmp_path / "run", head)
    task = engine.configuration.build_task(resolved)
    model = task.build(resolved.model).train()
    torch.manual_seed(0)
    mask = torch.randint(0, 6, (3, 8, 12)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    mask[0, :, :30] = 255  # images with very different numbers of masks
    batch = {"image": torch.randn(3, 3, 32, 48), "mask": mask, "seed": torch.tensor([5, 2**61, 7])}
    with torch.no_grad():
        whole = task.forward(model, batch)

        def part(value, i):
            if isinstance(value, dict):
                return {key: part(inner, i) for key, inner in value.items()}
            if isinstance(value, list):
                return [part(inner, i) for inner in value]
            return value[i : i + 1] if isinstance(value, torch.Tensor) else value

        full = task.augment(batch)
        expected, counts = task.losses(whole, full), task.counts(full)
        assert set(expected) == set(counts) == set(TERMS[head])
        total = dict.fromkeys(counts, 0.0)
        for i in range(3):
            one = task.augment(part(batch, i))
            own = task.counts(one)
            for name, loss in task.losses(part(whole, i), one).items():
                total[name] += loss * own[name] / counts[name]
    for name, value in total.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "head, task, words",
    [
        ("mask2former", {"weights": {"pixels": 1.0}}, "mask2former has no term 'pixels'; it has class, mask, dice"),
        ("mask2former", {"losses": {"temperature": 1.0}}, "temperature"),
        ("kmax", {"losses": {"points": 3}}, "points"),
    ],
)
def test_what_a_head_does_not_have_is_refused(head, task, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        engine.fit(config(tmp_path / "run", head, task))
    assert not (tmp_path / "run").exists()


def test_heads_without_queries_and_auxiliary_heads_are_refused(tmp_path):
    plain = config(tmp_path / "run", "mask2former")
    plain.model.head, plain.model.head_args = "linear", {}
    with pytest.raises(ValueError, match="trains heads with queries"):
        engine.fit(plain)
    plain = config(tmp_path / "run", "mask2former")
    plain.model.aux_head = "fcn"
    with pytest.raises(ValueError, match="set it to null"):
        engine.fit(plain)


def test_labels_are_read_at_the_published_places():
    """Every fourth pixel from the first, for sides of 32 n and 32 n + 1 alike."""
    assert steps(64, 16).tolist() == list(range(0, 64, 4)) and steps(65, 17).tolist() == list(range(0, 65, 4))
    assert len(steps(50, 16)) == 16 and int(steps(50, 16).max()) < 50


def test_the_seed_of_a_sample_comes_from_the_loader():
    task = TASKS["mask_classification"](6)
    torch.manual_seed(3)
    first = task.sample({"image": 1})
    torch.manual_seed(3)
    assert task.sample({"image": 2})["seed"] == first["seed"] and isinstance(first["seed"], int)
