"""Data sets by the name a config gives them, and the one function that opens a split of them."""

import math
from collections.abc import Sequence
from typing import Any

from heads.plugins import Table
from train.data.ade20k import ADE20K, ADE20KParquet
from train.data.base import ImageDataset
from train.data.camvid import CamVid
from train.data.cifar import Cifar10, Cifar100
from train.data.cityscapes import Cityscapes
from train.data.digits import Digits
from train.data.files import PixelRules
from train.data.folder import Folder
from train.data.imagenet import ClassFolder, ImageNet, TimmDataset, TinyImageNet
from train.data.kitti import Kitti
from train.data.kitti_raw import KittiRaw
from train.data.nyu import NYUv2, NYUv2Mat
from train.data.packed import HuggingFace, Shards
from train.data.panoptic import ADE20KPanoptic, CityscapesPanoptic, CocoPanoptic
from train.data.scenes import Scenes
from train.data.sequences import SceneSequences
from train.data.sevenscenes import SevenScenes
from train.data.video import Video
from train.depth import DepthSpec
from train.schema import DataConfig

DATASETS: Table[type[ImageDataset]] = Table(
    "backbone_zoo.datasets",
    ImageDataset,
    {
        "scenes": Scenes,
        "scene_sequences": SceneSequences,
        "digits": Digits,
        "cifar10": Cifar10,
        "cifar100": Cifar100,
        "imagenet": ImageNet,
        "tiny_imagenet": TinyImageNet,
        "class_folder": ClassFolder,
        "timm": TimmDataset,
        "ade20k": ADE20K,
        "ade20k_parquet": ADE20KParquet,
        "camvid": CamVid,
        "ade20k_panoptic": ADE20KPanoptic,
        "cityscapes": Cityscapes,
        "cityscapes_panoptic": CityscapesPanoptic,
        "coco_panoptic": CocoPanoptic,
        "folder": Folder,
        "shards": Shards,
        "huggingface": HuggingFace,
        "nyuv2": NYUv2,
        "nyuv2_mat": NYUv2Mat,
        "sevenscenes": SevenScenes,
        "kitti": Kitti,
        "kitti_raw": KittiRaw,
        "video": Video,
    },
)


def open_split(data: DataConfig, split: str, targets: Sequence[str], channels: int = 3) -> ImageDataset:
    """The split that the `data` section of a configuration describes, without a transform.

    Args:
        data: the section.
        split: "train" or "val".
        targets: which of the data's targets to read.
        channels: of the images; model.in_chans.
    """
    kind = DATASETS[data.name]
    root: dict[str, Any] = {} if kind.in_memory else {"root": data.root}
    opened = kind(**root, split=split, targets=tuple(targets), **data.args)
    opened.pixels = PixelRules(channels, data.image_range, data.max_pixels)
    return opened


def check_section(data: DataConfig, channels: int) -> None:
    """Raise ValueError for keys of the `data` section that its data set cannot follow; channels: model.in_chans."""
    kind = DATASETS[data.name]
    if channels not in (1, 3) and not kind.any_channels:
        raise ValueError(
            f"model.in_chans is {channels}, and the images of {data.name} have 3 channels; set it to 3, or 1 for grey"
        )
    if data.image_range is not None:
        low, high = data.image_range
        if not kind.any_channels:
            raise ValueError(f"data.image_range is for image files, and {data.name} has none; set it to null")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"data.image_range must be [black, white] with black < white, got {list(data.image_range)}")


__all__ = ["DATASETS", "DepthSpec", "ImageDataset", "check_section", "open_split"]
