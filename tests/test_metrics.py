"""Metrics: against the stored outputs of the published evaluation code, torchmetrics, and numbers counted by hand."""

import math

import golden
import pytest
import torch
import torchmetrics

from train.depth import DepthSpec
from train.metrics import ClassificationMetric, DepthMetric, SegmentationMetric, crop_rows_columns


@pytest.fixture(autouse=True)
def seed():
    """The same draws in every run."""
    torch.manual_seed(0)


def crop_of(kwargs: dict) -> str | None:
    """Our name of the crop a fixture was evaluated with."""
    if "crop" not in kwargs:
        return None
    if kwargs["dataset"].startswith("nyu"):
        return "nyu"
    return kwargs["crop"].split("_")[0].split()[0]


@pytest.mark.parametrize("case", golden.cases("depth_metric", exclude="depth_metric_affine"))
def test_depth_errors_match_the_published_evaluation(case):
    info, tensors = golden.load(case)
    kwargs = info.get("kwargs", {})
    spec = DepthSpec(min_depth=kwargs.get("min_depth_eval", 1e-3), max_depth=kwargs.get("max_depth_eval", 10.0))
    pred, target = (tensors[f"input/{name}"].float() for name in ("pred", "target"))
    pred, target = (values[None] if values.ndim == 2 else values for values in (pred, target))
    for output, average in (("output", "image"), ("output_pooled", "pixel")):
        if output not in tensors:
            continue
        metric = DepthMetric(spec, crop=crop_of(kwargs), average=average)
        for i in range(len(pred)):  # streamed one image at a time
            metric.update(pred[i : i + 1], {"depth": target[i : i + 1]})
        result = metric.compute()
        found = torch.tensor([result[name] for name in info["order"]])
        torch.testing.assert_close(found, tensors[output], **golden.tolerance(info))
    if "stage/per_image" in tensors:
        for i, expected in enumerate(tensors["stage/per_image"]):
            metric = DepthMetric(spec, crop=crop_of(kwargs))
            metric.update(pred[i : i + 1], {"depth": target[i : i + 1]})
            found = torch.tensor([metric.compute()[name] for name in info["order"]])
            torch.testing.assert_close(found, expected, **golden.tolerance(info))


@pytest.mark.parametrize("case", golden.cases("depth_metric_affine"))
def test_affine_alignment_matches_the_published_protocol(case):
    info, tensors = golden.load(case)
    spec = DepthSpec(max_depth=info["kwargs"]["depth_cap"], metric=False, inverse=True)
    metric = DepthMetric(spec, align="affine")
    metric.update(tensors["input/pred"], {"depth": tensors["input/target"] * tensors["input/mask"]})
    result = metric.compute()
    close = golden.tolerance(info)
    torch.testing.assert_close(torch.tensor(100 * (1 - result["d1"])), tensors["output"], **close)
    torch.testing.assert_close(torch.tensor(result["abs_rel"]), tensors["stage/abs_rel"], **close)


@pytest.mark.parametrize("case", golden.cases("seg_metric"))
def test_iou_matches_mmsegmentation(case):
    info, tensors = golden.load(case)
    metric = SegmentationMetric(info["kwargs"]["num_classes"], info["kwargs"]["ignore_index"])
    for pred, label in zip(tensors["input/pred"], tensors["input/label"], strict=True):
        metric.update(pred[None], {"mask": label[None]})
    result, table = metric.compute(), metric.per_class()
    found = 100 * torch.tensor([result["miou"], result["macc"], result["aacc"]], dtype=torch.float64)
    torch.testing.assert_close(found, tensors["output"], **golden.tolerance(info))
    for name in ("iou", "acc", "dice"):
        torch.testing.assert_close(
            table[name], tensors[f"stage/{name}_per_class"], rtol=1e-6, atol=1e-7, equal_nan=True
        )  # theirs is float32
    matrix = metric.sums["matrix"].double()
    torch.testing.assert_close(matrix.diagonal(), tensors["stage/area_intersect"], rtol=0, atol=0)
    torch.testing.assert_close(matrix.sum(0), tensors["stage/area_pred_label"], rtol=0, atol=0)
    torch.testing.assert_close(matrix.sum(1), tensors["stage/area_label"], rtol=0, atol=0)


