"""Panoptic data in their published layouts, and what is wrong with them by file and value."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import DATASETS
from train.data.check import run
from train.show.panoptic import color_segments, inner_point, numbered_segments, outline

CATEGORIES = [  # not in the order of their ids
    {"id": 90, "name": "wall", "isthing": 0, "color": [9, 8, 7]},
    {"id": 3, "name": "car", "isthing": 1, "color": [1, 2, 3]},
    {"id": 7, "name": "sky", "isthing": 0, "color": [4, 5, 6]},
]
IDS = np.array([[0, 0, 300, 300], [70000, 70000, 300, 5], [70000, 70000, 9, 5]])
SEGMENTS = [(300, 90), (70000, 3), (5, 3), (9, 7)]
EXPECTED = [[-1, -1, 2000, 2000], [1, 1, 2000, 2], [1, 1, 1000, 2]]
LAYOUTS = {
    "coco_panoptic": ("{split}2017/{name}.jpg", "annotations/panoptic_{split}2017"),
    "ade20k_panoptic": ("ADEChallengeData2016/images/{long}/{name}.jpg", "ADEChallengeData2016/ade20k_panoptic_{split}"),
    "cityscapes_panoptic": ("leftImg8bit/{split}/bonn/{name}_leftImg8bit.png", "gtFine/cityscapes_panoptic_{split}"),
}


def picture(ids):
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))


def content(name="bonn_000_1", **changes):
    """A JSON of one image; changes: of its only annotation."""
    segments = [
        {"id": i, "category_id": c, "iscrowd": 0, "area": int(np.count_nonzero(i == IDS)), "bbox": [0, 0, 4, 3]}
        for i, c in SEGMENTS
    ]
    annotation = {"image_id": name, "file_name": f"{name}_panoptic.png", "segments_info": segments, **changes}
    images = [{"id": name, "file_name": f"{name}.jpg", "height": 3, "width": 4}, {"id": "unused", "file_name": "unused.jpg"}]
    return {"images": images, "annotations": [annotation], "categories": CATEGORIES}


def write(root, layout="coco_panoptic", split="train", name="bonn_000_1", ids=IDS, listing=None):
    image, annotations = (
        text.format(split=split, name=name, long="training" if split == "train" else "validation") for text in LAYOUTS[layout]
    )
    (root / image).parent.mkdir(parents=True, exist_ok=True)
    (root / annotations).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (3, 4, 3), dtype=np.uint8)).save(root / image)
    picture(ids).save(root / annotations / f"{name}_panoptic.png")
    (root / f"{annotations}.json").write_text(json.dumps(listing or content(name)))
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_published_layouts_are_read(layout, split, tmp_path):
    data = DATASETS[layout](write(tmp_path, layout, split), split, ("panoptic", "mask"))
    assert data.classes == ["car", "sky", "wall"] and data.things == [0] and data.palette == [(1, 2, 3), (4, 5, 6), (9, 8, 7)]
    sample = data[0]
    assert len(data) == 1 and sample["panoptic"].tolist() == EXPECTED
    assert sample["mask"].tolist() == [[255, 255, 2, 2], [0, 0, 2, 0], [0, 0, 1, 0]]
    assert sample["image"].shape == (3, 3, 4) and data.image_files()[0].is_file()


def test_a_crowd_has_number_zero_and_own_layouts_are_named(tmp_path):
    listing = content()
    listing["annotations"][0]["segments_info"][1]["iscrowd"] = 1
    write(tmp_path, listing=listing)
    (tmp_path / "train2017").rename(tmp_path / "photos")
    (tmp_path / "annotations" / "panoptic_train2017").rename(tmp_path / "ids")
    args = {"images": "photos", "annotations": "annotations/panoptic_{split}2017.json", "masks": "ids"}
    data = DATASETS["coco_panoptic"](tmp_path, "train", ("panoptic",), **args)
    assert data[0]["panoptic"].tolist() == [[-1, -1, 2000, 2000], [0, 0, 2000, 1], [0, 0, 1000, 1]]


def segments(**changes):
    """The annotation's segments, the first of them changed."""
    found = content()["annotations"][0]["segments_info"]
    return {"segments_info": [{**found[0], **changes}, *found[1:]]}


BAD = [
    (segments(category_id=4), "bonn_000_1_panoptic.png, segment 300: category 4 is not in the categories"),
    (segments(bbox=[2, 0, 3, 2]), r"segment 300: its box \[2, 0, 3, 2\] lies outside the 3x4 image"),
    (segments(area=12), "its segments have 19 pixels and the 3x4 image 12: they overlap"),
    (segments(id=5), "segment id 5 is used twice"),
    (segments(id=0), "segment id 0 cannot be a colour"),
    ({"image_id": "x"}, "is of image 'x', which the list of images does not have"),
    ({"file_name": "lost.png"}, "the PNG .*lost.png is not there"),
]


@pytest.mark.parametrize("changes, words", BAD)
def test_what_is_wrong_with_a_json_is_said_when_the_split_is_opened(changes, words, tmp_path):
    write(tmp_path, listing=content(**changes))
    with pytest.raises((ValueError, FileNotFoundError), match=f"panoptic_train2017.json: .*{words}"):
        DATASETS["coco_panoptic"](tmp_path, "train", ("panoptic",))


