"""One whole run after another, as small as they come."""

import json
import math
import os
import resource
import signal
import threading

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from train import checkpoint, checks, config, engine, evaluation, failures, log, results, setup
from train import folder as run_folder
from train.tasks.segmentation import Segmentation


def losses(folder):
    return log.read(folder / "log.csv")["loss"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, engine.fit(tiny.make(folder))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than these runs; `finished`, made before this, draws."""
    monkeypatch.setattr(results, "curves", lambda folder: None)
    monkeypatch.setattr(results, "pictures", lambda *args: None)


def test_a_run_leaves_what_it_promises(finished):
    folder, summary = finished
    for name in run_folder.RUN_FILES:
        assert (folder / name).exists(), name
    assert summary["step"] == 6 and summary["stopped"] is False and set(summary["last"]) == {"miou", "macc", "aacc"}
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert log.read(folder / "log.csv")["step"] == [1, 2, 3, 4, 5, 6] and log.read(folder / "metrics.csv")["step"] == [3, 6]
    assert list((folder / "tensorboard").iterdir())
    for picture in ("curves.png", "predictions.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_the_best_weights_score_what_the_summary_says(finished):
    folder, summary = finished
    metrics = evaluation.evaluate_run(folder)
    assert {key: metrics[key] for key in summary["best"]} == summary["best"]
    assert metrics["samples"] == 7 and "label 255 ignored" in metrics["protocol"]


def test_an_existing_run_is_never_replaced_silently(finished, tmp_path):
    folder, _ = finished
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(
        FileExistsError, match=r"choose another --run.dir, go on with --resume, or replace it with --run.overwrite"
    ):
        engine.fit(tiny.make(folder))
    assert (folder / "model.safetensors").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no run"):
        engine.fit(tiny.make(tmp_path, run={"overwrite": True}))
    assert (tmp_path / "thesis.txt").exists()


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    for broken in ({"data": {"args": {"count": 0}}}, {"model": {"backbone_args": {"embed_dimm": 8}}}):
        with pytest.raises((TypeError, ValueError)):
            engine.fit(tiny.make(tmp_path / "run", **broken))
        assert not (tmp_path / "run").exists()


def test_a_warm_up_longer_than_the_run_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="the warm-up takes 9 of 2 steps"):
        engine.fit(tiny.make(tmp_path / "run", optim={"steps": 2, "warmup_steps": 9}))
    assert not (tmp_path / "run").exists()


def test_overwrite_starts_anew(tmp_path):
    short = {"steps": 1, "warmup_steps": 0}
    engine.fit(tiny.make(tmp_path / "run", optim=short))
    engine.fit(tiny.make(tmp_path / "run", optim=short, run={"overwrite": True, "seed": 1}))
    assert log.read(tmp_path / "run" / "log.csv")["step"] == [1]
    assert config.load_run(tmp_path / "run").run.seed == 1


def test_a_changed_configuration_is_shown_and_refused(finished):
    folder, _ = finished
    changed = tiny.make(folder, optim={"lr": 0.5}, data={"eval_batch": 2})
    with pytest.raises(ValueError, match=r"(?s)data.eval_batch: 3 -> 2.*optim.lr: 0.001 -> 0.5.*--accept-changes"):
        engine.fit(changed, resume=True)
    assert config.load_run(folder).optim.lr == 0.001


def test_micro_batches_repeat_the_whole_batch(tmp_path, finished):
    folder, _ = finished
    norm_free = {
        "backbone": "nat_mini",
        "head": "dpt",
        "head_args": {"width": 8},
        "backbone_args": tiny.VALUES["model"]["backbone_args"],
    }
    engine.fit(tiny.make(tmp_path / "whole", model=norm_free))
    engine.fit(tiny.make(tmp_path / "cut", model=norm_free, optim={"micro_batch": 3}))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    whole, cut = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "cut"))
    assert all(torch.allclose(whole[name], cut[name], atol=1e-4) for name in whole)


def test_workers_do_not_change_the_run(tmp_path, finished):
    folder, _ = finished
    engine.fit(tiny.make(tmp_path / "run", data={"workers": 2}))
    assert losses(tmp_path / "run") == losses(folder)


def test_the_seed_changes_the_run(tmp_path, finished):
    folder, _ = finished
    engine.fit(tiny.make(tmp_path / "run", run={"seed": 1}, optim={"steps": 1, "warmup_steps": 0}))
    assert losses(tmp_path / "run")[0] != losses(folder)[0]


def test_a_stop_signal_saves_and_the_rest_follows_bit_for_bit(tmp_path, finished, capsys):
    folder, _ = finished
    configuration = tiny.make(tmp_path / "run", run={"save_every": 6})
    asked, forward = [], Segmentation.forward

    def stopping(self, model, batch):
        if not asked and len(losses(tmp_path / "run") if (tmp_path / "run" / "log.csv").exists() else []) == 3:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on what the process group had already
        return forward(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmentation, "forward", stopping)
        summary = engine.fit(configuration)
    assert summary["stopped"] and summary["step"] == 4
    assert "stopped by a signal after step 4" in capsys.readouterr().out
    assert [path.name for path in checkpoint.steps(tmp_path / "run" / "checkpoints")] == ["step_00000004"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    engine.fit(configuration, resume=True)
    assert losses(tmp_path / "run") == losses(folder)
    assert (tmp_path / "run" / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()
    ours, theirs = (load_file(path / "last.safetensors") for path in (tmp_path / "run", folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, finished, capsys):
    folder, _ = finished
    configuration = tiny.make(tmp_path / "run")
    engine.fit(configuration)
    last = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    (last / "state.pt").write_bytes(b"half a file")
    capsys.readouterr()
    engine.fit(configuration, resume=True)
    said = capsys.readouterr().out
    assert "step_00000006 is damaged" in said and "going on from step 4" in said
    again = engine.fit(configuration, resume=True)  # nothing is left to do, and nothing is lost
    assert again["last"] == finished[1]["last"] and again["best"] == finished[1]["best"]
    ours, theirs = (load_file(path / "last.safetensors") for path in (tmp_path / "run", folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on(tmp_path, finished, monkeypatch):
    folder, save, saved = finished[0], checkpoint.save, []
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args):
        saved.append(args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if len(saved) == 2 else hard, hard))  # as a full disk: files stop
        return save(*args)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", full)
            with pytest.raises(checks.RunError, match=r"no space left on the disk .*go on with --resume"):
                engine.fit(tiny.make(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"], "nothing half written"
    engine.fit(tiny.make(tmp_path / "run"), resume=True)
    assert losses(tmp_path / "run") == losses(folder)


def test_a_loss_that_is_no_number_stops_with_step_and_files(tmp_path):
    loss, calls = Segmentation.losses, []

    def broken(self, outputs, batch):
        calls.append(1)
        factor = math.nan if len(calls) == 5 else 1
        return {name: value * factor for name, value in loss(self, outputs, batch).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmentation, "losses", broken)
        with pytest.raises(
            log.NonFiniteLoss,
            match=r"step 5: the loss is nan \(cross_entropy\).*gradient norm nan.*learning rate.*scene-train",
        ):
            engine.fit(tiny.make(tmp_path / "run"))
    weights, state = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert state["progress"]["step"] == 4 and all(value.isfinite().all() for value in weights["model"].values())


def test_bf16_runs_the_model_in_bf16_and_keeps_float_weights(tmp_path):
    seen, forward = [], Segmentation.forward

    def watching(self, model, batch):
        convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        handle = convolution.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        value = forward(self, model, batch)
        handle.remove()
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmentation, "forward", watching)
        engine.fit(tiny.make(tmp_path / "run", run={"precision": "bf16"}, optim={"steps": 1, "warmup_steps": 0}))
    assert seen and set(seen) == {torch.bfloat16}
    assert {
        value.dtype for value in load_file(tmp_path / "run" / "model.safetensors").values() if value.is_floating_point()
    } == {torch.float32}


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        engine.fit(tiny.make(tmp_path / "run", run={"precision": "fp16"}))


@pytest.mark.parametrize(
    "task",
    [
        {"name": "depth", "max_depth": 10.0, "min_depth": 0.5},
        {"name": "multitask", "parts": {"segmentation": {"num_classes": 6}, "depth": {"max_depth": 10.0, "min_depth": 0.5}}},
    ],
    ids=["depth", "multitask"],
)
def test_other_tasks_run_through_the_same_loop(tmp_path, task):
    values = tiny.task(**task)
    values["optim"] = {**values["optim"], "steps": 2, "warmup_steps": 0}
    values["infer"] = {"flip": True}
    resolved = config.resolve(values)
    resolved.run.dir = str(tmp_path / "run")
    summary = engine.fit(resolved)
    assert math.isfinite(summary["last"][config.build_task(resolved).best[0]])
    assert "flip" in evaluation.evaluate_run(tmp_path / "run")["protocol"]


def test_options_reach_the_model(tmp_path):
    resolved = tiny.make(tmp_path, run={"channels_last": True, "grad_checkpointing": True}, model={"freeze_backbone": True})
    net = setup.build(resolved, config.build_task(resolved))
    convolution = next(p for p in net.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert all(stage.grad_checkpointing for stage in net.backbone.model.stages)
    engine.train_mode(net)
    assert net.head.training and not any(
        module.training for module in net.backbone.model.stages.modules() if list(module.parameters())
    )


def test_compile_and_drop_path_are_passed_on(tmp_path):
    compiled = []
    changes = {"run": {"compile": True}, "optim": {"steps": 1, "warmup_steps": 0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
        engine.fit(tiny.make(tmp_path / "run", **changes))
    assert compiled == ["DensePredictor"]
    model = {**tiny.VALUES["model"], "backbone_args": {**tiny.VALUES["model"]["backbone_args"], "drop_path_rate": 0.5}}
    net = setup.build(tiny.make(tmp_path, model=model), Segmentation(6))
    assert max(getattr(module, "drop_prob", 0.0) or 0.0 for module in net.modules()) == pytest.approx(0.5)


def test_trackers_of_accelerate_get_the_same_numbers(tmp_path):
    engine.fit(tiny.make(tmp_path / "run", run={"trackers": ["tensorboard"]}, optim={"steps": 1, "warmup_steps": 0}))
    assert list((tmp_path / "run" / "backbone-zoo").glob("events.*"))
    with pytest.raises(ValueError, match="run.trackers: 'wandbb' is not installed, or unknown to Accelerate"):
        engine.fit(tiny.make(tmp_path / "other", run={"trackers": ["wandbb"]}))


def test_weights_of_another_run_are_loaded(finished, tmp_path):
    folder, _ = finished
    resolved = tiny.make(tmp_path, model={"checkpoint": str(folder)})
    said = []
    net = setup.build(resolved, config.build_task(resolved), said.append)
    theirs = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, theirs[name]) for name, value in net.state_dict().items()) and said
    with pytest.raises(FileNotFoundError, match="nowhere"):
        setup.build(tiny.make(tmp_path, model={"checkpoint": "nowhere.pth"}), Segmentation(6))


def test_machines_that_run_out_say_what_to_change(tmp_path):
    resolved = tiny.make(tmp_path)
    for error, message in (
        (torch.OutOfMemoryError("CUDA out of memory"), "lower optim.micro_batch"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
            "lower optim.micro_batch",
        ),
        (OSError(28, "No space left on device"), "no space left on the disk"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [::1]:1: Connection reset by peer"), "another process"),
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 2557 vs 2440"), "no space left on the disk"),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly"), "lower data.workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "lower data.workers"),
    ):
        with pytest.raises(checks.RunError, match=message), failures.readable(resolved, tmp_path):
            raise error
    with pytest.raises(OSError, match="other"), failures.readable(resolved, tmp_path):
        raise OSError(5, "other")


def test_signals_outside_the_main_thread_are_left_alone():
    caught = []

    def work():
        with failures.stop_signal() as stop:
            caught.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert caught == [False]


def test_a_run_opens_only_as_the_model_it_trained(finished):
    folder, _ = finished
    with pytest.raises(ValueError, match=r"model.safetensors lacks \d+ tensors of this model, e.g. head"):
        evaluation.open_run(folder, ["--model.head=fcn"])
