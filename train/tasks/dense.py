"""What segmentation and depth share: a head on a backbone, and targets that keep their own size at evaluation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heads
from train.checks import arguments, hint, known
from train.tasks.base import Task

if TYPE_CHECKING:
    from train.metrics import Metric
    from train.schema import ModelConfig


class DenseTask(Task):
    """A value per pixel. A subclass sets `out_channels`, and `targets` with the one key it reads."""

    out_channels: int

    def build(self, model: ModelConfig) -> nn.Module:
        """A heads.DensePredictor with `out_channels` outputs. Raises ValueError for a head that returns named outputs."""
        predictor = heads.DensePredictor(
            model.backbone,
            model.head,
            self.out_channels,
            head_args=model.head_args,
            aux_head=model.aux_head,
            aux_args=model.aux_args,
            **backbone_arguments(model),
        )
        return one_map(predictor, type(self).__name__.lower())

    def measure(self, metric: Metric, output: Tensor, batch: dict[str, Any]) -> Any:
        """Image by image, because each target has its own size; the prediction is resized to it before it is rounded."""
        (key,) = self.targets
        predictions = []
        for i, target in enumerate(batch[key]):
            predictions.append(self.predict(output[i : i + 1], tuple(target.shape[-2:])))
            metric.update(predictions[-1], {key: target[None]})
        return predictions


class Losses:
    """Named losses with a factor each: {cross_entropy: {}, dice: {factor: 3.0, smooth: 1.0}}.

    table: name -> function (prediction, target, its own arguments); shared: arguments given to every function that takes them.
    Raises ValueError with the nearest valid name for an unknown loss or argument.
    """

    def __init__(self, chosen: dict[str, Any], table: dict[str, Callable], shared: dict[str, Any]):
        if not chosen:
            raise ValueError(f"task.losses is empty: {hint('', table)}")
        self.terms: dict[str, tuple[float, Callable]] = {}
        for name, values in chosen.items():
            known("task.losses", name, table)
            values = dict(values or {})
            factor = float(values.pop("factor", 1.0))
            takes = inspect.signature(table[name]).parameters
            skip = [*list(takes)[:2], "mask", *shared]
            own = arguments(table[name], values, f"task.losses.{name}", skip=skip)
            own |= {key: value for key, value in shared.items() if key in takes}
            self.terms[name] = factor, functools.partial(table[name], **own)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Each loss times its factor, 1-d."""
        return torch.stack([factor * function(prediction, target) for factor, function in self.terms.values()])


def backbone_arguments(model: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of DensePredictor and MultiPredictor that describe the backbone."""
    args = dict(model.backbone_args)
    if model.out_indices is not None:
        args["out_indices"] = model.out_indices
    return {
        "pretrained": model.pretrained,
        "backbone_args": args,
        "in_chans": model.in_chans,
        "img_size": tuple(model.img_size) if model.img_size else None,
    }


def forward(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """(main, auxiliary) output; the second is None in evaluation and if the model has no auxiliary head."""
    output = model(images)
    return (output["main"], output.get("aux")) if isinstance(output, dict) else (output, None)


def one_map(predictor: nn.Module, task: str) -> nn.Module:
    """The predictor. ValueError if one of its heads returns named outputs, which need a task of their own."""
    for head in predictor.modules():
        if isinstance(head, heads.Head) and head.returns_names:
            raise ValueError(f"{type(head).__name__} returns named outputs; task {task} trains heads that return one map")
    return predictor


def resized(output: Tensor, size: tuple[int, int] | None) -> Tensor:
    """B K H W in float32, bilinearly at another size when given."""
    if size is None or tuple(output.shape[-2:]) == tuple(size):
        return output.float()
    return F.interpolate(output.float(), size=tuple(size), mode="bilinear", align_corners=False)
