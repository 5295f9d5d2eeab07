"""Which image sizes a timm model takes, and how one is built for a size.

timm says only in part which sizes a model takes, and each architecture has another argument for it. What it does not say is
tried on the meta device, where a model runs without arithmetic.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .plugins import nearest


def as_pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """(H, W) of an image size that may be one number; None for none."""
    if size is None or isinstance(size, int):
        return None if size is None else (size, size)
    return (int(size[0]), int(size[1])) if len(size) == 2 else None


def stated_size(model: Any) -> tuple[int, tuple[int, int] | None]:
    """(multiple, fixed size) as timm's patch embedding states them, else (1, None)."""
    embed: Any = getattr(model, "patch_embed", None)
    strict = getattr(embed, "strict_img_size", None)
    if strict and as_pair(getattr(embed, "img_size", None)):
        return 1, as_pair(embed.img_size)
    return (1 if strict is None else max(as_pair(embed.patch_size) or (1,))), None


def native_size(model: Any) -> tuple[int, int] | None:
    """(H, W) that the model was trained at, as its pretrained_cfg states it."""
    return as_pair((getattr(model, "pretrained_cfg", None) or {}).get("input_size", ())[1:])


def measured_size(
    takes: Callable[[int, int], bool], largest: int, native: tuple[int, int] | None
) -> tuple[int, tuple[int, int] | None]:
    """(multiple, fixed size): the smallest multiple of pixels that a model takes, or the one size it is bound to.

    Tried are sizes far from the model's own that are multiples of the candidate and of nothing larger. A model that cannot run
    there or at its own size is taken to need its largest stride. takes: whether the model takes images of a height and width;
    largest: its largest stride, pixels; native: (H, W) it was built for or trained at, None if it does not say.
    """
    height, width = native or (224, 224)
    for multiple in sorted({1, 4, 8, 16, *(largest << i for i in range(4))}):
        if takes(multiple * (3 * height // (4 * multiple) * 2 + 1), multiple * (width // multiple * 2 + 1)):
            return multiple, None
    return (1, native) if native is not None and takes(*native) else (largest, None)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors have shapes only; the module itself is not touched."""
    tensors = [*module.parameters(), *module.buffers()]
    shapes = [t.detach().to("meta") for t in tensors]
    memo = {id(t): nn.Parameter(s, False) if isinstance(t, nn.Parameter) else s for t, s in zip(tensors, shapes, strict=True)}
    return copy.deepcopy(module, memo).eval()  # deepcopy takes what it finds in memo instead of copying weights


def meta_image(model: nn.Module, in_chans: int, height: int, width: int) -> Tensor:
    """One image 1 C H W on the meta device, in the type of the model's parameters.

    Args:
        model: whose parameters' type it gets.
        in_chans: C.
        height: H.
        width: W.
    """
    return torch.empty(1, in_chans, height, width, device="meta", dtype=next((p.dtype for p in model.parameters()), None))


def create_backbone(
    name: str, pretrained: bool, in_chans: int, img_size: int | Sequence[int] | None, args: dict
) -> tuple[nn.Module, tuple[int, int] | None]:
    """timm.create_model with run-time image sizes switched on where the architecture has them; and the size it was built for.

    Args:
        name: timm's, ours too once `backbones` is imported.
        pretrained: load the weights that timm knows for the name.
        in_chans: image channels.
        img_size: (H, W) or side to build for where the architecture has an argument for it, None for its own.
        args: further arguments of `timm.create_model`.

    Raises ValueError with the nearest names if timm does not know the name, and for a size that the architecture cannot hold.
    """
    architecture = name.split(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models())
        raise ValueError(f"unknown backbone {name!r}: {hint} (the zoo's own models need `import backbones`)")
    size = as_pair(img_size)
    shared = {"pretrained": pretrained, "in_chans": in_chans}
    if size is not None:
        try:
            model = _create(name, {**args, "img_size": size}, shared)
            if runs_at(model, in_chans, size):
                return model, size
            reason = "it builds, but does not run"
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            return _create(name, args, shared), None  # the architecture has no size to state
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error)
        # an architecture that does not do this size may still hold it inside its own, or inside a square
        model = _create(name, args, shared)
        native = native_size(model)
        if native is not None and size[0] <= native[0] and size[1] <= native[1]:
            return model, native
        square = (max(size), max(size))
        if square != size:
            return create_backbone(name, pretrained, in_chans, square, args)
        raise ValueError(f"{name} cannot be built for images of {size[0]} x {size[1]}: {reason}")
    return _create(name, args, shared), None


def runs_at(model: nn.Module, in_chans: int, size: tuple[int, int]) -> bool:
    """Whether the model's features run at the size it was built for (some constructors take sizes that their code does not)."""
    if getattr(model, "dynamic_img_size", False) or getattr(model, "dynamic_img_pad", False):
        return True
    try:
        with torch.no_grad():
            on_meta(model)(meta_image(model, in_chans, *size))
    except Exception:  # whatever a foreign model raises at a size it cannot take
        return False
    return True


def _create(name: str, args: dict, shared: dict) -> Any:
    """The model with run-time image sizes, by whichever name its architecture has for them."""
    for option in ({"dynamic_img_size": True}, {"strict_img_size": False}):
        try:
            return timm.create_model(name, **shared, **{**option, **args})
        except TypeError as error:
            # an architecture without this option says so before it builds anything
            if f"'{next(iter(option))}'" not in str(error):
                raise
    return timm.create_model(name, **shared, **args)
