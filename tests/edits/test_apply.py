"""The table of edits and how a list of them is applied."""

import inspect

import pytest
import timm
import torch

import backbones  # noqa: F401  (registers our models with timm)
from backbones import edits
from backbones.registers import add_test_time_registers

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}


def vit(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **TINY | kwargs).eval()


def test_edits_are_applied_by_name_with_their_arguments():
    model = edits.apply(vit(), [{"name": "test_time_registers", "neurons": {1: [3]}, "num_registers": 2}])
    by_hand = add_test_time_registers(vit(), {1: [3]}, num_registers=2)
    assert model.num_prefix_tokens == 3
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), by_hand(x)) and not torch.equal(model(x), vit()(x))


def test_edits_are_applied_in_the_given_order(monkeypatch):
    done = []
    for name in ("first", "second"):
        monkeypatch.setitem(edits.EDITS, name, lambda model, name=name: done.append(name) or model)
    edits.apply(vit(), [{"name": "second"}, {"name": "first"}])
    assert done == ["second", "first"]


def test_no_edit_leaves_the_same_object():
    model = vit()
    assert edits.apply(model, []) is model


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"neurons": {}}, "edit 0 has no name"),
        ({"name": "test_time_register"}, "did you mean 'test_time_registers'"),
        ({"name": "test_time_registers", "neuron": {}}, "no argument 'neuron': did you mean 'neurons'"),
    ],
    ids=["no name", "unknown name", "unknown argument"],
)
def test_a_wrong_entry_is_refused_before_anything_is_changed(entry, message):
    model = vit()
    with pytest.raises(ValueError, match=message):
        edits.apply(model, [{"name": "test_time_registers"}, entry] if "neurons" not in entry else [entry])
    assert model.num_prefix_tokens == 1


@pytest.mark.parametrize("name", sorted(edits.EDITS))
def test_every_edit_takes_plain_values_that_a_config_can_hold(name):
    signature = inspect.signature(edits.EDITS[name])
    first, *rest = signature.parameters.values()
    assert first.name == "model" and signature.return_annotation is not inspect.Signature.empty
    for parameter in rest:
        assert parameter.annotation is not parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter
