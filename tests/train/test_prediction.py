"""Photographs in any form into a run's model, and what comes out."""

import builtins
import copy
import importlib.util

import numpy as np
import pytest
import saved
import tiny
import torch
from PIL import Image

from heads import DensePredictor, MultiPredictor, RunModel
from heads.matrix import NARROW
from train import cli
from train.data.files import read_ids
from train.prediction import Prediction

HAS_AV = importlib.util.find_spec("av") is not None
needs_av = pytest.mark.skipif(not HAS_AV, reason="needs PyAV: pip install 'backbone-zoo[video]'")
PIXELS = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
CLASSES = ["sky", "ground", "box", "ball", "cone", "wall"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EVERY_QUERY = {"score": 0.0, "overlap": 0.0}
TASKS = {
    "mask": ({"name": "segmentation", "num_classes": 6}, CLASSES),
    "depth": ({"name": "depth", "max_depth": 12.0}, None),
    "relative": (
        {"name": "depth", "max_depth": 12.0, "metric": False, "inverse": True, "rule": "softplus", "align": "affine"},
        None,
    ),
    "both": ({"name": "multitask", "parts": {"segmentation": {"num_classes": 6}, "depth": {"max_depth": 12.0}}}, CLASSES),
    "panoptic": (
        {"name": "panoptic", "num_classes": 6, "things": [2, 3, 4, 5], "merge": {"score": 0.0, "overlap": 0.0}},
        CLASSES,
    ),
    "label": ({"name": "classification", "num_classes": 10}, DIGITS),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (task, classes) in TASKS.items():
        values = tiny.values(data={"size": [48, 64]}) | {"task": task}
        if name == "panoptic":
            values["model"] |= {"head": "mask2former", "head_args": NARROW["mask2former"]}
        if name == "label":
            del values["model"]["head"], values["augment"]
            values["data"] = {"name": "digits", "size": [32, 32]}
        saved.run(folder / name, values, classes)
    return folder


def zoo(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def same(a, b):
    return torch.equal(a.mask, b.mask)


def test_every_form_of_a_photograph_gives_the_same_prediction(runs, tmp_path):
    model = DensePredictor.from_run(runs / "mask")
    Image.fromarray(PIXELS).save(tmp_path / "photo.png")
    expected = model.predict(tmp_path / "photo.png")
    assert expected.size == (60, 90) == tuple(expected.mask.shape) and expected.mask.dtype == torch.int64
    assert np.array_equal(expected.image, PIXELS) and len(expected.mask.unique()) > 1
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    forms = [Image.open(tmp_path / "photo.png"), PIXELS, tensor, tensor / 255, (PIXELS / 255).astype(np.float32)]
    found = model.predict([str(tmp_path / "photo.png"), *forms])
    assert len(found) == 6 and all(same(one, expected) for one in found)
    assert found[0].path.endswith("photo.png") and found[2].path == "image_2"


def test_a_prediction_is_the_models_on_the_image_as_the_run_normalised_it(runs):
    model = DensePredictor.from_run(runs / "mask")
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert list(model.pipeline.config.data.mean) == pytest.approx(mean)
    image = torch.from_numpy(PIXELS).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(image, (48, 64), mode="bilinear", antialias=True, align_corners=False)
    normal = (small.round() / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    with torch.no_grad():
        scores = torch.nn.functional.interpolate(model(normal), (60, 90), mode="bilinear", align_corners=False)
    found = model.predict(PIXELS)
    assert (found.probabilities - scores.softmax(1)[0]).abs().max() < 0.01  # of pixels rounded once more or less
    assert torch.equal(found.probabilities.argmax(0), found.mask)
    assert torch.allclose(found.probabilities.sum(0), torch.ones(60, 90))


def test_a_model_of_grey_images_takes_colours_and_frames(tmp_path):
    run = saved.run(tmp_path / "grey", tiny.values(model={"in_chans": 1}, data={"mean": [0.5], "std": [0.2]}))
    model = DensePredictor.from_run(run)
    assert same(model.predict(PIXELS), model.predict(Image.fromarray(PIXELS).convert("L")))


def test_windows_and_flips_of_the_run_reach_the_prediction(runs):
    model = DensePredictor.from_run(
        runs / "mask", overrides=["--infer.mode=slide", "--infer.window=[32,32]", "--infer.flip=true"]
    )
    found = model.predict(PIXELS)
    assert torch.allclose(found.probabilities.sum(0), torch.ones(60, 90), atol=1e-5)
    assert torch.equal(found.probabilities.argmax(0), found.mask)
    assert not torch.allclose(found.probabilities, DensePredictor.from_run(runs / "mask").predict(PIXELS).probabilities)


def test_a_phones_photograph_is_upright(runs, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "lying.png", exif=exif)
    model = DensePredictor.from_run(runs / "mask")
    by_path, opened = model.predict([tmp_path / "lying.png", Image.open(tmp_path / "lying.png")])
    assert by_path.size == opened.size == (90, 60) and same(by_path, opened)


@pytest.mark.parametrize(
    ("photo", "message"),
    [
        ("nowhere.png", "nowhere.png: no such file"),
        (PIXELS[None], "shape \\(1, 60, 90, 3\\): give images one by one"),
        (torch.randn(3, 60, 90), "that nothing normalised"),
        (torch.from_numpy(PIXELS), "as C H W: an array is H W C, a tensor C H W"),
        (torch.full((3, 8, 8), float("nan")), "that nothing normalised"),
        (PIXELS[..., :2], "2 channels"),
        ([], "the list is empty"),
        (7, "is a int: give a path"),
    ],
    ids=["no file", "batch", "normalised", "channels last", "nan", "two channels", "nothing", "number"],
)
def test_what_is_no_photograph_is_refused(runs, photo, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        DensePredictor.from_run(runs / "mask").predict(photo)


def test_a_model_without_a_run_says_so():
    model = DensePredictor("resnet18", "linear", 3)
    with pytest.raises(ValueError, match="open a run with from_run"):
        model.predict(PIXELS)


def test_opening_a_run_without_the_training_packages_names_the_extra(runs, monkeypatch):
    from heads import runs as opening

    monkeypatch.setattr(opening, "OPENER", ("train_is_not_there", "x"))
    with pytest.raises(ImportError, match=r"pip install 'backbone-zoo\[train\]'"):
        DensePredictor.from_run(runs / "mask")


def test_a_run_in_training_is_evaluated_and_goes_on_training(runs):
    model = DensePredictor.from_run(runs / "mask")
    expected = model.predict(PIXELS)
    model.train()
    assert same(model.predict(PIXELS), expected) and model.training and model.backbone.training
    assert same(copy.deepcopy(model).predict(PIXELS), expected)


def test_depth_is_metres_and_what_has_no_scale_is_not_called_depth(runs):
    found = DensePredictor.from_run(runs / "depth").predict(PIXELS)
    assert (
        found.depth.shape == (60, 90)
        and found.depth.dtype == torch.float32
        and 0 < found.depth.min() <= found.depth.max() <= 12
    )
    with pytest.raises(AttributeError, match="has no 'mask'; it has depth"):
        _ = found.mask
    relative = DensePredictor.from_run(runs / "relative").predict(PIXELS)
    assert not hasattr(relative, "depth") and relative.inverse_depth.shape == (60, 90)
    assert relative.overlay().size[1] > 60


def test_labels_come_best_first(runs):
    model = DensePredictor.from_run(runs / "label")
    assert isinstance(model, RunModel)
    found = model.predict(PIXELS)
    best = found.top(3)
    assert [name for name, _ in best] == [DIGITS[i] for i in found.probabilities.topk(3).indices]
    assert best[0][1] >= best[1][1] > 0 and len(found.top(50)) == 10
    with pytest.raises(AttributeError, match="top"):
        DensePredictor.from_run(runs / "mask").predict(PIXELS).top()


def test_segments_come_with_their_classes(runs):
    found = DensePredictor.from_run(runs / "panoptic").predict(PIXELS)
    assert found.panoptic.shape == (60, 90) and set((found.panoptic[found.panoptic >= 0] // 1000).tolist()) <= set(range(6))
    assert found.fields() == ["panoptic"] and found.overlay().height > 60 and found.overlay(legend=False).size == (90, 60)


def test_several_tasks_come_together(runs):
    model = DensePredictor.from_run(runs / "both")
    assert isinstance(model, MultiPredictor)
    found = model.predict(PIXELS)
    assert found.mask.shape == found.depth.shape == (60, 90) and found.probabilities.shape == (6, 60, 90)
    assert found.overlay(legend=False).size == (180, 60)


@pytest.mark.parametrize("kind", TASKS)
def test_saved_files_are_those_of_the_command_and_none_is_replaced(runs, kind, tmp_path, capsys):
    Image.fromarray(PIXELS).save(tmp_path / "photo.png")
    assert zoo(capsys, "predict", runs / kind, tmp_path / "photo.png", "--out", tmp_path / "out")[0] == 0
    found = DensePredictor.from_run(runs / kind).predict(tmp_path / "photo.png")
    (tmp_path / "own").mkdir()
    files = found.save(tmp_path / "own")
    written = {path.name for path in (tmp_path / "out").iterdir()} - {"predict.json"}
    assert {path.name for path in files} == written and all(path.is_file() for path in files)
    for path in files:
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    with pytest.raises(FileExistsError, match="choose another name"):
        found.save(tmp_path / "own" / "photo")
    assert found.save(tmp_path / "own", overwrite=True) == files


def test_classes_have_colours_in_any_viewer_and_stay_ids(runs, tmp_path):
    found = DensePredictor.from_run(runs / "mask").predict(PIXELS)
    raw, _ = found.save(tmp_path / "x")
    picture = Image.open(raw)
    assert picture.mode == "P" and np.array_equal(read_ids(raw), found.mask.numpy())
    colors = np.asarray(picture.convert("RGB"))
    assert all((colors[found.mask == i] == found.names.palette[i]).all() for i in found.mask.unique())


def test_the_overlay_keeps_the_photographs_pixels_and_has_a_legend_of_what_occurs(runs):
    found = DensePredictor.from_run(runs / "mask").predict(PIXELS)
    plain, whole = np.asarray(found.overlay(legend=False)), np.asarray(found.overlay())
    assert plain.shape == (60, 90, 3) and np.array_equal(whole[:60, :90], plain) and whole.shape[0] > 60
    strip = {tuple(color) for color in whole[60:].reshape(-1, 3)}
    for i, color in enumerate(found.names.palette):
        assert (tuple(color) in strip) == (i in found.mask), found.names.classes[i]


def test_the_scale_of_depth_spans_the_middle_of_its_values(runs):
    values = torch.full((1, 1, 300, 400), 2.0)
    values[..., 200:] = 4.0
    values[0, 0, 0, 0] = 11.0  # one far pixel
    pipeline = DensePredictor.from_run(runs / "depth").pipeline
    drawn = pipeline.show.picture(np.zeros((300, 400, 3), np.uint8), values, pipeline.names)
    near, far = drawn[150, 10].astype(int), drawn[150, 390].astype(int)
    bar = drawn[300:].reshape(-1, 3).astype(int)
    assert near.sum() - far.sum() > 400  # the far pixel takes no colours from the rest
    assert min(abs(bar - near).sum(1)) == min(abs(bar - far).sum(1)) == 0  # both ends are on the bar


def test_a_sheet_shows_photograph_and_prediction(runs, tmp_path, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    Image.fromarray(PIXELS).save(tmp_path / "in" / "deep" / "photo.png")
    command = ("predict", runs / "mask", tmp_path / "in", "--out", tmp_path / "out")
    assert zoo(capsys, *command)[0] == 0
    code, text, _ = zoo(capsys, *command, "--sheet")  # completes what is there
    assert code == 0 and "3 files written" in text
    picture = Image.open(tmp_path / "out" / "deep" / "photo_sheet.png")
    assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_an_output_that_cannot_be_written_to_is_named_before_anything_is_predicted(runs, tmp_path, capsys):
    Image.fromarray(PIXELS).save(tmp_path / "photo.png")
    (tmp_path / "taken").write_text("a file")
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        code, _, err = zoo(capsys, "predict", runs / "mask", tmp_path / "photo.png", "--out", out)
        assert code == 2 and err.count("\n") == 1 and f"cannot write to {out}" in err and "choose another --out" in err


def test_a_failed_write_leaves_nothing_behind(runs, tmp_path, monkeypatch):
    found = DensePredictor.from_run(runs / "mask").predict(PIXELS)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.show.masks.overlay", full)
    with pytest.raises(OSError, match="No space left"):
        found.save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_prediction_says_what_it_is(runs):
    found = DensePredictor.from_run(runs / "mask").predict(PIXELS)
    assert repr(found) == "Prediction('image', 60x90, mask, probabilities)" and isinstance(found, Prediction)


# ------------------------------------------------------------------------------------------------------------------- videos


def clip(path, count=6, size=(64, 96)):
    """A short video whose frames become lighter."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for i in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((*size, 3), 6 * i, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


@needs_av
@pytest.mark.parametrize("kind", ["mask", "both", "label"])
def test_a_video_becomes_a_video_of_as_many_frames(runs, kind, tmp_path, capsys):
    from train.video import Video

    source = clip(tmp_path / "clip.mp4")
    code, text, _ = zoo(capsys, "predict", runs / kind, source, "--out", tmp_path / "out")
    assert code == 0 and "1 videos: 1 files written" in text
    made = Video(tmp_path / "out" / "clip_overlay.mp4")
    frames = list(made)
    assert len(frames) == 6 and made.rate == 10
    assert [float(time * unit) for _, time, unit in frames] == pytest.approx([i / 10 for i in range(6)], abs=1e-3)
    assert frames[0][0].shape[1] == (192 if kind == "both" else 96) and frames[0][0].shape[0] >= 64
    code, _, err = zoo(capsys, "predict", runs / kind, source, "--out", tmp_path / "out")
    assert code == 2 and "clip_overlay.mp4 exists" in err


@needs_av
@pytest.mark.parametrize(("matrix", "corner"), [((0, 1, -1, 0), (0, -1)), ((0, -1, 1, 0), (-1, 0)), ((-1, 0, 0, -1), (-1, -1))])
def test_a_phones_video_is_upright(tmp_path, matrix, corner):
    """A light corner at the top left of the stored frames goes where the file's display matrix turns it."""
    import av

    from train.video import Video

    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:32, :32] = 255
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")), *stream.encode()])
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    at = content.index(b"tkhd") + 44  # the matrix a b u, c d v, x y w of the track's header, 16.16 and 2.30 bits
    a, b, c, d = (value << 16 for value in matrix)
    for place, value in enumerate((a, b, 0, c, d, 0)):
        content[at + 4 * place : at + 4 * place + 4] = value.to_bytes(4, "big", signed=True)
    (tmp_path / "turned.mp4").write_bytes(content)
    (found,) = [pixels for pixels, _, _ in Video(tmp_path / "turned.mp4")]
    assert found.shape == ((64, 96, 3) if matrix[0] else (96, 64, 3))
    corners = {(row, column): int(found[row, column].mean()) for row in (0, -1) for column in (0, -1)}
    assert max(corners, key=lambda place: corners[place]) == corner and sorted(corners.values())[2] < 50


@needs_av
def test_a_damaged_video_is_one_sentence_and_leaves_no_file(runs, tmp_path, capsys):
    content = clip(tmp_path / "whole.mp4", 40, (240, 320)).read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "noise.mp4").write_bytes(b"no video at all" * 50)
    (folder / "empty.avi").write_bytes(b"")
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    Image.fromarray(PIXELS).save(folder / "photo.png")
    code, text, err = zoo(capsys, "predict", runs / "mask", folder, "--out", tmp_path / "out")
    assert code == 2 and "3 cannot be read: 2 files written" in text and err.count("\n") == 3
    for name in ("noise.mp4", "empty.avi", "cut.mp4"):
        assert f"skipped {folder / name}: not a readable video (" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "photo_classes.png",
        "photo_overlay.png",
        "predict.json",
    ]


@needs_av
def test_a_video_that_fails_on_the_way_leaves_nothing_behind(tmp_path):
    from train import video

    def fails(frame):
        if frame.mean() > 10:
            raise ValueError("stop")
        return frame

    with pytest.raises(ValueError, match="stop"):
        video.rewrite(video.Video(clip(tmp_path / "clip.mp4")), tmp_path / "out.mp4", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_video_without_its_package_names_the_line_that_installs_it(runs, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "clip.mp4").write_bytes(b"x")
    code, _, err = zoo(capsys, "predict", runs / "mask", tmp_path / "clip.mp4", "--out", tmp_path / "out")
    assert code == 2 and "pip install 'backbone-zoo[video]'" in err and not (tmp_path / "out").exists()


def test_predictions_are_no_images(runs, tmp_path, capsys):
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    for name in ("a.png", "more/b.png"):
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(images / name)
    code, _, err = zoo(capsys, "predict", runs / "mask", images, "--out", images)
    assert code == 2 and f"--out is {images} itself: what is written there would be taken for images" in err
    assert len(list(images.rglob("*.png"))) == 2
    assert zoo(capsys, "predict", runs / "mask", images, "--out", images / "out")[0] == 0
    made = sorted(path.relative_to(images / "out") for path in (images / "out").rglob("*.png"))
    assert len(made) == 4
    assert zoo(capsys, "predict", runs / "mask", images, "--out", images / "out", "--overwrite")[0] == 0
    assert sorted(path.relative_to(images / "out") for path in (images / "out").rglob("*.png")) == made
