"""KITTI depth (Uhrig et al. 2017): 16-bit PNGs, metres times 256, 0 where the lidar saw nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.data.base import FileDataset
from train.data.finding import inside, need, read_list
from train.depth import DepthSpec

CROP = (352, 1216)  # the benchmark's: bottom, centred


class Kitti(FileDataset):
    """Pairs named by lists of "image depth [focal]", relative to `images` and `depths` below root.

    The Eigen lists have rows without ground truth ("None"): those are left out. Frames differ in size (about 375x1242); with
    `benchmark_crop` every sample is the 352x1216 at the bottom centre. GLPN takes the garg and eigen crops of that; BTS,
    AdaBins, DPT and Monodepth2 take them of the full frame, which are other pixels: `frame` puts it into the protocol.

    Args:
        train_list, val_list: files below root.
        images, depths: folders below root that the lists' paths start from.
        benchmark_crop: every sample is the 352x1216 at the bottom centre.
    """

    provides = ("depth",)
    depth: DepthSpec = DepthSpec(divisor=256, min_depth=1e-3, max_depth=80.0)

    def find(
        self,
        train_list: str = "kitti_train.txt",
        val_list: str = "kitti_test.txt",
        images: str = ".",
        depths: str = ".",
        benchmark_crop: bool = True,
    ) -> None:
        listing = self.root / (train_list if self.split == "train" else val_list)
        rows = [row for row in read_list(listing, 2, "Kitti") if row[1] != "None"]
        if not rows:
            raise ValueError(f"{listing}: no row has a depth map")
        self.pairs = [(inside(self.root / images, row[0]), inside(self.root / depths, row[1])) for row in rows]
        need(self.pairs[0][0], "the first image", "Kitti")
        self.benchmark_crop = benchmark_crop

    @classmethod
    def frame(cls, args: Mapping[str, Any]) -> str:
        return f"frames: benchmark crop {CROP[0]}x{CROP[1]}" if args.get("benchmark_crop", True) else "frames: full"

    def image_files(self) -> list[Path]:
        return [image for image, _ in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> dict[str, Any]:
        path, depth_path = self.pairs[index]
        image = self.image(path)
        sample = {"image": self.cropped(image, path), "path": path}
        if "depth" in self.targets:
            depth = self.metres(depth_path, self.depth.divisor)
            sample["depth_path"] = depth_path
            self.check_size(sample, "depth", depth.shape, image.shape[-2:])  # before both are cropped
            sample["depth"] = self.cropped(depth, depth_path)
        return sample

    def cropped(self, values: np.ndarray, path: Path) -> np.ndarray:
        """The benchmark crop of an array ... H W. ValueError names the file if it is smaller."""
        if not self.benchmark_crop:
            return values
        height, width = values.shape[-2:]
        if height < CROP[0] or width < CROP[1]:
            raise ValueError(
                f"{path}: {height}x{width} is smaller than the benchmark crop {CROP[0]}x{CROP[1]}; set benchmark_crop: false"
            )
        left = (width - CROP[1]) // 2
        return values[..., height - CROP[0] :, left : left + CROP[1]]
