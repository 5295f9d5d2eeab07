"""Token merging against the authors' code, and on every kind of ViT that timm has."""

import copy

import golden
import pytest
import timm
import torch
from torch import nn
from vits import KINDS, OTHERS, small

import backbones  # noqa: F401  (registers our models with timm)
import heads
from backbones import edits
from backbones.edits.merging import Match, MergingStream, match, merge, schedule, token_merging
from backbones.vit import Skip, restream

MODELS = golden.cases("edit_tome_", exclude="edit_tome_op")
RUN = [2, 3, 1]  # pairs merged in the three blocks of the small models


def with_zero_schedule(model: nn.Module) -> nn.Module:
    """The model run through the stream although nothing is merged."""
    restream(model, MergingStream)
    model.merged_per_block, model.prop_attn = [0] * len(model.blocks), True
    return model


@pytest.mark.parametrize("case", golden.cases("edit_tome_op"))
def test_matching_and_merging_are_the_authors(case):
    info, tensors = golden.load(case)
    for name, what in info["cases"].items():
        t = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        prefix = what["class_token"] + what["distill_token"]
        r = min(what["r"], (t["x"].shape[1] - prefix) // 2)
        same = torch.arange(t["x"].shape[1]).expand(t["x"].shape[:2])
        found = match(t["metric"], r, prefix) if r else Match(same, same)
        size = t["size"][..., 0]
        total = torch.zeros(found.leader.shape).scatter_add(1, found.target, size)
        merged = merge(t["x"], size, total, found)
        got = {"merged": merged, "merged_size": total[..., None]}
        got["unmerged"] = merged.gather(1, found.target[..., None].expand_as(t["x"]))
        got["source"] = nn.functional.one_hot(found.target, merged.shape[1]).mT.to(merged.dtype)
        for key, value in got.items():
            torch.testing.assert_close(value, t[key], **golden.tolerance(info), msg=lambda m, at=f"{name}/{key}": f"{at}: {m}")


@pytest.mark.parametrize("case", golden.cases("edit_tome_op"))
def test_schedules_are_the_authors(case):
    for name, what in golden.load(case)[0]["schedules"].items():
        r, inflect = what["r"] if what["r_kind"] == "tuple" else (what["r"], 0.0)
        assert schedule(r, inflect, what["blocks"]) == what["result"], name


@pytest.mark.parametrize("case", MODELS)
def test_every_stored_tensor_is_reproduced(case):
    info, tensors = golden.load(case)
    plain = timm.create_model(info["model"], **info["kwargs"]).eval()
    plain.load_state_dict(golden.state(tensors))
    what, x = info["edit"], tensors["input"]
    r = {"r": what["schedule"]}
    if what.get("r_kind") == "tuple":
        r = dict(zip(("r", "inflect"), what["r"]))
    elif "r" in what:
        r = {"r": what["r"]}
    model = token_merging(copy.deepcopy(plain), **r, prop_attn=what["prop_attn"])
    with torch.no_grad():
        got = {"stage/base_output": plain(x), "output": model(x)}
        unweighted = token_merging(copy.deepcopy(plain), **r, prop_attn=False)
        got["stage/noprop_output"] = unweighted(x)
        for i, tokens in enumerate(model.stream(x), -1):
            ones = torch.ones(tokens.x.shape[:2])
            sizes = ones if tokens.size is None else tokens.size
            got |= {f"stage/tokens_{i}": tokens.x, f"stage/size_{i}": sizes[..., None], f"stage/unmerged_{i}": tokens.full()}
    got |= {"stage/group": tokens.group, "stage/representative": tokens.leader}
    got["stage/source"] = nn.functional.one_hot(tokens.group, tokens.x.shape[1]).mT.float()
    if "stage/weighted_output" in tensors:  # there the authors' patch takes a plain mean over merged tokens
        got["stage/weighted_output"] = got["output"]
        with torch.no_grad():
            for key, one in (("output", model), ("stage/noprop_output", unweighted)):
                got[key] = one.forward_head(one.norm(list(one.stream(x))[-1].x))
    if not what["prop_attn"]:
        tensors.pop("stage/noprop_output", None)
    for key, value in tensors.items():
        if not key.startswith(("state/", "input")):
            torch.testing.assert_close(got[key], value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_no_merging_is_the_model_itself_to_the_bit(name):
    plain, x = small(name)
    model = with_zero_schedule(copy.deepcopy(plain))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        final, maps = model.forward_intermediates(x, norm=True)
        expected, expected_maps = plain.forward_intermediates(x, norm=True)
    assert torch.equal(final, expected) and all(torch.equal(a, b) for a, b in zip(maps, expected_maps, strict=True))
    assert token_merging(plain, r=0) is plain


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_merged_models_keep_the_input_grid_and_their_names(name):
    plain, x = small(name)
    model = token_merging(copy.deepcopy(plain), RUN)
    assert list(model.state_dict()) == list(plain.state_dict()) and isinstance(model, type(plain))
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert [m.shape for m in maps] == [m.shape for m in plain.forward_intermediates(x)[1]]
        tokens = list(model.stream(x))
        count, prefix = tokens[0].x.shape[1], model.num_prefix_tokens
        assert [t.x.shape[1] for t in tokens] == [count, count - 2, count - 5, count - 6]
        assert torch.equal(tokens[-1].size.sum(1), torch.full((2,), float(count)))
        assert (tokens[-1].size[:, :prefix] == 1).all() and (tokens[-1].group[:, :prefix] == torch.arange(prefix)).all()
        assert torch.equal(final, model.forward_features(x)) and not torch.equal(model(x), plain(x))
        torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]))  # images do not see each other


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_the_parts_of_a_block_are_the_block(name):
    """A first merge of the last block's tokens changes nothing before it, and attention by parts is the model's."""
    plain, x = small(name)
    model = token_merging(copy.deepcopy(plain), [0, 0, 1])
    with torch.no_grad():
        merged, before = list(model.stream(x)), list(with_zero_schedule(plain).stream(x))
    assert torch.equal(merged[2].x, before[2].x)
    alone = (merged[3].size == 1)[..., None] & torch.ones_like(merged[3].x, dtype=torch.bool)
    expected = before[3].x.gather(1, merged[3].leader[..., None].expand_as(merged[3].x))
    torch.testing.assert_close(merged[3].x[alone], expected[alone])  # tokens that were not merged saw the same attention


