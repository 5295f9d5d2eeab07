"""LITv2 against the authors' code."""

import golden
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import backbones
import weights
from backbones.layers import Block
from backbones.litv2 import ConvMlp, HiLo, LITv2
from weights.convert import litv2 as convert

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "heads": (1, 1, 4, 2), "alpha": 0.5, "num_classes": 5}


def from_official(info: dict) -> LITv2:
    """The model that the authors' constructor arguments describe; their dense backbones have neither norm nor classifier."""
    kwargs, dense = info["kwargs"], not info["has_logits"]
    model = LITv2(
        depths=kwargs["depths"],
        dims=[kwargs["embed_dim"] * 2**i for i in range(4)],
        heads=kwargs["num_heads"],
        windows=kwargs["local_ws"][2:],
        alpha=kwargs.get("alpha", 0.5),
        mlp_ratio=kwargs.get("mlp_ratio", 4.0),
        qkv_bias=kwargs.get("qkv_bias", True),
        num_classes=0 if dense else kwargs["num_classes"],
        feature_norms=dense and ((1, 2, 3) if info["source"]["file"].startswith("detection") else True),
    )
    if dense:
        model.norm = nn.Identity()
    return model.eval()


def tiny(**kwargs) -> LITv2:
    """A model with every weight off its initial value."""
    torch.manual_seed(0)
    model = LITv2(**TINY | kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("case", [c for c in golden.cases("litv2") if not str(c).startswith("litv2_op")])
def test_every_stored_tensor_is_reproduced(case):
    info, tensors = golden.load(case)
    model, x = from_official(info), tensors["input"]
    weights.load_checkpoint(model, golden.state(tensors))
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        got = {f"stage/{i}": out for i, out in enumerate(maps)} | {"extra/final_norm": final}
        if info["has_logits"]:
            got |= {"output": model(x), "extra/pre_logits": model.forward_head(final, pre_logits=True)}
    stored = {key: value for key, value in tensors.items() if key != "input" and not key.startswith("state/")}
    assert stored.keys() <= got.keys()
    for key, value in stored.items():
        torch.testing.assert_close(got[key], value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")


def hilo_cases() -> list:
    return [
        (file, name) for file in golden.cases("litv2_op") if isinstance(file, str) for name in golden.load(file)[0]["cases"]
    ]


@pytest.mark.parametrize(
    "file, name", hilo_cases() or [pytest.param("", "", marks=pytest.mark.skip(reason="no fixture litv2_op*"))]
)
def test_hilo_and_its_gradients_are_reproduced(file, name):
    info, tensors = golden.load(file)
    case, tensors = info["cases"][name], golden.state(tensors, f"{name}/")
    kwargs = dict(case["kwargs"])
    module = HiLo(heads=kwargs.pop("num_heads"), window=kwargs.pop("window_size"), **kwargs)
    module.load_state_dict(golden.state(tensors))
    assert (module.lo_heads, module.hi_heads) == (case["l_heads"], case["h_heads"])
    x = tensors["input"].unflatten(1, (case["H"], case["W"])).clone().requires_grad_()
    out = module(x).flatten(1, 2)
    out.backward(tensors["grad_output"])
    got = {"output": out, "grad_input": x.grad.flatten(1, 2)}
    got |= {f"grad_state/{key}": p.grad for key, p in module.named_parameters()}
    for key, value in tensors.items():
        if not key.startswith("state/") and key not in ("input", "grad_output"):
            atol = 5 * case["fp32_vs_fp64_max_abs_diff"] * max(1.0, value.abs().max().item())
            torch.testing.assert_close(got[key], value, atol=atol, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("variant", golden.variants("litv2"))
def test_every_official_variant_converts_and_converts_back(variant):
    facts, (name, _, alpha) = golden.official("litv2")[variant], variant.partition("_alpha_")
    model = timm.create_model(name, device="meta", **({"alpha": float(alpha)} if alpha else {}))
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    official = {key: torch.empty(shape, device="meta") for key, shape in facts["keys"].items()}
    native = weights.convert_state_dict(official, model)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert weights.convert_state_dict(native, model).keys() == native.keys()
    assert {key: list(value.shape) for key, value in convert.to_official(native, model).items()} == facts["keys"]
    assert convert.source_format(official) == "official" and convert.source_format(native) == "native"


def test_lo_fi_heads_are_cut_not_rounded_and_window_one_takes_all():
    heads = {(12, 0.9): (10, 2), (16, 0.9): (14, 2), (6, 0.3): (1, 5), (3, 0.0): (0, 3), (3, 1.0): (3, 0)}
    for (count, alpha), split in heads.items():
        module = HiLo(count * 2, count, window=2, alpha=alpha)
        assert (module.lo_heads, module.hi_heads) == split
        assert hasattr(module, "l_q") == (split[0] > 0) and hasattr(module, "h_qkv") == (split[1] > 0)
    assert HiLo(8, 4, window=1, alpha=0.0).lo_heads == 4


def test_window_one_is_ordinary_attention():
    module, x = HiLo(8, 2, window=1, alpha=0.5), torch.randn(2, 3, 5, 8)
    q = module.l_q(x).reshape(2, 15, 2, 4).transpose(1, 2)
    k, v = module.l_kv(x).reshape(2, 15, 2, 2, 4).permute(2, 0, 3, 1, 4)
    out = (q @ k.mT * 4**-0.5).softmax(-1) @ v
    torch.testing.assert_close(module(x), module.l_proj(out.transpose(1, 2).reshape(2, 3, 5, 8)))


def test_hi_fi_channels_come_first_and_see_only_their_window():
    module, x = HiLo(8, 2, window=2, alpha=0.5), torch.randn(1, 4, 4, 8)
    other = x.clone()
    other[:, 2:, 2:] += 1  # another window
    before, after = module(x), module(other)
    assert torch.equal(before[:, :2, :2, :4], after[:, :2, :2, :4])
    assert (before[:, :2, :2, 4:] != after[:, :2, :2, 4:]).any()


def test_padding_takes_part_as_keys_and_dilutes_the_averages():
    """What the authors' dense code does; a mask would be the other choice."""
    module, x = HiLo(8, 2, window=4, alpha=0.5), torch.randn(1, 5, 3, 8)
    torch.testing.assert_close(module(x), module(F.pad(x, (0, 0, 0, 1, 0, 3)))[:, :5, :3])


def test_the_mlp_convolves_before_an_exact_gelu_without_residual():
    mlp, x = ConvMlp(4, 8, 0.0), torch.randn(1, 5, 6, 4)
    hidden = mlp.fc1(x).permute(0, 3, 1, 2).contiguous()
    expected = mlp.fc2(F.gelu(F.conv2d(hidden, mlp.dwconv.weight, mlp.dwconv.bias, padding=1, groups=8)).permute(0, 2, 3, 1))
    torch.testing.assert_close(mlp(x), expected)
    assert mlp.dwconv.weight.std() < 1.5 * (2 / 9) ** 0.5  # normal of variance 2/9; torch's own default has the same order


def test_only_the_last_two_stages_have_attention_and_all_norms_the_released_epsilon():
    model = tiny()
    for i, stage in enumerate(model.stages):
        assert all(isinstance(b, Block) and (b.attn is not None) == (i > 1) for b in stage.blocks)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_published_models_differ_from_each_other_only_as_the_table_says():
    for name, window in [("litv2_s", 2), ("litv2_m", 2), ("litv2_b_384", 2)]:
        model = timm.create_model(name, device="meta")
        attention = [stage.blocks[0].attn for stage in model.stages[2:]]
        assert [a.window for a in attention] == [window, 1] and attention[0].hi_heads == 2


def test_any_size_from_the_minimum_on():
    model = tiny()
    for height, width in [(model.min_size, model.min_size), (45, 101), (118, 150)]:
        maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
        first = (-(-height // 4), -(-width // 4))  # padded to whole patches, then floored by each merging
        assert [tuple(m.shape[2:]) for m in maps] == [(first[0] >> i, first[1] >> i) for i in range(4)]
    with pytest.raises(ValueError, match=str(model.min_size)):
        model(torch.randn(1, 3, 64, model.min_size - 1))


def test_bfloat16_autocast_runs_on_the_cpu_and_trains():
    model, x = tiny().train(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().mean().backward()
    assert out.dtype == torch.bfloat16 and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_folding_batch_norm_keeps_the_output():
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for stage in model.stages[1:]:
            stage.downsample.norm.running_mean.normal_()
            stage.downsample.norm.running_var.uniform_(0.5, 2)
        folded = backbones.fuse(model)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=0)


def test_wrong_arguments_raise():
    for kwargs, words in [({"alpha": 1.5}, "alpha.*1.5"), ({"windows": (2,)}, "windows"), ({"dims": (8, 8, 18, 16)}, "18")]:
        with pytest.raises(ValueError, match=words):
            tiny(**kwargs)
    with pytest.raises(TypeError, match="window_size"):
        timm.create_model("litv2_s", window_size=2)
