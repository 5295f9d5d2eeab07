"""`zoo look`: a picture of what a backbone sees."""

import numpy as np
import pytest
import saved
import timm
import tiny
import torch
from PIL import Image

from backbones.registers import RegisterEdit, add_test_time_registers
from train import cli, look
from train.data.files import read_image

SMALL = ["--untrained", "--size", "64", "96"]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


def zoo(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_a_run_shows_features_and_attention_of_its_backbone(image, tmp_path, capsys):
    run = saved.run(tmp_path / "run", tiny.values())
    code, out, _ = zoo(capsys, "look", run, image, "--out", tmp_path / "out")
    assert code == 0 and "photo_look.png" in out
    sheet = read_image(tmp_path / "out" / "photo_look.png")
    assert min(sheet.shape[1:]) > 600 and sheet.std() > 20
    code, _, err = zoo(capsys, "look", run, image, "--out", tmp_path / "out")
    assert code == 2 and "photo_look.png exists" in err


def test_the_place_changes_what_is_drawn(image, tmp_path, capsys):
    drawn = []
    for at in ("0.1,0.1", "0.9,0.9"):
        out = tmp_path / at
        command = ("look", "vit_tiny_patch16_224", image, "--out", out, "--at", at, *SMALL)
        assert zoo(capsys, *command)[0] == 0
        drawn.append(read_image(out / "photo_look.png"))
    assert drawn[0].shape == drawn[1].shape and not np.array_equal(*drawn)


@torch.no_grad()
def test_rows_are_the_stages_and_attention_stands_beside_its_features(image):
    subject = look.open_subject("vit_tiny_patch16_224", (64, 96), untrained=True)
    rows, _ = look.sheet_of(subject, look.features_of(subject.model), image, (0.5, 0.5))
    assert [panel.title.split("\n")[0] for panel in rows[0]] == ["photo.png", "norms of patch tokens"]
    for row, block in zip(rows[1:], (2, 5, 8, 11), strict=True):
        titles = [panel.title for panel in row]
        assert titles[0].startswith(f"block {block}: features") and titles[1] == f"blocks.{block}: all patches\nmean"
        assert titles[2].endswith("3 heads") and len(titles) == 3


def test_stages_keep_their_numbers_where_some_are_left_out(image, tmp_path):
    run = saved.run(tmp_path / "run", tiny.values(model={"out_indices": [1, 3]}))
    subject = look.open_subject(str(run))
    rows, _ = look.sheet_of(subject, look.features_of(subject.model), image, (0.5, 0.5))
    for row, stage in zip(rows[1:], (1, 3), strict=True):
        assert row[0].title.startswith(f"stage {stage}: features") and row[1].title.startswith(f"stages.{stage}.blocks.0.attn:")


def test_registers_show_before_and_after_and_stay_on(image):
    subject = look.open_subject("vit_tiny_patch16_224", (64, 96), untrained=True)
    add_test_time_registers(subject.model, {5: [1, 2, 3]}, scale=50.0)
    pixels = subject.images([image])
    before = subject.model(pixels)
    panels = look.artefact_panels(subject.model, pixels, np.zeros((64, 96, 3), np.uint8))
    assert [panel.title.split("\n")[0] for panel in panels] == ["norms without registers", "norms with registers, same colours"]
    assert panels[0].title.split("\n")[1] != panels[1].title.split("\n")[1]
    edit = next(module for module in subject.model.modules() if isinstance(module, RegisterEdit))
    assert not edit._forward_hooks and torch.equal(subject.model(pixels), before)


def test_a_model_without_attention_says_so(image):
    subject = look.open_subject("poolformer_s12_gn", (64, 64), untrained=True)
    rows, title = look.sheet_of(subject, look.features_of(subject.model), image, None)
    assert (
        title.endswith("no attention is shown, it has no attention") and all(len(row) == 1 for row in rows) and len(rows) == 5
    )
    assert "(chosen)" in rows[0][0].title


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "'nowhere' is neither a run folder nor a model"),
        (("vit_tiny_patch16_224", "--untrained", "--at", "2,0"), "--at is x,y as shares of width and height"),
        (("vit_tiny_patch16_224", "--untrained", "--checkpoint", "no.pth"), "no.pth"),
        (("vit_tiny_patch16_224", "--untrained", "--which", "student"), "name it with --checkpoint"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_leaves_nothing(image, tmp_path, capsys, arguments, message):
    code, _, err = zoo(capsys, "look", arguments[0], image, *arguments[1:], "--out", tmp_path / "out")
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_place_that_is_none_and_files_of_one_name(image, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["look", "swin_t", str(image), "--out", str(tmp_path / "out"), "--at", "middle"])
    assert "'middle' is not x,y" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").write_bytes(image.read_bytes())
    code, _, err = zoo(capsys, "look", "swin_t", image, tmp_path / "other", *SMALL, "--out", tmp_path / "out")
    assert code == 2 and "would have the same output photo_look.png" in err
    (tmp_path / "taken").write_text("")
    code, _, err = zoo(capsys, "look", "poolformer_s12_gn", image, *SMALL, "--out", tmp_path / "taken")
    assert code == 2 and "cannot write to" in err


def test_features_of_a_dense_model_are_its_own_backbone():
    from heads import DensePredictor

    model = DensePredictor("resnet18", "linear", 3)
    assert look.features_of(model) is model.backbone
    assert look.features_of(timm.create_model("resnet18")).channels == [64, 128, 256, 512]


def test_a_damaged_image_does_not_keep_the_others_from_being_drawn(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a", "c"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(images / f"{name}.png")
    (images / "b.png").write_bytes(b"")
    code, out, err = zoo(capsys, "look", "poolformer_s12", images, "--out", tmp_path / "out", *SMALL)
    assert code == 2 and "1 of 3 images cannot be read: " in err and "b.png" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_look.png", "c_look.png"]


def test_a_run_reads_pixels_for_a_look_as_in_training(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (32, 48)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    made = []
    for name, limits in (("plain", None), ("wide", [0, 4095])):
        data = {"name": "folder", "root": str(tmp_path), "args": {"classes": 6}, "image_range": limits}
        run = saved.run(tmp_path / name, tiny.values(data=data))
        made.append(look.open_subject(str(run), (32, 48)))
    plain, subject = made
    named = look.open_subject("poolformer_s12", (32, 48), untrained=True)
    with pytest.raises(ValueError, match="deep.png: its uint16 pixels .* black and what is white: save it with 8 bits$"):
        named.images([tmp_path / "deep.png"])
    with pytest.raises(ValueError, match="deep.png: its uint16 pixels .* set data.image_range"):
        plain.images([tmp_path / "deep.png"])
    mean, std = (np.array(rows)[:, None, None] for rows in (subject.mean, subject.std))
    pixels = subject.images([tmp_path / "deep.png"])[0].numpy() * std + mean
    assert np.abs(pixels - values / 4095).max() < 0.003  # half of one of 255 levels