@pytest.mark.parametrize("name", OTHERS.values(), ids=OTHERS)
def test_models_with_other_blocks_are_refused_with_the_reason(name):
    model, x = small(name)
    with pytest.raises(ValueError, match="understood are|is not one of timm's"):
        token_merging(model, 2)
    assert token_merging(model, 0) is model


def test_models_that_are_no_flat_vit_are_refused():
    for name in ("swin_tiny_patch4_window7_224", "resnet18", "samvit_base_patch16", "cait_xxs24_224", "nat_mini"):
        model = timm.create_model(name, device="meta")
        with pytest.raises(ValueError, match=f"{type(model).__name__} is not one of timm's"):
            token_merging(model, 4)


def test_wrong_arguments_and_a_second_merging_are_one_sentence():
    model, x = small("vit_tiny_patch16_224")
    for args, message in (
        ({"r": -1}, "needs r of at least 0"),
        ({"r": [1, 2], "inflect": 1.0}, "with one r for each block"),
    ):
        with pytest.raises(ValueError, match=message):
            token_merging(model, **args)
    token_merging(model, 2)
    with pytest.raises(ValueError, match="merges tokens already"):
        token_merging(model, 2)
    with pytest.raises(ValueError, match="takes no attention mask"):
        model(x, attn_mask=torch.zeros(21, 21))


def test_more_pairs_than_there_are_leave_half_of_the_patches():
    model, x = small("vit_tiny_patch16_224")
    token_merging(model, 99)
    with torch.no_grad():
        assert [t.x.shape[1] for t in model.stream(x)] == [21, 11, 6, 4]


