"""Data sets by the name a config gives them."""

from train.data.ade20k import ADE20K, ADE20KParquet
from train.data.base import ImageDataset
from train.data.camvid import CamVid
from train.data.cifar import Cifar10, Cifar100
from train.data.cityscapes import Cityscapes
from train.data.depth import DepthSpec
from train.data.digits import Digits
from train.data.folder import Folder
from train.data.imagenet import ClassFolder, ImageNet, TimmDataset, TinyImageNet
from train.data.kitti import Kitti
from train.data.nyu import NYUv2, NYUv2Mat
from train.data.packed import HuggingFace, Shards
from train.data.scenes import Scenes
from train.data.sevenscenes import SevenScenes

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

__all__ = ["DATASETS", "DepthSpec", "ImageDataset"]
