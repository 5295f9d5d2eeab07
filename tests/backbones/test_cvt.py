"""CvT against the authors' code."""

import golden
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import backbones
import weights
from backbones.cvt import Attention, CvT, QuickGeluMlp
from weights.convert import cvt as convert

TINY = {"dims": (8, 16, 24), "depths": (1, 1, 2), "heads": (1, 2, 3), "mlp_ratios": (2, 2, 2), "num_classes": 5}
ATTENTION = {
    "convolution": "dw_bn",
    "kernel": 3,
    "stride": 2,
    "padding": 1,
    "qkv_bias": True,
    "attn_drop": 0.0,
    "proj_drop": 0.0,
}


def from_official(kwargs: dict) -> CvT:
    """The model that the authors' configuration describes."""
    spec = kwargs["spec"]
    assert set(spec["STRIDE_Q"]) == {1} and all(p == k // 2 for p, k in zip(spec["PADDING_Q"], spec["KERNEL_QKV"]))
    return CvT(
        dims=spec["DIM_EMBED"],
        depths=spec["DEPTH"],
        heads=spec["NUM_HEADS"],
        mlp_ratios=spec["MLP_RATIO"],
        patches=list(zip(spec["PATCH_SIZE"], spec["PATCH_STRIDE"], spec["PATCH_PADDING"])),
        convolutions=spec["QKV_PROJ_METHOD"],
        kv=list(zip(spec["KERNEL_QKV"], spec["STRIDE_KV"], spec["PADDING_KV"])),
        class_tokens=spec["CLS_TOKEN"],
        qkv_bias=spec["QKV_BIAS"],
        in_chans=kwargs["in_chans"],
        num_classes=kwargs["num_classes"],
        drop_path_rate=spec["DROP_PATH_RATE"][-1],
    )


def tiny(seed: int = 0, **kwargs) -> CvT:
    """A small model whose BatchNorms have statistics and weights that are not the trivial ones."""
    torch.manual_seed(seed)
    model = CvT(**TINY | kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_()
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("case", golden.cases("cvt"))
@pytest.mark.parametrize("fused", [False, True])
def test_every_stored_tensor_is_reproduced(case, fused):
    info, tensors = golden.load(case)
    model = from_official(info["kwargs"]).eval()
    weights.load_checkpoint(model, golden.state(tensors))
    assert sum(p.numel() for p in model.parameters()) == info["num_params"]
    if fused:
        model = backbones.fuse(model)
    got = {}
    with torch.no_grad():
        x = model.embed(tensors["input"])
        for i, stage in enumerate(model.stages):
            x = stage(x)
            got |= {f"stage/{i}": x[0]} | ({} if x[1] is None else {f"extra/cls_token/{i}": x[1]})
        got["extra/pre_logits"] = model.forward_head(model.forward_features(tensors["input"]), pre_logits=True)
        got["output"] = model(tensors["input"])
    stored = {key: value for key, value in tensors.items() if key != "input" and not key.startswith("state/")}
    assert stored.keys() <= got.keys()
    for key, value in stored.items():
        torch.testing.assert_close(got[key], value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("variant", golden.variants("cvt"))
def test_every_official_variant_converts_and_converts_back(variant):
    facts = golden.official("cvt")[variant]
    model = timm.create_model(variant.removesuffix("_224"), device="meta")
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    official = {key: torch.empty(shape, device="meta") for key, shape in facts["keys"].items()}
    native = weights.convert_state_dict(official, model)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in model.state_dict().items()}
    back = convert.to_official(native, model)
    assert {key: list(value.shape) for key, value in back.items()} == facts["keys"]
    assert convert.source_format(official) == "official" and convert.source_format(native) == "native"
    assert weights.convert_state_dict(native, model).keys() == native.keys()


def huggingface_name(key: str) -> str:
    """The name that Hugging Face's conversion script gives an official tensor, written out independently of the converter."""
    parts = key.split(".")
    if parts[0] in ("norm", "head"):
        return {"norm": "layernorm", "head": "classifier"}[parts[0]] + "." + parts[1]
    start = f"cvt.encoder.stages.{parts[0].removeprefix('stage')}"
    if parts[1] == "cls_token":
        return f"{start}.cls_token"
    if parts[1] == "patch_embed":
        name = {"proj": "projection", "norm": "normalization"}[parts[2]]
        return f"{start}.embedding.convolution_embeddings.{name}.{parts[3]}"
    start, rest, words = f"{start}.layers.{parts[2]}", parts[3:], {"q": "query", "k": "key", "v": "value"}
    if rest[0] in ("norm1", "norm2"):
        return f"{start}.layernorm_{'before' if rest[0] == 'norm1' else 'after'}.{rest[1]}"
    if rest[0] == "mlp":
        return f"{start}.{'intermediate' if rest[1] == 'fc1' else 'output'}.dense.{rest[2]}"
    if rest[1].startswith("conv_proj_"):
        kind = {"conv": "convolution", "bn": "normalization"}[rest[2]]
        name = f"convolution_projection_{words[rest[1][-1]]}.convolution_projection.{kind}"
        return f"{start}.attention.attention.{name}.{rest[3]}"
    if rest[1] == "proj":
        return f"{start}.attention.output.dense.{rest[2]}"
    return f"{start}.attention.attention.projection_{words[rest[1][-1]]}.{rest[2]}"


def test_hugging_face_names_are_the_same_tensors():
    model = tiny()
    official = convert.to_official(model.state_dict(), model)
    foreign = {huggingface_name(key): value for key, value in official.items()}
    assert convert.source_format(foreign) == "huggingface" and len(foreign) == len(official)
    report = weights.load_checkpoint(other := tiny(1), foreign)
    assert not report.missing and not report.unexpected
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def test_a_batch_of_one_keeps_its_batch_axis():
    assert tiny()(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_activations_are_quick_gelus_and_norms_have_the_usual_epsilon():
    mlp, x = QuickGeluMlp(4, 8, 0.0), torch.randn(3, 4)
    hidden = mlp.fc1(x)
    torch.testing.assert_close(mlp(x), mlp.fc2(hidden * torch.sigmoid(1.702 * hidden)))
    assert {m.eps for m in tiny().modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)} == {1e-5}
    assert {m.momentum for m in tiny().modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_attention_is_scaled_by_the_width_and_the_class_token_skips_the_convolutions():
    torch.manual_seed(0)
    attention = Attention(12, 3, class_token=True, **ATTENTION).eval()
    x, (height, width) = torch.randn(2, 1 + 35, 12), (5, 7)
    image = x[:, 1:].transpose(1, 2).reshape(2, 12, height, width)
    q, k, v = (
        layer(torch.cat([x[:, :1], conv(image).flatten(2).transpose(1, 2)], 1)).reshape(2, -1, 3, 4).transpose(1, 2)
        for layer, conv in (
            (attention.proj_q, attention.conv_proj_q),
            (attention.proj_k, attention.conv_proj_k),
            (attention.proj_v, attention.conv_proj_v),
        )
    )
    assert q.shape[2] == 36 and k.shape[2] == 1 + 3 * 4  # floor((side - 1) / 2) + 1 keys a side
    out = ((q @ k.transpose(2, 3)) * 12**-0.5).softmax(-1) @ v
    torch.testing.assert_close(attention(x, height, width), attention.proj(out.transpose(1, 2).flatten(2)))


def test_the_convolution_comes_before_the_linear_layer_and_has_no_activation():
    attention = Attention(4, 1, class_token=False, **ATTENTION).eval()
    conv = attention.conv_proj_q
    x = -torch.rand(1, 4, 6, 6)
    with torch.no_grad():
        conv.bn.running_var.fill_(2.0)
        expected = F.batch_norm(
            F.conv2d(x, conv.conv.weight, padding=1, groups=4), conv.bn.running_mean, conv.bn.running_var, eps=1e-5
        )
        torch.testing.assert_close(conv(x), expected)
        assert expected.min() < 0 < expected.max()  # an activation would show


def test_qkv_bias_is_of_the_three_projections_only():
    attention = Attention(4, 1, class_token=False, **ATTENTION | {"qkv_bias": False})
    assert attention.proj_q.bias is attention.proj_k.bias is attention.proj_v.bias is None
    assert attention.proj.bias is not None


def test_average_pooling_is_one_map_for_keys_and_values_and_counts_the_padding():
    attention = Attention(4, 1, class_token=False, **ATTENTION | {"convolution": "avg"})
    x = torch.ones(1, 4, 4, 5)
    assert attention.conv_proj_q(x) is x and attention.conv_proj_v is None
    assert attention.conv_proj_k(x)[0, 0, 0, 0].item() == pytest.approx(4 / 9)
    assert attention.conv_proj_k(x).shape[-2:] == (3, 3)  # ceil mode: the convolution gives (2, 3)
    assert attention.conv_proj_k(x)[0, 0, 2, 1].item() == pytest.approx(3 / 6)  # the overhang does not count


def test_stochastic_depth_is_only_in_the_last_stage():
    rates = [[block.drop_path.drop_prob for block in stage.blocks] for stage in tiny(drop_path_rate=0.3).stages]
    assert rates == [[0.0], [0.0], [0.0, 0.3]]


@pytest.mark.parametrize("size", [(3, 3), (33, 70), (64, 47)])
def test_any_size_runs_with_the_sizes_of_convolution_arithmetic(size):
    x = torch.randn(2, 3, *size)
    maps = tiny().forward_intermediates(x, intermediates_only=True)
    grid = [(side - 3) // 4 + 1 for side in size]
    for channels, image in zip(TINY["dims"], maps):
        assert list(image.shape) == [2, channels, *grid]
        grid = [(side - 1) // 2 + 1 for side in grid]
    with pytest.raises(ValueError, match="at least 3 pixels"):
        tiny()(torch.randn(1, 3, 2, 9))


def test_features_are_the_tokens_class_token_first_and_the_head_reads_it():
    model, x = tiny(), torch.randn(2, 3, 64, 48)
    features = model.forward_features(x)
    assert features.shape == (2, 1 + 4 * 3, model.num_features) and model.num_features == model.head_hidden_size == 24
    pair = model.embed(x)
    for stage in model.stages:
        pair = stage(pair)
    token = F.layer_norm(pair[1], (24,), model.norm.weight, model.norm.bias)
    torch.testing.assert_close(model(x), model.head.fc(token[:, 0]))
    torch.testing.assert_close(features[:, :1], token)
    maps = model.forward_intermediates(x, norm=True, intermediates_only=True)
    torch.testing.assert_close(maps[-1].flatten(2).mT, features[:, 1:])
    model.reset_classifier(3, "avg")
    torch.testing.assert_close(model(x), model.head.fc(features[:, 1:].mean(1)))


def test_without_a_class_token_features_are_a_map():
    model = tiny(class_tokens=(False, False, False))
    assert model.num_prefix_tokens == 0 and model.forward_features(torch.randn(2, 3, 64, 48)).shape == (2, 24, 4, 3)


def test_classifiers_are_replaced_and_removed():
    model, x = tiny(), torch.randn(2, 3, 64, 48)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 1 + 4 * 3, 24)
    with pytest.raises(ValueError, match="need pooled features"):
        model.reset_classifier(3)
    model.reset_classifier(3, "token")
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match="'avg', .* for this model, got 'token'"):
        tiny(class_tokens=(False, False, False), global_pool="token")


def test_layer_decay_groups_follow_the_depth():
    model = tiny()
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    order = ["patch_embed.proj.weight"] + [f"stages.{i}.blocks.0.norm1.weight" for i in range(3)]
    order += ["stages.2.blocks.1.norm1.weight", "head.fc.weight"]
    assert [groups[name] for name in order] == list(range(6))
    assert groups["stages.2.cls_token"] == groups["stages.2.downsample.proj.weight"] == groups["stages.2.blocks.0.norm1.weight"]
    assert model.no_weight_decay() == {"stages.2.cls_token"}


def test_gradient_checkpointing_changes_nothing_and_every_parameter_gets_a_gradient():
    x, grads = torch.randn(2, 3, 64, 48), []
    for enable in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda m, name=name: f"{name}: {m}")


def test_features_only_gives_maps_of_any_stage_and_drops_the_rest():
    model = timm.create_model("cvt_13", features_only=True, out_indices=(1, 0)).eval()
    assert len(model.model.stages) == 2 and model.feature_info.reduction() == [8, 4]
    assert [m.shape[1:] for m in model(torch.randn(1, 3, 64, 96))] == [(192, 8, 12), (64, 16, 24)]


def test_export_keeps_batch_height_and_width_open():
    model = tiny(dims=(8, 16), depths=(1, 1), heads=(1, 2), class_tokens=(False, True))  # two stages show it in half the time
    sides = {2: torch.export.Dim("height", min=48, max=512), 3: torch.export.Dim("width", min=48, max=512)}
    dims = {0: torch.export.Dim("batch", max=64)} | sides
    program = torch.export.export(model, (torch.randn(2, 3, 64, 80),), dynamic_shapes=(dims,))
    with torch.no_grad():
        for size in [(3, 3, 48, 70), (1, 3, 97, 64)]:
            x = torch.randn(size)
            torch.testing.assert_close(program.module()(x), model(x), atol=1e-6, rtol=1e-5)


def test_fusing_leaves_the_model_alone_and_no_batch_norm():
    model, x = tiny().train(), torch.randn(2, 3, 64, 48)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = backbones.fuse(model)
    assert model.training and not fused.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d | timm.layers.QuickGELU) for m in fused.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model.eval()(x), atol=1e-5, rtol=1e-5)
