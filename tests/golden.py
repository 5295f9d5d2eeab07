"""Golden fixtures: tensors and JSON descriptions written by the authors' code.

Looked for in the folder of the environment variable ZOO_GOLDEN, else ../shared/golden beside the checkout, else tests/goldens.
"""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent


def folder() -> Path:
    """The folder that holds the fixtures."""
    if os.environ.get("ZOO_GOLDEN"):
        return Path(os.environ["ZOO_GOLDEN"])
    shared = ROOT.parent.parent / "shared" / "golden"
    return shared if shared.is_dir() else ROOT / "goldens"


def cases(prefix: str, exclude: str | None = None) -> list:
    """Parameters for pytest: the fixtures that start with `prefix` and not with `exclude`; a skip if there are none."""
    names = sorted(path.stem for path in folder().glob(f"{prefix}*.json"))
    names = [name for name in names if exclude is None or not name.startswith(exclude)]
    return names or [pytest.param(None, marks=pytest.mark.skip(reason=f"no fixture {prefix}*.json in {folder()}"))]


def load(case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(JSON description, tensors) of a fixture."""
    return json.loads((folder() / f"{case}.json").read_text()), load_file(folder() / f"{case}.safetensors")


def state(tensors: dict[str, torch.Tensor], prefix: str = "state/") -> dict[str, torch.Tensor]:
    """The official state dict stored in a fixture."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def tolerance(info: dict) -> dict[str, float]:
    """rtol and atol as the fixture's JSON states them."""
    stated = info.get("suggested_tolerance") or info.get("tolerance") or {"atol": info.get("suggested_atol")}
    if stated.get("atol") is None:
        raise KeyError(f"fixture {info.get('case')} states no tolerance; keys: {sorted(info)}")
    return {"atol": stated["atol"], "rtol": stated.get("rtol", 0.0)}


def official(family: str) -> dict[str, dict]:
    """The authors' full-size variants: name -> {"params": count, "keys": {name: shape}}, from keys_<family>.json in the folder
    `facts` beside the fixtures; empty if there is none."""
    for place in (folder().parent / "facts", ROOT.parent.parent / "shared" / "facts"):
        if (path := place / f"keys_{family}.json").is_file():
            return json.loads(path.read_text())
    return {}


def variants(family: str, include: str = "") -> list:
    """Parameters for pytest: the names in `official` that hold `include`; a skip if there are none."""
    names = [name for name in official(family) if include in name]
    return names or [pytest.param(None, marks=pytest.mark.skip(reason=f"no facts/keys_{family}.json beside the fixtures"))]


def keys(family: str) -> dict[str, dict]:
    """Official variant -> {"params": number of parameters, "keys": name -> shape} of a family's published full-size models.

    Read from keys_<family>.json in ../shared/facts beside the checkout, else from tests/goldens/keys.
    """
    shared = ROOT.parent.parent / "shared" / "facts" / f"keys_{family}.json"
    if shared.is_file():
        return json.loads(shared.read_text())
    return json.loads(gzip.decompress((ROOT / "goldens" / "keys" / f"keys_{family}.json.gz").read_bytes()))


def case(name: str) -> Path:
    """The folder of a case, something a user met: in ZOO_CASES, else ../shared/cases, else tests/cases."""
    places = [Path(os.environ["ZOO_CASES"])] if os.environ.get("ZOO_CASES") else [ROOT.parent.parent / "shared" / "cases"]
    return next((place / name for place in places if (place / name).is_dir()), ROOT / "cases" / name)
