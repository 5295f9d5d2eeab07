"""Where the zoo's packages come from: a user's file of the same name, found first, would stand in for one of them."""

import importlib.util
from pathlib import Path

OURS = ("backbones", "configs", "heads", "train", "weights")


def origins() -> dict[str, str]:
    """Name -> the file or folder Python would import it from, "nowhere" if there is none."""
    found = {}
    for name in OURS:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        found[name] = next((place for place in places if place), "nowhere")
    return found


def shadowed() -> list[str]:
    """A sentence per package that is not the one beside this file."""
    root = Path(__file__).resolve().parent.parent
    return [
        f"{name} is imported from {place} and not from {root / name}: rename that file or folder, or start from another folder"
        for name, place in origins().items()
        if not Path(place).resolve().is_relative_to(root / name)
    ]
