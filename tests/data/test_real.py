"""Readers on real files in their official layouts, looked for in ../shared/data beside the checkout (or $ZOO_DATA)."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import DATASETS
from train.data.check import run

FOLDER = Path(os.environ.get("ZOO_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def root(name: str) -> Path:
    """The folder of one data set; skips the test if it is not there."""
    path = FOLDER / name
    if not path.is_dir():
        pytest.skip(f"no real files at {path}")
    return path


def pair(name: str, folder: str, targets, **args):
    return [DATASETS[name](root(folder), split, targets, **args) for split in ("train", "val")]


def test_cifar10_is_what_torchvision_reads():
    train, val = pair("cifar10", "cifar10", ("label",))
    assert (len(train), len(val)) == (5000, 1000)
    assert train.classes[0] == "airplane"
    assert np.bincount(train.labels).tolist() == [500] * 10
    from torchvision.datasets import CIFAR10

    sums = json.loads((root("cifar10") / "torchvision_md5.json").read_text())
    mini = type(
        "MiniCIFAR10",
        (CIFAR10,),
        {
            "train_list": [[name, sums[name]] for name, _ in CIFAR10.train_list],
            "test_list": [[name, sums[name]] for name, _ in CIFAR10.test_list],
            "meta": {**CIFAR10.meta, "md5": sums["batches.meta"]},
        },
    )
    for split, theirs in (("train", mini(root("cifar10"), train=True)), ("val", mini(root("cifar10"), train=False))):
        ours = train if split == "train" else val
        assert np.array_equal(ours.images, theirs.data.transpose(0, 3, 1, 2))
        assert ours.labels == theirs.targets


def test_imagenet_labels_are_the_official_index():
    data = DATASETS["imagenet"](root("imagenet_mini"), "val", ("label",))
    with open(root("imagenet_mini") / "val_labels.csv") as file:
        expected = {Path(row["path"]).name: int(row["label"]) for row in csv.DictReader(file)}
    assert len(data) == 200
    assert {path.name: label for path, label in data.samples} == expected
    names = json.loads((root("imagenet_mini") / "imagenet_class_index.json").read_text())
    official = [names[str(i)][0] for i in range(1000)]
    from timm.data import ImageNetInfo

    assert ImageNetInfo("imagenet-1k").label_names() == official
    assert data[0]["image"].shape[0] == 3


def test_imagenet_trains_on_a_folder_of_another_name():
    train = DATASETS["imagenet"](root("imagenet_mini"), "train", ("label",), train_folder="val")
    assert len(train) == 200 and len(train.classes) == 1000


def test_tiny_imagenet_has_fifty_classes_and_grey_files():
    train, val = pair("tiny_imagenet", "tiny_imagenet_mini", ("label",))
    assert (len(train), len(val), len(train.classes)) == (2000, 500, 50)
    assert np.bincount([label for _, label in val.samples]).tolist() == [10] * 50
    grey = next(i for i, (path, _) in enumerate(train.samples) if Image.open(path).mode == "L")
    assert train[grey]["image"].shape == (3, 64, 64)


def test_ade20k_ids_and_sizes():
    train, val = pair("ade20k", "ade20k_mini", ("mask",))
    assert (len(train), len(val)) == (2, 2)
    raw = np.asarray(Image.open(root("ade20k_mini") / "ADEChallengeData2016/annotations/training/ADE_train_00016869.png"))
    mask = train[0]["mask"].numpy()
    assert np.array_equal(np.where(raw == 0, 255, raw - 1), mask)
    seen = set(torch.cat([sample["mask"].flatten() for data in (train, val) for sample in data]).unique().tolist())
    assert max(seen - {255}) == 138
    assert [tuple(sample["image"].shape[1:]) for sample in val] == [(512, 683), (364, 500)]


def test_camvid_void_and_classes():
    train, val = pair("camvid", "camvid", ("mask",))
    assert (len(train), len(val)) == (30, 16)
    counts = torch.bincount(torch.cat([train[i]["mask"].flatten() for i in range(0, 30, 3)]), minlength=256)
    assert (counts[:11] > 0).all()
    assert counts[11:255].sum() == 0
    assert 0.01 < float(counts[255] / counts.sum()) < 0.06


def test_nyu_metres_against_the_unquantised_frame():
    train, val = pair("nyuv2", "nyuv2_mini", ("depth", "mask"))
    assert (len(train), len(val)) == (70, 30)
    depth = torch.stack([train[i]["depth"] for i in range(0, 70, 10)])
    assert 0.7 < float(depth.min()) < 1.5
    assert 5 < float(depth.max()) < 9.99
    exact = np.load(root("nyuv2_mini") / "fastdepth_sample/depth_m.npy")  # the same unit: an indoor range in metres
    assert 0.5 < float(np.median(exact)) / float(depth.median()) < 2
    sample = val[3]
    assert sample["mask"].shape == sample["image"].shape[1:] == sample["depth"].shape[1:] == (480, 640)
    assert 0.05 < float((sample["mask"] == 255).float().mean()) < 0.6


def test_sevenscenes_masks_both_kinds_of_missing():
    train, val = pair("sevenscenes", "sevenscenes_mini", ("depth",))
    assert (len(train), len(val)) == (20, 10)
    odd = next(i for i, (image, _) in enumerate(train.pairs) if "000850" in image.name)
    raw = np.asarray(Image.open(train.pairs[odd][1]))
    assert (raw == 65535).sum() > 1000
    depth = train[odd]["depth"][0].numpy()
    assert (depth[(raw == 0) | (raw == 65535)] == 0).all()
    assert depth[depth > 0].min() >= 0.8
    assert depth.max() < 4


def test_kitti_is_sparse_metres_in_the_benchmark_crop():
    lists = {"train_list": "kitti_files.txt", "val_list": "kitti_files.txt"}
    _, val = pair("kitti", "kitti_mini", ("depth",), **lists)
    for sample in val:
        assert sample["image"].shape == (3, 352, 1216)
        depth = sample["depth"][sample["depth"] > 0]
        assert 4 < float(depth.min()) < float(depth.max()) < 77
        assert 0.04 < depth.numel() / sample["depth"].numel() < 0.06
    whole = DATASETS["kitti"](root("kitti_mini"), "val", ("depth",), benchmark_crop=False, **lists)
    assert {tuple(sample["image"].shape[1:]) for sample in whole} == {(370, 1224), (375, 1242)}


@pytest.mark.parametrize(
    ("name", "folder", "targets"),
    [
        ("camvid", "camvid", ("mask",)),
        ("nyuv2", "nyuv2_mini", ("depth", "mask")),
        ("sevenscenes", "sevenscenes_mini", ("depth",)),
        ("tiny_imagenet", "tiny_imagenet_mini", ("label",)),
    ],
)
def test_data_check_finds_no_error_in_real_data(name, folder, targets):
    report = run(pair(name, folder, targets), count=4)
    assert report.ok, report.lines


def test_data_check_finds_millimetres_in_real_depth():
    layout = {"images": "data", "depths": "data", "image_suffix": ".color", "depth_suffix": ".depth"}
    data = pair("folder", "sevenscenes_mini", ("depth",), depth_divisor=1.0, **layout)
    assert len(data[0]) == 30
    report = run(data, count=3)
    assert any("millimetres read as metres" in finding.text and "1000" in finding.text for finding in report.findings)
