"""From a sample of train/data to what the network sees: image, mask and depth always moved together.

Labels and depth are only ever picked, never mixed: nearest neighbour for both, so no pixel between two classes gets a third and
no depth is interpolated across a missing reading. Where a crop or a rotation leaves the image, the mask becomes `ignore_index`,
the depth 0 (missing) and the image the mean colour. Randomness comes from the global generators of Python, numpy and
torch; `Seeded` makes it a function of (seed, epoch, index).
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

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
) -> "TrainTransform | EvalTransform":
    """The transform of a split; size is (H, W) of the network's input, in evaluation unless `eval_resize` says otherwise.

    Its output holds plain tensors: "image" float32 3 H W, normalised; in training "mask" H W and "depth" 1 H W of that size, in
    evaluation at the files' own size. ignore_index: of the data set, for the pixels that padding adds to a mask.
    Raises ValueError for settings that contradict each other or the targets.
    """
    augment = augment or AugmentConfig()
    dense = any(target in ("mask", "depth") for target in task_targets)
    check_augment(augment, dense, size, mean, std)
    check_eval_resize(eval_resize, dense)
    if train:
        return TrainTransform(augment, dense, tuple(size), tuple(mean), tuple(std), ignore_index)
    return EvalTransform(augment, dense, tuple(size), tuple(mean), tuple(std), ignore_index, eval_resize)


def check_eval_resize(rule: EvalResize, dense: bool) -> None:
    """ValueError for what cannot be meant."""
    if rule is None or (rule == "native" and dense):
        return
    if not dense:
        raise ValueError("data.eval_resize is for dense tasks; classification crops the centre (augment.eval_crop)")
    if isinstance(rule, str) or len(rule) != 2 or not 0 < rule[0] <= rule[1]:
        raise ValueError(f"data.eval_resize must be native, or (short side, largest long side) in pixels, got {rule}")


def evaluation_size(height: int, width: int, size: tuple[int, int], rule: EvalResize) -> tuple[int, int]:
    """(H, W) at which the network sees an image of height x width in the evaluation of a dense task."""
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


def check_augment(augment: AugmentConfig, dense: bool, size: Sequence, mean: Sequence, std: Sequence) -> None:
    """ValueError for what cannot be meant."""
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
    if dense:
        for name, off in (("auto_augment", None), ("random_erasing", 0.0), ("eval_crop", 1.0)):
            if getattr(augment, name) != off:
                raise ValueError(
                    f"augment.{name} is for classification only: it would move the image away from its mask or depth"
                )


class _Transform:
    def __init__(self, augment: AugmentConfig, dense: bool, size, mean, std, ignore_index: int):
        self.augment, self.dense, self.size, self.ignore_index = augment, dense, size, ignore_index
        self.interpolation = vision.InterpolationMode(augment.interpolation)
        # of pixels that count to 255
        self.mean, self.std = (255 * torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
        self.fill = {"image": [round(255 * value) for value in mean], "mask": ignore_index, "depth": 0}

    def resized(self, name: str, value: Tensor, size: tuple[int, int]) -> Tensor:
        """One entry of a sample at another size: images smoothly and antialiased, maps by nearest neighbour."""
        if tuple(value.shape[-2:]) == tuple(size):
            return value
        if name == "image":
            return vision.resize(value, list(size), interpolation=self.interpolation, antialias=True)
        return pick_nearest(value, size)

    def finished(self, sample: dict) -> dict:
        """The normalised image and plain tensors."""
        image = plain(sample["image"])
        if len(self.mean) != len(image):
            raise ValueError(f"{sample['path']}: the image has {len(image)} channels, mean and std have {len(self.mean)}")
        image = (image - self.mean).div_(self.std)
        return {**{name: plain(value) for name, value in sample.items()}, "image": image}


class EvalTransform(_Transform):
    """Dense targets: the image resized as `evaluation_size` says, the target untouched.

    Labels alone: the image covers size / eval_crop, then the centre of that size is cut out (timm's "center" mode).
    """

    def __init__(self, augment: AugmentConfig, dense: bool, size, mean, std, ignore_index: int, eval_resize: EvalResize):
        super().__init__(augment, dense, size, mean, std, ignore_index)
        self.eval_resize = eval_resize

    def __call__(self, sample: dict) -> dict:
        image = sample["image"]
        if self.dense:
            image = self.resized("image", image, evaluation_size(*image.shape[-2:], self.size, self.eval_resize))
        else:
            height, width = image.shape[-2:]
            zoom = max(self.size[0] / height, self.size[1] / width) / self.augment.eval_crop
            image = self.resized(
                "image", image, (max(round(height * zoom), self.size[0]), max(round(width * zoom), self.size[1]))
            )
            image = vision.center_crop(image, list(self.size))
        return self.finished({**sample, "image": image})


class TrainTransform(_Transform):
    """Geometry, then colour, then normalisation, then erasing: the order of timm and mmsegmentation."""

    def __init__(self, augment: AugmentConfig, dense: bool, size, mean, std, ignore_index: int):
        super().__init__(augment, dense, size, mean, std, ignore_index)
        strength = augment.color_jitter
        self.box = v2.RandomResizedCrop(size, augment.scale, augment.ratio) if augment.crop == "area" else None
        self.jitter = v2.ColorJitter(strength, strength, strength, strength / 10) if strength else None
        self.policy = timm_policy(augment.auto_augment, self.fill["image"], min(size)) if augment.auto_augment else None
        self.erase = RandomErasing(augment.random_erasing, mode="pixel", device="cpu") if augment.random_erasing else None

    def __call__(self, sample: dict) -> dict:
        augment = self.augment
        sample = getattr(self, f"_{augment.crop}")({name: plain(value) for name, value in sample.items()})
        if augment.hflip and torch.rand(()) < augment.hflip:
            sample = self.each(sample, lambda name, value: value.flip(-1))
        if augment.vflip and torch.rand(()) < augment.vflip:
            sample = self.each(sample, lambda name, value: value.flip(-2))
        if augment.rotate:
            sample = self._rotated(sample, uniform(-augment.rotate, augment.rotate))
        if self.policy is not None:
            image = self.policy(vision.to_pil_image(sample["image"]))
            sample["image"] = vision.pil_to_tensor(image)
        if self.jitter is not None and torch.rand(()) < augment.color_jitter_prob:
            sample["image"] = self.jitter(sample["image"])
        sample = self.finished(sample)
        if augment.cut_depth and "depth" in sample and torch.rand(()) < augment.cut_depth:
            left = int(self.size[1] * torch.rand(()))
            width = max(1, int(0.75 * (self.size[1] - left) * torch.rand(())))  # 0.75 of the rest at most: GLPN's number
            sample["image"][:, :, left : left + width] = sample["depth"][:, :, left : left + width]
        if self.erase is not None:
            sample["image"] = self.erase(sample["image"])
        return sample

    @staticmethod
    def each(sample: dict, change) -> dict:
        """The sample with change(name, value) applied to everything that has a height and a width."""
        return {name: change(name, value) if name in ("image", "mask", "depth") else value for name, value in sample.items()}

    def _resize(self, sample: dict) -> dict:
        return self.each(sample, lambda name, value: self.resized(name, value, self.size))

    def _pad(self, sample: dict) -> dict:
        sample = self._resize(sample)
        pad = self.augment.pad
        sample = self.each(sample, lambda name, value: self._bordered(name, value, [pad] * 4))
        return self._cropped(sample)

    def _area(self, sample: dict) -> dict:
        top, left, height, width = self.box.make_params([sample["image"]]).values()
        box = self.each(sample, lambda name, value: value[..., top : top + height, left : left + width])
        return self._resize(box)

    def _scale(self, sample: dict) -> dict:
        height, width = sample["image"].shape[-2:]
        return self._zoomed(sample, max(self.size[0] / height, self.size[1] / width))

    def _native(self, sample: dict) -> dict:
        return self._zoomed(sample, 1.0)

    def _zoomed(self, sample: dict, base: float) -> dict:
        height, width = sample["image"].shape[-2:]
        factor = uniform(*self.augment.scale)
        zoom = base * factor
        new = (max(1, round(height * zoom)), max(1, round(width * zoom)))
        sample = self.each(sample, lambda name, value: self.resized(name, value, new))
        if self.augment.zoom_depth and "depth" in sample:
            sample["depth"] = sample["depth"] / factor
        short = [max(0, want - have) for want, have in zip(self.size, new, strict=True)]
        if any(short):
            top, left = (int(torch.randint(extra + 1, ())) for extra in short)  # the image lands anywhere inside the padding
            border = [left, top, short[1] - left, short[0] - top]
            sample = self.each(sample, lambda name, value: self._bordered(name, value, border))
        return self._cropped(sample)

    def _bordered(self, name: str, value: Tensor, border: list[int]) -> Tensor:
        """One entry with (left, top, right, bottom) more pixels, filled with what says "nothing here"."""
        flat = value[None] if value.ndim == 2 else value
        flat = vision.pad(flat, border, fill=self.fill[name])
        return flat[0] if value.ndim == 2 else flat

    def _cropped(self, sample: dict) -> dict:
        height, width = sample["image"].shape[-2:]
        top = int(torch.randint(height - self.size[0] + 1, ()))
        left = int(torch.randint(width - self.size[1] + 1, ()))
        return self.each(sample, lambda name, value: value[..., top : top + self.size[0], left : left + self.size[1]])

    def _rotated(self, sample: dict, degrees: float) -> dict:
        nearest = vision.InterpolationMode.NEAREST

        def turn(name, value):
            smooth = vision.InterpolationMode.BILINEAR if name == "image" else nearest
            flat = value[None] if value.ndim == 2 else value
            return vision.rotate(flat, degrees, interpolation=smooth, fill=self.fill[name]).reshape(value.shape)

        return self.each(sample, turn)


def plain(value):
    """A tv_tensor as an ordinary tensor; anything else unchanged."""
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value


def uniform(low: float, high: float) -> float:
    """One number from torch's global generator."""
    return low + (high - low) * float(torch.rand(()))


def pick_nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """A map H W or 1 H W at another size, each new pixel the old one under its centre: no value that was not there before."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).floor().long().clamp_max(old - 1)
        for new, old in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]


def timm_policy(text: str, fill: Sequence[int], side: int):
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


def posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """The highest `bits` of every value. None of them is black: magnitude 10 asks for that, and Pillow 13 refuses it."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


class Seeded(Dataset):
    """A data set whose augmentation depends on (seed, epoch, index) alone, not on workers, processes or what ran before.

    dataset: without a transform of its own; transform: of `build_transform`; then: called on the transformed sample, and draws
    from the same generators. An index may also be a pair (index, draw): then
    draw takes the place of the epoch, which gives an endless or a repeating sampler the same guarantee. The epoch lives in
    shared memory, so `set_epoch` reaches loader processes that are already running.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[dict], dict],
        seed: int = 0,
        then: Callable[[dict], dict] | None = None,
    ):
        self.dataset, self.transform, self.seed, self.then = dataset, transform, seed, then
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        index, draw = index if isinstance(index, tuple) else (index, int(self._epoch))
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
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    words = np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(3)
    random.seed(int(words[0]))
    np.random.set_bit_generator(_DRAWS)
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])
        torch.set_rng_state(states[2])
