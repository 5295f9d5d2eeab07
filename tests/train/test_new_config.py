"""zoo config --new: a look at a folder becomes a configuration that reads it, and trains on it as it is."""

import numpy as np
import pytest
import tiny
import yaml
from PIL import Image

from train import cli, config
from train.data import open_split
from train.data.finding import part_of
from train.new_config import new

RANDOM = np.random.default_rng(0)


def picture(path, size=(48, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 255, (*size, 3), np.uint8)).save(path)


def target(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def written(tmp_path, kind, folder):
    """(configuration, its text) of the command's file for a folder."""
    text = new(kind, folder)
    (tmp_path / "my.yaml").write_text(text)
    return config.load(str(tmp_path / "my.yaml")), text


def splits(loaded, *targets):
    return [open_split(loaded.data, split, targets) for split in ("train", "val")]


def test_pairs_with_splits_void_and_named_classes(tmp_path):
    for split in ("train", "val"):
        for i in range(3):
            picture(tmp_path / "data" / "img" / split / f"{split}{i}.jpg")
            values = RANDOM.integers(0, 3, (48, 64)).astype(np.uint8)
            values[0, 0] = 255
            target(tmp_path / "data" / "labels" / split / f"{split}{i}.png", values)
    (tmp_path / "data" / "classes.txt").write_text("road\nsky\ncar\n")
    loaded, text = written(tmp_path, "segmentation", tmp_path / "data")
    assert loaded.task["num_classes"] == 3 and "num_classes" not in text and "void" in text
    train, val = splits(loaded, "mask")
    assert train.classes == ["road", "sky", "car"] and (len(train), len(val)) == (3, 3)
    assert {255} < set(np.unique(train[0]["mask"])) <= {0, 1, 2, 255}


@pytest.mark.parametrize("kind", ["binary", "colours", "suffixes"])
def test_masks_of_other_kinds_get_a_split_by_fraction(tmp_path, kind):
    for i in range(10):
        image, mask = tmp_path / "d" / "images" / f"{i}.png", tmp_path / "d" / "masks" / f"{i}.png"
        values = RANDOM.integers(0, 2, (48, 64)).astype(np.uint8)
        if kind == "suffixes":
            image, mask = tmp_path / "d" / f"{i}_rgb.png", tmp_path / "d" / f"{i}_mask.png"
        picture(image)
        colours = np.array([[0, 0, 0], [200, 30, 60]], np.uint8)[values]
        target(mask, {"binary": values * 255, "colours": colours, "suffixes": values}[kind])
    loaded, _ = written(tmp_path, "segmentation", tmp_path / "d")
    train, val = splits(loaded, "mask")
    assert loaded.task["num_classes"] == 2 and (len(train), len(val)) == (8, 2)
    assert not {*train.images} & {*val.images} and set(np.unique(train[0]["mask"])) == {0, 1}


@pytest.mark.parametrize(("divisor", "dtype"), [(1000, np.uint16), (1, np.float32)])
def test_depth_units(tmp_path, divisor, dtype):
    for i in range(5):
        picture(tmp_path / "d" / "rgb" / f"{i}.png")
        values = (RANDOM.uniform(1, 8, (48, 64)) * divisor).astype(dtype)
        (tmp_path / "d" / "depth").mkdir(exist_ok=True)
        if dtype is np.float32:
            np.save(tmp_path / "d" / "depth" / f"{i}.npy", values)
        else:
            Image.fromarray(values).save(tmp_path / "d" / "depth" / f"{i}.png")
    loaded, _ = written(tmp_path, "depth", tmp_path / "d")
    train, val = splits(loaded, "depth")
    assert loaded.task["max_depth"] == 8 and (len(train), len(val)) == (4, 1)
    assert float(train[0]["depth"].min()) >= 1 and float(train[0]["depth"].max()) <= 8


@pytest.mark.parametrize("divided", [False, True])
def test_class_folders(tmp_path, divided):
    for split in ("train", "val") if divided else ("",):
        for name in ("cat", "dog"):
            for i in range(5):
                picture(tmp_path / "d" / split / name / f"{i}.jpg")
    loaded, _ = written(tmp_path, "classification", tmp_path / "d")
    train, val = splits(loaded, "label")
    assert loaded.task["num_classes"] == 2 and train.classes == ["cat", "dog"]
    assert (len(train), len(val)) == ((10, 10) if divided else (8, 2)) and {val[i]["label"] for i in range(len(val))} == {0, 1}


def test_the_written_file_trains_as_it_is(tmp_path, monkeypatch):
    for i in range(10):
        picture(tmp_path / "d" / "images" / f"{i}.png")
        target(tmp_path / "d" / "masks" / f"{i}.png", RANDOM.integers(0, 3, (48, 64)).astype(np.uint8))
    (tmp_path / "my.yaml").write_text(new("segmentation", tmp_path / "d"))
    small = tiny.VALUES["model"]["backbone_args"]
    keys = {"optim.steps": 1, "optim.warmup_steps": 0, "data.workers": 0, "run.dir": tmp_path / "run", "run.device": "cpu"}
    keys |= {f"model.backbone_args.{key}": str(value).replace(" ", "") for key, value in small.items()}
    keys |= {"model.head_args.width": 8}
    assert cli.main(["train", str(tmp_path / "my.yaml"), *(f"--{key}={value}" for key, value in keys.items())]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_mistakes_are_sentences(tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    picture(tmp_path / "flat" / "a.jpg")
    picture(tmp_path / "photos" / "images" / "a.png")
    target(tmp_path / "photos" / "masks" / "a.png", RANDOM.integers(0, 255, (48, 64, 3), np.uint8))
    for arguments, message in (
        (["flat", "--new", "segmentation"], "no segmentation data of a known layout: images/ and masks/"),
        (["flat", "--new", "classification"], "one folder a class"),
        (["flat", "--new", "poses"], "segmentation, depth, classification"),
        (["nowhere", "--new", "depth"], "is not a folder"),
        (["photos", "--new", "segmentation"], "more than 256 colours"),
    ):
        assert cli.main(["config", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        out, err = capsys.readouterr()
        assert message in err and out == ""


def test_a_split_by_fraction_depends_on_names_and_seed_alone():
    names = [f"n{i}" for i in range(50)]
    val = part_of(names, "val", 0.2, 0)
    assert len(val) == 10 and set(val) == set(part_of(names[::-1], "val", 0.2, 0)) and val != part_of(names, "val", 0.2, 1)
    assert sorted([*val, *part_of(names, "train", 0.2, 0)]) == sorted(names)
    for share in (0, 1, -1, 20):
        with pytest.raises(ValueError, match="between 0 and 1"):
            part_of(names, "val", share, 0)


def test_the_text_has_one_yaml_value_a_key(tmp_path):
    picture(tmp_path / "we: ird {split}" / "a" / "x.png")
    picture(tmp_path / "we: ird {split}" / "b" / "y.png")
    loaded = yaml.safe_load(new("classification", tmp_path / "we: ird {split}"))
    assert loaded["data"]["root"].endswith("we: ird {split}")
