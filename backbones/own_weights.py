"""Fails with a sentence where a user's weights.py, or a folder of that name, would stand in for our package `weights`."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.find_spec("weights")
_found = _spec.origin if _spec is not None else None
if _found is None or not Path(_found).resolve().is_relative_to(ROOT / "weights"):
    raise ImportError(
        f"backbones needs the package weights beside it, {ROOT / 'weights'}, and Python finds {_found or 'another'} first: "
        "rename that file or folder, or start from another folder"
    )
