"""The zoo command: what it prints, and one sentence with exit code 2 for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

import backbones
from train import cli, engine, results


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "curves", lambda folder: None)
        patch.setattr(results, "pictures", lambda *args: None)
        engine.fit(tiny.make(folder, optim={"steps": 1, "warmup_steps": 0}))
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save(folder / "photo.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def zoo(capsys, *arguments):
    """(exit code, standard output, standard error) of one command."""
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "quikstart"), "did you mean 'quickstart'"),
        (("train", "quickstart", "--optim.lrr=1"), "did you mean 'lr'"),
        (("config", "quickstart", "--model.backbone=nat_minii"), "did you mean 'nat_mini'"),
        (("info", "nat_minii"), "did you mean 'nat_mini'"),
        (("eval", "nowhere"), "nowhere is not a run folder"),
        (("predict", "nowhere", "images", "--out", "x"), "nowhere is not a run folder"),
        (("export", "nat_minii", "x.onnx"), "neither a run folder nor a model; did you mean 'nat_mini'"),
        (("convert", "nat_mini", "nowhere.pth", "out.safetensors"), "nowhere.pth"),
    ],
)
def test_a_mistake_is_one_sentence_without_a_traceback(capsys, arguments, message):
    code, out, err = zoo(capsys, *arguments)
    assert code == 2 and message in err and "Traceback" not in err and out == ""
    assert err.startswith(f"zoo {arguments[0]}: ")


def test_debug_shows_where_an_error_came_from(capsys):
    with pytest.raises(FileNotFoundError):
        zoo(capsys, "train", "quikstart", "--debug")


@pytest.mark.parametrize("arguments", [("train", "quickstart", "--nonsense"), ("list", "--optim.lr=1"), ("trian", "x")])
def test_unknown_arguments_end_the_program(arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2


def test_an_error_inside_a_loader_worker_is_cut_to_its_sentence():
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
    assert cli.sentence(ValueError(text + "ValueError: a.png: not a readable image")) == "a.png: not a readable image"


def test_overrides_may_have_a_space():
    parser = cli.build_parser()
    assert cli.overrides(parser, ["--optim.lr", "1e-4", "--data.size=[3, 4]"], True) == [
        "--optim.lr=1e-4",
        "--data.size=[3, 4]",
    ]


def test_config_prints_what_runs(capsys):
    code, out, _ = zoo(capsys, "config", "quickstart", "--optim.lr=1e-4")
    assert code == 0 and yaml.safe_load(out)["optim"]["lr"] == 1e-4


def test_list_filters_by_name_and_licence(capsys):
    _, out, _ = zoo(capsys, "list", "nat_*")
    assert "nat_mini" in out and "swin_t" not in out
    _, out, _ = zoo(capsys, "list", "--license", "mit")
    assert "nat_mini" in out and "poolformer" not in out
    _, out, _ = zoo(capsys, "list", "--configs", "imagenet/nat_t")
    assert out.split()[:5] == ["configuration", "published", "measured", "hardware", "source"]
    assert "imagenet/nat_tiny" in out and "83.2 top-1" in out and "arXiv 2204.07143" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nat_minii",), "no model matches 'nat_minii'; did you mean 'nat_mini'"),
        (("nope*",), "no model matches 'nope*'"),
        (("--license", "mti"), "no weights under the licence 'mti'; did you mean 'mit'"),
        (("--configs", "quikstart"), "no configuration matches 'quikstart'; did you mean 'quickstart'"),
        (("poolformer*", "--license", "mit"), "no model has all of that"),
    ],
)
def test_a_list_of_nothing_says_what_is_near_and_fails(capsys, arguments, message):
    code, out, err = zoo(capsys, "list", *arguments)
    assert code == 1 and message in err and out == ""


def test_a_misspelt_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["lsit"])
    assert stop.value.code == 2 and "unknown command 'lsit'; did you mean 'list'" in capsys.readouterr().err


def test_the_help_of_train_shows_keys_and_one_usage(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert out.count("usage:") == 1 and "--optim.lr" in out


@pytest.mark.parametrize("name", ["heads.py", "weights.py", "configs/__init__.py"])
def test_a_file_of_the_users_in_place_of_a_package_is_named(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    root = Path(cli.__file__).resolve().parents[1]
    places = [str(tmp_path), str(root)]
    code = f"import sys; sys.path[:0] = {places}; from train.cli import main; sys.exit(main(['list']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    place = str(path)
    assert done.returncode == 2 and f"is imported from {place}" in done.stderr and "Traceback" not in done.stderr


def test_importing_backbones_names_a_file_of_the_users_in_place_of_weights(tmp_path):
    (tmp_path / "weights.py").write_text("")
    root = Path(cli.__file__).resolve().parents[1]
    code = f"import sys; sys.path[:0] = {[str(tmp_path), str(root)]}; import backbones"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert "ImportError: backbones needs the package weights beside it" in last and str(tmp_path / "weights.py") in last


def test_without_the_training_packages_a_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    code, _, err = zoo(capsys, "list", "nat_*")
    assert code == 2 and "pip install 'backbone-zoo[train]'" in err


def test_info_counts_what_the_paper_states(capsys):
    _, out, _ = zoo(capsys, "info", "nat_mini")
    assert "parameters (M): 19.98" in out  # the paper: 20 M parameters, 2.7 GMACs
    assert 2.65 < float(re.search(r"GMACs at 224x224: (\S+)", out)[1]) < 2.75
    assert "64 channels, stride 4, 56x56" in out and "license: mit" in out


def test_eval_prints_metrics_and_protocol(capsys, run_folder):
    code, out, _ = zoo(capsys, "eval", run_folder)
    values = yaml.safe_load(out)
    assert code == 0 and 0 <= values["miou"] <= 1 and values["samples"] == 7 and "6 classes" in values["protocol"]
    _, out, _ = zoo(capsys, "eval", run_folder, "--data.args.val_count=3")
    assert yaml.safe_load(out)["samples"] == 3


def test_predict_writes_maps_of_the_images_size_and_replaces_nothing(capsys, run_folder, images, tmp_path):
    out_folder = tmp_path / "out"
    code, out, _ = zoo(capsys, "predict", run_folder, images, "--out", out_folder)
    assert code == 0 and "notes.txt: not an image" in out
    ids = Image.open(out_folder / "photo_classes.png")
    assert ids.size == (50, 40) and ids.mode == "P" and np.asarray(ids).max() < 6
    overlay = Image.open(out_folder / "photo_overlay.png")
    assert overlay.width >= 50 and overlay.height > 40  # the photograph, and a legend below
    code, _, err = zoo(capsys, "predict", run_folder, images, "--out", out_folder)
    assert code == 2 and "photo_classes.png exists" in err
    assert zoo(capsys, "predict", run_folder, images, "--out", out_folder, "--overwrite")[0] == 0


def test_predict_turns_a_photograph_upright(capsys, run_folder, tmp_path):
    """EXIF orientation 6: stored lying, 50 wide and 40 high, shown as 40 x 50."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    stored.save(tmp_path / "lying.png", exif=exif)
    stored.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    for name in ("lying", "upright"):
        assert zoo(capsys, "predict", run_folder, tmp_path / f"{name}.png", "--out", tmp_path / "out")[0] == 0
    lying, upright = (np.asarray(Image.open(tmp_path / "out" / f"{name}_classes.png")) for name in ("lying", "upright"))
    assert lying.shape == (50, 40) and (lying == upright).all()


