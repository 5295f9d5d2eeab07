"""Backbones that other installed packages add. An entry point of the group names a timm model and the module registering it."""

from collections.abc import Sequence
from typing import Any

import timm
from torch import nn

import backbones  # noqa: F401  (registers our models with timm)
from heads.plugins import entries, load
from train.checks import nearest

GROUP = "backbone_zoo.backbones"


def models() -> list[str]:
    """Names of the models that other packages add. Nothing is imported."""
    return sorted(entries(GROUP))


def is_model(name: str) -> bool:
    """Whether timm knows a model, after the package that adds it, if one does, has been imported.

    Raises ImportError with the package's name if it fails to load or does not register the model.
    """
    plain = name.partition(".")[0]
    if not timm.is_model(name) and plain in entries(GROUP):
        entry = entries(GROUP)[plain]
        load(entry)
        if not timm.is_model(plain):
            raise ImportError(f"{entry.value} ({GROUP}) does not register {plain!r} with timm")
    return timm.is_model(name)


def require_model(where: str, name: str) -> None:
    """Raises ValueError with the nearest names unless timm, or another package, has this model. where: before the sentence."""
    if not is_model(name):
        raise ValueError(f"{where}unknown model {name!r}; {nearest(name, [*timm.list_models(), *models()])}")


def built_at(name: str, size: Sequence[int] | None, **options: Any) -> nn.Module:
    """timm.create_model(name, **options), built for images of `size` (H, W) where its constructor takes one; None: its own."""
    if size is not None and "img_size" not in options:
        try:
            return timm.create_model(name, img_size=tuple(size), **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, **options)  # one that takes any size has no argument for it
