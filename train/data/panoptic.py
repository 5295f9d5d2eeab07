"""Panoptic data in COCO's form (Kirillov et al. 2019): a JSON that lists the segments of each image, and a PNG of their ids.

    COCO:        train2017/*.jpg, val2017/*.jpg, annotations/panoptic_{train,val}2017.json and the folder of PNGs beside each
    ADE20K:      images/{training,validation}/*.jpg, ade20k_panoptic_{train,val}.json and the folder of PNGs beside each
    Cityscapes:  leftImg8bit/<split>/<city>/*.png, gtFine/cityscapes_panoptic_{train,val}.json and the folder beside each

A pixel's id is red + 256 green + 65536 blue, and 0 is void. Class ids are the places of the JSON's categories, sorted by id.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.base import FileDataset
from train.data.files import open_image
from train.data.finding import fill_in, need, read_text, walk
from train.sample import SEGMENTS, VOID


@dataclass(frozen=True)
class Annotated:
    """One image and its segments.

    Attributes:
        image, png: files.
        size: (height, width) that the JSON says, or None.
        ids: of the segments, in the PNG.
        values: class * 1000 + number of each.
        areas: pixels that the JSON says, 0 where it says nothing.
    """

    image: Path
    png: Path
    size: tuple[int, int] | None
    ids: np.ndarray
    values: np.ndarray
    areas: np.ndarray


class PanopticDataset(FileDataset):
    """What the forms share. Things, classes and colours come from the JSON's categories; a subclass says where the files are.

    Raises, before any training, FileNotFoundError for an image or a PNG that is not there, and ValueError naming the JSON and
    the annotation for a category that it does not list, an id that is used twice, a box outside its image, or segments that
    together have more pixels than the image.
    """

    provides = ("panoptic", "mask")

    def open(self, images: str, annotations: str, masks: str | None = None) -> None:
        """Reads the JSON of the split; all three are below root, with {split} for train or val.

        Args:
            images: folder of the images.
            annotations: the JSON.
            masks: folder of its PNGs; null = the JSON's name without its ending.
        """
        name = type(self).__name__
        folder = self.root / fill_in(images, self.split, "data.args.images")
        listing = self.root / fill_in(annotations, self.split, "data.args.annotations")
        pngs = listing.with_suffix("") if masks is None else self.root / fill_in(masks, self.split, "data.args.masks")
        need(listing, f"the {self.split} annotations", name)
        need(folder, f"the {self.split} images", name)
        need(pngs, f"the PNGs of {listing.name}", name)
        self.rows = self.load(listing, folder, pngs)

    def load(self, listing: Path, folder: Path, pngs: Path) -> list[Annotated]:
        """The images of a JSON, checked as far as it can be without opening a picture."""
        content = read_json(listing)
        categories = sorted(content["categories"], key=lambda row: row["id"])
        labels = {row["id"]: label for label, row in enumerate(categories)}
        if len(labels) != len(categories):
            raise ValueError(f"{listing}: two categories have one id")
        things = [label for label, row in enumerate(categories) if row["isthing"]]
        self.classes, self.things = [str(row["name"]) for row in categories], things
        colors = [row.get("color") for row in categories]
        self.palette = [(c[0], c[1], c[2]) for c in colors if c] if all(colors) else None
        pictures = {row["id"]: row for row in content["images"]}
        there = {place: set(map(str, (path.relative_to(place) for path in walk(place)))) for place in {folder, pngs}}
        rows = []
        for row in content["annotations"]:
            where = f"{listing}: annotation {row['file_name']}"
            if row["image_id"] not in pictures:
                raise ValueError(f"{where} is of image {row['image_id']!r}, which the list of images does not have")
            picture = pictures[row["image_id"]]
            image = self.image_name(picture)
            for place, file in ((folder, image), (pngs, row["file_name"])):
                if file not in there[place]:
                    lost = "the PNG" if file == row["file_name"] else "the image"
                    raise FileNotFoundError(f"{where}: {lost} {place / file} is not there")
            size = (int(picture["height"]), int(picture["width"])) if {"height", "width"} <= picture.keys() else None
            check_boxes(row["segments_info"], size, where)
            ids, values = numbered(row["segments_info"], labels, set(things), where)
            areas = np.array([int(segment.get("area", 0)) for segment in row["segments_info"]], np.int64)
            rows.append(Annotated(folder / image, pngs / row["file_name"], size, ids, values, areas))
        return rows

    def image_name(self, picture: Mapping[str, Any]) -> str:
        """The file, below the folder of images, of an entry of "images"."""
        return str(picture["file_name"])

    def image_files(self) -> list[Path]:
        return [row.image for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        sample: dict[str, Any] = {"image": self.image(row.image), "path": row.image}
        if self.targets:
            segments = self.segments(row)
            labels = np.where(segments == VOID, self.ignore_index, segments // SEGMENTS)
            sample |= {"panoptic": segments, "panoptic_path": row.png, "mask": labels, "mask_path": row.png}
        return sample

    def segments(self, row: Annotated) -> np.ndarray:
        """The PNG of an image as class * 1000 + number. ValueError where it and the JSON say different things."""
        picture = open_image(row.png, max_pixels=self.pixels.max_pixels)
        if picture.mode != "RGB":
            raise ValueError(
                f"{row.png}: a panoptic PNG has ids in three colours, and this image has mode {picture.mode}; is it another "
                "kind of annotation?"
            )
        red, green, blue = np.asarray(picture).astype(np.int64).transpose(2, 0, 1)
        found, places, counts = np.unique(red + 256 * green + 65536 * blue, return_inverse=True, return_counts=True)
        pixels = dict(zip(found.tolist(), counts.tolist(), strict=True))
        known = dict(zip(row.ids.tolist(), row.values.tolist(), strict=True))
        for value, count in pixels.items():
            if value and value not in known:
                raise ValueError(f"{row.png}: {count} pixels have id {value}, and the JSON has no such segment")
        for value, area in zip(row.ids.tolist(), row.areas.tolist(), strict=True):
            if value not in pixels:
                raise ValueError(
                    f"{row.png}: segment {value} of the JSON has no pixel: it lies outside the image, or under other segments"
                )
            if picture.size[::-1] == row.size and 2 * pixels[value] < area:
                raise ValueError(
                    f"{row.png}: segment {value} has {pixels[value]} pixels and should have {area}, as the JSON says: do "
                    "segments overlap?"
                )
        table = np.array([known.get(value, VOID) for value in found.tolist()], np.int64)
        return table[places.reshape(red.shape)]


class CocoPanoptic(PanopticDataset):
    """COCO panoptic, or data of your own in its form.

    All arguments are below root, with {split} for train or val.

    Args:
        images: folder of the images.
        annotations: the JSON.
        masks: folder of its PNGs; null = the JSON's name without its ending.
    """

    def find(
        self,
        images: str = "{split}2017",
        annotations: str = "annotations/panoptic_{split}2017.json",
        masks: str | None = None,
    ) -> None:
        self.open(images, annotations, masks)


class ADE20KPanoptic(PanopticDataset):
    """ADE20K's 150 classes as things and stuff, in the form that MaskFormer's scripts make of it.

    root is ADEChallengeData2016 or the folder that holds it.
    """

    def find(self) -> None:
        self.root = base if (base := self.root / "ADEChallengeData2016").is_dir() else self.root
        folder = "training" if self.split == "train" else "validation"
        self.open(f"images/{folder}", f"ade20k_panoptic_{self.split}.json")


class CityscapesPanoptic(PanopticDataset):
    """Cityscapes as cityscapesScripts' createPanopticImgs writes it; the data set cityscapes reads the instanceIds themselves.

    The list of images has names that are no files, so the names come from the images' ids.
    """

    def find(self) -> None:
        self.open("leftImg8bit/{split}", "gtFine/cityscapes_panoptic_{split}.json")

    def image_name(self, picture: Mapping[str, Any]) -> str:
        name = str(picture["id"])
        return f"{name.split('_')[0]}/{name}_leftImg8bit.png"


def read_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A panoptic JSON whose lists and keys are all there. ValueError names the file and what is missing."""
    wanted = {
        "categories": ("id", "name", "isthing"),
        "images": ("id", "file_name"),
        "annotations": ("image_id", "file_name", "segments_info"),
    }
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    for name, keys in wanted.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path}: no list {name!r}; a panoptic JSON has {', '.join(wanted)}")
        for i, row in enumerate(content[name]):
            missing = [key for key in keys if not isinstance(row, dict) or key not in row]
            if missing:
                hint = "; is this a JSON of instances instead of panoptic segments?" if name == "annotations" else ""
                raise ValueError(f"{path}: entry {i} of {name} has no {missing[0]!r}{hint}")
    return content


