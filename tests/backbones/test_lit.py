"""LIT against the authors' code."""

import golden
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

import backbones
import weights
from backbones.layers import DeformableMerge
from backbones.lit import LIT, LITTi, position_bias, positions
from weights.convert import lit as convert

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "heads": (1, 1, 2, 2), "img_size": 64, "num_classes": 5}
MERGE_KEYS = {"dconv.conv_offset.": "offset.", "dconv.": "conv.", "norm_layer.": "norm."}


def from_official(info: dict) -> LIT | LITTi:
    """The model that the authors' constructor arguments describe; their dense backbones have neither norm nor classifier."""
    kwargs, dense = info["kwargs"], not info["has_logits"]
    shared = {"depths": kwargs["depths"], "heads": kwargs["num_heads"], "qkv_bias": kwargs.get("qkv_bias", True)}
    shared["num_classes"] = 0 if dense else kwargs["num_classes"]
    if "embed_dims" in kwargs:
        ti = {"dims": kwargs["embed_dims"], "mlp_ratios": kwargs["mlp_ratios"], "img_size": kwargs["img_size"]}
        model = LITTi(**shared, **ti, class_token=not dense)
    else:
        shared |= {"dims": [kwargs["embed_dim"] * 2**i for i in range(4)], "mlp_ratio": kwargs.get("mlp_ratio", 4.0)}
        if not dense:
            model = LIT(**shared, img_size=kwargs["img_size"])
        elif info["source"]["file"].startswith("detection"):
            model = LIT(
                **shared, img_size=800, feature_norms=(1, 2, 3)
            )  # their tables are for 800, their first map has no norm
        else:
            model = LIT(**shared, img_size=512, feature_norms=True)
    if dense:
        model.norm = nn.Identity()
    return model.eval()


