"""Surface normals: losses and angles by hand, a run with PolyMaX, depth by the same head, what is refused."""

import math

import pytest
import tiny
import torch

from heads import DensePredictor
from heads.matrix import NARROW
from heads.polymax import PolyMax, mixed
from train import engine, evaluation, log, results
from train.inference import Predictor
from train.normals import NORMAL_LOSSES, NormalMetric
from train.show.normals import color_normals
from train.tasks import TASKS

LAYERS = {**NARROW["polymax"], "layers": [1, 1, 0]}


def turned(*degrees):
    """Normals 1 3 1 n, each turned from (0, 0, -1) about the vertical axis."""
    angles = torch.tensor([math.radians(d) for d in degrees])
    return torch.stack([angles.sin(), torch.zeros_like(angles), -angles.cos()])[None, :, None]


def test_angles_by_hand():
    metric = NormalMetric()
    truth = turned(0, 0, 0, 0, 0)
    truth[..., 4] = 0  # no normal
    metric.update(3 * turned(5, 12, 25, 90, 180), {"normal": truth})
    found = metric.compute()
    assert found["mean_angle"] == pytest.approx(33) and found["median_angle"] == pytest.approx(12, abs=0.02)
    assert [found[name] for name in ("within_11", "within_22", "within_30")] == [0.25, 0.5, 0.75]
    assert all(math.isnan(value) for value in NormalMetric().compute().values())
    with pytest.raises(ValueError, match="differ in size"):
        metric.update(turned(1), {"normal": turned(1, 2)})


def test_parts_add_up_to_the_whole():
    torch.manual_seed(0)
    prediction, truth = torch.randn(4, 3, 5, 6), torch.nn.functional.normalize(torch.randn(4, 3, 5, 6), dim=1)
    whole, parts = NormalMetric(), NormalMetric()
    whole.update(prediction, {"normal": truth})
    for i in range(4):
        parts.update(prediction[i : i + 1], {"normal": truth[i : i + 1]})
    assert whole.compute() == pytest.approx(parts.compute())


@pytest.mark.parametrize("name, expected", [("l2", 2 - 2 * math.cos(math.radians(60))), ("angular", math.radians(60))])
def test_losses_by_hand(name, expected):
    prediction, truth = (2 * turned(60, 0)).requires_grad_(), turned(0, 0)
    truth[..., 1] = 0
    loss = NORMAL_LOSSES[name](prediction, truth)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5) and prediction.grad[..., 1].abs().sum() == 0
    assert NORMAL_LOSSES[name](prediction, torch.zeros_like(truth)).item() == 0
    exact = turned(0, 0).requires_grad_()
    NORMAL_LOSSES[name](exact, turned(0, 0)).backward()
    assert exact.grad.isfinite().all()


def test_colours_of_normals():
    colours = color_normals(torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[0.0, -1.0, 0.0, 0.0]], [[0.0, 0.0, -1.0, 0.0]]]))
    assert colours[0, :3].tolist() == [[255, 128, 128], [128, 255, 128], [128, 128, 255]]
    assert colours[0, 3].tolist() == [40, 40, 40]


def test_a_cluster_gives_its_value_to_its_pixels():
    masks = torch.full((1, 2, 1, 3), -30.0)
    masks[0, 0, 0, :2] = masks[0, 1, 0, 2] = 30.0
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert mixed({"mask_logits": masks, "class_logits": values})[0, :, 0].T.tolist() == [[1, 2], [1, 2], [3, 4]]


@pytest.mark.parametrize(
    "task, best",
    [
        ({"name": "normals", "losses": {"l2": {}, "angular": {"factor": 0.5}}}, "mean_angle"),
        ({"name": "depth", "min_depth": 0.5, "max_depth": 10.0, "rule": "softplus"}, "abs_rel"),
        ({"name": "segmentation", "num_classes": 6}, "miou"),
    ],
)
def test_one_head_learns_normals_depth_and_classes(task, best, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "curves", lambda folder: None)
    values = tiny.values(
        model={"head": "polymax", "head_args": LAYERS}, optim={"steps": 2, "warmup_steps": 0, "ema_decay": None}
    )
    values["task"] = task
    resolved = engine.configuration.resolve(values)
    resolved.run.dir = str(tmp_path / "run")
    summary = engine.fit(resolved)
    columns = log.read(tmp_path / "run" / "log.csv")
    terms = [name for name in columns if name.removeprefix("layer_") in ("l2", "angular", "silog", "cross_entropy")]
    assert any(name.startswith("layer_") for name in terms) and best in summary["best"]
    for i, loss in enumerate(columns["loss"]):
        assert sum(columns[name][i] for name in terms) == pytest.approx(loss, rel=1e-5)
    assert (tmp_path / "run" / "predictions.png").is_file()


