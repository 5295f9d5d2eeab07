"""A folder of images -> overlays and raw maps, with the weights of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import ImageOps
from torchvision import tv_tensors

from train.data.files import IMAGE_SUFFIXES, open_image, rgb_array
from train.evaluation import inference, open_run
from train.loader import collate
from train.show import to_rgb
from train.transforms import build_transform


def predict(
    run: str | Path,
    images: str | Path,
    out: str | Path,
    overwrite: bool = False,
    weights: str = "model.safetensors",
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Predicts every image of a folder (or one file) and writes into `out`; returns the files written.

    Dense outputs have the size of the image, upright as its EXIF entry says. Files that are no images are skipped with a line.
    Raises ValueError with its path for an image that cannot be read or two that would have one output, FileExistsError before
    it would replace a file.
    """
    config, task, model, names = open_run(run, overrides, weights)
    if (show := task.show) is None:
        raise ValueError(f"{run}: task {config.task['name']} makes no predictions that could be written")
    device = torch.device(config.run.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device)
    files, out = find_images(Path(images), say), Path(out)
    stems = {path: out / path.stem for path in files}
    if len(set(stems.values())) < len(files):
        twice = sorted(path.name for path in files if sum(other.stem == path.stem for other in files) > 1)
        raise ValueError(f"{images}: {twice[0]} and {twice[1]} would have the same output; rename one")
    if not overwrite:
        taken = [path for stem in stems.values() if out.is_dir() for path in show.outputs(stem) if path.exists()]
        if taken:
            raise FileExistsError(f"{taken[0]} exists; choose another --out, or replace it with --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    size, mean, std = tuple(config.data.size), tuple(config.data.mean), tuple(config.data.std)
    targets, resize = task.targets("val"), config.data.eval_resize
    transform = build_transform(False, targets, size, mean, std, config.augment, eval_resize=resize)
    run_model = inference(task, model, config)
    written: list[Path] = []
    for path, stem in stems.items():
        pixels = torch.from_numpy(rgb_array(ImageOps.exif_transpose(open_image(path))))  # phones store photographs lying
        batch = collate([transform({"image": tv_tensors.Image(pixels), "path": str(path)})])
        with torch.no_grad():
            output = task.forward(run_model, {**batch, "image": batch["image"].to(device)})
            prediction = task.predict(output, tuple(pixels.shape[-2:]))
        written += show.write(stem, to_rgb(pixels), prediction, names)
    say(f"{len(files)} images, {len(written)} files in {out}")
    return written


def find_images(source: Path, say: Callable[[str], None] = print) -> list[Path]:
    """The images of a folder, sorted, or the one file given. FileNotFoundError if there is none."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"no folder or image {source}")
    entries = sorted(path for path in source.iterdir() if path.is_file())
    files = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES]
    for path in entries:
        if path not in files:
            say(f"skipped {path}: not an image ({', '.join(IMAGE_SUFFIXES)})")
    if not files:
        raise FileNotFoundError(f"{source} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return files
