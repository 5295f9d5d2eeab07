"""`zoo analyze` and `zoo explain`: what vision transformers do inside, as one JSON file and a picture of each analysis."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights
from backbones.analysis import activations, attention, dimension, explain, heads, local, registers, similarity, spectrum
from backbones.analysis.run import evaluation, grid_of, vit_of
from train.checks import nearest
from train.data.files import RGB, PixelRules, read_image
from train.evaluation import open_run
from train.output import check_writable, make_folder, whole
from train.plugins import built_at
from train.predict import find_images
from train.show import Panel, save_sheet, to_rgb
from train.show.analysis import DRAW, heat, short


@dataclass
class Subject:
    """A model with what its images need.

    Attributes:
        name: of the model or run folder.
        model: in evaluation mode.
        size: height and width of its images, pixels.
        mean: of the normalisation, by channel.
        std: of the normalisation, by channel.
        classes: names of its classes, or None.
        rules: how pixels of files are read; a run's own.
    """

    name: str
    model: nn.Module
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str] | None = None
    rules: PixelRules = RGB

    def images(self, files: Sequence[Path]) -> Tensor:
        """n C H W: each image resized to `size` (bicubic) and normalised."""
        rows = []
        for path in files:
            try:
                pixels = torch.from_numpy(np.ascontiguousarray(read_image(path, rules=self.rules))).float() / 255
            except ValueError as error:
                text, found, _ = str(error).partition("; set data.image_range")
                if not found or self.rules is not RGB:
                    raise
                raise ValueError(f"{text}: save it with 8 bits") from error  # a model by name has no such key
            rows.append(F.interpolate(pixels[None], self.size, mode="bicubic", antialias=True)[0].clamp(0, 1))
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (torch.stack(rows) - mean) / std


def open_subject(
    source: str,
    size: Sequence[int] | None = None,
    checkpoint: str | None = None,
    untrained: bool = False,
    which: str | None = None,
) -> Subject:
    """A run folder's model, or a model by name with its released weights. ValueError with the nearest name for neither.

    Args:
        source: run folder or model name.
        size: height and width of the images; None: the run's or the model's own.
        checkpoint: file of weights for a model by name.
        untrained: leave a model by name with random weights.
        which: of several weights in that file, as for weights.load_checkpoint.
    """
    if which and not checkpoint:
        raise ValueError(f"--which {which} chooses among the weights of a file: name it with --checkpoint, or leave it out")
    if Path(source).is_dir():
        if checkpoint or untrained:
            raise ValueError(f"{source} is a run folder and has weights of its own; leave out --checkpoint and --untrained")
        config, _, model, names = open_run(source)
        mean, std = tuple(config.data.mean or ()), tuple(config.data.std or ())
        height, width = size or config.data.size
        rules = PixelRules(config.model.in_chans, config.data.image_range, config.data.max_pixels)
        return Subject(str(source), model, (height, width), mean, std, names.classes, rules)
    if not timm.is_model(source):
        raise ValueError(f"{source!r} is neither a run folder nor a model; {nearest(source, timm.list_models())}")
    released = not (checkpoint or untrained)
    model = built_at(source, size, pretrained=released).eval()
    if checkpoint:
        weights.load_checkpoint(model, checkpoint, which=which)
    about: Any = model.pretrained_cfg
    height, width = size or about["input_size"][1:]
    return Subject(source, model, (height, width), tuple(about["mean"]), tuple(about["std"]))


# ---------------------------------------------------------------------------------------------------------------- analyses

Result = dict[str, Any]


def plain(value: Any) -> Any:
    """Dataclasses and tensors as what JSON holds."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def measured_heads(subject: Subject, images: Tensor, files: Sequence[Path], batch: int) -> heads.HeadImportance:
    """Head importance, the class of an image being the folder it lies in.

    Args:
        subject: the model.
        images: N 3 H W.
        files: where they come from; the name of each one's folder is its class.
        batch: images at a time.
    """
    return heads.head_importance(subject.model, images, torch.tensor(labels_of(subject, files)), batch)


def labels_of(subject: Subject, files: Sequence[Path]) -> list[int]:
    """The class of each image by the folder it lies in. Raises ValueError where there are no classes or no such folder."""
    classes = subject.classes
    if classes is None:
        raise ValueError(f"heads: {subject.name} has no class names; a classification run has, and folders named after them")
    for path in files:
        if path.parent.name not in classes:
            hint = nearest(path.parent.name, classes)
            raise ValueError(f"heads: {path} does not lie in a folder named after a class; {hint}")
    return [classes.index(path.parent.name) for path in files]


def looked_at(subject: Subject, images: Tensor, files: Sequence[Path], batch: int) -> Any:
    """Attention statistics of a flat ViT, or of a network whose attention is local.

    Args:
        subject: the model and how it takes images.
        images: B 3 H W, all of them.
        files: they came from, which are not needed here.
        batch: images taken at a time.
    """
    measure = local.local_attention_statistics if local.local_attentions(subject.model) else attention.attention_statistics
    return measure(subject.model, images, batch)


