"""Several dense tasks on one backbone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import heads
from train.checks import Collected, checked_arguments, require_known
from train.metrics import Metric
from train.show import Several
from train.tasks.base import Task
from train.tasks.dense import DenseTask, backbone_arguments, one_map
from train.tasks.depth import Depth
from train.tasks.segmentation import Segmentation

if TYPE_CHECKING:
    from train.data import ImageDataset
    from train.schema import ModelConfig

PARTS: dict[str, type[DenseTask]] = {"segmentation": Segmentation, "depth": Depth}


@dataclass
class Part:
    """What a part has beside the arguments of its task.

    Attributes:
        loss_weight: factor on its loss.
        head: a name of heads.HEADS; null = model.head.
        head_args: arguments of the head class; none = those of model.head_args.
    """

    loss_weight: float = 1.0
    head: str | None = None
    head_args: dict[str, Any] = field(default_factory=dict)


OWN = tuple(key.name for key in fields(Part))


def checked_part(values: dict[str, Any], where: str) -> Part:
    """The part's own keys. Raises ValueError for other types, an unknown head or arguments that the head does not take."""
    part = Part(**checked_arguments(Part, values, where))
    if part.head is not None:
        require_known(f"{where}.head", part.head, heads.HEADS)
        skip = ("channels", "out_channels")
        checked = checked_arguments(heads.HEADS[part.head], part.head_args, f"{where}.head_args", skip=skip)
        part.head_args = {key: checked[key] for key in part.head_args}  # defaults are left to the head
    return part


class MultiTask(Task):
    """Segmentation and depth, one head each, losses added.

    The first part's metric names the best checkpoint. Auxiliary heads are not for several tasks.

    Args:
        parts: task name -> its arguments, e.g. {segmentation: {num_classes: 6}, depth: {max_depth: 10, loss_weight: 0.5}}.
            Beside the arguments of the task a part may set loss_weight (1), head and head_args (those of the model section).
    """

    takes_heads = True

    def __init__(self, parts: dict[str, dict[str, Any]]):
        if not parts:
            raise ValueError("task.parts is empty: name at least one of segmentation and depth")
        self.parts: dict[str, DenseTask] = {}
        self.own: dict[str, Part] = {}
        found = Collected()
        for name, values in parts.items():
            with found.check(of_part(name)):
                require_known("task.parts", name, PARTS)
                where, values = f"task.parts.{name}", values or {}
                rest = {key: value for key, value in values.items() if key not in OWN}
                with found.check():
                    self.own[name] = checked_part({key: value for key, value in values.items() if key in OWN}, where)
                self.parts[name] = PARTS[name](**checked_arguments(PARTS[name], rest, where))
        found.done()
        self.average = {name: part.average for name, part in self.parts.items()}
        self.show = Several({name: part.show for name, part in self.parts.items()})
        self.gives_probabilities = any(part.gives_probabilities for part in self.parts.values())
        first = next(iter(self.parts))
        self.best = (f"{first}_{self.parts[first].best[0]}", self.parts[first].best[1])

    def build(self, model: ModelConfig) -> nn.Module:
        """A heads.MultiPredictor whose outputs carry the names of the parts."""
        if model.aux_head is not None:
            raise ValueError("model.aux_head: multitask has no auxiliary head; set it to null")
        chosen = {}
        for name, part in self.parts.items():
            head, args = self.own[name].head, self.own[name].head_args
            chosen[name] = (head, part.out_channels, args) if head else (model.head, part.out_channels, args or model.head_args)
        return one_map(heads.MultiPredictor(model.backbone, chosen, **backbone_arguments(model)), "multitask")

    def check(self, dataset: ImageDataset) -> None:
        found = Collected()
        for name, part in self.parts.items():
            with found.check(of_part(name)):
                part.check(dataset)
        found.done()

    def targets(self, split: str) -> tuple[str, ...]:
        return tuple(target for part in self.parts.values() for target in part.targets(split))

    def losses(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Tensor]:
        """The terms of all parts as PART_TERM, times the part's loss_weight."""
        found = {name: part.losses(outputs[name], batch) for name, part in self.parts.items()}
        factors = {name: own.loss_weight for name, own in self.own.items()}
        return {f"{name}_{term}": factors[name] * loss for name, terms in found.items() for term, loss in terms.items()}

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        found = {name: part.counts(batch) for name, part in self.parts.items()}
        return {f"{name}_{term}": count for name, counts in found.items() for term, count in counts.items()}

    def predict(self, output: dict[str, Tensor], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Part name -> its prediction."""
        return {name: part.predict(output[name], size) for name, part in self.parts.items()}

    def probabilities(self, output: dict[str, Tensor], size: tuple[int, int], averaged: bool) -> Tensor:
        """Those of the segmentation."""
        name = next(name for name, part in self.parts.items() if part.gives_probabilities)
        return self.parts[name].probabilities(output[name], size, averaged)

    def metric(self) -> Metric:
        return Together({name: part.metric() for name, part in self.parts.items()})

    def measure(self, metric: Any, output: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Any]:
        return {name: part.measure(metric.metrics[name], output[name], batch) for name, part in self.parts.items()}


def of_part(name: str) -> Callable[[str], str]:
    """What turns a sentence about a task's keys into one about the keys of this part."""
    return lambda sentence: re.sub(r"\btask\.(?!parts\.)", f"task.parts.{name}.", sentence)


class Together(Metric):
    """Metrics of several parts; names carry the part's: segmentation_miou."""

    def __init__(self, metrics: dict[str, Metric]):
        super().__init__()
        self.metrics = metrics
        self.protocol = "; ".join(f"{name}: {metric.protocol}" for name, metric in metrics.items())

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        for metric in self.metrics.values():
            metric.apply(function)

    def update(self, prediction: dict[str, Any], batch: dict[str, Any]) -> None:
        for name, metric in self.metrics.items():
            metric.update(prediction[name], batch)

    def compute(self) -> dict[str, float]:
        return {f"{part}_{name}": value for part, metric in self.metrics.items() for name, value in metric.compute().items()}
