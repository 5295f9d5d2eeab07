"""What is in a split of a data set, counted from samples as the files have them, before a sample's own checks."""

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from train.data.base import ImageDataset
from train.data.files import FileNotes, Unreadable
from train.sample import SEGMENTS, VOID


@dataclass
class SplitFacts:
    """What was read from one split. Depths are metres, counts are pixels unless they say otherwise."""

    split: str
    samples: int
    read: int = 0
    sizes: Counter = field(default_factory=Counter)  # (height, width) -> images
    failures: list[str] = field(default_factory=list)  # one per sample that could not be read
    labels: Counter = field(default_factory=Counter)  # class id -> images
    ids: Counter = field(default_factory=Counter)  # mask id -> pixels, void included
    id_files: dict[int, str] = field(default_factory=dict)  # mask id or label -> first file that has it
    segments: Counter = field(default_factory=Counter)  # class id -> segments of panoptic maps
    crowds: int = 0  # of things
    most_segments: int = 0  # of one image
    void_images: list[str] = field(default_factory=list)  # masks without one labelled pixel
    depth_pixels: int = 0
    depth_missing: int = 0
    depth_outside: int = 0  # read, but outside the valid range
    depth_values: list[np.ndarray] = field(default_factory=list)  # a sample of the readings of each map
    depth_step: float = 0.0  # of maps whose readings lie on at most 256 even steps: the step, metres
    empty_depths: list[str] = field(default_factory=list)
    flat_images: list[str] = field(default_factory=list)
    prints: dict[int, str] = field(default_factory=dict)  # checksum of the pixels -> file
    notes: FileNotes = field(default_factory=FileNotes)  # what the files are

    def quantiles(self) -> list[float]:
        """1st, 50th and 99th percentile of the depth readings, metres."""
        return np.percentile(np.concatenate(self.depth_values), [1, 50, 99]).tolist() if self.depth_values else []


def read_facts(
    dataset: ImageDataset, count: int | None = None, progress: Callable[[int, int], None] | None = None
) -> SplitFacts:
    """Reads `count` samples spread evenly over the split (all if none) and counts what they hold."""
    facts = SplitFacts(dataset.split, len(dataset))
    total = len(dataset) if count is None else min(count, len(dataset))
    dataset.notes = facts.notes
    try:
        for step in range(total):
            index = step * len(dataset) // total
            try:
                read_sample(dataset, index, facts)
            except (ValueError, OSError) as error:
                if not (isinstance(error, Unreadable) and dataset.may_skip):  # training skips and counts those
                    facts.failures.append(str(error))
            if progress is not None:
                progress(step + 1, total)
    finally:
        dataset.notes = None
    return facts


def add_ids(dataset: ImageDataset, facts: SplitFacts, ids: list[int], pixels: list[int], place: str) -> None:
    """Counts the class ids of one map.

    Args:
        dataset: whose map it is.
        facts: that are added to.
        ids: that occur.
        pixels: of each of them.
        place: the map's file.
    """
    for value, number in zip(ids, pixels, strict=True):
        facts.ids[value] += number
        facts.id_files.setdefault(value, place)
    if set(ids) == {dataset.ignore_index}:
        facts.void_images.append(place)


def read_sample(dataset: ImageDataset, index: int, facts: SplitFacts) -> None:
    """Adds one sample to the facts. Raises what its reader raises, and ValueError for maps of another size than the image."""
    sample = dataset.read(index)
    image, path = np.asarray(sample["image"]), str(sample["path"])
    height, width = image.shape[-2:]
    facts.read += 1
    facts.sizes[height, width] += 1
    facts.prints.setdefault(zlib.crc32(np.ascontiguousarray(image).tobytes()), path)
    if image.min() == image.max():
        facts.flat_images.append(path)
    if "label" in dataset.targets:
        facts.labels[int(sample["label"])] += 1
        facts.id_files.setdefault(int(sample["label"]), path)
    if "mask" in dataset.targets:
        mask, place = np.asarray(sample["mask"]), str(sample.get("mask_path", path))
        dataset.check_size(sample, "mask", mask.shape[-2:], (height, width))
        found, pixels = np.unique(mask, return_counts=True)
        add_ids(dataset, facts, found.tolist(), pixels.tolist(), place)
    if "panoptic" in dataset.targets:
        segments, place = np.asarray(sample["panoptic"]), str(sample.get("panoptic_path", path))
        dataset.check_size(sample, "panoptic", segments.shape[-2:], (height, width))
        found, pixels = np.unique(segments, return_counts=True)
        labels = np.where(found == VOID, dataset.ignore_index, found // SEGMENTS)
        if "mask" not in dataset.targets:
            add_ids(dataset, facts, labels.tolist(), pixels.tolist(), place)
        facts.segments.update(labels[found != VOID].tolist())
        facts.crowds += int((np.isin(labels, list(dataset.things)) & (found % SEGMENTS == 0) & (found != VOID)).sum())
        facts.most_segments = max(facts.most_segments, int((found != VOID).sum()))
    if "normal" in dataset.targets:
        dataset.check_size(sample, "normal", np.shape(sample["normal"])[-2:], (height, width))
    if "depth" in dataset.targets:
        depth, place = np.asarray(sample["depth"]).reshape(-1), str(sample.get("depth_path", path))
        dataset.check_size(sample, "depth", np.shape(sample["depth"])[-2:], (height, width))
        readings = depth[depth > 0]
        facts.depth_pixels += depth.size
        facts.depth_missing += depth.size - readings.size
        if not readings.size:
            facts.empty_depths.append(place)
            return
        assert dataset.depth is not None  # said by every data set with depth
        facts.depth_outside += int((~dataset.depth.valid(torch.from_numpy(readings))).sum())
        facts.depth_values.append(readings[:: max(1, readings.size // 500)])
        levels = np.unique(readings)
        if 16 < len(levels) <= 256 and readings.size > 5000:
            steps = np.diff(levels)
            # 1 mm steps are the file's own resolution, and a Kinect's steps grow with the distance: neither is 8 bits
            even = steps.min() > max(0.5 * np.median(steps), 0.008)
            facts.depth_step = max(facts.depth_step, float(np.median(steps))) if even else facts.depth_step