def check_subject(subject: Subject, what: Sequence[str], files: Sequence[Path]) -> None:
    """Raises ValueError, with the reason, unless the analyses `what` are defined for this model and these images."""
    if "heads" in what:
        labels_of(subject, files)
    if not local.local_attentions(subject.model):
        vit_of(subject.model)
    elif others := [name for name in what if name != "attention"]:
        lost = ", ".join(others)
        raise ValueError(f"{subject.name} attends in parts of its map, and {lost} need a flat ViT: use --what attention")


ANALYSES: dict[str, Callable[[Subject, Tensor, Sequence[Path], int], Any]] = {
    "attention": looked_at,
    "spectrum": lambda s, x, f, b: spectrum.feature_spectrum(s.model, x, b),
    "similarity": lambda s, x, f, b: similarity.layer_similarity(s.model, x, batch_size=max(b, 4)),
    "dimension": lambda s, x, f, b: dimension.effective_dimension(s.model, x, b),
    "activations": lambda s, x, f, b: activations.activation_statistics(s.model, x, batch_size=b),
    "artefacts": lambda s, x, f, b: registers.measure_artefacts(vit_of(s.model), x, batch_size=b),
    "heads": measured_heads,
}
DEFAULT = tuple(name for name in ANALYSES if name != "heads")  # heads needs labels


def analyze(
    sources: Sequence[str],
    images: Sequence[str | Path],
    out: str | Path,
    what: Sequence[str] = DEFAULT,
    size: Sequence[int] | None = None,
    checkpoint: str | None = None,
    untrained: bool = False,
    batch: int = 8,
    which: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Result]:
    """Run analyses on one or several ViTs, write `out`/analysis.json and a PNG for each analysis, and return the results.

    Raises, before the first analysis, ValueError for a name that is none, a model without readable attention and a folder that
    cannot be written to, FileExistsError if `out` has an analysis already; then, with nothing written, ValueError for too few
    images.

    Args:
        sources: model names or run folders, side by side in the pictures.
        images: files and folders of images.
        out: folder for the results; made if need be.
        what: names of ANALYSES.
        size: height and width for all models; None: each its own.
        checkpoint: weights for the model, where there is one and it is given by name.
        untrained: leave models by name with random weights.
        batch: images at a time.
        which: of several weights in `checkpoint`, as for weights.load_checkpoint.
        say: is told what happens, a line at a time.
    """
    for name in what:
        if name not in ANALYSES:
            raise ValueError(f"unknown analysis {name!r}; {nearest(name, ANALYSES)}")
    if checkpoint and len(sources) > 1:
        raise ValueError("--checkpoint is for one model; analyse models with files of their own one by one")
    if len(set(sources)) < len(sources):
        raise ValueError(f"the same model twice: {', '.join(sources)}")
    target = Path(out)
    if (target / "analysis.json").exists():
        raise FileExistsError(f"{target / 'analysis.json'} exists; choose another --out or remove it")
    check_writable(target)
    files = [file for source in images for file in find_images(Path(source), say)]
    found: dict[str, dict[str, Any]] = {}
    sample: list[Panel] = []
    subjects = [open_subject(source, size, checkpoint, untrained, which) for source in sources]
    for subject in subjects:
        check_subject(subject, what, files)
    for subject in subjects:
        tensors = subject.images(files)
        found[subject.name] = {name: ANALYSES[name](subject, tensors, files, batch) for name in what}
        if "artefacts" in what:
            sample += norm_panels(subject, tensors[:4])
        say(f"{subject.name}: {', '.join(what)} of {len(files)} images")
    make_folder(target)
    for name in what:
        with whole(target / f"{name}.png") as part:
            if name == "artefacts":
                width = 2 * min(4, len(files))
                rows = [sample[i : i + width] for i in range(0, len(sample), width)]
                save_sheet(part, rows, "norms of patch tokens before the last block")
            else:
                DRAW[name]({model: results[name] for model, results in found.items()}).savefig(part, dpi=150)
    content = {model: {name: plain(vars(result)) for name, result in results.items()} for model, results in found.items()}
    about = {"images": [str(file) for file in files], "models": content}
    with whole(target / "analysis.json") as part:
        part.write_text(json.dumps(about, indent=1))
    say(f"{target}/analysis.json and {', '.join(f'{name}.png' for name in what)}")
    return content


