"""Streaming metrics: fixed memory, exact under any number of processes, and every number names its protocol.

A metric keeps `sums`, tensors that are only ever added to. Two processes that saw different samples are merged by adding their
sums, so a number never depends on how the data were split. All results are fractions or metres, never percentages.
"""

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.depth import DepthSpec


class Metric(abc.ABC):
    """A measure over a data set, as sums that batches and processes add to.

    Attributes:
        sums: float64 or int64 tensors, added to by `update`.
        protocol: how the numbers are made, printed beside them.
    """

    protocol: str

    def __init__(self, **sums: Tensor):
        self.sums = sums

    def to(self, device: torch.device | str) -> "Metric":
        """Move the sums, so that they can be reduced where the collective library wants them."""
        self.apply(lambda value: value.to(device))
        return self

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every sum by what a function makes of it: its total over the processes, a copy elsewhere."""
        self.sums = {name: function(value) for name, value in self.sums.items()}

    def add(self, name: str, value: Tensor) -> None:
        """Add to one of the sums, wherever it lives."""
        total = self.sums[name]
        total += value.to(total.device, total.dtype)

    @abc.abstractmethod
    def update(self, prediction: Any, batch: dict[str, Any]) -> None:
        """Count one batch. prediction: as the task's `predict` gives it."""

    @abc.abstractmethod
    def compute(self) -> dict[str, float]:
        """Named results over everything counted; NaN where nothing was counted."""


class ClassificationMetric(Metric):
    """Share of images whose label is the best (top1) or among the five best (top5) predictions."""

    protocol = "single crop"

    def __init__(self, topk: tuple[int, ...] = (1, 5)):
        super().__init__(count=torch.zeros((), dtype=torch.int64), hits=torch.zeros(len(topk), dtype=torch.int64))
        self.topk = tuple(topk)

    def update(self, prediction: Tensor, batch: dict) -> None:
        """Add a batch.

        prediction: B C scores (float), or B k class ids ranked best first (integer, k >= 5); batch["label"]: B class ids.
        With C < 5 scores every label is among the five best. Raises ValueError for other shapes or too few ranked ids.
        """
        label = batch["label"].to(prediction.device)
        if prediction.ndim != 2 or label.shape != prediction.shape[:1]:
            raise ValueError(f"want B C scores and B labels, got {tuple(prediction.shape)} and {tuple(label.shape)}")
        if prediction.is_floating_point():
            ranked = prediction.topk(min(max(self.topk), prediction.shape[1])).indices
        elif prediction.shape[1] < max(self.topk):
            raise ValueError(f"top{max(self.topk)} needs that many ranked ids per image, got {prediction.shape[1]}")
        else:
            ranked = prediction
        hit = ranked == label[:, None]
        self.add("hits", torch.stack([hit[:, :k].any(1).sum() for k in self.topk]))
        self.add("count", torch.tensor(len(label)))

    def compute(self) -> dict[str, float]:
        share = self.sums["hits"].double() / self.sums["count"]
        return {f"top{k}": float(value) for k, value in zip(self.topk, share, strict=True)}


