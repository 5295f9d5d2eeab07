"""From a sample of train/data to what the network sees: the image and every entry with pixels always move together.

What an operation does to an entry is said by its kind (train/sample.py). Masks and depth are only ever picked, never mixed:
nearest neighbour for both, so no pixel between two classes gets a third and no depth is interpolated across a missing reading.
Where a crop or a rotation leaves the image, the mask becomes `ignore_index`, the depth 0 (missing) and the image the mean
colour. Randomness comes from the global generators of Python, numpy and torch; `Seeded` makes it a function of (seed, epoch,
index).
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from train.inference import pair
from train.sample import KINDS, Kind, Look, Size, is_dense
from train.schema import AugmentConfig, EvalResize


def build_transform(
    train: bool,
    task_targets: Sequence[str],
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    augment: AugmentConfig | None = None,
    ignore_index: int = 255,
    eval_resize: EvalResize = None,
    depth_divisor: float = 1.0,
) -> "TrainTransform | EvalTransform":
    """The transform of a split.

    Its output holds "image" float32 C H W, normalised; in training targets with pixels are of that size, in evaluation of the
    files' own. Raises ValueError for settings that contradict each other or the targets.

    Args:
        train: augment, or only resize.
        task_targets: which targets samples have.
        size: (H, W) of the network's input, in evaluation unless `eval_resize` says otherwise.
        mean: of the normalisation, one value of 0..1 per channel.
        std: likewise.
        augment: what changes a training image; None = nothing.
        ignore_index: of the data set, for the pixels that padding adds to a mask.
        eval_resize: how dense evaluation sizes an image.
        depth_divisor: units of a depth file per metre, for augment.cut_depth_form file_units.
    """
    augment = augment or AugmentConfig()
    dense = is_dense(task_targets)
    check_augment(augment, dense, size, mean, std)
    check_eval_resize(eval_resize, dense)
    if train:
        return TrainTransform(augment, dense, pair(size), tuple(mean), tuple(std), ignore_index, depth_divisor)
    return EvalTransform(augment, dense, pair(size), tuple(mean), tuple(std), ignore_index, eval_resize)


def check_eval_resize(rule: EvalResize, dense: bool) -> None:
    """Raise ValueError for a rule that does not fit the task, or is none."""
    if rule is None or (rule == "native" and dense):
        return
    if not dense:
        raise ValueError("data.eval_resize is for dense tasks; classification crops the centre (augment.eval_crop)")
    if isinstance(rule, str) or len(rule) != 2 or not 0 < rule[0] <= rule[1]:
        raise ValueError(f"data.eval_resize must be native, or (short side, largest long side) in pixels, got {rule}")


def evaluation_size(height: int, width: int, size: tuple[int, int], rule: EvalResize) -> tuple[int, int]:
    """(H, W) at which the network sees an image of height x width in the evaluation of a dense task.

    Args:
        height, width: of the image.
        size: data.size.
        rule: data.eval_resize.
    """
    if rule is None:
        return size
    if rule == "native":
        return height, width
    short, long = rule
    scale = min(short / min(height, width), long / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def describe_evaluation(size: tuple[int, int], rule: EvalResize) -> str:
    """What `evaluation_size` does, in words: part of the protocol of a number."""
    if rule is None:
        return f"images resized to {size[0]}x{size[1]}"
    if rule == "native":
        return "images at their own size"
    return f"images resized to a short side of {rule[0]} and a long side of at most {rule[1]}, ratio kept"


def check_augment(
    augment: AugmentConfig, dense: bool, size: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> None:
    """Raise ValueError for settings that contradict each other, the task or the number of channels (of mean and std).

    Args:
        augment: the settings.
        dense: whether a target has a value per pixel.
        size: (H, W) of the network's input.
        mean: of the normalisation, one value per channel.
        std: likewise.
    """
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width) in pixels, got {tuple(size)}")
    if len(mean) != len(std) or min(std) <= 0:
        raise ValueError(
            f"mean and std need one value per channel and std must be positive, got {tuple(mean)} and {tuple(std)}"
        )
    if augment.crop not in ("resize", "area", "scale", "native", "pad"):
        raise ValueError(f"augment.crop must be resize, area, scale, native or pad, got {augment.crop!r}")
    if not 0 < augment.scale[0] <= augment.scale[1]:
        raise ValueError(f"augment.scale must be (low, high) with 0 < low <= high, got {tuple(augment.scale)}")
    if augment.crop == "area" and augment.scale[1] > 1:
        raise ValueError(f"augment.scale is a share of the image's area for crop 'area', got {tuple(augment.scale)}")
    if not 0 < augment.ratio[0] <= augment.ratio[1]:
        raise ValueError(f"augment.ratio must be (low, high) with 0 < low <= high, got {tuple(augment.ratio)}")
    for name in ("hflip", "vflip", "color_jitter_prob", "cut_depth", "random_erasing"):
        if not 0 <= getattr(augment, name) <= 1:
            raise ValueError(f"augment.{name} is a probability, got {getattr(augment, name)}")
    if not 0 < augment.eval_crop <= 1:
        raise ValueError(f"augment.eval_crop is a share of the image in (0, 1], got {augment.eval_crop}")
    if augment.zoom_depth and augment.crop not in ("scale", "native"):
        raise ValueError("augment.zoom_depth needs crop 'scale' or 'native', which zoom by a known factor")
    if augment.color_jitter and len(mean) not in (1, 3):
        raise ValueError(f"augment.color_jitter changes grey and RGB images, and these have {len(mean)} channels; set it to 0")
    if augment.auto_augment is not None and len(mean) != 3:
        raise ValueError(f"augment.auto_augment needs RGB images, and these have {len(mean)} channels; set it to null")
    if dense:
        for name, off in (("auto_augment", None), ("random_erasing", 0.0), ("eval_crop", 1.0)):
            if getattr(augment, name) != off:
                raise ValueError(
                    f"augment.{name} is for classification only: it would move the image away from its mask or depth"
                )


def covering_size(height: int, width: int, size: Size, crop: float) -> Size:
    """(H, W) to which classification resizes an image before the centre is cut out, as timm's "center" mode has it.

    Its rounding too: one pixel more on the long side moves every sample of the crop. A square crop comes from torchvision's
    Resize, which cuts off the fraction; another one from timm's ResizeKeepRatio, which rounds.

    Args:
        height, width: of the image.
        size: (H, W) of the crop.
        crop: share of the resized image that the crop keeps.
    """
    down, across = (math.floor(side / crop) for side in size)
    if size[0] == size[1]:
        return (down, down * width // height) if height <= width else (down * height // width, down)
    ratio = min(height / down, width / across)
    return max(round(height / ratio), size[0]), max(round(width / ratio), size[1])


class _Transform:
    """What both transforms share; the arguments are those of `build_transform`."""

    def __init__(
        self, augment: AugmentConfig, dense: bool, size: Size, mean: Sequence[float], std: Sequence[float], ignore_index: int
    ):
        self.augment, self.dense, self.size = augment, dense, size
        # of pixels that count to 255
        self.mean, self.std = (255 * torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
        colour = [round(255 * value) for value in mean]
        self.look = Look(colour, ignore_index, vision.InterpolationMode(augment.interpolation))

    def each(self, sample: dict[str, Any], change: Callable[[Kind, Tensor], Tensor]) -> dict[str, Any]:
        """The sample with change(kind, value) applied to every entry that has a kind."""
        return {name: change(KINDS[name], value) if name in KINDS else value for name, value in sample.items()}

    def resized(self, sample: dict[str, Any], size: Size) -> dict[str, Any]:
        """The sample at another size."""
        old = image_size(sample)
        return self.each(sample, lambda kind, value: kind.resize(value, old, size, self.look))

    def finished(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with its pictures normalised."""
        return {name: self.normalised(sample, name) if is_picture(name) else value for name, value in sample.items()}

    def normalised(self, sample: dict[str, Any], name: str) -> Tensor:
        image = sample[name]
        channels = image.shape[-3]
        if len(self.mean) != channels:
            raise ValueError(f"{sample['path']}: the image has {channels} channels, mean and std have {len(self.mean)}")
        return (image - self.mean).div_(self.std)


