"""Both training phases of a Sparsifiner from a configuration."""

import copy

import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file

import backbones  # noqa: F401  (registers our models with timm)
from backbones.sparsifiner import Details
from train import config, engine, optim, setup
from train.tasks.base import stacked

PHASES = ["attn_recon", "cls_distill"]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "heads": 3, "reduce_n": 3, "coef_top": 3}


def values(phase, **model):
    return tiny.values() | {
        "task": {"name": "sparsifiner", "num_classes": 10, "phase": phase, "teacher_pretrained": False},
        "model": {"backbone": "sparsifiner_deit_s", "backbone_args": SMALL} | model,
        "data": {"name": "digits", "size": [32, 32], "eval_batch": 50},
        "augment": {},
        "optim": {"lr": 1e-2, "steps": 2, "global_batch": 6, "weight_decay": 0.1},
    }


def built(phase, **model):
    """Task, student in training mode with shaken weights, optimiser."""
    torch.manual_seed(0)
    resolved = config.resolve(values(phase, **model))
    task = config.build_task(resolved)
    net = setup.build(resolved, task, say=lambda text: None)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    engine.train_mode(net)
    return task, net, optim.optimizer(net, resolved.optim)


def loss_of(task, net, batch):
    return stacked(task.losses(task.forward(net, batch), batch), task.counts(batch)).sum()


def batch_of(count):
    return {"image": torch.randn(count, 3, 32, 32), "label": torch.arange(count)}


@pytest.mark.parametrize("phase", PHASES)
def test_a_step_moves_all_parameters_of_the_phase_and_no_others(phase):
    task, net, optimizer = built(phase)
    before, taught = copy.deepcopy(net.state_dict()), copy.deepcopy(task.teacher.state_dict())
    loss_of(task, net, batch_of(4)).backward()
    optimizer.step()
    for name, value in net.named_parameters():
        assert torch.equal(value, before[name]) != ((".mask_predictor." in name) == (phase == "attn_recon")), name
    assert all(torch.equal(value, taught[name]) for name, value in task.teacher.state_dict().items())
    assert not task.teacher.training and not any(p.requires_grad for p in task.teacher.parameters())


@pytest.mark.parametrize("phase", PHASES)
def test_weighted_micro_batches_give_the_loss_of_the_whole(phase):
    task, net, _ = built(phase)
    batch = batch_of(5)
    whole, cuts = loss_of(task, net, batch), [slice(0, 2), slice(2, 5)]
    parts = [{key: value[cut] for key, value in batch.items()} for cut in cuts]
    total = sum(loss_of(task, net, part) * len(part["label"]) for part in parts) / 5
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("phase", PHASES)
def test_steps_lower_the_loss(phase):
    task, net, optimizer = built(phase)
    batch, losses = batch_of(4), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(task, net, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_the_student_starts_as_its_teacher_which_reads_a_plain_vit(tmp_path):
    plain = timm.create_model("deit_small_patch16_224", num_heads=3, num_classes=10, **{k: SMALL[k] for k in list(SMALL)[:4]})
    state = plain.state_dict()
    torch.save({"model": state, "model_ema": {name: value + 1 for name, value in state.items()}}, tmp_path / "deit.pth")
    wanted = values("attn_recon")
    wanted["task"] |= {"teacher_checkpoint": str(tmp_path / "deit.pth"), "teacher_checkpoint_which": "model"}
    resolved = config.resolve(wanted)
    task = config.build_task(resolved)
    student, x = task.build(resolved.model), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(task.teacher(x), plain.eval()(x), atol=1e-5, rtol=1e-5)
        details = student.train()(x)
        torch.testing.assert_close(details.logits, plain(x), atol=1e-5, rtol=1e-5)  # not masked in this phase
    assert isinstance(details, Details) and student.eval()(x).shape == (2, 10)


@pytest.mark.parametrize("phase", PHASES)
def test_activation_checkpointing_changes_no_gradient(phase):
    task, net, _ = built(phase)
    batch, found = batch_of(3), []
    for enable in (False, True):
        net.zero_grad()
        net.set_grad_checkpointing(enable)
        loss_of(task, net, batch).backward()
        found.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_the_second_phase_goes_on_from_the_run_of_the_first(tmp_path):
    first = config.resolve(values("attn_recon"))
    first.run.dir = str(tmp_path / "first")
    assert engine.fit(first)["best"]["top1"] >= 0
    second = config.resolve(values("cls_distill", checkpoint=first.run.dir))
    second.run.dir = str(tmp_path / "second")
    engine.fit(second)
    started, ended = load_file(tmp_path / "first" / "model.safetensors"), load_file(tmp_path / "second" / "last.safetensors")
    for name in started:
        assert torch.equal(started[name], ended[name]) == (".mask_predictor." in name), name


def test_the_details_are_for_training_only_and_can_be_switched_off():
    _, net, _ = built("cls_distill")
    net.set_training_phase(None)
    assert net.train()(torch.randn(1, 3, 32, 32)).shape == (1, 10) and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"backbone": "vit_tiny_patch16_224", "backbone_args": {"depth": 1, "img_size": 32}}, "trains sparsifiner_"),
        ({"freeze_backbone": True}, "freeze_backbone"),
        ({"backbone_args": SMALL | {"dense": True}}, "no predictors"),
    ],
)
def test_models_without_phases_are_refused(model, message):
    resolved = config.resolve(values("attn_recon", **model))
    with pytest.raises(ValueError, match=message):
        config.build_task(resolved).build(resolved.model)


def test_an_unknown_phase_is_refused():
    with pytest.raises(ValueError, match="attn_recon"):
        config.resolve(values("both"))
