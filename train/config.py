"""The configuration of a run: typed, complete in one YAML file, checked before anything is built.

A file has the sections of train.schema. `task`, `data.args` and `model.head_args` go to the class they name and are checked
against its signature. Text such as 1e-4, which YAML reads as a string, becomes the number it spells.
"""

import dataclasses
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import timm.optim
import yaml
from jsonargparse import ArgumentParser
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from backbones.arguments import check_arguments
from backbones.edits import EDITS
from heads import HEADS
from train.checks import Collected, checked_arguments, nearest, require_known
from train.data import DATASETS, check_section
from train.inference import Predictor
from train.plugins import require_model
from train.reading import parse, set_key
from train.recipes import read
from train.rules import check_applies, check_ranges
from train.sample import is_dense
from train.schema import SECTIONS, Config, InferConfig, ModelConfig
from train.tasks import TASKS, Task
from train.transforms import check_augment, check_eval_resize

# Keys that say where a run starts from and how it trains: a finished one reads none of them.
STARTS = ("optim.*", "model.pretrained", "model.checkpoint*", "model.freeze_backbone", "task.teacher*", "run.dir")


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of a shipped name or a path, after overrides such as "--optim.lr=1e-4"."""
    title, values = read(name)
    given = _given(values)
    for text in overrides:
        given.add(override(values, text))
    config = resolve(values, given)
    if config.run.dir is None:
        config.run.dir = f"runs/{title}"
    return config


def load_run(folder: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run folder was made with, after overrides.

    Raises FileNotFoundError if it is no run folder, ValueError for an override of what only training reads: a finished run has
    its weights, and a number measured with them would pass for one of others.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml")
    _, values = read(str(path))
    given = {override(values, text) for text in overrides}  # what the file holds was checked when the run began
    if idle := sorted(key for key in given if any(fnmatchcase(key, pattern) for pattern in STARTS)):
        raise ValueError(f"{' and '.join(idle)} can change nothing in {folder}, which has its weights already: leave it out")
    return resolve(values, given)


def override(values: dict[str, Any], text: str) -> str:
    """Sets one key of nested dicts in place: "--section.key=value", deeper keys inside arguments; the value is YAML.

    Returns section.key. Raises ValueError if the text has another form.
    """
    key, equals, value = text.removeprefix("--").partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ValueError(f"cannot read {text!r}: overrides have the form --section.key=value")
    if parts[0] not in (*SECTIONS, "task"):
        raise ValueError(f"unknown section {parts[0]!r} in {text!r}: {nearest(parts[0], [*SECTIONS, 'task'])}")
    set_key(values, key, parse(value, f"{value[:60]!r} of --{key}"))
    return ".".join(parts[:2])


def _given(values: Mapping[str, Any]) -> set[str]:
    """The keys, with their section, that somebody has set.

    A printed configuration has all of them; those that hold their default then count as not set.
    """
    given = {f"{name}.{key}" for name, section in values.items() if isinstance(section, Mapping) for key in section}
    defaults = as_dict(Config())
    if not {f"{name}.{key}" for name, section in defaults.items() for key in section} <= given:
        return given
    task = values.get("task") or {}
    if task.get("name") in TASKS:
        parameters = inspect.signature(TASKS[task["name"]]).parameters
        defaults["task"] = {key: parameters[key].default for key in task if key in parameters}
    unset = object()
    return {
        f"{name}.{key}" for name in values for key, value in values[name].items() if value != defaults[name].get(key, unset)
    }


def resolve(values: Mapping[str, Any], given: Collection[str] | None = None) -> Config:
    """Nested plain values -> a Config in which every key, name and type is known to be right and derived values are filled in.

    Nothing is built. given: the keys, with their section, that somebody has set: one that has no effect is an error. Without
    it, those of `values`. Raises ValueError naming the key, the value and the nearest valid one; mistakes that do not hide
    each other come together.
    """
    found = Collected()
    for key in values:
        if key not in (*SECTIONS, "task"):
            found.sentences.append(f"unknown section {key!r}: {nearest(str(key), [*SECTIONS, 'task'])}")
    sections: dict[str, Any] = {name: cls() for name, cls in SECTIONS.items()}
    for name, cls in SECTIONS.items():
        with found.check():
            section = values.get(name)
            sections[name] = cls(**checked_arguments(cls, {} if section is None else section, name))
    readable = not found.sentences
    config, task = Config(**sections), None
    with found.check():
        config.task = _checked_task(_counted(values))
        task = build_task(config)
    _check_names(config, found)
    with found.check():
        check_ranges(as_dict(config))
    if readable:  # else defaults stand where a section could not be read
        _check_contradictions(config, found)
    found.done()
    assert task is not None  # else its mistake has just been raised
    _fill_in(config)
    dense = is_dense(task.targets("train"))
    with found.check():
        _check_backbone_args(config.model)
    with found.check():
        check_section(config.data, config.model.in_chans)
    with found.check():
        check_augment(config.augment, dense, config.data.size, config.data.mean or (), config.data.std or ())
    with found.check():
        check_eval_resize(config.data.eval_resize, is_dense(task.targets("val")))
    if isinstance(config.data.eval_resize, tuple) and config.data.eval_batch > 1:
        rule = list(config.data.eval_resize)
        found.sentences.append(f"data.eval_batch must be 1 with eval_resize {rule}: images then differ in size")
    with found.check():
        _check_infer(config, task)
    with found.check():
        check_applies(config, dense or task.takes_heads, _given(values) if given is None else given)
    found.done()
    return config


def _fill_in(config: Config) -> None:
    """Sets what follows from other keys: the model's image size, mean and std."""
    model, data = config.model, config.data
    model.img_size = model.img_size or data.size
    pretrained = released(model.backbone)
    for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        own = getattr(data, name)
        channels = tuple(own if own is not None else (getattr(pretrained, name) if pretrained else None) or default)
        if len(channels) not in (1, model.in_chans):
            raise ValueError(
                f"data.{name} has {len(channels)} values but model.in_chans is {model.in_chans}: set data.{name} to one value "
                "per channel, or to a list of one"
            )
        setattr(data, name, channels * model.in_chans if len(channels) == 1 else channels)


