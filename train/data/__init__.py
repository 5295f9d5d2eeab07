"""Data sets by the name a config gives them."""

from train.data.base import ImageDataset
from train.data.depth import DepthSpec
from train.data.digits import Digits
from train.data.scenes import Scenes

DATASETS: dict[str, type[ImageDataset]] = {"scenes": Scenes, "digits": Digits}

__all__ = ["DATASETS", "DepthSpec", "ImageDataset"]
