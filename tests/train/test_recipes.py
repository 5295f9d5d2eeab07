"""Every shipped configuration builds its model and takes a step; only widths and image size are shrunk."""

import re
from pathlib import Path

import families
import pytest
import torch

from train import config, engine, optim, recipes, setup
from train.tasks.base import stacked

SIZE = 64


def batch_for(task, loaded):
    size = loaded.data.size
    batch = {"image": torch.randn(2, loaded.model.in_chans, *size), "path": ["a", "b"]}
    classes = loaded.task.get("num_classes") or loaded.task.get("parts", {}).get("segmentation", {}).get("num_classes")
    if "label" in task.targets("train"):
        batch["label"] = torch.tensor([0, classes - 1])
    if "mask" in task.targets("train"):
        batch["mask"] = torch.randint(0, classes, (2, *size))
    if "panoptic" in task.targets("train"):
        thing = min(task.things)
        batch["panoptic"] = torch.zeros(2, *size, dtype=torch.int64)  # stuff 0, and two things in its middle
        batch["seed"] = torch.tensor([1, 2])
        batch["panoptic"][:, 16:40, 8:24], batch["panoptic"][:, 16:40, 32:48] = 1000 * thing + 1, 1000 * thing + 2
    if "depth" in task.targets("train"):
        batch["depth"] = torch.rand(2, 1, *size) * 4 + 0.6
    if "frames" in task.targets("train"):
        batch |= {"frames": torch.randn(2, 2, 3, *size), "pose": torch.full((2, 2, 4, 4), torch.nan)}
        batch |= {"views": torch.randint(0, 256, (2, 3, 3, *size)), "intrinsics": torch.eye(3).expand(2, 3, 3)}
        task.offsets = (-1, 1)
    return batch


@pytest.mark.parametrize("name", recipes.shipped())
def test_a_shipped_configuration_takes_a_step(name):
    torch.manual_seed(0)
    size = 96 if name == "imagenet/hvt_s_4" else SIZE  # its four poolings leave nothing of 64 pixels
    loaded = config.load(name, [f"--data.size=[{size}, {size}]", "--model.pretrained=false", "--model.checkpoint=null"])
    loaded.model.img_size = (size, size)
    own = dict(loaded.model.backbone_args)
    own.pop("img_size", None)
    loaded.model.backbone_args = {**own, **families.narrow(loaded.model.backbone)}
    for args in (loaded.model.head_args, loaded.model.aux_args):
        if "width" in args:
            args["width"] = 16
    if loaded.task.get("teacher") is not None:
        vit = loaded.task["name"] == "classification" and "attention" in loaded.task["distillation"]
        teacher = (
            {"teacher_args": {**loaded.task["teacher_args"], **families.narrow(loaded.task["teacher"])}}
            if vit
            else {"teacher": "resnet10t"}
        )
        loaded.task |= {"teacher_pretrained": False, "teacher_checkpoint": None, **teacher}
    task = config.build_task(loaded)
    net = setup.build(loaded, task, say=lambda text: None)
    optimizer = optim.optimizer(net, loaded.optim)
    steps = loaded.optim.steps or int(loaded.optim.epochs * 1000)
    schedule = optim.schedule(optimizer, loaded.optim, steps, 1000)
    schedule.step_update(steps // 2)
    engine.train_mode(net)
    batch = batch_for(task, loaded)
    before = {key: value.clone() for key, value in net.named_parameters()}
    batch = task.augment(batch)
    loss = stacked(task.losses(task.forward(net, batch), batch), task.counts(batch))
    assert loss.isfinite().all()
    loss.sum().backward()
    optimizer.step()
    moved = [key for key, value in net.named_parameters() if not torch.equal(value, before[key])]
    assert moved and all(net.get_parameter(key).requires_grad for key in moved)
    net.eval()
    seen = {name: value for name, value in batch.items() if name != "frames"}  # evaluation has one image
    with torch.no_grad():
        prediction = task.predict(task.forward(net, seen), (SIZE, SIZE) if "label" not in batch else None)
    assert prediction is not None


def test_a_recipe_says_where_it_is_from_and_what_it_reached():
    for name in recipes.shipped():
        about = recipes.about(name)
        assert about.get("source") and about.get("measured"), f"{name}: source or measured is missing, not even 'not yet run'"
        assert "not yet run" in about["measured"] or re.search(r"\d", about["measured"]), name


def test_a_recipe_names_its_command():
    for path in sorted((Path(recipes.__file__).parent.parent / "configs").rglob("*.yaml")):
        folder = "" if path.parent.name == "configs" else f"{path.parent.name}/"
        names = [f"{folder}{path.stem}", f"{folder}VARIANT"]
        text = path.read_text(encoding="utf-8")
        assert any(f"# zoo train {name}" in text or f"--no-python zoo train {name}" in text for name in names), path