def test_predictions_are_unit_normals_and_files(tmp_path):
    task = TASKS["normals"]()
    prediction = task.predict(torch.randn(1, 3, 4, 6), (8, 9))
    torch.testing.assert_close(prediction.norm(dim=1), torch.ones(1, 8, 9))
    files = task.show.write(tmp_path / "a", torch.zeros(8, 9, 3, dtype=torch.uint8).numpy(), prediction, None)
    assert files == task.show.outputs(tmp_path / "a") and all(file.is_file() for file in files)


def test_layers_are_at_the_images_size():
    model = DensePredictor("resnet18", PolyMax, 3, LAYERS).train()
    found = model.outputs(torch.randn(2, 3, 40, 50))
    assert [tuple(x.shape) for x in (found["main"], *found["layers"])] == [(2, 3, 40, 50)] * 3
    assert tuple(model.eval()(torch.randn(1, 3, 40, 50)).shape) == (1, 3, 40, 50)


def test_a_flip_mirrors_the_first_component():
    left, right = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 4.0])

    def model(images):  # the same two vectors at the left and the right of every image, mirrored or not
        found = torch.stack([left, right], 1)[None, :, None].expand(len(images), -1, images.shape[2], -1)
        return found.repeat_interleave(images.shape[3] // 2, 3)

    plain = Predictor(model, average="vectors")(torch.zeros(1, 3, 2, 4))
    assert plain[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0]) and plain[0, :, 0, 3].tolist() == pytest.approx([0, 0.6, 0.8])
    both = Predictor(model, average="vectors", flip=True)(torch.zeros(1, 3, 2, 4))[0, :, 0]
    middle = [value / math.sqrt(2) for value in (1, 0.6, 0.8)]  # of (1, 0, 0) and the mirrored (0, 0.6, 0.8), as unit vectors
    assert both[:, 0].tolist() == pytest.approx(middle)
    assert both[:, 3].tolist() == pytest.approx([-middle[0], *middle[1:]])


def test_windows_and_scales_average_unit_vectors():
    images = torch.zeros(1, 3, 4, 6)
    images[:, :, :, 3:] = 1

    def model(images):  # a window that sees the right part is sure (a long vector) of another direction
        sure = images.amax((1, 2, 3), keepdim=True)
        return torch.cat([1 + 9 * sure, 0 * sure, 2 - 2 * sure], 1).expand(-1, -1, *images.shape[2:])

    found = Predictor(model, "slide", window=(4, 3), stride=(4, 2), average="vectors")(images)[0, :, 0]
    first, second = torch.tensor([1, 0, 2]) / math.sqrt(5), torch.tensor([1.0, 0, 0])
    middle = torch.nn.functional.normalize(first + second, dim=0)
    torch.testing.assert_close(found, torch.stack([first, first, middle, second, second, second], 1))
    scaled = Predictor(lambda x: torch.full_like(x, x.shape[-1]), scales=(0.5, 1.0), average="vectors")(images)
    torch.testing.assert_close(scaled, torch.full_like(scaled, 1 / math.sqrt(3)))


def test_a_run_is_evaluated_in_windows_scales_and_flips():
    infer = {"mode": "slide", "window": [24, 32], "scales": [1.0, 1.5], "flip": True}
    config = engine.configuration.resolve({**tiny.values(infer=infer), "task": {"name": "normals"}})
    task = engine.configuration.build_task(config)
    through = evaluation.inference(task, task.build(config.model).eval(), config)
    prediction = task.predict(task.forward(through, {"image": torch.randn(1, 3, 48, 64)}), (50, 60))
    torch.testing.assert_close(prediction.norm(dim=1), torch.ones(1, 50, 60))
    assert "windows 24x32" in evaluation.protocol(task, config) and "flip" in evaluation.protocol(task, config)


def test_what_does_not_fit_is_refused():
    from train.data import DATASETS

    with pytest.raises(ValueError, match="Digits has no surface normals"):
        TASKS["normals"]().check(DATASETS["digits"]("train", ("label",)))
    plain = engine.configuration.resolve(
        {**tiny.values(model={"aux_head": "polymax", "aux_args": LAYERS}), "task": {"name": "normals"}}
    )
    with pytest.raises(ValueError, match="PolyMax returns named outputs"):
        engine.configuration.build_task(plain).build(plain.model)
