"""Foreign state dicts -> ours, and back; one module per family, named by the model's attribute `family`.

A family's module defines `to_native(state_dict, model)` and `to_official(state_dict, model)`, which rename,
`source_format(keys)` and, where a shape depends on the image size or the kernel, `resize(name, value, model)`: the tensor for
the model's size, or as it is. What all of them share is here: finding the backbone inside a wrapped model, timm's own filters,
and fitting the sizes.
"""

import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType

from torch import Tensor, nn

from weights.convert import huggingface, mmsegmentation
from weights.rules import rename as rename  # converters take it from here

PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")  # put before every name by DDP, torch.compile, dense code, timm

INNER = ("module", "_orig_mod", "backbone", "model")  # where DDP, torch.compile, a dense predictor, timm keep the model


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
    """Names without wrappings -> the names of `model`, a backbone of the zoo or of timm (whose own filter also resizes)."""
    state_dict = authors(state_dict)[0]
    if module := converter(model):
        return module.to_native(state_dict, model)
    if state_dict.keys() <= model.state_dict().keys():
        return dict(state_dict)  # timm's filters can take a model without its classifier for an old one, and rename it again
    return timm_filter(state_dict, model)


def authors(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    """(names of a port of a model -> its authors', the program of the port); unchanged and None if they are of no port."""
    if found := huggingface.to_authors(state_dict):
        return found, "huggingface"
    if found := mmsegmentation.to_authors(state_dict):
        return found, "official-dense"
    return state_dict, None


def timm_filter(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What the filter of a timm model makes of foreign names and other sizes; unchanged if its architecture has none.

    ValueError if the filter cannot read the names: timm's filters expect the files they were written for.
    """
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    apply = next((f for module in modules if (f := getattr(module, "checkpoint_filter_fn", None))), None)
    if apply is None:
        return dict(state_dict)
    try:
        return dict(apply(dict(state_dict), model))
    except (
        Exception
    ) as error:  # KeyError, AttributeError, RuntimeError: whatever a name or a shape that it does not know leads to
        raise ValueError(
            f"timm cannot read these names as weights of {type(model).__name__}, {', '.join(list(state_dict)[:3])}, ... "
            f"({type(error).__name__}: {error})"
        ) from error


Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name -> (shape in the file, shape now)


def fit_shapes(
    native: dict[str, Tensor], model: nn.Module, source: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], Shapes]:
    """Tensors whose size depends on the image size or the kernel, resampled for `model`; and which were.

    native: by the model's names; source: the file's names and tensors, which say by what rule a dense file is resized, and what
    timm's filter has resized already. What cannot be resampled stays as it is.
    """
    module, source = converter(model), source or {}
    if module is not None and hasattr(module, "fit_shapes"):
        return module.fit_shapes(native, model, source)
    own = model.state_dict()
    wrong = [name for name, value in native.items() if name in own and own[name].shape != value.shape]
    fitted, resized = dict(native), {}
    if module is not None and hasattr(module, "resize"):
        fitted |= {name: module.resize(name, native[name], model) for name in wrong}
    elif module is None:
        if wrong and (filtered := timm_filter(native, model)):
            fitted |= {name: filtered[name] for name in wrong if name in filtered and filtered[name].shape == own[name].shape}
        prefix = getattr(model, "num_prefix_tokens", 0)
        for name in source.keys() & native.keys():
            old, new = source[name], native[name]
            without_prefix = old.ndim == 3 and 0 <= old.shape[1] - new.shape[1] <= prefix  # entries of tokens taken off
            if old.ndim == new.ndim and old.numel() != new.numel() and not without_prefix:
                resized[name] = tuple(old.shape), tuple(new.shape)
    for name in wrong:
        if native[name].shape != fitted[name].shape:
            resized[name] = tuple(native[name].shape), tuple(fitted[name].shape)
    return fitted, resized


def source_format(keys: Iterable[str], model: nn.Module) -> str:
    """Which program wrote these names: "official", "official-dense", "timm", "huggingface" or "native"."""
    module, keys = converter(model), list(keys)
    if module:
        return module.source_format(keys)
    return "native" if set(keys) & set(model.state_dict()) else "official"
