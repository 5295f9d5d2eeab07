"""The handwritten digits that scikit-learn ships: 1797 real 8x8 images, no download (Alpaydin and Kaynak 1998, UCI)."""

from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from train.data.base import ImageDataset, Transform


class Digits(ImageDataset):
    """A fixed stratified fifth (360 images) is the validation split, the other 1437 train; grey becomes RGB."""

    provides = ("label",)
    in_memory = True
    any_channels = False
    classes = [str(digit) for digit in range(10)]

    def __init__(self, split: str, targets: tuple[str, ...], transform: Transform | None = None):
        super().__init__(split, targets, transform)
        digits = load_digits()
        train, val = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
        self.indices = np.sort(train if split == "train" else val)
        self.images = (digits.images * (255 / 16)).round().astype(np.uint8)  # the files hold 0..16
        self.labels = digits.target

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> dict[str, Any]:
        row = int(self.indices[index])
        return {"image": self.images[row][None].repeat(3, 0), "label": self.labels[row], "path": f"digit-{row:04d}"}
