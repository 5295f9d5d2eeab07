"""Your own pairs: a folder of images beside a folder of masks, of depth maps, or of both, with the same file names."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from train.data.base import DescribedDataset
from train.data.files import (
    IMAGE_SUFFIXES,
    id_array,
    ids_from_colors,
    map_ids,
    need,
    open_image,
    read_depth,
    read_list,
    read_rgb,
    rgb_array,
    root_folder,
)


def by_name(folder: Path, suffix: str, extensions: tuple[str, ...], what: str) -> dict[str, Path]:
    """Path below the folder without `suffix` and extension -> file, sorted.

    Raises FileNotFoundError if there is none, ValueError if two files have one name: which one belongs to the image?
    """
    need(folder, what, "Folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder).with_suffix(""))
        if path.suffix.lower() not in extensions or not name.endswith(suffix):
            continue
        name = name.removesuffix(suffix)
        if name in found:
            raise ValueError(f"Folder: {found[name]} and {path} have the same name; keep one of them")
        found[name] = path
    if not found:
        raise FileNotFoundError(
            f"Folder: looked for {what} in {folder}: no file ends in {', '.join(suffix + e for e in extensions)}"
        )
    return found


class Folder(DescribedDataset):
    """Files matched by their path below the folder, without suffix. "{split}" in any argument becomes train or val.

    images, masks, depths: folders below root. image_suffix, mask_suffix, depth_suffix: what follows the common name before the
    extension, for files such as 7_color.jpg beside 7_depth.png ("_color", "_depth"). lists: a text file with one name per line
    (Pascal's ImageSets/Segmentation/train.txt); null takes every image.
    palette: colours in class order. With it masks may be colour images; masks of one channel (colour table or not) are ids.
    Other arguments: as in DescribedDataset.

    Raises FileNotFoundError for a missing folder, list or partner of an image; ValueError for masks without classes and for
    an id_map or palette that leaves the classes.
    """

    provides = ("mask", "depth")

    def __init__(
        self,
        root: str | Path,
        split: str,
        targets: tuple[str, ...],
        transform: Callable | None = None,
        images: str = "images/{split}",
        masks: str = "masks/{split}",
        depths: str = "depths/{split}",
        image_suffix: str = "",
        mask_suffix: str = "",
        depth_suffix: str = "",
        lists: str | None = None,
        classes: list[str] | int | None = None,
        palette: list[list[int]] | None = None,
        ignore_index: int = 255,
        id_map: dict[int, int] | None = None,
        depth_divisor: float = 1000.0,
        depth_invalid: Sequence[float] = (0,),
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
    ):
        super().__init__(root_folder(root, "Folder"), split, targets, transform)
        self.describe(classes, ignore_index, id_map, depth_divisor, depth_invalid, min_depth, max_depth)
        self.palette = None if palette is None else [tuple(int(value) for value in color) for color in palette]
        if self.palette is not None and self.classes is not None and len(self.palette) != len(self.classes):
            raise ValueError(f"Folder: {len(self.palette)} palette colours for {len(self.classes)} classes")

        def below(folder: str) -> Path:
            return self.root / folder.format(split=split)

        found = by_name(below(images), image_suffix, IMAGE_SUFFIXES, f"the {split} images")
        if lists is None:
            names = list(found)
        else:
            names = [row[0] for row in read_list(below(lists), 1, "Folder")]
            names = [name if name in found else str(Path(name).with_suffix("")) for name in names]
            absent = [name for name in names if name not in found]
            if absent:
                raise FileNotFoundError(f"Folder: {below(lists)} names {absent[0]!r}, and {below(images)} has no such image")
        self.images = [found[name] for name in names]
        self.partners: dict[str, list[Path]] = {}
        for target, folder, suffix in (("mask", masks, mask_suffix), ("depth", depths, depth_suffix)):
            if target not in targets:
                continue
            others = by_name(below(folder), suffix, (*IMAGE_SUFFIXES, ".npy"), f"the {split} {target}s")
            absent = [name for name in names if name not in others]
            if absent:
                raise FileNotFoundError(
                    f"Folder: {found[absent[0]]} has no {target}: looked for {absent[0]}{suffix}.* in {below(folder)}"
                )
            self.partners[target] = [others[name] for name in names]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> dict:
        sample = {"image": read_rgb(self.images[index]), "path": self.images[index]}
        if "mask" in self.targets:
            path = self.partners["mask"][index]
            sample.update(mask=self.read_mask(path), mask_path=path)
        if "depth" in self.targets:
            path = self.partners["depth"][index]
            depth = read_depth(path, self.depth.divisor, self.depth_invalid)
            sample.update(depth=depth, depth_path=path)
        return sample

    def read_mask(self, path: Path) -> np.ndarray:
        """Class ids of a mask file, through the palette if it is in colour and through `id_map` if there is one."""
        image = open_image(path)
        if self.palette is not None and image.mode in ("RGB", "RGBA"):
            return ids_from_colors(rgb_array(image), self.palette, self.ignore_index, path)
        return map_ids(id_array(image, path), self.id_map, self.ignore_index, path)
