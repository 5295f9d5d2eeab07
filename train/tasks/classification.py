"""One label per image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

import weights
from backbones import attention_transfer
from train.checks import Collected
from train.loader import partners
from train.metrics import ClassificationMetric
from train.plugins import require_model
from train.show import Labels
from train.tasks.base import Task, check_classes

if TYPE_CHECKING:
    from train.data import ImageDataset
    from train.schema import ModelConfig


Distillation = Literal[
    "hard", "soft", "attention", "queries", "keys", "values", "copy_attention", "copy_queries", "copy_keys", "copy_values"
]  # fmt: skip


def load_teacher(teacher: nn.Module, source: str, which: str | None) -> str:
    """Fills a teacher from a file or from the result of a run folder, strictly; returns the report as text.

    which: as for weights.load_checkpoint. Raises FileNotFoundError, or ValueError for weights that do not fit.
    """
    path = Path(source)
    return f"teacher: {weights.load_checkpoint(teacher, path / 'model.safetensors' if path.is_dir() else path, which=which)}"


class Classification(Task):
    """Cross entropy over the backbone's own classifier.

    Args:
        num_classes: of the data.
        label_smoothing: share of the target spread over all classes.
        mixup, cutmix: alpha of the Beta distribution of each, 0 = off. One draw a step; pairs are neighbours in the total batch
            (loader.partners).
        mixup_prob: share of batches mixed.
        mixup_switch: share of mixed batches that get cutmix where both are on.
        binary: one binary cross entropy per class, averaged over classes (Wightman et al. 2021), instead of the softmax.
        teacher: timm name of a frozen model to learn from.
        teacher_args: arguments of it.
        teacher_pretrained: load its released weights.
        teacher_checkpoint: load a file or the result of a run folder instead.
        teacher_checkpoint_which: which of several weights in that file, as model.checkpoint_which.
        distillation: "hard" learns the teacher's best class, "soft" its distribution at `temperature` (Touvron et al. 2021,
            section 4). "attention", "queries", "keys" and "values" learn those of the teacher, a ViT with as many tokens and
            heads; "copy_attention" and so on take them from the teacher, which stays a part of the model (Li et al. 2024,
            backbones/attention_transfer.py).
        distillation_blocks: how many of the first blocks learn or copy; null = all.
        distillation_weight: of the teacher's term. "hard", "soft": its share of the loss, default 0.5; a distilled backbone
            (two classifiers) gives the teacher its own. "attention" and so on: its factor beside the whole loss of the labels,
            default 3, for a term that is the sum over blocks.
        temperature: of "soft".
    """

    best = ("top1", "max")
    show = Labels()

    def __init__(
        self,
        num_classes: int,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch: float = 0.5,
        binary: bool = False,
        teacher: str | None = None,
        teacher_args: dict[str, Any] | None = None,
        teacher_pretrained: bool = True,
        teacher_checkpoint: str | None = None,
        teacher_checkpoint_which: str | None = None,
        distillation: Distillation = "hard",
        distillation_blocks: int | None = None,
        distillation_weight: float | None = None,
        temperature: float = 3.0,
    ):
        found = Collected()
        if num_classes < 2:
            found.sentences.append(f"task.num_classes must be at least 2, got {num_classes}")
        if not 0 <= label_smoothing < 1:
            found.sentences.append(f"task.label_smoothing must lie in [0, 1), got {label_smoothing}")
        copied, self.transfer = distillation.startswith("copy_"), distillation.removeprefix("copy_")
        self.transfers = teacher is not None and self.transfer in attention_transfer.KINDS
        self.copies = self.transfers and copied
        if distillation_weight is None:
            distillation_weight = 3.0 if self.transfers else 0.5
        if distillation_weight < 0:
            found.sentences.append(f"task.distillation_weight must not be negative, got {distillation_weight}")
        elif distillation_weight > 1 and not self.transfers:
            found.sentences.append(f"task.distillation_weight must lie in 0..1, got {distillation_weight}")
        if distillation_blocks is not None and distillation_blocks < 1:
            found.sentences.append(f"task.distillation_blocks must be at least 1, got {distillation_blocks}")
        found.done()
        self.num_classes, self.label_smoothing, self.binary = num_classes, label_smoothing, binary
        self.term = "binary_cross_entropy" if binary else "cross_entropy"
        self.mix: Any = None  # timm's Mixup
        self.mixes = bool(mixup or cutmix)
        if self.mixes:
            self.mix = Mixup(mixup, cutmix, None, mixup_prob, mixup_switch, "batch", True, label_smoothing, num_classes)
        self.teacher_name, self.teacher_args, self.teacher_checkpoint = teacher, teacher_args or {}, teacher_checkpoint
        self.teacher_checkpoint_which = teacher_checkpoint_which
        self.teacher_pretrained = teacher_pretrained and teacher_checkpoint is None
        self.distillation, self.distillation_weight, self.temperature = distillation, distillation_weight, temperature
        self.distillation_blocks, self.pairs = distillation_blocks, list[int]()
        self.teacher: Any = None

    def targets(self, split: str) -> tuple[str, ...]:
        return ("label",)

    def build(self, model: ModelConfig) -> nn.Module:
        """The timm model with `num_classes` outputs; builds the teacher too."""
        built = self._model(model.backbone, model.backbone_args, model.pretrained, model)
        if self.teacher_name is None:
            return built
        require_model("task.teacher: ", self.teacher_name)
        teacher = self._model(self.teacher_name, self.teacher_args, self.teacher_pretrained, model)
        if self.teacher_checkpoint is not None:
            self.notes = (load_teacher(teacher, self.teacher_checkpoint, self.teacher_checkpoint_which),)
        if self.copies:
            if model.edits:
                raise ValueError(
                    f"task.distillation {self.distillation} takes no model.edits: they would change the teacher too"
                )
            return attention_transfer.copy_attention(built, teacher, self.transfer, self.distillation_blocks)
        self.teacher = teacher.eval().requires_grad_(False)
        if self.transfers:
            self.pairs = attention_transfer.learn(built, teacher, self.transfer, self.distillation_blocks)
        elif hasattr(built, "set_distilled_training"):
            built.set_distilled_training(True)
        return built

    def _model(self, name: str, args: dict[str, Any], pretrained: bool, model: ModelConfig) -> Any:
        """A timm model for the data: its classes, channels and size of the images."""
        args = dict(args)
        if model.img_size and "img_size" not in args and fixed_size(name):
            args["img_size"] = tuple(model.img_size)
        return timm.create_model(name, pretrained=pretrained, num_classes=self.num_classes, in_chans=model.in_chans, **args)

    def check(self, dataset: ImageDataset) -> None:
        if "label" not in dataset.provides:
            raise ValueError(f"{type(dataset).__name__} has no labels; it provides {', '.join(dataset.provides)}")
        check_classes(dataset, self.num_classes)

    def augment(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Mixed images, and instead of the labels distributions B K, if mixup or cutmix is on."""
        if self.mix is None:
            return batch
        partner = batch["partner"] if "partner" in batch else partners(len(batch["label"]))
        images, target = self._mixed(batch["image"], batch["label"], partner)
        return {**batch, "image": images, "label": target}

    def forward(self, model: Callable[..., Any], batch: dict[str, Any]) -> Any:
        if self.teacher is None or not self.transfers or not getattr(model, "training", False):
            return model(batch["image"])
        self.teacher.to(batch["image"].device)
        return model(batch["image"], attention_transfer.teach(self.teacher, batch["image"], self.transfer, self.pairs))

    def losses(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        scores, taught = outputs if isinstance(outputs, tuple) else (outputs, outputs)  # a distilled model in training: two
        loss = self.classes(scores.float(), batch["label"])
        if self.teacher is None:
            return {self.term: loss}
        if self.transfers:
            return {self.term: loss, "distillation": self.distillation_weight * taught.mean()}
        distilled = self.distil(taught.float(), batch["image"])
        return {self.term: (1 - self.distillation_weight) * loss, "distillation": self.distillation_weight * distilled}

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return dict.fromkeys([self.term] if self.teacher is None else [self.term, "distillation"], images_in(batch))

    def _mixed(self, images: Tensor, label: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """timm's Mixup mixes an image with its mirror place in the batch: each pair is brought there and back.

        One without a partner is left as it is.
        """
        first = (partner > torch.arange(len(partner), device=partner.device)).nonzero().flatten()
        if not len(first):
            return images, self.soft(label)
        order = torch.cat([first, partner[first].flip(0)])
        some, some_target = self.mix(images[order], label[order])
        mixed, target = images.clone(), self.soft(label)
        mixed[order], target[order] = some, some_target.to(target)
        return mixed, target

    def soft(self, label: Tensor) -> Tensor:
        """B class ids -> B K smoothed distribution."""
        off = self.label_smoothing / self.num_classes
        return F.one_hot(label, self.num_classes).float() * (1 - self.label_smoothing) + off

    def classes(self, scores: Tensor, target: Tensor) -> Tensor:
        """Loss of scores B K against class ids B or distributions B K."""
        if self.binary:
            target = self.soft(target) if target.ndim == 1 else target
            return F.binary_cross_entropy_with_logits(scores, target.to(scores))
        smoothing = self.label_smoothing if target.ndim == 1 else 0.0  # a mixed target is already smooth
        return F.cross_entropy(scores, target, label_smoothing=smoothing)

    def distil(self, scores: Tensor, images: Tensor) -> Tensor:
        """Loss of scores B K against the teacher's on the same images."""
        self.teacher.to(images.device)
        with torch.no_grad():
            teacher = self.teacher(images).float()
        if self.distillation == "hard":
            return F.cross_entropy(scores, teacher.argmax(1))
        t = self.temperature
        ours, theirs = F.log_softmax(scores / t, 1), F.log_softmax(teacher / t, 1)
        return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * t * t

    def predict(self, output: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """B K class probabilities; an image has one label, so there is nothing to resize."""
        return output.float().softmax(1)

    def metric(self) -> ClassificationMetric:
        return ClassificationMetric()


def images_in(batch: dict[str, Any]) -> Tensor:
    """How many images a batch has: 0-d float, where its labels are."""
    return torch.tensor(float(len(batch["label"])), device=batch["label"].device)


def fixed_size(backbone: str) -> bool:
    """Whether a timm model is built for one image size, which it must be told then."""
    return timm.is_model(backbone) and bool(getattr(timm.get_pretrained_cfg(backbone), "fixed_input_size", False))
