"""Losses of dense tasks, as functions of (prediction, target).

Segmentation: logits B K H W, mask B H W class ids with `ignore_index` for void. Depth: prediction and target B 1 H W or B H W,
target 0 (or an explicit mask) for a missing reading. Every loss is 0-d, float32, and 0 with a zero gradient when nothing is
valid. Shapes must be equal: a broadcast here would train on nonsense, so it raises ValueError.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------------------------------------------------------------------------- segmentation


def check_segmentation(logits: Tensor, mask: Tensor) -> None:
    """ValueError unless logits are B K H W and the mask is B H W of the same size."""
    if logits.ndim != 4 or mask.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(f"want logits B K H W and mask B H W of one size, got {tuple(logits.shape)} and {tuple(mask.shape)}")


def cross_entropy(
    logits: Tensor,
    mask: Tensor,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    average: str = "valid",
) -> Tensor:
    """Cross entropy per pixel.

    average: "valid" divides by the valid pixels (with `class_weight`, K, by the sum of their weights, as torch does); "all"
    divides by every pixel, void included, as mmsegmentation does by default (avg_non_ignore=False).
    """
    check_segmentation(logits, mask)
    if average not in ("valid", "all"):
        raise ValueError(f"average must be 'valid' or 'all', got {average!r}")
    weight = None if class_weight is None else class_weight.to(logits.device, torch.float32)
    total = F.cross_entropy(
        logits.float(), mask.long(), weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    if average == "all":
        return total / mask.numel()
    return total / valid_weight(mask, ignore_index, weight).clamp_min(1e-12)


def valid_weight(mask: Tensor, ignore_index: int = 255, class_weight: Tensor | None = None) -> Tensor:
    """0-d float: the number of valid pixels, or the sum of their class weights: what `cross_entropy` divides by."""
    valid = mask != ignore_index
    if class_weight is None:
        return valid.sum().float()
    return class_weight.to(mask.device)[mask[valid].long()].sum()


# ---------------------------------------------------------------------------------------------------------------------- depth


def depth_maps(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(prediction, target, valid) as B H W: float32, float32, bool. Valid is target > 0 and inside `mask` if one is given."""
    if pred.shape != target.shape or (mask is not None and mask.shape != target.shape):
        raise ValueError(
            f"prediction {tuple(pred.shape)}, target {tuple(target.shape)}"
            + ("" if mask is None else f", mask {tuple(mask.shape)}")
            + " must have one shape"
        )
    if pred.ndim not in (3, 4) or (pred.ndim == 4 and pred.shape[1] != 1):
        raise ValueError(f"depth maps must be B 1 H W or B H W, got {tuple(pred.shape)}")
    if pred.ndim == 4:
        pred, target, mask = pred[:, 0], target[:, 0], None if mask is None else mask[:, 0]
    valid = (target > 0) & target.isfinite()
    if mask is not None:
        valid = valid & (mask > 0)
    return pred.float(), target.float(), valid


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0, not infinite."""
    return torch.where(x > 0, x.clamp_min(1e-20).sqrt(), 0 * x)


def silog(pred: Tensor, target: Tensor, mask: Tensor | None = None, lam: float = 0.5) -> Tensor:
    """Scale-invariant log error sqrt(mean d^2 - lam (mean d)^2), d = log target - log pred (Eigen et al. 2014, eq. 4, rooted).

    pred > 0 and target in metres; the mean runs over all valid pixels of the batch. lam 0.5 in GLPN and Depth Anything V2,
    0.85 (and a factor 10) in BTS. Predictions below 1e-6 count as 1e-6.
    """
    pred, target, valid = depth_maps(pred, target, mask)
    if not valid.any():
        return pred[valid].sum()
    d = target[valid].log() - pred[valid].clamp_min(1e-6).log()
    return safe_sqrt((d * d).mean() - lam * d.mean() ** 2)


def l1(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute error over the valid pixels of the batch."""
    pred, target, valid = depth_maps(pred, target, mask)
    return (pred[valid] - target[valid]).abs().sum() / valid.sum().clamp_min(1)


def berhu(pred: Tensor, target: Tensor, mask: Tensor | None = None, threshold: float = 0.2) -> Tensor:
    """Reverse Huber (Laina et al. 2016, eq. 2): |r| up to c, (r^2 + c^2) / 2c above; c = threshold * largest |r|."""
    pred, target, valid = depth_maps(pred, target, mask)
    residual = (pred[valid] - target[valid]).abs()
    if not residual.numel():
        return residual.sum()
    c = threshold * residual.detach().max().clamp_min(1e-12)
    return torch.where(residual <= c, residual, (residual**2 + c**2) / (2 * c)).mean()
