"""What a weights file is: read from its bytes, refused in one sentence, and never run."""

import datetime
import io
import pathlib
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch

import backbones  # noqa: F401
import weights
from backbones.poolformer import PoolFormer

SMALL = {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8)}


def small(**kwargs) -> PoolFormer:
    return PoolFormer(**SMALL, num_classes=3, **kwargs)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"<!DOCTYPE html><html>no such file", "is a web page, not weights"),
        (b"\n  <html lang=en>", "is a web page, not weights"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "is an HDF5 file"),
        (b"\x1f\x8b" + bytes(60), "is a compressed archive: unpack it"),
        (b"\x93NUMPY" + bytes(60), "is one NumPy array"),
        (b"Not Found: the page has moved somewhere else.", "is a text file, not weights; it begins 'Not Found"),
        (b"", "it is empty, perhaps an incomplete download"),
        (b"PK\x03\x04" + bytes(60), "is not a readable weights file"),
        (bytes(100), "is not a readable weights file"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_weights_file_is_called_what_it_is(start, said, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(start)
    said = said.replace("weights file", "(weights|safetensors) file")
    with pytest.raises(ValueError, match=said) as error:
        weights.load_checkpoint(small(), path)
    assert "execute code" not in str(error.value)
    with pytest.raises(ValueError, match=said):
        timm.create_model("poolformer_s12_gn", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **SMALL)


def test_a_file_is_read_by_its_content_whatever_its_name(tmp_path):
    from safetensors.torch import save_file

    state = small().state_dict()
    save_file(state, tmp_path / "model.pth")
    torch.save(state, tmp_path / "model.safetensors")
    for name in ("model.pth", "model.safetensors"):
        assert weights.open_checkpoint(tmp_path / name).keys() == state.keys()


class Config:
    """A class that is not there when the file is read."""

    def __init__(self, **values):
        self.__dict__.update(values)


def foreign_settings(state: dict) -> dict:
    """What training programs save beside their weights."""
    return {
        "model": state,
        "args": Config(lr=np.float32(0.1), out=pathlib.Path("runs"), when=datetime.datetime(2024, 1, 1)),
        "best": np.float64(81.2),
        "history": np.arange(3),
        "kind": np.dtype("float32"),
        "device": torch.device("cpu"),
        "callbacks": {Config: Config(parts=[Config(), {1, 2}])},
        "order": OrderedDict(a=1),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_settings_are_passed_over_without_importing_their_classes(zipped, tmp_path, monkeypatch):
    state = small().state_dict()
    torch.save(foreign_settings(state), tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(globals(), "Config")
    report = weights.load_checkpoint(model := small(), tmp_path / "file.pth")
    assert report.choice == "model" and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_module_that_was_pickled_whole_gives_its_tensors(tmp_path):
    torch.save({"epoch": 1, "model": (source := small())}, tmp_path / "file.pth")
    weights.load_checkpoint(model := small(), tmp_path / "file.pth")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


class Call:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", ["os.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "runpy.run_path"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(function, zipped, tmp_path):
    import importlib

    module, _, name = function.rpartition(".")
    marker = tmp_path / "ran"
    call = Call(getattr(importlib.import_module(module), name), f"open({str(marker)!r}, 'w')")
    file = tmp_path / "file.pth"
    torch.save({"model": small().state_dict(), "x": call}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="would execute code from the file .*the key of the weights"):
        weights.load_checkpoint(small(), file)
    assert not marker.exists()


def test_what_a_stand_in_gave_is_not_called(tmp_path):
    """getattr is passed over as a value, as mmengine's files need; calling its result is refused."""
    torch.save(
        {"model": small().state_dict(), "x": Call(pathlib.Path.touch, pathlib.Path(tmp_path / "ran"))}, tmp_path / "f.pth"
    )
    with pytest.raises(ValueError, match="would execute code"):
        weights.load_checkpoint(small(), tmp_path / "f.pth")
    assert not (tmp_path / "ran").exists()


def test_tensors_that_are_no_plain_numbers_are_refused():
    state = small().state_dict()
    name = "stages.0.blocks.0.mlp.fc1.weight"
    for value, said in (
        (state[name].flatten(1).to_sparse(), "holds a sparse tensor, stages.0"),
        (state[name].to("meta"), "without numbers"),
        (state[name].to(torch.complex64), "complex64, the model needs torch.float32"),
        (state[name].bool(), "torch.bool, the model needs"),
        (torch.quantize_per_tensor(state[name], 0.1, 0, torch.qint8), "holds a quantized tensor"),
    ):
        model = small()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=said):
            weights.load_checkpoint(model, state | {name: value})
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = weights.load_checkpoint(small(), state | {name: torch.full_like(state[name], torch.nan)})
    assert report.warnings == [f"NaN or infinite numbers in 1: {'stages.*.blocks.*.mlp.fc1.weight'}"]
    assert "warning: NaN" in str(report)


def test_a_small_file_that_asks_for_much_memory_is_refused(tmp_path):
    state = small().state_dict()
    state["head.fc.weight"] = torch.zeros(1).expand(10**12, 8)
    torch.save(state, tmp_path / "wide.pth")
    for call in (
        lambda: weights.load_checkpoint(small(), tmp_path / "wide.pth"),
        lambda: weights.convert_file("poolformer_s12_gn", tmp_path / "wide.pth", tmp_path / "out.safetensors", **SMALL),
    ):
        with pytest.raises(ValueError, match="asks for 32000.0 GB and the file stores"):
            call()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
        with bomb.open("archive/data/99", "w") as entry:
            for _ in range(300):
                entry.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="is refused: its .* bytes would unpack to"):
        weights.load_checkpoint(small(), tmp_path / "bomb.pth")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "poolformer_s12", "convnext_atto"])
def test_an_error_inside_timms_filter_is_one_sentence(name):
    model = timm.create_model(name, features_only=True) if name.startswith("convnext") else timm.create_model(name)
    with pytest.raises(ValueError):
        weights.load_checkpoint(model, {"layer.0.weight": torch.ones(3), "stages.0.0.gamma": torch.ones(2)})
