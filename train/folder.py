"""The run folder: whose it is, what may replace it, and the rows and settings that an earlier start left there.

A run may be killed between any two file operations. A folder in which no step was saved or logged is as good as a new one; the
configuration is the first file written and the last one removed, so a folder with steps always says what made them.
"""

import contextlib
import csv
import io
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

import backbones
from train import checkpoint
from train import config as configuration
from train.checks import RunError
from train.schema import Config

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module or nothing

RUN_FILES = (
    "log.csv",
    "metrics.csv",
    "tensorboard",
    "checkpoints",
    "model.safetensors",
    "last.safetensors",
    "summary.json",
    "curves.png",
    "predictions.png",
    "config.yaml",  # the last: see above
)
LOCK = ".lock"
# What a run reads before its first step alone.
BEGINNINGS = ("model.pretrained:", "model.checkpoint:", "model.checkpoint_which:")
# What the best metric depends on: where one of these has changed, numbers of before and after do not compare.
MEASURES = (
    "task.",
    "infer.",
    "data.name",
    "data.args",
    "data.size",
    "data.eval_resize",
    "data.mean",
    "data.std",
    "data.image_range",
    "augment.eval_crop",
)


def versions() -> dict[str, str]:
    """What made a run: versions of the zoo, torch and timm."""
    return {"backbone-zoo": backbones.__version__, "torch": str(torch.__version__), "timm": timm.__version__}


# ------------------------------------------------------------------------------------------------------------------- one owner


@contextlib.contextmanager
def claimed(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """The run folder for the processes of this run alone; it is made if need be, and removed again if nothing was put in.

    Every process calls it; the main one holds the lock. Raises RunError, on all of them, if another run has the folder.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    trouble: list[str | None] = [None]
    lock = Lock(folder / LOCK)
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trouble[0] = lock.acquire()
        except OSError as error:
            trouble[0] = f"the run folder {folder} cannot be used: {error}; choose another run.dir"
    if accelerator.num_processes > 1:
        broadcast_object_list(trouble)
    if trouble[0] is not None:
        raise RunError(trouble[0])
    try:
        yield
    finally:
        lock.release()
        if accelerator.is_main_process:
            for path in made:
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()


class Lock:
    """A file that one process holds at a time; the system lets go of it when the process ends, however it ends.

    Record locks (POSIX) work over NFS and are not inherited by loader workers. Where the file system has none, the process that
    the file names counts while it lives on this host.
    """

    held: set[Path] = set()  # by this process: its own record lock would not stop it

    def __init__(self, path: Path):
        self.path, self.handle = path.absolute(), -1

    def acquire(self) -> str | None:
        """Takes the lock. Returns None, or a sentence that says who has it."""
        if self.path in self.held:
            return self._taken("this process")
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            holder = os.read(handle, 200).decode("utf-8", "replace").strip()
            locked = _record_lock(handle)
            if locked is False or (locked is None and _alive(holder)):
                os.close(handle)
                return self._taken(holder or "another process")
            try:
                current = os.stat(self.path).st_ino == os.fstat(handle).st_ino
            except FileNotFoundError:
                current = False
            if current:
                break
            os.close(handle)  # released, and so removed, by its last holder while it was opened
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        self.handle = handle
        self.held.add(self.path)
        return None

    def _taken(self, holder: str) -> str:
        return f"{self.path.parent} is in use by another run ({holder}): wait for it, stop it, or choose another run.dir"

    def release(self) -> None:
        """Removes the file, then lets go of it: nobody gets a lock on a file that is about to vanish."""
        if self.handle < 0:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self.handle)
        self.handle = -1
        self.held.discard(self.path)


def _record_lock(handle: int) -> bool | None:
    """Whether the file could be locked; None where the system or the file system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _alive(holder: str) -> bool:
    """Whether "process 12 on HOST since ..." still runs on this host."""
    words = holder.split()
    if len(words) < 4 or not words[1].isdigit() or words[3] != socket.gethostname() or os.name == "nt":
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return int(words[1]) != os.getpid()


# ------------------------------------------------------------------------------------------------------- what is in the folder


def in_use(folder: Path) -> bool:
    """Whether a folder holds anything but the lock and a start that made no step: such a folder is as good as a new one."""
    if not folder.is_dir():
        return False
    found = {path.name for path in folder.iterdir() if path.name != LOCK and not path.name.endswith(".tmp")}
    if "config.yaml" not in found and found - {*RUN_FILES, "unreadable.txt"}:
        return True  # files of somebody else
    results = {"model.safetensors", "last.safetensors", "summary.json"}
    logged = any(_rows(folder / name)[1] for name in ("log.csv", "metrics.csv"))
    return bool(found & results or logged or checkpoint.steps(folder / "checkpoints"))


def check_folder(folder: Path, config: Config, resume: bool, accept_changes: bool) -> list[str]:
    """Whether the run may use its folder; returns the changes of the configuration that the user has accepted.

    Raises FileExistsError for a folder in use, FileNotFoundError if there is no run to resume, ValueError with the differences
    if a resumed run's config has changed, or with the key that cannot change.

    Args:
        folder: of the run.
        config: resolved.
        resume: go on from the newest intact checkpoint.
        accept_changes: although the configuration has changed.
    """
    saved = folder / "config.yaml"
    if not in_use(folder):
        return []
    if not resume:
        if not config.run.overwrite:
            raise FileExistsError(
                f"{folder} exists; choose another --run.dir, go on with --resume, or replace it with --run.overwrite=true"
            )
        if not saved.is_file():
            raise FileExistsError(f"{folder} holds no run (no config.yaml) and is not overwritten; choose another run.dir")
        return []
    if not saved.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml")
    try:
        old = yaml.safe_load(saved.read_text(encoding="utf-8"))
        new = configuration.as_dict(config)
        for key in ("overwrite", "dir"):  # a folder may have been moved
            old["run"].pop(key, None), new["run"].pop(key, None)
        kinds = old["optim"]["name"], new["optim"]["name"]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError, RecursionError) as error:
        if accept_changes:
            return [f"{saved} cannot be read"]
        raise ValueError(
            f"{saved} is damaged ({' '.join(str(error).split())[:100]}): put back what the run was started with, or add "
            "--accept-changes to go on with the configuration given now"
        ) from error
    changes = configuration.difference(old, new)
    if changes and not accept_changes:
        raise ValueError(
            f"the config has changed since {folder} was started:\n  " + "\n  ".join(changes) + "\n"
            "add --accept-changes to go on with the new one, or choose another run.dir"
        )
    if kinds[0] != kinds[1] and checkpoint.steps(folder / "checkpoints"):
        raise ValueError(
            f"optim.name cannot change from {kinds[0]} to {kinds[1]} in a run that goes on, because its moments belong to one "
            f"optimiser; start another run with --model.checkpoint={folder}"
        )
    begins = [line for line in changes if line.startswith(BEGINNINGS) and not line.endswith(("-> None", "-> False"))]
    if begins and checkpoint.steps(folder / "checkpoints"):
        raise ValueError(
            f"{begins[0]}: this cannot change in a run that goes on, because its weights are those of its last step; start "
            "another run.dir"
        )
    return changes