class SegmentationMetric(Metric):
    """Mean intersection over union and accuracies from one confusion matrix (rows: truth, columns: prediction).

    Areas are summed over the whole set before dividing (data-set IoU, not the mean of image IoUs). A class that is in neither
    truth nor prediction has no IoU and is left out of the means; pixels whose label is `ignore_index` are not counted at all.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        super().__init__(matrix=torch.zeros(num_classes, num_classes, dtype=torch.int64))
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.protocol = (
            f"{num_classes} classes, label {ignore_index} ignored, areas summed over the set, absent classes left out"
        )

    def update(self, prediction: Tensor, batch: dict) -> None:
        """Add a batch.

        prediction and batch["mask"]: B H W class ids of the same size (the mask's own, not the network's).
        Raises ValueError if the sizes differ or an id that is not ignored lies outside the classes.
        """
        mask = torch.as_tensor(batch["mask"]).to(prediction.device)
        if prediction.shape != mask.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and mask {tuple(mask.shape)} differ; resize the prediction")
        keep = mask != self.ignore_index
        truth, guess = mask[keep].long(), prediction[keep].long()
        for name, ids in (("mask", truth), ("prediction", guess)):
            if ids.numel() and (ids.min() < 0 or ids.max() >= self.num_classes):
                wrong = int(ids.max()) if ids.max() >= self.num_classes else int(ids.min())
                raise ValueError(f"{name} id {wrong} is outside 0..{self.num_classes - 1} (ignored: {self.ignore_index})")
        pairs = torch.bincount(truth * self.num_classes + guess, minlength=self.num_classes**2)
        self.add("matrix", pairs.view(self.num_classes, self.num_classes))

    def per_class(self) -> dict[str, Tensor]:
        """By name iou, acc (recall), precision, dice (NaN where undefined) and the share of the true pixels: float64 K each."""
        matrix = self.sums["matrix"].double()
        hit, truth, guess = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        return {
            "iou": hit / (truth + guess - hit),
            "acc": hit / truth,
            "precision": hit / guess,
            "dice": 2 * hit / (truth + guess),
            "share": truth / matrix.sum(),
        }

    def compute(self) -> dict[str, float]:
        table = self.per_class()
        matrix = self.sums["matrix"].double()
        return {
            "miou": float(table["iou"].nanmean()),
            "macc": float(table["acc"].nanmean()),
            "aacc": float(matrix.diagonal().sum() / matrix.sum()),
        }


CROPS = {
    "nyu": "nyu (rows 45:471, columns 41:601)",
    "eigen": "eigen (KITTI, rows 0.332-0.914, columns 0.036-0.964 of the frame)",
    "garg": "garg (KITTI, rows 0.408-0.992, columns 0.036-0.964 of the frame)",
}


def crop_rows_columns(crop: str, height: int, width: int) -> tuple[slice, slice]:
    """The region of a published depth evaluation: rows and columns of a height x width map.

    "nyu": rows 45:471, columns 41:601 of 480x640 (Eigen et al. 2014's NYUv2 crop); "eigen" and "garg": the KITTI crops of
    Eigen et al. 2014 and Garg et al. 2016, given as fractions (117:321 and 143:349, columns 43:1172, of 352x1216). Of a full
    KITTI frame they are other pixels than of its benchmark crop; the data set says which it shows.
    Raises ValueError for an unknown name, for "nyu" on another size, and for a KITTI crop on maps not twice as wide as high
    (NYUv2's crop is also called "the Eigen crop").
    """
    if crop == "nyu":
        if (height, width) != (480, 640):
            raise ValueError(f"the nyu crop is defined on 480x640 depth maps, got {height}x{width}")
        return slice(45, 471), slice(41, 601)
    if crop not in CROPS:
        raise ValueError(f"crop must be one of {', '.join(CROPS)} or none, got {crop!r}")
    if width < 2 * height:
        raise ValueError(
            f"the {crop} crop is KITTI's, whose maps are 3.5 times as wide as high; got {height}x{width} (NYUv2: nyu)"
        )
    top, bottom = (0.3324324, 0.91351351) if crop == "eigen" else (0.40810811, 0.99189189)
    return slice(int(top * height), int(bottom * height)), slice(int(0.03594771 * width), int(0.96405229 * width))


class DepthMetric(Metric):
    """The usual depth errors: per image over its valid pixels, then the mean over the images that have any.

    "silog" is sqrt(mean d^2 - (mean d)^2 / 2), d the difference of the logarithms (Eigen et al. 2014); "silog_1" subtracts the
    whole square, the standard deviation of d, which KITTI's benchmark, BTS and AdaBins print times 100. Raises ValueError for a
    relative spec without alignment: its numbers would mean nothing.

    Args:
        spec: valid range, and whether the prediction is relative.
        crop: None or a name of `crop_rows_columns`.
        align: None; "median": prediction times median(target) / median(prediction) per image (Zhou et al. 2017); "affine":
            least-squares scale and shift per image, in inverse depth with a floor of 1 / max_depth if the prediction is
            relative inverse depth (Ranftl et al. 2020), else in depth.
        average: "image" (the usual protocol) or "pixel" (all valid pixels of the set pooled).
        clamp: clamp predictions to the valid range (BTS, DPT); without it an infinite prediction becomes max_depth and NaN or
            anything not positive min_depth, and nothing else is touched (GLPN, Depth Anything).
    """

    NAMES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "d1", "d2", "d3", "silog_1")

    def __init__(
        self,
        spec: DepthSpec,
        crop: str | None = None,
        align: str | None = None,
        average: str = "image",
        clamp: bool = False,
    ):
        if crop is not None and crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)} or none, got {crop!r}")
        if align not in (None, "median", "affine"):
            raise ValueError(f"align must be 'median', 'affine' or none, got {align!r}")
        if average not in ("image", "pixel"):
            raise ValueError(f"average must be 'image' or 'pixel', got {average!r}")
        if not spec.metric and align is None:
            raise ValueError("a relative prediction has no metres: choose align 'median' or 'affine'")
        if not spec.metric and spec.inverse and align == "median":
            raise ValueError("relative inverse depth is known up to scale and shift: choose align 'affine'")
        super().__init__(
            count=torch.zeros((), dtype=torch.int64),
            skipped=torch.zeros((), dtype=torch.int64),
            totals=torch.zeros(10, dtype=torch.float64),  # sums of `error_sums`, or the ten errors summed over images
        )
        self.spec, self.crop, self.align, self.average, self.clamp = spec, crop, align, average, clamp
        space = " in inverse depth" if align == "affine" and spec.inverse and not spec.metric else ""
        self.protocol = ", ".join(
            [
                f"valid {spec.min_depth:g}-{spec.max_depth:g} m",
                f"crop {CROPS[crop] if crop else 'none'}",
                f"alignment {align or 'none'}{space}",
                "mean over images" if average == "image" else "all pixels pooled",
                "predictions clamped" if clamp else "predictions not clamped",
                "silog with lambda 0.5, silog_1 with lambda 1 (x 100 in the tables of KITTI, BTS and AdaBins)",
            ]
        )

    def update(self, prediction: Tensor, batch: dict) -> None:
        """Add a batch.

        prediction: B 1 H W (or B H W), metres, or relative as `spec` says; batch["depth"]: metres, same size, 0 = missing.
        Raises ValueError if the sizes differ.
        """
        target = torch.as_tensor(batch["depth"]).to(prediction.device)
        prediction, target = (maps.squeeze(1) if maps.ndim == 4 else maps for maps in (prediction, target))
        if prediction.shape != target.shape or prediction.ndim != 3:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and depth {tuple(target.shape)} differ; resize the prediction first"
            )
        if prediction.device.type == "mps":  # which has no float64
            prediction, target = prediction.cpu(), target.cpu()
        for pred, true in zip(prediction.detach().double(), target.double(), strict=True):
            self._update_image(pred, true)

    def _update_image(self, pred: Tensor, true: Tensor) -> None:  # H W each
        valid = self.spec.valid(true)
        if self.crop is not None:
            inside = torch.zeros_like(valid)
            inside[crop_rows_columns(self.crop, *true.shape)] = True
            valid = valid & inside
        if not valid.any():
            self.add("skipped", torch.tensor(1))
            return
        errors = error_sums(self.metres(pred[valid], true[valid]), true[valid])
        self.add("totals", errors if self.average == "pixel" else summarise(errors))
        self.add("count", torch.tensor(1))

    def metres(self, pred: Tensor, true: Tensor) -> Tensor:
        """Valid predictions of one image [n], aligned to the truth [n] and made finite and positive."""
        low, high = self.spec.min_depth, self.spec.max_depth
        relative_inverse = self.spec.inverse and not self.spec.metric
        if relative_inverse:
            pred = pred.nan_to_num(0.0, 0.0, 0.0)
            scale, shift = least_squares(pred, 1 / true)
            pred = 1 / (scale * pred + shift).clamp_min(1 / high)
            return pred.clamp_min(low) if self.clamp else pred
        pred = torch.where(pred.isinf(), high, torch.where(pred.isnan(), low, pred))
        if self.align == "median":
            pred = pred * (true.quantile(0.5) / pred.quantile(0.5).clamp_min(torch.finfo(pred.dtype).tiny))
        elif self.align == "affine":
            scale, shift = least_squares(pred, true)
            pred = scale * pred + shift
        return pred.clamp(low, high) if self.clamp else torch.where(pred > 0, pred, low)

    def compute(self) -> dict[str, float]:
        totals, count = self.sums["totals"], self.sums["count"]
        values = summarise(totals) if self.average == "pixel" else totals / count
        return {name: float(value) for name, value in zip(self.NAMES, values, strict=True)}


def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) that minimise sum (scale x + shift - y)^2 over two lists [n]; (0, mean y) if x is constant."""
    centred = x - x.mean()
    power = (centred * centred).sum()
    scale = torch.where(power > 0, (centred * (y - y.mean())).sum() / power.clamp_min(torch.finfo(x.dtype).tiny), 0)
    return scale, y.mean() - scale * x.mean()


def error_sums(pred: Tensor, true: Tensor) -> Tensor:
    """Sums over pixels [n] from which `summarise` makes the errors; the last entry is n."""
    ratio = torch.maximum(pred / true, true / pred)
    log = pred.log() - true.log()
    terms = [
        (pred - true).abs() / true,
        (pred - true) ** 2 / true,
        (pred - true) ** 2,
        log**2,
        (pred.log10() - true.log10()).abs(),
        log,
        (ratio < 1.25).to(pred.dtype),
        (ratio < 1.25**2).to(pred.dtype),
        (ratio < 1.25**3).to(pred.dtype),
        torch.ones_like(pred),
    ]
    return torch.stack([term.sum() for term in terms])


def summarise(sums: Tensor) -> Tensor:
    """The ten errors, in the order of `DepthMetric.NAMES`, from the ten sums of `error_sums`."""
    abs_rel, sq_rel, square, log_square, log10, log, d1, d2, d3 = sums[:-1] / sums[-1]
    silog, silog_1 = ((log_square - lam * log**2).clamp_min(0).sqrt() for lam in (0.5, 1.0))
    return torch.stack([abs_rel, sq_rel, square.sqrt(), log_square.sqrt(), log10, silog, d1, d2, d3, silog_1])