def test_segmentation_agrees_with_torchmetrics():
    pred, mask = torch.randint(7, (4, 20, 30)), torch.randint(7, (4, 20, 30))
    mask[torch.rand(mask.shape) < 0.1] = 255
    metric = SegmentationMetric(7)
    metric.update(pred, {"mask": mask})
    theirs = torchmetrics.JaccardIndex(task="multiclass", num_classes=7, ignore_index=255)(pred, mask)
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=7, ignore_index=255, average="micro")(pred, mask)
    recall = torchmetrics.Recall(task="multiclass", num_classes=7, ignore_index=255, average="macro")(pred, mask)
    result = metric.compute()
    assert result["miou"] == pytest.approx(float(theirs), rel=1e-5)
    assert result["aacc"] == pytest.approx(float(accuracy), rel=1e-5)
    assert result["macc"] == pytest.approx(float(recall), rel=1e-5)


def test_classification_agrees_with_torchmetrics():
    scores, label = torch.randn(64, 12), torch.randint(12, (64,))
    metric = ClassificationMetric()
    for part in range(0, 64, 10):
        metric.update(scores[part : part + 10], {"label": label[part : part + 10]})
    for k in (1, 5):
        theirs = torchmetrics.Accuracy(task="multiclass", num_classes=12, top_k=k, average="micro")(scores, label)
        assert metric.compute()[f"top{k}"] == pytest.approx(float(theirs))
    ranked = ClassificationMetric()
    ranked.update(scores.topk(5).indices, {"label": label})
    assert ranked.compute() == metric.compute()


def test_depth_agrees_with_torchmetrics_pooled():
    target = torch.rand(2, 1, 8, 9) * 5 + 0.5
    pred = target * (0.8 + 0.4 * torch.rand_like(target))
    metric = DepthMetric(DepthSpec(), average="pixel")
    metric.update(pred, {"depth": target})
    result = metric.compute()
    rmse = torchmetrics.MeanSquaredError(squared=False)(pred.flatten(), target.flatten())
    rmse_log = torchmetrics.MeanSquaredError(squared=False)(pred.flatten().log(), target.flatten().log())
    abs_rel = torchmetrics.MeanAbsolutePercentageError()(pred.flatten(), target.flatten())
    for name, theirs in (("rmse", rmse), ("rmse_log", rmse_log), ("abs_rel", abs_rel)):
        assert result[name] == pytest.approx(float(theirs), rel=1e-4)


def test_sums_of_processes_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(5, 1, 6, 7, generator=generator) * 4 + 0.5
    pred = target * (0.7 + 0.6 * torch.rand(target.shape, generator=generator))
    mask, guess = (torch.randint(4, (5, 6, 7), generator=generator) for _ in range(2))
    label, scores = torch.randint(9, (5,), generator=generator), torch.randn(5, 9, generator=generator)
    cases = [
        (lambda: DepthMetric(DepthSpec(), align="median"), pred, {"depth": target}),
        (lambda: DepthMetric(DepthSpec(), average="pixel"), pred, {"depth": target}),
        (lambda: SegmentationMetric(4), guess, {"mask": mask}),
        (lambda: ClassificationMetric(), scores, {"label": label}),
    ]
    for make, prediction, batch in cases:
        whole, first, second = make(), make(), make()
        whole.update(prediction, batch)
        first.update(prediction[:2], {key: value[:2] for key, value in batch.items()})
        second.update(prediction[2:], {key: value[2:] for key, value in batch.items()})
        assert all(value.dtype in (torch.int64, torch.float64) for value in whole.sums.values())
        first.sums = {name: first.sums[name] + second.sums[name] for name in first.sums}
        assert first.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_memory_does_not_grow_with_the_data():
    metric = SegmentationMetric(3)
    before = [value.shape for value in metric.sums.values()]
    for _ in range(5):
        metric.update(torch.zeros(1, 4, 4, dtype=torch.int64), {"mask": torch.zeros(1, 4, 4, dtype=torch.int64)})
    assert [value.shape for value in metric.sums.values()] == before
    assert int(metric.sums["matrix"].sum()) == 80


