"""What is trained: a task holds loss, prediction rule and metrics together, so that they cannot drift apart.

The engine calls a task through the interface below and never asks which one it has. A new task is one class in one file and one
row in TASKS. Tasks are plain classes; the `task` section of a config names one and gives its constructor arguments.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from train.show import Show

if TYPE_CHECKING:
    from train.data import ImageDataset
    from train.metrics import Metric
    from train.schema import ModelConfig


class Task(abc.ABC):
    """One kind of problem.

    best:    the metric that names the best checkpoint, and whether its "max" or "min" is best.
    mixes:   whether `augment` mixes pairs of images. A micro-batch then holds whole groups of them, and batch["partner"] has
        the place of each one's partner, so that pairs do not depend on how the total batch is cut.
    average: what windows, scales and flips average: "probabilities", "values" or "vectors", by output name for several; None:
        not possible.
    takes_heads: whether `build` reads model.head and what belongs to it; otherwise setting those keys is an error.
    show:    draws and writes predictions (train/show); None: there is nothing to see.
    gives_probabilities: whether `probabilities` gives some beside the prediction.
    notes:   what a run says once after `build`, such as where in a file a teacher's weights were.

    One training step calls, in this order: `sample` for every sample as it is loaded, `augment` for every micro-batch, `counts`
    for every micro-batch, then `forward` and `losses` for one after another.
    """

    best: tuple[str, str]
    mixes: bool = False
    average: str | dict[str, str] | None = None
    show: Show | None = None
    gives_probabilities: bool = False
    takes_heads: bool = False
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def targets(self, split: str) -> tuple[str, ...]:
        """Keys of a sample ("label", "mask", "depth", ...) that are read for "train" (losses) and "val" (metric, pictures)."""

    @abc.abstractmethod
    def build(self, model: ModelConfig) -> nn.Module:
        """The model with the outputs this task needs; released backbone weights loaded if the config asks for them."""

    @abc.abstractmethod
    def check(self, dataset: ImageDataset) -> None:
        """Raises ValueError if the dataset cannot serve this task: a target missing, other classes, another kind of depth."""

    def sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A training sample after its transform -> the sample with what this task adds (a random mask, targets of a set).

        Called inside `Seeded`: what is drawn here from Python's, numpy's or torch's generator depends on the seed and on the
        sample's place in the run, not on workers or processes.
        """
        return sample

    def augment(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A training batch on its device -> the batch that `counts`, `forward` and `losses` are given (mixup).

        The generators are in the same state for every micro-batch of a step, on every process.
        """
        return batch

    def forward(self, model: Callable[..., Any], batch: dict[str, Any]) -> Any:
        """The model's outputs for a batch.

        model: the model, in training or in evaluation mode; or, in evaluation and prediction, windows, scales and flips of it
        (train/inference.py), which take images. A batch to predict has an image and no targets.
        """
        return model(batch["image"])

    @abc.abstractmethod
    def losses(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Each term of the loss by name, its factor included: their sum is the loss, and log.csv shows each.

        outputs: of `forward` while training. A term is 0-d, the mean over its valid targets in this batch: zero, with zero
        gradient, where nothing is valid.
        """

    @abc.abstractmethod
    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """How many valid targets each term of `losses` is the mean over: 0-d float, under the same names.

        The engine weighs micro-batches and processes with it, so that the gradient is that of the mean over the total batch.
        """

    @abc.abstractmethod
    def predict(self, output: Any, size: tuple[int, int] | None = None) -> Any:
        """Model output -> prediction, resized to `size` before any rounding when given.

        Class probabilities B K (classification), class ids B H W (segmentation), segments B H W (panoptic), metres B 1 H W
        (depth).
        """

    def probabilities(self, output: Any, size: tuple[int, int], averaged: bool) -> Tensor:
        """Model output -> class probabilities B K H W at `size`, where the task gives them.

        averaged: whether windows, scales or flips were averaged as `average` says.
        """
        raise NotImplementedError(f"{type(self).__name__} has no probabilities")

    @abc.abstractmethod
    def metric(self) -> Metric:
        """A fresh streaming metric for the predictions of `predict`."""

    def measure(self, metric: Metric, output: Any, batch: dict[str, Any]) -> Any:
        """Adds the model output for one evaluation batch to the metric; returns the prediction."""
        prediction = self.predict(output)
        metric.update(prediction, batch)
        return prediction


def check_classes(dataset: ImageDataset, num_classes: int) -> None:
    """Raises ValueError with the number to set if the data have another number of classes."""
    if dataset.classes is not None and len(dataset.classes) != num_classes:
        raise ValueError(f"the data have {len(dataset.classes)} classes, set task.num_classes={len(dataset.classes)}")


def stacked(terms: Mapping[str, Tensor], names: Mapping[str, Any]) -> Tensor:
    """Terms of a loss as one float tensor, 1-d, in the order of `names`. Raises ValueError unless both have the same names."""
    if terms.keys() != names.keys():
        raise ValueError(f"a task's losses are {', '.join(terms)} and its counts {', '.join(names)}: they need the same names")
    return torch.stack([terms[name].float() for name in names])
