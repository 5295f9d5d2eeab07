"""Losses of dense tasks, as functions of (prediction, target).

Segmentation: logits B K H W, mask B H W class ids with `ignore_index` for void. Depth: prediction and target B 1 H W or B H W,
target 0 (or an explicit mask) for a missing reading; scale-and-shift-invariant losses want both in inverse depth, as
`DepthSpec.target` gives it. Every loss is 0-d, float32, and 0 with a zero gradient when nothing is valid. Shapes must be equal:
a broadcast here would train on nonsense, so it raises ValueError. Nothing waits for the GPU except `lovasz`.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------------------------------------------------------------------------- segmentation


def check_segmentation(logits: Tensor, mask: Tensor) -> None:
    """ValueError unless logits are B K H W and the mask is B H W of the same size."""
    if logits.ndim != 4 or mask.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(f"want logits B K H W and mask B H W of one size, got {tuple(logits.shape)} and {tuple(mask.shape)}")


def without_void(logits: Tensor, mask: Tensor, ignore_index: int) -> Tensor:
    """The logits in float32, 0 at void pixels: whatever a model says there, NaN included, reaches neither loss nor gradient."""
    return logits.float().masked_fill((mask == ignore_index)[:, None], 0.0)


def weight_vector(class_weight: Tensor | list[float] | None, logits: Tensor) -> Tensor | None:
    """Class weights as float32 K where the logits are. ValueError for another number of them."""
    if class_weight is None:
        return None
    weight = torch.as_tensor(class_weight, dtype=torch.float32, device=logits.device)
    if weight.shape != logits.shape[1:2]:
        raise ValueError(f"need one class weight for each of {logits.shape[1]} classes, got {tuple(weight.shape)}")
    return weight


def valid_pixels(mask: Tensor, ignore_index: int = 255) -> Tensor:
    """How many pixels are not void: 0-d float."""
    return (mask != ignore_index).sum().float()


def cross_entropy_divisor(
    mask: Tensor,
    ignore_index: int = 255,
    class_weight: Tensor | list[float] | None = None,
    average: Literal["valid", "all"] = "valid",
) -> Tensor:
    """What `cross_entropy` with these arguments divides its sum by: 0-d float.

    Args:
        mask: B H W, class ids.
        ignore_index: the mask value of void.
        class_weight: one per class.
        average: as for `cross_entropy`.
    """
    if average == "all":
        return torch.tensor(float(mask.numel()), device=mask.device)
    if class_weight is None:
        return valid_pixels(mask, ignore_index)
    valid = mask != ignore_index
    weight = torch.as_tensor(class_weight, dtype=torch.float32, device=mask.device)
    return (weight[torch.where(valid, mask, 0).long()] * valid).sum()


def cross_entropy(
    logits: Tensor,
    mask: Tensor,
    ignore_index: int = 255,
    class_weight: Tensor | list[float] | None = None,
    label_smoothing: float = 0.0,
    average: Literal["valid", "all"] = "valid",
) -> Tensor:
    """Cross entropy per pixel, a mean.

    Args:
        logits: B K H W.
        mask: B H W class ids.
        ignore_index: the id of void.
        class_weight: one per class, K.
        label_smoothing: share of the target spread over all classes.
        average: "valid" divides by the valid pixels, with class weights by the sum of the weights of their classes, as torch
            does; "all" by every pixel, void included. mmsegmentation 1.2.2 by default (avg_non_ignore=False) does what "all"
            does without class weights, and what "valid" does with them (it cannot have void then).
    """
    check_segmentation(logits, mask)
    if average not in ("valid", "all"):
        raise ValueError(f"average must be 'valid' or 'all', got {average!r}")
    weight = weight_vector(class_weight, logits)
    total = F.cross_entropy(
        without_void(logits, mask, ignore_index),
        mask.long(),
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    if average == "all":
        return total / mask.numel()
    return total / cross_entropy_divisor(mask, ignore_index, weight).clamp_min(1e-12)


def focal(
    logits: Tensor,
    mask: Tensor,
    ignore_index: int = 255,
    gamma: float = 2.0,
    class_weight: Tensor | list[float] | None = None,
) -> Tensor:
    """Focal loss (Lin et al. 2017, eq. 4) over the softmax: mean over valid pixels of -w (1 - p)^gamma log p.

    Args:
        logits: B K H W.
        mask: B H W, class ids.
        ignore_index: the mask value of void.
        gamma: how much easy pixels count less; 0 is cross entropy.
        class_weight: w, one per class.
    """
    check_segmentation(logits, mask)
    valid = mask != ignore_index
    weight = weight_vector(class_weight, logits)
    logits = without_void(logits, mask, ignore_index)
    plain = F.cross_entropy(logits, mask.long(), ignore_index=ignore_index, reduction="none")  # 0 at void pixels
    loss = (1 - torch.exp(-plain)) ** gamma * plain
    if weight is not None:
        loss = loss * weight[torch.where(valid, mask, 0).long()]
    return loss.sum() / valid.sum().clamp_min(1)


def ohem(logits: Tensor, mask: Tensor, ignore_index: int = 255, threshold: float = 0.7, min_kept: int = 100_000) -> Tensor:
    """Online hard example mining: the mean cross entropy of the pixels whose true class has a low probability.

    If fewer than min_kept pixels per image are that hard, the hardest min_kept (times the batch) are taken. The pixels are
    those of mmsegmentation's OHEMPixelSampler; the mean is over the pixels taken, where its decode heads divide the same sum by
    all pixels, so a factor that was tuned there is smaller here by the share of pixels taken.

    Args:
        logits: B K H W.
        mask: B H W, class ids.
        ignore_index: the mask value of void.
        threshold: of the true class's probability.
        min_kept: pixels per image that are taken at least.
    """
    check_segmentation(logits, mask)
    if not 0 < threshold <= 1 or min_kept < 1:
        raise ValueError(f"need 0 < threshold <= 1 and min_kept >= 1, got {threshold} and {min_kept}")
    logits = without_void(logits, mask, ignore_index)
    loss = F.cross_entropy(logits, mask.long(), ignore_index=ignore_index, reduction="none").flatten()
    valid = (mask != ignore_index).flatten()
    probability = torch.where(valid, torch.exp(-loss.detach()), torch.inf)
    place = (valid.sum() - 1).clamp(0, min_kept * len(mask) - 1)  # of the last of the hardest min_kept
    limit = probability.sort().values.gather(0, place[None]).clamp_min(threshold)
    kept = valid & (probability <= limit)
    return torch.where(kept, loss, 0).sum() / kept.sum().clamp_min(1)


def dice(
    logits: Tensor,
    mask: Tensor,
    ignore_index: int = 255,
    smooth: float = 1.0,
    classes: Literal["present", "all"] = "present",
) -> Tensor:
    """Soft Dice loss (Milletari et al. 2016, without squares): mean over classes of 1 - (2 sum p g + s) / (sum p + sum g + s).

    The sums run over all valid pixels of the batch.

    Args:
        logits: B K H W.
        mask: B H W, class ids.
        ignore_index: the mask value of void.
        smooth: s.
        classes: "present" leaves out classes that no valid pixel of the batch has.
    """
    check_segmentation(logits, mask)
    if classes not in ("present", "all"):
        raise ValueError(f"classes must be 'present' or 'all', got {classes!r}")
    valid = (mask != ignore_index)[:, None]
    p = without_void(logits, mask, ignore_index).softmax(1) * valid
    g = F.one_hot(torch.where(valid[:, 0], mask, 0).long(), logits.shape[1]).movedim(-1, 1) * valid
    p_sum, g_sum, both = p.sum((0, 2, 3)), g.sum((0, 2, 3)), (p * g).sum((0, 2, 3))
    loss = 1 - (2 * both + smooth) / (p_sum + g_sum + smooth)
    counted = (g_sum > 0) if classes == "present" else valid.any().expand_as(g_sum)
    return (loss * counted).sum() / counted.sum().clamp_min(1)


def lovasz(
    logits: Tensor,
    mask: Tensor,
    ignore_index: int = 255,
    classes: Literal["present", "all"] = "present",
    per_image: bool = False,
) -> Tensor:
    """Lovasz-Softmax (Berman et al. 2018): the convex extension of 1 - IoU, averaged over classes.

    Args:
        logits: B K H W.
        mask: B H W, class ids.
        ignore_index: the mask value of void.
        classes: "present" leaves out classes that no valid pixel has.
        per_image: the loss of each image, averaged, instead of the batch taken as one image.
    """
    check_segmentation(logits, mask)
    if classes not in ("present", "all"):
        raise ValueError(f"classes must be 'present' or 'all', got {classes!r}")
    if per_image:
        parts = [lovasz(logits[i : i + 1], mask[i : i + 1], ignore_index, classes) for i in range(len(mask))]
        return torch.stack(parts).mean()
    valid = mask != ignore_index
    logits = without_void(logits, mask, ignore_index)
    p = logits.softmax(1).movedim(1, -1)[valid]  # N K
    if not len(p):
        return logits.sum() * 0
    g = F.one_hot(mask[valid].long(), logits.shape[1]).float()
    errors, order = (g - p).abs().sort(0, descending=True)
    g = g.gather(0, order)
    total = g.sum(0)
    jaccard = 1 - (total - g.cumsum(0)) / (total + (1 - g).cumsum(0))  # of the pixels up to each place
    steps = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
    loss = (errors * steps).sum(0)  # K
    counted = (total > 0).float() if classes == "present" else torch.ones_like(total)
    return (loss * counted).sum() / counted.sum()


SEGMENTATION_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "ohem": ohem,
    "dice": dice,
    "lovasz": lovasz,
}

# ---------------------------------------------------------------------------------------------------------------------- depth


def depth_maps(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(prediction, target, valid) as B H W: float32, float32, bool. Valid is target > 0 and inside `mask` if one is given.

    Prediction and target are 1 where the target is missing: logarithms and quotients stay finite, and whatever a model says
    there, NaN included, reaches neither loss nor gradient.
    """
    if pred.shape != target.shape or (mask is not None and mask.shape != target.shape):
        shapes = f"{tuple(pred.shape)}, {tuple(target.shape)}" + ("" if mask is None else f", {tuple(mask.shape)}")
        raise ValueError(f"prediction, target (and mask) must have one shape, got {shapes}")
    if pred.ndim not in (3, 4) or (pred.ndim == 4 and pred.shape[1] != 1):
        raise ValueError(f"depth maps must be B 1 H W or B H W, got {tuple(pred.shape)}")
    if pred.ndim == 4:
        pred, target, mask = pred[:, 0], target[:, 0], None if mask is None else mask[:, 0]
    valid = (target > 0) & target.isfinite()
    if mask is not None:
        valid = valid & (mask > 0)
    return torch.where(valid, pred.float(), 1), torch.where(valid, target, 1).float(), valid


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """0-d mean over the valid entries, 0 if there is none."""
    return torch.where(valid, values, 0).sum() / valid.sum().clamp_min(1)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0, not infinite."""
    return torch.where(x > 0, x.clamp_min(1e-20).sqrt(), 0 * x)


def safe_log(pred: Tensor, valid: Tensor, floor: float = 1e-6) -> Tensor:
    """Logarithm of valid predictions, those below `floor` taken as `floor`; 0 elsewhere."""
    return torch.where(valid, pred, 1).clamp_min(floor).log()


def silog(pred: Tensor, target: Tensor, mask: Tensor | None = None, lam: float = 0.5) -> Tensor:
    """Scale-invariant log error sqrt(mean d^2 - lam (mean d)^2), d = log target - log pred (Eigen et al. 2014, eq. 4, rooted).

    The mean runs over all valid pixels of the batch. Predictions below 1e-6 count as 1e-6.

    Args:
        pred: B 1 H W, metres, above 0.
        target: B 1 H W, metres; 0 = no reading.
        mask: where the target counts; None: where it is positive.
        lam: 0.5 in GLPN and Depth Anything V2, 0.85 (and a factor 10) in BTS.
    """
    pred, target, valid = depth_maps(pred, target, mask)
    d = torch.where(valid, target.log() - safe_log(pred, valid), 0)
    mean = masked_mean(d, valid)
    return safe_sqrt(masked_mean(d * d, valid) - lam * mean**2)


def silog_unbiased(pred: Tensor, target: Tensor, mask: Tensor | None = None, beta: float = 0.15) -> Tensor:
    """ZoeDepth's scale-invariant log error sqrt(var d + beta (mean d)^2), var with one pixel less (arXiv 2302.12288).

    Args:
        pred: B 1 H W, metres.
        target: B 1 H W, metres; 0 = no reading.
        mask: where the target counts; None: where it is positive.
        beta: of the mean; published with a factor of 10 on the whole.
    """
    pred, target, valid = depth_maps(pred, target, mask)
    d = torch.where(valid, (pred.clamp_min(0) + 1e-7).log() - (target + 1e-7).log(), 0)
    mean, count = masked_mean(d, valid), valid.sum()
    variance = torch.where(valid, (d - mean) ** 2, 0).sum() / (count - 1).clamp_min(1)
    return safe_sqrt(variance + beta * mean**2)


def gradient_l1(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """ZoeDepth's GradL1: squared length and angle of the slopes compared (its configurations give it weight 0).

    A slope is the difference to the pixel at the left and to the one above, where all three are valid.

    Args:
        pred: B 1 H W, metres.
        target: B 1 H W, metres; 0 = no reading.
        mask: where the target counts; None: where it is positive.
    """
    pred, target, valid = depth_maps(pred, target, mask)
    valid = valid[:, 1:, 1:] & valid[:, 1:, :-1] & valid[:, :-1, 1:]
    lengths, angles = [], []
    for value in (pred, target):
        x, y = value[:, 1:, 1:] - value[:, 1:, :-1], value[:, 1:, 1:] - value[:, :-1, 1:]
        lengths.append(x**2 + y**2)
        angles.append((y / (x + 1e-10)).atan())
    return sum((masked_mean((a - b).abs(), valid) for a, b in (lengths, angles)), torch.zeros((), device=pred.device))


def l1(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute error over the valid pixels of the batch."""
    pred, target, valid = depth_maps(pred, target, mask)
    return masked_mean((pred - target).abs(), valid)