def test_void_pixels_do_not_count_even_where_the_prediction_is_odd():
    metric = SegmentationMetric(2)
    mask = torch.tensor([[[0, 1, 255, 255]]])
    metric.update(torch.tensor([[[0, 0, 77, 1]]]), {"mask": mask})
    assert metric.sums["matrix"].tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(("pred", "mask", "words"), [(0, 2, "mask id 2"), (5, 1, "prediction id 5"), (0, -1, "mask id -1")])
def test_ids_outside_the_classes_are_an_error(pred, mask, words):
    with pytest.raises(ValueError, match=words):
        SegmentationMetric(2).update(torch.full((1, 2, 2), pred), {"mask": torch.full((1, 2, 2), mask)})


def test_sizes_that_differ_are_an_error():
    with pytest.raises(ValueError, match="resize"):
        SegmentationMetric(2).update(torch.zeros(1, 2, 2), {"mask": torch.zeros(1, 4, 4)})
    with pytest.raises(ValueError, match="resize"):
        DepthMetric(DepthSpec()).update(torch.ones(1, 1, 2, 2), {"depth": torch.ones(1, 1, 4, 4)})
    with pytest.raises(ValueError, match="B labels"):
        ClassificationMetric().update(torch.ones(3, 4), {"label": torch.zeros(2)})
    with pytest.raises(ValueError, match="ranked"):
        ClassificationMetric().update(torch.zeros(3, 2, dtype=torch.int64), {"label": torch.zeros(3)})


def test_depth_readings_outside_the_range_and_images_without_any_are_left_out():
    target = torch.tensor([[[[0.0, 2.0, 12.0, 4.0]]], [[[0.0, 0.0, 0.0, 50.0]]]])
    pred = torch.tensor([[[[9.0, 2.2, 1.0, 4.0]]], [[[1.0, 1.0, 1.0, 1.0]]]])
    metric = DepthMetric(DepthSpec(max_depth=10.0))
    metric.update(pred, {"depth": target})
    assert metric.compute()["abs_rel"] == pytest.approx(0.05)
    assert (int(metric.sums["count"]), int(metric.sums["skipped"])) == (1, 1)


def test_infinite_and_undefined_predictions_follow_the_published_rule():
    target = torch.full((1, 1, 1, 4), 5.0)
    pred = torch.tensor([[[[math.inf, math.nan, 20.0, -3.0]]]])
    spec = DepthSpec(min_depth=1.0, max_depth=10.0)
    expected = {False: (10, 1, 20, 1), True: (10, 1, 10, 1)}
    for clamp, values in expected.items():
        metric = DepthMetric(spec, clamp=clamp)
        metric.update(pred, {"depth": target})
        assert metric.compute()["abs_rel"] == pytest.approx(sum(abs(v - 5) / 5 for v in values) / 4)


def test_alignment_removes_what_it_names():
    target = torch.rand(2, 1, 6, 7) * 5 + 1
    for spec, align, pred in (
        (DepthSpec(), "median", 3.7 * target),
        (DepthSpec(), "affine", 0.2 * target - 0.1),
        (DepthSpec(metric=False), "affine", 5 * target + 2),
        (DepthSpec(metric=False, inverse=True), "affine", 40 / target + 3),
    ):
        metric = DepthMetric(spec, align=align)
        metric.update(pred, {"depth": target})
        assert metric.compute()["abs_rel"] < 1e-5
        assert f"alignment {align}" in metric.protocol


def test_relative_predictions_need_an_alignment():
    with pytest.raises(ValueError, match="align"):
        DepthMetric(DepthSpec(metric=False))
    with pytest.raises(ValueError, match="affine"):
        DepthMetric(DepthSpec(metric=False, inverse=True), align="median")


def test_crops_are_the_published_ones():
    assert crop_rows_columns("garg", 352, 1216) == (slice(143, 349), slice(43, 1172))
    assert crop_rows_columns("eigen", 352, 1216) == (slice(117, 321), slice(43, 1172))
    assert crop_rows_columns("nyu", 480, 640) == (slice(45, 471), slice(41, 601))
    with pytest.raises(ValueError, match="480x640"):
        crop_rows_columns("nyu", 240, 320)
    with pytest.raises(ValueError, match=r"eigen crop is KITTI's.*480x640 \(NYUv2: nyu\)"):
        crop_rows_columns("eigen", 480, 640)
    with pytest.raises(ValueError, match="one of nyu, eigen, garg or none, got 'center'"):
        DepthMetric(DepthSpec(), crop="center")


