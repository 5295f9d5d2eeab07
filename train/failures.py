"""How a run ends early: signals that ask it to stop, and what machines run out of."""

import contextlib
import errno
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from train.checks import RunError
from train.schema import Config


class Stop:
    """Whether the run was asked to end, by SIGTERM or SIGINT.

    A second SIGINT acts as usual; a second SIGTERM changes nothing, because a cluster sends it to the launcher and to its
    processes, and the launcher passes it on.
    """

    def __init__(self) -> None:
        self.asked = False

    def agreed(self, accelerator: Accelerator, now: bool) -> bool:
        """Whether to stop, the same on every process. Several processes ask each other only at `now`, which spares a wait."""
        if accelerator.num_processes == 1:
            return self.asked
        if not now:
            return False
        return bool(accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device), "sum") > 0)


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Catches the signals that ask a run to end.

    Outside the main thread, where Python allows no handlers, they act as usual.
    """
    stop = Stop()
    before: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    with contextlib.suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


@contextlib.contextmanager
def readable(config: Config, folder: Path) -> Iterator[None]:
    """Turns what machines run out of into RunError."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)  # GPU, CPU
        if full:
            raise RunError(
                "out of memory with micro-batches of up to "
                f"{config.optim.micro_batch or config.optim.global_batch} images: lower optim.micro_batch (the total batch "
                "stays), or data.eval_batch if it was evaluating, or set run.grad_checkpointing=true or run.precision=bf16"
            ) from error
        if disk_full(error):
            raise RunError(
                f"no space left on the disk of {folder}: free some, and go on with --resume from the last checkpoint"
            ) from error
        if isinstance(error, torch.distributed.DistError) or re.search("gloo.*(reset|closed) by peer", str(error)):
            raise RunError(
                "another process of this run has ended, and what it printed says why; go on with --resume, or let torchrun "
                "restart the run by itself: --max-restarts 3 before --no-python, and --resume"
            ) from error
        if isinstance(error, RuntimeError) and re.search("DataLoader worker.*(exited unexpectedly|is killed)", str(error)):
            raise RunError(
                f"a data loading worker was killed, usually for memory: lower data.workers (now {config.data.workers}), "
                "and go on with --resume"
            ) from error
        raise


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a file could not grow.

    It says so by its number, or in safetensors' or torch's words, which carry none.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if re.search(r"No space left|quota exceeded|File too large|PytorchStreamWriter failed|unexpected pos \d", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
