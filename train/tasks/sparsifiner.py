"""The two phases in which a Sparsifiner is trained: first its mask predictors, then everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from torch import Tensor, nn

import weights
from backbones.sparsifiner import DISTILLATION, RECONSTRUCTION, Sparsifiner, loss_terms
from train.tasks.classification import Classification, images_in

if TYPE_CHECKING:
    from train.schema import ModelConfig

LOSSES = {"attn_recon": RECONSTRUCTION, "cls_distill": DISTILLATION}


class SparsifinerPhase(Classification):
    """One training phase of a Sparsifiner (Wei et al. 2023) beside a frozen dense teacher of the same shape.

    The student starts from the teacher's weights, unless model.checkpoint holds its own, as the second phase needs it: the run
    folder of the first. Only the phase's parameters train.

    phase: "attn_recon" fits the mask predictors to the teacher's attention, with the student's own unmasked; "cls_distill"
        trains the rest under the predicted masks, on the labels and the teacher's logits and tokens.
    teacher: timm name of a model with the names and shapes of the dense network, whose released weights the teacher gets;
        teacher_pretrained: false leaves it untrained; teacher_checkpoint: a file instead of released weights.
    Other arguments: as in Classification.
    """

    def __init__(
        self,
        num_classes: int,
        phase: Literal["attn_recon", "cls_distill"],
        teacher: str = "deit_small_patch16_224.fb_in1k",
        teacher_pretrained: bool = True,
        teacher_checkpoint: str | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch: float = 0.5,
    ):
        super().__init__(num_classes, label_smoothing, mixup, cutmix, mixup_prob, mixup_switch)
        if phase not in LOSSES:
            raise ValueError(f"task.phase must be one of {', '.join(LOSSES)}, got {phase!r}")
        self.phase = phase
        self.dense_name, self.dense_pretrained, self.dense_checkpoint = teacher, teacher_pretrained, teacher_checkpoint

    def build(self, model: ModelConfig) -> nn.Module:
        """The student, and the teacher, whose weights it gets.

        Raises ValueError if the backbone is no Sparsifiner, for model.freeze_backbone, and for weights of another shape.
        """
        if model.freeze_backbone:
            raise ValueError("model.freeze_backbone: the phase decides what trains; set it to false")
        student = super().build(model)
        if not isinstance(student, Sparsifiner):
            raise ValueError(f"task sparsifiner trains sparsifiner_* models, got model.backbone {model.backbone!r}")
        shape = {"num_classes": self.num_classes, "in_chans": model.in_chans}
        self.teacher = timm.create_model(
            model.backbone, **shape, **model.backbone_args | {"dense": True, "token_keep_rate": 1.0}
        )
        if self.dense_checkpoint is not None:
            weights.load_checkpoint(self.teacher, self.dense_checkpoint)
        elif self.dense_pretrained:
            released = timm.create_model(self.dense_name, pretrained=True, **shape)
            weights.load_checkpoint(self.teacher, released.state_dict())
        self.teacher.eval().requires_grad_(False)
        student.load_state_dict(self.teacher.state_dict(), strict=False)  # the predictors are the student's own
        student.set_training_phase(self.phase)
        return student

    def losses(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The phase's terms, with the authors' factors.

        The authors sum the squares of "attn_recon" over the images of one GPU's batch. Here it is per image, as the mean over
        images must not depend on how a batch is cut; AdamW does not see the factor.
        """
        images, label = batch["image"], batch["label"]
        with torch.no_grad():
            taught = self.teacher.to(images.device).details(images)
        terms = loss_terms(outputs, taught, self.soft(label) if label.ndim == 1 else label, LOSSES[self.phase])
        return {name: loss / (len(images) if name == "attn_recon" else 1) for name, loss in terms.items()}

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return dict.fromkeys(LOSSES[self.phase], images_in(batch))