def norm_panels(subject: Subject, images: Tensor) -> list[Panel]:
    """Each image beside the norms of its patch tokens after the last block but one."""
    vit = vit_of(subject.model)
    with torch.no_grad(), evaluation(vit):
        (tokens,) = vit.forward_intermediates(images, indices=[max(len(vit.blocks) - 2, 0)], intermediates_only=True)
    norms = tokens.float().norm(dim=1)
    panels = []
    for image, one in zip(images, norms, strict=True):
        panels.append(Panel(to_rgb(image, subject.mean, subject.std), short(subject.name)))
        panels.append(Panel(heat(F.interpolate(one[None, None], subject.size)[0, 0]), f"{one.min():.3g} to {one.max():.3g}"))
    return panels


# ---------------------------------------------------------------------------------------------------------------- explaining


def explain_images(
    source: str,
    images: Sequence[str | Path],
    out: str | Path,
    wanted: int | str | None = None,
    pixel: Sequence[int] | None = None,
    start: int = 0,
    size: Sequence[int] | None = None,
    checkpoint: str | None = None,
    untrained: bool = False,
    which: str | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Show where a ViT finds a class, or what a pixel of a dense prediction comes from; returns what `out`/explain.json holds.

    Writes `out`/explain.png: each image, its attention rollout (class-free) and the relevance of the class. Raises ValueError
    for a class that the model does not have, a pixel outside the output and a folder that cannot be written to, FileExistsError
    if `out` has an explanation.

    Args:
        source: model name or run folder.
        images: files and folders of images.
        out: folder for the results; made if need be.
        wanted: class id or name; None: the best class of each image. For a pixel: the output's channel, default 0.
        pixel: row and column in the image as the network sees it, for a dense run.
        start: the first block that counts.
        size: height and width of the images.
        checkpoint: weights for a model by name.
        untrained: leave a model by name with random weights.
        which: of several weights in `checkpoint`, as for weights.load_checkpoint.
        say: is told what happens, a line at a time.
    """
    target = Path(out)
    if (target / "explain.json").exists():
        raise FileExistsError(f"{target / 'explain.json'} exists; choose another --out or remove it")
    check_writable(target)
    files = [file for one in images for file in find_images(Path(one), say)]
    subject = open_subject(source, size, checkpoint, untrained, which)
    vit, dense = vit_of(subject.model), hasattr(subject.model, "backbone")
    if dense != (pixel is not None):
        how = "predicts maps: say which pixel, --pixel ROW COLUMN" if dense else "predicts no maps: leave out --pixel"
        raise ValueError(f"{source} {how}")
    chosen = class_id(subject, wanted)
    rows, facts = [], []
    for path in files:
        image = subject.images([path])
        grid = grid_of(vit, image)
        fact: dict[str, Any] = {"image": str(path)}
        panels = [Panel(to_rgb(image[0], subject.mean, subject.std), path.name)]
        if pixel is not None:
            relevance = explain.pixel_relevance(subject.model, image, chosen or 0, pixel[0], pixel[1], start)
            title = f"channel {chosen or 0} at ({pixel[0]}, {pixel[1]})"
        else:
            panels.append(over(panels[0].image, explain.rollout(vit, image, start), grid, "rollout"))
            _, _, scores = explain.attention_gradients(vit, image, chosen)
            best = int(scores.argmax(1)) if chosen is None else chosen
            relevance = explain.relevance(vit, image, best, start)
            share = scores.softmax(1)[0, best].item()
            title = f"{subject.classes[best] if subject.classes else f'class {best}'}, {share:.0%}"
            fact |= {"class": best, "probability": share}
        panels.append(over(panels[0].image, relevance, grid, title))
        fact |= {"grid": list(grid), "relevance": relevance[0].tolist()}
        rows.append(panels)
        facts.append(fact)
    make_folder(target)
    with whole(target / "explain.png") as part:
        save_sheet(part, rows, short(subject.name))
    with whole(target / "explain.json") as part:
        part.write_text(json.dumps(facts, indent=1))
    say(f"{len(files)} images: {target}/explain.png and explain.json")
    return facts


def class_id(subject: Subject, wanted: int | str | None) -> int | None:
    """The id of a class given by id or name. ValueError with the nearest name for one that does not exist."""
    if wanted is None or isinstance(wanted, int) or wanted.isdigit():
        return None if wanted is None else int(wanted)
    if subject.classes is None or wanted not in subject.classes:
        raise ValueError(f"{subject.name} has no class {wanted!r}; {nearest(wanted, subject.classes or [])}")
    return subject.classes.index(wanted)


def over(image: np.ndarray, relevance: Tensor, grid: tuple[int, int], title: str) -> Panel:
    """Relevance 1 n in colours over an image, half of each.

    Args:
        image: H W 3.
        relevance: 1 n, of the patches.
        grid: rows and columns of patches.
        title: of the panel.
    """
    found = explain.picture(relevance, grid, (image.shape[0], image.shape[1]))[0]
    return Panel((0.45 * image + 0.55 * heat(found, 0.0, 1.0)).round().astype(np.uint8), title)
