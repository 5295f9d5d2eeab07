"""`zoo config --new KIND FOLDER`: a configuration for a folder of one's own, written after a look at its files."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from train.data.files import ARRAY_SUFFIXES, DEPTH_SUFFIXES, IMAGE_SUFFIXES, MASK_SUFFIXES
from train.data.finding import subfolders, walk

KINDS = ("segmentation", "depth", "classification")
LOOKED_AT = 300  # files at most, evenly spread, of which values and sizes are read
MASK_WORDS = re.compile(r"mask|label|annot|gt|seg|target", re.IGNORECASE)
DEPTH_WORDS = re.compile(r"depth|disp|gt|target", re.IGNORECASE)
NAME_LISTS = ("classes.txt", "labels.txt", "names.txt")
LAYOUTS = {
    "segmentation": "images/ and masks/ with the same file names, each with or without train/ and val/ in it",
    "depth": "images/ and depths/ with the same file names, each with or without train/ and val/ in it",
    "classification": "one folder a class, or train/ and val/ with one folder a class in each",
}


@dataclass
class Pairs:
    """Folders of images and of their targets, as data.args of `folder` name them.

    Attributes:
        images: pattern below the folder; has {split} where the data are divided.
        targets: likewise.
        suffixes: of images and of targets, before the extension.
        files: image and target of every training pair.
    """

    images: str
    targets: str
    suffixes: tuple[str, str]
    files: list[tuple[Path, Path]]


def new(kind: str, folder: str | Path, say: Callable[[str], None] = lambda text: None) -> str:
    """The text of a complete, commented configuration that trains on the folder as it is.

    Raises FileNotFoundError for a folder that is not there, ValueError with the layouts that are understood if its files fit
    none, or if a mask cannot be read as classes.

    Args:
        kind: "segmentation", "depth" or "classification".
        folder: of the data.
        say: is told what was found.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if kind not in KINDS:
        raise ValueError(f"--new {kind}: {', '.join(KINDS)}")
    if kind == "classification":
        return _classification(root, say)
    words, endings = (MASK_WORDS, MASK_SUFFIXES) if kind == "segmentation" else (DEPTH_WORDS, DEPTH_SUFFIXES)
    pairs = find_pairs(root, words, endings)
    if pairs is None:
        raise ValueError(f"{root}: no {kind} data of a known layout: {LAYOUTS[kind]}")
    say(f"{len(pairs.files)} pairs: {pairs.images} and {pairs.targets}")
    return _segmentation(root, pairs, say) if kind == "segmentation" else _depth(root, pairs, say)


def find_pairs(root: Path, words: re.Pattern, endings: Sequence[str]) -> Pairs | None:
    """The two folders whose files have the same names, or one folder whose files differ in a suffix; None if there are none.

    Args:
        root: where to look, two folders deep.
        words: in the names of targets' folders, or in their suffixes.
        endings: of target files.
    """
    folders = [root, *(a for a in subfolders(root)), *(b for a in subfolders(root) for b in subfolders(a))]
    held = {path: [f for f in sorted(path.iterdir()) if f.is_file() and not f.name.startswith(".")] for path in folders}
    found: list[Pairs] = []
    for targets in folders:
        name = targets.relative_to(root).as_posix()
        theirs = {f.stem: f for f in held[targets] if f.suffix.lower() in endings}
        if not theirs or not words.search(name):
            continue
        for images in folders:
            ours = {f.stem: f for f in held[images] if f.suffix.lower() in (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES)}
            label = images.relative_to(root).as_posix()
            if images == targets or not ours or words.search(label) or _split(label) != _split(name):
                continue
            suffixes = _suffixes(list(ours), list(theirs))
            if suffixes is None:
                continue
            one, other = suffixes
            pairs = [(f, theirs[stem.removesuffix(one) + other]) for stem, f in ours.items()]
            found.append(Pairs(label, name, suffixes, pairs))
    for images in folders:  # one folder, told apart by suffixes
        stems = {f.stem: f for f in held[images] if f.suffix.lower() in (*IMAGE_SUFFIXES, *endings)}
        ends = Counter(match[0] for stem in stems if (match := re.search(r"_[A-Za-z]+$", stem)))
        for other in (end for end in ends if words.search(end)):
            for one in (end for end in ends if not words.search(end)):
                both = [(f, stems[s.removesuffix(one) + other]) for s, f in stems.items() if s.endswith(one)
                        and s.removesuffix(one) + other in stems]  # fmt: skip
                if both and len(both) == ends[one]:
                    label = images.relative_to(root).as_posix()
                    found.append(Pairs(label, label, (one, other), both))
    if not found:
        return None
    divided = [p for p in found if _split(p.images) == "train" and any(_counterpart(p, q) for q in found)]
    if divided:
        best = max(divided, key=lambda p: len(p.files))
        return Pairs(_pattern(best.images), _pattern(best.targets), best.suffixes, best.files)
    return max(found, key=lambda p: len(p.files))


