"""Several real processes that train one configuration, forked from a server which has imported the package once."""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tiny

from train import engine, evaluation, results

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.engine"])


def start(world: int, folder: Path, changes: dict, resume: bool = False) -> list:
    """Processes that train the tiny configuration with these changes; what they print goes to FOLDER.txt."""
    return _start(world, folder, _fit, str(folder), changes, resume)


def evaluate(world: int, folder: Path) -> dict:
    """evaluation.evaluate_run of a run folder, in several processes."""
    finish(_start(world, folder, _evaluate, str(folder)), folder)
    return json.loads(Path(f"{folder}.json").read_text())


def _start(world: int, folder: Path, function: Callable, *arguments) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = [CONTEXT.Process(target=_run, args=(rank, world, port, str(folder), function, arguments)) for rank in range(world)]
    for process in found:
        process.start()
    return found


def _run(rank: int, world: int, port: int, folder: str, function: Callable, arguments: tuple) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    if world > 1:
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    multiprocessing.set_start_method("fork", force=True)  # loader workers start as they do in a process of a user
    output = os.open(f"{folder}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    function(*arguments)
    sys.stdout.flush()


def _fit(folder: str, changes: dict, resume: bool) -> None:
    results.curves = results.pictures = lambda *args: None  # drawing takes longer than these runs
    engine.fit(tiny.make(folder, **changes), resume)


def _evaluate(folder: str) -> None:
    metrics = evaluation.evaluate_run(folder)
    if os.environ["RANK"] == "0":
        Path(f"{folder}.json").write_text(json.dumps(metrics))


def finish(found: list, folder: Path) -> str:
    """What the processes printed, once all of them ended well."""
    for process in found:
        process.join(200)
    text = Path(f"{folder}.txt").read_text()
    assert [process.exitcode for process in found] == [0] * len(found), text[-3000:]
    return text


def fit(world: int, folder: Path, changes: dict, resume: bool = False) -> str:
    """`start` and `finish`."""
    return finish(start(world, folder, changes, resume), folder)


def wait_for_step(found: list, folder: Path, step: int) -> None:
    """Returns when the run has logged this step."""
    path, deadline = folder / "log.csv", time.monotonic() + 200
    while time.monotonic() < deadline and all(process.is_alive() for process in found):
        if path.is_file() and path.read_bytes().count(b"\n") > step:
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended, or never came, before step {step}: {Path(f'{folder}.txt').read_text()[-3000:]}")
