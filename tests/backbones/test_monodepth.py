"""Lite-Mono's encoder against the authors' code."""

import golden
import pytest
import timm
import torch
from torch import Tensor, nn

import weights
from backbones.monodepth import DilatedBlock, GlobalBlock, LiteMono, waves
from weights.convert import monodepth as convert


def encoder(case: str) -> tuple[LiteMono, dict[str, Tensor]]:
    """The encoder that a fixture describes, with its weights, and the fixture's tensors."""
    info, tensors = golden.load(case)
    args = {key: info["kwargs"][key] for key in ("dims", "heads", "dilations")}
    model = LiteMono(info["kwargs"]["depth"], positions=info["kwargs"]["position_embedding"], **args).eval()
    state = golden.state(tensors, "state/encoder.")
    settings = {"height": torch.tensor(64), "width": torch.tensor(96)}  # beside the weights in the published files
    report = weights.load_checkpoint(model, state | settings, strict=False)
    assert report.format == "official" and not report.missing and set(report.unexpected) <= set(settings)
    return model, tensors


@pytest.mark.parametrize("case", golden.cases("monodepth_lite_model"))
def test_every_stored_tensor_is_reproduced(case):
    model, tensors = encoder(case)
    close = golden.tolerance(golden.load(case)[0])
    image = (tensors["input"] - 0.45) / 0.225
    seen = {}

    def keep(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, __, out: seen.__setitem__(name, out))

    keep("stage/stem1", model.patch_embed.layers)
    keep("stage/stem2", model.patch_embed.conv)
    keep("stage/cdc_0", model.stages[0].blocks[-2])
    keep("stage/lgfi_0", model.stages[0].blocks[-1])
    for i in (1, 2):
        keep(f"stage/down_{i}", model.stages[i].downsample)
    with torch.no_grad():
        final, maps = model.forward_intermediates(image)
    assert torch.equal(final, maps[-1])
    found = seen | {f"stage/features_{i}": x for i, x in enumerate(maps)}
    stored = {name: value for name, value in tensors.items() if name.startswith("stage/")}
    assert stored.keys() == found.keys()
    for name, value in stored.items():
        torch.testing.assert_close(found[name], value, **close, msg=lambda m, name=name: f"{name}: {m}")
    back = convert.to_official(model.state_dict(), model)
    state = golden.state(tensors, "state/encoder.")
    assert back.keys() == state.keys()
    unused = [name for name in state if ".norm." in name and f"{name.rsplit('.', 2)[0]}.ddwconv.conv.weight" in state]
    assert all(torch.equal(value, state[name]) for name, value in back.items() if name not in unused)


@pytest.mark.parametrize("case", golden.cases("monodepth_lite_blocks"))
def test_the_two_blocks_and_their_gradient(case):
    info, tensors = golden.load(case)
    kwargs, close = info["kwargs"], golden.tolerance(info)
    dim = kwargs["dim"]
    blocks = nn.Sequential(
        DilatedBlock(dim, kwargs["dilation"], kwargs["expansion"], 1e-6, 0.0),
        GlobalBlock(dim, kwargs["heads"], kwargs["position_embedding"], kwargs["expansion"], 1e-6, 0.0),
    ).eval()
    names = {"cdc.": "stages.0.0.", "lgfi.": "stages.0.1."}
    state = {names[key[: key.index(".") + 1]] + key.split(".", 1)[1]: v for key, v in golden.state(tensors).items()}
    native = convert.to_native({"stem2.0.conv.weight": torch.empty(0), **state}, None)
    blocks.load_state_dict({key.removeprefix("stages.0.blocks."): v for key, v in native.items() if key.startswith("stages")})
    x = tensors["input"].requires_grad_()
    middle = blocks[0](x)
    torch.testing.assert_close(middle, tensors["stage/cdc"], **close)
    torch.testing.assert_close(blocks[1].pos_embed(waves(x)).expand(len(x), -1, -1, -1), tensors["stage/position"], **close)
    out = blocks[1](middle)
    torch.testing.assert_close(out, tensors["output"], **close)
    (out * tensors["input/weight"]).sum().backward()
    torch.testing.assert_close(x.grad, tensors["grad/input"], **close)


@pytest.mark.parametrize("variant", ["lite-mono", "lite-mono-small", "lite-mono-tiny", "lite-mono-8m"])
def test_a_published_encoder(variant):
    facts = golden.keys("monodepth")[variant]
    shapes = {key.removeprefix("encoder."): shape for key, shape in facts["keys"].items() if key.startswith("encoder.")}
    name = f"lite_mono_{variant.removeprefix('lite-mono').removeprefix('-') or 'base'}"
    model = timm.create_model(name, device="meta")
    report = weights.load_checkpoint(model, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert report.format == "official" and not report.missing and not report.unexpected and not report.resized
    back = convert.to_official(model.state_dict(), model)
    assert {key: list(value.shape) for key, value in back.items()} == shapes
    unused = sum(2 * value.shape[0] for key, value in back.items() if key.endswith(".ddwconv.conv.weight"))
    assert sum(p.numel() for p in model.parameters()) + unused == facts["params_per_file"]["encoder"]


def test_a_grey_image_is_an_rgb_image_of_three_equal_channels():
    torch.manual_seed(0)
    rgb, grey = (timm.create_model("lite_mono_tiny", depths=(2, 1, 1), in_chans=channels).eval() for channels in (3, 1))
    state = rgb.state_dict()
    grey.load_state_dict(state | {"patch_embed.layers.0.0.weight": state["patch_embed.layers.0.0.weight"].sum(1, keepdim=True)})
    image = torch.randn(1, 1, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(grey(image), rgb(image.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)


def test_the_dilations_of_1024_pixels_are_a_model_of_their_own():
    steps = [block.conv.dilation[0] for block in timm.create_model("lite_mono_base_1024").stages[2].blocks[:-1]]
    assert steps == [1, 2, 5, 1, 2, 5, 2, 4, 10]
