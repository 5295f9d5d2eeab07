"""NYU Depth V2 (Silberman et al. 2012): the folders most depth code uses, and the official .mat file."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from train.data.base import FileDataset
from train.data.finding import inside, need, read_list, walk
from train.depth import DepthSpec

SPEC = DepthSpec(divisor=1000, min_depth=1e-3, max_depth=10.0)
CLASSES = [
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter",
    "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books",
    "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand",
    "toilet", "sink", "lamp", "bathtub", "bag", "other structure", "other furniture",
]  # fmt: skip


class NYUv2(FileDataset):
    """The layout of BTS, AdaBins and GLPDepth: `<folder>/<scene>/rgb_NNNNN.jpg` with `sync_depth_NNNNN.png` in millimetres.

    Masks are `labels40/NNNNN.png`, 0..38 = NYU40 class minus 1; 39 mixes "other prop" with unlabelled pixels and is ignored.

    Args:
        train_folder, val_folder: below root; "sync" for the 24k training frames.
        train_list, val_list: "image depth focal" per line, relative to the folder; where absent, all of its pairs are taken.
        labels: folder of the masks.
    """

    provides = ("depth", "mask")
    depth: DepthSpec = SPEC
    classes = CLASSES

    def find(
        self,
        train_folder: str = "official_splits/train",
        val_folder: str = "official_splits/test",
        train_list: str = "nyu_train.txt",
        val_list: str = "nyu_test.txt",
        labels: str = "labels40",
    ) -> None:
        folder = need(self.root / (train_folder if self.split == "train" else val_folder), f"the {self.split} frames", "NYUv2")
        listing = self.root / (train_list if self.split == "train" else val_list)
        if listing.exists():
            rows = read_list(listing, 2, "NYUv2")
            self.pairs = [(inside(folder, row[0]), inside(folder, row[1])) for row in rows if row[1] != "None"]
        else:
            images = sorted(path for path in walk(folder) if fnmatch(path.name, "rgb_*.jpg"))
            self.pairs = [(path, path.with_name(f"sync_depth_{path.stem[4:]}.png")) for path in images]
        if not self.pairs:
            raise FileNotFoundError(f"NYUv2: looked for {listing} and for <scene>/rgb_*.jpg below {folder}: neither is there")
        need(self.pairs[0][0], "the first image", "NYUv2")
        self.labels = self.root / labels
        if "mask" in self.targets:
            need(self.labels, "the 40-class labels", "NYUv2")

    def image_files(self) -> list[Path]:
        return [image for image, _ in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> dict[str, Any]:
        image, depth = self.pairs[index]
        sample = {"image": self.image(image), "path": image}
        if "depth" in self.targets:
            sample.update(depth=self.metres(depth, self.depth.divisor), depth_path=depth)
        if "mask" in self.targets:
            numbers = re.findall(r"[0-9]+", image.stem)
            if not numbers:
                raise ValueError(f"{image}: a frame's name has its number, which names its labels, and this one has none")
            path = self.labels / f"{numbers[-1]}.png"
            ids = self.ids(path)
            sample.update(mask=np.where(ids == len(CLASSES), self.ignore_index, ids), mask_path=path)
        return sample


class NYUv2Mat(FileDataset):
    """NYUv2's official 795 training and 654 test frames, from nyu_depth_v2_labeled.mat (HDF5) and splits.mat.

    Needs h5py and scipy. Raises ImportError naming the extra to install, ValueError if the file is not that file.
    """

    provides = ("depth",)
    any_channels = False
    depth: DepthSpec = DepthSpec(divisor=1, min_depth=1e-3, max_depth=10.0)

    def find(self) -> None:
        try:
            import h5py
            from scipy.io import loadmat
        except ImportError as error:
            raise ImportError(
                f"reading the official .mat files needs h5py and scipy (pip install backbone-zoo[data]): {error}"
            ) from error
        self.file = need(self.root / "nyu_depth_v2_labeled.mat", "the labelled frames", "NYUv2Mat")
        splits = need(self.root / "splits.mat", "the official split", "NYUv2Mat")
        key = "trainNdxs" if self.split == "train" else "testNdxs"
        try:
            self.frames = loadmat(splits)[key].ravel().astype(np.int64) - 1  # MATLAB counts from 1
            with h5py.File(self.file, "r") as file:
                count = file["images"].shape[0]
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(f"{self.file} or {splits} is not the official file ({error})") from error
        if self.frames.min() < 0 or self.frames.max() >= count:
            raise ValueError(f"{splits}: frame {self.frames.max() + 1} of {key} is not among the {count} of {self.file}")
        self._open: Any = None

    def __len__(self) -> int:
        return len(self.frames)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # an open file does not travel to a worker

    def read(self, index: int) -> dict[str, Any]:
        import h5py

        if self._open is None:
            self._open = h5py.File(self.file, "r")
        file = self._open
        frame = int(self.frames[index])
        sample = {
            "image": file["images"][frame].transpose(0, 2, 1).copy(),
            "path": f"{self.file}#{frame}",
        }  # 3 W H in the file
        if "depth" in self.targets:
            depth = file["depths"][frame].T.astype(np.float32)
            sample["depth"] = np.where(np.isfinite(depth) & (depth > 0), depth, 0)
        return sample