def berhu(pred: Tensor, target: Tensor, mask: Tensor | None = None, threshold: float = 0.2) -> Tensor:
    """Reverse Huber (Laina et al. 2016, eq. 2): |r| up to c, (r^2 + c^2) / 2c above; c = threshold * largest |r|.

    Args:
        pred: B 1 H W.
        target: B 1 H W; 0 = no reading.
        mask: where the target counts; None: where it is positive.
        threshold: c as a share of the largest |r|.
    """
    pred, target, valid = depth_maps(pred, target, mask)
    residual = torch.where(valid, (pred - target).abs(), 0)
    c = threshold * residual.detach().amax().clamp_min(1e-12)
    return masked_mean(
        torch.where(residual <= c, residual, (residual * (residual / c) + c) / 2), valid
    )  # no square: it overflows


def sigloss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    max_depth: float | None = None,
    warmup: bool = False,
) -> Tensor:
    """DINOv2's SigLoss: sqrt(var g + 0.15 (mean g)^2), g = log(pred + 1e-3) - log(target + 1e-3), unbiased variance.

    Args:
        pred: B 1 H W.
        target: B 1 H W; 0 = no reading.
        mask: where the target counts; None: where it is positive.
        max_depth: targets beyond it are missing.
        warmup: without the variance, as their first 100 steps.
    """
    pred, target, valid = depth_maps(pred, target, mask)
    if max_depth is not None:
        valid = valid & (target <= max_depth)
    g = torch.where(valid, (torch.where(valid, pred, 1).clamp_min(0) + 1e-3).log() - (target + 1e-3).log(), 0)
    mean, count = masked_mean(g, valid), valid.sum()
    if warmup:
        return safe_sqrt(0.15 * mean**2)
    variance = torch.where(valid, (g - mean) ** 2, 0).sum() / (count - 1).clamp_min(1)
    return safe_sqrt(variance + 0.15 * mean**2)