def tiny(cls=LIT, **kwargs) -> LIT | LITTi:
    """A model with every weight off its initial value."""
    torch.manual_seed(0)
    model = cls(**TINY | kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("case", [c for c in golden.cases("lit", exclude="litv2") if not str(c).startswith("lit_op")])
def test_every_stored_tensor_is_reproduced(case):
    info, tensors = golden.load(case)
    model, x = from_official(info), tensors["input"]
    weights.load_checkpoint(model, golden.state(tensors))
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        got = {f"stage/{i}": out for i, out in enumerate(maps)}
        if info["has_logits"]:
            got |= {"output": model(x), "extra/pre_logits": model.forward_head(model.forward_features(x), pre_logits=True)}
            got |= {"extra/final_norm": final}
        if "extra/cls_token" in tensors:  # before the final norm
            got["extra/cls_token"] = nn.Sequential(model.patch_embed, *model.stages)(x)[1]
    stored = {key: value for key, value in tensors.items() if key != "input" and not key.startswith("state/")}
    assert stored.keys() <= got.keys()
    for key, value in stored.items():
        torch.testing.assert_close(got[key], value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")


def merge_cases() -> list:
    cases = [(file, name) for file in golden.cases("lit_op") if isinstance(file, str) for name in golden.load(file)[0]["cases"]]
    return cases or [pytest.param("", "", marks=pytest.mark.skip(reason="no fixture lit_op*"))]


@pytest.mark.parametrize(
    "file, name", merge_cases() or [pytest.param("", "", marks=pytest.mark.skip(reason="no fixture lit_op*"))]
)
def test_deformable_merging_and_its_gradients_are_reproduced(file, name):
    info, tensors = golden.load(file)
    case, tensors = info["cases"][name], golden.state(tensors, f"{name}/")
    state = {rename(key): value for key, value in golden.state(tensors).items()}
    module = DeformableMerge(state["conv.weight"].shape[1], len(state["conv.weight"])).train(case["train_mode"])
    module.load_state_dict(state)
    taps = {}
    module.offset.register_forward_hook(lambda _, __, out: (out.retain_grad(), taps.update(offset=out))[0])
    module.norm.register_forward_pre_hook(lambda _, inputs: taps.update(deform_conv_output=inputs[0]))
    x = tensors["input"].clone()
    maps = x.unflatten(1, (case["H"], case["W"])) if x.ndim == 3 else x.permute(0, 2, 3, 1)
    maps.requires_grad_()
    out = module(maps).flatten(1, 2)
    out.backward(tensors["grad_output"])
    got = taps | {"output": out, "grad_offset": taps["offset"].grad}
    got["grad_input"] = maps.grad.flatten(1, 2) if x.ndim == 3 else maps.grad.permute(0, 3, 1, 2)
    got |= {f"grad_state/{key}": p.grad for key, p in module.named_parameters()}
    got |= {f"state_after/{key}": b for key, b in module.named_buffers()}
    atol = 5 * case["fp32_vs_fp64_max_abs_diff"]
    gradients = belongs_together(tensors, case["train_mode"])
    for key, value in tensors.items():
        if key.startswith("grad") and not gradients:
            continue
        if not key.startswith("state/") and key not in ("input", "grad_output"):
            scale = max(1.0, value.abs().max().item()) if value.is_floating_point() else 1.0
            ours = got[rename(key)].detach()
            torch.testing.assert_close(ours, value, atol=atol * scale, rtol=0, msg=lambda m, key=key: f"{key}: {m}")

    if not gradients:
        pytest.skip("output checked; the stored gradients do not follow from the stored output and grad_output")


def belongs_together(tensors: dict, train: bool) -> bool:
    """Whether a fixture's gradient of the BatchNorm's bias follows from its own convolution output and grad_output.

    Written out, as torch's CPU batch_norm gives wrong gradients for the layout that the authors' code has with one image in
    evaluation: the fixture det_odd_map holds such.
    """
    state, x = golden.state(tensors, "state/norm_layer."), tensors["deform_conv_output"].double()
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if train else (state["running_mean"], state["running_var"])
    bias = state["bias"].double().requires_grad_()
    mean, scale, bias_map = (t.double()[:, None, None] for t in (mean, state["weight"] / (var + 1e-5).sqrt(), bias))
    out = F.gelu((x - mean) * scale + bias_map).permute(0, 2, 3, 1).flatten(1, 2)
    (out * tensors["grad_output"]).sum().backward()
    return torch.allclose(bias.grad.float(), tensors["grad_state/norm_layer.bias"], atol=1e-3)


def rename(key: str) -> str:
    """The authors' names inside the merging -> ours."""
    prefix, slash, name = key.rpartition("/")
    for old, new in MERGE_KEYS.items():
        if name.startswith(old):
            return prefix + slash + new + name.removeprefix(old)
    return key


@pytest.mark.parametrize("variant", golden.variants("lit"))
def test_every_official_variant_converts_and_converts_back(variant):
    facts = golden.official("lit")[variant]
    model = timm.create_model(variant, device="meta")
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    official = {key: torch.empty(shape, device="meta") for key, shape in facts["keys"].items()}
    native = weights.convert_state_dict(official, model)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert weights.convert_state_dict(native, model).keys() == native.keys()
    kept = {key: shape for key, shape in facts["keys"].items() if not key.endswith("relative_position_index")}
    assert {key: list(value.shape) for key, value in convert.to_official(native, model).items()} == kept
    assert convert.source_format(official) == "official" and convert.source_format(native) == "native"


# ---------------------------------------------------------------- merging


def test_a_new_merging_is_an_ordinary_convolution_then_batch_norm_then_exact_gelu():
    module = DeformableMerge(6, 8).train()
    x = torch.randn(2, 6, 8, 6)
    plain = nn.BatchNorm2d(8)(F.conv2d(x.permute(0, 3, 1, 2), module.conv.weight, module.conv.bias, stride=2))
    torch.testing.assert_close(module(x), F.gelu(plain).permute(0, 2, 3, 1), atol=1e-6, rtol=0)


def test_offsets_are_down_then_right_for_each_tap_row_by_row():
    module, x = DeformableMerge(1, 1).eval(), torch.randn(1, 6, 6, 1)
    with torch.no_grad():
        module.conv.weight.copy_(torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]]))  # sees the tap above right, number 1
        module.conv.bias.zero_()
        module.offset.bias.copy_(torch.tensor([9.0, 9, 2, -1, 9, 9, 9, 9]))  # which looks two rows down, one column left
        out = module(x)
    expected = F.gelu(F.pad(x[:, 2::2, 0::2], (0, 0, 0, 0, 0, 1)) / (1 + 1e-5) ** 0.5)  # row 2 * 2 + 2 is outside: zero
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_merging_runs_in_float32_under_bfloat16():
    module = DeformableMerge(8, 8).eval()
    nn.init.normal_(module.offset.weight)
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        exact, half = module(x), module.bfloat16()(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            automatic = module.float()(x)
    assert half.dtype == torch.bfloat16
    for other in (half, automatic):
        torch.testing.assert_close(other.float(), exact, atol=0.1, rtol=0)  # offsets of 8 bits; without the cast: no kernel


@pytest.mark.parametrize("cls", [LIT, LITTi])
def test_folding_batch_norm_keeps_the_output(cls):
    model, x = tiny(cls, **({"mlp_ratios": (2, 2, 2, 2)} if cls is LITTi else {})), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for stage in model.stages[1:]:
            stage.downsample.norm.running_mean.normal_()
            stage.downsample.norm.running_var.uniform_(0.5, 2)
        folded = backbones.fuse(model)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- positions


def test_position_bias_is_read_at_query_minus_key():
    table, (h, w) = torch.randn(5 * 3, 2), (3, 2)
    bias = position_bias(table, (h, w), h, w)
    for y, x, j, i in [(0, 0, 2, 1), (2, 1, 0, 0), (1, 0, 2, 0), (0, 1, 0, 0)]:
        expected = table[(y - j + h - 1) * (2 * w - 1) + (x - i + w - 1)]
        assert torch.equal(bias[:, y * w + x, j * w + i], expected)


def test_bias_tables_shrink_bicubically_without_antialiasing():
    table = torch.randn(9 * 9, 2)
    image = table.T.reshape(1, 2, 9, 9)
    small = F.interpolate(image, (3, 5), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert torch.equal(position_bias(table, (5, 5), 2, 3), position_bias(small, (2, 3), 2, 3))


def test_maps_of_equal_count_and_other_arrangement_get_resized_positions():
    """The authors compare token counts: 16 of 4x4 are taken for 2x8."""
    embedding = torch.randn(1, 16, 3)
    image = embedding.mT.reshape(1, 3, 4, 4)
    expected = F.interpolate(image, (2, 8), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    assert torch.equal(positions(embedding, (4, 4), 2, 8), expected)
    assert torch.equal(positions(embedding, (4, 4), 4, 4), embedding.unflatten(1, (4, 4)))


def test_the_entry_of_the_class_token_is_no_position_of_the_map():
    embedding = torch.randn(1, 5, 3)
    assert torch.equal(positions(embedding, (2, 2), 2, 2).flatten(1, 2), embedding[:, 1:])


@pytest.mark.parametrize("cls", [LIT, LITTi])
def test_set_input_size_changes_tables_once_and_no_output(cls):
    model, x, native = tiny(cls), torch.randn(1, 3, 96, 64), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before, native_before = model(x), model(native)
        model.set_input_size((64, 64))
        assert torch.equal(model(native), native_before)
        model.set_input_size((96, 64))
        assert torch.equal(model(x), before)
    sizes = [m.size for m in model.modules() if getattr(m, "size", None)]
    assert (3, 2) in sizes and (2, 2) not in sizes


@pytest.mark.parametrize("cls", [LIT, LITTi])
def test_weights_of_another_size_are_resampled_when_loaded(cls):
    small, x = tiny(cls), torch.randn(1, 3, 96, 128)
    large = tiny(cls, img_size=(96, 128))
    report = weights.load_checkpoint(large, convert.to_official(small.state_dict(), small))
    assert report.resized
    with torch.no_grad():
        assert torch.equal(large(x), small(x))


# ---------------------------------------------------------------- the two networks


def test_norms_have_the_epsilons_of_the_released_networks():
    relative = {m.eps for m in tiny().modules() if isinstance(m, nn.LayerNorm)}
    ti = tiny(LITTi)
    assert relative == {1e-5} and ti.patch_embed.norm.eps == 1e-5
    assert {m.eps for name, m in ti.named_modules() if isinstance(m, nn.LayerNorm) and "patch" not in name} == {1e-6}


def test_images_are_padded_in_lit_and_cut_in_lit_ti():
    x = torch.randn(1, 3, 66, 67)
    with torch.no_grad():
        assert torch.equal(tiny()(x), tiny()(F.pad(x, (0, 1, 0, 2))))
        assert torch.equal(tiny(LITTi)(x), tiny(LITTi)(x[..., :64, :64]))


@pytest.mark.parametrize("cls", [LIT, LITTi])
def test_any_size_from_the_minimum_on(cls):
    model = tiny(cls)
    for height, width in [(model.min_size, model.min_size), (45, 101), (128, 32)]:
        maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
        first = maps[0].shape[2:]
        assert [m.shape[2:] for m in maps] == [(first[0] >> i, first[1] >> i) for i in range(4)]
    with pytest.raises(ValueError, match=str(model.min_size)):
        model(torch.randn(1, 3, 64, model.min_size - 1))


def test_the_class_token_takes_part_in_the_last_stage_and_can_be_left_out():
    model, x = tiny(LITTi), torch.randn(1, 3, 64, 64)
    dense = LITTi(**TINY, class_token=False).eval()
    weights.load_checkpoint(dense, convert.to_official(model.state_dict(), model))
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(x)
        features, dense_maps = dense.forward_intermediates(x)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
        model.reset_classifier(0, "avg")
        torch.testing.assert_close(model(x), tokens[:, 1:].mean(1))
    assert tokens.shape == (1, 5, 16) and features.shape == (1, 16, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(maps[:3], dense_maps[:3])) and not torch.allclose(maps[3], dense_maps[3])
    with pytest.raises(ValueError, match="token"):
        LITTi(**TINY, class_token=False, global_pool="token")


def test_feature_norms_are_of_the_stages_asked_for():
    model, x = tiny(feature_norms=(1, 2, 3)), torch.randn(1, 3, 64, 64)
    maps = model.forward_intermediates(x, intermediates_only=True)
    plain = tiny()
    plain.load_state_dict(model.state_dict(), strict=False)
    raw = plain.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(maps[0], raw[0])
    for i in (1, 2, 3):
        torch.testing.assert_close(maps[i], model.feature_norms[str(i)](raw[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("cls", [LIT, LITTi])
def test_layer_decay_groups_follow_the_depth(cls):
    model = tiny(cls, depths=(1, 1, 2, 1))
    group = group_parameters(model, model.group_matcher(), reverse=True)
    assert group["patch_embed.proj.weight"] == 0
    names = ["stages.0.blocks.0.mlp.fc1.weight", "stages.1.downsample.conv.weight", "stages.2.blocks.0.attn.qkv.weight"]
    names += ["stages.2.blocks.1.attn.qkv.weight", "stages.3.downsample.offset.bias", "norm.weight"]
    order = [group[name] for name in names]
    assert order == sorted(order) and order[0] < order[1] < order[2] < order[3] < order[4]
    if cls is LITTi:
        assert group["stages.3.pos_embed"] == group["stages.3.cls_token"] == group["stages.3.downsample.conv.weight"]
    undecayed = {"LIT": "bias_table", "LITTi": "cls_token"}[cls.__name__]
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if name.endswith(undecayed)} != set()


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="windows"):
        timm.create_model("lit_s", windows=3)
