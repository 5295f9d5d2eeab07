"""A folder of images -> overlays and raw maps, with the weights of a run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.data.files import ARRAY_SUFFIXES, IMAGE_SUFFIXES, PixelRules, read_image
from train.data.finding import hidden, walk
from train.evaluation import inference, open_run
from train.loader import collate
from train.show import Names, Show, to_rgb
from train.transforms import build_transform
from weights.read import digest


@dataclass
class Predicted:
    """What `predict` did: the files written, the images that had their files already, and those that cannot be read."""

    written: list[Path] = field(default_factory=list)
    there: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)  # image -> why


def predict(
    run: str | Path,
    images: str | Path,
    out: str | Path,
    overwrite: bool = False,
    weights: str = "model.safetensors",
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Predicted:
    """Predict every image of a folder (or one file) and write into `out`, which mirrors the folder's sub-folders.

    Dense outputs have the size of the image, upright as its EXIF entry says. Images that cannot be read are named and passed
    over, so that the rest is done. `out`/predict.json says which weights made the files: the same command again completes what
    is missing. Hidden files and folders are not looked at.
    Raises FileNotFoundError if there is no image, ValueError for two that would have one output, and FileExistsError if files
    are there that other weights or settings made, or if nothing is missing.

    Args:
        run: run folder.
        images: folder, or one image.
        out: folder for overlays and raw maps; made if need be.
        overwrite: replace files that are there.
        weights: file in the run folder.
        overrides: configuration keys, as "--data.max_pixels=1e9".
        say: is told what happens, a line at a time.
    """
    config, task, model, names = open_run(run, overrides, weights)
    if (show := task.show) is None:
        raise ValueError(f"{run}: task {config.task['name']} makes no predictions that could be written")
    device = torch.device(config.run.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device)
    source, out = Path(images), Path(out)
    files = find_images(source, say)
    base = source if source.is_dir() else source.parent
    stems = {path: out / path.relative_to(base).with_suffix("") for path in files}
    by_stem: dict[Path, Path] = {}
    for path, stem in stems.items():
        if stem in by_stem:
            raise ValueError(f"{images}: {by_stem[stem].name} and {path.name} would have the same output; rename one")
        by_stem[stem] = path
    done = Predicted()
    maker = {"weights": digest(Path(run) / weights), "overrides": sorted(overrides)}
    if not overwrite:
        taken = [path for path, stem in stems.items() if any(file.exists() for file in show.outputs(stem))]
        done.there = [path for path in taken if all(file.exists() for file in show.outputs(stems[path]))]
        if taken and (len(done.there) == len(files) or made_by(out) != maker):
            why = "" if made_by(out) == maker else ", made by other weights or settings"
            raise FileExistsError(
                f"{show.outputs(stems[taken[0]])[0]} exists{why}; choose another --out, or replace it with --overwrite"
            )
    out.mkdir(parents=True, exist_ok=True)
    (out / "predict.json").write_text(json.dumps(maker, indent=1), encoding="utf-8")
    rules = PixelRules(config.model.in_chans, config.data.image_range, config.data.max_pixels)
    data = config.data
    assert data.mean is not None and data.std is not None  # filled in when the configuration was read
    targets, resize = task.targets("val"), data.eval_resize
    transform = build_transform(False, targets, data.size, data.mean, data.std, config.augment, eval_resize=resize)
    run_model = inference(task, model, config)
    for path in files:
        if path in done.there:
            continue
        try:
            pixels = torch.from_numpy(read_image(path, rules=rules))
        except (ValueError, OSError) as error:
            done.failed[path] = str(error)
            continue
        batch = collate([transform({"image": pixels, "path": str(path)})])
        with torch.no_grad():
            output = task.forward(run_model, {**batch, "image": batch["image"].to(device)})
            prediction = task.predict(output, (pixels.shape[-2], pixels.shape[-1]))
        done.written += write_whole(show, stems[path], to_rgb(pixels), prediction, names)
    before = f", {len(done.there)} were there already" if done.there else ""
    lost = f", {len(done.failed)} cannot be read" if done.failed else ""
    say(f"{len(files)} images{before}{lost}: {len(done.written)} files written to {out}")
    return done


def write_whole(show: Show, stem: Path, image: np.ndarray, prediction: Any, names: Names) -> list[Path]:
    """`show.write` under hidden names that become the right ones when all is written: a killed run leaves no half a file.

    Args:
        show: writes.
        stem: path without suffix; its folder is made.
        image: uint8 H W 3.
        prediction: as the task's `predict` returns it.
        names: of the classes.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = show.outputs(stem)
    for temporary, file in zip(show.write(stem.with_name(f".{stem.name}"), image, prediction, names), files, strict=True):
        temporary.replace(file)
    return files


def made_by(out: Path) -> dict[str, Any] | None:
    """What predict.json of a folder says; None if there is none, or no JSON."""
    try:
        return json.loads((out / "predict.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def find_images(source: Path, say: Callable[[str], None] = print) -> list[Path]:
    """The images below a folder, sorted, or the one file given. FileNotFoundError if there is none."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"no folder or image {source}")
    entries = sorted(walk(source))
    suffixes = (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES)
    files = [path for path in entries if path.suffix.lower() in suffixes]
    for path in entries:
        if path.suffix.lower() not in suffixes:
            say(f"skipped {path}: not an image ({', '.join(suffixes)})")
    passed_over = sorted(entry.name for entry in source.iterdir() if hidden(entry.name))
    if passed_over:
        say(f"skipped {len(passed_over)} hidden entries of {source}, e.g. {passed_over[0]}")
    if not files:
        raise FileNotFoundError(f"{source} holds no image ({', '.join(suffixes)})")
    return files
