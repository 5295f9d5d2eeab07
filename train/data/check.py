"""What is in a data set and what cannot be right about it, before hours are spent on training with it.

`zoo data-check CONFIG` reads samples as the files have them (before a sample's own checks), counts what it finds, and sorts its
findings: "error" for what training must not start with, "warning" for what is probably a mistake, "note" for what is good to
know.
"""

import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.data import open_split
from train.data.base import SPLITS, ImageDataset
from train.data.files import FileNotes, Unreadable
from train.schema import DataConfig
from train.show import Panel, save_sheet, to_rgb
from train.show.depth import metric_panel
from train.show.masks import class_legend, color_mask, overlay
from train.show.sheet import make_palette
from train.tasks import Task

DIVISORS = (1, 10, 100, 256, 1000, 5000)  # file units per metre seen in public depth data
SHEET_ROWS = 6


@dataclass
class Finding:
    level: str  # "error", "warning" or "note"
    split: str
    text: str

    def __str__(self) -> str:
        return f"{self.level.upper():8s}{self.split + ': ' if self.split else ''}{self.text}"


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


@dataclass
class Report:
    """Facts of each split, and findings. `ok`: nothing that training must not start with."""

    facts: list[SplitFacts]
    findings: list[Finding]
    lines: list[str]

    @property
    def ok(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text, as data_check.json keeps them."""
        splits = {
            facts.split: {
                "samples": facts.samples,
                "read": facts.read,
                "sizes": {f"{height}x{width}": count for (height, width), count in facts.sizes.items()},
                "labels": {str(key): count for key, count in sorted(facts.labels.items())},
                "mask_pixels": {str(key): count for key, count in sorted(facts.ids.items())},
                "depth": {"quantiles": facts.quantiles(), "missing": facts.depth_missing, "pixels": facts.depth_pixels},
                "failures": facts.failures,
            }
            for facts in self.facts
        }
        return {"ok": self.ok, "splits": splits, "findings": [vars(finding) for finding in self.findings]}


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
        for value, number in zip(found.tolist(), pixels.tolist(), strict=True):
            facts.ids[value] += number
            facts.id_files.setdefault(value, place)
        if found.tolist() == [dataset.ignore_index]:
            facts.void_images.append(place)
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


def examine(dataset: ImageDataset, facts: SplitFacts) -> list[Finding]:
    """What the facts of one split say."""
    found: list[Finding] = []

    def say(level: str, text: str) -> None:
        found.append(Finding(level, facts.split, text))

    if not facts.samples:
        say("error", "the split is empty")
    if facts.failures:
        more = f" (and {len(facts.failures) - 1} more)" if len(facts.failures) > 1 else ""
        say("error", f"cannot be read: {facts.failures[0]}{more}")
    if facts.flat_images:
        say("warning", f"{len(facts.flat_images)} images are one flat colour, e.g. {facts.flat_images[0]}")
    if len(facts.prints) < facts.read:
        say("note", f"{facts.read - len(facts.prints)} images are pixel for pixel copies of others")
    for notice in dataset.notices:
        say("warning", notice)
    examine_files(facts, say)
    if "label" in dataset.targets and facts.labels:
        examine_labels(dataset, facts, say)
    if "mask" in dataset.targets and facts.ids:
        examine_masks(dataset, facts, say)
    if "depth" in dataset.targets and facts.depth_pixels:
        examine_depth(dataset, facts, say)
    return found


def examine_files(facts: SplitFacts, say: Callable[[str, str], None]) -> None:
    """What the files are: how many levels their images have, which are turned, which masks lose ids."""
    notes = facts.notes
    levels = int(notes.levels.sum())
    if notes.types and 1 < levels < 32:
        kinds = "; ".join(f"{name}: {low:g} to {high:g}" for name, (low, high) in notes.ranges.items())
        say("warning", f"all images together have {levels} of 256 grey levels ({kinds}): is data.image_range right?")
    if notes.turned:
        say(
            "note",
            f"{len(notes.turned)} of {sum(notes.types.values())} images have an EXIF orientation and are turned upright, e.g. "
            f"{notes.turned[0]}; their masks and depth maps must be upright too",
        )
    if notes.lossy_masks:
        say("warning", lossy_sentence(notes))
        ids = sorted(facts.ids, key=facts.ids.__getitem__, reverse=True)
        if len(ids) > 2 and any(min(ids[:2]) < value < max(ids[:2]) for value in ids[2:]):
            between = [value for value in ids[2:] if min(ids[:2]) < value < max(ids[:2])]
            level = "error" if len(between) > 8 else "warning"
            say(level, f"{len(between)} ids lie between the two commonest, {ids[0]} and {ids[1]}: compression made them")


def lossy_sentence(notes: FileNotes) -> str:
    """What is wrong with masks in a lossy format."""
    path, kind = notes.lossy_masks[0]
    return (
        f"{len(notes.lossy_masks)} masks are {kind}, whose compression changes ids at every edge, e.g. {path}: save masks as "
        "PNG, from the original annotation"
    )


def examine_labels(dataset: ImageDataset, facts: SplitFacts, say: Callable[[str, str], None]) -> None:
    count = len(dataset.classes) if dataset.classes else max(facts.labels) + 1
    outside = sorted(label for label in facts.labels if not 0 <= label < count)
    for label in outside[:3]:
        say("error", f"label {label} is outside the {count} classes: {facts.id_files[label]}")
    if min(facts.labels) == 1 and max(facts.labels) == count:
        say("error", f"labels run from 1 to {count}: they are off by one, class ids start at 0")
    unseen = [i for i in range(count) if i not in facts.labels]
    if unseen and not outside:
        say("note", f"{len(unseen)} of {count} classes never occur{extent(facts)}: {named(dataset, unseen)}")


def extent(facts: SplitFacts) -> str:
    """What "never" means where only some samples were read."""
    return "" if facts.read == facts.samples else f" in the {facts.read} samples read"


def examine_masks(dataset: ImageDataset, facts: SplitFacts, say: Callable[[str, str], None]) -> None:
    count, void = len(dataset.classes or ()), dataset.ignore_index
    ids = {value: number for value, number in facts.ids.items() if value != void}
    total = sum(facts.ids.values())
    if not ids:
        say("error", f"every pixel is the ignore id {void}: there is nothing to learn")
        return
    outside = sorted(value for value in ids if not 0 <= value < count)
    for value in outside[:5]:
        say(
            "error",
            f"mask id {value} ({ids[value] / total:.2%} of the pixels) is outside the {count} classes: {facts.id_files[value]}",
        )
    if 0 not in ids and max(ids) == count:
        say(
            "error",
            f"ids run from {min(ids)} to {count} and 0 never occurs: off by one, class ids start at 0 (ADE20K-like files?)",
        )
    elif outside == [count] and void not in facts.ids:
        say("warning", f"id {count}, one past the last class, is probably void: map it to the ignore id {void}")
    elif 0 not in ids and not outside and count > 2 and len(ids) >= (count - 1) / 2:
        say(
            "warning",
            f"id 0 ({named(dataset, [0])}) never occurs though {len(ids)} of {count} classes do: are the ids shifted by one?",
        )
    elif 0 in ids and not outside and count - 1 not in ids and ids[0] / total > 0.5 and void not in facts.ids and count > 2:
        say(
            "note",
            f"id 0 covers {ids[0] / total:.0%} and the last class never occurs: if 0 means unlabelled, the ids are off by one",
        )
    if set(facts.ids) <= {0, 255} and 255 in facts.ids and void == 255:
        say(
            "error",
            "masks hold only 0 and 255, and 255 is ignored: a foreground saved as 255 must become id 1 (folder: id_map)",
        )
    share = facts.ids.get(void, 0) / total
    if share > 0.5:
        say("warning", f"{share:.0%} of the pixels are ignored (id {void})")
    if facts.void_images:
        say("warning", f"{len(facts.void_images)} masks have no labelled pixel, e.g. {facts.void_images[0]}")
    unseen = [i for i in range(count) if i not in ids]
    if unseen:
        say("note", f"{len(unseen)} of {count} classes never occur{extent(facts)}: {named(dataset, unseen)}")
    if max(ids.values()) / sum(ids.values()) > 0.95 and len(ids) > 1:
        top = max(ids, key=ids.__getitem__)
        say("warning", f"class {named(dataset, [top])} covers {ids[top] / sum(ids.values()):.1%} of the labelled pixels")


def examine_depth(dataset: ImageDataset, facts: SplitFacts, say: Callable[[str, str], None]) -> None:
    spec = dataset.depth
    readings = facts.depth_pixels - facts.depth_missing
    if not readings:
        say("error", "no depth map has a single reading")
        return
    low, middle, high = facts.quantiles()
    outside = facts.depth_outside / readings
    if outside > 0.5:
        fits = [d for d in DIVISORS if d != spec.divisor and spec.min_depth < middle * spec.divisor / d < spec.max_depth]
        units = "millimetres read as metres" if middle > 10 * spec.max_depth else "another unit in the files"
        hint = f"; the median would fit with divisor {' or '.join(map(str, fits))}" if fits else ""
        say(
            "error",
            f"{outside:.0%} of the readings are outside {spec.min_depth:g}-{spec.max_depth:g} m (median {middle:.4g} m with "
            f"divisor {spec.divisor:g}): {units}?{hint}",
        )
    elif outside > 0.05:
        say("warning", f"{outside:.0%} of the readings are outside {spec.min_depth:g}-{spec.max_depth:g} m and will be ignored")
    if outside <= 0.5 and high < spec.max_depth / 50:
        say(
            "error" if middle < 0.1 else "warning",
            f"99% of the readings are nearer than {high:.3g} m of {spec.max_depth:g} m (divisor {spec.divisor:g}): "
            "metres read as millimetres, or a far too large max_depth?",
        )
    if facts.empty_depths:
        say("warning", f"{len(facts.empty_depths)} depth maps have no reading, e.g. {facts.empty_depths[0]}")
    missing = facts.depth_missing / facts.depth_pixels
    if missing > 0.5:
        say("note", f"{missing:.1%} of the depth pixels have no reading (sparse, as from a lidar)")
    if facts.depth_step > 0:
        say("note", f"readings lie on even steps of {1000 * facts.depth_step:.3g} mm: the depth was once stored in 8 bits")
    if high - low < 1e-6 * high:
        say("error", f"the depth is constant ({middle:.4g} m)")


def compare(datasets: list[ImageDataset], facts: list[SplitFacts]) -> list[Finding]:
    """What two splits together say: shared images, classes that only validation has."""
    if len(facts) < 2:
        return []
    train, val = facts
    found = []
    shared = sorted(set(train.prints) & set(val.prints))
    if shared:
        text = f"{len(shared)} of {len(val.prints)} validation images are also training images, e.g. {val.prints[shared[0]]}"
        found.append(Finding("warning", "", text))
    for kind in ("labels", "ids"):
        known = set(getattr(train, kind))
        new = sorted(
            i for i in set(getattr(val, kind)) - known - {datasets[0].ignore_index} if 0 <= i < len(datasets[0].classes or ())
        )
        if known and new and train.read == train.samples:
            text = f"{len(new)} classes occur in validation and never in training: {named(datasets[0], new)}"
            found.append(Finding("warning", "", text))
    return found


def named(dataset: ImageDataset, ids: list[int], most: int = 6) -> str:
    """Ids with class names, the first few of them."""
    words = [f"{i} {dataset.classes[i]}" if dataset.classes and 0 <= i < len(dataset.classes) else str(i) for i in ids[:most]]
    return ", ".join(words) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def describe(dataset: ImageDataset, facts: SplitFacts) -> list[str]:
    """The facts of a split as lines of text."""
    some = (
        "" if facts.read + len(facts.failures) == facts.samples else f", {facts.read + len(facts.failures)} of them looked at"
    )
    lines = [f"{facts.split}: {facts.samples} samples{some}"]
    if facts.sizes:
        heights, widths = zip(*facts.sizes, strict=True)
        if len(facts.sizes) == 1:
            lines.append(f"  size (h x w)   {heights[0]}x{widths[0]}")
        else:
            lines.append(
                f"  size (h x w)   {min(heights)}..{max(heights)} x {min(widths)}..{max(widths)}, {len(facts.sizes)} different"
            )
    for name, number in facts.notes.types.items():
        low, high = facts.notes.ranges[name]
        lines.append(f"  image files    {number} of {name}, values {low:g} to {high:g}")
    for title, counts, unit in (("labels", facts.labels, "images"), ("mask", facts.ids, "pixels")):
        if counts:
            total = sum(counts.values())
            lines.append(f"  {title:14s} {len(counts)} ids; share of the {unit}:")
            lines += histogram(dataset, counts, total)
    if facts.depth_pixels:
        missing = facts.depth_missing / facts.depth_pixels
        low, middle, high = facts.quantiles() or (0, 0, 0)
        lines.append(f"  depth (m)      1% {low:.3g}, median {middle:.3g}, 99% {high:.3g}; {missing:.1%} without a reading")
    return lines


def histogram(dataset: ImageDataset, counts: Counter, total: int, most: int = 30) -> list[str]:
    """One line per id with a bar, the commonest first where there are many."""
    chosen = sorted(counts) if len(counts) <= most else [i for i, _ in counts.most_common(most)]
    biggest = max(counts.values())
    lines = []
    for i in chosen:
        name = "(ignored)" if i == dataset.ignore_index and "mask" in dataset.targets else ""
        if not name and dataset.classes and 0 <= i < len(dataset.classes):
            name = dataset.classes[i]
        bar = "#" * max(1, round(24 * counts[i] / biggest))
        lines.append(f"    {i:5d} {name[:20]:20s} {counts[i] / total:7.2%} {bar}")
    if len(counts) > most:
        lines.append(f"    ... and {len(counts) - most} more ids")
    return lines


def sheet(datasets: list[ImageDataset], path: Path) -> None:
    """A picture of samples spread over the splits: image, mask over the image, depth; with legend and depth scale."""
    rows: list[list[Panel]] = []
    for dataset in datasets:
        palette = dataset.palette or make_palette(len(dataset.classes or ()) or 1)
        count = min(SHEET_ROWS // len(datasets) or 1, len(dataset))
        if dataset.targets == ("label",):
            count = min(12, len(dataset))
        for step in range(count):
            try:
                sample = dataset.read(step * len(dataset) // count)
            except (ValueError, OSError):
                continue  # already an error of the report
            image = to_rgb(sample["image"])
            name = f"{dataset.split}: {Path(str(sample['path'])).name}"
            row = [Panel(image, name)]
            if "label" in dataset.targets:
                row[0].title += f"\n{named(dataset, [int(sample['label'])])}"
            if "mask" in dataset.targets and np.shape(sample["mask"]) == image.shape[:2]:
                mask = np.asarray(sample["mask"])
                row.append(Panel(overlay(image, mask, palette), "mask over image"))
                row[-1].legend = class_legend(dataset.classes, palette, mask)
                row.append(Panel(color_mask(mask, palette), "mask (black: ignored)"))
            if "depth" in dataset.targets:
                row.append(metric_panel(np.squeeze(np.asarray(sample["depth"])), "depth"))
            rows.append(row)
    if rows:
        save_sheet(path, rows)


def run(
    datasets: list[ImageDataset],
    task: Task | None = None,
    out: str | Path | None = None,
    count: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Facts and findings of the splits (training first); with `out` also data_check.{png,json,txt} in that folder.

    task: its `check` is asked whether it can use the data; count: samples of each split to read.
    """
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    facts = [read_facts(dataset, count, progress) for dataset in datasets]
    findings = [finding for dataset, one in zip(datasets, facts, strict=True) for finding in examine(dataset, one)]
    findings += compare(datasets, facts)
    if task is not None:
        for dataset in datasets:
            try:
                task.check(dataset)
            except ValueError as error:
                findings.append(Finding("error", dataset.split, f"does not fit the task: {error}"))
    findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.level))
    lines = [line for dataset, one in zip(datasets, facts, strict=True) for line in describe(dataset, one)]
    verdict = "nothing speaks against training" if not findings else f"{len(findings)} finding{'s' * (len(findings) > 1)}"
    if any(finding.level == "error" for finding in findings):
        verdict += ": training with these data cannot be right"
    report = Report(facts, findings, [*lines, "", *map(str, findings), verdict])
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        sheet(datasets, folder / "data_check.png")
        (folder / "data_check.json").write_text(json.dumps(report.as_dict(), indent=1), encoding="utf-8")
        (folder / "data_check.txt").write_text("\n".join(report.lines) + "\n", encoding="utf-8")
    return report


