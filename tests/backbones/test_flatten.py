"""FLatten against the authors' code, in all four hosts."""

import golden
import parity
import pytest
import torch
from torch import Tensor, nn

from backbones.flatten import (
    Block,
    DepthwiseMlp,
    FlattenCSwin,
    FlattenPVT,
    FlattenSwin,
    ReducedAttention,
    ReducedLinearAttention,
    StripeLinearAttention,
    WindowLinearAttention,
)
from weights.convert import flatten as convert

# Training only, or without a meaning in linear attention (qk_scale); norm_eps is what the host has anyway.
IGNORED = ("drop_rate", "attn_drop_rate", "drop_path_rate", "qk_scale", "norm_eps", "use_checkpoint", "fused_window_process")
REBUILT = ("relative_position_index", "attn_mask")


def from_official(info: dict) -> nn.Module:
    """The model that the authors' constructor arguments describe; `linear`, which no published model sets, has no form here."""
    names = {"embed_dims": "dims", "depth": "depths"}
    args = {names.get(key, key): value for key, value in info["kwargs"].items() if key not in IGNORED}
    assert not args.pop("linear", False)
    source = info["source"]["file"]
    if "swin.py" in source and "cswin" not in source:
        return FlattenSwin(**args)
    if "cswin" in source:
        if "la_split_size" in args:
            args["la_split_size"] = [int(side) for side in args["la_split_size"].split("-")]
        return FlattenCSwin(split_at=args["img_size"], **args)
    if "la_sr_ratios" in args:
        args["la_sr_ratios"] = [int(ratio) for ratio in args["la_sr_ratios"]]
    return FlattenPVT(version=2 if "v2" in source else 1, **args)


def tensors_of(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    final, maps = model.forward_intermediates(image)
    return {f"stage/{i}": x for i, x in enumerate(maps)} | {"extra/final_norm": final, "output": model(image)}


@pytest.mark.parametrize("case", golden.cases("flatten", exclude="flatten_op"))
def test_every_stored_tensor_is_reproduced(case):
    parity.check_model(from_official(golden.load(case)[0]), case, tensors_of, ignored=REBUILT)


def part(kwargs: dict) -> tuple[nn.Module, int | None]:
    """The part, and the side of its windows."""
    linear = {"kernel_size": kwargs.get("kernel_size", 5), "focusing": kwargs.get("focusing_factor", 3)}
    dim, heads, bias = kwargs["dim"], kwargs["num_heads"], kwargs.get("qkv_bias", True)
    host, kind = kwargs["cls"].split(".")
    if host == "flatten_swin" and kind == "SwinTransformerBlock":
        side = kwargs["window_size"]
        swin = FlattenSwin(img_size=kwargs["input_resolution"], patch_size=1, embed_dim=dim, depths=(2,), num_heads=(heads,),
                           window_size=side, mlp_ratio=kwargs["mlp_ratio"], attn_type="L", **rename(linear))  # fmt: skip
        return swin.stages[0].blocks[1], side
    if host == "flatten_swin":
        side = kwargs["window_size"][0]
        return WindowLinearAttention(dim, heads, side, False, None, bias, **linear), side
    if host == "flatten_cswin":
        side = kwargs["resolution"]
        return StripeLinearAttention(dim, heads, (None, None), (side, side), **linear), side
    return None, None


def rename(linear: dict) -> dict:
    return {"focusing_factor": linear["focusing"], "kernel_size": linear["kernel_size"]}


@pytest.mark.parametrize(("fixture", "case"), parity.cases_of("flatten_op"))
def test_parts_and_their_gradients(fixture, case):
    info = golden.load(fixture)[0]["cases"][case]
    kwargs = info["kwargs"]
    module, side = part(kwargs)
    if module is None:  # PVT
        grid, heads, bias = (info["H"], info["W"]), kwargs["num_heads"], kwargs["qkv_bias"]
        linear = {"kernel_size": kwargs["kernel_size"], "focusing": kwargs["focusing_factor"]}
        module = ReducedLinearAttention(kwargs["dim"], heads, grid, bias, kwargs["sr_ratio"], **linear)
        if kwargs["cls"].endswith("Block"):
            dim = kwargs["dim"]
            norms = [nn.LayerNorm(dim, eps=kwargs["norm_eps"]) for _ in range(2)]
            module = Block(norms[0], module, norms[1], DepthwiseMlp(dim, int(dim * kwargs["mlp_ratio"])), 0.0)

    def run(x: Tensor) -> Tensor:
        if "cswin" in kwargs["cls"]:
            return module(*x.unflatten(2, (side, side))).flatten(1, 2)
        size = (info["H"], info["W"]) if "H" in info else tuple(kwargs.get("input_resolution", (side, side)))
        return module(x.unflatten(1, size)).flatten(1, 2)

    def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {key.replace("dwconv.dwconv", "dwconv"): value for key, value in state.items()}
        return {key: value for key, value in named.items() if not key.endswith(REBUILT)}

    parity.check_part(module, fixture, case, translate, run)


@pytest.mark.parametrize("variant", golden.keys("flatten"))
def test_a_published_model(variant):
    extra = 2 * 512 if "pvt_" in variant and "v2" not in variant else 0  # a norm that the authors' PVT holds and never applies
    parity.check_published("flatten", variant, variant, ignored=REBUILT, more=extra)


def test_letters_that_say_nothing_are_refused():
    for letters in ("LLS", "LLSX", "LLMS", "LLSS2"):
        with pytest.raises(ValueError, match="attn_type must have a letter"):
            FlattenSwin(embed_dim=8, num_heads=(1, 2, 2, 4), attn_type=letters)
    model = FlattenSwin(embed_dim=8, num_heads=(1, 2, 2, 4), attn_type="LMSS1", img_size=64)
    kinds = [[hasattr(block.attn, "dwc") for block in stage.blocks] for stage in model.stages]
    assert kinds[:2] == [[True, True], [True, False]]


@pytest.mark.parametrize("host", ["swin", "pvt", "cswin"])
def test_a_resized_model_runs_as_before_at_its_new_size(host):
    """set_input_size and resizing at run time agree; Swin's windows change with the size, so its two ways differ."""
    torch.manual_seed(0)
    tiny = {"img_size": 64, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "num_classes": 3}
    kinds = {
        "swin": lambda: FlattenSwin(embed_dim=8, **tiny),
        "pvt": lambda: FlattenPVT(dims=(8, 16, 16, 32), **tiny),
        "cswin": lambda: FlattenCSwin(embed_dim=8, split_at=64, num_heads=(2, 2, 4, 4),
                                      split_size=(1, 2, 2, 2), la_split_size=(16, 8, 4, 2),
                                      **{k: v for k, v in tiny.items() if k != "num_heads"}),
    }  # fmt: skip
    model = kinds[host]().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    image = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        before = model(image)
        model.set_input_size((96, 128))
        if host != "swin":
            torch.testing.assert_close(model(image), before, atol=1e-4, rtol=1e-4)
        assert model(image).isfinite().all()


def test_softmax_blocks_are_the_hosts():
    model = FlattenPVT(dims=(8, 16, 16, 32), num_heads=(1, 2, 2, 4), depths=(1, 1, 1, 1), attn_type="LLSS", img_size=64)
    assert [isinstance(stage.blocks[0].attn, ReducedAttention) for stage in model.stages] == [False, False, True, True]
    assert convert.source_format(convert.to_official(model.state_dict(), model)) == "official"
