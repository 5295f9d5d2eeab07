"""Check a data set before training: `zoo data-check CONFIG`, and the few samples that training looks at before it starts.

Facts are counted in facts.py and judged in examine.py; here they become a report.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.checks import Mistakes, sentences_of
from train.data import frames, open_split
from train.data.base import SPLITS, ImageDataset
from train.data.examine import Finding, compare, examine, lossy_sentence, named
from train.data.facts import SplitFacts, read_facts
from train.output import check_writable, make_folder
from train.sample import SEGMENTS
from train.schema import DataConfig
from train.show import Panel, save_sheet, to_rgb
from train.show.depth import metric_panel
from train.show.masks import class_legend, color_mask, overlay
from train.show.normals import color_normals
from train.show.panoptic import numbered_segments
from train.show.sheet import make_palette
from train.tasks import Task

SHEET_ROWS = 6


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
                "segments": {str(key): count for key, count in sorted(facts.segments.items())},
                "depth": {"quantiles": facts.quantiles(), "missing": facts.depth_missing, "pixels": facts.depth_pixels},
                "failures": facts.failures,
            }
            for facts in self.facts
        }
        return {"ok": self.ok, "splits": splits, "findings": [vars(finding) for finding in self.findings]}


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
    if facts.segments:
        things = sum(facts.segments[label] for label in dataset.things)
        total = sum(facts.segments.values())
        mean = f"{total / facts.read:.1f} an image, at most {facts.most_segments}"
        lines.append(f"  segments       {total} ({mean}), {things} of them things")
    if facts.depth_pixels:
        missing = facts.depth_missing / facts.depth_pixels
        low, middle, high = facts.quantiles() or (0, 0, 0)
        lines.append(f"  depth (m)      1% {low:.3g}, median {middle:.3g}, 99% {high:.3g}; {missing:.1%} without a reading")
    return lines


def histogram(dataset: ImageDataset, counts: Counter, total: int, most: int = 30) -> list[str]:
    """One line per id with a bar, the commonest first where there are many.

    Args:
        dataset: whose classes they are.
        counts: id -> pixels or images.
        total: of which each line states a share.
        most: lines at most.
    """
    chosen = sorted(counts) if len(counts) <= most else [i for i, _ in counts.most_common(most)]
    biggest = max(counts.values())
    lines = []
    for i in chosen:
        name = "(ignored)" if i == dataset.ignore_index and {"mask", "panoptic"} & set(dataset.targets) else ""
        if not name and dataset.classes and 0 <= i < len(dataset.classes):
            name = dataset.classes[i]
        bar = "#" * max(1, round(24 * counts[i] / biggest))
        lines.append(f"    {i:5d} {name[:20]:20s} {counts[i] / total:7.2%} {bar}")
    if len(counts) > most:
        lines.append(f"    ... and {len(counts) - most} more ids")
    return lines


def sheet(datasets: list[ImageDataset], path: Path) -> None:
    """A picture of samples spread over the splits: image, mask over the image, segments with their numbers, depth."""
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
            if "panoptic" in dataset.targets and np.shape(sample["panoptic"]) == image.shape[:2]:
                segments = np.asarray(sample["panoptic"])
                row.append(Panel(numbered_segments(image, segments, palette), "segments: class * 1000 + number"))
                row[-1].legend = class_legend(dataset.classes, palette, np.where(segments < 0, -1, segments // SEGMENTS))
            if "frames" in dataset.targets:
                row += frames.panels(dataset, step * len(dataset) // count, sample)
            if "normal" in dataset.targets:
                row.append(Panel(color_normals(np.asarray(sample["normal"])), "normals: red right, green up, blue near"))
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
    unopened: Sequence[Finding] = (),
) -> Report:
    """Facts and findings of the splits.

    Args:
        datasets: the splits, training first.
        task: its `check` is asked whether it can use the data.
        out: folder for data_check.{png,json,txt}; None: nothing is written.
        count: samples of each split to read; None: all.
        progress: is told how many of how many are read.
        unopened: why other splits could not be opened.
    """
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if out is not None:
        check_writable(out)
    facts = [read_facts(dataset, count, progress) for dataset in datasets]
    findings = [*unopened]
    findings += [finding for dataset, one in zip(datasets, facts, strict=True) for finding in examine(dataset, one)]
    findings += compare(datasets, facts)
    findings += [finding for dataset in datasets if "frames" in dataset.targets for finding in frames.findings(dataset)]
    if task is not None:
        for dataset in datasets:
            try:
                task.check(dataset)
            except ValueError as error:
                findings += [
                    Finding("error", dataset.split, f"does not fit the task: {sentence}") for sentence in sentences_of(error)
                ]
    findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.level))
    lines = [line for dataset, one in zip(datasets, facts, strict=True) for line in describe(dataset, one)]
    verdict = "nothing speaks against training" if not findings else f"{len(findings)} finding{'s' * (len(findings) > 1)}"
    if any(finding.level == "error" for finding in findings):
        verdict += ": training with these data cannot be right"
    report = Report(facts, findings, [*lines, "", *map(str, findings), verdict])
    if out is not None:
        folder = make_folder(out)
        sheet(datasets, folder / "data_check.png")
        (folder / "data_check.json").write_text(json.dumps(report.as_dict(), indent=1), encoding="utf-8")
        (folder / "data_check.txt").write_text("\n".join(report.lines) + "\n", encoding="utf-8")
    return report


def refuse(datasets: list[ImageDataset], count: int = 8, val_is_train: bool = False) -> list[str]:
    """What training calls before it starts: ValueError with the first error found in a few samples, of each split that has one.

    An error must hold in 20 times as many samples too: a few may all be void, or lack the second of two classes, by chance.
    Returns sentences that training says once.

    Args:
        datasets: of training and of validation.
        count: samples of each to read.
        val_is_train: the two may be the same images.
    """
    few: list[SplitFacts] = []
    mistakes = []
    for dataset in datasets:
        for number in (count, 20 * count):  # the many include the few
            facts = read_facts(dataset, number)
            few += [facts] if number == count else []
            errors = [finding for finding in examine(dataset, facts) if finding.level == "error"]
            if not errors:
                break
        else:
            mistakes.append(
                f"{type(dataset).__name__}, {errors[0].split}: {errors[0].text}. Training with these data cannot be right; "
                "`zoo data-check` tells more"
            )
    if mistakes:
        raise Mistakes(mistakes)
    sentences = [f"{dataset.split}: {notice}" for dataset in datasets for notice in dataset.notices]
    sentences += [f"{facts.split}: {lossy_sentence(facts.notes)}" for facts in few if facts.notes.lossy_masks]
    return sentences + same_images(datasets, few, val_is_train)


def same_images(datasets: list[ImageDataset], few: list[SplitFacts], val_is_train: bool) -> list[str]:
    """A sentence if validation shows training images. Without `val_is_train` it is a ValueError if all of them are.

    Images are the same if they are one file or, where they have no files, if the splits have as many samples and the few that
    were read, evenly spread, are the same pixels.
    """
    if len(few) != 2:
        return []
    train, val = (dataset.image_files() for dataset in datasets)
    shared = sorted(set(train) & set(val))
    pixels = [set(facts.prints) for facts in few]
    copied = few[0].samples == few[1].samples and pixels[0] == pixels[1] and len(pixels[1]) == few[1].read > 0
    if not shared and not copied:
        return []
    example = shared[0] if shared else next(iter(few[1].prints.values()))
    if not copied and len(shared) < len(set(val)):
        return [f"{len(shared)} of {len(set(val))} validation images are training images too, e.g. {example}"]
    text = f"all {few[1].samples} validation images are training images, e.g. {example}"
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
    datasets, unopened = [], []
    for split in SPLITS:
        try:
            datasets.append(open_split(data, split, task.targets(split), channels))
        except (FileNotFoundError, ValueError) as error:
            unopened += [Finding("error", split, sentence) for sentence in sentences_of(error)]
    report = run(datasets, task, out, count, progress if sys.stderr.isatty() else None, unopened)
    print("\n".join(report.lines))
    if out is not None:
        written = [name for name in ("data_check.png", "data_check.json", "data_check.txt") if (Path(out) / name).is_file()]
        print(f"pictures and numbers in {out}: {', '.join(written)}")
    return 0 if report.ok else 1