def numbered(
    segments: list[dict[str, Any]], labels: Mapping[int, int], things: set[int], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, values class * 1000 + number) of an annotation's segments.

    Args:
        segments: of an annotation.
        labels: its category -> class.
        things: classes whose segments are numbered.
        where: names the annotation in errors.
    """
    counts: dict[int, int] = {}
    ids, values = [], []
    for segment in segments:
        missing = [key for key in ("id", "category_id") if key not in segment]
        if missing:
            raise ValueError(f"{where} has a segment without {missing[0]!r}")
        if segment["category_id"] not in labels:
            raise ValueError(f"{where}, segment {segment['id']}: category {segment['category_id']} is not in the categories")
        label, number = labels[segment["category_id"]], 0
        if label in things and not segment.get("iscrowd"):
            number = counts[label] = counts.get(label, 0) + 1
            if number >= SEGMENTS:
                raise ValueError(f"{where} has more than {SEGMENTS - 1} things of category {segment['category_id']}")
        if not 0 < segment["id"] < 2**24 or segment["id"] in ids:
            why = "is used twice" if segment["id"] in ids else "cannot be a colour of the PNG"
            raise ValueError(f"{where}: segment id {segment['id']} {why}")
        ids.append(segment["id"])
        values.append(label * SEGMENTS + number)
    return np.array(ids, np.int64), np.array(values, np.int64)


def check_boxes(segments: list[dict[str, Any]], size: tuple[int, int] | None, where: str) -> None:
    """ValueError for boxes (x, y, width, height) outside the image, and areas that add up to more than it has."""
    if size is None:
        return
    height, width = size
    for segment, (x, y, w, h) in boxes(segments):
        if x < 0 or y < 0 or x + w > width or y + h > height:
            raise ValueError(
                f"{where}, segment {segment['id']}: its box {segment['bbox']} lies outside the {height}x{width} image"
            )
    total = sum(float(segment.get("area", 0)) for segment in segments)
    if total > 1.01 * height * width:  # areas of polygons are not whole pixels
        raise ValueError(
            f"{where}: its segments have {total:.0f} pixels and the {height}x{width} image {height * width}: they overlap"
        )


def boxes(segments: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[float]]]:
    """The segments that have a box, each with it."""
    for segment in segments:
        box = segment.get("bbox")
        if isinstance(box, list) and len(box) == 4:
            yield segment, box
