"""A run that goes on under a changed configuration: what the configuration sets is the new one's, what was learned is kept."""

import dataclasses
import json
import math

import golden
import pytest
import tiny
import torch
import yaml
from safetensors import safe_open

from train import checkpoint, config, engine, log, results, setup, state
from train import folder as run_folder
from train.schema import OptimConfig

STEP = 3
# optim key -> (what the run was started with, what it goes on with); null is what the section has by default
KEYS = {
    "lr": ({}, {"lr": 0.25}),
    "weight_decay": ({}, {"weight_decay": 0.5}),
    "betas": ({}, {"betas": [0.5, 0.6]}),
    "momentum": ({"name": "sgd"}, {"momentum": 0.25}),
    "eps": ({}, {"eps": 1e-3}),
    "schedule": ({}, {"schedule": "constant"}),
    "power": ({"schedule": "poly"}, {"power": 3.0}),
    "decay_at": ({"schedule": "step"}, {"decay_at": [0.1]}),
    "decay_rate": ({"schedule": "step"}, {"decay_rate": 0.7}),
    "min_lr": ({}, {"min_lr": 5e-4}),
    "warmup_steps": ({}, {"warmup_steps": 5}),
    "warmup_epochs": ({"warmup_steps": None}, {"warmup_epochs": 2.0}),
    "warmup_lr": ({"warmup_steps": 5}, {"warmup_lr": 1e-4}),
    "warmup_first": ({}, {"warmup_first": True}),
    "steps": ({}, {"steps": 20}),
    "epochs": ({"steps": None, "epochs": 2.4}, {"epochs": 8.0}),
    "global_batch": ({}, {"global_batch": 6}),
    "micro_batch": ({}, {"micro_batch": 1}),
    "clip_norm": ({}, {"clip_norm": 0.1}),
    "layer_decay": ({}, {"layer_decay": 0.5}),
    "head_lr_scale": ({}, {"head_lr_scale": 3.0}),
    "lr_scales": ({}, {"lr_scales": {"qkv": 0.1}}),
    "ema_decay": ({}, {"ema_decay": 0.5}),
    "ema_warmup": ({}, {"ema_warmup": False}),
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(results, "curves", lambda folder: None)
    monkeypatch.setattr(results, "pictures", lambda *args: None)


def prepared(folder, resume=False, **changes):
    """A run before its first step."""
    made = tiny.make(folder, **changes)
    run = engine.prepare(made, setup.start(made), resume, accept_changes=True)
    run.log.close()
    return run


def begun(folder, **changes):
    """A run with a checkpoint of step 3, made without training: random gradients move the weights."""
    run = prepared(folder, **changes)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEP):
        for parameter in run.parts.net.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        run.parts.optimizer.step()
        run.state.step += 1
    state.save(folder, run.parts, run.state, main=True)
    return run


def used(run):
    """What the optimiser and the loop of a run work with, over all of its steps."""
    rates = []
    for step in range(run.steps):
        run.schedule.step_update(step)
        rates.append([group["lr"] for group in run.parts.optimizer.param_groups])
    average = run.parts.average
    return {
        "rates": rates,
        "settings": state.settings(run.parts.optimizer),
        "groups": state.parameter_names(run.parts),
        "average": average and (average.decay, average.use_warmup),
        "cut": (len(run.offsets), run.steps, run.config.optim.global_batch, run.config.optim.clip_norm),
    }


def moments(run):
    names = state.parameter_names(run.parts)
    entries = run.parts.optimizer.state_dict()["state"]
    return {name: entries[i] for i, name in enumerate(name for group in names for name in group) if i in entries}


def test_every_key_of_the_section_is_tried():
    assert {*KEYS, "name"} == {field.name for field in dataclasses.fields(OptimConfig)}


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_key_counts_from_the_step_where_the_run_goes_on(tmp_path, key):
    before, change = KEYS[key]
    old = begun(tmp_path / "run", optim=before)
    learned = {name: {k: v.clone() for k, v in entry.items()} for name, entry in moments(old).items()}
    new = prepared(tmp_path / "run", resume=True, optim={**before, **change})
    fresh = prepared(tmp_path / "fresh", optim={**before, **change})
    assert new.state.step == STEP
    assert used(new) == used(fresh) != used(old)
    kept = moments(new)
    assert kept.keys() == learned.keys() and all(torch.equal(kept[n][k], v) for n, e in learned.items() for k, v in e.items())


def test_the_kind_of_optimiser_cannot_change(tmp_path):
    begun(tmp_path / "run")
    with pytest.raises(ValueError, match=r"optim.name cannot change from adamw to sgd .*--model.checkpoint="):
        prepared(tmp_path / "run", resume=True, optim={"name": "sgd"})
    assert config.load_run(tmp_path / "run").optim.name == "adamw"