def test_merged_twins_change_nothing_under_proportional_attention():
    """Two equal tokens, no positions: what they become as one is what each was."""
    model, x = small("vit_tiny_patch16_224", pos_embed="none", depth=2)
    x[..., 16:32] = x[..., :16]  # in every row of patches the second equals the first
    merged = token_merging(copy.deepcopy(model), [4, 0])
    with torch.no_grad():
        pairs = list(merged.stream(x))[1]
        assert sorted(pairs.size[0].tolist()) == [1.0] * 13 + [2.0] * 4
        torch.testing.assert_close(merged.forward_features(x), model.forward_features(x), atol=1e-5, rtol=1e-5)
        merged.prop_attn = False
        assert (merged.forward_features(x) - model.forward_features(x)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_gradients_pass_and_are_the_same_under_checkpointing(name):
    model, x = small(name)
    token_merging(model, RUN)
    grads = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() >= {"blocks.0.attn.proj.weight", "patch_embed.proj.weight"}
    for key, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][key])


def test_feature_wrappers_dense_heads_copies_and_autocast():
    torch.manual_seed(0)
    shape = {"embed_dim": 48, "depth": 3, "num_heads": 2, "img_size": 64}
    x = torch.randn(1, 3, 64, 64)
    wrapped = timm.create_model("vit_small_patch16_dinov3", features_only=True, **shape).eval()
    with torch.no_grad():
        plain = wrapped(x)
        maps = edits.apply(wrapped, [{"name": "token_merging", "r": 3}])(x)
        assert [m.shape for m in maps] == [m.shape for m in plain] and not torch.equal(maps[-1], plain[-1])
    for head in ("linear", "fpn", "dpt"):
        args = {"embed_dim": 48, "depth": 3, "num_heads": 2}
        net = heads.DensePredictor("vit_small_patch14_reg4_dinov2", head, 4, backbone_args=args, img_size=56).eval()
        edits.apply(net, [{"name": "token_merging", "r": 3}])
        with torch.no_grad():
            out = net(torch.randn(1, 3, 56, 56))
            assert out.shape == (1, 4, 56, 56) and out.isfinite().all()
    model = token_merging(small("vit_small_patch16_dinov3")[0], RUN)
    again = copy.deepcopy(model)
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and type(again) is type(model)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), again(x).float())


def test_dynamic_sizes_are_merged_on_their_own_grid():
    model, _ = small("vit_small_patch14_reg4_dinov2", dynamic_img_size=True)
    token_merging(model, RUN)
    with torch.no_grad():
        _, maps = model.forward_intermediates(torch.randn(1, 3, 42, 98))
    assert maps[-1].shape == (1, 48, 3, 7)


def test_a_block_left_out_merges_nothing():
    model, x = small("vit_tiny_patch16_224")
    model.blocks[1] = Skip()
    token_merging(model, 2)
    with torch.no_grad():
        assert [t.x.shape[1] for t in model.stream(x)] == [21, 19, 19, 17]


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_an_exported_program_merges_too(name):
    model, x = small(name)
    token_merging(model, RUN)
    program = torch.export.export(model, (x,))
    other = torch.randn_like(x)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.slow
def test_the_compiled_model_merges_too():
    model, x = small("vit_small_patch16_dinov3")
    token_merging(model, RUN)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(x), model(x))


ALL = [name for family in ("vit*", "deit*", "beit*", "eva*") for name in timm.list_models(family)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_no_merging_is_the_model_itself_for_every_model_of_timm(name):
    """Also what the short list is chosen from: each model is either run by its parts or refused."""
    plain, x = small(name)
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(token_merging(plain, 0)(x), expected)
        try:
            model = with_zero_schedule(plain)
        except ValueError as error:
            assert "understood are" in str(error) or "is not one of timm's" in str(error)
            return
        assert torch.equal(model(x), expected)
        model.merged_per_block = [1] * len(model.blocks)
        assert model(x).shape == expected.shape