class EvalTransform(_Transform):
    """Dense targets: the image resized as `evaluation_size` says, the target untouched.

    Labels alone: the image covers size / eval_crop, then the centre of that size is cut out (timm's "center" mode).

    Args:
        augment: the section.
        dense: whether the targets are maps.
        size: (H, W) of the network's input.
        mean, std: of the normalisation.
        ignore_index: the mask value of void.
        eval_resize: data.eval_resize.
    """

    def __init__(
        self,
        augment: AugmentConfig,
        dense: bool,
        size: Size,
        mean: Sequence[float],
        std: Sequence[float],
        ignore_index: int,
        eval_resize: EvalResize,
    ):
        super().__init__(augment, dense, size, mean, std, ignore_index)
        self.eval_resize = eval_resize

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        seen = {name: value for name, value in sample.items() if name in KINDS and not KINDS[name].target}
        height, width = image_size(sample)
        if self.dense:
            seen = self.resized(seen, evaluation_size(height, width, self.size, self.eval_resize))
        else:
            seen = self.resized(seen, covering_size(height, width, self.size, self.augment.eval_crop))
            top, left = (round((have - want) / 2) for have, want in zip(image_size(seen), self.size, strict=True))
            seen = self.each(seen, lambda kind, value: kind.crop(value, top, left, self.size))
        return self.finished({**sample, **seen})


