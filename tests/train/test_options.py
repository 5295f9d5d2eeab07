"""Every option of a recipe, through the configuration: it changes the run as it should, or leaves it as it must."""

import pytest
import tiny
import torch
from safetensors.torch import load_file

from train import config, engine, log, results, setup

MODEL = {"backbone": "nat_mini", "backbone_args": tiny.VALUES["model"]["backbone_args"]}
BASE = {
    "task": {"name": "classification", "num_classes": 10},
    "model": MODEL,
    "data": {"name": "digits", "size": [32, 32], "eval_batch": 360},
    "augment": {},
    "optim": {"lr": 1e-3, "steps": 4, "global_batch": 6},
    "run": {"log_every": 1, "eval_every": 4, "save_every": 4, "device": "cpu"},
}
DROP_PATH = {"backbone_args": {**MODEL["backbone_args"], "drop_path_rate": 0.5}}
TEACHER = {"teacher": "resnet10t", "teacher_pretrained": False, "distillation_weight": 0.9}

CHANGES = {  # the loss of the first step is another one
    "mixup": {"task": {"mixup": 1.0}},
    "cutmix": {"task": {"cutmix": 1.0}},
    "label smoothing": {"task": {"label_smoothing": 0.3}},
    "binary": {"task": {"binary": True}},
    "hard distillation": {"task": TEACHER},
    "soft distillation": {"task": {**TEACHER, "distillation": "soft"}},
    "drop path": {"model": DROP_PATH},
    "RandAugment": {"augment": {"auto_augment": "rand-m9-mstd0.5-inc1"}},
    "random erasing": {"augment": {"random_erasing": 1.0}},
    "repeated augmentation": {"data": {"repeats": 3}},
    "bf16": {"run": {"precision": "bf16"}},
}
LATER = {  # the first loss stays, those after the first update do not
    "clipping": {"optim": {"clip_norm": 1e-3, "name": "sgd"}},
    "layer decay": {"optim": {"layer_decay": 0.3}},
    "head rate": {"optim": {"head_lr_scale": 10.0}},
    "frozen backbone": {"model": {"freeze_backbone": True}},
    "warm-up": {"optim": {"warmup_steps": 3}},
    "weight decay": {"optim": {"weight_decay": 20.0}},
}
SAME = {  # another way to the same numbers
    "accumulation": {"optim": {"micro_batch": 2}},
    "activation checkpointing": {"run": {"grad_checkpointing": True}},
    "channels last": {"run": {"channels_last": True}},
    "averaging": {"optim": {"ema_decay": 0.9}},
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Runs BASE with changes; returns (losses, gradient norms, weights after the last step)."""
    place = tmp_path_factory.mktemp("options")

    def run(name, changes):
        values = {section: {**content, **changes.get(section, {})} for section, content in BASE.items()}
        resolved = config.resolve(values)
        resolved.run.dir = str(place / name)
        if not (place / name).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(results, "pictures", lambda *args: None)
                patch.setattr(results, "curves", lambda folder: None)
                patch.setattr(engine, "refuse", lambda *args, **kwargs: [])
                engine.fit(resolved)
        rows = log.read(place / name / "log.csv")
        return rows["loss"], rows["grad_norm"], load_file(place / name / "last.safetensors")

    return run


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_first_loss(fitted, name):
    base, losses = fitted("base", {})[0], fitted(name, CHANGES[name])[0]
    assert losses[0] != base[0] and all(0 < loss < 20 for loss in losses)
    if name == "bf16":
        assert losses[0] == pytest.approx(base[0], rel=0.05)


@pytest.mark.parametrize("name", LATER)
def test_what_changes_the_updates(fitted, name):
    plain = {"optim": {"name": "sgd"}} if name == "clipping" else {}
    base, norms, weights = fitted("base sgd" if plain else "base", plain)
    losses, own_norms, own = fitted(name, LATER[name])
    assert losses[0] == base[0] and losses[1:] != base[1:]
    if name == "clipping":
        assert own_norms[0] == norms[0] > 1e-3, "the norm is the one before clipping"
    if name == "frozen backbone":
        start = fitted("start", {"optim": {"lr": 1e-12, "weight_decay": 0.0}})[2]
        moved = {key for key in own if key.startswith("head") and not torch.allclose(own[key], start[key], atol=1e-6)}
        rest = [key for key in own if not key.startswith("head")]
        assert moved and all(torch.allclose(own[key].float(), start[key].float(), atol=1e-6) for key in rest)


@pytest.mark.parametrize("name", SAME)
def test_what_leaves_the_losses(fitted, name):
    base, _, weights = fitted("base", {})
    losses, _, own = fitted(name, SAME[name])
    assert losses == pytest.approx(base, abs=2e-5)
    if name == "averaging":
        assert not all(torch.equal(own[key], weights[key]) for key in own), "what is saved is the average"


def test_activation_checkpointing_runs_each_block_twice(tmp_path):
    calls = {}
    for on in (False, True):
        resolved = config.resolve({**BASE, "run": {**BASE["run"], "grad_checkpointing": on}})
        net = setup.build(resolved, config.build_task(resolved)).train()
        block = net.stages[0].blocks[0]
        block.register_forward_pre_hook(lambda module, inputs, on=on: calls.update({on: calls.get(on, 0) + 1}))
        net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert calls == {False: 1, True: 2}
