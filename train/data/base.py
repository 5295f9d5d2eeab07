"""What every data set shares: the arguments, the sample it returns, and the checks that name the file."""

import abc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from train.data.files import (
    RGB,
    FileNotes,
    PixelRules,
    Source,
    Unreadable,
    change_channels,
    read_depth,
    read_image,
    read_mask,
)
from train.data.finding import root_folder
from train.depth import DepthSpec
from train.sample import KINDS, SEGMENTS, VOID

SPLITS = ("train", "val")
Transform = Callable[[dict[str, Any]], dict[str, Any]]


class ImageDataset(Dataset[dict[str, Any]], abc.ABC):
    """Images with any of their targets. A subclass lists `provides`, finds its files and defines `read` and `__len__`.

    A sample is {"image": uint8 C H W, "label": int, "mask": int64 H W (`ignore_index` marks void), "panoptic": int64 H W
    (class * 1000 + number, -1 = void), "depth": float32 1 H W (metres, 0 = missing), "path": str} with the requested targets
    only; other kinds of entries are in train/sample.py.

    Raises ValueError for an unknown split or a target the data do not have, and when reading a sample: for a label or a mask id
    outside `classes`, or for a map of another size than its image.

    Args:
        split: "train" or "val".
        targets: which of `provides` to read.
        transform: called on the finished sample.

    Attributes:
        provides: targets the data have.
        classes, palette, ignore_index: of masks and labels; depth: of depth maps.
        things: the classes that are countable, of panoptic maps.
        offsets: of the further frames of a video, as a sample's "frames" and "pose" are ordered: places in time, or "s" for the
            other camera of a pair.
        known_poses: whether "pose" holds the motions to all of them; NaN stands for one that is not known.
        in_memory: reads no files, so its constructor takes no root.
        any_channels: can hand over whatever channels its files have, not 1 or 3 only.
        pixels: channels, range and size of the images it reads.
        may_skip: damaged files that another sample may stand for, whose complaint is then in "unreadable".
        notices: what looked odd while files were found; data-check reports it.
        notes: is told what each file is; None = nobody asks.
    """

    provides: tuple[str, ...] = ()
    classes: list[str] | None = None
    palette: list[tuple[int, int, int]] | None = None
    things: Sequence[int] = ()
    ignore_index: int = 255
    depth: DepthSpec | None = None
    offsets: tuple[int | str, ...] = ()
    known_poses: bool = False
    in_memory: bool = False
    any_channels: bool = True
    pixels: PixelRules = RGB
    may_skip: int = 0
    notices: tuple[str, ...] = ()
    notes: FileNotes | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the arguments that are passed on to `find` and `describe` in the signature.

        help() and the checks of a configuration read it.
        """
        super().__init_subclass__(**kwargs)
        cls.__signature__ = inspect.Signature(list(parameters(cls, cls.__init__)))  # type: ignore[attr-defined]  # inspect's own hook

    def __init__(self, split: str, targets: Sequence[str], transform: Transform | None = None):
        if split not in SPLITS:
            raise ValueError(f"split must be 'train' or 'val', got {split!r}")
        missing = [target for target in targets if target not in self.provides]
        if missing:
            lacks = " and no ".join(f"target {target!r}" for target in missing)
            raise ValueError(f"{type(self).__name__} has no {lacks}; it provides {', '.join(self.provides)}")
        self.split, self.targets, self.transform = split, tuple(targets), transform

    @classmethod
    def frame(cls, args: Mapping[str, Any]) -> str | None:
        """Which part of a file's image a sample shows, in words for the protocol of a number; None: all of it.

        args: the `data.args` of a configuration.
        """
        return None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int) -> dict[str, Any]:
        """The sample before checks and transform: image and maps as arrays or tensors, any targets the files have."""

    def true_depth(self, index: int) -> np.ndarray | None:
        """The depth map H W of a training frame for a picture, metres; None where the data have none."""
        return None

    def image_files(self) -> list[Path]:
        """The image file of every sample, in order; empty where an image has no file of its own."""
        return []

    def image(self, source: Source, place: str | None = None) -> np.ndarray:
        """The pixels of an image file, uint8 C H W, upright; place: what errors call it where it has no path."""
        return read_image(source, place, self.pixels, self.notes)

    def frames_of(self, sample: Mapping[str, Any], files: Sequence[Path]) -> np.ndarray:
        """The pixels of further frames, uint8 n C H W. ValueError names one of another size than the sample's image."""
        found = []
        for file in files:
            found.append(self.image(file))
            self.check_size({**sample, "frame_path": file}, "frame", found[-1].shape[-2:], sample["image"].shape[-2:])
        return np.stack(found)

    def ids(
        self,
        source: Source,
        place: str | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        id_map: Mapping[int, int] | None = None,
    ) -> np.ndarray:
        """The class ids of a mask file, int64 H W: train.data.files.read_mask.

        Args:
            source: path of the file, or an open one.
            place: what errors call it; None: its path.
            palette: colours in class order, for masks in colour.
            id_map: file id -> class id.
        """
        return read_mask(source, place, palette, id_map, self.ignore_index, self.pixels.max_pixels, self.notes)

    def metres(
        self, path: Path, divisor: float, invalid: Sequence[float] = (0,), content: BinaryIO | None = None
    ) -> np.ndarray:
        """The depth map of a file: train.data.files.read_depth.

        Args:
            path: of the file, or what errors call it.
            divisor: file units per metre.
            invalid: file values without a reading.
            content: the open file, where it is not read from `path`.
        """
        return read_depth(path, divisor, invalid, content, self.pixels.max_pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample, lost = self.readable(index % len(self))
        sample = sample if self.transform is None else self.transform(sample)
        return sample if lost is None else {**sample, "unreadable": lost}

    def readable(self, index: int) -> tuple[dict[str, Any], str | None]:
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
        assert first is not None
        raise first

    def checked(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample as tensors with the requested targets, or a ValueError that names the file and the value."""
        path = sample["path"]
        image = np.asarray(sample["image"])
        image = change_channels(image, self.pixels.channels, str(path)) if image.ndim == 3 else image
        values = {**sample, "image": image}
        if "frames" in self.targets:
            values["frames"] = np.stack([change_channels(f, self.pixels.channels, str(path)) for f in sample["frames"]])
        out: dict[str, Any] = {}
        for name in ("image", *self.targets):
            if name in KINDS:
                try:
                    out[name] = KINDS[name].tensor(values[name])
                except ValueError as error:
                    raise ValueError(f"{sample.get(f'{name}_path', path)}: {error}") from error
                self.check_size(sample, name, KINDS[name].size(out[name]), image.shape[-2:])
            else:
                out[name] = sample[name]
        if "label" in out:
            out["label"] = int(out["label"])
            if self.classes is not None and not 0 <= out["label"] < len(self.classes):
                raise ValueError(f"{path}: label {out['label']} is outside the {len(self.classes)} classes")
        if "mask" in out:
            self.check_ids(sample, out["mask"])
        if "panoptic" in out:
            self.check_segments(sample, out["panoptic"])
        return {**out, "path": str(path)}

    def check_size(self, sample: dict[str, Any], target: str, found: Sequence[int] | None, size: Sequence[int]) -> None:
        """ValueError naming both files if an entry has another height and width than its image.

        Args:
            sample: with its paths, for the error.
            target: the entry's name.
            found: (H, W) of the entry; None: it has none.
            size: (H, W) of the image.
        """
        if found is None or tuple(found) == tuple(size):
            return
        place = sample.get(f"{target}_path", sample["path"])
        text = f"{place}: the {target} has height x width {found[0]}x{found[1]} but its image {sample['path']} has "
        text += f"{size[0]}x{size[1]}"
        if tuple(found) == tuple(reversed(size)):
            text += (
                f". Images are turned upright as their EXIF orientation says: if this image has one, the {target} was drawn on "
                f"the pixels as they are stored; turn the {target}, or save the image upright without the entry"
            )
        raise ValueError(text)

    def check_ids(self, sample: dict[str, Any], mask: torch.Tensor) -> None:
        if self.classes is None:
            return
        bad = (mask != self.ignore_index) & ((mask < 0) | (mask >= len(self.classes)))
        if bad.any():
            value, count = int(mask[bad][0]), int(bad.sum())
            raise ValueError(
                f"{sample.get('mask_path', sample['path'])}: mask id {value} ({count} such pixels) is outside the "
                f"{len(self.classes)} classes 0..{len(self.classes) - 1} and is not the ignore id {self.ignore_index}"
            )

    def check_segments(self, sample: dict[str, Any], segments: torch.Tensor) -> None:
        """ValueError for a segment whose class there is not."""
        count = len(self.classes or ())
        bad = segments[(segments != VOID) & ((segments < 0) | (segments >= count * SEGMENTS))]
        if len(bad):
            raise ValueError(
                f"{sample.get('panoptic_path', sample['path'])}: segment {int(bad[0])} ({len(bad)} such pixels) is outside the "
                f"{count} classes: a panoptic map holds class * {SEGMENTS} + number, and {VOID} for none"
            )


def parameters(cls: type, function: Callable[..., None]) -> Iterator[inspect.Parameter]:
    """The arguments of a method, those instead of **own and **described that `find` and `describe` of the class take."""
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        further = {"own": "find", "described": "describe"}.get(parameter.name)
        if parameter.kind is parameter.VAR_KEYWORD and further is not None:
            yield from parameters(cls, getattr(cls, further))
        else:
            yield parameter


class FileDataset(ImageDataset):
    """A data set in a folder. A subclass finds its files in `find`, whose arguments are the ones of its own.

    Args:
        root: folder of the data.
        split: "train" or "val".
        targets: which of `provides` to read.
        transform: called on the finished sample.
        own: the arguments of `find`; data.args of a configuration.
    """

    def __init__(self, root: str | Path, split: str, targets: Sequence[str], transform: Transform | None = None, **own: Any):
        self.root = root_folder(root, type(self).__name__)
        super().__init__(split, targets, transform)
        self.find(**own)

    @abc.abstractmethod
    def find(self) -> None:
        """Find the files of the split below `root`. Raises FileNotFoundError for what is not there."""


class DescribedDataset(ImageDataset):
    """Data whose files do not say what they hold: the configuration describes the masks and the depth maps.

    Args:
        classes: names of the classes, or how many there are.
        ignore_index: the mask value that is void.
        id_map: file id -> class id, for masks whose ids are not 0..K-1; ids it leaves out are an error.
        depth_divisor: file units per metre.
        depth_invalid: file values without a reading.
        min_depth: nearest valid depth, metres.
        max_depth: farthest valid depth, metres.
    """

    depth: DepthSpec

    def describe(
        self,
        classes: list[str] | int | None = None,
        ignore_index: int = 255,
        id_map: dict[int, int] | None = None,
        depth_divisor: float = 1000.0,
        depth_invalid: Sequence[float] = (0,),
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
    ) -> None:
        """Take the arguments that all such data have. ValueError for masks without classes or an id_map that leaves them."""
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
