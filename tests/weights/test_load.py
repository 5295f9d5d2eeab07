"""Loading checkpoints: every wrapping, every refusal, and what the report says."""

import argparse
import pathlib
import sys
import types

import numpy as np
import pytest
import timm
import torch

import backbones  # noqa: F401
import weights
from backbones.nat import NAT
from backbones.poolformer import PoolFormer
from heads import DensePredictor
from weights.convert import poolformer as convert

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


def small(num_classes: int = 5, **kwargs) -> PoolFormer:
    return PoolFormer(**SMALL, num_classes=num_classes, **kwargs)


def official(**kwargs) -> dict[str, torch.Tensor]:
    """A classification checkpoint as the authors' code writes it."""
    model = small(**kwargs)
    return convert.to_official(model.state_dict(), model)


def dense_file() -> dict:
    """A segmentation checkpoint: backbone with norms of its maps, and heads beside it."""
    state = {f"backbone.{key}": value for key, value in official(num_classes=0, feature_norms=True).items()}
    state = {key: value for key, value in state.items() if not key.startswith(("backbone.norm.", "backbone.head."))}
    return {"state_dict": state | {"decode_head.conv_seg.weight": torch.ones(3, 4, 1, 1)}, "meta": {"epoch": 3}}


def same(model: torch.nn.Module, state: dict[str, torch.Tensor], skip: tuple[str, ...] = ()) -> bool:
    """Whether the model holds the values of an official state dict, but for names that start with `skip`."""
    own = convert.to_official(model.state_dict(), model)
    return all(torch.equal(own[key], value) for key, value in state.items() if not key.startswith(skip))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 7, "optimizer": {"state": {}}},
        lambda s: {"state_dict": s},
        lambda s: {"state_dict_ema": s, "state_dict": {key: value * 0 for key, value in s.items()}},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {f"module.{key}": value for key, value in s.items()},
        lambda s: {"state_dict": {f"module.backbone.{key}": value for key, value in s.items()}},
        lambda s: {"model": {f"_orig_mod.{key}": value for key, value in s.items()}},
    ],
    ids=["bare", "model", "state_dict", "ema", "nested", "ddp", "ddp_backbone", "compiled"],
)
@pytest.mark.parametrize("suffix", [".pth", ".tar", ".bin", None])
def test_wrappings_are_taken_off(wrap, suffix, tmp_path):
    state, model = official(), small()
    source = wrap(state)
    if suffix:
        torch.save(source, tmp_path / f"file{suffix}")
        source = tmp_path / f"file{suffix}"
    report = weights.load_checkpoint(model, source)
    assert same(model, state)
    assert report.format == "official"
    assert len(report.loaded) == len(state) and not report.missing and not report.unexpected


def test_averaged_weights_are_preferred_and_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    state, model = official(), small()
    save_file(state, tmp_path / "file.safetensors")
    weights.load_checkpoint(model, tmp_path / "file.safetensors")
    assert same(model, state)
    weights.load_checkpoint(model, {"model": official(), "model_ema": state})
    assert same(model, state)


def test_native_names_pass_unchanged_and_twice():
    source, model = small(), small()
    once = weights.convert_state_dict(source.state_dict(), model)
    assert once.keys() == source.state_dict().keys()
    twice = weights.convert_state_dict(weights.convert_state_dict(official(), model), model)
    assert twice.keys() == once.keys()
    assert weights.load_checkpoint(model, source.state_dict()).format == "native"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("lost", ["network.2.0.mlp.fc1.weight", "patch_embed.proj.bias", "norm.weight"])
