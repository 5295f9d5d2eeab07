"""data-check finds what users get wrong: labels off by one, void as a class, millimetres as metres, files that do not fit."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from train.data import DATASETS
from train.data.check import check, refuse, run

GENERATOR = np.random.default_rng(0)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def pairs(root, mask=None, depth=None, count=3, size=(24, 32)):
    """A folder data set whose masks and depth maps are made by functions of (split, number)."""
    for split in ("train", "val"):
        for i in range(count):
            save(root / f"images/{split}/{i}.png", GENERATOR.integers(255, size=(*size, 3)).astype(np.uint8))
            if mask is not None:
                save(root / f"masks/{split}/{i}.png", np.asarray(mask(split, i), np.uint8))
            if depth is not None:
                save(root / f"depths/{split}/{i}.png", np.asarray(depth(split, i), np.uint16))
    return root


def stripes(ids, size=(24, 32)):
    return np.resize(np.repeat(np.asarray(ids, np.uint8), 2), size)


def datasets(root, targets=("mask",), **args):
    return [DATASETS["folder"](root, split, targets, **args) for split in ("train", "val")]


def findings(report, level):
    return [finding.text for finding in report.findings if finding.level == level]


def test_clean_data_are_described_and_pass(tmp_path):
    root = pairs(tmp_path / "d", mask=lambda split, i: stripes([0, 1, 2, 255]))
    report = run(datasets(root, classes=["cat", "dog", "cow"]), out=tmp_path / "out")
    assert report.ok
    assert not report.findings
    text = (tmp_path / "out" / "data_check.txt").read_text()
    assert "train: 3 samples" in text
    assert "24x32" in text
    assert "1 dog" in text
    assert "25.00%" in text
    assert "nothing speaks against training" in text
    content = json.loads((tmp_path / "out" / "data_check.json").read_text())
    assert content["splits"]["train"]["mask_pixels"] == {"0": 576, "1": 576, "2": 576, "255": 576}
    with Image.open(tmp_path / "out" / "data_check.png") as picture:
        assert picture.width > 300


def test_ids_from_one_are_off_by_one(tmp_path):
    report = run(datasets(pairs(tmp_path, mask=lambda split, i: stripes([1, 2, 3])), classes=3))
    assert not report.ok
    errors = findings(report, "error")
    assert any("mask id 3" in text and "outside the 3 classes" in text and "masks/train/0.png" in text for text in errors)
    assert any("off by one" in text for text in errors)


def test_void_as_one_more_class_is_named(tmp_path):
    report = run(datasets(pairs(tmp_path, mask=lambda split, i: stripes([0, 1, 2, 3])), classes=3))
    assert not report.ok
    assert any("id 3, one past the last class, is probably void" in text for text in findings(report, "warning"))


def test_a_missing_first_class_is_suspected(tmp_path):
    report = run(datasets(pairs(tmp_path, mask=lambda split, i: stripes([1, 2, 3])), classes=4))
    assert report.ok
    assert any("id 0 (0 class 0) never occurs" in text for text in findings(report, "warning"))
    assert any("1 of 4 classes never occur" in text for text in findings(report, "note"))


def test_a_foreground_of_255_is_not_void(tmp_path):
    report = run(datasets(pairs(tmp_path, mask=lambda split, i: stripes([0, 255])), classes=2))
    assert any("only 0 and 255" in text for text in findings(report, "error"))


def test_masks_of_void_alone(tmp_path):
    report = run(datasets(pairs(tmp_path / "a", mask=lambda split, i: stripes([255])), classes=2))
    assert any("nothing to learn" in text for text in findings(report, "error"))
    mixed = run(datasets(pairs(tmp_path / "b", mask=lambda split, i: stripes([255] if i else [0, 1])), classes=2))
    assert mixed.ok
    assert any("2 masks have no labelled pixel" in text for text in findings(mixed, "warning"))
    assert any("67% of the pixels are ignored" in text for text in findings(mixed, "warning"))


def test_every_broken_file_is_counted_and_the_first_is_named(tmp_path):
    root = pairs(tmp_path, mask=lambda split, i: stripes([0, 1], size=(24, 31) if i == 1 else (24, 32)))
    (root / "images/train/2.png").write_bytes(b"broken")
    report = run(datasets(root, classes=2))
    (train, val) = (next(text for text in findings(report, "error") if text.startswith(word)) for word in ("cannot", "cannot"))
    assert "1.png" in train
    assert "(and 1 more)" in train
    assert report.facts[1].failures
    assert val


def test_validation_images_that_are_training_images(tmp_path):
    root = pairs(tmp_path, mask=lambda split, i: stripes([0, 1] if split == "train" else [0, 2]))
    (root / "images/val/1.png").write_bytes((root / "images/train/2.png").read_bytes())
    report = run(datasets(root, classes=3))
    warnings = findings(report, "warning")
    assert any("1 of 3 validation images are also training images" in text for text in warnings)
    assert any("1 classes occur in validation and never in training: 2 class 2" in text for text in warnings)


RAMP = np.linspace(800, 9000, 24 * 32).reshape(24, 32)


@pytest.mark.parametrize(
    ("divisor", "words"),
    [(1.0, "millimetres read as metres?; the median would fit with divisor"), (1000.0, None), (500.0, "will be ignored")],
)
def test_millimetres_read_as_metres(tmp_path, divisor, words):
    root = pairs(tmp_path, depth=lambda split, i: RAMP)
    report = run(datasets(root, ("depth",), depth_divisor=divisor))
    assert report.ok == (divisor != 1.0)
    assert words is None or any(words in finding.text for finding in report.findings)
    if divisor == 1.0:
        assert "1000" in findings(report, "error")[0]


def test_metres_read_as_millimetres(tmp_path):
    report = run(datasets(pairs(tmp_path, depth=lambda split, i: RAMP / 1000 + 1), ("depth",)))
    assert any("metres read as millimetres" in text for text in findings(report, "error"))


def test_depth_that_is_missing_constant_or_quantised(tmp_path):
    nothing = run(datasets(pairs(tmp_path / "a", depth=lambda split, i: 0 * RAMP), ("depth",)))
    assert any("not a single reading" in text or "no depth map has" in text for text in findings(nothing, "error"))
    flat = run(datasets(pairs(tmp_path / "b", depth=lambda split, i: 0 * RAMP + 2000), ("depth",)))
    assert any("constant" in text for text in findings(flat, "error"))
    sparse = run(datasets(pairs(tmp_path / "c", depth=lambda split, i: RAMP * (np.arange(32) % 8 == 0)), ("depth",)))
    assert sparse.ok
    assert any("87.5% of the depth pixels have no reading" in text for text in findings(sparse, "note"))
    steps = np.resize(np.arange(10, 200) * 40, (96, 128))
    eight = run(datasets(pairs(tmp_path / "d", depth=lambda split, i: steps, size=(96, 128)), ("depth",)))
    assert any("even steps of 40 mm" in text for text in findings(eight, "note"))
    kinect = np.resize((350_000 / np.arange(100, 300)).astype(int), (96, 128))
    real = run(datasets(pairs(tmp_path / "e", depth=lambda split, i: kinect, size=(96, 128)), ("depth",)))
    assert not any("steps" in text for text in findings(real, "note"))


class Labelled(DATASETS["digits"]):
    """Digits with labels of our choice."""

    shift = 0

    def read(self, index):
        sample = super().read(index)
        return {**sample, "label": int(sample["label"]) + self.shift}


def test_labels_are_counted_and_checked(monkeypatch):
    digits = [Labelled(split, ("label",)) for split in ("train", "val")]
    report = run(digits, count=50)
    assert report.ok
    assert report.facts[0].samples == 1437
    assert report.facts[0].read == 50
    monkeypatch.setattr(Labelled, "shift", 1)
    report = run(digits, count=200)
    assert any("label 10 is outside the 10 classes" in text for text in findings(report, "error"))
    assert any("off by one" in text for text in findings(report, "error"))
    with pytest.raises(ValueError, match="at least 1"):
        run(digits, count=0)


def test_training_is_refused_what_cannot_be_right(tmp_path):
    refuse(datasets(pairs(tmp_path / "good", mask=lambda split, i: stripes([0, 1])), classes=2))
    root = pairs(tmp_path / "bad", depth=lambda split, i: RAMP)
    with pytest.raises(ValueError, match=r"Folder, train: .*millimetres read as metres.*data-check"):
        refuse(datasets(root, ("depth",), depth_divisor=1.0))


def test_a_rare_class_missing_from_the_first_look_is_no_reason_to_refuse(tmp_path):
    """Eight masks of background and void alone: only more of them show that 255 is not the foreground."""
    root = pairs(tmp_path, mask=lambda split, i: stripes([0, 1, 255] if i == 1 else [0, 255]), count=20)
    refuse(datasets(root, classes=2))
    with pytest.raises(ValueError, match="hold only 0 and 255"):
        refuse(datasets(pairs(tmp_path / "all", mask=lambda split, i: stripes([0, 255]), count=20), classes=2))


TRAINING = """
task: TASK
model: {backbone: poolformer_s12_gn, backbone_args: {depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}, head: linear}
data: {name: folder, root: ROOT, size: [32, 32], args: ARGS}
optim: {steps: 1, warmup_steps: 0}
"""
SEGMENT = "{name: segmentation, num_classes: 3}"


@pytest.mark.parametrize(
    ("task", "args", "made", "message"),
    [
        (
            SEGMENT,
            "{classes: 3}",
            {"mask": lambda split, i: stripes([0, 1, 7])},
            "mask id 7 .* is outside the 3 classes: .*0.png",
        ),
        (SEGMENT, "{classes: 3}", {"mask": lambda split, i: stripes([1, 2, 3])}, "mask id 3 .* is outside the 3 classes"),
        (SEGMENT, "{classes: 3}", {"mask": lambda split, i: stripes([255])}, "every pixel is the ignore id 255"),
        ("{name: depth, max_depth: 10}", "{depth_divisor: 1}", {"depth": lambda split, i: RAMP}, "millimetres read as metres"),
        ("{name: depth, max_depth: 10}", "{}", {"depth": lambda split, i: RAMP / 1000 + 1}, "metres read as millimetres"),
    ],
)
def test_zoo_train_refuses_what_cannot_be_right_before_it_makes_a_folder(tmp_path, capsys, task, args, made, message):
    from train import cli

    root = pairs(tmp_path / "data", **made)
    path = tmp_path / "c.yaml"
    path.write_text(TRAINING.replace("TASK", task).replace("ROOT", str(root)).replace("ARGS", args))
    assert cli.main(["train", str(path), f"--run.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    for split in ("train", "val"):  # both have it, and are named in one message
        assert re.search(f"zoo train: 2 mistakes.* Folder, {split}: .*{message}.*zoo data-check", error), error
    assert not (tmp_path / "run").exists()


def test_mistakes_of_both_splits_come_together(tmp_path):
    from train import config, setup

    root = pairs(tmp_path / "ids", mask=lambda split, i: stripes([0, {"train": 5, "val": 7}[split]]))
    with pytest.raises(ValueError, match="2 mistakes") as error:
        refuse(datasets(root, classes=2))
    first, second = error.value.sentences
    assert "Folder, train: mask id 5" in first and "Folder, val: mask id 7" in second
    for split in ("train", "val"):
        (root / f"masks/{split}/1.png").unlink()
    (tmp_path / "c.yaml").write_text(CONFIG.replace("ROOT", str(root)))
    settings = config.load(str(tmp_path / "c.yaml"), [])
    with pytest.raises(ValueError, match="2 mistakes") as error:
        setup.data_sets(settings, config.build_task(settings))
    first, second = error.value.sentences
    assert first.startswith("train: ") and "train/1.png" in first and second.startswith("val: ") and "val/1.png" in second
    settings.data.root = str(tmp_path / "nowhere")
    with pytest.raises((ValueError, FileNotFoundError), match="^Folder: data.root is .*nowhere"):
        setup.data_sets(settings, config.build_task(settings))


def test_the_task_is_asked(tmp_path):
    class Picky:
        def check(self, dataset):
            raise ValueError("wants 7 classes")

    report = run(datasets(pairs(tmp_path, mask=lambda split, i: stripes([0, 1])), classes=2), Picky())
    assert findings(report, "error") == ["does not fit the task: wants 7 classes"] * 2


CONFIG = """
task: {name: segmentation, num_classes: 3}
model: {backbone: nat_mini, head: linear}
data: {name: folder, root: ROOT, size: [32, 32], args: {classes: [cat, dog, cow]}}
optim: {steps: 1}
"""


def test_a_configuration_is_checked_and_the_exit_status_says_so(tmp_path, capsys):
    from train import config

    root = pairs(tmp_path / "d", mask=lambda split, i: stripes([0, 1, 2]))
    (tmp_path / "c.yaml").write_text(CONFIG.replace("ROOT", str(root)))
    settings = config.load(str(tmp_path / "c.yaml"), [])
    task = config.build_task(settings)
    assert check(settings.data, task, count=2, out=tmp_path / "out") == 0
    assert "train: 3 samples, 2 of them looked at" in capsys.readouterr().out
    (root / "masks/val/0.png").write_bytes(b"")
    assert check(settings.data, task) == 1
    assert "ERROR   val: cannot be read" in capsys.readouterr().out
    (root / "masks/val").rename(root / "masks/elsewhere")
    assert check(settings.data, task, out=tmp_path / "half") == 1
    text = capsys.readouterr().out
    assert "ERROR   val: " in text and "train: 3 samples" in text and "nothing speaks against" not in text
    assert '"ok": false' in (tmp_path / "half" / "data_check.json").read_text()
    settings.data.root = str(tmp_path / "nowhere")
    assert check(settings.data, task, out=tmp_path / "none") == 1
    assert f"data.root is {tmp_path}/nowhere, which is not a folder" in capsys.readouterr().out
    assert not (tmp_path / "none" / "data_check.png").exists()


@pytest.mark.parametrize("name", ["scenes", "digits"])
def test_our_own_data_pass(tmp_path, name):
    args = {"size": (24, 32), "count": 4, "val_count": 4} if name == "scenes" else {}
    kind = DATASETS[name]
    report = run([kind(split=split, targets=kind.provides, **args) for split in ("train", "val")], out=tmp_path, count=4)
    assert report.ok, report.lines
    assert (tmp_path / "data_check.png").stat().st_size > 1000
