"""The two phases in which a Sparsifiner is trained: first its mask predictors, then everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights
from backbones.sparsifiner import Details, Sparsifiner
from train.tasks.classification import Classification, images_in, load_teacher

if TYPE_CHECKING:
    from train.schema import ModelConfig

RECONSTRUCTION = {"attn_recon": 0.01}  # weights of the losses while the predictors are trained (5 epochs)
DISTILLATION = {"cls": 1.0, "cls_distill": 0.5, "token_distill": 0.5}  # and then while everything else is (45 epochs)
LOSSES = {"attn_recon": RECONSTRUCTION, "cls_distill": DISTILLATION}


class SparsifinerPhase(Classification):
    """One training phase of a Sparsifiner (Wei et al. 2023) beside a frozen dense teacher of the same shape.

    The student starts from the teacher's weights, unless model.checkpoint holds its own, as the second phase needs it: the run
    folder of the first. Only the phase's parameters train.

    Args:
        num_classes: of the data.
        phase: "attn_recon" fits the mask predictors to the teacher's attention, with the student's own unmasked; "cls_distill"
            trains the rest under the predicted masks, on the labels and the teacher's logits and tokens.
        teacher: timm name of a model with the names and shapes of the dense network, whose released weights the teacher gets.
        teacher_pretrained: false leaves it untrained.
        teacher_checkpoint: a file or run folder instead of released weights.
        teacher_checkpoint_which: which of several weights in that file, as model.checkpoint_which.
        label_smoothing, mixup, cutmix, mixup_prob, mixup_switch: as in Classification.
    """

    def __init__(
        self,
        num_classes: int,
        phase: Literal["attn_recon", "cls_distill"],
        teacher: str = "deit_small_patch16_224.fb_in1k",
        teacher_pretrained: bool = True,
        teacher_checkpoint: str | None = None,
        teacher_checkpoint_which: str | None = None,
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
        self.dense_which = teacher_checkpoint_which

    def build(self, model: ModelConfig) -> nn.Module:
        """The student, and the teacher, whose weights it gets.

        Raises ValueError if the backbone is no Sparsifiner, for model.freeze_backbone, and for weights of another shape.
        """
        if model.freeze_backbone:
            raise ValueError("model.freeze_backbone: the phase decides what trains; set it to false")
        student = super().build(model)
        if not isinstance(student, Sparsifiner):
            raise ValueError(f"task sparsifiner trains sparsifiner_* models, got model.backbone {model.backbone!r}")
        shape: dict[str, Any] = {"num_classes": self.num_classes, "in_chans": model.in_chans}
        self.teacher = timm.create_model(
            model.backbone, **shape, **model.backbone_args | {"dense": True, "token_keep_rate": 1.0}
        )
        if self.dense_checkpoint is not None:
            self.notes = (load_teacher(self.teacher, self.dense_checkpoint, self.dense_which),)
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


def loss_terms(student: Details, teacher: Details, target: Tensor, weights: dict[str, float]) -> dict[str, Tensor]:
    """Weighted terms of the authors' losses, 0-d each; their sum is the loss. Raises ValueError for a name that is none.

    cls: cross-entropy with the target, mean over images;
    cls_distill: KL divergence of the student's from the teacher's class probabilities, mean over images;
    token_distill: mean squared difference of the normalised patch tokens (auxiliary logits of an LV-ViT) that are not dropped;
    attn_recon: sum of squares, over everything, of predicted minus teacher's attention of the patch queries, mean over blocks;
    attn_self_distill: the same against the student's own unmasked attention, held fixed (weight 0 in the released recipe).

    Args:
        student: what the model gives with details (with `reconstruct=True` for the terms of RECONSTRUCTION).
        teacher: what the dense model gives; run it under no_grad, its gradients are the caller's business.
        target: B classes, probabilities.
        weights: RECONSTRUCTION, DISTILLATION, or any of the terms above.
    """

    def reconstruction(maps: list[Tensor]) -> Tensor:
        predicted: list[Any] = [block.approx_attn for block in student.blocks]  # every block has it in this phase
        losses = [(ours - attention[:, :, 1:]).square().sum() for ours, attention in zip(predicted, maps)]
        return torch.stack(losses).mean()

    def tokens() -> Tensor:
        difference = (student.features - teacher.features).square()
        mask = student.blocks[-1].token_mask
        return difference.mean() if mask is None else difference[mask].mean()

    log_student = student.logits.log_softmax(-1)
    terms = {
        "cls": lambda: -(target * log_student).sum(-1).mean(),
        "cls_distill": lambda: F.kl_div(log_student, teacher.logits.log_softmax(-1), log_target=True, reduction="batchmean"),
        "token_distill": tokens,
        "attn_recon": lambda: reconstruction([block.unmasked_attn for block in teacher.blocks]),
        "attn_self_distill": lambda: reconstruction([block.unmasked_attn.detach() for block in student.blocks]),
    }
    if unknown := weights.keys() - terms.keys():
        raise ValueError(f"unknown losses {sorted(unknown)}; known: {', '.join(terms)}")
    return {name: weight * terms[name]() for name, weight in weights.items()}
