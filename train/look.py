"""`zoo look`: one picture of what a backbone sees in a photograph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.analysis.points import Place, PointAttention, most_salient, point_attention, principal_colors, why_unread
from backbones.analysis.run import evaluation
from backbones.edits.registers import RegisterEdit
from heads import FeatureBackbone
from train.analyze import Subject, open_subject
from train.output import make_folder, whole
from train.predict import find_images
from train.show import Panel, save_sheet, to_rgb
from train.show.analysis import short
from train.show.look import attention_panels, enlarged, marked, norm_panel, scaled


def look(
    source: str,
    images: Sequence[str | Path],
    out: str | Path,
    at: Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    checkpoint: str | None = None,
    untrained: bool = False,
    which: str | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Draw what a backbone sees: features of each stage by their main components, and what one place attends to.

    Writes `out`/NAME_look.png for every image and returns the files. Raises, before anything is drawn, ValueError for a source
    that is none, a place outside the image, or two images of one name, and FileExistsError for a file that is there. Images
    that cannot be read are passed over, and named in a ValueError when the rest is drawn.

    Args:
        source: model name or run folder.
        images: files and folders of images.
        out: folder for the pictures; made if need be.
        at: x and y of the place that looks, shares of width and height; None: where features differ most from the rest.
        size: height and width of the images; None: the run's or the model's own.
        checkpoint: weights for a model by name.
        untrained: leave a model by name with random weights.
        which: of several weights in that file, as for weights.load_checkpoint.
        say: is told what happens, a line at a time.
    """
    if at is not None and not all(0 <= value <= 1 for value in at):
        raise ValueError(f"--at is x,y as shares of width and height, e.g. 0.4,0.6; got {','.join(f'{v:g}' for v in at)}")
    files = [file for one in images for file in find_images(Path(one), say)]
    targets: dict[Path, Path] = {}
    for file in files:
        target = Path(out) / f"{file.stem}_look.png"
        if target in targets:
            raise ValueError(f"{targets[target]} and {file} would have the same output {target.name}: rename one")
        targets[target] = file
    there = next((target for target in targets if target.exists()), None)
    if there is not None:
        raise FileExistsError(f"{there} exists; choose another --out or remove it")
    subject = open_subject(source, size, checkpoint, untrained, which)
    features = features_of(subject.model)
    make_folder(out)
    failed = []
    for target, file in targets.items():
        try:
            subject.images([file])
        except (ValueError, OSError) as error:
            failed.append(str(error))
            continue
        rows, title = sheet_of(subject, features, file, None if at is None else (at[0], at[1]))
        with whole(target) as part:
            save_sheet(part, rows, title, cell=3.0)
        say(str(target))
    if failed:
        raise ValueError(f"{len(failed)} of {len(targets)} images cannot be read: {'; '.join(failed[:3])}")
    return list(targets)


def features_of(model: nn.Module) -> FeatureBackbone:
    """The feature maps of a classifier, or the backbone of a dense predictor."""
    backbone: Any = getattr(model, "backbone", None)
    return backbone if isinstance(backbone, FeatureBackbone) else FeatureBackbone(model).eval()


@torch.no_grad()
def sheet_of(subject: Subject, features: FeatureBackbone, file: Path, at: Place | None) -> tuple[list[list[Panel]], str]:
    """The rows of one image's sheet, and its title.

    Args:
        subject: the model and how it takes images.
        features: its feature maps.
        file: of the image.
        at: the place that is asked, None for the most salient one.
    """
    image = subject.images([file])
    photo = scaled(to_rgb(image[0], subject.mean, subject.std))
    with evaluation(features):
        maps = [one if isinstance(one, Tensor) else one[0] for one in features(image)]
    chosen = at is not None
    place = at or most_salient(maps[-1][0])
    sizes = {stage: (one.shape[2], one.shape[3]) for stage, one in zip(features.out_indices, maps, strict=True)}
    found = point_attention(features.model, image, place, sizes, features)
    first = [
        Panel(marked(photo, place), f"{file.name}\nthe place {place[0]:.2f}, {place[1]:.2f}{'' if chosen else ' (chosen)'}")
    ]
    rows = [[*first, *artefact_panels(features.model, image, photo)]]
    for i, one in enumerate(maps):
        colors = principal_colors(one[0])
        drawn = torch.stack([enlarged(colors[..., channel], *photo.shape[:2]) for channel in range(3)])
        name = f"block {features.out_indices[i]}" if features.one_scale else f"stage {features.out_indices[i]}"
        panels = [Panel(to_rgb(drawn), f"{name}: features\n{one.shape[1]} channels, {one.shape[2]}x{one.shape[3]}")]
        for attention in last_kinds([one for one in found if one.stage == features.out_indices[i]]):
            panels += attention_panels(photo, attention, place)
        rows.append(panels)
    if not found:
        return rows, f"{short(subject.name)}: no attention is shown, {why_unread(features.model)}"
    note = "what the ringed place attends to, each picture up to its own largest weight; features by their main components"
    return rows, f"{short(subject.name)}: {note}"


def last_kinds(found: Sequence[PointAttention]) -> list[PointAttention]:
    """The last attention of each of the last two kinds of a stage: window and shifted window, both dilations, high and low."""
    kinds: dict[str, PointAttention] = {}
    for one in found:
        kinds.pop(one.kind, None)
        kinds[one.kind] = one
    return list(kinds.values())[-2:]


# --------------------------------------------------------------------------------------------------------------- artefacts


@torch.no_grad()
def artefact_panels(model: Any, image: Tensor, photo: Any) -> list[Panel]:
    """Norms of a flat ViT's patch tokens before its last block, and what they were without its test-time registers."""
    if not hasattr(model, "blocks") or not hasattr(model, "num_prefix_tokens") or len(model.blocks) < 2:
        return []
    with evaluation(model):
        after = norms(model, image)
        edits = [module for module in model.modules() if isinstance(module, RegisterEdit)]
        if not edits:
            return [norm_panel(after, photo, "norms of patch tokens")]
        with switched_off(edits):
            before = norms(model, image)
    return [
        norm_panel(before, photo, "norms without registers", float(before.max())),
        norm_panel(after, photo, "norms with registers, same colours", float(before.max())),
    ]


def norms(model: Any, image: Tensor) -> Tensor:
    """Norms H W of the patch tokens after the last block but one."""
    (tokens,) = model.forward_intermediates(image, indices=[len(model.blocks) - 2], intermediates_only=True)
    return tokens[0].float().norm(dim=0)


@contextmanager
def switched_off(edits: Sequence[RegisterEdit]) -> Iterator[None]:
    """Inside, the edits leave their activations as they are."""
    handles = [edit.register_forward_hook(lambda module, inputs, output: inputs[0]) for edit in edits]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
