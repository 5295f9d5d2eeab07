"""Clocks and memory of the benchmarks, made so that a busy machine does not lie.

On a CPU: one thread, process CPU time (user + system, without the waiting for other programs), the variants interleaved
A B C A B C in one process, median and minimum of the rounds. On CUDA: events around each run, interleaved too.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from rich.table import Table
from torch import Tensor


def machine(device: str) -> str:
    """One line that says what the numbers were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()} ({torch.backends.cpu.get_cpu_capability()})"
    how = "CUDA events" if device == "cuda" else "one thread, process CPU time"
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    return f"{datetime.date.today()}: {name}, {how}, {versions}"


def processor() -> str:
    """The CPU's name, as the system gives it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """A rich table of rows that share their keys."""
    found = Table(title=title)
    for key in rows[0] if rows else ():
        found.add_column(key)
    for row in rows:
        found.add_row(*(str(value) for value in row.values()))
    return found


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sets torch to one thread inside: with two, wall and CPU time both include waiting for the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(variants: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """(median, minimum) milliseconds of each variant over `rounds` interleaved rounds, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    with one_thread():
        for counts in (False, *[True] * rounds):
            for name, variant in variants.items():
                spent = once(variant, device)
                if counts:
                    times[name].append(spent)
    return {name: (statistics.median(spent), min(spent)) for name, spent in times.items()}


def once(variant: Callable[[], Any], device: str) -> float:
    """Milliseconds of one run. On a CPU a short run is repeated for 20 ms, which is long against the clock.

    The first run of a repetition does not count: the variant before it has filled the caches.
    """
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        variant()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begun = time.process_time()
    variant()
    spent, runs = time.process_time() - begun, 1
    if spent < 0.02:
        begun, runs = time.process_time(), 0
        while (spent := time.process_time() - begun) < 0.02 and runs < 100:
            variant()
            runs += 1
    return spent * 1e3 / runs


def shown(times: tuple[float, float]) -> str:
    """(median, minimum) as a table shows them."""
    return f"{times[0]:.2f} ({times[1]:.2f})"


def training_step(call: Callable[[], Tensor], grad: Tensor, leaves: Sequence[Tensor]) -> Callable[[], None]:
    """A function that runs a call and its backward pass, from fresh gradients of the leaves."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        call().backward(grad)

    return step


def peak_resident() -> int:
    """Bytes that this process has had in memory at most. getrusage would also count the process that started it."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError("this system's /proc/self/status has no VmHWM line, so peak memory cannot be measured")


def in_own_process(module: str, call: str, what: str) -> str:
    """The last line that `call`, code that sees the names of one of our modules, prints in a process of its own.

    A train.py in the user's folder does not stand in for ours. what: is being done, for the RuntimeError if it fails.
    """
    root = str(Path(__file__).resolve().parents[2])
    command = f"import sys; sys.path.insert(0, {root!r}); from {module} import *; {call}"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip().splitlines()[-1]
