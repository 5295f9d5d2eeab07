"""Data that users had and that were read wrongly or refused, one folder of tests/cases each."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden import case
from PIL import Image

from train.cli import main
from train.data import DATASETS
from train.data.check import run
from train.data.facts import read_facts
from train.data.files import PixelRules, Unreadable, open_image

here = pytest.mark.parametrize


def folder(root, targets=("mask",), **args):
    return DATASETS["folder"](root, "train", targets, **args)


@here("name", ["breaker_eps_named_jpg"])
def test_an_eps_file_named_jpg_starts_no_other_program(name, tmp_path, monkeypatch):
    marker, script = tmp_path / "started", tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(Unreadable, match=r"eps.jpg: not a readable image \(in none of the formats JPEG"):
        open_image(case(name) / "eps.jpg")
    assert not marker.exists()


@here("name", ["depth_pfm"])
def test_a_pfm_is_read_from_the_bottom_and_nan_is_missing(name):
    depth = folder(case(name), ("depth",), depth_divisor=1)[0]["depth"]
    assert depth[0, 0, :3].tolist() == [0.0, 0.0, 2.5] and depth[0, -1, 0] == 7.0


@here("name", ["exif_upright_mask"])
def test_a_photograph_is_upright_in_training_too(name):
    data = folder(case(name), classes=2)
    sample = data[0]
    assert sample["image"].shape == (3, 40, 20)
    assert ((sample["image"][0] > 100) == sample["mask"].bool()).all()
    report = run([data])
    assert any("2 of 2 images have an EXIF orientation" in line for line in report.lines)


@here("name", ["exif_upright_mask"])
def test_a_mask_of_the_stored_size_is_refused_with_the_reason(name, tmp_path):
    shutil.copytree(case(name), tmp_path / "d")
    for path in (tmp_path / "d" / "masks" / "train").iterdir():
        image = open_image(path)
        image.transpose(Image.Transpose.ROTATE_90).save(path)  # as it would lie on the stored pixels
    with pytest.raises(ValueError, match=r"the mask has height x width 20x40 but its image .* has 40x20.*EXIF orientation"):
        folder(tmp_path / "d", classes=2)[0]


@here("name", ["hidden_notebook_folder"])
def test_hidden_folders_are_no_classes(name):
    data = DATASETS["class_folder"](case(name), "train", ("label",))
    assert data.classes == ["cat", "dog"] and len(data) == 2


DEEP = ["image_float_0_1", "image_float_0_4000", "image_uint16_12bit"]


@here("name", DEEP)
def test_an_image_that_is_not_8_bit_is_refused_or_read_in_a_stated_range(name):
    data = folder(case(name), classes=3)
    with pytest.raises(ValueError, match=r"a\.(tif|png): its (float32|uint16) pixels of .* to .* set data.image_range"):
        data[0]
    report = run([data])
    assert not report.ok and any("data.image_range" in line for line in report.lines)
    path = data.images[0]
    stored = np.asarray(open_image(path)).astype(float)
    data.pixels = PixelRules(image_range={"image_float_0_1": (0, 1), "image_float_0_4000": (0, 4000)}.get(name, (0, 4095)))
    image = data[0]["image"]
    assert len(image.unique()) >= 200
    order = np.argsort(stored.ravel(), kind="stable")
    assert (np.diff(image[0].numpy().ravel()[order].astype(int)) >= 0).all()
    kind = "uint16" if "uint16" in name else "float32"
    assert any(f"image files    1 of {kind}, 1 channel, values" in line for line in run([data]).lines)


@here("name", ["linked_subfolder_pairs"])
def test_linked_sub_folders_are_followed(name, tmp_path):
    subprocess.run([sys.executable, case(name) / "make.py", tmp_path / "x"], check=True)
    assert len(folder(tmp_path / "x", classes=3)) == 3
    (tmp_path / "x" / "images" / "train" / "loop").symlink_to(tmp_path / "x" / "images")
    assert len(folder(tmp_path / "x", classes=3)) == 3


@here("name", ["list_name_with_spaces"])
def test_a_name_in_a_list_may_have_spaces(name):
    assert len(folder(case(name), classes=3, lists="{split}.txt")) == 2


@here("name", ["mask_jpeg"])
def test_data_check_finds_lossy_masks(name):
    report = run([folder(case(name), classes=100)])
    finding = next(line for line in report.lines if "masks are JPEG" in line)
    assert "changes ids" in finding and "train0.jpg" in finding and "save masks as PNG" in finding


@here("name", ["npy_mask"])
def test_an_array_is_a_mask(name):
    mask = folder(case(name), classes=3)[0]["mask"]
    assert torch.equal(mask, torch.from_numpy(np.load(case(name) / "masks/train/a.npy").astype(np.int64)))
    assert torch.bincount(mask.flatten()).tolist() == [127, 125, 132]


@here("name", ["palette_file_has_other_order"])
def test_the_colours_of_a_palette_image_decide_where_a_palette_is_given(name):
    mask = folder(case(name), classes=["background", "red"], palette=[[0, 0, 0], [255, 0, 0]])[0]["mask"]
    half = mask.shape[1] // 2
    assert (mask[:, :half] == 0).all() and (mask[:, half:] == 1).all()
    assert (folder(case(name), classes=2)[0]["mask"][:, :half] == 1).all()  # without one, indices are ids


@here("name", ["train_grey_in_chans_1"])
def test_one_channel_from_training_to_prediction(name, tmp_path, capsys):
    root, run_folder = case(name), tmp_path / "run"
    keys = [f"--data.root={root}", "--model.in_chans=1", "--data.mean=[0.5]", "--data.std=[0.25]", f"--run.dir={run_folder}"]
    assert main(["train", str(root / "run.yaml"), *keys]) == 0, capsys.readouterr().err
    from safetensors.torch import load_file

    weights = load_file(run_folder / "model.safetensors")
    assert next(value for value in weights.values() if value.ndim == 4).shape[1] == 1
    assert main(["predict", str(run_folder), str(root / "images" / "val"), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*_classes.png"))) == 2


def test_facts_are_asked_only_while_data_check_reads():
    data = folder(case("mask_jpeg"), classes=100)
    facts = read_facts(data)
    assert len(facts.notes.lossy_masks) == 2 and data.notes is None
