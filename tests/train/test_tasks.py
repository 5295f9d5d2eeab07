"""Tasks: loss, weight, prediction and metric belong together."""

import numpy as np
import pytest
import torch
from torch import nn

from train import config
from train.checks import Mistakes
from train.data import DATASETS
from train.metrics import Metric
from train.show import Names
from train.tasks import TASKS
from train.tasks.base import Task, stacked
from train.tasks.dense import DenseTask

SIZE = (8, 12)
SEGMENTATION = {"name": "segmentation", "num_classes": 4}
TASK_ARGUMENTS = [
    {"name": "classification", "num_classes": 4},
    {"name": "classification", "num_classes": 4, "label_smoothing": 0.1},
    {"name": "classification", "num_classes": 4, "binary": True},
    SEGMENTATION,
    {**SEGMENTATION, "class_weights": [1.0, 2.0, 0.5, 3.0]},
    {**SEGMENTATION, "class_weights": [1.0, 2.0, 0.5, 3.0], "losses": {"cross_entropy": {"average": "all"}, "focal": {}}},
    {**SEGMENTATION, "losses": {"cross_entropy": {"label_smoothing": 0.1}, "focal": {"factor": 0.5, "gamma": 1.0}}},
    {"name": "depth", "max_depth": 10.0, "min_depth": 0.1},
    {"name": "depth", "max_depth": 10.0, "over": "batch", "losses": {"l1": {}}},
    {"name": "depth", "max_depth": 10.0, "rule": "bins", "rule_args": {"bins": 4}, "losses": {"berhu": {}}},
    {"name": "multitask", "parts": {"segmentation": {"num_classes": 4}, "depth": {"max_depth": 10.0, "loss_weight": 0.5}}},
]


def make(arguments):
    return TASKS[arguments["name"]](**{key: value for key, value in arguments.items() if key != "name"})


class Pixelwise(nn.Module):
    """A stand-in model: a 1x1 convolution, pooled for classification."""

    def __init__(self, task: Task):
        super().__init__()
        torch.manual_seed(0)
        self.kind = type(task).__name__
        channels = {"MultiTask": 5, "Classification": 4}.get(self.kind) or task.out_channels
        self.conv = nn.Conv2d(3, channels, 1)

    def forward(self, images):
        out = self.conv(images)
        if self.kind == "Classification":
            return out.mean((2, 3))
        if self.kind == "MultiTask":
            parts = {"segmentation": out[:, :4], "depth": out[:, 4:]}
            return {name: {"main": part} for name, part in parts.items()} if self.training else parts
        return {"main": out, "aux": out.roll(1, 2)} if self.training else out


def terms_of(task, model, batch):
    """Terms of the loss on a batch that `augment` has seen, 1-d."""
    return stacked(task.losses(task.forward(model, batch), batch), task.counts(batch))


def counts_of(task, batch):
    return stacked(counts := task.counts(batch), counts)


def batch_of(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 4, (count, *SIZE), generator=g)
    depth = torch.rand(count, 1, *SIZE, generator=g) * 9 + 0.5
    for i in range(count):  # very different numbers of valid targets
        mask[i, : i + 1] = 255
        depth[i, :, :, : 2 * i] = 0
    return {
        "image": torch.randn(count, 3, *SIZE, generator=g),
        "label": torch.arange(count) % 4,
        "mask": mask,
        "depth": depth,
        "path": [str(i) for i in range(count)],
    }


def part(batch, chosen):
    return {key: value[chosen] for key, value in batch.items()}


