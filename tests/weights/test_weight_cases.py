"""Weights files that users brought: each case's file, with the values that are right."""

import json
import runpy
import sys
import tarfile
import zipfile

import golden
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

import backbones  # noqa: F401
import weights
from heads import DensePredictor, MultiPredictor
from train import cli

SMALL = {"embed_dim": 32, "depths": (1, 1, 1, 1)}


def make(case: str, path, monkeypatch) -> None:
    """Run a case's make.py."""
    monkeypatch.setattr(sys, "argv", ["make.py", str(path)])
    runpy.run_path(str(golden.case(case) / "make.py"))


@pytest.mark.parametrize("case", ["breaker_int_keys_pth"])
def test_a_file_without_names(case, tmp_path, monkeypatch):
    make(case, tmp_path / "int.pth", monkeypatch)
    for model in (timm.create_model("nat_mini", **SMALL), timm.create_model("resnet18")):
        with pytest.raises(ValueError, match="holds no named weights: its tensors stand under 1"):
            weights.load_checkpoint(model, tmp_path / "int.pth")


@pytest.mark.parametrize("case", ["checkpoint_encoder_prefix", "checkpoint_model_state_dict"])
def test_weights_under_another_programs_names(case, tmp_path, monkeypatch):
    make(case, tmp_path / "file.pth", monkeypatch)
    expected = json.loads((golden.case(case) / "case.json").read_text())["expected"]
    model = timm.create_model("nat_mini", **SMALL)
    report = weights.load_checkpoint(model, tmp_path / "file.pth")
    assert (len(report.loaded), len(report.missing)) == (expected["loaded"], expected["missing"]) and not report.others
    torch.manual_seed(0)
    source = timm.create_model("nat_mini", **SMALL).state_dict()
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("case", ["checkpoint_lfs_pointer"])
def test_a_pointer_is_called_a_pointer(case):
    with pytest.raises(ValueError, match=r"a Git LFS pointer \(134 bytes of text\), not weights: fetch the real") as error:
        weights.open_checkpoint(golden.case(case) / "model.pth")
    assert "code" not in str(error.value)


@pytest.mark.parametrize("case", ["finetune_aux_head_other_classes"])
def test_every_layer_that_counts_classes_may_differ(case):
    def make(classes: int) -> DensePredictor:
        return DensePredictor("nat_mini", "linear", classes, backbone_args=dict(SMALL), aux_head="fcn")

    source, model = make(150).state_dict(), make(19)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="other shapes"):
        weights.load_checkpoint(model, source)
    report = weights.load_checkpoint(model, source, strict=False)
    assert set(report.dropped) > {"aux_head.conv_seg.weight", "aux_head.conv_seg.bias"}
    assert {name.split(".")[0] for name in report.dropped} == {"head", "aux_head"} and not report.untouched
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in report.dropped else source[name]), name

    def several(classes: int) -> MultiPredictor:
        heads = {"mask": ("linear", classes, {}), "parts": ("fcn", classes + 1, {}), "depth": ("linear", 1, {})}
        return MultiPredictor("nat_mini", heads, backbone_args=dict(SMALL))

    report = weights.load_checkpoint(several(19), several(150).state_dict(), strict=False)
    assert {name.split(".")[1] for name in report.dropped} == {"mask", "parts"} and not report.untouched


def test_every_head_that_fits_is_loaded_though_another_is_missing():
    plain = DensePredictor("nat_mini", "linear", 5, backbone_args=dict(SMALL))
    model = DensePredictor("nat_mini", "linear", 5, backbone_args=dict(SMALL), aux_head="fcn")
    with pytest.raises(ValueError, match="lacks weights of this predictor, .*aux_head.*strict=False"):
        weights.load_checkpoint(model, plain.state_dict())
    report = weights.load_checkpoint(model, plain.state_dict(), strict=False)
    assert report.untouched and all(name.startswith("aux_head.") for name in report.untouched)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("case", ["finetune_vit_other_image_size"])