@pytest.mark.parametrize(
    "text, words",
    [
        ("[", "not a readable JSON file"),
        ("[]", "no list 'categories'"),
        (
            '{"categories": [], "images": [], "annotations": [{"bbox": 1}]}',
            "entry 0 of annotations has no 'image_id'; .*instances",
        ),
        ('{"categories": [{"id": 1, "name": "a"}]}', "entry 0 of categories has no 'isthing'"),
    ],
)
def test_a_json_of_another_kind_is_refused(text, words, tmp_path):
    write(tmp_path)
    (tmp_path / "annotations" / "panoptic_train2017.json").write_text(text)
    with pytest.raises(ValueError, match=f"panoptic_train2017.json: {words}"):
        DATASETS["coco_panoptic"](tmp_path, "train", ("panoptic",))


@pytest.mark.parametrize(
    "ids, changes, words",
    [
        (np.where(IDS == 9, 11, IDS), {}, "1 pixels have id 11, and the JSON has no such segment"),
        (np.where(IDS == 9, 5, IDS), {}, "segment 9 of the JSON has no pixel"),
        (np.where(IDS == 9, 5, IDS)[:, :3].repeat(2, 1)[:, :4], {}, "has no"),
        (IDS, segments(area=7, id=300), "segment 300 has 3 pixels and should have 7"),
    ],
)
def test_a_png_that_differs_from_its_json_is_named(ids, changes, words, tmp_path):
    listing = content(**changes)
    if changes:  # areas of the others, so that the sum is that of the image
        listing["annotations"][0]["segments_info"][1]["area"] = 1
    write(tmp_path, ids=ids, listing=listing)
    with pytest.raises(ValueError, match=f"bonn_000_1_panoptic.png: .*{words}"):
        DATASETS["coco_panoptic"](tmp_path, "train", ("panoptic",))[0]


def test_a_png_without_colours_and_a_folder_that_is_not_there(tmp_path):
    write(tmp_path)
    folder = tmp_path / "annotations" / "panoptic_train2017"
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(folder / "bonn_000_1_panoptic.png")
    with pytest.raises(ValueError, match="this image has mode L"):
        DATASETS["coco_panoptic"](tmp_path, "train", ("panoptic",))[0]
    (folder / "bonn_000_1_panoptic.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotation bonn_000_1_panoptic.png: the PNG .* is not there"):
        DATASETS["coco_panoptic"](tmp_path, "train", ("panoptic",))
    folder.rmdir()
    with pytest.raises(FileNotFoundError, match="the PNGs of panoptic_train2017.json"):
        DATASETS["coco_panoptic"](tmp_path, "train", ("panoptic",))


def test_cityscapes_instance_ids_are_segments(tmp_path):
    image = tmp_path / "leftImg8bit" / "val" / "bonn" / "bonn_0_leftImg8bit.png"
    ids = tmp_path / "gtFine" / "val" / "bonn" / "bonn_0_gtFine_instanceIds.png"
    image.parent.mkdir(parents=True)
    ids.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((1, 6, 3), np.uint8)).save(image)
    Image.fromarray(np.array([[7, 26000, 26001, 26, 4, 24003]], np.uint16)).save(ids)
    data = DATASETS["cityscapes"](tmp_path, "val", ("panoptic",))
    assert data[0]["panoptic"].tolist() == [[0, 13001, 13002, 13000, -1, 11004]]
    assert {data.classes[i] for i in data.things} >= {"person", "bicycle", "car"} and len(data.things) == 8
    Image.fromarray(np.array([[7, 26000, 60001, 26, 4, 24003]], np.uint16)).save(ids)
    with pytest.raises(ValueError, match="instanceIds.png: labelId 60 is outside"):
        data[0]


def test_data_check_counts_segments_and_shows_them(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split=split)
    datasets = [DATASETS["coco_panoptic"](tmp_path, split, ("panoptic",)) for split in ("train", "val")]
    report = run(datasets, out=tmp_path / "out")
    assert report.facts[0].segments == {0: 2, 1: 1, 2: 1} and (tmp_path / "out" / "data_check.png").is_file()
    assert any("segments       4 (4.0 an image, at most 4), 2 of them things" in line for line in report.lines)
    listing = content()
    for segment in listing["annotations"][0]["segments_info"]:
        segment["iscrowd"] = 1
    write(tmp_path, listing=listing)
    crowd = run([DATASETS["coco_panoptic"](tmp_path, "train", ("panoptic",))])
    assert any("1 segments are crowds of things" in str(finding) for finding in crowd.findings)


def test_pictures_of_segments():
    maps = torch.tensor([[0, 0, 2001, 2001], [0, 0, 2002, -1]])
    palette = [(10, 10, 10), (0, 0, 0), (100, 0, 200)]
    colours = color_segments(maps, palette)
    assert colours[0, 0].tolist() == [10, 10, 10] and colours[1, 3].tolist() == [0, 0, 0]
    assert colours[0, 3].tolist() == colours[0, 1].tolist() == [255, 255, 255]  # the last pixels before another segment
    assert outline(maps).tolist() == [[False, True, True, True], [False, True, True, False]]
    wide = numbered_segments(np.zeros((2, 4, 3), np.uint8), maps.numpy(), palette, least=40)
    assert wide.shape == (20, 40, 3)
    assert inner_point(np.array([[1, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]], bool)) == (1, 3)
