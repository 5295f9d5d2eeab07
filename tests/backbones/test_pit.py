"""PiT against the authors' code and timm's."""

import golden
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import backbones  # noqa: F401
import weights
from backbones.pit import PiT, Pool, resize_to
from weights.convert import pit as convert

TINY = {"img_size": 48, "base_dims": (8, 8, 8), "depths": (1, 2, 1), "heads": (1, 2, 4), "mlp_ratio": 2, "num_classes": 5}


def from_official(kwargs: dict) -> PiT:
    """The model that the authors' constructor arguments describe."""
    return PiT(
        img_size=kwargs["image_size"],
        patch_size=kwargs["patch_size"],
        stride=kwargs["stride"],
        base_dims=kwargs["base_dims"],
        depths=kwargs["depth"],
        heads=kwargs["heads"],
        mlp_ratio=kwargs["mlp_ratio"],
        num_classes=kwargs.get("num_classes", 1000),
        distilled=kwargs.get("distilled", False),
        drop_path_rate=kwargs.get("drop_path_rate", 0.0),
    )


def tiny(seed: int = 0, **kwargs) -> PiT:
    torch.manual_seed(seed)
    return PiT(**TINY | kwargs).eval()


@pytest.mark.parametrize("case", golden.cases("pit"))
def test_every_stored_tensor_is_reproduced(case):
    info, tensors = golden.load(case)
    model = from_official(info["kwargs"]).eval()
    weights.load_checkpoint(model, golden.state(tensors))
    got = {}
    with torch.no_grad():
        x = model.embed(tensors["input"])
        got["stem"] = model.patch_embed(tensors["input"])
        for i, stage in enumerate(model.stages):
            x = stage(x)
            got |= {f"stage/{i}": x[0], f"cls/{i}": x[1]}
        got |= {"normed": model.forward_features(tensors["input"]), "output": model(tensors["input"])}
    stored = {key: value for key, value in tensors.items() if key != "input" and not key.startswith("state/")}
    assert stored.keys() <= got.keys()
    for key, value in stored.items():
        torch.testing.assert_close(got[key], value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")
    assert sum(p.numel() for p in model.parameters()) == info["parameter_count"]


@pytest.mark.parametrize("variant", golden.variants("pit"))
def test_every_official_variant_converts_and_converts_back(variant):
    facts = golden.official("pit")[variant]
    model = timm.create_model(variant, device="meta")
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    official = {key: torch.empty(shape, device="meta") for key, shape in facts["keys"].items()}
    native = weights.convert_state_dict(official, model)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in model.state_dict().items()}
    back = convert.to_official(native, model)
    assert {key: list(value.shape) for key, value in back.items()} == facts["keys"]
    assert convert.source_format(official) == "official" and convert.source_format(native) == "native"


@pytest.mark.parametrize("distilled", [False, True])
def test_timm_weights_give_timm_logits(distilled):
    torch.manual_seed(0)
    peer = timm.create_model("pit_ti_distilled_224" if distilled else "pit_ti_224", img_size=64, num_classes=7).eval()
    model = timm.create_model("pit_ti_distilled" if distilled else "pit_ti", img_size=64, num_classes=7).eval()
    state = peer.state_dict()
    assert convert.source_format(state) == "timm"
    model.load_state_dict(weights.convert_state_dict(state, model), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), peer(x), atol=2e-6, rtol=1e-5)  # fp32, 12 blocks: 1e-6 seen


def test_converting_twice_changes_nothing():
    model = tiny(distilled=True)
    once = weights.convert_state_dict(convert.to_official(model.state_dict(), model), model)
    twice = weights.convert_state_dict(once, model)
    assert once.keys() == twice.keys() == model.state_dict().keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)


