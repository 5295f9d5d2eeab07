"""Depth from video: the task, its model and its protocol; the losses themselves are in test_view_synthesis.py."""

import shutil

import golden
import processes
import pytest
import tiny
import torch
from safetensors.torch import load_file

from heads.video import blended
from train import checkpoint, config, engine, evaluation, log, results, setup
from train.data.sequences import SceneSequences
from train.depth import DepthSpec
from train.geometry import disparity_to_depth
from train.loader import collate
from train.metrics import DepthMetric
from train.tasks.base import stacked
from train.tasks.selfsup_depth import SelfSupDepth

POSE = {"pose_backbone": "nat_mini", "pose_args": {"width": 8, "backbone_args": tiny.VALUES["model"]["backbone_args"]}}
CHANGES = {
    "task": {"name": "selfsup_depth", **POSE},
    "model": {**tiny.VALUES["model"], "head": "monodepth2", "head_args": {"widths": [4, 4, 8, 8], "scales": 2}},
    "data": {"name": "scene_sequences", "args": {"count": 3, "val_count": 2, "size": [32, 48]}},
}


@pytest.fixture(scope="module")
def made():
    """(task, model, batch) of the tiny configuration, in training."""
    loaded = config.resolve(tiny.values(**CHANGES | {"task": {**CHANGES["task"], "auto_mask": False}}))
    task = config.build_task(loaded)
    data = setup.training_set(loaded, task)
    torch.manual_seed(0)
    net = setup.build(loaded, task, say=lambda text: None).train()
    for parameter in net.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return task, net, collate([data[i, i] for i in range(5)])


def gradients(task, net, batches, total):
    """Sum of the losses and the gradient, of micro-batches weighed by their counts."""
    net.zero_grad()
    loss = 0.0
    for batch in batches:
        counts = task.counts(batch)
        terms = task.losses(task.forward(net, batch), batch)
        part = (stacked(terms, counts) * stacked(counts, counts) / total).sum()
        part.backward()
        loss += part.item()
    return loss, torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(made):
    task, net, batch = made
    cuts = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 5))]
    whole, expected = gradients(task, net, [batch], 5)
    loss, got = gradients(task, net, cuts, 5)
    assert loss == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-3)
    assert not [name for name, parameter in net.named_parameters() if parameter.grad is None], "the pose network learns too"


def test_outputs_are_disparities_at_halved_sizes_and_one_motion_a_frame(made):
    task, net, batch = made
    outputs = task.forward(net, batch)
    assert len(outputs["motions"]) == 2 and outputs["motions"][0][0].shape == (5, 3)
    assert len(outputs["disparities"]) == 2
    net.eval()
    with torch.no_grad():
        disparity = task.forward(net, {"image": batch["image"]})
        assert disparity.shape == (5, 1, 32, 48)
        depth = task.predict(disparity, (64, 90))
        assert depth.shape == (5, 1, 64, 90) and float(depth.min()) >= 0.1 and float(depth.max()) <= 100
        task.post_process = True
        torch.testing.assert_close(
            task.forward(net, {"image": batch["image"]}), blended(disparity, net(batch["image"].flip(-1)).flip(-1))
        )
        task.post_process = False
    net.train()


class Oracle(torch.nn.Module):
    """Gives the disparities of known depth, and no motions."""

    def __init__(self, depth: torch.Tensor, low: float, high: float):
        super().__init__()
        self.disparity = (1 / depth - 1 / high) / (1 / low - 1 / high)

    def forward(self, images, pairs):
        return {"disparities": [self.disparity], "motions": []}


@pytest.mark.parametrize("options", [{}, {"average": True}, {"ssim": False}, {"auto_mask": False}], ids=str)
def test_true_depth_costs_less_than_any_other(options):
    task = SelfSupDepth(min_depth=0.5, max_depth=20.0, poses="given", align=None, **options)
    data = SceneSequences("train", task.targets("train"), count=2, size=(48, 64), speed=0.3)
    task.check(data)
    samples = [data[i] for i in range(len(data))]
    batch = collate([{**s, "views": torch.cat([s["image"][None], s["frames"]])} for s in samples])
    depth = torch.stack([torch.from_numpy(data.true_depth(i))[None] for i in range(len(data))])

    def cost(metres):
        torch.manual_seed(0)
        return float(task.losses(task.forward(Oracle(metres, 0.5, 20.0), batch), batch)["photometric"])

    middle = depth.flatten(1).median(1).values[:, None, None, None].expand_as(depth)
    true = cost(depth)
    assert true < min(cost(depth * 1.3), cost(depth / 1.3), cost(middle))


