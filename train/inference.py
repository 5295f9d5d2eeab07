"""One predictor for whole images, sliding windows, several scales and flips, in any combination.

Evaluation and prediction call the same object, so a number and a picture come from the same protocol, which `protocol` names.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("whole", "slide")
AVERAGES = ("probabilities", "values", "vectors")
BLENDS = ("mean", "smooth")

Output = Tensor | dict[str, Tensor]


class Predictor:
    """Run a model over images B 3 H W: averaged output B K H W (B K for classifiers), float32.

    Within one pass windows are blended, then resized, then softmax is taken; the passes (scales x flips) are averaged equally.
    A single whole pass of "values" is the model's own output. Raises ValueError for settings that make no sense.

    Args:
        model: a module in evaluation mode or any function of images; its output is B K H W of any size, B K, or a dict of such.
        mode: "whole" runs the image at once; "slide" runs windows, so the memory of the model is bounded by one window.
        window: (H, W) in pixels of the scaled image, or int. An image smaller than the window is one window.
        stride: between windows, the last ones flush with the border; default: two thirds of the window.
        scales: of the image.
        flip: also the mirrored image.
        blend: what overlapping windows weigh: "mean" all the same (mmsegmentation), "smooth" less towards their borders.
        average: "probabilities" averages softmax over K, "values" the outputs themselves (depth), "vectors" directions (K = 3:
            right, down, into the image), of which a mirrored image mirrors the first; each window and each pass is made a
            unit vector, and so is the result. By output name for a dict.
    """

    window: tuple[int, int]  # of mode "slide"
    stride: tuple[int, int]

    def __init__(
        self,
        model: Callable[[Tensor], Output],
        mode: str = "whole",
        window: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        blend: str = "mean",
        average: str | dict[str, str] = "probabilities",
    ):
        for name, value, valid in (("mode", mode, MODES), ("blend", blend, BLENDS)):
            if value not in valid:
                raise ValueError(f"{name} is {value!r}; use {' or '.join(map(repr, valid))}")
        for value in average.values() if isinstance(average, dict) else [average]:
            if value not in AVERAGES:
                raise ValueError(f"average is {value!r}; use {' or '.join(map(repr, AVERAGES))}")
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales must be positive factors of the image size, got {tuple(scales)}")
        if mode == "whole" and (window is not None or stride is not None):
            raise ValueError("window and stride belong to mode 'slide'; the whole image has neither")
        if mode == "slide":
            if window is None:
                raise ValueError("mode 'slide' needs a window, e.g. window=(512, 512)")
            window = pair(window)
            height, width = window
            stride = (max(1, 2 * height // 3), max(1, 2 * width // 3)) if stride is None else pair(stride)
            if any(not 0 < s <= w for s, w in zip(stride, window, strict=True)):
                raise ValueError(
                    f"stride {stride} must be positive and at most the window {window}, or pixels would be left out"
                )
            self.window, self.stride = window, stride
        self.model, self.mode = model, mode
        self.scales, self.flip, self.blend, self.average = tuple(scales), flip, blend, average
        self._sums = Buffers()
        self._weights: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}  # of the last size of an image

    @property
    def protocol(self) -> str:
        """How the prediction was made, in words: part of every number computed from it."""
        parts = ["whole image"]
        if self.mode == "slide":
            (h, w), (sh, sw) = self.window, self.stride
            parts = [f"windows {h}x{w} every {sh}x{sw}" + (", smooth blending" if self.blend == "smooth" else "")]
        if self.scales == (1.0,):
            parts.append("single scale")
        else:
            parts.append("scales " + " ".join(f"{scale:g}" for scale in self.scales))
        return ", ".join([*parts, "flip"] if self.flip else parts)

    @torch.no_grad()
    def __call__(self, images: Tensor, size: Sequence[int] | None = None) -> Output:
        """The averaged output at `size`, default that of the images; each pass is resized to it before softmax (bilinear)."""
        size = tuple(images.shape[-2:]) if size is None else tuple(size)
        total: dict[str | None, Tensor] = {}
        passes = len(self.scales) * (2 if self.flip else 1)
        for scaled, flipped in self._views(images):
            output = self._run(scaled)
            named = output if isinstance(output, dict) else {None: output}
            for name, given in named.items():
                value, kind = given, self._average(name)
                if value.ndim == 4:
                    value = resized(mirrored(value, kind) if flipped else value, size)
                if kind == "probabilities":
                    value = value.softmax(1)
                elif kind == "vectors":
                    value = F.normalize(value, dim=1)
                if name in total:
                    total[name] += value
                else:  # the model's tensor, or the windows' sums, which the next pass writes over, is not ours to change
                    total[name] = value.clone() if value is given and (passes > 1 or self.mode == "slide") else value
        return unnamed({name: mean(value, passes, self._average(name)) for name, value in total.items()})

    def _average(self, name: str | None) -> str:
        if isinstance(self.average, str):
            return self.average
        if name not in self.average:
            raise ValueError(f"average says nothing about the model's output {name!r}; it names {', '.join(self.average)}")
        return self.average[name]

    def _views(self, images: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """(image, is it mirrored) of every pass."""
        for scale in self.scales:
            size = [max(1, round(n * scale)) for n in images.shape[-2:]]
            scaled = images if scale == 1 else resized(images, size)
            yield scaled, False
            if self.flip:
                yield scaled.flip(-1), True

    def _run(self, images: Tensor) -> Output:
        """The model on the image, at the image's size."""
        if self.mode == "whole":
            output = self.model(images)
            return {k: v.float() for k, v in output.items()} if isinstance(output, dict) else output.float()
        size = tuple(images.shape[-2:])
        sums: dict[str | None, Tensor] = {}
        for rows, columns in windows(size, self.window, self.stride):
            crop = images[..., rows, columns]
            output = self.model(crop)
            weight = window_weight(crop.shape[-2:], self.blend, images.device)
            for name, value in (output if isinstance(output, dict) else {None: output}).items():
                if value.ndim != 4:
                    raise ValueError(
                        f"windows need a value per pixel (B K H W); the model gives {tuple(value.shape)}: use 'whole'"
                    )
                if name not in sums:
                    sums[name] = self._sums.zeros(name, (*value.shape[:2], *size), value.device)
                place, value = sums[name][..., rows, columns], resized(value.float(), crop.shape[-2:])
                if self._average(name) == "vectors":
                    value = F.normalize(value, dim=1)
                if self.blend == "mean":
                    place += value
                else:
                    place.addcmul_(value, weight)
        weights = self._weights_of(size, images.device)
        return unnamed({name: value.div_(weights) for name, value in sums.items()})

    def _weights_of(self, size: tuple[int, ...], device: torch.device) -> Tensor:
        """What all windows of an image of this size weigh at each pixel, H W; kept until an image of another size comes."""
        if (size, device) not in self._weights:
            with torch.inference_mode(False):
                weights = torch.zeros(size, device=device)
            for rows, columns in windows(size, self.window, self.stride):
                weights[rows, columns] += window_weight(weights[rows, columns].shape, self.blend, device)
            self._weights = {(size, device): weights}
        return self._weights[size, device]