def refuse(datasets: list[ImageDataset], count: int = 8, val_is_train: bool = False) -> list[str]:
    """What training calls before it starts: ValueError with the first error found in a few samples of each split.

    An error must hold in 20 times as many samples too: a few may all be void, or lack the second of two classes, by chance.
    Returns sentences that training says once.

    Args:
        datasets: of training and of validation.
        count: samples of each to read.
        val_is_train: the two may be the same images.
    """
    few: list[SplitFacts] = []
    for dataset in datasets:
        for number in (count, 20 * count):  # the many include the few
            facts = read_facts(dataset, number)
            few += [facts] if number == count else []
            errors = [finding for finding in examine(dataset, facts) if finding.level == "error"]
            if not errors:
                break
        else:
            raise ValueError(
                f"{type(dataset).__name__}, {errors[0].split}: {errors[0].text}. Training with these data cannot be right; "
                "`zoo data-check` tells more"
            )
    sentences = [f"{dataset.split}: {notice}" for dataset in datasets for notice in dataset.notices]
    sentences += [f"{facts.split}: {lossy_sentence(facts.notes)}" for facts in few if facts.notes.lossy_masks]
    return sentences + same_images(datasets, few, val_is_train)


def same_images(datasets: list[ImageDataset], few: list[SplitFacts], val_is_train: bool) -> list[str]:
    """A sentence if validation shows the training images, which without `val_is_train` is a ValueError.

    Splits count as the same if they have as many samples and the few that were read, evenly spread, are the same pixels.
    """
    if len(few) != 2 or few[0].samples != few[1].samples:
        return []
    train, val = (set(facts.prints) for facts in few)
    if train != val or not len(val) == few[1].read > 0:  # of copies among themselves nothing is known
        return []
    text = f"training and validation are the same {few[0].samples} images, e.g. {next(iter(few[1].prints.values()))}"
    if not val_is_train:
        raise ValueError(
            f"{type(datasets[0]).__name__}: {text}: no number would say how the model does on new images. Name another "
            "validation split, or set data.val_is_train=true to overfit on purpose"
        )
    return [f"{text}: metrics say how well they are learnt by heart"]


def progress(done: int, total: int) -> None:
    """A counter that overwrites itself, for a terminal."""
    end = "\n" if done == total else ""
    print(f"\rread {done} of {total} samples", end=end, file=sys.stderr, flush=True)


def check(data: DataConfig, task: Task, count: int | None = None, out: str | Path | None = None, channels: int = 3) -> int:
    """`zoo data-check`: prints the report of a configuration's data; 0 if training may start, 1 if not.

    Args:
        data: the `data` section.
        task: is asked whether it can use the data.
        count: samples of each split to read; None = all.
        out: folder for pictures and numbers.
        channels: model.in_chans.
    """
    datasets = []
    for split in SPLITS:
        try:
            datasets.append(open_split(data, split, task.targets(split), channels))
        except (FileNotFoundError, ValueError) as error:
            print(f"ERROR   {split}: {error}")
    if not datasets:
        return 1
    report = run(datasets, task, out, count, progress if sys.stderr.isatty() else None)
    print("\n".join(report.lines))
    if out is not None:
        print(f"pictures and numbers: {Path(out) / 'data_check.png'}, data_check.json, data_check.txt")
    return 0 if report.ok and len(datasets) == len(SPLITS) else 1
