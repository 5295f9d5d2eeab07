"""zoo push: what it writes loads in timm and here, says what it is, and gives away no path of this machine."""

import shutil
from pathlib import Path

import pytest
import timm
import tiny
import torch
import yaml

from heads import DensePredictor
from train import cli, config, engine, results
from train.evaluation import open_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A segmentation and a classification run of one step each."""
    folder = tmp_path_factory.mktemp("push")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "curves", lambda folder: None)
        engine.fit(tiny.make(folder / "masks", optim={"steps": 1, "warmup_steps": 0}))
        labels = {
            "task": {"name": "classification", "num_classes": 10},
            "data": {"name": "digits", "size": [32, 32], "args": {}},
        }
        labels["data"] |= {"eval_batch": 100}
        values = tiny.values(**labels, optim={"steps": 1, "warmup_steps": 0})
        values["data"]["args"] = {}
        values["augment"] = {}
        made = config.resolve(values)
        made.run.dir = str(folder / "labels")
        engine.fit(made)
    return folder


def zoo(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_dense_model_comes_back(capsys, runs, tmp_path):
    code, out, _ = zoo(capsys, "push", runs / "masks", tmp_path / "mine", "--license", "apache-2.0")
    assert code == 0 and f'DensePredictor.from_pretrained("{tmp_path / "mine"}")' in out
    again = DensePredictor.from_pretrained(tmp_path / "mine", device="cpu")
    _, _, model, _ = open_run(runs / "masks")
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    assert again.pipeline.names.classes
    card = (tmp_path / "mine" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    for part in (
        "miou",
        "whole image",
        "zoo train config.yaml",
        "torch",
        "predictions.png",
        "arxiv.org/abs/2204.07143",
        "linear",
    ):
        assert part in card, part


def test_a_classifier_comes_back_in_timm(capsys, runs, tmp_path):
    code, out, _ = zoo(capsys, "push", runs / "labels", tmp_path / "mine")
    assert code == 0 and "local-dir:" in out
    again = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    _, _, model, _ = open_run(runs / "labels")
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    cfg = timm.data.resolve_model_data_config(again)
    assert tuple(cfg["input_size"]) == (3, 32, 32) and len(again.pretrained_cfg["label_names"]) == 10
    assert "not stated" in (tmp_path / "mine" / "README.md").read_text()


class Hub:
    """A stand-in for the hub: repositories are folders."""

    root: Path

    def create_repo(self, name, private=False, exist_ok=False):
        if (self.root / name).exists() and not exist_ok:
            raise RuntimeError(f"409 Conflict: {name} exists\nRequest ID: 1")
        (self.root / name).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


def test_through_a_hub_and_back(capsys, monkeypatch, runs, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install backbone-zoo[hub]")
    monkeypatch.setattr(Hub, "root", tmp_path, raising=False)
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, revision, allow_patterns: str(tmp_path / name))
    code, out, _ = zoo(capsys, "push", runs / "masks", "someone/my-model")
    assert code == 0 and "https://huggingface.co/someone/my-model" in out
    for path in (tmp_path / "someone" / "my-model").iterdir():
        assert str(runs).encode() not in path.read_bytes(), path.name
    assert isinstance(DensePredictor.from_pretrained("someone/my-model", device="cpu"), DensePredictor)
    code, _, err = zoo(capsys, "push", runs / "masks", "someone/my-model")
    assert code == 2 and "the hub refuses someone/my-model: 409 Conflict" in err and "Request ID" not in err
    assert zoo(capsys, "push", runs / "masks", "someone/my-model", "--overwrite")[0] == 0


def test_mistakes_leave_nothing(capsys, runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    for arguments, message in (
        ((tmp_path, tmp_path / "x"), "is not a run folder"),
        ((runs / "masks", tmp_path / "full"), "exists; choose another name"),
        ((runs / "masks", tmp_path / "no" / "x"), "is no folder"),
    ):
        code, out, err = zoo(capsys, "push", *arguments)
        assert code == 2 and message in err and out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    with pytest.raises(FileNotFoundError, match="neither a folder nor user/name"):
        DensePredictor.from_pretrained("./nowhere")