@pytest.mark.parametrize("arguments", TASK_ARGUMENTS, ids=str)
def test_weighted_micro_batches_give_the_loss_and_gradient_of_the_whole(arguments):
    task = make(arguments)
    model, batch = Pixelwise(task), batch_of(5)
    whole = terms_of(task, model, batch).sum()
    whole.backward()
    expected = model.conv.weight.grad.clone()
    model.zero_grad()
    cuts = [part(batch, slice(0, 1)), part(batch, slice(1, 4)), part(batch, slice(4, 5))]
    counts = torch.stack([counts_of(task, cut) for cut in cuts])
    total = sum((terms_of(task, model, cut) * share).sum() for cut, share in zip(cuts, counts / counts.sum(0), strict=True))
    total.backward()
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(model.conv.weight.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arguments", TASK_ARGUMENTS, ids=str)
def test_losses_and_counts_have_the_same_names(arguments):
    task, batch = make(arguments), batch_of(3)
    model = Pixelwise(task)
    if isinstance(task, DenseTask):
        plain = task.losses(model(batch["image"]), batch)
        task.auxiliary = True
        terms = task.losses(model(batch["image"]), batch)
        assert terms.keys() == {*plain, *(f"aux_{name}" for name in plain)}
        assert all(terms[name] == plain[name] for name in plain)
    else:
        terms = task.losses(model(batch["image"]), batch)
    assert terms.keys() == task.counts(batch).keys()
    assert all(value.ndim == 0 and value.isfinite() for value in [*terms.values(), *task.counts(batch).values()])


def test_counts_under_other_names_than_the_losses_are_refused():
    with pytest.raises(ValueError, match="losses are dice and its counts cross_entropy"):
        stacked({"dice": torch.ones(())}, {"cross_entropy": torch.ones(())})


@pytest.mark.parametrize("arguments", TASK_ARGUMENTS, ids=str)
def test_measuring_batch_by_batch_equals_measuring_everything(arguments):
    task = make(arguments)
    model, batch = Pixelwise(task).eval(), batch_of(4)
    whole, pieces = task.metric(), task.metric()
    with torch.no_grad():
        task.measure(whole, model(batch["image"]), batch)
        for i in range(4):
            one = part(batch, slice(i, i + 1))
            task.measure(pieces, model(one["image"]), one)
    assert isinstance(whole, Metric) and task.best[0] in whole.compute()
    assert whole.compute() == pytest.approx(pieces.compute(), nan_ok=True)


def test_dense_targets_keep_their_own_size_at_evaluation():
    task = make(SEGMENTATION)
    masks = [torch.zeros(6, 8, dtype=torch.long), torch.ones(10, 4, dtype=torch.long)]
    predictions = task.measure(task.metric(), torch.randn(2, 4, *SIZE), {"mask": masks})
    assert [tuple(p.shape) for p in predictions] == [(1, 6, 8), (1, 10, 4)]


def test_a_batch_without_valid_targets_has_no_loss_and_no_gradient():
    for arguments in (SEGMENTATION, {"name": "depth", "max_depth": 10.0}):
        task = make(arguments)
        model, batch = Pixelwise(task), batch_of(2)
        batch["mask"].fill_(255)
        batch["depth"].zero_()
        loss = terms_of(task, model, batch).sum()
        loss.backward()
        assert loss.item() == 0 and counts_of(task, batch).sum() == 0
        assert model.conv.weight.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "dataset", "message"),
    [
        ({"name": "segmentation", "num_classes": 5}, "scenes", "the data have 6 classes, set task.num_classes=6"),
        ({"name": "segmentation", "num_classes": 6, "ignore_index": 0}, "scenes", "set task.ignore_index=255"),
        (
            {"name": "classification", "num_classes": 6},
            "scenes",
            "Scenes has no labels; it provides mask, panoptic, depth, normal",
        ),
        ({"name": "classification", "num_classes": 9}, "digits", "the data have 10 classes, set task.num_classes=10"),
        ({"name": "depth", "max_depth": 80.0}, "scenes", "depth from 0.5 to 10 m, the task asks for 0.001 to 80 m"),
        ({"name": "depth", "max_depth": 9.0}, "digits", "Digits has no depth"),
        (
            {"name": "depth", "max_depth": 9.0, "min_depth": 0.5, "crop": "eigen"},
            "scenes",
            "the eigen crop is KITTI's, .*; got 96x128 \\(NYUv2: nyu\\)",
        ),
        (
            {"name": "multitask", "parts": {"depth": {"max_depth": 9.0, "min_depth": 0.5}, "segmentation": {"num_classes": 2}}},
            "scenes",
            r"set task\.parts\.segmentation\.num_classes=6",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused(arguments, dataset, message):
    task, kind = make(arguments), DATASETS[dataset]
    data = kind(split="val", targets=[target for target in task.targets("val") if target in kind.provides])
    with pytest.raises(ValueError, match=message):
        task.check(data)


def test_all_that_does_not_fit_the_data_is_said_at_once():
    parts = {"segmentation": {"num_classes": 2, "ignore_index": 0}, "depth": {"max_depth": 80.0}}
    with pytest.raises(Mistakes) as refused:
        make({"name": "multitask", "parts": parts}).check(DATASETS["scenes"](split="val", targets=()))
    classes, void, depth = refused.value.sentences
    assert "set task.parts.segmentation.num_classes=6" in classes and "set task.parts.segmentation.ignore_index=255" in void
    assert "set task.parts.depth.min_depth and task.parts.depth.max_depth inside that range" in depth


def test_mistakes_of_all_parts_and_losses_are_said_at_once():
    parts = {
        "segmentation": {"num_classes": 1, "head": "fnc", "losses": {"dice": {"smoth": 1}, "lovas": {}}},
        "depth": {"max_depth": "far", "head": "fcn", "head_args": {"widht": 3}},
    }
    with pytest.raises(Mistakes) as refused:
        make({"name": "multitask", "parts": parts})
    for text in ("head: unknown name", "num_classes must be", "losses.dice: unknown key", "losses: unknown name"):
        found = [sentence for sentence in refused.value.sentences if sentence.startswith(f"task.parts.segmentation.{text}")]
        assert len(found) == 1, text
    assert [sentence for sentence in refused.value.sentences if sentence.startswith("task.parts.depth.head_args: unknown key")]
    assert "task.parts.depth.max_depth: 'far' is not float" in refused.value.sentences
    assert len(refused.value.sentences) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "segmentation", "num_classes": 1}, "task.num_classes must be at least 2"),
        ({"name": "segmentation", "num_classes": 3, "class_weights": [1.0]}, "class_weights has 1 values for 3 classes"),
        ({"name": "segmentation", "num_classes": 3, "losses": {"dice": {"smoth": 1}}}, "did you mean 'smooth'"),
        (
            {"name": "segmentation", "num_classes": 3, "losses": {"cross_entropy": {}, "dice": False}},
            "losses.dice: expected its",
        ),
        (
            {"name": "segmentation", "num_classes": 3, "losses": {"dice": {"factor": True}}},
            "losses.dice.factor: True is no number",
        ),
        ({"name": "classification", "num_classes": 3, "label_smoothing": 1.5}, "label_smoothing must lie in"),
        ({"name": "depth", "max_depth": 10, "metric": False}, "choose align"),
        ({"name": "depth", "max_depth": 10, "rule": "bins", "rule_args": {"bin": 3}}, "did you mean 'bins'"),
        ({"name": "multitask", "parts": {"detph": {}}}, "did you mean 'depth'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(arguments)


def test_mixing_changes_images_and_targets():
    task = make({"name": "classification", "num_classes": 4, "mixup": 1.0, "cutmix": 1.0})
    seen = []

    class Spy(Pixelwise):
        def forward(self, images):
            seen.append(images.clone())
            return super().forward(images)

    model, batch = Spy(task), batch_of(5)
    np.random.seed(0)
    mixed = task.augment(batch)
    losses = task.losses(task.forward(model, mixed), mixed)
    assert losses.keys() == task.counts(mixed).keys() and task.counts(mixed)["cross_entropy"] == 5
    assert not torch.equal(seen[0][:4], batch["image"][:4]) and torch.equal(seen[0][4], batch["image"][4])
    assert mixed["label"].shape == (5, 4) and torch.equal(batch["label"], torch.arange(5) % 4), "the batch itself is as it was"


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_pulls_towards_the_teacher(kind):
    task = make({"name": "classification", "num_classes": 4, "teacher": "x", "distillation": kind, "distillation_weight": 1.0})
    task.teacher = Pixelwise(task).eval()
    with torch.no_grad():
        task.teacher.conv.bias[2] += 5  # the teacher always says 2
    model, batch = Pixelwise(task), batch_of(4)
    for _ in range(60):
        model.zero_grad()
        terms_of(task, model, batch).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
    assert model(batch["image"]).argmax(1).tolist() == [2] * 4
    assert task.teacher.conv.weight.grad is None


def test_distillation_builds_a_frozen_teacher_and_both_heads_of_a_distilled_model():
    resolved = config.resolve(
        {
            "task": {"name": "classification", "num_classes": 4, "teacher": "resnet10t", "teacher_pretrained": False},
            "model": {"backbone": "deit_tiny_distilled_patch16_224", "backbone_args": {"depth": 1, "img_size": 32}},
            "data": {"name": "digits", "size": [32, 32]},
            "optim": {"steps": 1},
        }
    )
    task = config.build_task(resolved)
    model = task.build(resolved.model).train()
    batch = {"image": torch.randn(2, 3, 32, 32), "label": torch.tensor([0, 1])}
    terms_of(task, model, batch).sum().backward()
    assert model.head.weight.grad.abs().sum() > 0 and model.head_dist.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in task.teacher.parameters()) and not task.teacher.training


