"""The configuration of a run: typed, complete in one YAML file, checked before anything is built.

A file has the sections of train.schema. `task`, `data.args` and `model.head_args` go to the class they name and are checked
against its signature. Text such as 1e-4, which YAML reads as a string, becomes the number it spells.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import timm.optim
import yaml
from jsonargparse import ArgumentParser
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import backbones  # noqa: F401  (registers our models with timm)
from backbones.edits import EDITS
from heads import HEADS
from train.checks import arguments, hint, known
from train.data import DATASETS
from train.reading import parse, set_key
from train.recipes import read
from train.schema import SECTIONS, Config, InferConfig
from train.tasks import TASKS, Task
from train.transforms import check_augment, check_eval_resize


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of a shipped name or a path, after overrides such as "--optim.lr=1e-4"."""
    title, values = read(name)
    for text in overrides:
        override(values, text)
    config = resolve(values)
    if config.run.dir is None:
        config.run.dir = f"runs/{title}"
    return config


def load_run(folder: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run folder was made with, after overrides. FileNotFoundError if it is no run folder."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml")
    return load(str(path), overrides)


def override(values: dict[str, Any], text: str) -> None:
    """Sets one key of nested dicts in place: "--section.key=value", deeper keys inside arguments; the value is YAML.

    Raises ValueError if the text has another form.
    """
    key, equals, value = text.removeprefix("--").partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ValueError(f"cannot read {text!r}: overrides have the form --section.key=value")
    if parts[0] not in (*SECTIONS, "task"):
        raise ValueError(f"unknown section {parts[0]!r} in {text!r}: {hint(parts[0], [*SECTIONS, 'task'])}")
    set_key(values, key, parse(value, f"{value[:60]!r} of --{key}"))


def resolve(values: Mapping[str, Any]) -> Config:
    """Nested plain values -> a Config in which every key, name and type is known to be right and derived values are filled in.

    Nothing is built. Raises ValueError naming the key, the value and the nearest valid one.
    """
    unknown = [key for key in values if key not in (*SECTIONS, "task")]
    if unknown:
        raise ValueError(f"unknown section {unknown[0]!r}: {hint(unknown[0], [*SECTIONS, 'task'])}")
    sections = {name: cls(**arguments(cls, values.get(name) or {}, name)) for name, cls in SECTIONS.items()}
    config = Config(task=dict(values.get("task") or {}), **sections)
    _check_names(config)
    _check_numbers(config)
    model, data = config.model, config.data
    model.img_size = model.img_size or data.size
    pretrained = released(model.backbone)
    for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        channels = tuple(getattr(data, name) or (getattr(pretrained, name) if pretrained else None) or default)
        if len(channels) not in (1, model.in_chans):
            raise ValueError(f"data.{name} has {len(channels)} values but model.in_chans is {model.in_chans}")
        setattr(data, name, channels)
    task = build_task(config)
    dense = any(target in ("mask", "depth") for target in task.targets("train"))
    check_augment(config.augment, dense, data.size, data.mean, data.std)
    check_eval_resize(data.eval_resize, dense)
    if isinstance(data.eval_resize, tuple) and data.eval_batch > 1:
        raise ValueError(f"data.eval_batch must be 1 with eval_resize {list(data.eval_resize)}: images then differ in size")
    if task.average is None and config.infer != InferConfig():
        raise ValueError(f"infer: {config.task['name']} runs whole images once; leave this section out")
    if config.infer.mode == "slide" and config.infer.window is None:
        raise ValueError("infer.window is missing: mode slide needs its height and width")
    return config


def released(backbone: str) -> Any:
    """timm's description of a model's released weights, None for a model from elsewhere. ValueError for an unknown tag."""
    if not timm.is_model(backbone):
        return None
    try:
        return timm.get_pretrained_cfg(backbone)
    except RuntimeError as error:  # timm's word for a wrong tag
        name, _, tag = backbone.partition(".")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        raise ValueError(f"model.backbone: {name} has no weights {tag!r}; {hint(tag, tags)}") from error


def build_task(config: Config) -> Task:
    """The task of a resolved configuration."""
    return TASKS[config.task["name"]](**{key: value for key, value in config.task.items() if key != "name"})