def _check_backbone_args(model: ModelConfig) -> None:
    """Raises ValueError for arguments that no model of the zoo can be built with; timm's own models have other rules."""
    name = model.backbone.partition(".")[0]
    if timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("backbones."):
        zeros = ("depths", "heads", "num_heads")  # of a stage without, in a few families; the others refuse them when built
        check_arguments("model.backbone_args", model.backbone_args, zeros)


def _check_infer(config: Config, task: Task) -> None:
    """Raises ValueError for settings of evaluation that contradict each other or the task, before hours of training."""
    infer = config.infer
    if task.average is None:
        if infer != InferConfig():
            raise ValueError(f"infer: {config.task['name']} runs whole images once; leave this section out")
        return
    if infer.mode == "slide" and infer.window is None:
        raise ValueError("infer.window is missing: mode slide needs its height and width")
    settings = dataclasses.asdict(infer)
    if infer.mode == "whole":
        settings |= {"window": None, "stride": None}
    try:
        Predictor(nn.Identity(), average=task.average, **settings)
    except ValueError as error:
        raise ValueError(f"infer: {error}") from error


def released(backbone: str) -> Any:
    """Find timm's description of a model's released weights; None for a model from elsewhere. ValueError for an unknown tag."""
    if not timm.is_model(backbone):
        return None
    try:
        return timm.get_pretrained_cfg(backbone)
    except RuntimeError as error:  # timm's word for a wrong tag
        name, _, tag = backbone.partition(".")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        raise ValueError(f"model.backbone: {name} has no weights {tag!r}; {nearest(tag, tags)}") from error


def build_task(config: Config) -> Task:
    """The task of a resolved configuration."""
    return TASKS[config.task["name"]](**{key: value for key, value in config.task.items() if key != "name"})


def _counted(values: Mapping[str, Any]) -> Any:
    """The `task` section, its num_classes filled in from the classes that the data have, where it leaves them out."""
    task, data = values.get("task"), values.get("data")
    if not isinstance(task, Mapping) or not isinstance(data, Mapping) or "num_classes" in task or task.get("name") not in TASKS:
        return task
    if "num_classes" not in inspect.signature(TASKS[task["name"]]).parameters or data.get("name") not in DATASETS:
        return task
    args = data.get("args")
    classes = args.get("classes") if isinstance(args, Mapping) else None
    if classes is None:
        classes = DATASETS[data["name"]].classes
    count = len(classes) if isinstance(classes, list) else classes
    return {**task, "num_classes": count} if isinstance(count, int) and not isinstance(count, bool) else task


