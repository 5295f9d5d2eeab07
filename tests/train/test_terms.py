"""Named terms from a task's losses to log.csv and TensorBoard, and a task that uses every part of the interface."""

import csv
import math
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import heads
from train import engine, log, results
from train.metrics import Metric
from train.tasks import TASKS
from train.tasks.base import Task
from train.tasks.dense import backbone_arguments

AUXILIARY = {**tiny.VALUES["model"], "aux_head": "fcn", "aux_args": {"width": 8}}
TWO_LOSSES = {"name": "segmentation", "num_classes": 6, "losses": {"cross_entropy": {}, "dice": {"factor": 3.0}}}
SHORT = {"steps": 2, "warmup_steps": 0}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(results, "curves", lambda folder: None)
    monkeypatch.setattr(results, "pictures", lambda *args: None)


def fit(folder, task, **changes):
    merged = tiny.values(optim=SHORT, **changes)
    merged["task"] = task
    resolved = engine.configuration.resolve(merged)
    resolved.run.dir = str(folder)
    return engine.fit(resolved)


def test_every_term_is_a_column_beside_their_sum(tmp_path):
    fit(tmp_path / "run", TWO_LOSSES, model=AUXILIARY)
    columns, terms = log.read(tmp_path / "run" / "log.csv"), ["cross_entropy", "dice", "aux_cross_entropy", "aux_dice"]
    assert list(columns)[:7] == ["step", "epoch", "loss", *terms]
    for i, loss in enumerate(columns["loss"]):
        assert sum(columns[name][i] for name in terms) == pytest.approx(loss, rel=1e-6)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("loss", *terms):
        assert [event.value for event in board.Scalars(f"train/{name}")] == pytest.approx(columns[name])