def test_a_file_that_lacks_a_weight_is_refused(lost, strict):
    state = official()
    state.pop(lost)
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"holds \d+ of the \d+ tensors .* absent are 1: "):
        weights.load_checkpoint(model, state, strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_half_a_file_is_refused_as_pretrained_weights_whatever_the_classes(tmp_path):
    state = {key: value for key, value in official().items() if not key.startswith("network.4.")}
    torch.save(state, tmp_path / "half.pth")
    for num_classes in (5, 3, 0):
        with pytest.raises(ValueError, match="absent are"):
            timm.create_model(
                "poolformer_s12_gn",
                pretrained=True,
                pretrained_cfg_overlay={"file": str(tmp_path / "half.pth"), "num_classes": 5},
                num_classes=num_classes,
                **SMALL,
            )


def test_another_models_file_is_refused():
    with pytest.raises(ValueError, match="does not fit this model"):
        weights.load_checkpoint(small(), {"conv1.weight": torch.ones(3), "fc.bias": torch.ones(3)})
    wide = PoolFormer(depths=SMALL["depths"], dims=(8, 16, 24, 48), num_classes=5)
    with pytest.raises(ValueError, match=r"other shapes than the model: .*\[32.* for the model's \[48"):
        weights.load_checkpoint(wide, official(), strict=False)


def test_other_input_channels_are_refused_with_the_way_to_load_them():
    with pytest.raises(ValueError, match="pretrained_cfg_overlay"):
        weights.load_checkpoint(small(in_chans=1), official())


def test_a_classifier_of_another_size_is_an_error_or_dropped_when_asked():
    state, model = official(num_classes=5), small(num_classes=3)
    with pytest.raises(ValueError, match=r"head.fc.weight \[5, 32\] for the model's \[3, 32\]"):
        weights.load_checkpoint(model, state)
    kept = model.head.fc.weight.clone()
    report = weights.load_checkpoint(model, state, strict=False)
    assert report.dropped == {"head.fc.weight": ((5, 32), (3, 32)), "head.fc.bias": ((5,), (3,))}
    assert torch.equal(model.head.fc.weight, kept) and same(model, state, skip=("head.",))
    assert "dropped: head.fc.weight [5, 32] -> [3, 32]" in str(report)


def test_a_model_without_classifier_leaves_the_files_out():
    report = weights.load_checkpoint(small(num_classes=0), official(num_classes=5))
    assert report.unexpected == ["head.fc.weight", "head.fc.bias"]


def test_a_file_without_classifier_needs_strict_false():
    state = official(num_classes=0)
    with pytest.raises(ValueError, match="it has no classifier: build with"):
        weights.load_checkpoint(small(), state)
    assert weights.load_checkpoint(small(), state, strict=False).missing == ["head.fc.weight", "head.fc.bias"]
    weights.load_checkpoint(small(num_classes=0), state)


def test_unknown_names_of_the_backbone_are_an_error_unless_asked():
    state = official() | {"network.0.0.extra": torch.ones(1)}
    with pytest.raises(ValueError, match="weights that the model lacks, 1: "):
        weights.load_checkpoint(small(), state)
    assert len(weights.load_checkpoint(small(), state, strict=False).unexpected) == 1


def test_dense_files_fill_a_feature_model_and_name_their_heads():
    create = {"features_only": True, "feature_norms": True, **SMALL}
    model = timm.create_model("poolformer_s12_gn", **create)
    source = dense_file()
    report = weights.load_checkpoint(model, source)
    assert report.format == "official-dense"
    assert report.unexpected == ["decode_head.conv_seg.weight"]
    assert len(report.loaded) == len(model.state_dict())
    norm = source["state_dict"]["backbone.norm4.weight"]
    assert model.model.feature_norms["2"].weight is not norm and torch.equal(model.model.feature_norms["2"].weight, norm)
    assert "decode_head.conv_seg.weight" in str(report)


def test_dense_files_in_a_classifier_need_strict_false_and_norms_a_place():
    with pytest.raises(ValueError, match="build with features_only=True"):
        weights.load_checkpoint(small(feature_norms=True), dense_file())
    report = weights.load_checkpoint(small(feature_norms=True), dense_file(), strict=False)
    assert report.missing == ["norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"]
    with pytest.raises(ValueError, match="feature_norms=True"):
        model = small(num_classes=0)
        model.norm = torch.nn.Identity()
        weights.load_checkpoint(model, dense_file())


def test_feature_norms_that_a_classification_file_lacks_stay_as_they_are():
    model = small(feature_norms=True)
    report = weights.load_checkpoint(model, official())
    assert report.missing == [f"feature_norms.{i}.{name}" for i in range(4) for name in ("weight", "bias")]
    assert torch.equal(model.feature_norms["0"].weight, torch.ones(8))


def test_a_dense_predictor_takes_a_backbone_file_or_its_own():
    args = {"backbone": "poolformer_s12_gn", "head": "linear", "out_channels": 2, "backbone_args": SMALL}
    model, state = DensePredictor(**args), official()
    report = weights.load_checkpoint(model, state)
    inner = weights.convert.backbone(model)
    assert torch.equal(inner.patch_embed.weight, state["patch_embed.proj.weight"])
    assert report.untouched and all(name.startswith("head.") for name in report.untouched)
    other = DensePredictor(**args)
    whole = weights.load_checkpoint(other, {"model": {f"module.{key}": v for key, v in model.state_dict().items()}})
    assert whole.format == "native" and not whole.untouched
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    again = weights.load_checkpoint(
        small(num_classes=0),
        model.state_dict() | {"backbone.model.norm.weight": torch.ones(32), "backbone.model.norm.bias": torch.ones(32)},
    )
    assert len(again.loaded) > 40 and any(name.startswith("head.") for name in again.unexpected)


def test_models_on_the_meta_device_get_the_tensors_themselves():
    with torch.device("meta"):
        model = small()
    state = official()
    weights.load_checkpoint(model, state)
    assert not any(value.is_meta for value in model.state_dict().values()) and same(model, state)


def test_resized_tables_are_reported():
    build = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "mlp_ratio": 2, "num_classes": 3}
    state = NAT(**build, kernel_size=3).state_dict()
    report = weights.load_checkpoint(NAT(**build, kernel_size=5), state)
    assert report.resized["stages.0.blocks.0.attn.rpb"] == ((1, 5, 5), (1, 9, 9))
    assert "resized: stages.0.blocks.0.attn.rpb [1, 5, 5] -> [1, 9, 9]" in str(report)
    assert not weights.load_checkpoint(NAT(**build, kernel_size=3), state).resized


