"""Metrics, protocol and pictures of a model, and a finished run opened again."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from backbones.ops import neighborhood
from train import config as configuration
from train import loader
from train.damaged import Damaged
from train.data import DATASETS, ImageDataset
from train.inference import Predictor
from train.sample import is_dense
from train.schema import Config, InferConfig
from train.setup import build, load_weights, start, validation_set
from train.show import Names, save_sheet, to_rgb
from train.tasks import Task
from train.transforms import describe_evaluation
from weights.read import safetensors_header


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, data: ImageDataset, accelerator: Accelerator, config: Config, damaged: Damaged | None = None
) -> dict[str, float]:
    """The task's metrics over a dataset, each sample counted once whatever the number of processes.

    Args:
        task: whose metric it is.
        model: left in evaluation mode.
        data: the validation split.
        accelerator: of this process.
        config: of the run.
        damaged: is told which files were left out.
    """
    model.eval()
    metric = task.metric()
    if accelerator.device.type == "cuda":
        metric.to(accelerator.device)
    run = inference(task, model, config)
    batches = loader.evaluation_batches(
        data,
        config.data.eval_batch,
        accelerator.num_processes,
        accelerator.process_index,
        config.data.workers,
        accelerator.device.type == "cuda",
    )
    for counts, batch in batches:
        if damaged is not None:
            damaged.note("val", [batch])
        batch = loader.on_device(batch, accelerator.device, config.run.channels_last)
        with accelerator.autocast():
            output = task.forward(run, batch)
        if counts:
            task.measure(metric, output, batch)
    metric.apply(lambda total: accelerator.reduce(total, "sum"))
    return metric.compute()


def inference(task: Task, model: nn.Module, config: Config) -> Any:
    """What maps images to model outputs at evaluation: the model, or windows, scales and flips of it averaged."""
    if config.infer == InferConfig():
        return model
    return Predictor(model, average=task.average or "values", **dataclasses.asdict(config.infer))


def protocol(task: Task, config: Config) -> str:
    """How a metric was made, in words: targets and alignment; for dense tasks also sizes, windows, scales and flips."""
    parts = [task.metric().protocol]
    if is_dense(task.targets("val")):
        run = Predictor(nn.Identity(), average=task.average or "values", **dataclasses.asdict(config.infer))
        frame = DATASETS[config.data.name].frame(config.data.args)
        parts += [frame] if frame else []
        parts += [describe_evaluation(config.data.size, config.data.eval_resize), run.protocol]
    return "; ".join(parts)


def open_run(
    folder: str | Path, overrides: Sequence[str] = (), weights: str = "model.safetensors"
) -> tuple[Config, Task, nn.Module, Names]:
    """(config, task, model with its weights, class names) of a finished run.

    The model is built bare and filled with the run's own file last: whatever the config starts from (released weights,
    model.checkpoint) is in that file already. Raises FileNotFoundError if the folder is no run, or has no such weights yet,
    ValueError if the overrides ask for a model that these weights do not fill.
    """
    folder, config = Path(folder), configuration.load_run(folder, overrides)
    path = folder / weights
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {weights}: the run has not been evaluated yet")
    config.model.pretrained, config.model.checkpoint = False, None
    config.task |= {
        key: empty
        for key, empty in (("teacher_pretrained", False), ("teacher_checkpoint", None), ("teacher_checkpoint_which", None))
        if key in config.task
    }
    task = configuration.build_task(config)
    model = build(config, task, say=lambda text: None)
    text, stored = safetensors_header(path)
    names = Names(**json.loads(text.get("names", "{}")))
    lost = [name for name in model.state_dict() if name not in set(stored)]
    if lost:
        raise ValueError(f"{path} lacks {len(lost)} tensors of this model, e.g. {lost[0]}: leave the model as it was trained")
    load_weights(model, str(path), strict=True)
    return config, task, model.eval(), names


def evaluate_run(folder: str | Path, overrides: Sequence[str] = (), weights: str = "model.safetensors") -> dict[str, Any]:
    """Metrics of a finished run's weights on its validation split, or on what the overrides say, and their "protocol"."""
    config = configuration.load_run(folder, overrides)
    accelerator = start(config)
    config, task, model, _ = open_run(folder, overrides, weights)
    data = validation_set(config, task)
    damaged = Damaged(config.data.skip_unreadable, {"val": data})
    if accelerator.device.type == "cpu":
        neighborhood.settle(model)
    metrics = evaluate(task, model.to(accelerator.device), data, accelerator, config, damaged)
    damaged.agree(accelerator)
    skipped = {"unreadable": damaged.counts()["val"]} if damaged.share else {}
    return {**metrics, "samples": len(data), **skipped, "protocol": protocol(task, config)}


@torch.no_grad()
def pictures(path: Path, task: Task, model: nn.Module, data: ImageDataset, accelerator: Accelerator, config: Config) -> None:
    """Image, truth and prediction of a few evenly spaced samples side by side; every process runs the model, one writes.

    Args:
        path: of the file.
        task: that draws.
        model: in evaluation mode.
        data: the validation split.
        accelerator: of this process.
        config: of the run.
    """
    if task.show is None:
        return
    model.eval()
    names = Names.of(data)
    chosen = [i * len(data) // 6 for i in range(min(6, len(data)))]
    rows = []
    for i in chosen:
        batch = loader.on_device(loader.collate([data[i]]), accelerator.device, config.run.channels_last)
        with accelerator.autocast():
            output = task.forward(inference(task, model, config), batch)
        prediction = task.measure(task.metric(), output, batch)
        image = to_rgb(batch["image"][0], config.data.mean, config.data.std)
        rows.append(task.show.panels(image, batch, prediction, names))
    if accelerator.is_main_process:
        save_sheet(path, rows)
