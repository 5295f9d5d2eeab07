"""What is random in a step depends on seed, step and position in the total batch, not on how the batch is cut."""

import random

import numpy as np
import processes
import pytest
import tiny
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from train import engine, log, randomness, results

CUTS = [range(0, 3), range(3, 4), range(4, 8)]


def test_seeding_covers_all_three_generators():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    randomness.seed_all(1, 2)
    first = draw()
    randomness.seed_all(1, 3)
    other = draw()
    randomness.seed_all(1, 2)
    assert draw() == first and all(a != b for a, b in zip(first, other, strict=True))


def run(model, x, cuts=(range(0, 8),)):
    """A step's outputs, in micro-batches."""
    outputs = []
    for cut in cuts:
        randomness.seed_all(7, 1)
        with randomness.drawn_for(cut):
            outputs.append(model(x[cut.start : cut.stop]))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (DropPath(0.4), (8, 5, 6)),
        (DropPath(0.4, scale_by_keep=False), (8, 5, 6)),
        (nn.Dropout(0.3), (8, 700, 3)),
        (nn.Dropout2d(0.3), (8, 16, 3, 5)),
        (nn.Sequential(DropPath(0.5), nn.Dropout(0.5), DropPath(0.5)), (8, 5, 6)),
    ],
    ids=["drop path", "unscaled", "dropout", "channels", "several"],
)
def test_masks_do_not_depend_on_the_cut(module, shape):
    x = torch.rand(shape) + 0.5
    assert randomness.by_position(module) > 0
    module.train()
    whole = run(module, x)
    assert torch.equal(run(module, x, CUTS), whole) and not torch.equal(whole, x)
    torch.manual_seed(0)
    outside = module(x)
    torch.manual_seed(0)
    assert not torch.equal(outside, whole) and torch.equal(module(x), outside), "outside a step: torch's own draws"
    assert torch.equal(module.eval()(x), x)


@pytest.mark.parametrize(("parts", "cuts"), [(4, CUTS), (1, CUTS)])
def test_parts_of_a_sample_have_masks_of_their_own(parts, cuts):
    """Windows: eight images of four rows each."""
    drop = DropPath(0.5).train()
    randomness.by_position(drop)
    x = torch.ones(8, parts, 3)
    whole = run(lambda y: drop(y.flatten(0, 1)).unflatten(0, (-1, parts)), x)
    assert torch.equal(run(lambda y: drop(y.flatten(0, 1)).unflatten(0, (-1, parts)), x, cuts), whole)
    assert set(whole.unique().tolist()) == {0.0, 2.0} and torch.equal(whole, whole[..., :1].expand_as(whole))


def test_numbers_are_even_and_unrelated():
    torch.manual_seed(0)
    with randomness.drawn_for(range(0, 200)):
        a, b = (randomness.uniforms(500, torch.device("cpu")).double() for _ in range(2))
    for x in (a, b):
        counts = torch.histc(x, 10, 0, 1) / x.numel()
        assert x.min() >= 0 and x.max() < 1 and (counts - 0.1).abs().max() < 0.005
    pairs = torch.stack([a.flatten(), b.flatten(), a.roll(1, 0).flatten(), a.roll(1, 1).flatten()])
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 0.02  # 5 standard deviations of 100,000 pairs


def test_large_and_small_draws_are_the_same_hash(monkeypatch):
    with randomness.drawn_for(range(3, 9)):
        torch.manual_seed(0)
        small = randomness.uniforms(10, torch.device("cpu"))
        monkeypatch.setattr(randomness, "SMALL", 0)
        torch.manual_seed(0)
        assert torch.equal(randomness.uniforms(10, torch.device("cpu")), small)


def test_recomputed_activations_see_the_same_masks():
    block = Block(8, 2, proj_drop=0.2, attn_drop=0.2, drop_path=0.5).train()
    assert randomness.by_position(block) == 6 and not block.attn.fused_attn
    x = torch.rand(8, 5, 8)
    gradients = []
    for call in (block, lambda y: checkpoint(block, y, use_reentrant=False)):
        block.zero_grad()
        randomness.seed_all(7, 1)
        with randomness.drawn_for(range(0, 8)):
            call(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_compiler_sees_one_graph():
    block = Block(8, 2, drop_path=0.5).train()
    randomness.by_position(block)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    x = torch.rand(8, 5, 8)
    assert torch.equal(run(compiled, x), run(block, x))


def test_what_drops_nothing_is_left_alone():
    model = nn.Sequential(nn.Dropout(0.0), DropPath(0.0), nn.Linear(2, 2))
    assert randomness.by_position(model) == 0 and type(model[0]) is nn.Dropout


SMALL = tiny.VALUES["model"]["backbone_args"]
MIXED = {
    "task": {"name": "classification", "num_classes": 10, "mixup": 0.8, "cutmix": 1.0},
    "model": {
        "backbone": "nat_mini",
        "backbone_args": tiny.VALUES["model"]["backbone_args"] | {"drop_path_rate": 0.5, "drop_rate": 0.2},
    },
    "data": {"name": "digits", "size": [32, 32], "eval_batch": 360, "args": {}, "repeats": 2},
    "augment": {"random_erasing": 0.7, "hflip": 0.5, "color_jitter": 0.0},
    "optim": {"lr": 1e-3, "steps": 4, "global_batch": 14, "ema_decay": None, "warmup_steps": 0},
    "run": {"log_every": 1, "eval_every": 4, "save_every": 4, "device": "cpu"},
}


def test_mixup_drop_path_and_erasing_are_the_same_run_however_it_is_cut(tmp_path, monkeypatch):
    """One process, two, accumulation, and both: 14 images in groups of four, so the last is smaller."""
    monkeypatch.setattr(results, "pictures", lambda *args: None)
    monkeypatch.setattr(results, "curves", lambda folder: None)
    cut = {**MIXED, "optim": {**MIXED["optim"], "micro_batch": 4}, "run": {**MIXED["run"], "grad_checkpointing": True}}
    engine.fit(tiny.make(tmp_path / "one", **MIXED))
    engine.fit(tiny.make(tmp_path / "cut", **cut))
    processes.fit(2, tmp_path / "two", MIXED)
    processes.fit(2, tmp_path / "both", cut)
    rows = {name: log.read(tmp_path / name / "log.csv") for name in ("one", "cut", "two", "both")}
    for name in ("cut", "two", "both"):
        assert rows[name]["loss"] == pytest.approx(rows["one"]["loss"], abs=1e-5), name
        assert rows[name]["grad_norm"] == pytest.approx(rows["one"]["grad_norm"], rel=1e-3), name
    plain = {**MIXED, "task": {"name": "classification", "num_classes": 10}}
    engine.fit(tiny.make(tmp_path / "plain", **plain))
    assert log.read(tmp_path / "plain" / "log.csv")["loss"] != pytest.approx(rows["one"]["loss"], abs=1e-2)