def test_predict_names_an_image_it_cannot_read(capsys, run_folder, images, tmp_path):
    (images / "broken.png").write_bytes(b"\x89PNG no more")
    code, _, err = zoo(capsys, "predict", run_folder, images, "--out", tmp_path / "out")
    assert code == 2 and "broken.png: not a readable image" in err
    (tmp_path / "empty").mkdir()
    code, _, err = zoo(capsys, "predict", run_folder, tmp_path / "empty", "--out", tmp_path / "out")
    assert code == 2 and "holds no image" in err


def test_predict_does_the_rest_of_a_damaged_folder_and_completes_it_later(capsys, run_folder, tmp_path):
    images, out = tmp_path / "in", tmp_path / "out"
    (images / "deep" / "er").mkdir(parents=True)
    (images / ".ipynb_checkpoints").mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    for name in ("a.png", "deep/er/a.png", "deep/b.png", ".ipynb_checkpoints/c.png"):
        picture.save(images / name)
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    code, text, err = zoo(capsys, "predict", run_folder, images, "--out", out)
    assert code == 2 and "broken.jpg: not a readable image" in err and "1 cannot be read" in text and "hidden" in text
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    names = ("a", "deep/b", "deep/er/a")
    assert files == sorted(f"{name}_{kind}.png" for name in names for kind in ("classes", "overlay"))
    before = (out / "a_classes.png").stat().st_mtime_ns
    (out / "deep" / "b_overlay.png").unlink()
    picture.save(images / "broken.jpg")
    code, text, _ = zoo(capsys, "predict", run_folder, images, "--out", out)
    assert code == 0 and "4 images, 2 were there already: 4 files written" in text
    assert (out / "broken_classes.png").is_file() and (out / "a_classes.png").stat().st_mtime_ns == before
    code, _, err = zoo(capsys, "predict", run_folder, images, "--out", out, "--weights", "last.safetensors")
    assert code == 2 and "exists, made by other weights or settings" in err


