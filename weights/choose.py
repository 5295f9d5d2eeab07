"""Find the weights of a model in what a training program saved: which mapping of the file, and behind which prefix."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from weights import convert

# What wrapping single layers puts into the middle of their names: torch.compile, activation checkpointing, FSDP.
INSIDE = re.compile(r"(?<=\.)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
AVERAGED = {"ema", "average", "averaged", "avg", "swa", "teacher", "shadow"}  # preferred to raw weights, a student's


@dataclass
class Choice:
    """The weights found. state: by their names behind `prefix`; rest: what stands beside them; others: what else would fit."""

    state: dict[str, Tensor]
    rest: dict[str, Tensor]
    path: str = ""  # keys of the file that lead to the mapping, "model.state_dict"
    prefix: str = ""  # taken off every name
    others: list[str] = field(default_factory=list)
    format: str | None = None  # of the port whose names became the authors'

    def __str__(self) -> str:
        return place(self.path, self.prefix)


def place(path: str, prefix: str) -> str:
    """Where weights are in a file, in words for a report and for the argument `which`."""
    return " ".join(part for part in (path, f"{prefix}*" if prefix else "") if part) or "the whole file"


def choose(content: dict, model: nn.Module, which: str | None = None) -> Choice:
    """The mapping of tensors in `content` that has most of the model's names, after a prefix that all of them carry.

    Of several that fit equally an average of the weights or a teacher (ema, averaged, swa, teacher in the name) comes first,
    then the first in the file. which: take only what has this text in its place, such as "student"; a place that is this text
    excludes others, so that "model" does not also stand for "model_ema". Raises ValueError if the file holds no named tensors,
    or none in such a place.
    """
    found = dict(mappings(content))
    if not found:
        raise ValueError(nothing(content))
    wanted = model.state_dict().keys()
    exact = which is not None and any(which in (path, place(path, p)) for path, state in found.items() for p in prefixes(state))
    tried: list[tuple[tuple, str, str]] = []
    for order, (path, state) in enumerate(found.items()):
        for prefix in prefixes(state):
            here = place(path, prefix)
            if which is not None and (which not in (path, here) if exact else which not in here):
                continue
            names = behind(prefix, state, wanted)
            averaged = bool(AVERAGED & set(re.split(r"[._]", path + "." + prefix)))
            tried.append(((fitting(names, model, wanted), averaged, -len(prefix), -order), path, prefix))
    if not tried:
        raise ValueError(f"no weights in a place with {which!r} in it; the file has {', '.join(map(repr, found)) or 'none'}")
    (score, *_), path, prefix = max(tried)
    if not score:  # another model's file: show its own names, without what is put before every name
        path = max(found, key=lambda key: (bool(AVERAGED & set(re.split(r"[._]", key))), len(found[key])))
        own, rest = without_wrappers(found[path], wanted)
        return Choice(own, rest, path)
    state = found[path]
    rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
    own = behind(prefix, state, wanted)
    others = [
        place(p, q)
        for (other, *_), p, q in tried
        if 2 * other > score and (p != path or not (q.startswith(prefix) or prefix.startswith(q)))
    ]
    return Choice(own, rest, path, prefix, others)


def behind(prefix: str, state: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it, and without the names of wrappers around single layers.

    wanted: the model's names, which keep such names if they have them.
    """
    names = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if any(INSIDE.search(name) for name in wanted):
        return names
    return {INSIDE.sub("", name): value for name, value in names.items()}


def fitting(state: dict[str, Tensor], model: nn.Module, wanted: Iterable[str]) -> int:
    """How many of the model's names these weights have, in any format that its converter knows."""
    try:
        return len(convert.to_native(state, model).keys() & set(wanted))
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError, TypeError):  # names of something else altogether
        return 0


def mappings(content: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(place, tensors by name) of every mapping that holds some, outermost first; a pickled module counts as its tensors."""
    if isinstance(content, (list, tuple)) and len(content) <= 100:
        content = {str(i): item for i, item in enumerate(content) if not isinstance(item, Tensor)}
    if depth > 5 or not isinstance(content, dict):
        return
    if isinstance(content, OrderedDict) and "_parameters" in vars(content):
        yield path, dict(module_tensors(content))
        return
    if tensors := {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}:
        yield path, tensors
    for key, value in content.items():
        if isinstance(key, str):
            yield from mappings(value, f"{path}.{key}" if path else key, depth + 1)


def module_tensors(module: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module that was pickled whole, read from the attributes of its stand-in."""
    if not isinstance(module, OrderedDict) or depth > 50:
        return
    for kind in ("_parameters", "_buffers"):
        own = vars(module).get(kind)
        for name, value in own.items() if isinstance(own, dict) else ():
            if isinstance(name, str) and isinstance(value, Tensor):
                yield prefix + name, value
    inner = vars(module).get("_modules")
    for name, value in inner.items() if isinstance(inner, dict) else ():
        yield from module_tensors(value, f"{prefix}{name}.", depth + 1)


def prefixes(names: Iterable[str]) -> list[str]:
    """What may stand before every name of a model among `names`: nothing, and dotted beginnings of many of them."""
    counts: dict[str, int] = {}
    names = list(names)
    for name in names:
        parts = name.split(".")[:-1]
        for depth in range(1, min(len(parts), 5) + 1):
            if parts[depth - 1].isdigit():
                break
            prefix = ".".join(parts[:depth]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    return ["", *(prefix for prefix, count in counts.items() if 30 * count >= len(names))]


def without_wrappers(state: dict[str, Tensor], wanted: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(names without what DDP, torch.compile, dense code and timm put before them, the rest)."""
    own: dict[str, Tensor] = state
    rest: dict[str, Tensor] = {}
    while prefix := next((p for p in convert.PREFIXES if any(key.startswith(p) for key in own)), None):
        if any(key.startswith(prefix) for key in wanted):
            break  # the model's own name
        rest |= {key: value for key, value in own.items() if not key.startswith(prefix)}
        own = {key.removeprefix(prefix): value for key, value in own.items() if key.startswith(prefix)}
    return own, rest


def nothing(content: dict) -> str:
    """What a file without named tensors holds."""
    numbered = [key for key, value in content.items() if isinstance(value, Tensor)]
    if numbered:
        return f"holds no named weights: its tensors stand under {', '.join(repr(key) for key in numbered[:4])}"
    return f"holds no weights: no tensors under {', '.join(str(key)[:40] for key in list(content)[:8]) or 'any name'}"