class Buffers(threading.local):
    """Memory that is written over: one tensor a name and thread, which grows to the largest size asked for and then stays."""

    def __init__(self) -> None:
        self._kept: dict[str | None, Tensor] = {}

    def zeros(self, name: str | None, shape: Sequence[int], device: torch.device) -> Tensor:
        """Zeros in float32; what was there under this name before is gone."""
        count, kept = math.prod(shape), self._kept.get(name)
        if kept is None or kept.device != device or kept.numel() < count:
            with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside it
                self._kept[name] = kept = torch.empty(count, device=device)
        return kept[:count].zero_().view(shape)


def mean(total: Tensor, passes: int, kind: str) -> Tensor:
    """The average of several passes from their sum: that of vectors is a unit vector."""
    if passes == 1:
        return total
    return F.normalize(total, dim=1) if kind == "vectors" else total / passes


def mirrored(x: Tensor, kind: str) -> Tensor:
    """An output B K H W of a mirrored image as that of the image itself; of vectors, the first component changes its sign."""
    x = x.flip(-1)
    return torch.cat([-x[:, :1], x[:, 1:]], 1) if kind == "vectors" else x


def unnamed(outputs: dict[str | None, Tensor]) -> Output:
    """The dict, or the one tensor of a model without named outputs."""
    return outputs[None] if None in outputs else {str(name): value for name, value in outputs.items()}


def windows(size: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of windows that cover an image of `size`, all of one shape, the last ones flush with its border."""
    axes = []
    for length, side, step in zip(size, window, stride, strict=True):
        side = min(side, length)
        starts = [*range(0, length - side, step), length - side]
        axes.append([slice(start, start + side) for start in starts])
    for rows in axes[0]:
        for columns in axes[1]:
            yield rows, columns


def window_weight(size: Sequence[int], blend: str, device: torch.device) -> Tensor:
    """What each pixel of a window counts, H W, positive: 1, or falling linearly from the centre to the border."""
    if blend == "mean":
        return torch.ones(*size, device=device)
    sides = [1 - ((torch.arange(n, device=device) + 0.5) / n * 2 - 1).abs() for n in size]
    return sides[0][:, None] * sides[1]


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """B C H W at another size, bilinear; the same tensor if it has it already."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W); ValueError if it is neither one nor two positive numbers."""
    found = (size, size) if isinstance(size, int) else tuple(size)
    if len(found) != 2 or min(found) < 1:
        raise ValueError(f"a size is one positive number or (H, W), got {size!r}")
    return found