def test_predict_says_the_limit_of_a_large_image(capsys, run_folder, images, tmp_path):
    args = ("predict", run_folder, images, "--out", tmp_path / "out", "--data.max_pixels=1999")
    code, _, err = zoo(capsys, *args)
    assert code == 2 and "40x50 are 2000 pixels, more than data.max_pixels=1999" in err


def test_the_version_is_the_packages_own(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"backbone-zoo {backbones.__version__} (torch {torch.__version__}, timm ")
    pyproject = (Path(backbones.__file__).parent.parent / "pyproject.toml").read_text()
    assert 'version = {attr = "backbones.__version__"}' in pyproject


@pytest.mark.parametrize(
    "arguments", [("list", "nat_mini"), ("list", "quickstart*", "--configs"), ("info", "nat_mini", "--size", 64, 64)]
)
def test_json_is_all_that_is_printed(capsys, arguments):
    code, out, _ = zoo(capsys, *arguments, "--json")
    found = json.loads(out)
    assert code == 0 and ("nat_mini" in str(found) or "quickstart" in str(found))


def test_json_of_an_evaluation_and_of_the_machine(capsys, run_folder, monkeypatch):
    code, out, _ = zoo(capsys, "eval", run_folder, "--json")
    assert code == 0 and 0 <= json.loads(out)["miou"] <= 1
    from train import doctor

    monkeypatch.setattr(doctor, "examine", lambda *args: [{"backend": "tiled", "runs": "yes"}])
    code, out, _ = zoo(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["system"]["torch"] == torch.__version__ and found["attention"][0]["backends"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(capsys, monkeypatch, shell):
    pytest.importorskip("shtab", reason="needs shtab: pip install backbone-zoo[complete]")
    code, out, _ = zoo(capsys, "completion", shell)
    assert code == 0 and "predict" in out and "--overwrite" in out and "--dynamic" in out


def test_completion_without_its_package_names_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, _, err = zoo(capsys, "completion", "bash")
    assert code == 2 and 'pip install "backbone-zoo[complete]"' in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("info", "nat_mini", "--size", "-3", "7"), "--size: '-3' is not a whole number of 1 to 32768"),
        (("export", "nat_mini", "x.onnx", "--size", "0", "9"), "--size: '0' is not"),
        (("look", "nat_mini", "x.png", "--out", "y", "--size", "64", "1000000"), "--size: '1000000' is not"),
        (("analyze", "nat_mini", "x.png", "--out", "y", "--batch", "0"), "--batch: '0' is not a whole number from 1 on"),
        (("explain", "nat_mini", "x.png", "--out", "y", "--start", "-1"), "--start: '-1' is not a whole number from 0 on"),
        (("explain", "nat_mini", "x.png", "--out", "y", "--pixel", "3", "x"), "--pixel: 'x' is not a whole number from 0 on"),
        (("demo", "--port", "99999"), "--port: '99999' is not a whole number of 0 to 65535"),
        (("bench", "nat_mini", "--rounds", "0"), "--rounds: '0' is not a whole number from 1 on"),
    ],
)
def test_numbers_of_flags_are_in_their_range(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_info_of_a_model_bound_to_a_size(capsys):
    assert cli.main(["info", "vit_tiny_patch16_224", "--size", "64", "96"]) == 0
    assert "GMACs at 64x96: 0." in capsys.readouterr().out
    assert cli.main(["info", "levit_128s", "--size", "64", "96"]) in (0, 2)
    assert cli.main(["info", "mixer_s32_224", "--size", "100", "100"]) in (0, 2)
    assert cli.main(["info", "resnet10t", "--size", "64", "96"]) == 0
    assert cli.main(["info", "vgg11", "--size", "8", "8"]) == 2
    assert "vgg11 cannot take images of 8 x 8: " in capsys.readouterr().err
