"""Foreign state dicts -> ours, and back; one module per family, named by the model's attribute `family`.

A family's module defines `to_native(state_dict, model)`, `to_official(state_dict, model)` and `source_format(keys)`. What all
of them share is here: taking off the wrappings of a training program, finding the backbone inside a wrapped model, and
resampling the tables and position embeddings whose shape depends on the image size.
"""

import contextlib
import contextvars
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")  # an average is preferred to the raw weights
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")  # put before every name by DDP, torch.compile, dense code, timm

INNER = ("module", "_orig_mod", "backbone", "model")  # where DDP, torch.compile, a dense predictor, timm keep the model


def convert_state_dict(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's content in any known format -> the names and shapes of `model`, or of the backbone inside a mere wrapper.

    Native names pass unchanged. What a dense-prediction file holds beside the backbone (decode_head.*) is left out for a
    backbone, and converted for a dense predictor.
    """
    model = next((module for module in layers(model) if hasattr(module, "family")), backbone(model))
    return to_native(split(unwrap(state_dict), model)[0], model)


def rename(key: str, rules: Iterable[tuple[str, str | Callable[[re.Match], str]]]) -> str:
    """The first rule (regular expression, replacement) that matches rewrites the key; a key that none matches stays."""
    for pattern, replacement in rules:
        new, count = re.subn(pattern, replacement, key)
        if count:
            return new
    return key


def unwrap(checkpoint: dict) -> dict[str, Tensor]:
    """The state dict inside what a training program saved: its averaged weights if there are any, else its weights."""
    for name in WRAPPERS:
        if isinstance(checkpoint.get(name), dict):
            return unwrap(checkpoint[name])
    return {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}


def split(state_dict: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what belongs to the backbone without its prefixes, the rest under its names in the file).

    A prefix that some but not all names carry is the dense-prediction code's: the others are heads.
    """
    own, rest = state_dict, {}
    while prefix := next((p for p in PREFIXES if any(key.startswith(p) for key in own)), None):
        if any(key.startswith(prefix) for key in model.state_dict()):
            break  # the model's own name
        rest |= {key: value for key, value in own.items() if not key.startswith(prefix)}
        own = {key.removeprefix(prefix): value for key, value in own.items() if key.startswith(prefix)}
    return own, rest


def layers(model: nn.Module) -> list[nn.Module]:
    """`model` and what it wraps, outermost first: through `.module`, `.backbone` and `.model` (timm's feature wrapper)."""
    found = [model]
    while inner := next((m for name in INNER if isinstance(m := getattr(found[-1], name, None), nn.Module)), None):
        found.append(inner)
    return found


def backbone(model: nn.Module) -> nn.Module:
    """The backbone inside `model`, or `model` itself if it wraps nothing."""
    return layers(model)[-1]


def converter(model: nn.Module) -> ModuleType | None:
    """The module of weights/convert that knows the formats of the model's family; None if there is none (timm's models)."""
    name = f"weights.convert.{getattr(model, 'family', None)}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def to_native(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names without wrappings -> the names and shapes of `model`, a backbone of the zoo or of timm (by timm's own filter)."""
    if module := converter(model):
        return module.to_native(state_dict, model)
    timm_filter = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return timm_filter(state_dict, model) if timm_filter else state_dict


def source_format(keys: Iterable[str], model: nn.Module) -> str:
    """Which program wrote these names: "official", "official-dense", "timm", "huggingface" or "native"."""
    module, keys = converter(model), list(keys)
    if module:
        return module.source_format(keys)
    return "native" if set(keys) & set(model.state_dict()) else "official"


_resized = contextvars.ContextVar("resized", default=None)


@contextlib.contextmanager
def recording() -> Iterator[dict[int, tuple]]:
    """Inside, the mapping it gives collects id of a resampled tensor -> its shape before. Keep the tensors while you use it."""
    token = _resized.set({})
    try:
        yield _resized.get()
    finally:
        _resized.reset(token)


def note(new: Tensor, old: Tensor) -> Tensor:
    """new, remembered as a resampling of old if somebody is `recording`."""
    if _resized.get() is not None:
        _resized.get()[id(new)] = tuple(old.shape)
    return new


def resample_bias_table(
    table: Tensor, shape: tuple[int, int], old_shape: tuple[int, int] | None = None, mode: str = "bicubic"
) -> Tensor:
    """A relative position bias table for another window: one image per head, resized (align_corners False, no antialias).

    table: heads x rows x columns (NAT), or positions x heads with row-major positions (Swin); shape: new (rows, columns), that
    is 2 * window - 1 each; old_shape: (rows, columns) of a flat table, square unless given. Returns the layout that came in,
    and the same tensor when its size is right already. Raises ValueError if a flat table does not have old_shape's positions.
    """
    flat = table.ndim == 2
    if flat:
        rows, columns = old_shape or square(len(table), "a bias table")
        if rows * columns != len(table):
            raise ValueError(f"a bias table of {len(table)} positions is not {rows}x{columns}")
        images = table.T.reshape(-1, rows, columns)
    elif table.ndim == 3:
        images = table
    else:
        raise ValueError(f"a bias table has 2 or 3 dimensions, got shape {tuple(table.shape)}")
    if images.shape[-2:] == tuple(shape):
        return table
    images = _resize(images[None], shape, mode, antialias=False)[0]
    return note(images.flatten(1).T.contiguous() if flat else images, table)


def resample_position_embedding(
    embedding: Tensor,
    grid: tuple[int, int],
    prefix_tokens: int = 0,
    old_grid: tuple[int, int] | None = None,
    mode: str = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """A learned position embedding for another grid (align_corners False).

    embedding: 1 C h w, or 1 tokens C with `prefix_tokens` entries (class token, registers) before the row-major grid; they are
    kept as they are. grid: new (rows, columns); old_grid: (rows, columns) of a token embedding, square unless given. Returns
    the layout that came in, and the same tensor when its grid is right already.
    """
    if embedding.ndim == 4:
        if embedding.shape[-2:] == tuple(grid):
            return embedding
        return note(_resize(embedding, grid, mode, antialias), embedding)
    if embedding.ndim != 3:
        raise ValueError(f"a position embedding has 3 or 4 dimensions, got shape {tuple(embedding.shape)}")
    prefix, tokens = embedding[:, :prefix_tokens], embedding[:, prefix_tokens:]
    rows, columns = old_grid or square(tokens.shape[1], "a position embedding")
    if rows * columns != tokens.shape[1]:
        raise ValueError(f"a position embedding of {tokens.shape[1]} tokens is not {rows}x{columns}")
    if (rows, columns) == tuple(grid):
        return embedding
    image = tokens.mT.reshape(1, -1, rows, columns)
    return note(torch.cat([prefix, _resize(image, grid, mode, antialias).flatten(2).mT], 1), embedding)


def square(count: int, what: str) -> tuple[int, int]:
    """(side, side) of `count` row-major positions; ValueError, naming `what`, if they make no square."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{what} of {count} positions is not square: give its old rows and columns")
    return side, side


def _resize(image: Tensor, grid: tuple[int, int], mode: str, antialias: bool) -> Tensor:
    """Interpolated in float32 whatever the type, as bfloat16 weights would lose digits."""
    resized = F.interpolate(image.float(), tuple(grid), mode=mode, align_corners=False, antialias=antialias)
    return resized.to(image.dtype)