def _check_names(config: Config) -> None:
    """Names of task, data set, backbone, heads and optimiser, and the arguments of the first two and of the heads."""
    task, model, data, optim = config.task, config.model, config.data, config.optim
    if "name" not in task:
        raise ValueError(f"task.name is missing: {hint('', TASKS)}")
    known("task.name", task["name"], TASKS)
    args = {key: value for key, value in task.items() if key != "name"}
    config.task = {"name": task["name"], **arguments(TASKS[task["name"]], args, "task")}
    known("data.name", data.name, DATASETS)
    data.args = arguments(DATASETS[data.name], data.args, "data.args", skip=("root", "split", "targets", "transform"))
    if not DATASETS[data.name].in_memory:
        if data.root is None:
            raise ValueError(f"data.root is missing: {data.name} needs the folder that holds its files")
    elif data.root is not None:
        raise ValueError(f"data.root: {data.name} is made in memory and reads no files; set it to null")
    if ":" not in model.backbone and not timm.is_model(model.backbone):
        raise ValueError(f"model.backbone: unknown model {model.backbone!r}; {hint(model.backbone, timm.list_models())}")
    for name, args in (("head", "head_args"), ("aux_head", "aux_args")):
        head = getattr(model, name)
        if head is not None:
            known(f"model.{name}", head, HEADS)
            given = getattr(model, args)  # defaults are left to the head: some depend on the backbone
            checked = arguments(HEADS[head], given, f"model.{args}", skip=("channels", "out_channels"))
            setattr(model, args, {key: checked[key] for key in given})
    model.edits = [_checked_edit(edit, f"model.edits[{i}]") for i, edit in enumerate(model.edits)]
    if model.aux_head is None and model.aux_args:
        raise ValueError("model.aux_args is set but model.aux_head is not")
    known("optim.name", optim.name, timm.optim.list_optimizers())


def _checked_edit(edit: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One entry of model.edits with its name and the types of its arguments checked; the model is seen when it is built."""
    if "name" not in edit:
        raise ValueError(f"{where}: name is missing; {hint('', EDITS)}")
    known(f"{where}.name", edit["name"], EDITS)
    given = {key: value for key, value in edit.items() if key != "name"}
    checked = arguments(EDITS[edit["name"]], given, where, skip=("model",))
    return {"name": edit["name"], **{key: checked[key] for key in given}}


def _check_numbers(config: Config) -> None:
    """Ranges that no type expresses."""
    data, optim, run = config.data, config.optim, config.run
    if (optim.steps is None) == (optim.epochs is None):
        raise ValueError("give optim.steps or optim.epochs, one of them")
    if optim.warmup_steps is not None and optim.warmup_epochs:
        raise ValueError("give optim.warmup_steps or optim.warmup_epochs, one of them")
    positive = [(optim, "optim", ("lr", "steps", "epochs", "global_batch", "micro_batch", "clip_norm", "head_lr_scale"))]
    positive += [(data, "data", ("eval_batch", "repeats")), (run, "run", ("eval_every", "save_every", "log_every", "threads"))]
    for section, name, keys in positive:
        for key in keys:
            value = getattr(section, key)
            if value is not None and not value > 0:
                raise ValueError(f"{name}.{key} must be positive, got {value}")
    for section, name, keys in (
        (optim, "optim", ("weight_decay", "min_lr", "warmup_lr", "warmup_epochs")),
        (data, "data", ("workers",)),
    ):
        for key in keys:
            if getattr(section, key) < 0:
                raise ValueError(f"{name}.{key} must not be negative, got {getattr(section, key)}")
    if run.parallel == "fsdp" and run.channels_last:
        raise ValueError("run.parallel fsdp splits contiguous tensors only: set run.channels_last=false, or run.parallel=ddp")
    if run.parallel == "fsdp" and run.precision == "fp16":
        raise ValueError("run.parallel fsdp goes with run.precision bf16 or no: fp16 would need its loss scale on every slice")
    if not 0 <= data.skip_unreadable < 1:
        raise ValueError(f"data.skip_unreadable is a share of the files in [0, 1), got {data.skip_unreadable}")
    for key in ("layer_decay", "ema_decay"):
        value = getattr(optim, key)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"optim.{key} must lie in (0, 1], got {value}")


def as_dict(config: Config) -> dict[str, Any]:
    """Plain values, as they are written to YAML."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def as_yaml(config: Config) -> str:
    """The resolved configuration, complete: loading it again gives the same run."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, default_flow_style=None, width=120)


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line per key that differs between two nested dicts: "optim.lr: 0.1 -> 0.2"."""
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def keys_help() -> str:
    """Every key of the sections with its type, default and meaning, for `zoo train --help`."""
    parser = ArgumentParser(usage="", add_help=False)
    for name, cls in SECTIONS.items():
        parser.add_class_arguments(cls, name)
    lines = parser.format_help().splitlines()
    lines = [line for line in lines if " CONFIG " not in line]
    names = f"task.name: {', '.join(TASKS)}. data.name: {', '.join(DATASETS)}. model.head: {', '.join(HEADS)}."
    return "\n".join(
        ["configuration keys", names, "task.* are the arguments of the task class, data.args.* of the data set.", *lines]
    )
