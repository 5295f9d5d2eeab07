"""Checkpoints that survive being killed while they are written.

RUN/checkpoints/step_00000120/ holds model.safetensors, averaged.safetensors (with weight averaging), state.pt (optimiser,
schedule, scaler, progress; loadable with weights_only=True) and checkpoint.json, which lists size and SHA-256 of the others.
The folder is written under another name, every file fsynced, and renamed, so a folder with the right name is complete unless
the disk failed; the digests tell. The last two are kept.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weights.read import digest

KEEP = 2
# What reading a damaged file raises: safetensors, torch's zip reader and its restricted unpickler each have their own.
DAMAGE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Writes a file through `save(temporary path)`, fsync and rename: at any moment `path` is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save(temporary)
        temporary.chmod(0o644)  # safetensors makes its files private
        _sync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it takes what is left
        raise
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Has a file, or the names in a folder, written to the disk."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows syncs only what may be written
    except OSError:
        if folder:  # Windows opens none, and needs no sync of names
            return
        raise
    try:
        os.fsync(handle)
    except OSError:
        if not folder:  # some network file systems sync files only
            raise
    finally:
        os.close(handle)


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict safetensors accepts: contiguous CPU copies, none sharing memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save_weights(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """State dict -> safetensors file, atomically. about: text stored in its header."""
    write(path, lambda temporary: save_file(plain(tensors), temporary, metadata=dict(about)))


def save(folder: Path, step: int, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Writes the checkpoint of a step below `folder` and removes all but the last two.

    Args:
        folder: of the checkpoints.
        step: whose state it is.
        weights: file stem -> state dict.
        state: tensors, numbers, strings and containers of them.
    """
    target = folder / f"step_{step:08d}"
    temporary = folder / f".{target.name}.tmp"
    for unfinished in folder.glob(".step_*.tmp"):  # left by a process that was killed
        shutil.rmtree(unfinished)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in weights.items():
            save_file(plain(tensors), temporary / f"{name}.safetensors", metadata={"step": str(step)})
        torch.save(dict(state), temporary / "state.pt")
        digests = {file.name: {"bytes": file.stat().st_size, "sha256": digest(file)} for file in sorted(temporary.iterdir())}
        about = json.dumps({"step": step, "files": digests}, indent=1)
        (temporary / "checkpoint.json").write_text(about, encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk it takes what is left
        raise
    shutil.rmtree(target, ignore_errors=True)  # the same step, written again after a resume
    os.rename(temporary, target)
    _sync(folder)
    for old in steps(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def steps(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; unfinished ones do not count."""
    return sorted(folder.glob("step_*")) if folder.is_dir() else []


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        listed = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))["files"]
        files = {str(name): (int(about["bytes"]), str(about["sha256"])) for name, about in listed.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "checkpoint.json is missing or unreadable"
    for name in ("model.safetensors", "state.pt"):
        if name not in files:
            return f"checkpoint.json does not list {name}"
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if digest(file) != sha256:
            return f"{name} does not have the content that was written"
    return None


Content = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]


def newest(folder: Path, say: Callable[[str], None] = print) -> tuple[Path, Content] | None:
    """The newest intact checkpoint below `folder` and its content, or None. Says why a newer one is passed over.

    Raises ValueError if there are checkpoints but none is intact: starting again silently would lose the run.
    """
    found = steps(folder)
    for path in reversed(found):
        reason = fault(path)
        if reason is None:
            try:
                return path, load(path)
            except DAMAGE as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        say(f"checkpoint {path.name} is damaged ({reason}); looking for the one before it")
    if found:
        raise ValueError(f"no intact checkpoint in {folder}: start again with --run.overwrite=true or another run.dir")
    return None


def latest(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The folder of `newest`."""
    found = newest(folder, say)
    return None if found is None else found[0]


def load(path: Path) -> Content:
    """(weights by file stem, state) of a checkpoint folder, on the CPU. Executes nothing from the files."""
    weights = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return weights, torch.load(path / "state.pt", map_location="cpu", weights_only=True)
