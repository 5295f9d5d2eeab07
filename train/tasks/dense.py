"""What segmentation and depth share: a head on a backbone, and targets that keep their own size at evaluation."""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

import heads
from train.checks import Collected, checked_arguments, nearest, require_known
from train.show import Show
from train.tasks.base import Task

if TYPE_CHECKING:
    from train.metrics import Metric
    from train.schema import ModelConfig


class DenseTask(Task):
    """A value per pixel.

    A subclass sets `target`, the key it reads, `out_channels` and `aux_weight`, and says what a head's output costs.
    """

    takes_heads = True
    target: str
    average: str
    show: Show
    out_channels: int
    aux_weight: float
    auxiliary: bool = False  # whether the model that was built has an auxiliary head
    layered: bool = False  # whether its head is trained in its earlier layers too

    @abc.abstractmethod
    def head_losses(self, output: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The terms of one head's output B K H W, by name."""

    @abc.abstractmethod
    def head_counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """How many valid targets each of them is the mean over."""

    def targets(self, split: str) -> tuple[str, ...]:
        return (self.target,)

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """The main head's terms; those of its earlier layers, summed, as layer_NAME; the auxiliary head's, times aux_weight, as
        aux_NAME.
        """
        terms = self.head_losses(outputs["main"], batch)
        for layer in outputs.get("layers", ()):
            for name, loss in self.head_losses(layer, batch).items():
                terms[f"layer_{name}"] = terms[f"layer_{name}"] + loss if f"layer_{name}" in terms else loss
        if self.auxiliary:
            terms |= {f"aux_{name}": self.aux_weight * loss for name, loss in self.head_losses(outputs["aux"], batch).items()}
        return terms

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        counts = self.head_counts(batch)
        further = [kind for kind, there in (("layer", self.layered), ("aux", self.auxiliary)) if there]
        return counts | {f"{kind}_{name}": count for kind in further for name, count in counts.items()}

    def build(self, model: ModelConfig) -> nn.Module:
        """A heads.DensePredictor with `out_channels` outputs. Raises ValueError for a head that returns named outputs."""
        predictor = heads.DensePredictor(
            model.backbone,
            model.head,
            self.out_channels,
            head_args=model.head_args,
            aux_head=model.aux_head,
            aux_args=model.aux_args,
            neck=model.neck,
            **backbone_arguments(model),
        )
        self.auxiliary = model.aux_head is not None
        head: Any = predictor.head
        self.layered = head.returns_layers and head.layers > 0
        return one_map(predictor, type(self).__name__.lower(), layers=True)

    def measure(self, metric: Metric, output: Any, batch: dict[str, Any]) -> Any:
        """Image by image, because each target has its own size; the prediction is resized to it before it is rounded."""
        predictions = []
        for i, target in enumerate(batch[self.target]):
            predictions.append(self.predict(output[i : i + 1], tuple(target.shape[-2:])))
            metric.update(predictions[-1], {self.target: target[None]})
        return predictions


@dataclass(frozen=True)
class Term:
    """A loss with its arguments: factor times function(prediction, target), a mean over count(target) targets."""

    factor: float
    function: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], Tensor]


class Losses:
    """Named losses with a factor each: {cross_entropy: {}, dice: {factor: 3.0, smooth: 1.0}}.

    Raises ValueError with the nearest valid name for an unknown loss or argument.

    Args:
        chosen: name -> its own arguments and `factor`.
        table: name -> function (prediction, target, its own arguments).
        shared: arguments given to every function that takes them.
        counts: name -> function (target, those of the loss's arguments that it takes) -> what the loss divides by; None as a
            name: of the losses that are not named.
    """

    def __init__(
        self,
        chosen: Mapping[str, Any],
        table: Mapping[str, Callable[..., Tensor]],
        shared: Mapping[str, Any],
        counts: Mapping[str | None, Callable[..., Tensor]],
    ):
        if not chosen:
            raise ValueError(f"task.losses is empty: {nearest('', table)}")
        self.terms: dict[str, Term] = {}
        found = Collected()
        for name, values in chosen.items():
            with found.check():
                self.terms[name] = self._term(name, values, table, shared, counts.get(name, counts[None]))
        found.done()

    @staticmethod
    def _term(
        name: str,
        values: Mapping[str, Any] | None,
        table: Mapping[str, Callable[..., Tensor]],
        shared: Mapping[str, Any],
        count: Callable[..., Tensor],
    ) -> Term:
        require_known("task.losses", name, table)
        where = f"task.losses.{name}"
        if values is not None and not isinstance(values, Mapping):
            raise ValueError(f"{where}: expected its arguments, got {values!r}; a loss that is not wanted is left out")
        values = dict(values or {})
        factor = values.pop("factor", 1.0)
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise ValueError(f"{where}.factor: {factor!r} is no number")
        takes = inspect.signature(table[name]).parameters
        own = checked_arguments(table[name], values, where, skip=[*list(takes)[:2], "mask", *shared])
        own |= {key: value for key, value in shared.items() if key in takes}
        counted = {key: value for key, value in own.items() if key in inspect.signature(count).parameters}
        return Term(float(factor), functools.partial(table[name], **own), functools.partial(count, **counted))

    def __call__(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Each loss times its factor."""
        return {name: term.factor * term.function(prediction, target) for name, term in self.terms.items()}

    def counts(self, target: Tensor) -> dict[str, Tensor]:
        """How many targets each loss is the mean over; 0-d, float."""
        return {name: term.count(target) for name, term in self.terms.items()}


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


def one_map(predictor: nn.Module, task: str, layers: bool = False) -> nn.Module:
    """The predictor. ValueError if one of its heads returns named outputs, which need a task of their own.

    layers: a head that also returns the maps of its earlier layers will do, but not as an auxiliary head.
    """
    for head in predictor.modules():
        main = layers and head is getattr(predictor, "head", None)
        if isinstance(head, heads.Head) and head.returns_names and not (main and head.returns_layers):
            raise ValueError(f"{type(head).__name__} returns named outputs; task {task} trains heads that return one map")
    return predictor


def resized(output: Tensor, size: tuple[int, int] | None) -> Tensor:
    """B K H W in float32, bilinearly at another size when given."""
    if size is None or tuple(output.shape[-2:]) == tuple(size):
        return output.float()
    return F.interpolate(output.float(), size=tuple(size), mode="bilinear", align_corners=False)
