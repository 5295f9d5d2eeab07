"""Your own pairs: a folder of images beside a folder of masks, of depth maps, or of both, with the same file names."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.data.base import DescribedDataset, FileDataset
from train.data.files import DEPTH_SUFFIXES, MASK_SUFFIXES
from train.data.finding import by_name, fill_in, image_suffixes, part_of, read_names


class Folder(DescribedDataset, FileDataset):
    """Files matched by their path below the folder, without suffix. "{split}" in any argument becomes train or val.

    Images are pictures, or .npy arrays (H W, C H W or H W C) in a folder without a picture; masks are pictures of one channel,
    with a colour table or, given a palette, in colour, or integer arrays; depth maps are pictures of one channel, .pfm, .npy or
    .npz. Raises FileNotFoundError for a missing folder, list or partner of an image; ValueError for masks without classes and
    for an id_map or palette that leaves the classes.

    Args:
        images, masks, depths: folders below root.
        image_suffix, mask_suffix, depth_suffix: what follows the common name before the extension, for files such as
            7_color.jpg beside 7_depth.png ("_color", "_depth").
        val_share: share of the images that validate, for folders without "{split}"; which ones, a hash of their names and
            `val_seed` says.
        val_seed: another one gives another split.
        lists: a text file with one name per line (Pascal's ImageSets/Segmentation/train.txt); null takes every image.
        palette: colours in class order. With it masks may be colour images, and the colour table of a palette image counts by
            its colours, unless there is an id_map.
        described: as in DescribedDataset.
    """

    provides = ("mask", "depth")

    def find(
        self,
        images: str = "images/{split}",
        masks: str = "masks/{split}",
        depths: str = "depths/{split}",
        image_suffix: str = "",
        mask_suffix: str = "",
        depth_suffix: str = "",
        lists: str | None = None,
        val_share: float | None = None,
        val_seed: int = 0,
        palette: list[list[int]] | None = None,
        **described: Any,
    ) -> None:
        self.describe(**described)
        self.palette = None if palette is None else [(int(red), int(green), int(blue)) for red, green, blue in palette]
        if self.palette is not None and self.classes is not None and len(self.palette) != len(self.classes):
            raise ValueError(f"Folder: {len(self.palette)} palette colours for {len(self.classes)} classes")

        def below(key: str, pattern: str) -> Path:
            return self.root / fill_in(pattern, self.split, f"data.args.{key}")

        folder = below("images", images)
        found = by_name(folder, image_suffix, image_suffixes(folder), f"the {self.split} images", "Folder")
        names = list(found) if lists is None else listed(below("lists", lists), found, folder)
        if val_share is not None:
            if "{split}" in images or "{split}" in (lists or ""):
                raise ValueError(
                    "Folder: data.args.val_share divides one folder, and images or lists have {split}; leave one out"
                )
            names = part_of(names, self.split, val_share, val_seed)
        self.images = [found[name] for name in names]
        self.partners: dict[str, list[Path]] = {}
        for target, pattern, suffix, endings in (
            ("mask", masks, mask_suffix, MASK_SUFFIXES),
            ("depth", depths, depth_suffix, DEPTH_SUFFIXES),
        ):
            if target not in self.targets:
                continue
            folder = below(f"{target}s", pattern)
            others = by_name(folder, suffix, endings, f"the {self.split} {target}s", "Folder")
            absent = [name for name in names if name not in others]
            if absent:
                raise FileNotFoundError(
                    f"Folder: {found[absent[0]]} has no {target}: looked for {absent[0]}{suffix}.* in {folder}"
                )
            self.partners[target] = [others[name] for name in names]
            single = [name for name in others if name not in found]
            if single and ("{split}" in pattern) == ("{split}" in images):  # else they are the other split's
                self.notices += (f"{len(single)} {target} files have no image and are not used, e.g. {others[single[0]]}",)

    def image_files(self) -> list[Path]:
        return self.images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> dict[str, Any]:
        sample = {"image": self.image(self.images[index]), "path": self.images[index]}
        if "mask" in self.targets:
            path = self.partners["mask"][index]
            sample.update(mask=self.ids(path, palette=self.palette, id_map=self.id_map), mask_path=path)
        if "depth" in self.targets:
            path = self.partners["depth"][index]
            depth = self.metres(path, self.depth.divisor, self.depth_invalid)
            sample.update(depth=depth, depth_path=path)
        return sample


def listed(path: Path, found: Mapping[str, Path], folder: Path) -> list[str]:
    """The names of a list as they are in `found`; each line is a name, with or without a suffix, quoted or not.

    Pascal's lists of one class have a second column of -1, 0 or 1, which is passed over. FileNotFoundError for a name without
    an image in `folder`.
    """
    names = []
    for line in read_names(path, "Folder"):
        first = re.sub(r"(\t.*|\s+(-1|0|1))$", "", line)
        bare = line[1:-1] if len(line) > 2 and line[0] == line[-1] and line[0] in "'\"" else line
        known = [name for text in (line, first, bare) for name in (text, os.path.splitext(text)[0]) if name in found]
        if not known:
            raise FileNotFoundError(f"Folder: {path} names {first!r}, and {folder} has no such image")
        names.append(known[0])
    return names