def _split(name: str) -> str:
    """The split that a path below the folder names, "" for none."""
    return next((part for part in re.split(r"[/_.-]", name) if part in ("train", "val")), "")


def _pattern(name: str) -> str:
    """The path with its split as {split}; braces of the name itself doubled."""
    escaped = name.replace("{", "{{").replace("}", "}}")
    return re.sub(r"(^|[/_.-])train(?=$|[/_.-])", r"\1{split}", escaped, count=1)


def _counterpart(train: Pairs, val: Pairs) -> bool:
    return all(_pattern(a).format(split="val") == b for a, b in ((train.images, val.images), (train.targets, val.targets)))


def _suffixes(images: list[str], targets: list[str]) -> tuple[str, str] | None:
    """What follows the common name in images and in targets; None unless every image has a target."""
    there = set(targets)
    ends = [re.search(r"_[A-Za-z]+$", stems[0]) for stems in (images, targets)]
    ones, others = ((["", end[0]] if end else [""]) for end in ends)
    for one in ones:
        for other in others:
            if all(stem.endswith(one) and stem.removesuffix(one) + other in there for stem in images):
                return one, other
    return None


def _spread(files: Sequence[Any]) -> list[Any]:
    """At most LOOKED_AT of the files, evenly spread."""
    step = max(1, math.ceil(len(files) / LOOKED_AT))
    return list(files[::step])