def test_nothing_outside_the_crop_counts():
    target = torch.full((1, 1, 480, 640), 2.0)
    pred = torch.full((1, 1, 480, 640), 9.0)
    pred[:, :, 45:471, 41:601] = 2.0
    metric = DepthMetric(DepthSpec(), crop="nyu")
    metric.update(pred, {"depth": target})
    assert metric.compute()["rmse"] == 0


@pytest.mark.parametrize("metric", [ClassificationMetric(), SegmentationMetric(3), DepthMetric(DepthSpec())])
def test_nothing_counted_gives_nan_not_zero(metric):
    assert all(math.isnan(value) for value in metric.compute().values())


def test_spec_turns_metres_into_what_the_model_predicts_and_back():
    depth = torch.tensor([0.0, 0.5, 4.0, 20.0, math.nan])
    plain, inverse = DepthSpec(max_depth=10.0), DepthSpec(max_depth=10.0, inverse=True)
    assert plain.target(depth).tolist() == [0, 0.5, 4, 0, 0]
    assert inverse.target(depth).tolist() == [0, 2, 0.25, 0, 0]
    assert inverse.prediction(torch.tensor([2.0, 0.25, 0.0])).tolist() == [0.5, 4, 10]
    relative = DepthSpec(metric=False, inverse=True)
    assert torch.equal(relative.prediction(depth[:3]), depth[:3])
    for wrong in ({"unit": "mm"}, {"divisor": 0}, {"min_depth": 3, "max_depth": 2}):
        with pytest.raises(ValueError, match="got"):
            DepthSpec(**wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_predictions_on_a_gpu_are_counted_wherever_the_sums_live(where):
    depth = torch.rand(2, 1, 6, 7) * 4 + 0.5
    pred = depth * (0.7 + 0.6 * torch.rand(depth.shape))
    mask, guess, scores = torch.randint(4, (2, 6, 7)), torch.randint(4, (2, 6, 7)), torch.randn(2, 9)
    cases = [
        (lambda: DepthMetric(DepthSpec(), align="median"), pred, {"depth": depth}),
        (lambda: DepthMetric(DepthSpec(), align="affine", average="pixel"), pred, {"depth": depth}),
        (lambda: SegmentationMetric(4), guess, {"mask": mask}),
        (lambda: ClassificationMetric(), scores, {"label": torch.tensor([3, 1])}),
    ]
    for make, prediction, targets in cases:
        plain, other = make(), make().to(where)
        plain.update(prediction, targets)
        other.update(prediction.cuda(), {key: value.cuda() for key, value in targets.items()})
        assert all(value.device.type == where for value in other.sums.values())
        assert other.compute() == pytest.approx(plain.compute(), rel=1e-6)


def test_both_silogs_are_given_and_named():
    """Log differences log 2 and 0: mean square a^2 / 2, square of the mean a^2 / 4."""
    a = math.log(2.0)
    for average in ("image", "pixel"):
        metric = DepthMetric(DepthSpec(), average=average)
        metric.update(torch.tensor([[[[4.0, 2.0]]]]), {"depth": torch.full((1, 1, 1, 2), 2.0)})
        found = metric.compute()
        assert found["silog"] == pytest.approx(math.sqrt(a * a / 2 - a * a / 8))
        assert found["silog_1"] == pytest.approx(math.sqrt(a * a / 2 - a * a / 4))
    assert "silog with lambda 0.5, silog_1 with lambda 1" in metric.protocol


def test_the_protocol_of_kitti_says_of_which_frame_its_crops_are(tmp_path):
    from train import config, evaluation

    values = {
        "task": {"name": "depth", "max_depth": 80.0, "crop": "garg"},
        "model": {"backbone": "test_resnet", "head": "linear"},
        "data": {"name": "kitti", "root": str(tmp_path), "size": [32, 64]},
        "optim": {"steps": 1},
    }
    for args, words in (({}, "frames: benchmark crop 352x1216"), ({"benchmark_crop": False}, "frames: full")):
        values["data"]["args"] = args
        resolved = config.resolve(values)
        assert words in evaluation.protocol(config.build_task(resolved), resolved)