def _checked_task(values: Any) -> dict[str, Any]:
    """The task's name and arguments, defaults filled in. Raises ValueError for a name or an argument that there is not."""
    if not isinstance(values or {}, Mapping):
        raise ValueError(f"task: expected keys and values, got {values!r}")
    if "name" not in (values or {}):
        raise ValueError(f"task.name is missing: {nearest('', TASKS)}")
    require_known("task.name", values["name"], TASKS)
    args = {key: value for key, value in values.items() if key != "name"}
    return {"name": values["name"], **checked_arguments(TASKS[values["name"]], args, "task")}


def _check_names(config: Config, found: Collected) -> None:
    """Names of data set, backbone, heads, edits and optimiser, and the arguments of all but the backbone."""
    model, data, optim = config.model, config.data, config.optim
    with found.check():
        require_known("data.name", data.name, DATASETS)
        if not DATASETS[data.name].in_memory:
            if data.root is None:
                found.sentences.append(f"data.root is missing: {data.name} needs the folder that holds its files")
        elif data.root is not None:
            found.sentences.append(f"data.root: {data.name} is made in memory and reads no files; set it to null")
        skip = ("root", "split", "targets", "transform")
        data.args = checked_arguments(DATASETS[data.name], data.args, "data.args", skip=skip)
    with found.check():
        if ":" not in model.backbone:
            require_model("model.backbone: ", model.backbone)
    for name, key in (("head", "head_args"), ("aux_head", "aux_args")):
        with found.check():
            head = getattr(model, name)
            if head is not None:
                require_known(f"model.{name}", head, HEADS)
                given = getattr(model, key)  # defaults are left to the head: some depend on the backbone
                checked = checked_arguments(HEADS[head], given, f"model.{key}", skip=("channels", "out_channels"))
                setattr(model, key, {name: checked[name] for name in given})
    with found.check():
        model.edits = [_checked_edit(edit, f"model.edits[{i}]") for i, edit in enumerate(model.edits)]
    if model.aux_head is None and model.aux_args:
        found.sentences.append("model.aux_args is set but model.aux_head is not")
    with found.check():
        require_known("optim.name", optim.name, map(str, timm.optim.list_optimizers()))


def _checked_edit(edit: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One entry of model.edits with its name and the types of its arguments checked; the model is seen when it is built."""
    if "name" not in edit:
        raise ValueError(f"{where}: name is missing; {nearest('', EDITS)}")
    require_known(f"{where}.name", edit["name"], EDITS)
    given = {key: value for key, value in edit.items() if key != "name"}
    checked = checked_arguments(EDITS[edit["name"]], given, where, skip=("model",))
    return {"name": edit["name"], **{key: checked[key] for key in given}}


def _check_contradictions(config: Config, found: Collected) -> None:
    """Keys that exclude each other, and lists of another form than their type says."""
    data, optim, run = config.data, config.optim, config.run
    say = found.sentences.append
    if (optim.steps is None) == (optim.epochs is None):
        say("give optim.steps or optim.epochs, one of them")
    if optim.warmup_steps is not None and optim.warmup_epochs:
        say("give optim.warmup_steps or optim.warmup_epochs, one of them")
    if optim.min_lr > optim.lr:
        say(f"optim.min_lr {optim.min_lr} is above optim.lr {optim.lr}: the schedule would end higher than it starts")
    if run.parallel == "fsdp" and run.channels_last:
        say("run.parallel fsdp splits contiguous tensors only: set run.channels_last=false, or run.parallel=ddp")
    if run.parallel == "fsdp" and run.precision == "fp16":
        say("run.parallel fsdp goes with run.precision bf16 or no: fp16 would need its loss scale on every slice")
    for name in ("mean", "std"):
        if getattr(data, name) is not None and not getattr(data, name):
            say(f"data.{name} is empty: one value, or one per channel; null = the backbone's own")
    weights = config.task.get("class_weights")
    if isinstance(weights, list) and weights and not any(weights):
        say("task.class_weights are all 0: no pixel would count")
    if config.model.out_indices == []:
        say("model.out_indices is empty: name at least one level; null = all")


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
    parser = ArgumentParser(add_help=False)
    for name, cls in SECTIONS.items():
        parser.add_class_arguments(cls, name)
    lines = parser.format_help().partition("\n\n")[2].splitlines()  # without the usage
    lines = [line for line in lines if " CONFIG " not in line]
    names = f"task.name: {', '.join(TASKS)}. data.name: {', '.join(DATASETS)}. model.head: {', '.join(HEADS)}."
    return "\n".join(
        ["configuration keys", names, "task.* are the arguments of the task class, data.args.* of the data set.", *lines]
    )
