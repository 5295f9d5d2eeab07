"""What two views of a scene must agree in: pictures and findings of data with frames, for `zoo data-check`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.data.base import ImageDataset
from train.data.examine import Finding
from train.geometry import warp
from train.photometric import photometric
from train.show import Panel, to_rgb

LOOKED_AT = 8


def panels(dataset: ImageDataset, index: int, sample: dict[str, Any]) -> list[Panel]:
    """The first two frames of a sample seen from the place of its image, by the true motion and depth; as they are without."""
    found = []
    views = {name: (frame, before, after) for name, frame, before, after in seen(dataset, index, sample)}
    for i, frame in list(enumerate(dataset.offsets))[:2]:
        if frame in views:
            warped, before, after = views[frame]
            found.append(Panel(to_rgb(warped), f"frame {frame} warped\ndifference {before:.3f} -> {after:.3f}"))
        else:
            found.append(Panel(to_rgb(sample["frames"][i]), f"frame {frame} as it is\n(motion or depth not known)"))
    return found


def seen(dataset: ImageDataset, index: int, sample: dict[str, Any]) -> Iterator[tuple[int | str, Tensor, float, float]]:
    """(name, frame warped to the image's place uint8 C H W, photometric difference as it is, and warped) of known motions.

    Differences are means over the pixels with a depth.
    """
    metres = dataset.true_depth(index)
    if metres is None:
        return
    image, depth = as_floats(sample["image"])[None], torch.from_numpy(np.ascontiguousarray(metres)).float()[None, None]
    camera = torch.as_tensor(sample["intrinsics"]).float()[None]
    for name, frame, motion in zip(dataset.offsets, sample["frames"], torch.as_tensor(sample["pose"]).float(), strict=True):
        if motion.isnan().any():
            continue
        source = as_floats(frame)[None]
        warped = warp(source, depth, camera, motion[None])
        valid = depth > 0
        before, after = (float(photometric(view, image)[valid].mean()) for view in (source, warped))
        yield name, (warped[0] * 255).round().byte(), before, after


def as_floats(image: Any) -> Tensor:
    """uint8 C H W as 0..1."""
    return torch.as_tensor(np.asarray(image)).float() / 255


def findings(dataset: ImageDataset) -> list[Finding]:
    """A warning where true motion and depth make the frames fit worse: one of the three, or the intrinsics, is not right."""
    before: list[float] = []
    after: list[float] = []
    count = min(LOOKED_AT, len(dataset))
    for step in range(count):
        index = step * len(dataset) // count
        try:
            for _, _, plain, warped in seen(dataset, index, dataset.read(index)):
                before.append(plain)
                after.append(warped)
        except (ValueError, OSError):
            continue  # already an error of the report
    if not before or np.mean(after) < np.mean(before):
        return []
    text = (
        f"frames warped by the true depth and motion differ more from their image ({np.mean(after):.3f}) than as they are "
        f"({np.mean(before):.3f}): intrinsics, poses (camera to world?) or the unit of the depth are not right"
    )
    return [Finding("warning", dataset.split, text)]
