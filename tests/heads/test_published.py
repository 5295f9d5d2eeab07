"""Published dense checkpoints: every file in the facts fits its predictor, name by name and shape by shape (meta device)."""

import re

import golden
import pytest
import torch

import backbones  # noqa: F401  (registers the zoo's models)
import weights
from heads import HEADS, published
from heads.published import PUBLISHED

ENCODER = re.compile(r"pretrained\.(?!act_postprocess)|encoder\.")
NAMES = {"glpn_mit_b4": "glpn_nyu"}


def files() -> list:
    found = [(family, name) for family in ("dpt", "midas", "depth_anything_v2", "glpn") for name in golden.official(family)]
    return found or [pytest.param(None, None, marks=pytest.mark.skip(reason="no facts/keys_*.json beside the fixtures"))]


def meta_state(family: str, name: str) -> dict[str, torch.Tensor]:
    keys = golden.official(family)[name]["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("family", "name"), files())
def test_file_fits_its_predictor(family, name):
    with torch.device("meta"):
        model = published.build(NAMES.get(name, name))
    state = meta_state(family, name)
    report = weights.load_checkpoint(model, state)
    assert report.format == "official-dense"
    assert not report.missing and not report.unexpected
    assert len(report.loaded) == len(model.state_dict())

    # the other way round: every name of the head comes back, with its shape, but what nobody runs (encoders keep timm's names)
    back = weights.convert.converter(model).to_official(model.state_dict(), model)
    back = {key: tuple(value.shape) for key, value in back.items() if not ENCODER.match(key)}
    unused = rf"(depth_head\.)?scratch\.refinenet{len(model.backbone.channels)}\.resConfUnit1\.|auxlayer\."
    official = {key: tuple(value.shape) for key, value in state.items() if not ENCODER.match(key)}
    assert back == {key: shape for key, shape in official.items() if not re.match(unused, key)}


def heads() -> list:
    found = [(family, name) for family in ("upernet", "sdt") for name in golden.official(family)]
    return found or [pytest.param(None, None, marks=pytest.mark.skip(reason="no facts/keys_*.json beside the fixtures"))]


@pytest.mark.parametrize(("family", "name"), heads())
def test_head_file_fits_its_head(family, name):
    state = meta_state(family, name)
    facts = golden.official(family)[name]
    kwargs = facts.get("kwargs", {})
    with torch.device("meta"):
        if name.startswith("upernet"):
            laterals = [key for key in state if re.fullmatch(r"lateral_convs\.\d\.conv\.weight", key)]
            channels = [state[key].shape[1] for key in sorted(laterals)] + [state["psp_modules.0.1.conv.weight"].shape[1]]
            head = HEADS["upernet"](channels, 150)
        elif name.startswith("fcn"):
            head = HEADS["fcn"]([state["convs.0.conv.weight"].shape[1]], 150, index=0)
        elif name.startswith("sdt"):
            head = HEADS["sdt"](kwargs["in_channels"], kwargs["n_output_channels"], kwargs["fusion_channels"], "project")
        else:  # AnyDepth's baseline, the DINOv3-style DPT
            head = HEADS["dpt"](
                [state[f"reassemble_blocks.projects.{i}.conv.weight"].shape[1] for i in range(4)],
                kwargs["n_output_channels"],
                kwargs["channels"],
                one_scale=True,
                reassemble=kwargs["post_process_channels"],
                readout=kwargs["readout_type"],
                unit_bias=False,
                fusion="double",
                project=True,
            )
    weights.load_checkpoint(head, state)
    assert parameters(head) == facts["params"]
    back = weights.convert.converter(head).to_official(head.state_dict(), head)
    assert {key: tuple(value.shape) for key, value in back.items()} == {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("name", [name for name, spec in PUBLISHED.items() if spec.source == "open-mmlab/mmsegmentation"])
def test_mmsegmentation_files_of_our_backbones_come_back(name):
    from timm import is_model

    if not is_model(PUBLISHED[name].backbone):
        pytest.skip(f"{PUBLISHED[name].backbone} is not registered")
    with torch.device("meta"):
        model, other = published.build(name), published.build(name)
    official = weights.convert.converter(model).to_official(model.state_dict(), model)
    assert {key.partition(".")[0] for key in official} <= {"backbone", "neck", "decode_head", "auxiliary_head"}
    assert any(re.match(r"backbone\.(norm\d|layers\.0\.ln1)\.", key) for key in official)
    report = weights.load_checkpoint(other, {"state_dict": official, "meta": {"epoch": 1}})
    assert report.format == "official-dense" and not report.missing and not report.unexpected
    assert len(report.loaded) == len(other.state_dict())
