"""What every data set shares: the arguments, the sample it returns, and the checks that name the file."""

import abc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from train.data.files import Unreadable
from train.depth import DepthSpec

SPLITS = ("train", "val")


class ImageDataset(Dataset, abc.ABC):
    """Images with any of three targets. A subclass lists `provides`, finds its files and defines `read` and `__len__`.

    root: folder of the data; None for data that need no files.
    split: "train" or "val"; targets: which of `provides` to read; transform: called on the finished sample.

    A sample is {"image": uint8 3 H W, "label": int, "mask": int64 H W (`ignore_index` marks void), "depth": float32 1 H W
    (metres, 0 = missing), "path": str} with the requested targets only. may_skip: damaged files that another sample may stand
    for, whose complaint is then in "unreadable". in_memory: reads no files, so its constructor takes no root.

    Raises ValueError for an unknown split or a target the data do not have, and when reading a sample: for a label or a mask id
    outside `classes`, or for a map of another size than its image.
    """

    provides: tuple[str, ...] = ()
    classes: list[str] | None = None
    palette: list[tuple[int, int, int]] | None = None
    ignore_index: int = 255
    depth: DepthSpec | None = None
    may_skip: int = 0
    in_memory: bool = False

    def __init__(self, root: str | Path | None, split: str, targets: tuple[str, ...], transform: Callable | None = None):
        if split not in SPLITS:
            raise ValueError(f"split must be 'train' or 'val', got {split!r}")
        missing = [target for target in targets if target not in self.provides]
        if missing:
            raise ValueError(f"{type(self).__name__} has no target {missing[0]!r}; it provides {', '.join(self.provides)}")
        self.root = None if root is None else Path(root).expanduser()
        self.split, self.targets, self.transform = split, tuple(targets), transform

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int) -> dict:
        """The sample before checks and transform: image and masks as arrays or tensors, any targets the files have."""

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample, lost = self.readable(index % len(self))
        sample = sample if self.transform is None else self.transform(sample)
        return sample if lost is None else {**sample, "unreadable": lost}

    def readable(self, index: int) -> tuple[dict, str | None]:
        """A sample and, if it stands for one whose file is damaged, the complaint about that file.

        The next readable sample takes its place, which depends on the files alone. Raises files.Unreadable if none may be
        skipped, or if more than `may_skip` follow each other.
        """
        first: Unreadable | None = None
        for further in range(self.may_skip + 1):
            try:
                return self.checked(self.read((index + further) % len(self))), None if first is None else str(first)
            except Unreadable as error:
                first = first or error
        raise first

    def checked(self, sample: dict) -> dict:
        """The sample as tv_tensors with the requested targets, or a ValueError that names the file and the value."""
        path = sample["path"]
        image = torch.as_tensor(sample["image"])
        out = {"image": tv_tensors.Image(image)}
        size = tuple(image.shape[-2:])
        if "label" in self.targets:
            label = int(sample["label"])
            if self.classes is not None and not 0 <= label < len(self.classes):
                raise ValueError(f"{path}: label {label} is outside the {len(self.classes)} classes")
            out["label"] = label
        if "mask" in self.targets:
            mask = torch.as_tensor(sample["mask"]).long()
            self.check_size(sample, "mask", mask, size)
            self.check_ids(sample, mask)
            out["mask"] = tv_tensors.Mask(mask)
        if "depth" in self.targets:
            depth = torch.as_tensor(sample["depth"]).float()
            depth = depth[None] if depth.ndim == 2 else depth
            self.check_size(sample, "depth", depth, size)
            out["depth"] = tv_tensors.Mask(depth)
        out["path"] = str(path)
        return out

    def check_size(self, sample: dict, target: str, values: torch.Tensor | np.ndarray, size: tuple[int, int]) -> None:
        if tuple(values.shape[-2:]) != size:
            place = sample.get(f"{target}_path", sample["path"])
            raise ValueError(
                f"{place}: the {target} has height x width {values.shape[-2]}x{values.shape[-1]} but its image "
                f"{sample['path']} has {size[0]}x{size[1]}"
            )

    def check_ids(self, sample: dict, mask: torch.Tensor) -> None:
        if self.classes is None:
            return
        bad = (mask != self.ignore_index) & ((mask < 0) | (mask >= len(self.classes)))
        if bad.any():
            value, count = int(mask[bad][0]), int(bad.sum())
            raise ValueError(
                f"{sample.get('mask_path', sample['path'])}: mask id {value} ({count} such pixels) is outside the "
                f"{len(self.classes)} classes 0..{len(self.classes) - 1} and is not the ignore id {self.ignore_index}"
            )


class DescribedDataset(ImageDataset):
    """Data that say nothing of themselves: the configuration describes what the masks and the depth maps hold.

    classes: names of the classes, or how many there are. ignore_index: the mask value that is void.
    id_map: file id -> class id, for masks whose ids are not 0..K-1; ids it leaves out are an error.
    depth_divisor: file units per metre; depth_invalid: file values without a reading; min_depth, max_depth: valid metres.
    """

    def describe(
        self,
        classes: list[str] | int | None,
        ignore_index: int,
        id_map: dict[int, int] | None,
        depth_divisor: float,
        depth_invalid: Sequence[float],
        min_depth: float,
        max_depth: float,
    ) -> None:
        """Takes what its constructor was given. ValueError for masks without classes and for an id_map that leaves them."""
        name = type(self).__name__
        if "mask" in self.targets and classes is None:
            raise ValueError(f"{name}: masks need their classes: set data.args.classes to the names, or to how many there are")
        self.classes = [f"class {i}" for i in range(classes)] if isinstance(classes, int) else classes
        self.ignore_index = ignore_index
        self.id_map = None if id_map is None else {int(file): int(own) for file, own in id_map.items()}
        for file, own in (self.id_map or {}).items():
            if own != ignore_index and not 0 <= own < len(self.classes or ()):
                raise ValueError(
                    f"{name}: id_map sends {file} to {own}, which is outside the {len(self.classes or ())} classes"
                )
        self.depth = DepthSpec(divisor=depth_divisor, min_depth=min_depth, max_depth=max_depth)
        self.depth_invalid = tuple(depth_invalid)
