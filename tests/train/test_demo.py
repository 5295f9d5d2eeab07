"""`zoo demo`: what the page answers, and the page in a browser."""

import builtins
import importlib.util
import shutil
import socket

import numpy as np
import pytest
import saved
import tiny
from PIL import Image

from train import cli, demo

CHROMIUM = shutil.which("chromium", path="/usr/lib/chromium:/usr/bin") or shutil.which("chromium")
has = importlib.util.find_spec
needs_gradio = pytest.mark.skipif(has("gradio") is None, reason="needs Gradio: pip install 'backbone-zoo[demo]'")
needs_browser = pytest.mark.skipif(
    has("playwright") is None or CHROMIUM is None, reason="needs Playwright and Chromium: pip install playwright"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs and a photograph."""
    folder = tmp_path_factory.mktemp("demo")
    saved.run(folder / "mask", tiny.values(), ["sky", "ground", "box", "ball", "cone", "wall"])
    saved.run(folder / "depth", tiny.values() | {"task": {"name": "depth", "max_depth": 12.0}})
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    photo.save(folder / "photo.png")
    photo.resize((450, 300)).save(folder / "large.png")  # large enough to be clicked on
    return folder


def test_a_run_answers_with_its_prediction_and_what_its_backbone_sees(folder):
    found = demo.answer(folder / "photo.png", str(folder / "mask"), at=(0.1, 0.9))
    assert found.picture.shape[0] > 60 and found.sheet.shape[0] > 600 and found.note == "mask, probabilities at 60x90"
    other = demo.answer(folder / "photo.png", str(folder / "depth"))
    assert other.note == "depth at 60x90" and not np.array_equal(other.picture, found.picture)


def test_a_model_by_name_answers_with_classes_or_a_head_that_says_it_is_random(folder):
    name = "test_vit"
    found = demo.answer(folder / "photo.png", name, untrained=True)
    assert len(found.labels) == 5 and found.picture is None and "tench" not in found.note
    assert sum(found.labels.values()) <= 1 and all(not label.startswith("class ") for label in found.labels)
    headed = demo.answer(folder / "photo.png", name, "linear", untrained=True)
    assert "random weights" in headed.note and headed.picture is not None and not headed.labels


@pytest.mark.parametrize(
    ("source", "head", "message"),
    [
        ("", demo.OWN, "name a run folder or a model"),
        ("swin_tt", demo.OWN, "did you mean 'swin_t'"),
        ("test_vit", "liner", "did you mean 'linear'"),
    ],
)
def test_a_wrong_choice_is_one_sentence(folder, source, head, message):
    with pytest.raises(ValueError, match=message):
        demo.answer(folder / "photo.png", source, head, untrained=True)


def test_runs_are_found_newest_first(folder):
    found = demo.find_runs(folder)
    assert [name.rpartition("/")[2] for name in found] == ["depth", "mask"] and demo.find_runs(folder / "nowhere") == []


def test_a_missing_package_names_the_line_that_installs_it(capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gradio":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["demo"]) == 2
    assert "pip install 'backbone-zoo[demo]'" in capsys.readouterr().err


@needs_gradio
def test_a_folder_that_is_no_run_and_a_port_that_is_taken_are_named(folder, tmp_path, capsys):
    assert cli.main(["demo", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["demo", str(folder / "mask"), "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 cannot be used: choose another --port" in capsys.readouterr().err


@needs_gradio
@needs_browser
@pytest.mark.slow
def test_an_image_dropped_in_a_browser_changes_the_picture(folder, tmp_path):
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = demo.demo([str(folder / "mask"), str(folder / "depth")], port=port, wait=False)
    changed = "([id, src]) => document.querySelector(id + ' img') && document.querySelector(id + ' img').src !== src"
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 1500})
            page.set_default_timeout(120_000)
            faults = []
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}")
            page.set_input_files("#photo input[type=file]", folder / "large.png")
            page.wait_for_selector("#picture img")
            page.wait_for_selector("#sheet img")
            assert page.input_value("#note textarea") == "mask, probabilities at 300x450"
            before = page.get_attribute("#picture img", "src")
            page.fill("#source input", str(folder / "depth"))
            page.keyboard.press("Enter")
            page.click("#show")
            page.wait_for_function(changed, arg=["#picture", before])
            assert page.input_value("#note textarea") == "depth at 300x450"
            before = page.get_attribute("#sheet img", "src")
            page.click("#photo img", position={"x": 90, "y": 90})  # another place
            page.wait_for_function(changed, arg=["#sheet", before])
            page.fill("#source input", "swin_tt")
            page.keyboard.press("Enter")
            page.click("#show")
            page.get_by_text("did you mean 'swin_t'").wait_for()
            assert faults == []
            browser.close()
    finally:
        served.close()