def gradient(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    max_depth: float | None = None,
    definition: Literal["maps", "code"] = "maps",
) -> Tensor:
    """DINOv2's GradientLoss: |g(i) - g(i + 2)| of the log difference g of `sigloss`, where both ends are valid.

    Taken at strides 1, 2, 4, 6; each scale's sum is divided by its valid pixels, and the scales are added.

    Args:
        pred: B 1 H W.
        target: B 1 H W; 0 = no reading.
        mask: where the target counts; None: where it is positive.
        max_depth: targets beyond it are missing.
        definition: "maps" steps along height and width. "code" does what the authors' code does: step along the first two axes
            of the tensor it is given, which for B 1 H W are batch and channel; only for reproducing their numbers.
    """
    shape = pred.shape
    pred, target, valid = depth_maps(pred, target, mask)
    if max_depth is not None:
        valid = valid & (target <= max_depth)
    g = torch.where(valid, (torch.where(valid, pred, 1).clamp_min(0) + 1e-3).log() - (target + 1e-3).log(), 0)
    if definition == "code":
        g, valid = g.reshape(shape).movedim((0, 1), (-2, -1)), valid.reshape(shape).movedim((0, 1), (-2, -1))
    elif definition != "maps":
        raise ValueError(f"definition must be 'maps' or 'code', got {definition!r}")
    total = g.new_zeros(())
    for stride in (1, 2, 4, 6):
        d, v = g[..., ::stride, ::stride], valid[..., ::stride, ::stride]
        rows = ((d[..., :-2, :] - d[..., 2:, :]).abs() * (v[..., :-2, :] & v[..., 2:, :])).sum()
        columns = ((d[..., :-2] - d[..., 2:]).abs() * (v[..., :-2] & v[..., 2:])).sum()
        total = total + (rows + columns) / v.sum().clamp_min(1)
    return total


