"""What is trained: a task holds loss, prediction rule and metrics together, so that they cannot drift apart.

The engine calls a task through the interface below and never asks which one it has. A tenth task is one class in one file and one
row in TASKS. Tasks are plain classes; the `task` section of a config names one and gives its constructor arguments.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from train.config import ModelConfig
    from train.metrics import Metric


class Task(abc.ABC):
    """One kind of problem.

    targets: keys of a sample that loss and metric read ("label", "mask", "depth").
    best:    the metric that names the best checkpoint, and whether its "max" or "min" is best.
    """

    targets: tuple[str, ...]
    best: tuple[str, str]

    @abc.abstractmethod
    def build(self, model: ModelConfig) -> nn.Module:
        """The untrained model (backbone weights loaded if the config asks for them) with the outputs this task needs."""

    @abc.abstractmethod
    def check(self, dataset: Dataset) -> None:
        """Raises ValueError if the dataset cannot serve this task: a target missing, other classes, another kind of depth."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Runs the model on a batch of the training loader.

        Returns the mean over the valid targets of this batch, 0-d; or several means over different sets of targets, 1-d, whose sum is
        the loss. Zero, with zero gradient, where nothing is valid.
        """

    @abc.abstractmethod
    def weight(self, batch: dict[str, Any]) -> Tensor:
        """How many valid targets each mean of `loss` is over: float, the same shape as the loss.

        The engine weighs micro-batches and processes with it, which makes the step's gradient that of the mean over the total batch.
        """

    @abc.abstractmethod
    def predict(self, output: Any, size: tuple[int, int] | None = None) -> Any:
        """Model output -> prediction (class ids B or B H W, metres B 1 H W); resized to `size` before any rounding when given."""

    @abc.abstractmethod
    def metric(self) -> Metric:
        """A fresh streaming metric for the predictions of `predict`."""

    @abc.abstractmethod
    def picture(self, batch: dict[str, Any], prediction: Any, index: int) -> list:
        """Panels (train/visualize.py) of sample `index`: image, truth, prediction."""

    def measure(self, metric: Metric, model: nn.Module, batch: dict[str, Any]) -> None:
        """Adds one evaluation batch to the metric. Dense targets keep their native size, so a batch may hold a list of them."""
        output = model(batch["image"])
        if len(self.targets) == 1 and torch.is_tensor(batch[self.targets[0]]) and batch[self.targets[0]].ndim == 1:
            metric.update(self.predict(output), batch)
            return
        for i in range(len(batch["image"])):
            one = {key: value[i : i + 1] if torch.is_tensor(value) else [value[i]] for key, value in batch.items()}
            one.update({key: one[key][0][None] for key in self.targets if isinstance(one[key], list)})
            size = tuple(one[self.targets[0]].shape[-2:])
            metric.update(self.predict(pick(output, i), size), one)


def pick(output: Any, index: int) -> Any:
    """Sample `index` of a model output (tensor or dict of tensors), batch axis kept."""
    if isinstance(output, dict):
        return {key: value[index : index + 1] for key, value in output.items()}
    return output[index : index + 1]