def test_a_log_whose_columns_change_keeps_its_rows(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss,dice,lr\n1,0.5,0.25,0.1\n")
    assert log.widen(path, ["step", "loss", "lr"]) == ["step", "loss", "dice", "lr"]
    assert log.widen(path, ["step", "loss", "focal", "lr"]) == ["step", "loss", "focal", "lr", "dice"]
    with open(path, newline="") as file:
        assert list(csv.reader(file)) == [["step", "loss", "focal", "lr", "dice"], ["1", "0.5", "", "0.1", "0.25"]]
    assert log.read(path)["dice"] == [0.25] and torch.tensor(log.read(path)["focal"]).isnan().all()


class Patches(heads.Head):
    """A throw-away head of named outputs: what each pixel looked like, and where it looked."""

    returns_names = True

    def __init__(self, channels, out_channels):
        super().__init__()
        self.colour = nn.Conv2d(channels[0], out_channels, 1)
        self.weight = nn.Conv2d(channels[0], 1, 1)

    def get_classifier(self):
        return self.colour

    def forward(self, maps):
        return {"colour": self.colour(maps[0]), "layers": [self.weight(maps[0])]}

    def scores(self, output):
        return output["colour"]


class Error(Metric):
    protocol = "mean squared error of the image"

    def __init__(self):
        super().__init__(total=torch.zeros((), dtype=torch.float64), count=torch.zeros((), dtype=torch.int64))

    def update(self, prediction, batch):
        self.add("total", (prediction - batch["image"]).square().mean((1, 2, 3)).sum())
        self.add("count", torch.tensor(len(prediction)))

    def compute(self):
        return {"mse": float(self.sums["total"] / self.sums["count"])}


class Inpainting(Task):
    """Guess the image behind a random mask: nothing is read in training, depth at evaluation, masks come from `sample`."""

    best = ("mse", "min")
    takes_heads = True
    seen: list = []

    def targets(self, split):
        return () if split == "train" else ("depth",)

    def build(self, model):
        return heads.DensePredictor(model.backbone, Patches, 3, **backbone_arguments(model))

    def check(self, dataset):
        assert dataset.targets == self.targets(dataset.split)

    def sample(self, sample):
        return {**sample, "hidden": (torch.rand(1, *sample["image"].shape[-2:]) < 0.5).float()}

    def forward(self, model, batch):
        shown = 1 - batch["hidden"] if "hidden" in batch else 1
        return model(batch["image"] * shown)

    def losses(self, outputs, batch):
        self.seen.append(dict(zip(batch["path"], batch["hidden"].flatten(1).tolist(), strict=True)))
        main = outputs["main"]
        size = main["colour"].shape[-2:]
        image = nn.functional.adaptive_avg_pool2d(batch["image"], size)
        hidden = nn.functional.adaptive_max_pool2d(batch["hidden"], size)
        error = (main["colour"] - image).square().mean(1, keepdim=True)
        return {"hidden": (error * hidden).sum() / hidden.sum(), "weight": main["layers"][0].square().mean()}

    def counts(self, batch):
        images = torch.tensor(float(len(batch["image"])))
        return {"hidden": images, "weight": images}

    def predict(self, output, size=None):
        return output.float()

    def metric(self):
        return Error()


@pytest.fixture
def inpainting(monkeypatch):
    monkeypatch.setitem(TASKS, "inpainting", Inpainting)
    monkeypatch.setattr(Inpainting, "seen", [])
    return {"name": "inpainting"}


def test_a_task_of_named_outputs_trains_and_its_scores_are_evaluated(tmp_path, inpainting):
    summary = fit(tmp_path / "run", inpainting)
    assert set(summary["last"]) == {"mse"} and summary["step"] == 2
    columns = log.read(tmp_path / "run" / "log.csv")
    assert columns["loss"] == pytest.approx([a + b for a, b in zip(columns["hidden"], columns["weight"], strict=True)])


def test_what_a_task_draws_depends_on_the_seed_and_the_place_alone(tmp_path, inpainting):
    drawn = []
    for name, run in (("one", {}), ("workers", {"workers": 2}), ("cut", {"micro_batch": 2}), ("other", {"seed": 1})):
        Inpainting.seen.clear()
        changes = {"optim": SHORT | run} if name == "cut" else {"data": run} if name == "workers" else {"run": run}
        merged = tiny.values(**{"optim": SHORT, **changes})
        merged["task"] = inpainting
        resolved = engine.configuration.resolve(merged)
        resolved.run.dir = str(tmp_path / name)
        engine.fit(resolved)
        drawn.append({path: mask for batch in Inpainting.seen for path, mask in batch.items()})
    one, workers, cut, other = drawn
    assert one == workers == cut and len(one) > 4
    assert any(other[path] != one[path] for path in one.keys() & other.keys())


def test_curves_have_at_most_six_panels_with_terms_by_name_on_one_axis(tmp_path, monkeypatch):
    """A term and a metric of one name (silog) stay apart; the run's name is on top."""
    from matplotlib.figure import Figure

    folder, seen = tmp_path / "my_run", []
    folder.mkdir()
    (folder / "log.csv").write_text("step,epoch,loss,silog,dice,lr\n1,0.1,9.0,8.5,0.5,0.1\n2,0.2,0.5,0.3,0.2,0.05\n")
    names = ["abs_rel", "sq_rel", "rmse", "rmse_log", "silog", "d1", "d2"]
    (folder / "metrics.csv").write_text(",".join(["step", *names]) + "\n2" + ",0.5" * len(names) + "\n")
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **options: seen.append(figure) or save(figure, *args, **options)
    )
    log.curves(folder)
    (figure,) = seen
    panels = [axis for axis in figure.axes if axis.lines]
    assert len(panels) == 6 and figure._suptitle.get_text() == "my_run"
    lines = [[line.get_label() for line in axis.lines] for axis in panels]
    assert lines == [["loss", "silog", "dice"], ["lr"], ["abs_rel"], ["sq_rel"], ["rmse"], ["rmse_log", "silog", "d1", "d2"]]
    assert list(panels[0].lines[1].get_ydata()) == [8.5, 0.3] and list(panels[5].lines[1].get_ydata()) == [0.5]
    assert len({axis.get_xlim() for axis in panels}) == 1 and panels[0].get_yscale() == "log"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_one_step_can_be_seen_and_a_long_name_is_not_cut_off(tmp_path):
    folder = tmp_path / ("a_run_with_a_name_" * 12)
    folder.mkdir()
    (folder / "log.csv").write_text("step,epoch,loss,lr\n10,0.1,2.0,0.0003\n")
    log.curves(folder)
    gray = np.asarray(Image.open(folder / "curves.png").convert("L"))
    for edge in (gray[:2], gray[-2:], gray[:, :2], gray[:, -2:]):
        assert edge.min() == 255
    blue = np.asarray(Image.open(folder / "curves.png").convert("RGB"))
    assert ((blue[..., 2] > 150) & (blue[..., 0] < 60)).sum() > 20  # the points


def test_a_system_that_does_not_say_how_much_memory_is_used_stops_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert log.memory_mb() > 0
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert math.isnan(log.memory_mb())
