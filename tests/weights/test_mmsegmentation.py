"""Files of mmsegmentation: its own Swin and MiT, and models trained there with our backbones and heads (heads/mmseg.py).

The renamings below are those of mmsegmentation's tools/model_converters (swin2mmseg.py, mit2mmseg.py), written anew.
"""

import re

import pytest
import timm
import torch

import backbones  # noqa: F401
import weights
from heads import DensePredictor

SWIN = {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
PYRAMID = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "sr_ratios": (8, 4, 2, 1)}
NAT = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
State = dict[str, torch.Tensor]


def official(model: torch.nn.Module) -> State:
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_()
    return weights.convert.converter(model).to_official(model.state_dict(), model)


def mmseg_swin(state: State) -> State:
    found = {}
    for key, value in state.items():
        if key.startswith("head"):
            continue
        new = key.replace("layers", "stages") if key.startswith("layers") else key
        if "attn." in key:
            new = new.replace("attn.", "attn.w_msa.")
        elif "mlp." in key:
            new = new.replace("mlp.fc1.", "ffn.layers.0.0.").replace("mlp.fc2.", "ffn.layers.1.")
        elif "downsample.reduction" in key:
            out, inside = value.shape
            value = value.reshape(out, 4, inside // 4)[:, [0, 2, 1, 3], :].transpose(1, 2).reshape(out, inside)
        elif "downsample.norm" in key:
            value = value.reshape(4, -1)[[0, 2, 1, 3], :].transpose(0, 1).reshape(-1)
        elif key.startswith("patch_embed"):
            new = new.replace("proj", "projection")
        found[new] = value
    return found


@pytest.mark.parametrize("whole", [False, True])
def test_its_own_swin(whole):
    source = timm.create_model("swin_t", **SWIN, feature_norms=True, num_classes=0)
    state = mmseg_swin({name: value for name, value in official(source).items() if not name.startswith("norm.")})
    assert any("w_msa" in name for name in state) and any("ffn.layers.0.0" in name for name in state)
    if not whole:
        model = timm.create_model("swin_t", **SWIN, features_only=True, feature_norms=True)
        report = weights.load_checkpoint(model, state)
    else:
        make = lambda: DensePredictor("swin_t", "upernet", 5, {"width": 8}, backbone_args=SWIN | {"feature_norms": True})  # noqa: E731
        head = make().head.state_dict()
        state = {f"backbone.{name}": value for name, value in state.items()}
        state |= {f"decode_head.{name}": value for name, value in head.items()}
        report = weights.load_checkpoint(model := make(), {"state_dict": state, "meta": {}})
        assert all(torch.equal(value, model.head.state_dict()[name]) for name, value in head.items())
    assert report.format == "official-dense" and not report.missing and not report.untouched
    own = weights.convert.backbone(model).state_dict()
    assert all(torch.equal(own[name], value) for name, value in source.state_dict().items() if name in own)
    assert any("downsample" in name for name in own)


def mmseg_mit(state: State) -> State:
    """timm's PVTv2 names -> mmsegmentation's MiT."""
    found: State = {}
    for key, value in state.items():
        if key.startswith("patch_embed."):
            key = "stages.0.downsample." + key.removeprefix("patch_embed.")
        m = re.match(r"stages\.(\d)\.(?:(downsample)\.(proj|norm)|(norm)|blocks\.(\d+)\.(.*?))\.(weight|bias)$", key)
        stage, down, part, norm, block, rest, kind = m.groups()
        if down:
            found[f"layers.{stage}.0.{'projection' if part == 'proj' else 'norm'}.{kind}"] = value
        elif norm:
            found[f"layers.{stage}.2.{kind}"] = value
        else:
            stem = f"layers.{stage}.1.{block}."
            if rest in ("attn.q", "attn.kv"):
                name = f"{stem}attn.attn.in_proj_{kind}"
                found[name] = torch.cat([found[name], value]) if rest == "attn.kv" else value
                continue
            if rest in ("mlp.fc1", "mlp.fc2") and kind == "weight":
                value = value[:, :, None, None]
            names = {"attn.proj": "attn.attn.out_proj", "mlp.fc1": "ffn.layers.0", "mlp.fc2": "ffn.layers.4"}
            names["mlp.dwconv"] = "ffn.layers.1"
            found[f"{stem}{names.get(rest, rest)}.{kind}"] = value
    return found


def test_its_own_mit():
    make = lambda: DensePredictor("pvt_v2_b0", "segformer", 5, {"width": 8}, backbone_args=PYRAMID)  # noqa: E731
    source, model = make(), make()
    state = {f"backbone.{name}": value for name, value in mmseg_mit(source.backbone.model.state_dict()).items()}
    state |= {f"decode_head.{name}": value for name, value in source.head.state_dict().items()}
    report = weights.load_checkpoint(model, {"state_dict": state})
    assert report.format == "official-dense" and len(report.loaded) == len(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize("backbone", ["ZooBackbone", "TIMMBackbone"])
@pytest.mark.parametrize("head", ["ZooHead", "UPerHead"])
@pytest.mark.parametrize("name", ["nat_mini", "test_resnet"])
def test_a_model_trained_through_the_bridge(backbone, head, name):
    def make() -> DensePredictor:
        args = NAT if name == "nat_mini" else {}
        return DensePredictor(name, "upernet", 5, {"width": 8}, backbone_args=args, aux_head="fcn", aux_args={"width": 8})

    source, model = make(), make()
    prefix = {"ZooBackbone": "backbone.model.", "TIMMBackbone": "backbone.timm_model."}[backbone]
    state = {prefix + name: value for name, value in source.backbone.model.state_dict().items()}
    inner = "head." if head == "ZooHead" else ""
    state |= {f"decode_head.{inner}{name}": value for name, value in source.head.state_dict().items()}
    state |= {f"auxiliary_head.{inner}{name}": value for name, value in source.aux_head.state_dict().items()}
    report = weights.load_checkpoint(model, {"state_dict": state, "meta": {"iter": 3}})
    assert not report.missing and not report.unexpected and not report.untouched
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())
    alone = DensePredictor(name, "upernet", 5, {"width": 8}, backbone_args=NAT if name == "nat_mini" else {})
    assert len(weights.load_checkpoint(alone, state).loaded) == len(alone.state_dict())


def test_a_zoo_head_with_a_pyramid_of_its_own():
    def make() -> DensePredictor:
        return DensePredictor("test_vit", "fpn", 5, {"width": 8})

    source, model = make(), make()
    state = {f"backbone.model.{name}": value for name, value in source.backbone.model.state_dict().items()}
    state |= {f"decode_head.head.{name}": value for name, value in source.head.state_dict().items()}
    state |= {f"decode_head.pyramid.{name}": value for name, value in source.neck.state_dict().items()}
    report = weights.load_checkpoint(model, state)
    assert len(report.loaded) == len(model.state_dict()) and not report.unexpected
