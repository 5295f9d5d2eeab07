"""Parameter groups, schedules and averaged weights."""

import math

import golden
import pytest
import timm
import torch

import backbones  # noqa: F401
import heads
from train import optim
from train.schema import OptimConfig

TINY = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "kernel_size": 3}


def dense():
    return heads.DensePredictor("nat_mini", "linear", 3, backbone_args=TINY)


def factors(model, config):
    """Parameter name -> (learning rate factor, weight decay)."""
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optim.parameter_groups(model, config) for p in g["params"]}
    return {name: found.get(id(p)) for name, p in model.named_parameters()}


def test_vectors_and_excluded_parameters_do_not_decay():
    table = factors(dense(), OptimConfig(weight_decay=0.1))
    assert table["head.predict.weight"] == (1.0, 0.1) and table["head.predict.bias"] == (1.0, 0.0)
    assert {decay for name, (_, decay) in table.items() if name.endswith("rpb")} == {0.0}, "the model's own no_weight_decay"


def test_every_trained_parameter_is_in_one_group():
    model = dense()
    groups = optim.parameter_groups(model, OptimConfig(layer_decay=0.5))
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_layer_decay_falls_towards_the_image():
    table = factors(dense(), OptimConfig(layer_decay=0.5, head_lr_scale=1.0))
    scale = {name: factor for name, (factor, _) in table.items()}
    first = next(factor for name, factor in scale.items() if "patch_embed" in name)
    last = max(factor for name, factor in scale.items() if "stages.3" in name)
    assert first < last < scale["head.predict.weight"] == 1.0


def test_heads_get_their_own_rate():
    table = factors(dense(), OptimConfig(head_lr_scale=10.0))
    assert table["head.predict.weight"][0] == 10.0
    assert {factor for name, (factor, _) in table.items() if name.startswith("backbone")} == {1.0}
    classifier = timm.create_model("nat_mini", num_classes=4, **TINY)
    table = factors(classifier, OptimConfig(head_lr_scale=10.0))
    assert {name for name, (factor, _) in table.items() if factor == 10.0} == {"head.fc.weight", "head.fc.bias"}


@pytest.mark.parametrize("model", [dense(), timm.create_model("nat_mini", num_classes=4, **TINY)], ids=["dense", "classifier"])
def test_freezing_leaves_the_head(model):
    optim.freeze_backbone(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("head") for name in trained)


def rates(steps=20, **values):
    config = OptimConfig(lr=1.0, warmup_lr=0.0, **values)
    built = optim.optimizer(torch.nn.Linear(2, 2), config)
    schedule = optim.schedule(built, config, steps, 10)
    found = []
    for step in range(steps):
        schedule.step_update(step)
        found.append(built.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("case", golden.cases("cutdepth_lr"))
def test_the_rate_of_glpn_matches_the_authors(case):
    info, tensors = golden.load(case)
    kwargs = info["kwargs"]
    for epochs in (24, 25):
        steps = kwargs["steps_per_epoch"] * epochs
        share = (epochs // 2) / epochs
        config = OptimConfig(
            lr=kwargs["peak"], min_lr=kwargs["low"], power=kwargs["power"], schedule="rise_fall", decay_at=[share]
        )
        built = optim.optimizer(torch.nn.Linear(2, 2), config)
        schedule = optim.schedule(built, config, steps, kwargs["steps_per_epoch"])
        for n, expected in zip(tensors[f"input/steps_{epochs}"].tolist(), tensors[f"output/lr_{epochs}"], strict=True):
            schedule.step_update(n - 1)
            got = torch.tensor(built.param_groups[0]["lr"])
            torch.testing.assert_close(got, expected, **golden.tolerance(info))
    with pytest.raises(ValueError, match="starts with its own rise"):
        optim.schedule(built, OptimConfig(schedule="rise_fall", warmup_steps=3), 10, 10)


def test_schedules_follow_their_formulas():
    assert rates(schedule="constant") == [1.0] * 20
    assert rates(schedule="constant", warmup_steps=4)[:6] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert rates(schedule="constant", warmup_epochs=0.4)[:6] == [0, 0.25, 0.5, 0.75, 1, 1]
    late = rates(schedule="linear", warmup_steps=16, warmup_first=True, min_lr=0.2)
    assert late[:17:4] == pytest.approx([0, 0.25, 0.5, 0.75, 1]) and late[17:] == pytest.approx([0.8, 0.6, 0.4])
    assert rates(schedule="cosine") == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)])
    assert rates(schedule="linear") == pytest.approx([1 - i / 20 for i in range(20)])
    assert rates(schedule="poly", power=0.9, min_lr=0.1) == pytest.approx([0.1 + 0.9 * (1 - i / 20) ** 0.9 for i in range(20)])
    assert rates(schedule="step", decay_at=[0.5, 0.75]) == pytest.approx([1] * 10 + [0.1] * 5 + [0.01] * 5)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="the warm-up takes 30 of 20 steps"):
        rates(warmup_steps=30)


def test_an_optimiser_without_betas_says_so():
    with pytest.raises(ValueError, match="optim.betas: the optimiser 'sgd' takes none"):
        optim.optimizer(torch.nn.Linear(2, 2), OptimConfig(name="sgd", betas=(0.9, 0.99)))


def test_averaged_weights_follow_the_decay():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = optim.averaged(model, OptimConfig(ema_decay=0.75, ema_warmup=False))
    torch.nn.init.ones_(model.weight)
    average.update(model, 5)
    assert average.module.weight.item() == pytest.approx(0.25)
    assert optim.averaged(model, OptimConfig()) is None
