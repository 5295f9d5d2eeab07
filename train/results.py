"""What a run leaves behind: weights with their story in the header, summary, curves, pictures and a table."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from train import checkpoint, sharding
from train import config as configuration
from train.data import ImageDataset
from train.evaluation import pictures, protocol
from train.folder import versions
from train.log import Log, curves
from train.schema import Config
from train.show import Names
from train.tasks import Task
from weights.read import read_safetensors, safetensors_header


def save_product(
    path: Path, model: nn.Module, config: Config, step: int, metrics: dict[str, float], names: Names, main: bool
) -> None:
    """Saves weights as a result: safetensors with their story in the header, written by the main process.

    Args:
        path: of the file.
        model: whole or split; every process calls.
        config: goes into the header, as do the next three and the versions of the packages.
        step: updates made.
        metrics: of these weights.
        names: of classes, with colours.
        main: whether this process writes.
    """
    about = {"metrics": metrics, "config": configuration.as_dict(config), "names": dataclasses.asdict(names)}
    about |= {"versions": versions()}
    header = {"step": str(step), **{key: json.dumps(value) for key, value in about.items()}}
    tensors = sharding.whole(model.state_dict())
    if main:
        checkpoint.save_weights(path, tensors, header)


def finish(
    folder: Path,
    config: Config,
    task: Task,
    model: nn.Module,
    data: ImageDataset,
    accelerator: Accelerator,
    summary: dict[str, Any],
    log: Log,
) -> None:
    """Last weights, summary, curves, pictures of the best weights, and the table, from the main process.

    Every process calls it, because a model may be split over them.

    Args:
        folder: the run's.
        config: the run's.
        task: says how predictions are made and shown.
        model: the product: the network or its average.
        data: the validation set, for the pictures.
        accelerator: of this process.
        summary: "step", "last", "best_step" and so on; gets "best" here.
        log: prints the table.
    """
    main, names = accelerator.is_main_process, Names.of(data)
    save_product(folder / "last.safetensors", model, config, summary["step"], summary["last"], names, main)
    accelerator.wait_for_everyone()  # the best weights may have been written a moment ago
    best = folder / "model.safetensors"
    sharding.load_model(model, read_safetensors(best))
    summary["best"] = json.loads(safetensors_header(best)[0].get("metrics", "{}"))
    if main:
        text = json.dumps(summary, indent=1)
        checkpoint.write(folder / "summary.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
        curves(folder)
    pictures(folder / "predictions.png", task, model, data, accelerator, config)
    rows = [
        (f"{name} (best, step {summary['best_step']} / last)", f"{value:.4f} / {summary['last'].get(name, math.nan):.4f}")
        for name, value in summary["best"].items()
    ]
    rows += [("protocol", protocol(task, config)), ("time", f"{summary['seconds']:.0f} s"), ("folder", str(folder))]
    log.table(config.model.backbone, rows)
