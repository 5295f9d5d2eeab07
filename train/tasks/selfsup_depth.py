"""Depth learned from the frames of a video, or from the two cameras of a stereo pair, without one true depth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.video import PoseNetwork, VideoPredictor, blended
from train.checks import checked_arguments
from train.data.files import Unreadable
from train.depth import DepthSpec
from train.geometry import disparity_to_depth, motion
from train.metrics import DepthMetric, crop_rows_columns
from train.photometric import Frame, ViewSynthesis
from train.randomness import normals
from train.show import DepthMaps
from train.tasks.base import Task
from train.tasks.dense import backbone_arguments, resized

if TYPE_CHECKING:
    from train.data import ImageDataset
    from train.schema import ModelConfig

# Whose sampling: where the corner pixels lie in the coordinates of grid_sample.
CONVENTIONS = {"lite_mono": True, "monodepth2": False}


class SelfSupDepth(Task):
    """View synthesis (Zhou et al. 2017, Godard et al. 2019): each frame made anew from its neighbours by depth and motion.

    The networks see frames with changed colours, the losses compare the frames as they are. All of a sample change alike.

    Args:
        min_depth, max_depth: what disparities of 1 and 0 mean; metres where the motions have a scale, else any unit.
        poses: "learned": a pose network predicts the motion between frames, and depth has no scale; "given": the data's. The
            motion to the other camera of a stereo pair is the data's in both.
        pose_backbone: timm name of the pose network's encoder.
        pose_pretrained: with its released weights.
        pose_args: other arguments of heads.video.PoseNetwork.
        convention: of the sampling. "lite_mono": corners aligned, which is what the geometry means; "monodepth2": not aligned,
            as its code runs on torch 1.3 and newer, off by up to half a pixel.
        ssim: compare windows and colours; off: colours alone.
        auto_mask: pixels that look the same without any motion do not count.
        average: the mean over the other frames instead of the best of them.
        own_size: compare at the size of each disparity instead of the image's (monodepth v1).
        smooth: weight of the smoothness of the finest disparity, halved at each coarser one.
        eval_min_depth, eval_max_depth: metres; true depth outside is not measured.
        crop: of the metric.
        align: "median": predictions times the ratio of the medians, image by image; none: they are metres.
        clamp: predictions to the measured range.
        post_process: evaluate the blend with the prediction for the mirrored image (monodepth v1).
    """

    best = ("abs_rel", "min")
    average = "values"
    takes_heads = True

    def __init__(
        self,
        min_depth: float = 0.1,
        max_depth: float = 100.0,
        poses: Literal["learned", "given"] = "learned",
        pose_backbone: str = "resnet18",
        pose_pretrained: bool = False,
        pose_args: dict[str, Any] | None = None,
        convention: Literal["lite_mono", "monodepth2"] = "lite_mono",
        ssim: bool = True,
        auto_mask: bool = True,
        average: bool = False,
        own_size: bool = False,
        smooth: float = 1e-3,
        eval_min_depth: float = 1e-3,
        eval_max_depth: float = 80.0,
        crop: Literal["eigen", "garg", "nyu"] | None = None,
        align: Literal["median"] | None = "median",
        clamp: bool = True,
        post_process: bool = False,
    ):
        if not 0 < min_depth < max_depth:
            raise ValueError(f"task: need 0 < min_depth < max_depth, got {min_depth} and {max_depth}")
        self.synthesis = ViewSynthesis(
            min_depth,
            max_depth,
            auto_mask=auto_mask,
            ssim=ssim,
            average=average,
            own_size=own_size,
            smooth=smooth,
            align_corners=CONVENTIONS[convention],
        )
        self.learned, self.post_process = poses == "learned", post_process
        self.pose: dict[str, Any] = {"backbone": pose_backbone, "pretrained": pose_pretrained}
        self.pose |= checked_arguments(
            PoseNetwork, dict(pose_args or {}), "task.pose_args", skip=("backbone", "pretrained", "in_chans")
        )
        self.spec = DepthSpec(min_depth=eval_min_depth, max_depth=eval_max_depth, metric=align is None)
        self.crop, self.align, self.clamp = crop, align, clamp
        self.show = DepthMaps(self.spec)
        self.offsets: tuple[Frame, ...] = ()
        self.metric()  # raises now for settings that contradict each other

    def targets(self, split: str) -> tuple[str, ...]:
        return ("frames", "intrinsics", "pose") if split == "train" else ("depth",)

    def build(self, model: ModelConfig) -> nn.Module:
        """A heads.video.VideoPredictor. ValueError for a head without disparities, and for an auxiliary head."""
        if model.aux_head is not None:
            raise ValueError("model.aux_head: the coarser disparities are this task's auxiliary outputs; set it to null")
        pose = PoseNetwork(**self.pose, in_chans=model.in_chans) if self.learned else None
        args = backbone_arguments(model)
        return VideoPredictor(model.backbone, model.head, 1, head_args=model.head_args, neck=model.neck, pose=pose, **args)

    def check(self, dataset: ImageDataset) -> None:
        name = type(dataset).__name__
        missing = [target for target in self.targets(dataset.split) if target not in dataset.provides]
        if missing:
            raise ValueError(
                f"{name} has no {missing[0]}, which depth from video needs; it provides {', '.join(dataset.provides)}"
            )
        if dataset.split == "train":
            self.offsets = dataset.offsets
            if not self.learned and not dataset.known_poses:
                raise ValueError(
                    f"task.poses is given, and {name} knows no motions: set it to learned, or name the data's poses"
                )
            if self.learned and all(isinstance(frame, str) for frame in self.offsets):
                raise ValueError(
                    "task.poses is learned, and the data have no other frame than the stereo partner: set it to given"
                )
            return
        if self.crop is not None and len(dataset):
            with contextlib.suppress(Unreadable):  # counted and reported elsewhere
                crop_rows_columns(self.crop, *dataset.read(0)["depth"].shape[-2:])  # raises now, not after an epoch

    def forward(self, model: Callable[..., Any], batch: dict[str, Any]) -> Any:
        """Disparities and motions in training; else the finest disparity B 1 H W."""
        image = batch["image"]
        if "frames" not in batch:
            if not self.post_process:
                return model(image)
            return blended(model(image), model(image.flip(-1)).flip(-1))
        pairs = [
            torch.cat([batch["frames"][:, i], image] if frame < 0 else [image, batch["frames"][:, i]], 1)
            for i, frame in self.moving()
        ]
        return model(image, torch.stack(pairs, 1) if pairs else image[:, None, :0])

    def moving(self) -> list[tuple[int, int]]:
        """(place, offset) of the frames whose motion the pose network predicts."""
        return [(i, frame) for i, frame in enumerate(self.offsets) if self.learned and not isinstance(frame, str)]

    def losses(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Tensor]:
        """ "photometric" and "smoothness", each the mean over images, pixels and disparities."""
        views = batch["views"].float() / 255  # B 1+n C H W
        found = list(outputs["disparities"])
        found = [whole(disparity, views.shape[-2:], i).float() for i, disparity in enumerate(found)]
        sizes = [disparity.shape[-2:] for disparity in found]
        target = [area(views[:, 0], size) for size in sizes]
        small = sizes if self.synthesis.own_size else sizes[:1]
        sources = {frame: [area(views[:, 1 + i], size) for size in small] for i, frame in enumerate(self.offsets)}
        motions: dict[Frame, Tensor] = {frame: batch["pose"][:, i].float() for i, frame in enumerate(self.offsets)}
        for (_, frame), (axis, shift) in zip(self.moving(), outputs["motions"], strict=True):
            motions[frame] = motion(axis.float(), shift.float(), invert=frame < 0)
        noise = (lambda _, shape: normals(shape, views.device)) if self.synthesis.auto_mask else None
        return self.synthesis(found, target, sources, motions, batch["intrinsics"].float(), noise)

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = torch.tensor(float(len(batch["image"])), device=batch["image"].device)
        return {"photometric": images, "smoothness": images}

    def predict(self, output: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Depth B 1 H W, from the disparity resized to `size`; metres up to a scale."""
        disparity = resized(output, size)
        return disparity_to_depth(disparity, self.synthesis.min_depth, self.synthesis.max_depth)

    def metric(self) -> DepthMetric:
        metric = DepthMetric(self.spec, crop=self.crop, align=self.align, clamp=self.clamp)
        if self.post_process:
            metric.protocol += ", blended with the mirrored image (monodepth)"
        return metric

    def measure(self, metric: Any, output: Tensor, batch: dict[str, Any]) -> list[Tensor]:
        """Image by image, because each depth map has its own size."""
        predictions = []
        for i, target in enumerate(batch["depth"]):
            predictions.append(self.predict(output[i : i + 1], tuple(target.shape[-2:])))
            metric.update(predictions[-1], {"depth": target[None]})
        return predictions


def whole(disparity: Tensor, size: tuple[int, ...], index: int) -> Tensor:
    """The disparity at the image's size, halved `index` times: that of the published networks, where another head differs."""
    wanted = [max(side // 2**index, 1) for side in size]
    return (
        disparity
        if list(disparity.shape[-2:]) == wanted
        else F.interpolate(disparity, size=wanted, mode="bilinear", align_corners=False)
    )


def area(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """The image at a smaller size, each pixel the mean of what it covers."""
    return image if image.shape[-2:] == size else F.interpolate(image, size=tuple(size), mode="area")