def _values(path: Path) -> np.ndarray:
    """What a target file holds: H W numbers, or H W 3 colours. ValueError names a file that cannot be read."""
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return np.asarray(arrays[arrays.files[0]]).squeeze()
        if path.suffix.lower() in ARRAY_SUFFIXES:
            return np.load(path, allow_pickle=False).squeeze()
        with Image.open(path) as image:
            if image.mode in ("RGB", "RGBA"):
                return np.asarray(image.convert("RGB"))
            return np.asarray(image).astype(np.int64) if image.mode == "1" else np.asarray(image)
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _image_size(files: Sequence[Path]) -> tuple[int, int]:
    """The middle (height, width) of the images."""
    sizes = []
    for path in _spread(files)[:60]:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            try:
                with Image.open(path) as image:
                    sizes.append((image.height, image.width))
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
        else:
            sizes.append(_values(path).shape[:2])
    sizes.sort(key=lambda size: size[0] * size[1])
    return sizes[len(sizes) // 2]


def _network_size(size: tuple[int, int], most: int) -> list[int]:
    """A size of the same shape whose long side is at most `most`, in multiples of 32."""
    scale = min(1.0, most / max(size))
    return [max(32, round(side * scale / 32) * 32) for side in size]


def _segmentation(root: Path, pairs: Pairs, say: Callable[[str], None]) -> str:
    masks = [target for _, target in pairs.files]
    ids: Counter = Counter()
    colors: Counter = Counter()
    palette: list[list[int]] | None = None
    for path in _spread(masks):
        values = _values(path)
        if values.ndim == 3:
            packed = values.astype(np.int64) @ np.array([65536, 256, 1])
            colors.update(dict(zip(*(part.tolist() for part in np.unique(packed, return_counts=True)))))
            if len(colors) > 256:
                raise ValueError(f"{path} is a picture with more than 256 colours, not a mask: masks hold class ids or colours")
        elif values.dtype.kind in "biu":
            ids.update(dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)))))
        else:
            raise ValueError(f"{path}: a mask must hold whole numbers, and this one holds {values.dtype}")
    if colors and ids:
        raise ValueError(f"{root}: some masks are in colour and some hold ids; make them one kind")
    args: dict[str, Any] = {"images": pairs.images, "masks": pairs.targets}
    notes: dict[str, str] = {}
    if pairs.suffixes[0]:
        args["image_suffix"] = pairs.suffixes[0]
    if pairs.suffixes[1]:
        args["mask_suffix"] = pairs.suffixes[1]
    if colors:
        palette = [[c >> 16, c >> 8 & 255, c & 255] for c in sorted(colors)]
        args["classes"] = _class_names(root, len(palette)) or [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in palette]
        args["palette"] = palette
        notes["palette"] = "colours of the masks in the order of their numbers; put the names of the classes in the same order"
    else:
        found = sorted(ids)
        void = 255 if found[-1] == 255 and len(found) > 1 and found != [0, 255] else None
        real = [i for i in found if i != void]
        if real != list(range(len(real))) and (found == [0, 255] or real[-1] + 1 > 2 * len(real) + 20):
            args["id_map"] = {value: i for i, value in enumerate(real)} | ({void: 255} if void else {})
            notes["id_map"] = "value in the files -> class"
            count = len(real)
        else:
            count = real[-1] + 1
        args["classes"] = _class_names(root, count) or [f"class {i}" for i in range(count)]
        notes["ignore_index"] = "255 is in the masks: void, left out of loss and score" if void else "the masks have no void"
        args["ignore_index"] = 255
        say(f"ids {', '.join(map(str, found[:12]))}{' ...' if len(found) > 12 else ''}: {count} classes")
    notes["classes"] = "their number is the task's: it is not asked again"
    if len(args["classes"]) < 2:
        raise ValueError(f"{root}: the masks hold one class; a segmentation needs two")
    size = _image_size([image for image, _ in pairs.files])
    model = {"backbone": "nat_mini", "head": "upernet", "head_args": {"width": 128}}
    return _text(
        root, "segmentation", {"name": "segmentation"}, model, "folder", args, notes, size, len(pairs.files), pairs.images
    )


def _depth(root: Path, pairs: Pairs, say: Callable[[str], None]) -> str:
    from train.data.files import read_depth

    values = []
    for _, path in _spread(pairs.files):
        metres = read_depth(path, 1.0)
        seen = metres[metres > 0]
        values.append(np.random.default_rng(0).choice(seen, min(len(seen), 2000)) if len(seen) else seen)
    readings = np.concatenate(values) if values else np.zeros(0)
    if not len(readings):
        raise ValueError(f"{root}: the depth maps hold no reading above 0")
    middle, far = float(np.median(readings)), float(np.quantile(readings, 0.999))
    divisor, unit = (1, "metres") if middle < 100 else (1000, "millimetres")
    say(f"readings about {middle:.4g}, 99.9 % below {far:.4g}: taken for {unit}")
    most = float(math.ceil(far / divisor))
    args: dict[str, Any] = {"images": pairs.images, "depths": pairs.targets}
    if pairs.suffixes[0]:
        args["image_suffix"] = pairs.suffixes[0]
    if pairs.suffixes[1]:
        args["depth_suffix"] = pairs.suffixes[1]
    args |= {"depth_divisor": divisor, "max_depth": most}
    notes = {
        "depth_divisor": f"file units per metre: the middle reading is {middle:.4g}, taken for {unit}; KITTI has 256",
        "max_depth": "metres; readings beyond it count as missing",
    }
    size = _image_size([image for image, _ in pairs.files])
    model = {"backbone": "nat_mini", "head": "dpt", "head_args": {"width": 64}}
    task = {"name": "depth", "max_depth": most}
    return _text(root, "depth", task, model, "folder", args, notes, size, len(pairs.files), pairs.images)


