"""Where a published checkpoint lies on this machine; downloads it and checks its hash when it must."""

import os
import re
from pathlib import Path

import torch

from weights import manifest
from weights.choose import mappings
from weights.read import digest, open_checkpoint

HEAD = r"(^|\.)head\.bias$"  # the classifier's bias in the authors' files
GENERIC = {"model.safetensors", "pytorch_model.bin"}  # names that every model on a hub shares


def folders(cache_dir: str | Path | None = None) -> list[Path]:
    """Where checkpoints are looked for, the first being where a download goes: cache_dir, $ZOO_WEIGHTS, torch's hub folder."""
    named = [cache_dir, os.environ.get("ZOO_WEIGHTS"), Path(torch.hub.get_dir()) / "checkpoints"]
    return [Path(folder) for folder in named if folder]


def file_name(checkpoint: dict) -> str:
    """The name on disk of a checkpoint of the manifest."""
    name = checkpoint.get("file_name") or checkpoint["url"].rsplit("/", 1)[-1]
    if name in GENERIC:
        return f"{checkpoint['name']}.{checkpoint['tag']}{Path(name).suffix}"
    return name


def fetch(name: str, tag: str | None = None, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """The file of the manifest's checkpoint `name`.`tag`, downloaded unless it lies in one of `folders`, its hash checked.

    Raises ValueError if there is no such checkpoint, if it was never published, or if the file's sha256 is not the manifest's,
    and FileNotFoundError, which says which file to put where, if it cannot be downloaded.

    Args:
        name: of the model or the dense file.
        tag: of its checkpoint, None for the first one.
        cache_dir: where files are looked for first and kept, None for the usual folders.
        progress: show how much has come.
    """
    checkpoint = manifest.find(name, tag)
    if not checkpoint:
        raise ValueError(f"the manifest has no checkpoint {name}{f'.{tag}' if tag else ''}")
    return _fetch(checkpoint, cache_dir, progress)


def _fetch(checkpoint: dict, cache_dir: str | Path | None, progress: bool) -> Path:
    if address(checkpoint) is None:
        raise ValueError(
            f"there are no weights to download for {checkpoint['name']}: {checkpoint['note']}; use pretrained=False, or name a "
            "file of your own in pretrained_cfg_overlay=dict(file=...)"
        )
    file, places = file_name(checkpoint), folders(cache_dir)
    expected = checkpoint.get("sha256")
    if found := next((place / file for place in places if (place / file).is_file()), None):
        check_hash(found, expected, f"delete it and fetch it again from {address(checkpoint)}")
        return found
    target = places[0] / file
    if "url" not in checkpoint:
        raise FileNotFoundError(
            f"{file} is published at {checkpoint['by_hand']} and cannot be downloaded by a program: "
            f"fetch it by hand, then put it at {target}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(checkpoint["url"], str(target), progress=progress)
    except OSError as error:  # no network, no such page, no space: urllib's errors are OSErrors
        raise FileNotFoundError(
            f"could not download {checkpoint['url']} ({error}): fetch it by hand, then put it at {target} "
            f"(or into another folder that the environment variable ZOO_WEIGHTS names)"
        ) from error
    try:
        check_hash(target, expected, "the download was deleted; try again, or fetch the file by hand")
    except ValueError:
        target.unlink()
        raise
    return target


def address(checkpoint: dict) -> str | None:
    """Where a person finds the file; None if the authors published none."""
    return checkpoint.get("url") or checkpoint.get("by_hand")


def check_hash(path: Path, expected: str | None, advice: str) -> None:
    """ValueError, ending in `advice`, if the file's sha256 is not `expected`; nothing is checked if that is None."""
    if expected is None:
        return
    if (found := digest(path)) != expected:
        raise ValueError(f"{path} is not the published file: its sha256 is {found}, not {expected}; {advice}")


def overlay(name: str, pretrained_cfg=None, pretrained_cfg_overlay: dict | None = None, cache_dir=None) -> dict:
    """timm's pretrained_cfg_overlay for model `name` with the weights' local `file` filled in.

    A state dict, a hub name or a
    local folder is left to timm; a user's own file or address is not checked against the manifest.

    Args:
        name: of the model.
        pretrained_cfg: as a user gives it to timm.create_model.
        pretrained_cfg_overlay: as a user gives it to timm.create_model.
        cache_dir: as a user gives it to timm.create_model.
    """
    from timm.models import resolve_pretrained_cfg

    given = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(name, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=given)
    if cfg.state_dict or cfg.source or cfg.hf_hub_id:
        return given
    if cfg.file:
        if not Path(cfg.file).is_file():
            raise FileNotFoundError(f"pretrained_cfg_overlay names the weights file {cfg.file}, which does not exist")
        return given | {"file": cfg.file}
    checkpoint = manifest.find(name, cfg.tag)
    if checkpoint and cfg.url == address(checkpoint):
        given["file"] = str(_fetch(checkpoint, cache_dir, progress=True))
        if checkpoint.get("classes_from_file"):
            states = [state for _, state in mappings(open_checkpoint(given["file"]))]
            biases = [value for state in states for key, value in state.items() if re.search(HEAD, key)]
            if not biases:
                raise ValueError(f"{given['file']} has no classifier (head.bias) that says how many classes it knows")
            given["num_classes"] = len(biases[0])
        return given
    if cfg.url:
        return given | {"file": str(_fetch({"url": cfg.url, "name": name, "tag": cfg.tag}, cache_dir, progress=True))}
    return given  # no weights: timm says so
