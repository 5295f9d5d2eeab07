"""Data sets by the name a config gives them, and the one function that opens a split of them."""

from collections.abc import Sequence

from train.data.ade20k import ADE20K, ADE20KParquet
from train.data.base import ImageDataset
from train.data.camvid import CamVid
from train.data.cifar import Cifar10, Cifar100
from train.data.cityscapes import Cityscapes
from train.data.digits import Digits
from train.data.folder import Folder
from train.data.imagenet import ClassFolder, ImageNet, TimmDataset, TinyImageNet
from train.data.kitti import Kitti
from train.data.nyu import NYUv2, NYUv2Mat
from train.data.packed import HuggingFace, Shards
from train.data.scenes import Scenes
from train.data.sevenscenes import SevenScenes
from train.depth import DepthSpec
from train.schema import DataConfig

DATASETS: dict[str, type[ImageDataset]] = {
    "scenes": Scenes,
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
    "cityscapes": Cityscapes,
    "folder": Folder,
    "shards": Shards,
    "huggingface": HuggingFace,
    "nyuv2": NYUv2,
    "nyuv2_mat": NYUv2Mat,
    "sevenscenes": SevenScenes,
    "kitti": Kitti,
}


def open_split(data: DataConfig, split: str, targets: Sequence[str]) -> ImageDataset:
    """The split ("train" or "val") that the `data` section of a configuration describes, without a transform."""
    kind = DATASETS[data.name]
    root = {} if kind.in_memory else {"root": data.root}
    return kind(**root, split=split, targets=tuple(targets), **data.args)


__all__ = ["DATASETS", "DepthSpec", "ImageDataset", "open_split"]