def test_a_timm_backbone_inside_a_predictor_is_resampled(case):
    def make(size) -> DensePredictor:
        return DensePredictor("vit_tiny_patch16_224", "linear", 5, backbone_args={"depth": 2}, img_size=size)

    source, model = make(64).state_dict(), make((96, 128))
    report = weights.load_checkpoint(model, source, strict=False)
    name = "backbone.model.pos_embed"
    assert report.resized == {name: ((1, 17, 192), (1, 49, 192))}
    own = model.state_dict()
    torch.testing.assert_close(own[name], resample_abs_pos_embed(source[name], (6, 8), (4, 4)))
    assert all(torch.equal(own[other], value) for other, value in source.items() if other != name)


def test_a_timm_swin_inside_a_predictor_keeps_its_names_and_resizes_its_tables():
    """timm's filter takes a model without its classifier for one of an old release, and would move its down-sampling."""

    def make(window: int) -> DensePredictor:
        args = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": window}
        return DensePredictor("swin_tiny_patch4_window7_224", "linear", 3, backbone_args=args)

    source, same, other = make(4).state_dict(), make(4), make(7)
    assert not weights.load_checkpoint(same, source).resized
    assert all(torch.equal(value, source[name]) for name, value in same.state_dict().items())
    report = weights.load_checkpoint(other, source)
    assert report.resized and all(name.endswith("relative_position_bias_table") for name in report.resized)
    for name, value in source.items():
        assert name in report.resized or torch.equal(other.state_dict()[name], value), name


# Wrappers and prefixes


@pytest.mark.parametrize("name", ["net", "network", "params", "params_ema", "weights", "ema_state_dict", "teacher", "student"])
def test_any_single_mapping_is_found(name):
    source = timm.create_model("nat_mini", **SMALL).state_dict()
    report = weights.load_checkpoint(model := timm.create_model("nat_mini", **SMALL), {name: source, "epoch": 3})
    assert report.choice == name and not report.others
    assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["net.", "teacher.backbone.", "student.backbone.", "base_model.model.", "module.encoder_q."])
def test_any_common_prefix_is_taken_off(prefix):
    source = timm.create_model("nat_mini", **SMALL).state_dict()
    file = {prefix + name: value for name, value in source.items()} | {"projector.weight": torch.ones(3)}
    report = weights.load_checkpoint(model := timm.create_model("nat_mini", **SMALL), file)
    assert prefix in report.choice and "projector.weight" in report.unexpected
    assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())


def test_of_several_that_fit_the_average_is_taken_and_an_argument_chooses():
    first, second, third = (timm.create_model("nat_mini", **SMALL).state_dict() for _ in range(3))
    content = {
        "student": {f"backbone.{k}": v for k, v in first.items()},
        "teacher": {f"backbone.{k}": v for k, v in second.items()},
    }
    model = timm.create_model("nat_mini", **SMALL)
    report = weights.load_checkpoint(model, content)
    assert report.choice == "teacher backbone.*" and report.others == ["student backbone.*"]
    assert "chosen: teacher backbone.*; which='...' takes another: student backbone.*" in str(report)
    assert torch.equal(model.state_dict()["patch_embed.proj.0.weight"], second["patch_embed.proj.0.weight"])
    weights.load_checkpoint(model, content, which="student")
    assert torch.equal(model.state_dict()["patch_embed.proj.0.weight"], first["patch_embed.proj.0.weight"])
    flat = {f"momentum.{k}": v for k, v in first.items()} | {f"ema.{k}": v for k, v in third.items()}
    assert weights.load_checkpoint(model, flat).choice == "ema.*"
    with pytest.raises(ValueError, match="no weights in a place with 'generator' in it; the file has 'student', 'teacher'"):
        weights.load_checkpoint(model, content, which="generator")