class TrainTransform(_Transform):
    """Geometry, then colour, then normalisation, then erasing: the order of timm and mmsegmentation.

    Args:
        augment: the section.
        dense: whether the targets are maps.
        size: (H, W) of the network's input.
        mean, std: of the normalisation.
        ignore_index: the mask value of void.
        depth_divisor: units of a depth file per metre.
    """

    def __init__(
        self,
        augment: AugmentConfig,
        dense: bool,
        size: Size,
        mean: Sequence[float],
        std: Sequence[float],
        ignore_index: int,
        depth_divisor: float = 1.0,
    ):
        super().__init__(augment, dense, size, mean, std, ignore_index)
        self.depth_divisor = depth_divisor
        strength = augment.color_jitter
        self.box = v2.RandomResizedCrop(size, augment.scale, augment.ratio) if augment.crop == "area" else None
        self.jitter = v2.ColorJitter(strength, strength, strength, strength / 10) if strength else None
        self.policy = timm_policy(augment.auto_augment, self.look.colour, min(size)) if augment.auto_augment else None
        self.erase = RandomErasing(augment.random_erasing, mode="pixel", device="cpu") if augment.random_erasing else None

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        augment = self.augment
        published = augment.cut_depth_form == "file_units"
        if published and self.cuts(sample):
            draws = float(torch.rand(())), float(torch.rand(()))
            sample = {**sample, "image": cut_strip(sample["image"], sample["depth"] * self.depth_divisor, *draws)}
        sample = getattr(self, f"_{augment.crop}")(sample)
        for probability, axis in ((augment.hflip, -1), (augment.vflip, -2)):
            if probability and torch.rand(()) < probability:
                sample = self.flipped(sample, axis)
        if augment.rotate:
            degrees = uniform(-augment.rotate, augment.rotate)
            sample = self.each(sample, lambda kind, value: kind.rotate(value, degrees, self.size, self.look))
        if self.policy is not None:
            image = self.policy(vision.to_pil_image(sample["image"]))
            sample["image"] = vision.pil_to_tensor(image)
        if "frames" in sample:  # losses compare the frames as they are, networks see changed colours
            sample["views"] = torch.cat([sample["image"][None], sample["frames"]])
        if self.jitter is not None and torch.rand(()) < augment.color_jitter_prob:
            sample = self.jittered(sample)
        sample = self.finished(sample)
        if not published and self.cuts(sample):
            left = int(self.size[1] * torch.rand(()))
            width = max(1, int(0.75 * (self.size[1] - left) * torch.rand(())))  # 0.75 of the rest at most: GLPN's number
            sample["image"][:, :, left : left + width] = sample["depth"][:, :, left : left + width]
        if self.erase is not None:
            sample["image"] = self.erase(sample["image"])
        return sample

    def cuts(self, sample: dict[str, Any]) -> bool:
        """Whether this sample gets a strip of its depth."""
        return bool(self.augment.cut_depth and "depth" in sample and torch.rand(()) < self.augment.cut_depth)

    def jittered(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with other colours, the same change for all frames of a video."""
        assert self.jitter is not None
        if "frames" not in sample:
            return {**sample, "image": self.jitter(sample["image"])}
        changed = self.jitter(sample["views"])
        return {**sample, "image": changed[0], "frames": changed[1:]}

    def flipped(self, sample: dict[str, Any], axis: int) -> dict[str, Any]:
        """The mirrored sample: axis -1 swaps left and right, -2 top and bottom."""
        return self.each(sample, lambda kind, value: kind.flip(value, axis, self.size))

    def _resize(self, sample: dict[str, Any]) -> dict[str, Any]:
        return self.resized(sample, self.size)

    def _pad(self, sample: dict[str, Any]) -> dict[str, Any]:
        border = [self.augment.pad] * 4
        sample = self.resized(sample, self.size)
        return self._cropped(self.each(sample, lambda kind, value: kind.pad(value, border, self.look)))

    def _area(self, sample: dict[str, Any]) -> dict[str, Any]:
        assert self.box is not None  # it goes with this crop
        top, left, height, width = self.box.make_params([sample["image"]]).values()
        box = self.each(sample, lambda kind, value: kind.crop(value, top, left, (height, width)))
        return self.resized(box, self.size)

    def _scale(self, sample: dict[str, Any]) -> dict[str, Any]:
        height, width = image_size(sample)
        return self._zoomed(sample, max(self.size[0] / height, self.size[1] / width))

    def _native(self, sample: dict[str, Any]) -> dict[str, Any]:
        return self._zoomed(sample, 1.0)

    def _zoomed(self, sample: dict[str, Any], base: float) -> dict[str, Any]:
        height, width = image_size(sample)
        factor = uniform(*self.augment.scale)
        zoom = base * factor
        new = (max(1, round(height * zoom)), max(1, round(width * zoom)))
        sample = self.resized(sample, new)
        if self.augment.zoom_depth:
            sample = self.each(sample, lambda kind, value: kind.zoom(value, factor))
        short = [max(0, want - have) for want, have in zip(self.size, new, strict=True)]
        if any(short):
            top, left = (int(torch.randint(extra + 1, ())) for extra in short)  # the image lands anywhere inside the padding
            border = [left, top, short[1] - left, short[0] - top]
            sample = self.each(sample, lambda kind, value: kind.pad(value, border, self.look))
        return self._cropped(sample)

    def _cropped(self, sample: dict[str, Any]) -> dict[str, Any]:
        height, width = image_size(sample)
        top = int(torch.randint(height - self.size[0] + 1, ()))
        left = int(torch.randint(width - self.size[1] + 1, ()))
        return self.each(sample, lambda kind, value: kind.crop(value, top, left, self.size))


def cut_strip(image: Tensor, depth: Tensor, alpha: float, beta: float) -> Tensor:
    """A uint8 image C H W whose strip holds the depth 1 H W in file units, modulo 256 (CutDepth as GLPN's code has it).

    The depth is a saw-tooth in the image: 0.256 m a period where a unit is a millimetre.

    Args:
        image: uint8 C H W.
        depth: 1 H W, units of the file.
        alpha: where the strip begins, a share of the width.
        beta: how wide it is, times 0.75 of the width that is left.
    """
    width = image.shape[-1]
    left = int(alpha * width)
    strip = slice(left, left + int(max((width - alpha * width) * beta * 0.75, 1)))
    image = image.clone()
    # 0.01 more, because metres of whole units are off by up to 0.004 of a unit in float32
    image[..., strip] = depth[..., strip].double().add(0.01).floor().remainder(256).to(torch.uint8)
    return image


def image_size(sample: dict[str, Any]) -> Size:
    """Height and width of a sample's image."""
    height, width = sample["image"].shape[-2:]
    return height, width


def is_picture(name: str) -> bool:
    """Whether an entry of a sample has colours."""
    return name in KINDS and KINDS[name].picture


def uniform(low: float, high: float) -> float:
    """One number from torch's global generator."""
    return low + (high - low) * float(torch.rand(()))


def timm_policy(text: str, fill: Sequence[int], side: int) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment or AutoAugment policy from its text form, on PIL images.

    Raises ValueError for a policy timm does not know.
    """
    options = {"translate_const": int(side * 0.45), "img_mean": tuple(fill)}  # timm's own numbers
    kind = text.split("-")[0]
    if kind == "rand":
        policy = rand_augment_transform(text, options)
        operations = policy.ops
    elif kind in ("original", "originalr", "v0", "v0r", "3a"):
        policy = auto_augment_transform(text, options)
        operations = [operation for pair in policy.policy for operation in pair]
    else:
        raise ValueError(f"augment.auto_augment must start with rand, original, originalr, v0, v0r or 3a, got {text!r}")
    for operation in operations:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return policy


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """The highest `bits` of every value. No bits, which magnitude 10 asks for, make black; Pillow 13 refuses that."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


class Samples(Protocol):
    """What `Seeded` draws from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Seeded(Dataset[dict[str, Any]]):
    """A data set whose augmentation depends on (seed, draw, index) alone, not on workers, processes or what ran before.

    It is indexed by pairs (index, draw), as train.loader makes them; an index alone has draw 0.

    Args:
        dataset: has no transform of its own.
        transform: of `build_transform`.
        seed: of the run.
        then: called on the transformed sample; it draws from the same generators.
    """

    def __init__(
        self,
        dataset: Samples,
        transform: Callable[[dict[str, Any]], dict[str, Any]],
        seed: int = 0,
        then: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ):
        self.dataset, self.transform, self.seed, self.then = dataset, transform, seed, then

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        index, draw = index if isinstance(index, tuple) else (index, 0)
        sample = self.dataset[index]
        with seeded(self.seed, draw, index):
            sample = self.transform(sample)
            return sample if self.then is None else self.then(sample)


_DRAWS = np.random.MT19937(0)  # numpy's generator inside `seeded`: swapping it in is 40 times as fast as saving the old state


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside the block Python, numpy and torch (CPU) draw from seeds made of `numbers`; afterwards they go on as before.

    Blocks do not nest.
    """
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()  # type: ignore[attr-defined]  # not in numpy's stubs
    words = np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(3)
    random.seed(int(words[0]))
    np.random.set_bit_generator(_DRAWS)  # type: ignore[attr-defined]  # likewise
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])  # type: ignore[attr-defined]  # likewise
        torch.set_rng_state(states[2])
