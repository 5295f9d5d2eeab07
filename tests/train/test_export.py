"""zoo export and zoo predict FILE.onnx: the file is the model, says what it needs, and is there whole or not at all."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import tiny
import torch
from PIL import Image

from train import cli, engine, results
from train.evaluation import open_run
from train.export import export


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "curves", lambda folder: None)
        patch.setattr(results, "pictures", lambda *args: None)
        engine.fit(tiny.make(folder, optim={"steps": 1, "warmup_steps": 0}))
    return folder


@pytest.fixture(scope="module")
def program(run_folder, tmp_path_factory):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"ONNX export needs {package}: pip install backbone-zoo[export]")
    path = tmp_path_factory.mktemp("program") / "model.onnx"
    assert cli.main(["export", str(run_folder), str(path), "--dynamic", "batch,hw"]) == 0
    return path


def zoo(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_onnx_file_takes_any_size_and_says_what_it_needs(run_folder, program):
    import onnxruntime

    config, _, model, names = open_run(run_folder)
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["backbone_zoo"])
    assert about["mean"] == list(config.data.mean) and about["size"] == list(config.data.size)
    assert about["names"]["classes"] == names.classes and about["task"] == config.task
    for size in [(1, 3, 57, 90), (3, 3, 101, 66)]:
        image = torch.randn(size)
        (out,) = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(out), model(image), rtol=0, atol=1e-4)


def test_predict_with_the_file_is_predict_with_the_run(capsys, run_folder, program, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    for source, out in ((run_folder, "a"), (program, "b")):
        assert zoo(capsys, "predict", source, tmp_path / "photo.png", "--out", tmp_path / out)[0] == 0
    ours, theirs = (np.asarray(Image.open(tmp_path / out / "photo_classes.png")) for out in "ab")
    assert (ours == theirs).mean() > 0.999  # a pixel on the edge of two classes may fall to either
    code, _, err = zoo(capsys, "predict", program, tmp_path / "photo.png", "--out", tmp_path / "c", "--infer.flip=true")
    assert code == 2 and "is a program" in err


def test_the_script_of_the_documentation_runs_without_torch(capsys, program, tmp_path):
    """As printed, in a process that cannot import torch, timm or the zoo; it finds what zoo predict finds."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    script = re.search(r"<!-- segment.py -->\n```python\n(.*?)```", page, re.DOTALL)[1]
    assert script.count("\n") < 40
    (tmp_path / "segment.py").write_text(script)
    barred = "".join(f"sys.modules[{name!r}] = None\n" for name in ("torch", "timm", "train", "backbones"))
    (tmp_path / "bare.py").write_text(f"import runpy, sys\n{barred}sys.argv.pop(0)\nrunpy.run_path('segment.py')\n")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)).resize((70, 50))
    photo.save(tmp_path / "photo.png")
    command = [sys.executable, "bare.py", "segment.py", str(program), "photo.png", "mask.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shares = [int(line.rpartition(": ")[2].rstrip("%")) for line in done.stdout.splitlines()]
    assert 97 <= sum(shares) <= 103
    assert zoo(capsys, "predict", program, tmp_path / "photo.png", "--out", tmp_path / "out")[0] == 0
    ours, theirs = (np.asarray(Image.open(tmp_path / name)) for name in ("mask.png", "out/photo_classes.png"))
    assert ours.shape == (50, 70) and (ours == theirs).mean() > 0.9  # predict resizes scores, the script classes


def test_other_onnx_files_are_refused_in_a_sentence(capsys, program, tmp_path):
    import onnx

    (tmp_path / "photo.png").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("no program")
    foreign = onnx.load(program)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    for name, reason in (
        ("text.onnx", "is no ONNX file that onnxruntime reads"),
        ("foreign.onnx", "was not made by zoo export"),
        ("absent.onnx", "no file"),
    ):
        code, _, err = zoo(capsys, "predict", tmp_path / name, tmp_path / "photo.png", "--out", tmp_path / "out")
        assert code == 2 and reason in err and len(err.splitlines()) == 1


def test_torch_export_and_safetensors(capsys, run_folder, tmp_path):
    code, out, _ = zoo(capsys, "export", run_folder, tmp_path / "model.pt2", "--half")
    assert code == 0 and json.loads(out)["largest difference"] < 2e-2
    code, out, _ = zoo(capsys, "export", run_folder, tmp_path / "model.safetensors", "--half")
    _, _, model, _ = open_run(run_folder)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert "size" in json.loads(file.metadata()["backbone_zoo"])
        name = next(iter(dict(model.named_parameters())))
        assert torch.equal(file.get_tensor(name), model.state_dict()[name].half())


def test_mistakes_are_sentences_and_leave_nothing(capsys, run_folder, tmp_path):
    there = tmp_path / "there.pt2"
    there.write_text("")
    for arguments, message in (
        ((run_folder, tmp_path / "model.tflite"), "export to .onnx, .pt2, .safetensors"),
        ((run_folder, tmp_path / "model.pt2", "--to", "onnx"), "--to onnx writes .onnx files"),
        ((run_folder, tmp_path / "model.pt2", "--opset", 18), "--opset belongs to onnx"),
        ((run_folder, tmp_path / "model.pt2", "--dynamic", "width"), "--dynamic width"),
        ((run_folder, there), "exists; choose another name"),
        ((run_folder, tmp_path / "no" / "model.pt2"), "is no folder"),
        (("nat_minii", tmp_path / "model.pt2"), "did you mean 'nat_mini'"),
    ):
        code, out, err = zoo(capsys, "export", *arguments)
        assert code == 2 and message in err and out == ""
    assert list(tmp_path.iterdir()) == [there]


def test_a_program_with_other_numbers_gets_no_name(monkeypatch, tmp_path):
    model = torch.nn.Conv2d(3, 2, 1)
    loaded = torch.export.load
    monkeypatch.setattr(
        torch.export, "load", lambda path: torch.export.export(torch.nn.Conv2d(3, 2, 1), (torch.ones(3, 3, 8, 8),))
    )
    with pytest.raises(ValueError, match="gives other numbers than the model in torch on images of 8x8"):
        export(model, tmp_path / "model.pt2", (8, 8))
    assert loaded is not torch.export.load and list(tmp_path.iterdir()) == []
