"""The state of a run between two steps, saved as a checkpoint and restored from one."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Everything with a state that a run carries from step to step."""

    net: nn.Module
    average: Any
    optimizer: Any
    schedule: Any
    scaler: Any


def save(folder: Path, parts: Parts, state: RunState, main: bool) -> None:
    """One checkpoint, written by the main process; all of them gather what is split. Random numbers and the place in the data
    need no state: they are functions of seed and step.
    """
    tensors = {"model": sharding.whole(parts.net.state_dict())}
    if parts.average:
        tensors["averaged"] = sharding.whole(parts.average.module.state_dict())
    rest = {
        "progress": dataclasses.asdict(state),
        "optimizer": sharding.whole(parts.optimizer.state_dict()),
        "schedule": {key: value for key, value in parts.schedule.state_dict().items() if plain_value(value)},
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
    """Loads the newest intact checkpoint into the parts; a fresh RunState if there is none yet."""
    path = checkpoint.latest(folder / "checkpoints", say)
    if path is None:
        say(f"no checkpoint in {folder} yet: starting at step 0")
        return RunState()
    tensors, rest = checkpoint.load(path)
    sharding.load_model(parts.net, tensors["model"])
    if parts.average:
        sharding.load_model(parts.average.module, tensors.get("averaged", tensors["model"]))
    sharding.load_optimizer(parts.optimizer, rest["optimizer"])
    parts.schedule.load_state_dict(rest["schedule"])
    if parts.scaler and rest["scaler"]:
        parts.scaler.load_state_dict(rest["scaler"])
    state = RunState(**rest["progress"])
    say(f"going on from step {state.step} ({path.name})")
    return state


def improved(state: RunState, metrics: dict[str, float], best: tuple[str, str]) -> bool:
    """Whether these are the best metrics so far; notes them in the state."""
    value = metrics[best[0]]
    sign = 1 if best[1] == "max" else -1
    if state.best is not None and not sign * value > sign * state.best:
        return False
    state.best, state.best_step = value, state.step
    return True