@pytest.mark.parametrize("case", golden.cases("monodepth_metric"))
def test_metric_and_post_processing_match_the_authors(case):
    info, tensors = golden.load(case)
    close = golden.tolerance(info)
    plain = tensors["input/disp"][:, None]
    flipped = tensors["input/disp_flipped"][:, None].flip(-1)
    processed = blended(plain, flipped)
    torch.testing.assert_close(processed[:, 0], tensors["output/post_processed_disp"], **close)
    spec = DepthSpec(min_depth=info["kwargs"]["min_depth"], max_depth=info["kwargs"]["max_depth"])
    names = ("abs_rel", "sq_rel", "rmse", "rmse_log", "d1", "d2", "d3")
    depth = tensors["input/depth"][:, None]
    size = depth.shape[-2:]
    resized = torch.nn.functional.interpolate(plain, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized[0, 0], tensors["stage/resized_disp_0"], **close)
    for key, disparity in (("errors", plain), ("errors/post_processed", processed)):
        full = 1 / torch.nn.functional.interpolate(disparity, size=size, mode="bilinear", align_corners=False)
        for end, align, factor in (("", "median", 1.0), ("/scale_5.4", None, 5.4)):
            for i, expected in enumerate(tensors[f"output/{key}{end}"]):
                metric = DepthMetric(spec, crop="garg", align=align, clamp=True)
                metric.update(factor * full[i : i + 1], {"depth": depth[i : i + 1]})
                got = metric.compute()
                torch.testing.assert_close(torch.tensor([got[name] for name in names]), expected, **close)


def test_the_scaled_disparity_is_what_the_task_inverts():
    """The fixture's maps are scaled disparities; the task's are sigmoids: depth is one over the scaled one."""
    sigmoid = torch.rand(1, 1, 4, 5)
    scaled = 1 / 100 + (1 / 0.1 - 1 / 100) * sigmoid
    torch.testing.assert_close(disparity_to_depth(sigmoid), 1 / scaled)
    task = SelfSupDepth()
    assert "alignment median" in task.metric().protocol and "predictions clamped" in task.metric().protocol
    assert "blended with the mirrored image" in SelfSupDepth(post_process=True).metric().protocol


def test_two_processes_give_the_losses_of_one_and_a_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "pictures", lambda *args: None)
    monkeypatch.setattr(results, "curves", lambda *args: None)
    changes = {**CHANGES, "run": {"eval_every": 6, "save_every": 3}}
    metrics = engine.fit(tiny.make(tmp_path / "one", **changes))["last"]
    assert metrics["abs_rel"] > 0
    protocol = evaluation.evaluate_run(tmp_path / "one")["protocol"]
    assert "alignment median" in protocol and "images resized to 32x48" in protocol
    one = log.read(tmp_path / "one" / "log.csv")
    assert one["loss"] == pytest.approx([a + b for a, b in zip(one["photometric"], one["smoothness"], strict=True)])

    shutil.copytree(tmp_path / "one", tmp_path / "again")
    shutil.rmtree(checkpoint.steps(tmp_path / "again" / "checkpoints")[-1])
    engine.fit(tiny.make(tmp_path / "again", **changes), resume=True)
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "again"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())

    processes.fit(2, tmp_path / "two", changes)
    two = log.read(tmp_path / "two" / "log.csv")
    assert two["step"] == one["step"] == list(range(1, 7))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5), "the tie-breaking noise is that of the sample's place"


MISTAKES = [
    ({"head": "dpt", "head_args": {"width": 8}}, {}, "needs a head with disparities .*got DPT"),
    ({"aux_head": "fcn"}, {}, "coarser disparities are this task's auxiliary outputs"),
]


@pytest.mark.parametrize(("model", "task", "words"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_model_that_cannot_learn_so_is_refused(model, task, words):
    merged = tiny.values(**CHANGES | {"task": {**CHANGES["task"], **task}, "model": {**CHANGES["model"], **model}})
    loaded = config.resolve(merged)
    with pytest.raises(ValueError, match=words):
        config.build_task(loaded).build(loaded.model)


def test_data_without_frames_or_motions_are_refused():
    scenes = SceneSequences("train", ("frames", "intrinsics", "pose"), count=1, size=(16, 16))
    scenes.known_poses = False
    with pytest.raises(ValueError, match="task.poses is given, and SceneSequences knows no motions"):
        SelfSupDepth(poses="given").check(scenes)
    scenes.offsets = ("s",)
    with pytest.raises(ValueError, match="no other frame than the stereo partner"):
        SelfSupDepth().check(scenes)
    scenes.provides = ("depth",)
    with pytest.raises(ValueError, match="SceneSequences has no frames, which depth from video needs"):
        SelfSupDepth().check(scenes)
    with pytest.raises(ValueError, match="0 < min_depth < max_depth"):
        SelfSupDepth(min_depth=3.0, max_depth=2.0)


def test_the_conventions_differ_by_up_to_half_a_pixel():
    assert SelfSupDepth(convention="lite_mono").synthesis.align_corners
    assert not SelfSupDepth(convention="monodepth2").synthesis.align_corners