@pytest.mark.parametrize(
    "arguments", TASK_ARGUMENTS[:1] + TASK_ARGUMENTS[3:4] + TASK_ARGUMENTS[6:7] + TASK_ARGUMENTS[-1:], ids=str
)
def test_written_predictions_have_the_size_of_the_image(arguments, tmp_path):
    from PIL import Image

    task = make(arguments)
    image = np.zeros((20, 30, 3), np.uint8)
    with torch.no_grad():
        prediction = task.predict(Pixelwise(task).eval()(torch.randn(1, 3, *SIZE)), (20, 30))
    files = task.show.write(tmp_path / "photo", image, prediction, Names(list("abcd"), None))
    assert files == task.show.outputs(tmp_path / "photo") and all(path.is_file() for path in files)
    for path in files:
        if path.suffix == ".npy":
            assert np.load(path).shape == (20, 30) and np.load(path).dtype == np.float32
        elif "classes" in path.name or path.name.endswith("depth.png"):
            raw = Image.open(path)
            assert raw.size == (30, 20) and raw.mode == ("P" if "classes" in path.name else "I;16")
    measured = prediction if task.targets("val") == ("label",) else wrapped(prediction)
    assert task.show.panels(image, {}, measured, Names(list("abcd"), None))


def wrapped(prediction):
    """A prediction as `measure` returns it: a list of images' predictions, by part if there are several."""
    return {k: [v] for k, v in prediction.items()} if isinstance(prediction, dict) else [prediction]
