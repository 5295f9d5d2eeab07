"""Cityscapes street scenes in the official layout (Cordts et al. 2016): labelIds are turned into the 19 trainIds."""

from pathlib import Path
from typing import Any

import numpy as np

from train.data.base import FileDataset
from train.data.finding import images_in, need
from train.sample import SEGMENTS, VOID

# (name, labelId, colour) of the classes that are evaluated, in the order of their trainIds
TRAINED = [
    ("road", 7, (128, 64, 128)), ("sidewalk", 8, (244, 35, 232)), ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)), ("fence", 13, (190, 153, 153)), ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)), ("traffic sign", 20, (220, 220, 0)), ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)), ("sky", 23, (70, 130, 180)), ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)), ("car", 26, (0, 0, 142)), ("truck", 27, (0, 0, 70)), ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)), ("motorcycle", 32, (0, 0, 230)), ("bicycle", 33, (119, 11, 32)),
]  # fmt: skip
THINGS = range(11, 19)  # person to bicycle
LABEL_IDS = 34  # 0..33 in the files; -1 (licence plate) is written as 255 by some tools


class Cityscapes(FileDataset):
    """root holds leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_labelIds.png.

    Panoptic maps come from the *_gtFine_instanceIds.png beside those: labelId * 1000 + number, or the labelId alone of stuff
    and of a group of things.
    """

    provides = ("mask", "panoptic")
    classes = [name for name, _, _ in TRAINED]
    palette = [color for _, _, color in TRAINED]
    things = tuple(THINGS)

    def find(self) -> None:
        images = images_in(self.root / "leftImg8bit" / self.split, f"the {self.split} images", "Cityscapes")
        self.images = [path for path in images if path.stem.endswith("_leftImg8bit")]
        if not self.images:
            raise FileNotFoundError(f"Cityscapes: no file *_leftImg8bit.png below {self.root / 'leftImg8bit' / self.split}")
        for target, kind in (("mask", "labelIds"), ("panoptic", "instanceIds")):
            if target in self.targets:
                need(self.annotation(self.images[0], kind), "the fine annotation of the first image", "Cityscapes")
        self.table = np.full(256, self.ignore_index, np.int64)
        for train_id, (_, label_id, _) in enumerate(TRAINED):
            self.table[label_id] = train_id

    def annotation(self, image: Path, kind: str) -> Path:
        name = image.name.replace("_leftImg8bit.png", f"_gtFine_{kind}.png")
        return self.root / "gtFine" / self.split / image.parent.name / name

    def image_files(self) -> list[Path]:
        return self.images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        sample = {"image": self.image(image), "path": image}
        if "mask" in self.targets:
            path = self.annotation(image, "labelIds")
            sample.update(mask=self.trained(self.ids(path), path), mask_path=path)
        if "panoptic" in self.targets:
            path = self.annotation(image, "instanceIds")
            ids = self.ids(path)
            classes = self.trained(np.where(ids < 1000, ids, ids // 1000), path)
            number = np.where(ids < 1000, 0, ids % 1000 + 1)  # their numbers begin with 0, which is a group here
            segments = np.where(classes == self.ignore_index, VOID, classes * SEGMENTS + number)
            sample.update(panoptic=segments, panoptic_path=path)
        return sample

    def trained(self, ids: np.ndarray, path: Path) -> np.ndarray:
        """labelIds -> class ids. ValueError names the file for an id that there is not."""
        wrong = ((ids < 0) | (ids >= LABEL_IDS)) & (ids != 255)
        if wrong.any():
            raise ValueError(
                f"{path}: labelId {int(ids[wrong][0])} is outside 0..{LABEL_IDS - 1}; is this another kind of file?"
            )
        return self.table[ids]
