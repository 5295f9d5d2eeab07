"""`zoo analyze` and `zoo explain`: files, pictures and sentences."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from backbones.analysis.dimension import EffectiveDimension
from backbones.analysis.local import LocalAttention
from train import analyze, cli, config, engine
from train.show.analysis import draw_attention, draw_dimension

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
SMALL = ["vit_tiny_patch16_224", "--untrained", "--size", "48", "64"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five pictures, each in a folder named after a digit."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(5):
        (folder / str(i)).mkdir()
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(i) / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished classification run with a ViT."""
    made = config.resolve(
        tiny.values()
        | {
            "task": {"name": "classification", "num_classes": 10},
            "model": {"backbone": "vit_tiny_patch16_224", "backbone_args": VIT},
            "data": {"name": "digits", "size": [32, 32], "eval_batch": 50},
            "augment": {},
            "optim": {"lr": 1e-3, "steps": 1, "global_batch": 8},
            "run": {"log_every": 1, "eval_every": 1, "device": "cpu"},
        }
    )
    made.run.dir = str(tmp_path_factory.mktemp("runs") / "vit")
    engine.fit(made)
    return made.run.dir


def picture(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_every_analysis_writes_numbers_and_a_picture(images, run, tmp_path, capsys):
    assert cli.main(["analyze", run, str(images), "--out", str(tmp_path / "out"), "--what", *analyze.ANALYSES]) == 0
    content = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert len(content["images"]) == 5 and list(content["models"]) == [run]
    found = content["models"][run]
    assert list(found) == list(analyze.ANALYSES)
    assert len(found["attention"]["distance"]) == len(found["heads"]["importance"]) == len(found["dimension"]["centred"]) == 3
    for name in analyze.ANALYSES:
        pixels = picture(tmp_path / "out" / f"{name}.png")
        assert min(pixels.shape[:2]) > 100 and pixels.std() > 5, name
    assert cli.main(["analyze", run, str(images), "--out", str(tmp_path / "out")]) == 2
    assert "analysis.json exists" in capsys.readouterr().err


def test_models_share_a_picture_and_sizes_may_be_given(images, tmp_path):
    arguments = ["analyze", *SMALL[:1], str(images), *SMALL[1:], "--beside", "vit_small_patch16_dinov3", "--what", "attention"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    models = json.loads((tmp_path / "analysis.json").read_text())["models"]
    assert list(models) == ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"]
    assert all(0 < one["attention"]["uniform_distance"] < 48 for one in models.values())


def test_a_network_with_local_attention_stands_beside_a_flat_one(images, tmp_path):
    beside = ["--beside", "dinat_mini", "--untrained", "--size", "32", "32", "--what", "attention"]
    assert cli.main(["analyze", "vit_tiny_patch16_224", str(images), "--out", str(tmp_path / "out"), *beside]) == 0
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())["models"]["dinat_mini"]["attention"]
    assert len(found["layers"]) == len(found["distance"]) == len(found["uniform_entropy"]) == 18
    assert picture(tmp_path / "out" / "attention.png").std() > 5


def test_an_explanation_names_the_class_and_shows_three_pictures_a_row(images, run, tmp_path):
    assert cli.main(["explain", run, str(images / "3" / "3.png"), "--class", "3", "--out", str(tmp_path)]) == 0
    (fact,) = json.loads((tmp_path / "explain.json").read_text())
    assert fact["class"] == 3 and 0 < fact["probability"] < 1 and fact["grid"] == [4, 4] and len(fact["relevance"]) == 16
    pixels = picture(tmp_path / "explain.png")
    assert pixels.shape[1] > 2 * pixels.shape[0] and pixels.std() > 5


def test_a_pixel_of_a_dense_run_is_explained(images, tmp_path):
    args = {key: value for key, value in VIT.items() if key != "img_size"}
    model = {"backbone": "vit_tiny_patch16_224", "backbone_args": args, "head": "linear"}
    engine.fit(tiny.make(tmp_path / "run", model=model, data={"size": [32, 32]}, optim={"steps": 1, "warmup_steps": 0}))
    options = [str(tmp_path / "run"), str(images / "0" / "0.png"), "--out", str(tmp_path / "out")]
    assert cli.main(["explain", *options]) == 2
    assert cli.main(["explain", *options, "--pixel", "5", "20", "--class", "2"]) == 0
    (fact,) = json.loads((tmp_path / "out" / "explain.json").read_text())
    assert "class" not in fact and len(fact["relevance"]) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "vit_tiny_patch16_225"], "neither a run folder nor a model; did you mean"),
        (["analyze", "resnet18", "--untrained"], "ResNet is not one of timm's"),
        (
            ["analyze", "dinat_mini", "--untrained"],
            "attends in parts of its map, and spectrum, similarity, dimension, activations",
        ),
        (["analyze", *SMALL, "--what", "atention"], "unknown analysis 'atention'; did you mean 'attention'"),
        (["analyze", *SMALL, "--what", "heads"], "has no class names"),
        (["analyze", *SMALL, "--beside", "vit_tiny_patch16_224"], "the same model twice"),
        (["explain", *SMALL, "--class", "4711"], "class 4711 does not exist: the model has classes 0 to 999"),
        (["explain", *SMALL, "--class", "cat"], "has no class 'cat'"),
        (["explain", *SMALL, "--pixel", "1", "2"], "predicts no maps: leave out --pixel"),
        (["explain", *SMALL, "--start", "12"], "start must be a block, 0 to 11, got 12"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_wrong_call_is_one_sentence_and_leaves_nothing(arguments, message, images, tmp_path, capsys):
    command, model, *rest = arguments
    assert cli.main([command, model, str(images), "--out", str(tmp_path / "out"), *rest]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_one_image_is_too_few_for_similarity(images, tmp_path, capsys):
    one = str(images / "0" / "0.png")
    assert cli.main(["analyze", SMALL[0], one, *SMALL[1:], "--what", "similarity", "--out", str(tmp_path / "out")]) == 2
    assert "needs at least 4 in a batch, got 1" in capsys.readouterr().err


def test_images_outside_the_folders_of_classes_have_no_importance(images, run, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    Image.open(images / "0" / "0.png").save(tmp_path / "other" / "0.png")
    assert cli.main(["analyze", run, str(tmp_path / "other"), "--what", "heads", "--out", str(tmp_path / "out")]) == 2
    assert "does not lie in a folder named after a class" in capsys.readouterr().err


def test_logarithmic_axes_have_plain_numbers():
    one = EffectiveDimension(list(range(6)), torch.linspace(4.3, 8.0, 6), torch.linspace(4.5, 9.4, 6), 192, 10)
    figure = draw_dimension({"model": one})
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels(which="both")]
    assert [text for text in labels if text and low <= float(text) <= high] == ["5", "7"]


@pytest.mark.parametrize("command", ["analyze", "explain"])
def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_computed(command, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyze, "open_subject", lambda *args: pytest.fail("a model is opened"))
    (tmp_path / "taken").write_text("")
    assert cli.main([command, SMALL[0], str(images), *SMALL[1:], "--out", str(tmp_path / "taken" / "out")]) == 2
    said = capsys.readouterr().err
    assert "taken" in said and "is a file" in said and said.count("\n") == 1


def test_all_models_are_looked_at_before_the_first_is_analysed(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(analyze.ANALYSES, "attention", lambda *args: pytest.fail("an analysis runs"))
    arguments = [SMALL[0], str(images), *SMALL[1:], "--beside", "vit_tiny_patch16_225", "--what", "attention"]
    assert cli.main(["analyze", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert "did you mean" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_picture_of_local_attention_has_no_empty_panel_and_whole_blocks():
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])]
    one = LocalAttention(["a", "b"], rows, rows, [1.5, 2.5], [1.0, 1.0], 4)
    figure = draw_attention({"model": one})
    figure.canvas.draw()
    assert [axis.get_title() for axis in figure.axes] == ["distance (dotted: uniform)", "entropy (dotted: uniform)"]
    assert all(float(tick).is_integer() for axis in figure.axes for tick in axis.get_xticks())
