"""Judge the facts of a data set.

"error" is what training must not start with, "warning" what is probably a mistake, "note" what is good to know.
"""

from collections.abc import Callable
from dataclasses import dataclass

from train.data.base import ImageDataset
from train.data.facts import SplitFacts
from train.data.files import FileNotes

DIVISORS = (1, 10, 100, 256, 1000, 5000)  # file units per metre seen in public depth data


@dataclass
class Finding:
    level: str  # "error", "warning" or "note"
    split: str
    text: str

    def __str__(self) -> str:
        return f"{self.level.upper():8s}{self.split + ': ' if self.split else ''}{self.text}"


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
    if {"mask", "panoptic"} & set(dataset.targets) and facts.ids:
        examine_masks(dataset, facts, say)
    if facts.segments:
        examine_segments(dataset, facts, say)
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


def examine_segments(dataset: ImageDataset, facts: SplitFacts, say: Callable[[str, str], None]) -> None:
    """What speaks against numbered things."""
    if dataset.things and not any(facts.segments[label] for label in dataset.things):
        say("error", f"no thing is marked{extent(facts)}, though {len(dataset.things)} classes are countable: are ids lost?")
    elif facts.read and dataset.things and facts.most_segments == 1:
        say("warning", f"no image has two segments{extent(facts)}: do the maps tell things apart?")
    if facts.crowds:
        say(
            "note", f"{facts.crowds} segments are crowds of things: nothing is learnt from them, and the metric leaves them out"
        )


def examine_depth(dataset: ImageDataset, facts: SplitFacts, say: Callable[[str, str], None]) -> None:
    spec = dataset.depth
    assert spec is not None  # said by every data set with depth
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