def open_folder(folder: Path, config: Config, resume: bool) -> None:
    """Makes the run folder, without the files of the run that it replaces, and writes its config.yaml."""
    if folder.is_dir() and not (resume and in_use(folder)):
        for name in ("unreadable.txt", *(f".{name}.tmp" for name in RUN_FILES), *RUN_FILES):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    made_by = ", ".join(f"{name} {number}" for name, number in versions().items())
    text = f"# Written by {made_by}\n{configuration.as_yaml(config)}"
    checkpoint.write(folder / "config.yaml", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def repair_rows(folder: Path, step: int, due: Mapping[str, int], say: Callable[[str], None]) -> None:
    """Brings log.csv and metrics.csv to the state they had at `step`, where a resumed run goes on; says what is lost.

    Later rows are written again.

    Args:
        folder: of the run.
        step: of the checkpoint.
        due: file -> steps from one of its rows to the next, where that is known.
        say: is told what is lost.
    """
    for name in ("log.csv", "metrics.csv"):
        path = folder / name
        header, rows, damaged = _table(path)
        kept = [row for row in rows if int(row[0]) <= step]
        found = {int(row[0]) for row in kept}
        lost = [wanted for wanted in range(due[name], step + 1, due[name]) if wanted not in found] if name in due else []
        if lost or damaged:
            first = f", the first of step {lost[0]}" if lost else ""
            kept_as = f" (kept as {name}.damaged)" if damaged else ""
            if damaged:
                shutil.copyfile(path, f"{path}.damaged")
            say(
                f"{path} is damaged: {len(lost)} rows up to step {step} are missing{first}, {damaged} lines cannot be read"
                f"{kept_as}; the run goes on and its curves have a gap"
            )
        if path.is_file():
            text = io.StringIO(newline="")
            csv.writer(text).writerows([header, *kept] if kept else [])
            checkpoint.write(path, partial(Path.write_text, data=text.getvalue(), encoding="utf-8", newline=""))


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and readable rows of a CSV file of a run."""
    header, rows, _ = _table(path)
    return header, rows


def _table(path: Path) -> tuple[list[str], list[list[str]], int]:
    """(header, readable rows, number of lines that are none) of a CSV file of a run; empty if there is no file."""
    if not path.is_file():
        return [], [], 0
    lines = [line for line in path.read_bytes().decode("utf-8", "replace").replace("\0", "\ufffd").splitlines() if line]
    table = list(csv.reader(lines))
    if not table or table[0][:1] != ["step"]:
        return [], [], len(table)
    header = table[0]
    rows = [row for row in table[1:] if len(row) == len(header) and row[0].isdecimal() and all(map(_number, row))]
    return header, rows, len(table) - 1 - len(rows)


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text  # a term that this step had not
    return True
