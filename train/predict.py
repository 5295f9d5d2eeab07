"""Photographs and videos -> overlays and raw maps, with the weights of a run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from backbones.ops import neighborhood
from train.data.files import ARRAY_SUFFIXES, IMAGE_SUFFIXES
from train.data.finding import hidden, walk
from train.output import make_folder, whole
from train.prediction import Pipeline, open_model
from train.progress import progress
from train.show import save_sheet
from train.video import VIDEO_SUFFIXES, Video, require_av, rewrite
from weights.read import digest

SUFFIXES = (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES)


@dataclass
class Predicted:
    """What `predict` did: the files written, the inputs that had their files already, and those that cannot be read."""

    written: list[Path] = field(default_factory=list)
    there: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)  # input -> why


def predict(
    run: str | Path,
    images: str | Path,
    out: str | Path,
    overwrite: bool = False,
    weights: str = "model.safetensors",
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
    sheet: bool = False,
) -> Predicted:
    """Predict every image and video of a folder (or one file) and write into `out`, which mirrors the folder's sub-folders.

    Dense outputs have the size of the image, upright as its EXIF entry says. Files that cannot be read are named and passed
    over, so that the rest is done. `out`/predict.json says which weights made the files: the same command again completes what
    is missing. Hidden files and folders are not looked at.
    Raises FileNotFoundError if there is no image, ImportError for a video without PyAV, ValueError for two that would have one
    output or an `out` that cannot be written to, and FileExistsError if files are there that other weights or settings made,
    or if nothing is missing.

    Args:
        run: run folder, or an ONNX file of `zoo export`.
        images: folder, or one image or video.
        out: folder for overlays and raw maps; made if need be.
        overwrite: replace files that are there.
        weights: file in the run folder.
        overrides: configuration keys, as "--data.max_pixels=1e9".
        say: is told what happens, a line at a time.
        sheet: also write each photograph and its prediction side by side.
    """
    model, pipeline = open_model(run, weights, overrides)
    source, out = Path(images), Path(out)
    if source.is_dir() and source.resolve() == out.resolve():
        raise ValueError(f"--out is {images} itself: what is written there would be taken for images; choose another folder")
    files = find_images(source, say, (*SUFFIXES, *VIDEO_SUFFIXES), besides=out)
    if not any(p.is_cuda for p in model.parameters()):
        neighborhood.settle(model)
    base = source if source.is_dir() else source.parent
    stems = {path: out / path.relative_to(base).with_suffix("") for path in files}
    outputs = {path: outputs_of(pipeline, path, stem, sheet) for path, stem in stems.items()}
    maker: dict[str, Path] = {}
    for path in files:
        other = maker.setdefault(str(outputs[path][0]), path)
        if other is not path:
            raise ValueError(f"{images}: {other.name} and {path.name} would have the same output; rename one")
    if any(is_video(path) for path in files):
        require_av()
    done = Predicted()
    made = {"weights": digest(Path(run) if Path(run).is_file() else Path(run) / weights), "overrides": sorted(overrides)}
    if not overwrite:
        taken = [path for path in files if any(file.exists() for file in outputs[path])]
        done.there = [path for path in taken if all(file.exists() for file in outputs[path])]
        if taken and (len(done.there) == len(files) or made_by(out) != made):
            why = "" if made_by(out) == made else ", made by other weights or settings"
            raise FileExistsError(f"{outputs[taken[0]][0]} exists{why}; choose another --out, or replace it with --overwrite")
    make_folder(out)
    (out / "predict.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
    there = set(done.there)
    todo = [path for path in files if path not in there]
    for path in progress(todo, len(todo), "predicting") if len(todo) > 1 else todo:
        try:
            if is_video(path):
                done.written += predict_video(pipeline, model, Video(path), outputs[path][0])
                continue
            pixels, name = pipeline.pixels(path)
        except (ValueError, OSError) as error:
            done.failed[path] = str(error)
            continue
        prediction = pipeline.run(model, pixels, name)
        done.written += prediction.write(stems[path])
        if sheet:
            with whole(outputs[path][-1]) as part:
                save_sheet(part, [prediction.panels()])
            done.written.append(outputs[path][-1])
    before = f", {len(done.there)} were there already" if done.there else ""
    lost = f", {len(done.failed)} cannot be read" if done.failed else ""
    videos = sum(map(is_video, files))
    counts = [f"{count} {kind}" for count, kind in ((len(files) - videos, "images"), (videos, "videos")) if count]
    say(f"{', '.join(counts)}{before}{lost}: {len(done.written)} files written to {out}")
    return done


def outputs_of(pipeline: Pipeline, path: Path, stem: Path, sheet: bool) -> list[Path]:
    """The files that an input makes.

    Args:
        pipeline: that predicts.
        path: of the input.
        stem: path of the outputs without a suffix.
        sheet: whether one of them is the sheet.
    """
    if is_video(path):
        return [stem.with_name(f"{stem.name}_overlay.mp4")]
    return [*pipeline.show.outputs(stem), *([stem.with_name(f"{stem.name}_sheet.png")] if sheet else [])]


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def predict_video(pipeline: Pipeline, model: nn.Module, video: Video, target: Path) -> list[Path]:
    """A video with the prediction over every frame, and the legend or scale of all of them; returns [target].

    Args:
        pipeline: of the run.
        model: of the run.
        video: what is read.
        target: .mp4 file to write.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn = pipeline.show.moving(pipeline.names)

    def change(frame: np.ndarray) -> np.ndarray:
        return drawn(frame, pipeline.predict(model, frame, video.path.name).value)

    rewrite(video, target, change, partial(progress, total=video.frames, text=video.path.name))
    return [target]


def made_by(out: Path) -> dict[str, Any] | None:
    """What predict.json of a folder says; None if there is none, or no JSON."""
    try:
        return json.loads((out / "predict.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def find_images(
    source: Path, say: Callable[[str], None] = print, suffixes: Sequence[str] = SUFFIXES, besides: Path | None = None
) -> list[Path]:
    """The files below a folder with one of the suffixes, sorted, or the one file given. FileNotFoundError if there is none.

    Args:
        source: the folder or file.
        say: is told what is passed over.
        suffixes: that count.
        besides: a folder whose files do not count: what was predicted is no image to predict.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"no folder or image {source}")
    entries = sorted(walk(source))
    if besides is not None:
        made = besides.absolute()
        entries = [path for path in entries if not path.absolute().is_relative_to(made)]
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