# Scale and shift invariance: MiDaS (Ranftl et al. 2020, https://arxiv.org/abs/1907.01341). The MiDaS and DPT repositories
# have no losses; "code" is what two of the authors published as gists, "paper" the article's equations. Four differences:
#
#                        code                                       paper
#   mean over images     sums of the batch / pixels of the batch    per image, then the mean over images
#   gradient term        each scale divided by its own pixels       every scale divided by the pixels at full size
#   median               of mask * map: missing pixels count as 0   of the valid pixels
#   trimming             largest residuals of the whole batch       largest residuals of each image


def reduce(image_sums: Tensor, pixels: Tensor, per_image: bool) -> Tensor:
    """Sums B over valid pixels, and how many, B -> 0-d. Per image: an image without valid pixels counts as 0, not as absent."""
    if per_image:
        return (image_sums / pixels.clamp_min(1)).mean()
    return image_sums.sum() / pixels.sum().clamp_min(1)


def scale_and_shift(pred: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares (scale, shift), B each, of pred to target over the valid pixels; both 0 where they are not determined."""
    count = valid.sum((1, 2)).clamp_min(1)
    pred, target = torch.where(valid, pred, 0), torch.where(valid, target, 0)
    p_mean, t_mean = pred.sum((1, 2)) / count, target.sum((1, 2)) / count
    p, t = (torch.where(valid, x - m[:, None, None], 0) for x, m in ((pred, p_mean), (target, t_mean)))
    power = (p * p).sum((1, 2))
    known = power > 1e-12 * (pred * pred).sum((1, 2))  # float32: below this a constant map
    scale = torch.where(known, (p * t).sum((1, 2)) / torch.where(known, power, 1), 0)
    return scale, torch.where(known, t_mean - scale * p_mean, 0)


def gradient_term(residual: Tensor, valid: Tensor, scales: int, per_image: bool, full_size: bool = False) -> Tensor:
    """|dx| + |dy| of the residual where both pixels are valid, at strides 1, 2, 4, ..., scales added.

    Each scale is divided by its own valid pixels unless full_size is set.

    Args:
        residual: B H W.
        valid: B H W, where it counts.
        scales: how many.
        per_image: divide each image by its own valid pixels and average, instead of the batch by all of them.
        full_size: divide by the valid pixels of the map that is not subsampled.
    """
    residual = torch.where(valid, residual, 0)
    total = residual.new_zeros(())
    for k in range(scales):
        r, v = residual[:, :: 2**k, :: 2**k], valid[:, :: 2**k, :: 2**k]
        rows = ((r[:, 1:] - r[:, :-1]).abs() * (v[:, 1:] & v[:, :-1])).sum((1, 2))
        columns = ((r[:, :, 1:] - r[:, :, :-1]).abs() * (v[:, :, 1:] & v[:, :, :-1])).sum((1, 2))
        total = total + reduce(rows + columns, (valid if full_size else v).sum((1, 2)), per_image)
    return total


def check_definition(definition: str, reduction: str | None) -> bool:
    """Whether to average per image; ValueError for unknown words."""
    if definition not in ("code", "paper"):
        raise ValueError(f"definition must be 'code' or 'paper', got {definition!r}")
    if reduction not in (None, "batch", "image"):
        raise ValueError(f"reduction must be 'batch', 'image' or none (the definition's own), got {reduction!r}")
    return reduction == "image" if reduction is not None else definition == "paper"


def ssi_mse(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    alpha: float = 0.5,
    scales: int = 4,
    definition: Literal["code", "paper"] = "code",
    reduction: Literal["batch", "image"] | None = None,
) -> Tensor:
    """Squared error / 2 after a least-squares scale and shift per image, plus alpha times the gradient term.

    Args:
        pred: B 1 H W.
        target: B 1 H W; 0 = no reading.
        mask: where the target counts; None: where it is positive.
        alpha: factor of the gradient term.
        scales: of the gradient term.
        definition: whose, see the table above.
        reduction: "batch" or "image"; None: the definition's own.
    """
    per_image = check_definition(definition, reduction)
    pred, target, valid = depth_maps(pred, target, mask)
    scale, shift = scale_and_shift(pred, target, valid)
    residual = torch.where(valid, scale[:, None, None] * pred + shift[:, None, None] - target, 0)
    data = reduce((residual**2).sum((1, 2)), valid.sum((1, 2)), per_image) / 2
    if not alpha:
        return data
    return data + alpha * gradient_term(residual, valid, scales, per_image, definition == "paper")


def valid_median(values: Tensor, valid: Tensor) -> Tensor:
    """Median over the valid pixels of each map B H W (the lower one of two), B; 0 where none is valid."""
    flat = torch.where(valid, values, torch.inf).flatten(1)
    order = flat.detach().argsort(1)
    middle = ((valid.sum((1, 2)) - 1) // 2).clamp_min(0)
    median = flat.gather(1, order.gather(1, middle[:, None]))[:, 0]
    return torch.where(valid.any(2).any(1), median, 0)


def robust_normalise(values: Tensor, valid: Tensor, definition: str) -> Tensor:
    """Maps B H W minus their median, divided by their mean absolute deviation (floor 1e-6), 0 where not valid."""
    count = valid.sum((1, 2))
    if definition == "code":
        median = (values * valid).flatten(1).median(1).values
    else:
        median = valid_median(values, valid)
    centred = torch.where(valid, values - median[:, None, None], 0)
    deviation = centred.abs().sum((1, 2)) / count.clamp_min(1)
    return centred / torch.where(count > 0, deviation.clamp_min(1e-6), 1)[:, None, None]


def trimmed_sum(residual: Tensor, valid: Tensor, trim: float) -> Tensor:
    """Sum over the last axis of the smallest int((1 - trim) n) of the n valid absolute residuals."""
    ordered = torch.where(valid, residual.abs(), torch.inf).sort(-1).values
    kept = (valid.sum(-1, keepdim=True).double() * (1.0 - trim)).floor()  # double: Python's int(n * (1 - trim))
    return torch.where(torch.arange(ordered.shape[-1], device=ordered.device) < kept, ordered, 0).sum(-1)


def trimmed_mae(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    alpha: float = 0.5,
    scales: int = 4,
    trim: float = 0.2,
    definition: Literal["code", "paper"] = "code",
    reduction: Literal["batch", "image"] | None = None,
) -> Tensor:
    """Absolute error / 2 of the robustly normalised maps without the largest residuals, plus alpha times their gradient term.

    The divisor counts the trimmed pixels too.

    Args:
        pred: B 1 H W.
        target: B 1 H W; 0 = no reading.
        mask: where the target counts; None: where it is positive.
        alpha: factor of the gradient term.
        scales: of the gradient term.
        trim: share of the pixels that is left out.
        definition: whose, see the table above.
        reduction: of the gradient term under "code", whose trimmed part is always over the whole batch; of both under "paper".
    """
    per_image = check_definition(definition, reduction)
    if not 0 <= trim < 1:
        raise ValueError(f"trim is a share of the pixels in [0, 1), got {trim}")
    pred, target, valid = depth_maps(pred, target, mask)
    residual = robust_normalise(pred, valid, definition) - robust_normalise(target, valid, definition)
    pixels = valid.sum((1, 2))
    if definition == "code":
        data = trimmed_sum(residual.flatten(), valid.flatten(), trim) / (2 * pixels.sum().clamp_min(1))
    else:
        data = reduce(trimmed_sum(residual.flatten(1), valid.flatten(1), trim), pixels, per_image) / 2
    if not alpha:
        return data
    return data + alpha * gradient_term(residual, valid, scales, per_image, definition == "paper")


def omnidata(pred: Tensor, target: Tensor, mask: Tensor | None = None, alpha: float = 0.1, scales: int = 4) -> Tensor:
    """Omnidata's MidasLoss (Eftekhar et al. 2021), on depth, not inverse depth.

    Mean absolute difference of the maps normalised by the median and sum |deviation| / (pixels + 1) per image, plus alpha times
    the gradient term of 1 / (x + 1e-6), the prediction's aligned by least squares.

    Args:
        pred: B 1 H W, above 0.
        target: B 1 H W; 0 = no reading.
        mask: where the target counts; None: where it is positive.
        alpha: factor of the gradient term.
        scales: of the gradient term.
    """
    pred, target, valid = depth_maps(pred, target, mask)
    normalised = []
    for values in (pred, target):
        centred = torch.where(valid, values - valid_median(values, valid)[:, None, None], 0)
        deviation = centred.abs().sum((1, 2)) / (valid.sum((1, 2)) + 1)
        normalised.append(centred / (deviation + 1e-6)[:, None, None])
    data = masked_mean((normalised[0] - normalised[1]).abs(), valid)
    inverse, inverse_target = (1 / (torch.where(valid, values, 1) + 1e-6) for values in (pred, target))
    scale, shift = scale_and_shift(inverse, inverse_target, valid)
    residual = scale[:, None, None] * inverse + shift[:, None, None] - inverse_target
    return data + alpha * gradient_term(residual, valid, scales, per_image=True)


DEPTH_LOSSES: dict[str, Callable[..., Tensor]] = {
    "silog": silog,
    "silog_unbiased": silog_unbiased,
    "l1": l1,
    "berhu": berhu,
    "sigloss": sigloss,
    "gradient": gradient,
    "gradient_l1": gradient_l1,
    "ssi_mse": ssi_mse,
    "trimmed_mae": trimmed_mae,
    "omnidata": omnidata,
}
