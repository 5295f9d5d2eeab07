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


VIT = {"embed_dim": 24, "depth": 4, "num_heads": 2}
MAPS = ("blocks.0", "blocks.1", "blocks.2")


def vit_predictor(
    last: str = "norm", neck: str | None = "multilevel", positions: str | None = "mmsegmentation", size: int = 32
):
    args = VIT | {"positions": positions, "taps": (*MAPS, last)}
    aux = {"aux_head": "fcn", "aux_args": {"width": 4, "index": 3}}
    options = {"backbone_args": args, "img_size": (32, 32), "neck": neck, **aux}
    return DensePredictor("vit_tiny_patch16_224", "upernet", 5, {"width": 8}, **options).eval()


def vit_file(norm: bool = True, neck: bool = True, grid: int = 2) -> State:
    """A file as mmsegmentation writes it for upernet_vit-b16_(ln_)mln, small, from its own names and shapes."""
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.cls_token": (1, 1, 24),
        "backbone.pos_embed": (1, grid * grid + 1, 24),
        "backbone.patch_embed.projection.weight": (24, 3, 16, 16),
        "backbone.patch_embed.projection.bias": (24,),
    }
    for i in range(4):
        stem = f"backbone.layers.{i}."
        linear = {"attn.attn.out_proj": (24, 24), "ffn.layers.0.0": (96, 24), "ffn.layers.1": (24, 96)}
        shapes |= {f"{stem}attn.attn.in_proj_weight": (72, 24), f"{stem}attn.attn.in_proj_bias": (72,)}
        for name, shape in (linear | {"ln1": (24,), "ln2": (24,)}).items():
            shapes |= {f"{stem}{name}.weight": shape, f"{stem}{name}.bias": shape[:1]}
    if norm:
        shapes |= {"backbone.ln1.weight": (24,), "backbone.ln1.bias": (24,)}
    state = {name: torch.randn(shape, generator=draw) * 0.2 for name, shape in shapes.items()}
    if neck:
        for i in range(4):
            for name, kernel in (("lateral_convs", 1), ("convs", 3)):
                state[f"neck.{name}.{i}.conv.weight"] = torch.randn(24, 24, kernel, kernel, generator=draw)
                state[f"neck.{name}.{i}.conv.bias"] = torch.randn(24, generator=draw)
    like = vit_predictor()
    for place, head in (("decode_head", like.head), ("auxiliary_head", like.aux_head)):
        state |= {f"{place}.{name}": value for name, value in head.state_dict().items()}
    return state


def vit_maps(state: State, images: torch.Tensor, grid: int = 2) -> list[torch.Tensor]:
    """mmsegmentation's VisionTransformer, step by step: the maps of every layer, a norm behind the last one."""
    part = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    functional = torch.nn.functional

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (24,), part[f"{name}.weight"], part[f"{name}.bias"], 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, part[f"{name}.weight"], part[f"{name}.bias"])

    patches = functional.conv2d(images, part["patch_embed.projection.weight"], part["patch_embed.projection.bias"], stride=16)
    size = patches.shape[-2:]
    table = part["pos_embed"][:, 1:].mT.reshape(1, 24, grid, grid)
    table = functional.interpolate(table, size, mode="bicubic", align_corners=False).flatten(2).mT
    x = torch.cat([part["cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], 1)
    x = x + torch.cat([part["pos_embed"][:, :1], table], 1)
    found = []
    for i in range(4):
        stem = f"layers.{i}."
        weights_, bias = part[f"{stem}attn.attn.in_proj_weight"], part[f"{stem}attn.attn.in_proj_bias"]
        q, k, v = functional.linear(norm(x, f"{stem}ln1"), weights_, bias).unflatten(2, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        heads = (q @ k.mT / 12**0.5).softmax(-1) @ v
        x = x + linear(heads.transpose(1, 2).flatten(2), f"{stem}attn.attn.out_proj")
        x = x + linear(functional.gelu(linear(norm(x, f"{stem}ln2"), f"{stem}ffn.layers.0.0")), f"{stem}ffn.layers.1")
        if i == 3 and "ln1.weight" in part:
            x = norm(x, "ln1")
        found.append(x[:, 1:].mT.unflatten(2, size))
    return found


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
def test_its_own_plain_vit_with_multilevelneck(norm, size):
    state, model = vit_file(norm), vit_predictor("norm" if norm else "blocks.3")
    report = weights.load_checkpoint(model, {"state_dict": state, "meta": {}})
    assert report.format == "official-dense" and not report.missing and not report.unexpected and not report.warnings
    assert len(report.loaded) == len(model.state_dict()) == len(state)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        for own, theirs in zip(model.backbone(images), vit_maps(state, images), strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    back = weights.convert.converter(model).to_official(model.state_dict(), model)
    assert back.keys() == state.keys() and all(torch.equal(back[name], value) for name, value in state.items())


def test_positions_of_another_grid_are_resized_as_mmsegmentation_does():
    state, model = vit_file(grid=4), vit_predictor()
    report = weights.load_checkpoint(model, state)
    assert report.resized == {"backbone.model.pos_embed": ((1, 17, 24), (1, 5, 24))}
    table = state["backbone.pos_embed"][:, 1:].mT.unflatten(2, (4, 4))
    small = torch.nn.functional.interpolate(table, (2, 2), mode="bicubic", align_corners=False).flatten(2).mT
    torch.testing.assert_close(model.state_dict()["backbone.model.pos_embed"][:, 1:], small)


def test_what_of_its_plain_vit_does_not_fit_is_refused():
    for neck in (None, "pyramid"):
        with pytest.raises(ValueError, match="MultiLevelNeck and the predictor has another neck or none: .* neck='multilevel'"):
            weights.load_checkpoint(vit_predictor(neck=neck), vit_file())
    with pytest.raises(ValueError, match="lacks weights of this predictor, 16: neck.lateral_convs"):
        weights.load_checkpoint(vit_predictor(), vit_file(neck=False))
    with pytest.raises(ValueError, match="final_norm.*; build the backbone with taps that end with 'norm'"):
        weights.load_checkpoint(vit_predictor("blocks.3"), vit_file())
    with pytest.raises(ValueError, match="lacks weights of this predictor, 2: backbone.model.norm"):
        weights.load_checkpoint(vit_predictor(), vit_file(norm=False))
    assert "positions='mmsegmentation'" in str(weights.load_checkpoint(vit_predictor(positions=None), vit_file()))
    for neck, args, sentence in (
        ("pyramid", {}, "ViTDet's pyramid.*has no place"),
        (None, {"init_values": 1.0}, r"ViT has no place for blocks\.0\.ls1\.gamma"),
    ):
        model = DensePredictor("vit_tiny_patch16_224", "upernet", 5, {"width": 8}, backbone_args=VIT | args, neck=neck)
        with pytest.raises(ValueError, match=sentence):
            weights.convert.converter(model).to_official(model.state_dict(), model)


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