def test_convert_takes_the_weights_that_which_names(tmp_path, capsys):
    first, second = (timm.create_model("nat_mini", **SMALL).state_dict() for _ in range(2))
    torch.save({"model": first, "model_ema": second}, file := tmp_path / "both.pth")
    args = "{embed_dim: 32, depths: [1, 1, 1, 1]}"
    for which, expected in ((None, second), ("model_ema", second), ("model", first)):
        written = tmp_path / f"{which}.safetensors"
        flags = [] if which is None else ["--which", which]
        assert cli.main(["convert", "nat_mini", str(file), str(written), "--args", args, *flags]) == 0
        assert torch.equal(load_file(written)["patch_embed.proj.0.weight"], expected["patch_embed.proj.0.weight"]), which
        assert ("which=" in capsys.readouterr().out) == (which is None)
    assert cli.main(["convert", "nat_mini", str(file), str(tmp_path / "x.safetensors"), "--which", "swa"]) == 2
    assert "no weights in a place with 'swa' in it; the file has 'model', 'model_ema'" in capsys.readouterr().err
    wide = args.replace("32", "64")
    assert cli.main(["convert", "nat_mini", str(file), str(tmp_path / "x.safetensors"), "--args", wide]) == 2
    assert f"{file} has other shapes than the model" in capsys.readouterr().err


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_wrappers_around_single_blocks_are_taken_out_of_the_names(wrapper):
    source = timm.create_model("nat_mini", **SMALL).state_dict()
    for outer in ("", "module.", f"{wrapper}."):
        file = {outer + name.replace(".blocks.0.", f".blocks.0.{wrapper}."): value for name, value in source.items()}
        assert file.keys() != {outer + name for name in source}
        weights.load_checkpoint(model := timm.create_model("nat_mini", **SMALL), file)
        assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())


def test_numpy_arrays_in_a_file_are_its_weights(tmp_path):
    source = timm.create_model("nat_mini", **SMALL).state_dict()
    found = {name: value.numpy() for name, value in source.items()}
    rest = {"objects": np.array([{}, None]), "text": np.array(["a", "bc"]), "none": np.zeros(0), "epoch": np.float32(3)}
    for zipped in (True, False):
        torch.save({"model": found, "rest": rest}, tmp_path / "f.pth", _use_new_zipfile_serialization=zipped)
        weights.load_checkpoint(model := timm.create_model("nat_mini", **SMALL), tmp_path / "f.pth")
        assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())


def test_weights_in_a_list_or_tuple_are_found(tmp_path):
    source = timm.create_model("nat_mini", **SMALL).state_dict()
    for content, choice in (((source, 3), "0"), ({"models": [source]}, "models.0"), ([3, {"net": source}], "1.net")):
        torch.save(content, tmp_path / "f.pth")
        report = weights.load_checkpoint(model := timm.create_model("nat_mini", **SMALL), tmp_path / "f.pth")
        assert report.choice == choice
        assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())
    torch.save([torch.zeros(3)], tmp_path / "f.pth")
    with pytest.raises(ValueError, match="holds a list, not a dictionary of weights"):
        weights.load_checkpoint(model, tmp_path / "f.pth")


def test_archives_and_folders_are_named_as_what_they_are(tmp_path):
    torch.save(timm.create_model("nat_mini", **SMALL).state_dict(), tmp_path / "in.pth")
    with tarfile.open(tmp_path / "t.pth.tar", "w") as archive:
        archive.add(tmp_path / "in.pth", "in.pth")
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as archive:
        archive.write(tmp_path / "in.pth", "in.pth")
    for path, words in (
        (tmp_path / "t.pth.tar", "is a tar archive: unpack it, and load the file inside"),
        (tmp_path / "z.pth", "is a zip archive that torch.save did not write: unpack it"),
        (tmp_path, "is a folder: name the weights file in it, in.pth or z.pth"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            weights.open_checkpoint(path)
        assert "weights_only" not in str(error.value)
    (tmp_path / "short.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="perhaps an incomplete download: it ends too early"):
        weights.open_checkpoint(tmp_path / "short.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "torch.tar")  # torch's own files may have any name
    assert weights.open_checkpoint(tmp_path / "torch.tar").keys() == {"a"}