@pytest.mark.parametrize("key, value", [("pretrained", True), ("checkpoint", "other.pth")])
def test_what_a_run_started_from_cannot_change(tmp_path, key, value):
    begun(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"model.{key}: .* -> {value}: this cannot change .* weights are those of its last"):
        prepared(tmp_path / "run", resume=True, model={**tiny.VALUES["model"], key: value})


def test_another_model_cannot_go_on(tmp_path):
    begun(tmp_path / "run")
    with pytest.raises(ValueError, match=r"of another model: \d+ tensors differ.*model\.\*.*cannot change"):
        prepared(tmp_path / "run", resume=True, model={**tiny.VALUES["model"], "head": "fcn"})


def test_fewer_steps_than_were_made_are_refused(tmp_path):
    begun(tmp_path / "run")
    with pytest.raises(ValueError, match="has made 3 steps already, more than the 2 asked for"):
        prepared(tmp_path / "run", resume=True, optim={"steps": 2, "warmup_steps": 0})


def test_what_an_optimiser_notes_in_its_groups_is_kept():
    saved, built = {"lr": 0.1, "d": 0.5, "betas": (0.9, 0.99), "params": [0]}, {"lr": 0.2, "d": 1e-6, "betas": (0.9, 0.99)}
    assert state.own_notes(saved, built) == {"d": 0.5}


def test_a_best_metric_of_another_measure_does_not_count(tmp_path, capsys):
    run = begun(tmp_path / "run")
    run.state.best, run.state.best_step = 0.9, 2
    state.save(tmp_path / "run", run.parts, run.state, main=True)
    assert prepared(tmp_path / "run", resume=True, optim={"lr": 0.1}).state.best == 0.9
    assert (
        prepared(tmp_path / "run", resume=True, data={"args": {**tiny.VALUES["data"]["args"], "val_count": 3}}).state.best
        is None
    )
    assert "was measured in another way" in capsys.readouterr().out


def cased(name, folder, **changes):
    """The run of a case, in a folder of its own."""
    values = yaml.safe_load((golden.case(name) / "run.yaml").read_text())
    for section, content in changes.items():
        values[section] |= content
    resolved = config.resolve(values)
    resolved.run.dir = str(folder)
    return resolved


@pytest.mark.parametrize("case", ["resume_longer"])
def test_more_steps_follow_the_schedule_of_the_longer_run(tmp_path, case):
    about = json.loads((golden.case(case) / "case.json").read_text())
    engine.fit(cased(case, tmp_path / "run"))
    engine.fit(cased(case, tmp_path / "run", optim={"steps": 20}), resume=True, accept_changes=True)
    rates = log.read(tmp_path / "run" / "log.csv")["lr"]
    assert len(rates) == 20
    assert rates[10:] == pytest.approx(about["expected"]["log.csv lr of steps 11..20"], abs=about["tolerance"])
    assert rates[10] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 10 / 20)), abs=1e-12)


@pytest.mark.parametrize("case", ["resume_freeze_changed"])
def test_a_frozen_backbone_goes_on_with_the_moments_of_the_head(tmp_path, capsys, case):
    engine.fit(cased(case, tmp_path / "run"))
    weights, rest = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    capsys.readouterr()
    frozen = cased(case, tmp_path / "run", optim={"steps": 8}, model={"freeze_backbone": True})
    engine.fit(frozen, resume=True, accept_changes=True)
    assert "train no more: their moments are dropped" in capsys.readouterr().out
    after, own = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    moved = {name for name, value in after["model"].items() if not torch.equal(value, weights["model"][name])}
    assert moved and all(name.startswith("head.") for name in moved)
    assert {float(entry["step"]) for entry in own["optimizer"]["state"].values()} == {8.0}, "the head's moments were kept"
    engine.fit(cased(case, tmp_path / "run", optim={"steps": 9}), resume=True, accept_changes=True)  # and free again
    assert "train now and did not before: they start without moments" in capsys.readouterr().out


def test_the_versions_are_part_of_what_a_run_leaves(tmp_path):
    summary = engine.fit(tiny.make(tmp_path / "run", optim={"steps": 1, "warmup_steps": 0}))
    versions = run_folder.versions()
    assert summary["versions"] == versions == json.loads((tmp_path / "run" / "summary.json").read_text())["versions"]
    assert (
        (tmp_path / "run" / "config.yaml")
        .read_text()
        .startswith(f"# Written by backbone-zoo {versions['backbone-zoo']}, torch")
    )
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["versions"]) == versions
