"""Attention transfer as a run: a teacher's folder, a student that learns or copies, and the student opened again."""

import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file

from train import config, engine, evaluation, setup

SMALL = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
LARGE = SMALL | {"embed_dim": 24, "depth": 3}


def made(folder, args, **task):
    return tiny.make(
        folder,
        task={"name": "classification", "num_classes": 10} | task,
        model={"backbone": "vit_tiny_patch16_224", "backbone_args": args},
        data={"name": "digits", "size": [32, 32], "eval_batch": 100, "args": {}},
        augment={"hflip": 0.0, "color_jitter": 0.0},
        optim={"steps": 3, "global_batch": 6, "ema_decay": None},
        run={"save_every": 3},
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer") / "teacher"
    engine.fit(made(folder, LARGE))
    return folder


@pytest.mark.parametrize("kind", ["attention", "copy_attention"])
def test_a_student_trains_from_a_run_and_is_opened_without_it(kind, teacher, tmp_path):
    options = {
        "teacher": "vit_tiny_patch16_224",
        "teacher_args": LARGE,
        "teacher_checkpoint": str(teacher),
        "distillation": kind,
    }
    run = made(tmp_path / "run", SMALL, **options)
    engine.fit(run)
    cut = made(tmp_path / "cut", SMALL, **options)
    cut.optim.micro_batch = 2
    engine.fit(cut)
    saved, same = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", tmp_path / "cut"))
    for key, value in saved.items():
        torch.testing.assert_close(same[key], value, atol=1e-4, rtol=1e-4)
    header = (tmp_path / "run" / "log.csv").read_text().splitlines()[0]
    assert ("distillation" in header) == (kind == "attention")
    teacher_state = load_file(teacher / "model.safetensors")
    guide = {key.removeprefix("guide."): value for key, value in saved.items() if key.startswith("guide.")}
    assert guide.keys() == (teacher_state.keys() if kind == "copy_attention" else set())
    assert all(torch.equal(value, teacher_state[key]) for key, value in guide.items())
    moved = config.load_run(tmp_path / "run")
    assert moved.task["teacher_checkpoint"] == str(teacher)
    hidden = teacher.rename(teacher.with_name("moved"))
    try:
        _, _, model, _ = evaluation.open_run(tmp_path / "run")
    finally:
        hidden.rename(teacher)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_what_a_copying_student_cannot_have_is_said(tmp_path):
    options = {"teacher": "vit_tiny_patch16_224", "teacher_args": SMALL, "teacher_pretrained": False}
    run = made(tmp_path, SMALL, distillation="copy_keys", **options)
    run.model.edits = [{"name": "topk_mlp", "k": 2}]
    with pytest.raises(ValueError, match="copy_keys takes no model.edits"):
        config.build_task(run).build(run.model)
    with pytest.raises(ValueError, match="task.teacher: unknown model 'vit_tinny_patch16_224'; did you mean"):
        wrong = made(tmp_path, SMALL, **options | {"teacher": "vit_tinny_patch16_224"})
        config.build_task(wrong).build(wrong.model)
    with pytest.raises(ValueError, match="distillation_blocks must be at least 1"):
        made(tmp_path, SMALL, distillation="keys", distillation_blocks=0, **options)


def test_which_weights_of_a_teachers_file_are_taken(tmp_path):
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, **SMALL)
    raw, averaged = (dict(plain.state_dict()) for _ in range(2))
    averaged = {name: value + 1 for name, value in averaged.items()}
    torch.save({"model": raw, "model_ema": averaged}, tmp_path / "both.pth")
    for which, wanted in ((None, averaged), ("model", raw), ("model_ema", averaged)):
        options = {"teacher": "vit_tiny_patch16_224", "teacher_args": SMALL, "distillation": "soft"}
        options |= {"teacher_checkpoint": str(tmp_path / "both.pth"), "teacher_checkpoint_which": which}
        run, said = made(tmp_path, SMALL, **options), []
        task = config.build_task(run)
        setup.build(run, task, said.append)
        for name, value in task.teacher.state_dict().items():
            assert torch.equal(value, wanted[name]), (which, name)
        assert ("chosen: model_ema; which='...' takes another: model" in said[0]) == (which is None)