class Evil:
    """Pickles to a call that writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def test_a_file_that_would_execute_code_is_refused_and_executes_nothing(tmp_path):
    torch.save({"model": official(), "config": Evil(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"would execute code from the file .*If you trust .*torch\.save"):
        weights.load_checkpoint(small(), tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="would execute code"):
        timm.create_model(
            "poolformer_s12_gn", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "evil.pth")}, **SMALL
        )
    assert not (tmp_path / "executed").exists()


def test_settings_saved_beside_the_weights_are_passed_over(tmp_path, monkeypatch):
    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")

    class CfgNode(dict):
        def __init__(self, values):
            super().__init__(values)
            self.__dict__["immutable"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    config.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", yacs)
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    state = official()
    content = {"model": state, "config": CfgNode({"DATA": CfgNode({"SIZE": 224})}), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "lit.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    model = small()
    weights.load_checkpoint(model, tmp_path / "lit.pth")
    assert same(model, state)
    overlay = {"file": str(tmp_path / "lit.pth")}
    built = timm.create_model("poolformer_s12_gn", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **SMALL)
    assert same(built, state, skip=("head.",))


def test_unreadable_files_say_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        weights.load_checkpoint(small(), tmp_path / "absent.pth")
    np.savez(tmp_path / "file.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=".npz files are not read"):
        weights.load_checkpoint(small(), tmp_path / "file.npz")
    torch.save(official(), tmp_path / "whole.pth")
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / "whole.pth").read_bytes()[:2000])
        with pytest.raises(ValueError, match="not a readable"):
            weights.load_checkpoint(small(), tmp_path / name)
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable"):
        weights.load_checkpoint(small(), tmp_path / "empty.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not a dictionary"):
        weights.load_checkpoint(small(), tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        weights.load_checkpoint(small(), {"epoch": 3})


@pytest.mark.parametrize("naming", ["native", "official"])
def test_convert_file_writes_what_the_file_holds(naming, tmp_path):
    from safetensors import safe_open

    state = official(num_classes=7)
    torch.save({"model": state}, tmp_path / "in.pth")
    report = weights.convert_file("poolformer_s12_gn", tmp_path / "in.pth", tmp_path / "out.safetensors", naming, **SMALL)
    assert len(report.loaded) == len(state)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        header = file.metadata()
    assert {"format": "pt", "source": "in.pth", "source_format": "official", "naming": naming}.items() <= header.items()
    assert header["torch"] == torch.__version__ and header["timm"] == timm.__version__ and "zoo" in header
    if naming == "official":
        got = weights.open_checkpoint(tmp_path / "out.safetensors")
        assert got.keys() == state.keys() and all(torch.equal(got[key], state[key]) for key in state)
    model = small(num_classes=7)
    weights.load_checkpoint(model, tmp_path / "out.safetensors")
    assert same(model, state)


def test_convert_file_keeps_the_norms_of_dense_files_and_names_the_heads(tmp_path):
    torch.save(dense_file(), tmp_path / "in.pth")
    report = weights.convert_file("poolformer_s12_gn", tmp_path / "in.pth", tmp_path / "out.safetensors", **SMALL)
    assert report.unexpected == ["decode_head.conv_seg.weight"]
    got = weights.open_checkpoint(tmp_path / "out.safetensors")
    assert torch.equal(got["feature_norms.0.weight"], dense_file()["state_dict"]["backbone.norm0.weight"])
    assert not any(key.startswith(("norm.", "head.")) for key in got)


def test_convert_file_refuses_other_namings_and_formats(tmp_path):
    torch.save(official(), tmp_path / "in.pth")
    with pytest.raises(ValueError, match="'native' or 'official'"):
        weights.convert_file("poolformer_s12_gn", tmp_path / "in.pth", tmp_path / "out.safetensors", "theirs", **SMALL)
    with pytest.raises(ValueError, match="written as .safetensors"):
        weights.convert_file("poolformer_s12_gn", tmp_path / "in.pth", tmp_path / "out.pth", **SMALL)


def test_timms_models_load_through_timms_own_filter():
    model = timm.create_model("vit_small_patch14_reg4_dinov2", embed_dim=24, depth=1, num_heads=2, img_size=28)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    meta = {"register_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, 24)}
    meta["pos_embed"] = torch.cat([torch.ones(1, 1, 24), state.pop("pos_embed")], 1)
    report = weights.load_checkpoint(model, state | meta)
    assert len(report.loaded) == len(model.state_dict())