def _classification(root: Path, say: Callable[[str], None]) -> str:
    def classes_in(folder: Path) -> list[Path]:
        return [sub for sub in subfolders(folder) if any(f.suffix.lower() in IMAGE_SUFFIXES for f in walk(sub))]

    divided = [name for name in ("train", "val") if (root / name).is_dir() and classes_in(root / name)]
    base = root / "train" if "train" in divided else root
    found = classes_in(base)
    if len(found) < 2 or divided == ["val"]:
        raise ValueError(f"{root}: no classification data of a known layout: {LAYOUTS['classification']}")
    files = [f for sub in found for f in walk(sub) if f.suffix.lower() in IMAGE_SUFFIXES]
    say(f"{len(files)} images of {len(found)} classes")
    args: dict[str, Any] = (
        {} if len(divided) == 2 else {"train_folder": "train" if divided else ".", "val_share": 0.2, "val_seed": 0}
    )
    count = len(subfolders(base))  # an empty class folder is a class all the same
    size = _image_size(files)
    return _text(
        root, "classification", {"name": "classification", "num_classes": count}, {"backbone": "nat_mini"}, "class_folder",
        args, {}, size, len(files), "{split}" if len(divided) == 2 else "."
    )  # fmt: skip


def _class_names(root: Path, count: int) -> list[str] | None:
    """The lines of a list of class names beside the data, if it has as many."""
    for name in NAME_LISTS:
        if (root / name).is_file():
            lines = [line.strip() for line in (root / name).read_text(encoding="utf-8", errors="replace").splitlines()]
            lines = [line for line in lines if line]
            if len(lines) == count:
                return lines
    return None


def _text(
    root: Path,
    kind: str,
    task: dict[str, Any],
    model: dict[str, Any],
    dataset: str,
    args: dict[str, Any],
    notes: dict[str, str],
    size: tuple[int, int],
    count: int,
    images: str,
) -> str:
    """The file. Every key has a comment where its value is a guess.

    Args:
        root: folder of the data.
        kind: of the task, for the first line.
        task: section.
        model: section.
        dataset: name of the data set.
        args: its arguments.
        notes: what to say of an argument.
        size: (height, width) of the images.
        count: training images.
        images: pattern of the images; has {split} where the data are divided.
    """
    if "{split}" not in images and dataset == "folder":
        args = args | {"val_share": 0.2, "val_seed": 0}
    if "val_share" in args:
        notes = notes | {"val_share": "of the images validates, always the same ones; another val_seed chooses others"}
        count = max(1, count - round(0.2 * count))
    sized = [224, 224] if kind == "classification" and min(size) >= 160 else _network_size(size, 512)
    batch = min(8, count)
    steps = max(100, min(20_000, math.ceil(40 * count / batch)))
    every = max(50, steps // 20)
    crop = {"crop": "area", "scale": [0.3, 1.0]} if kind == "classification" else {"crop": "scale", "scale": [0.75, 1.5]}
    lines = [
        f"# {kind.capitalize()} on {root.name}: written by `zoo config --new {kind}` after a look at its files.",
        "# zoo data-check THIS_FILE reads every file; zoo train THIS_FILE trains; zoo config THIS_FILE shows all keys.",
        f"task: {_flow(task)}",
        "model:",
        f"  backbone: {model['backbone']}  # any timm name; `pretrained: true` loads released weights (zoo list --pretrained)",
        *(f"  {key}: {_flow(value)}" for key, value in model.items() if key != "backbone"),
        "data:",
        f"  name: {dataset}",
        f"  root: {_flow(str(root.resolve()))}",
        f"  size: {sized}  # height and width of the network's input; the middle image has {size[0]} x {size[1]}",
        "  workers: 2",
        "  eval_batch: 4",
    ]
    if args:
        lines.append("  args:")
        for key, value in args.items():
            note = f"  # {notes[key]}" if key in notes else ""
            lines.append(f"    {key}: {_flow(value)}{note}")
    lines += [
        f"augment: {_flow({**crop, 'hflip': 0.5, 'color_jitter': 0.3})}",
        "optim:",
        "  lr: 0.0005",
        "  weight_decay: 0.05",
        f"  global_batch: {batch}",
        f"  steps: {steps}  # about 40 passes over {count} images",
        f"  warmup_steps: {max(1, steps // 20)}",
        "  clip_norm: 1.0",
        "run:",
        f"  eval_every: {every}",
        f"  save_every: {every}",
    ]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1_000_000, allow_unicode=True)
    return text.strip().removesuffix("...").strip()
