"""Several dense tasks on one backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import heads
from train.checks import checked_arguments, require_known
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


class MultiTask(Task):
    """Segmentation and depth, one head each, losses added.

    parts: task name -> its arguments, e.g. {segmentation: {num_classes: 6}, depth: {max_depth: 10, loss_weight: 0.5}}. Beside
        the arguments of the task a part may set loss_weight (1), head and head_args (those of the model section). The first
        part's metric names the best checkpoint. Auxiliary heads are not for several tasks.
    """

    takes_heads = True

    def __init__(self, parts: dict[str, dict[str, Any]]):
        if not parts:
            raise ValueError("task.parts is empty: name at least one of segmentation and depth")
        self.parts: dict[str, DenseTask] = {}
        self.weights: dict[str, float] = {}
        self.heads: dict[str, tuple[str | None, dict[str, Any]]] = {}
        for name, values in parts.items():
            require_known("task.parts", name, PARTS)
            values = dict(values or {})
            self.weights[name] = float(values.pop("loss_weight", 1.0))
            self.heads[name] = values.pop("head", None), values.pop("head_args", {})
            self.parts[name] = PARTS[name](**checked_arguments(PARTS[name], values, f"task.parts.{name}"))
        self.average = {name: part.average for name, part in self.parts.items()}
        self.show = Several({name: part.show for name, part in self.parts.items()})
        first = next(iter(self.parts))
        self.best = (f"{first}_{self.parts[first].best[0]}", self.parts[first].best[1])

    def build(self, model: ModelConfig) -> nn.Module:
        """A heads.MultiPredictor whose outputs carry the names of the parts."""
        if model.aux_head is not None:
            raise ValueError("model.aux_head: multitask has no auxiliary head; set it to null")
        chosen = {}
        for name, part in self.parts.items():
            head, args = self.heads[name]
            chosen[name] = (head, part.out_channels, args) if head else (model.head, part.out_channels, args or model.head_args)
        return one_map(heads.MultiPredictor(model.backbone, chosen, **backbone_arguments(model)), "multitask")

    def check(self, dataset: ImageDataset) -> None:
        for part in self.parts.values():
            part.check(dataset)

    def targets(self, split: str) -> tuple[str, ...]:
        return tuple(target for part in self.parts.values() for target in part.targets(split))

    def losses(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Tensor]:
        """The terms of all parts as PART_TERM, times the part's loss_weight."""
        found = {name: part.losses(outputs[name], batch) for name, part in self.parts.items()}
        return {f"{name}_{term}": self.weights[name] * loss for name, terms in found.items() for term, loss in terms.items()}

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        found = {name: part.counts(batch) for name, part in self.parts.items()}
        return {f"{name}_{term}": count for name, counts in found.items() for term, count in counts.items()}

    def predict(self, output: dict[str, Tensor], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Part name -> its prediction."""
        return {name: part.predict(output[name], size) for name, part in self.parts.items()}

    def metric(self) -> Metric:
        return Together({name: part.metric() for name, part in self.parts.items()})

    def measure(self, metric: Any, output: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Any]:
        return {name: part.measure(metric.metrics[name], output[name], batch) for name, part in self.parts.items()}


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
