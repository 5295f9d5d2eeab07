"""Folders of classes: ImageNet with its fixed 1000-class index, Tiny-ImageNet, and any folder of class folders."""

import os
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, create_dataset

from train.data.base import FileDataset, ImageDataset, Transform
from train.data.files import IMAGE_SUFFIXES
from train.data.finding import hidden, image_suffixes, need, part_of, read_list, read_text, subfolders, walk


class ClassFolder(FileDataset):
    """A folder per class: `train/<class>/...` and `val/<class>/...` below root, images at any depth in them.

    Classes are the sorted folder names of `train`, so both splits count alike; `val` alone serves where there is no `train`.
    Raises ValueError for a validation class that training does not have.

    Args:
        train_folder, val_folder: other names of the two; the same one twice trains and evaluates on the same images.
        val_share: share of the images of each class that validate, for one folder of class folders (train_folder; "." is root
            itself).
        val_seed: which ones: a hash of their names and this number.
    """

    provides = ("label",)

    def find(
        self, train_folder: str = "train", val_folder: str = "val", val_share: float | None = None, val_seed: int = 0
    ) -> None:
        name, split = type(self).__name__, self.split
        self.train = self.root / train_folder
        val_folder = val_folder if val_share is None else train_folder
        base = need(self.train if split == "train" else self.root / val_folder, f"the {split} folder of class folders", name)
        index = self.index(base)
        self.samples: list[tuple[Path, int]] = []
        files = self.labelled(base)
        if val_share is not None:
            by_class: dict[str, list[str]] = {}
            for path, wnid in files:
                by_class.setdefault(wnid, []).append(path.relative_to(base).as_posix())
            kept = {name for names in by_class.values() for name in part_of(names, split, val_share, val_seed)}
            files = [(path, wnid) for path, wnid in files if path.relative_to(base).as_posix() in kept]
        for path, wnid in files:
            if wnid not in index:
                raise ValueError(f"{path}: its class {wnid!r} is not one of the {len(index)} classes of {name}")
            self.samples.append((path, index[wnid]))
        if not self.samples:
            raise FileNotFoundError(f"{name}: looked for <class>/*.jpg below {base}: no class folder holds an image")

    def index(self, base: Path) -> dict[str, int]:
        """Folder name -> class id; sets `classes`. base: the split's folder."""
        source = self.train if self.train.is_dir() else base
        names = [folder.name for folder in subfolders(source)]
        self.classes = names
        return {name: i for i, name in enumerate(names)}

    def labelled(self, base: Path) -> list[tuple[Path, str]]:
        """(file, class name) of every image of a split, sorted."""
        found: list[tuple[Path, str]] = []
        empty = []
        for folder in subfolders(base):
            suffixes = image_suffixes(folder)
            inside = sorted(path for path in walk(folder) if path.suffix.lower() in suffixes)
            found += [(path, folder.name) for path in inside]
            empty += [] if inside else [folder.name]
        stray = sorted(path for path in base.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not hidden(path.name))
        stray = [path for path in stray if path.is_file()]
        if stray and found:
            self.notices += (f"{len(stray)} images of {base} lie in no class folder and are not used, e.g. {stray[0].name}",)
        if empty and found:
            few = ", ".join(empty[:4]) + (f" and {len(empty) - 4} more" if len(empty) > 4 else "")
            self.notices += (f"{len(empty)} class folders of {base} hold no image, and are classes all the same: {few}",)
        return found

    def image_files(self) -> list[Path]:
        return [path for path, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> dict[str, Any]:
        path, label = self.samples[index]
        return {"image": self.image(path), "label": label, "path": path}


class ImageNet(ClassFolder):
    """ImageNet-1k: `train/<wnid>/*`, `val/<wnid>/*`. A wnid always has its official id 0..999, whatever folders there are."""

    def index(self, base: Path) -> dict[str, int]:
        info = ImageNetInfo("imagenet-1k")
        self.classes = [info.index_to_description(i).split(",")[0] for i in range(info.num_classes())]
        return {wnid: i for i, wnid in enumerate(info.label_names())}

    def labelled(self, base: Path) -> list[tuple[Path, str]]:
        found = super().labelled(base)
        if not found and any(base.glob("*.JPEG")):
            raise FileNotFoundError(
                f"ImageNet: {base} holds images without class folders (the archive as it is shipped); "
                f"looked for {base}/n01440764/*.JPEG. Sort them into wnid folders first"
            )
        return found


class TinyImageNet(ClassFolder):
    """Tiny-ImageNet-200: `train/<wnid>/images/*`; `val/images/*` with val_annotations.txt as shipped, or `val/<wnid>/*`.

    Class ids follow the sorted wnids of wnids.txt.
    """

    def index(self, base: Path) -> dict[str, int]:
        wnids = sorted(read_text(need(self.root / "wnids.txt", "the class list", "TinyImageNet")).split())
        words = dict(line.split("\t", 1) for line in self._lines("words.txt") if "\t" in line)
        self.classes = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
        return {wnid: i for i, wnid in enumerate(wnids)}

    def labelled(self, base: Path) -> list[tuple[Path, str]]:
        if not (base / "images").is_dir():
            return super().labelled(base)
        rows = read_list(base / "val_annotations.txt", 2, "TinyImageNet")
        return [(base / "images" / row[0], row[1]) for row in rows]

    def _lines(self, name: str) -> list[str]:
        path = self.root / name
        return read_text(path).splitlines() if path.exists() else []


class TimmDataset(ImageDataset):
    """Any map-style reader of timm: folders, tar files, Hugging Face data sets ("hfds/owner/name") with an image and a label.

    Raises ValueError for a streaming reader (wds, tfds, hfids): it has no index.

    Args:
        root: folder, or what timm's reader takes for one.
        split: "train" or "val".
        targets: "label", or nothing.
        transform: called with every sample.
        name: timm's data set name; "" lets it choose folder or tar from what root holds.
        train_split, val_split: its names for them.
        num_classes: for the check of labels.
    """

    provides = ("label",)

    def __init__(
        self,
        root: str | Path,
        split: str,
        targets: tuple[str, ...],
        transform: Transform | None = None,
        name: str = "",
        train_split: str = "train",
        val_split: str = "validation",
        num_classes: int = 1000,
    ):
        super().__init__(split, targets, transform)
        self.root = root
        self.data = create_dataset(name, root=str(root), split=train_split if split == "train" else val_split)
        if not hasattr(self.data, "__getitem__") or not hasattr(self.data, "__len__"):
            raise ValueError(
                f"timm's reader {name!r} streams and has no index; data.name=shards reads webdataset's tar files, "
                "and timm folders, tar files and hfds/ data sets"
            )
        self.reader, self.owner = self.data.reader, os.getpid()
        foreign = sorted(name for name in getattr(self.reader, "class_to_idx", {}) if hidden(str(name)))
        if foreign:
            raise ValueError(
                f"timm's reader takes the folder {foreign[0]} of another program for a class, which shifts the ids of all; "
                "remove it, or read the folders with data.name=class_folder"
            )
        self.classes = [str(i) for i in range(num_classes)]

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> dict[str, Any]:
        if self.owner != os.getpid():  # a loader worker must not share the place in an open tar with the others
            self.owner = os.getpid()
            close_tars(getattr(self.reader, "tar_state", None))
        content, label, *_ = self.reader[index]  # not through timm's data set, which passes over damaged images by itself
        try:
            place = self.data.filename(index)
        except (NotImplementedError, AttributeError, KeyError):
            place = str(index)
        place = f"{self.root}#{place}"
        with content:
            return {"image": self.image(content, place), "label": label, "path": place}


def close_tars(state: Any) -> None:
    """Forgets the open files that timm's tar reader keeps, in the tars of tars too."""
    for entry in state.values() if isinstance(state, dict) else [state]:
        if entry is not None:
            entry.tf = None
            close_tars(entry.children)
