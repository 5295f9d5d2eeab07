"""The state of a run between two steps, saved as a checkpoint and restored from one."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from train import checkpoint, sharding


@dataclass
class RunState:
    """Progress of a run. step: updates made; best, best_step: of the task's `best` metric."""

    step: int = 0
    best: float | None = None
    best_step: int = 0


@dataclass
class Parts:
    """Everything with a state that a run carries from step to step.

    settings: of the optimiser's groups as the configuration made them; what differs later is the optimiser's own.
    """

    net: nn.Module
    average: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: Any
    settings: list[dict[str, Any]]


def settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Rates, decay, betas and so on of an optimiser's groups: all but the parameters."""
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params" and plain_value(value)}
        for group in optimizer.param_groups
    ]


def parameter_names(parts: Parts) -> list[list[str]]:
    """Names of the parameters of each group of the optimiser."""
    names = {id(parameter): name for name, parameter in parts.net.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in parts.optimizer.param_groups]


def save(folder: Path, parts: Parts, state: RunState, main: bool) -> None:
    """Writes one checkpoint, from the main process; all of them gather what is split.

    Random numbers, learning rate and the place in the data need no state: they are functions of seed and step.

    Args:
        folder: of the run.
        parts: what has a state.
        state: of the loop.
        main: whether this process writes.
    """
    tensors = {"model": sharding.whole(parts.net.state_dict())}
    if parts.average is not None:
        tensors["averaged"] = sharding.whole(parts.average.module.state_dict())
    rest = {
        "progress": dataclasses.asdict(state),
        "optimizer": sharding.whole(parts.optimizer.state_dict()),
        "parameters": parameter_names(parts),
        "settings": parts.settings,
        "scaler": parts.scaler.state_dict() if parts.scaler else {},
    }
    if main:
        checkpoint.save(folder / "checkpoints", state.step, tensors, rest)


def plain_value(value: Any) -> bool:
    """Whether a value is made of what torch.load(weights_only=True) reads."""
    if isinstance(value, (list, tuple)):
        return all(plain_value(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def restore(folder: Path, parts: Parts, say: Callable[[str], None]) -> RunState:
    """Loads the newest intact checkpoint into the parts; a fresh RunState if there is none yet.

    Weights, averages, moments and progress come from the checkpoint; whatever the configuration sets (rates, decay, betas,
    groups) is the present configuration's. Raises ValueError for weights of another model.
    """
    found = checkpoint.newest(folder / "checkpoints", say)
    if found is None:
        say(f"no checkpoint in {folder} yet: starting at step 0")
        return RunState()
    path, (tensors, rest) = found
    require_same_model(path, tensors["model"], parts.net, folder)
    sharding.load_model(parts.net, tensors["model"])
    if parts.average is not None:
        if "averaged" not in tensors:
            say("optim.ema_decay is new: the average starts from the weights of this step")
        sharding.load_model(parts.average.module, tensors.get("averaged", tensors["model"]))
    restore_moments(parts, rest, say)
    if parts.scaler and rest["scaler"]:
        parts.scaler.load_state_dict(rest["scaler"])
    state = RunState(**rest["progress"])
    say(f"going on from step {state.step} ({path.name})")
    return state


def require_same_model(path: Path, tensors: Mapping[str, Tensor], net: nn.Module, folder: Path) -> None:
    """Raises ValueError unless a checkpoint holds exactly the tensors of the model.

    Args:
        path: of the checkpoint.
        tensors: it holds.
        net: the model.
        folder: of the run, for the advice.
    """
    own = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in tensors.items()}
    other = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
    if other:
        name = other[0]
        raise ValueError(
            f"{path} is of another model: {len(other)} tensors differ, e.g. {name}, {theirs.get(name, 'absent')} there and "
            f"{own.get(name, 'absent')} now. What builds the model (model.*, task.num_classes, data.size of some) cannot "
            f"change in a run that goes on; start another run with --model.checkpoint={folder}"
        )


def restore_moments(parts: Parts, rest: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """The optimiser's moments, by the names of their parameters, under the groups and settings of the present configuration.

    Parameters that train anew start without moments; those that train no more lose them.
    """
    saved, names, own = rest["optimizer"], rest["parameters"], parameter_names(parts)
    numbers = {
        name: number
        for group, members in zip(saved["param_groups"], names, strict=True)
        for number, name in zip(group["params"], members, strict=True)
    }
    homes = {name: i for i, members in enumerate(names) for name in members}
    moments = {key: value for key, value in saved["state"].items() if not isinstance(key, int)}
    groups = []
    for group, members in zip(parts.optimizer.state_dict()["param_groups"], own, strict=True):
        home = next((homes[name] for name in members if name in homes), None)
        notes = {} if home is None else own_notes(saved["param_groups"][home], rest["settings"][home])
        groups.append({**group, **notes})
        moments |= {
            number: saved["state"][numbers[name]]
            for number, name in zip(group["params"], members, strict=True)
            if numbers.get(name) in saved["state"]
        }
    trained = {name for members in own for name in members}
    for text, lost in (
        ("train now and did not before: they start without moments", trained - numbers.keys()),
        ("train no more: their moments are dropped", numbers.keys() - trained),
    ):
        if lost:
            say(f"{len(lost)} tensors, e.g. {min(lost)}, {text}")
    sharding.load_optimizer(parts.optimizer, {"state": moments, "param_groups": groups})


def own_notes(group: Mapping[str, Any], built: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimiser itself has changed in a group since the configuration made it: Prodigy's estimate, Lookahead's count.

    The learning rate is the schedule's.
    """
    return {
        key: value
        for key, value in group.items()
        if key not in ("params", "lr", "initial_lr") and not (key in built and _equal(value, built[key]))
    }


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def improved(state: RunState, metrics: dict[str, float], best: tuple[str, str]) -> bool:
    """Whether these are the best metrics so far; notes them in the state."""
    value = metrics[best[0]]
    sign = 1 if best[1] == "max" else -1
    if state.best is not None and not sign * value > sign * state.best:
        return False
    state.best, state.best_step = value, state.step
    return True
