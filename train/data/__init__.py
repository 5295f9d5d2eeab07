"""Data sets by the name a config gives them."""

from train.data.base import ImageDataset
from train.data.depth import DepthSpec

DATASETS: dict[str, type[ImageDataset]] = {}

__all__ = ["DATASETS", "DepthSpec", "ImageDataset"]
