"""What a run is made of before its first step: process, data and model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from torch import nn

import backbones.edits
import weights
from train import optim
from train.checks import Mistakes, sentences_of
from train.data import ImageDataset, open_split
from train.halves import slow_bfloat16
from train.schema import Config
from train.tasks import Task
from train.transforms import Seeded, build_transform


def start(config: Config) -> Accelerator:
    """The Accelerator of this process. Raises ValueError for a device or precision this machine does not have."""
    run = config.run
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda but torch sees no GPU; leave it null or set cpu")
    if run.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("run.device is mps but torch sees no such device; leave it null or set cpu")
    cpu = run.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if run.precision == "fp16" and cpu:
        raise ValueError("run.precision fp16 needs a GPU; use bf16 or no on the CPU")
    ready = [tracker.value for tracker in get_available_trackers()]
    for name in run.trackers:
        if name not in ready:  # Accelerate would leave it out without a word
            raise ValueError(f"run.trackers: {name!r} is not installed, or unknown to Accelerate; there are {', '.join(ready)}")
    AcceleratorState._reset_state(reset_partial_state=True)  # a process may run twice, with another precision or device
    accelerator = Accelerator(
        mixed_precision=run.precision,
        cpu=cpu,
        log_with=run.trackers or None,
        project_dir=run.dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if run.precision == "bf16" and accelerator.device.type == "cpu" and (note := slow_bfloat16()):
        accelerator.print(f"run.precision bf16: {note}")
    return accelerator


def data_sets(config: Config, task: Task) -> tuple[Seeded, ImageDataset]:
    """(training split, validation split). Mistakes of both come together, each with its split's name."""
    found: list[tuple[str, Exception]] = []
    splits: list[Any] = []
    for split, opened in (("train", training_set), ("val", validation_set)):
        try:
            splits.append(opened(config, task))
        except (ValueError, FileNotFoundError) as error:
            found.append((split, error))
    if len({str(error) for _, error in found}) == 2:
        raise Mistakes([f"{split}: {text}" for split, error in found for text in sentences_of(error)]) from found[0][1]
    if found:
        raise found[0][1]
    train, val = splits
    return train, val


def training_set(config: Config, task: Task) -> Seeded:
    """The training split, each sample transformed by seed and draw. Raises ValueError if it does not fit the task."""
    plain = _split(config, task, "train")
    own = None if type(task).sample is Task.sample else task.sample  # a task may hold a teacher, which workers need not get
    return Seeded(plain, _transform(config, task, plain, "train"), config.run.seed, own)


def validation_set(config: Config, task: Task) -> ImageDataset:
    """The validation split with its transform. Raises ValueError if it does not fit the task."""
    plain = _split(config, task, "val")
    plain.transform = _transform(config, task, plain, "val")
    return plain


def _split(config: Config, task: Task, split: str) -> ImageDataset:
    plain = open_split(config.data, split, task.targets(split), config.model.in_chans)
    task.check(plain)
    if not len(plain):
        raise ValueError(f"{config.data.name} has no {split} samples")
    return plain


def _transform(config: Config, task: Task, plain: ImageDataset, split: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    data = config.data
    assert data.mean is not None and data.std is not None  # config.resolve has filled them in
    train, targets, ignored = split == "train", task.targets(split), plain.ignore_index
    divisor = plain.depth.divisor if plain.depth is not None else 1.0
    return build_transform(train, targets, data.size, data.mean, data.std, config.augment, ignored, data.eval_resize, divisor)


def build(config: Config, task: Task, say: Callable[[str], None] = print) -> nn.Module:
    """The task's model as the config wants it: weights, edits, memory format, checkpointing of activations, frozen parts.

    Released weights come first, then model.checkpoint, then model.edits, which find the weights of the plain model there. A
    run's own file holds the edited model and is loaded into the result.
    """
    net = task.build(config.model)
    for note in task.notes:
        say(note)
    if config.model.checkpoint is not None:
        say(str(load_weights(net, config.model.checkpoint, which=config.model.checkpoint_which)))
    net = backbones.edits.apply(net, config.model.edits)
    if config.model.freeze_backbone:
        optim.freeze_backbone(net)
    if config.run.grad_checkpointing:
        if not hasattr(net, "set_grad_checkpointing"):
            raise ValueError(f"{type(net).__name__} has no activation checkpointing; set run.grad_checkpointing=false")
        cast(Any, net).set_grad_checkpointing(True)
    return net.to(memory_format=torch.channels_last) if config.run.channels_last else net


def load_weights(net: nn.Module, source: str, strict: bool = False, which: str | None = None) -> weights.load.Report:
    """Loads a file, or the result of a run folder, into the whole model if it is one of ours, else into its backbone.

    Raises FileNotFoundError, or ValueError for weights that do not fit.

    Args:
        net: the model.
        source: file or run folder.
        strict, which: as for weights.load_checkpoint.
    """
    path = Path(source)
    return weights.load_checkpoint(net, path / "model.safetensors" if path.is_dir() else path, strict, which)
