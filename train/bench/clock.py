"""Clocks and memory of the benchmarks, made so that a busy machine does not lie.

On a CPU: one thread, process CPU time (user + system, without the waiting for other programs), the variants interleaved
A B C A B C in one process, median and minimum of the rounds. Several threads are timed by the wall, which only an idle machine
allows. On CUDA: events around each run, interleaved too.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
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

from train.halves import bfloat16_instructions


def machine(device: str, threads: int = 1) -> str:
    """One line that says what the numbers were measured on."""
    facts = machine_facts(device, threads)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{facts['date']}: {facts['processor']} ({facts['instructions']}), {facts['clock']}, {versions}"


def machine_facts(device: str, threads: int = 1) -> dict[str, Any]:
    """What the numbers were measured on: date, processor, its vector instructions as torch uses them, clock, versions."""
    alone = "one thread, process CPU time" if threads == 1 else f"{threads} threads, wall time"
    on_cuda = device == "cuda"
    return {
        "date": str(datetime.date.today()),
        "processor": torch.cuda.get_device_name() if on_cuda else processor(),
        "instructions": f"CUDA {torch.version.cuda}" if on_cuda else instructions(),
        "clock": "CUDA events" if on_cuda else alone,
        "threads": threads,
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "Python": platform.python_version()},
    }


def instructions() -> str:
    """The widest vector instructions torch uses on this CPU, and those for bfloat16 products that the CPU has."""
    return " + ".join([torch.backends.cpu.get_cpu_capability(), *bfloat16_instructions()])


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
def one_thread(threads: int = 1) -> Iterator[None]:
    """Sets torch to one thread inside, or to `threads`: with two, wall and CPU time both include waiting for the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(variants: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """(median, minimum) milliseconds of each variant over `rounds` interleaved rounds, after one round that does not count."""
    return {name: (statistics.median(spent), min(spent)) for name, spent in interleaved(variants, rounds, device).items()}


def interleaved(variants: dict[str, Callable[[], Any]], rounds: int, device: str, threads: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each variant in each of `rounds` interleaved rounds, after one round that does not count.

    Times of the same round are neighbours, so their ratio holds on a machine whose speed drifts.

    Args:
        variants: name -> what is timed.
        rounds: that count.
        device: "cpu" or "cuda".
        threads: of the CPU.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    clock = time.process_time if threads == 1 else time.perf_counter
    with one_thread(threads):
        for counts in (False, *[True] * rounds):
            for name, variant in variants.items():
                spent = once(variant, device, clock)
                if counts:
                    times[name].append(spent)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile) of the rounds' ratios of two interleaved variants."""
    found = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return middle, low, high


def once(variant: Callable[[], Any], device: str, clock: Callable[[], float] = time.process_time) -> float:
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
    begun = clock()
    variant()
    spent, runs = clock() - begun, 1
    if spent < 0.02:
        begun, runs = clock(), 0
        while (spent := clock() - begun) < 0.02 and runs < 100:
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


def resident() -> int:
    """Bytes that this process has in memory now."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    raise OSError("this system's /proc/self/status has no VmRSS line, so memory cannot be measured")


class AddedPeak:
    """Counts what code adds to the peak memory: `start()` before it, `megabytes()` after it.

    On a CPU freed memory is given back to the system first and the kernel's mark of the peak is reset. Where the kernel does
    not allow that, the peak of everything before counts, so `start` then needs a process in which nothing large has run.
    """

    def __init__(self, device: str):
        self.device = device
        self.before = 0

    def start(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self.before = resident()

    def megabytes(self) -> float:
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_resident()
        return (peak - self.before) / 1e6


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