@pytest.mark.parametrize("size", [(16, 16), (48, 48), (50, 91), (97, 64)])
def test_any_size_runs_and_the_stem_does_not_pad(size):
    model = tiny()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
        assert model(torch.randn(2, 3, *size)).shape == (2, 5)
    grid = [(side - 16) // 8 + 1 for side in size]
    for i, x in enumerate(maps):
        assert list(x.shape) == [2, model.feature_info[i]["num_chs"], *grid]
        grid = [(side + 1) // 2 for side in grid]


def test_too_small_images_are_refused_with_the_minimum():
    with pytest.raises(ValueError, match="at least 16 pixels"):
        tiny()(torch.randn(1, 3, 15, 40))
    with pytest.raises(ValueError, match="at least 16 pixels"):
        tiny(img_size=(12, 64))


def test_the_position_embedding_is_used_as_it_is_at_the_native_size_and_resized_elsewhere():
    model = tiny()
    assert resize_to(model.pos_embed, torch.empty(1, 8, 5, 5)) is model.pos_embed
    resized = F.interpolate(model.pos_embed, (7, 3), mode="bicubic", align_corners=False)
    assert torch.equal(resize_to(model.pos_embed, torch.empty(1, 8, 7, 3)), resized)
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        at_run_time = model(x)
        model.set_input_size((64, 32))
        assert model.pos_embed.shape[-2:] == (7, 3) and model.pos_embed.requires_grad
        assert torch.equal(model(x), at_run_time)
        # loading the 48 pixel weights into a 64x32 model resizes the same way
        other = tiny(1, img_size=(64, 32))
        weights.load_checkpoint(other, tiny().state_dict())
        assert torch.equal(other(x), at_run_time)


def test_an_open_size_goes_through_a_resize_that_is_exact_at_the_native_size():
    embedding = torch.randn(1, 8, 27, 27)
    assert torch.equal(F.interpolate(embedding, (27, 27), mode="bicubic", align_corners=False), embedding)


def test_class_tokens_get_no_position_embedding():
    model = tiny()
    with torch.no_grad():
        model.pos_embed.fill_(3.0)
        _, tokens = model.embed(torch.randn(2, 3, 48, 48))
    assert torch.equal(tokens, model.cls_token.expand(2, -1, -1))


def test_the_map_is_pooled_by_channel_groups_and_the_tokens_by_one_shared_layer():
    pool = Pool(4, 8)
    with torch.no_grad():
        pool.conv.weight.zero_()
        pool.conv.weight[:, :, 1, 1] = 1
        pool.conv.bias.zero_()
        x = torch.randn(1, 4, 5, 4)
        x_out, tokens = pool((x, torch.ones(1, 2, 4)))
    assert torch.equal(x_out, x[:, :, ::2, ::2].repeat_interleave(2, 1))  # output channel c reads input channel c // 2
    assert torch.equal(tokens[:, 0], tokens[:, 1])


def test_only_class_tokens_are_normalised_and_maps_are_not():
    model = tiny()
    with torch.no_grad():
        nn.init.constant_(model.norm.weight, 7.0)
        x = torch.randn(1, 3, 48, 48)
        plain = model.forward_intermediates(x, norm=False)
        normed = model.forward_intermediates(x, norm=True)
    assert all(torch.equal(a, b) for a, b in zip(plain[1], normed[1]))
    assert normed[0].shape == (1, 1, 32) and torch.equal(normed[0], model.forward_features(x))


def test_norms_have_the_small_epsilon_and_activations_are_exact_gelus():
    model = tiny()
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} == {"none"}


def test_stochastic_depth_follows_the_authors_and_never_reaches_the_rate():
    model = tiny(drop_path_rate=0.4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_distilled_logits_are_the_mean_in_eval_and_a_pair_in_distilled_training():
    model = tiny(distilled=True)
    x = torch.randn(2, 3, 48, 48)
    tokens = model.forward_features(x)
    main, distillation = model.head.fc(tokens[:, 0]), model.head.fc_dist(tokens[:, 1])
    torch.testing.assert_close(model(x), (main + distillation) / 2)
    model.train()
    torch.testing.assert_close(model(x), (main + distillation) / 2)
    model.set_distilled_training()
    pair = model(x)
    torch.testing.assert_close(pair[0], main)
    torch.testing.assert_close(pair[1], distillation)
    assert isinstance(model.eval()(x), torch.Tensor)  # never a pair in eval
    with pytest.raises(ValueError, match="no distillation token"):
        tiny().set_distilled_training()


@pytest.mark.parametrize("distilled", [False, True])
def test_classifiers_are_replaced_and_removed(distilled):
    model = tiny(distilled=distilled)
    x = torch.randn(2, 3, 48, 48)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 1 + distilled, 32)
    with pytest.raises(ValueError, match="global_pool must be"):
        model.reset_classifier(3, "avg")
    with pytest.raises(ValueError, match="need global_pool='token'"):
        model.reset_classifier(3, "")


def test_layer_decay_groups_follow_the_depth():
    model = tiny(distilled=True)
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert {groups[name] for name in ("pos_embed", "cls_token", "patch_embed.weight")} == {0}
    order = ["stages.0.blocks.0.norm1.weight", "stages.1.blocks.0.norm1.weight", "stages.1.blocks.1.norm1.weight"]
    order += ["stages.2.blocks.0.norm1.weight", "head.fc.weight"]
    assert sorted(order, key=groups.get) == order and len({groups[name] for name in order}) == 5
    assert groups["stages.2.downsample.conv.weight"] == groups["stages.2.blocks.0.norm1.weight"]
    assert groups["norm.weight"] == groups["stages.2.blocks.0.norm1.weight"]
    assert groups["head.fc_dist.weight"] == groups["head.fc.weight"] == max(groups.values())
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


def test_features_only_gives_maps_of_any_stage_and_drops_the_rest():
    kwargs = {"features_only": True, "img_size": 64}
    maps = timm.create_model("pit_ti", **kwargs).eval()(torch.randn(1, 3, 70, 96))
    assert [m.shape[1] for m in maps] == [64, 128, 256]
    first = timm.create_model("pit_ti_distilled", out_indices=(-2, 0), **kwargs)
    assert len(first.model.stages) == 2
    assert [m.shape[1] for m in first(torch.randn(1, 3, 64, 64))] == first.feature_info.channels() == [128, 64]


def test_gradient_checkpointing_changes_nothing_and_every_parameter_gets_a_gradient():
    model, x = tiny(distilled=True).train(), torch.randn(2, 3, 48, 48)
    model(x).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=lambda m, name=name: f"{name}: {m}")


def test_export_keeps_batch_height_and_width_open():
    model = tiny()
    sides = {2: torch.export.Dim("height", min=48, max=512), 3: torch.export.Dim("width", min=48, max=512)}
    dims = {0: torch.export.Dim("batch", max=64)} | sides
    program = torch.export.export(model, (torch.randn(2, 3, 56, 72),), dynamic_shapes=(dims,))
    with torch.no_grad():
        for size in [(3, 3, 48, 48), (1, 3, 90, 64)]:
            x = torch.randn(size)
            torch.testing.assert_close(program.module()(x), model(x), atol=1e-6, rtol=1e-5)
