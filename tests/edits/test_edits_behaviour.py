"""What every edit must survive, alone and beside the others, and what each promises."""

import copy
import itertools

import pytest
import timm
import torch
from torch import nn
from vits import small

import backbones  # noqa: F401
import heads
from backbones import edits
from backbones.analysis.heads import head_importance
from backbones.edits import depth, initialisation
from backbones.edits.progressive_norm import merge_prepbn
from backbones.edits.sigma import merge_sigma
from backbones.prepbn import Affine, PRepBN
from backbones.vit import Skip, project, rotate

ARGS = {
    "deepnet": {},
    "drop_blocks": {"blocks": [1]},
    "expand_depth": {"depth": 4},
    "irpe": {"rpe_on": "qk"},
    "mimetic_init": {},
    "prepbn": {"steps": 4},
    "prune": {"neurons": {"0": [1, 3], 2: [0]}},
    "relu_attention": {},
    "repeat_blocks": {"order": [0, 1, 1, 2]},
    "sigma_reparam": {},
    "sub_ln": {},
    "test_time_registers": {"num_registers": 2},
    "token_merging": {"r": 2},
    "topk_mlp": {"k": 20},
}
VITS = ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"]
PLAIN_BLOCKS = ("deepnet",)  # edits of VisionTransformer alone
CASES = [
    (name, vit)
    for name in ARGS
    for vit in ("vit_tiny_patch16_224", "vit_small_patch16_dinov3")
    if vit == "vit_tiny_patch16_224" or name not in PLAIN_BLOCKS
]


def edited(model: nn.Module, *names: str) -> nn.Module:
    return edits.apply(model, [{"name": name, **ARGS[name]} for name in names])


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def test_every_edit_is_here():
    assert ARGS.keys() == edits.EDITS.keys()


@pytest.mark.parametrize(("name", "vit"), CASES)
def test_edited_models_run_copy_save_load_and_give_maps(name, vit):
    plain, x = small(vit)
    model = edited(copy.deepcopy(plain), name)
    other = edited(small(vit, seed=1)[0], name)
    with torch.no_grad():
        out = model(x)
        assert out.shape == (2, 7) and out.isfinite().all()
        other.load_state_dict(model.state_dict())
        close(other(x), out)
        close(copy.deepcopy(model)(x), out)
        final, maps = model.forward_intermediates(x)
        assert len(maps) == len(model.blocks) == len(model.feature_info) and all(m.shape == (2, 48, 4, 5) for m in maps)
        close(final, model.forward_features(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).isfinite().all()


@pytest.mark.parametrize(("name", "vit"), CASES)
def test_edited_models_train_the_same_under_checkpointing(name, vit):
    model, x = edited(small(vit)[0], name), None
    _, x = small(vit)
    model.eval()  # counters and singular vectors move at every call in training, as their edits say
    grads = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for key, value in grads[0].items():
        close(grads[1][key], value, 1e-4)
    model.train()
    model(x).sum().backward()


@pytest.mark.parametrize("name", ARGS)
def test_edited_backbones_serve_a_dense_head(name):
    torch.manual_seed(0)
    args = {"embed_dim": 48, "depth": 3, "num_heads": 2, "dynamic_img_size": True}
    net = heads.DensePredictor("vit_tiny_patch16_224", "fpn", 4, backbone_args=args).eval()
    if name in ("repeat_blocks", "expand_depth"):  # another depth: the levels of the head are those of the old one
        with pytest.raises(ValueError, match="under a head"):
            edited(net, name)
        return
    edited(net, name)
    with torch.no_grad():
        assert net(torch.randn(1, 3, 48, 80)).shape == (1, 4, 48, 80)


@pytest.mark.parametrize(("name", "vit"), CASES)
def test_feature_wrappers_are_edited_inside(name, vit):
    torch.manual_seed(0)
    args = {"embed_dim": 48, "depth": 3, "num_heads": 2, "img_size": (64, 80)}
    wrapper = timm.create_model(vit, features_only=True, out_indices=(0, 2), **args).eval()
    if name in ("repeat_blocks", "expand_depth"):  # the wrapper has noted the levels of the old depth
        with pytest.raises(ValueError, match="the number of blocks changes"):
            edited(wrapper, name)
        return
    x = torch.randn(2, 3, 64, 80)
    edited(wrapper, name)
    with torch.no_grad():
        maps = wrapper(x)
        expected = wrapper.model.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 48, 4, 5)] * 2
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


QUICK = [("token_merging", "vit_tiny_patch16_224")]  # one in the gate: tracing takes seconds
TRACED = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.slow  # in the gate: test_token_merging.py's
@pytest.mark.parametrize(("name", "vit"), CASES)
def test_edited_models_export(name, vit):
    model, x = small(vit)
    edited(model, name)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        close(exported(x), model(x))
        close(exported(x + 1), model(x + 1))


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["evaluation", "training"])
@pytest.mark.parametrize(("name", "vit"), TRACED)
def test_edited_models_compile_in_one_graph(name, vit, training):
    torch._dynamo.reset()
    model, x = small(vit)
    edited(model, name).train(training)
    for module in model.modules():
        if hasattr(module, "begin_step"):  # as the training loop does
            module.begin_step(0, 4)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        out, expected = compiled(x), plain(x)
    close(out, expected)
    if training:
        out.square().sum().backward()
        expected.square().sum().backward()
        for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), key
            if ours.grad is not None:
                close(ours.grad, theirs.grad, 1e-3)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(ARGS, ARGS)), ids=lambda name: name)
def test_two_edits_compose_or_the_pair_is_refused(first, second):
    plain, x = small("vit_tiny_patch16_224")
    try:
        model = edited(plain, first, second)
    except ValueError as error:
        assert len(str(error)) > 20
        return
    with torch.no_grad():
        assert model(x).shape == (2, 7) and model(x).isfinite().all()
        assert model.forward_intermediates(x)[1][-1].shape == (2, 48, 4, 5)


@pytest.mark.parametrize("vit", [*VITS, "resnet18"])
def test_sigma_keeps_the_function_and_merges_back(vit):
    plain, x = small(vit) if vit != "resnet18" else (timm.create_model(vit).eval(), torch.randn(2, 3, 64, 64))
    model = edited(copy.deepcopy(plain), "sigma_reparam")
    with torch.no_grad():
        close(model(x), plain(x), 1e-4)
        first = model(x)
        assert torch.equal(model(x), first)  # evaluation leaves no trace
        merged = merge_sigma(model)
        close(merged(x), first)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="no reparametrised layer"):
        merge_sigma(merged)


def test_sigma_does_not_see_the_scale_of_the_weights():
    model, x = small("vit_tiny_patch16_224")
    edited(model, "sigma_reparam")
    with torch.no_grad():
        out = model(x)
        for name, p in model.named_parameters():
            if name.endswith("original"):
                p.mul_(3.0)
        close(model(x), out)
    layer = model.blocks[0].mlp.fc1
    scale = layer.parametrizations.weight[0].train()
    for _ in range(200):
        layer.weight  # noqa: B018  (each use is a step of the power iteration)
    assert torch.linalg.matrix_norm(layer.weight.detach(), 2).item() == pytest.approx(scale.gamma.item(), rel=1e-4)


def test_sigma_moves_once_a_step_where_a_loop_says_so():
    plain, x = small("vit_tiny_patch16_224")
    model = edited(plain, "sigma_reparam").train()
    calls = copy.deepcopy(model)
    scale, other = (m.blocks[0].attn.qkv.parametrizations.weight[0] for m in (model, calls))
    for step in range(3):
        for parameter in (*model.parameters(), *calls.parameters()):
            parameter.data.mul_(1.0 + 0.1 * step)
        for module in model.modules():
            if hasattr(module, "begin_step"):
                module.begin_step(step, 3)
        first = model(x)
        assert torch.equal(model(x), first) and torch.equal(calls(x), first)
        assert torch.equal(scale.u, other.u)
    model.set_grad_checkpointing(True)
    grads = []
    for one in (model, calls):
        one.zero_grad()
        for module in model.modules():
            if hasattr(module, "begin_step"):
                module.begin_step(3, 4)
        one(x).square().sum().backward()
        grads.append([p.grad for p in one.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-4)


def test_grouped_convolutions_and_contradictions_are_refused():
    with pytest.raises(ValueError, match="groups, for which the rule is not defined"):
        edited(timm.create_model("convnext_atto"), "sigma_reparam")
    model, _ = small("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="need init='authors'"):
        edits.EDITS["sigma_reparam"](model, remove_norms=True)
    with pytest.raises(ValueError, match="is parametrised already"):
        edited(model, "sigma_reparam", "sigma_reparam")


def test_mimetic_weights_look_like_trained_ones_and_depend_on_the_seed_alone():
    model, _ = small("vit_tiny_patch16_224", embed_dim=96, num_heads=3)
    again, _ = small("vit_tiny_patch16_224", seed=5, embed_dim=96, num_heads=3)
    for one in (model, again):
        edited(one, "mimetic_init")
    for a, b in zip(model.blocks, again.blocks, strict=True):
        assert torch.equal(a.attn.qkv.weight, b.attn.qkv.weight) and torch.equal(a.attn.proj.weight, b.attn.proj.weight)
        q, k, v = a.attn.qkv.weight.detach().split(96)
        product = (a.attn.proj.weight.detach() @ v).mT
        assert product.diagonal().mean().item() == pytest.approx(-0.4, abs=0.03)
        assert all((q[i : i + 32].mT @ k[i : i + 32]).diagonal().mean() > 0.3 for i in range(0, 96, 32))
    assert (model.pos_embed[0, 0] == 0).all() and torch.equal(
        model.pos_embed[0, 1:], initialisation.position_table(model.patch_embed.grid_size, 96)
    )
    rotary, _ = small("vit_small_patch16_dinov3")
    before = rotary.blocks[0].attn.qkv.weight.detach().clone()
    edited(rotary, "mimetic_init")
    assert torch.equal(rotary.blocks[0].attn.qkv.weight[:96], before[:96])  # rotated queries and keys stay


@pytest.mark.parametrize("vit", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_progressive_norms_give_way_and_fold(vit):
    model, x = small(vit)
    edits.apply(model, [{"name": "prepbn", "steps": 3, "warm": 1}])
    norms = [m for m in model.modules() if isinstance(m, PRepBN)]
    one, y = norms[0].train(), torch.randn(2, 20, 48)
    assert torch.equal(one(y), one.norm1(y)) and one.norm2.bn.num_batches_tracked == 0  # warm
    for left in (3, 2, 1, 0, 0):
        assert one.iter == left
        out = one(y)
        share = left / 3
        with torch.no_grad():
            expected = share * one.norm1(y) + (1 - share) * copy.deepcopy(one.norm2)(y)
        close(out.detach(), expected)
    for _ in range(3):
        model.train()(x)
    model.eval()
    with torch.no_grad():
        for norm in norms:
            nn.init.normal_(norm.norm2.bn.weight)
            nn.init.normal_(norm.norm2.bn.bias)
            norm.norm2.alpha.fill_(0.7)
        out = model(x)
        merge_prepbn(model)
        close(model(x), out, 1e-4)
    assert not any(isinstance(m, (PRepBN, nn.BatchNorm1d)) for m in model.modules())
    assert vit != "vit_tiny_patch16_224" or sum(isinstance(m, Affine) for m in model.modules()) == 1  # the final norm's


@pytest.mark.parametrize("vit", [*VITS, "vit_giant_patch14_dinov2"])
def test_pruned_models_are_smaller_and_equal_those_with_zeros(vit):
    plain, x = small(vit, num_heads=4)
    chosen = {0: [1, 3], 2: [0]}
    units = {1: [0, 5, 7]}
    masked = copy.deepcopy(plain)
    width = plain.blocks[0].attn.proj.in_features // 4
    with torch.no_grad():
        for layer, gone in chosen.items():
            for head in gone:
                masked.blocks[layer].attn.proj.weight[:, head * width : (head + 1) * width] = 0
        masked.blocks[1].mlp.fc2.weight[:, units[1]] = 0
        expected = masked(x)
        model = edits.apply(plain, [{"name": "prune", "heads": chosen, "neurons": units}])
        close(model(x), expected, 1e-5)
        close(model.forward_features(x), masked.forward_features(x), 1e-5)
    assert model.blocks[0].attn.proj.in_features == 2 * width and model.blocks[2].attn.proj.in_features == 3 * width
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in masked.parameters())
    with torch.no_grad():  # a second time, and under merged tokens
        edits.apply(model, [{"name": "prune", "heads": {0: [0]}}, {"name": "token_merging", "r": 1}])
        assert model(x).isfinite().all() and model.blocks[0].attn.num_heads == 1


def test_the_least_important_heads_are_what_prune_takes():
    model, x = small("vit_tiny_patch16_224", num_heads=4)
    found = head_importance(model, x, torch.tensor([1, 2]))
    edits.apply(model, [{"name": "prune", "heads": found.least(5)}])
    assert sum(block.attn.num_heads for block in model.blocks) == 7


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"heads": {5: [0]}}, "block 5 does not exist"),
        ({"heads": {0: [0, 1]}}, "of which one must stay"),
        ({"heads": {0: [2]}}, "heads 0 to 1"),
        ({"neurons": {0: [1, 1]}}, "cannot take out"),
    ],
)
def test_what_cannot_be_pruned_is_said(args, message):
    model, _ = small("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=message):
        edits.apply(model, [{"name": "prune", **args}])


def test_relative_positions_work_at_any_size_and_on_every_kind():
    model, _ = small("vit_small_patch14_reg4_dinov2", dynamic_img_size=True)
    edits.apply(model, [{"name": "irpe", "rpe_on": "qkv", "method": "cross", "ratio": 20.0, "shared_head": False}])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        wide = torch.randn(1, 3, 42, 98)
        out = model(wide)
        model(torch.randn(1, 3, 56, 70))
        assert torch.equal(model(wide), out)  # the other size left nothing behind
    for vit in ("beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"):
        plain, x = small(vit)
        with torch.no_grad():
            close(edited(copy.deepcopy(plain), "irpe")(x), plain(x), 1e-5)


def test_relative_positions_read_masks_as_timm_does():
    plain, x = small("vit_tiny_patch16_224")
    model = edited(copy.deepcopy(plain), "irpe")
    with torch.no_grad():
        count = plain.forward_features(x).shape[1]
        pairs = torch.arange(count)[None] % 3 != 1
        for how in ({"attn_mask": pairs}, {"attn_mask": 0.5 * torch.randn(count, count)}, {"is_causal": True}):
            expected = plain(x, **how)
            close(model(x, **how), expected, 1e-5)
            assert not torch.allclose(expected, plain(x), atol=1e-3)


def test_relative_positions_first_seen_in_inference_mode_train_afterwards():
    model = timm.create_model("deit_tiny_irpe_ctx_product_50_shared_k", depth=1, num_classes=2)
    x = torch.randn(1, 3, 48, 112)  # a grid that no other test has
    with torch.inference_mode(), torch.device("meta"):
        model(x)
    model(x).sum().backward()
    assert model.blocks[0].attn.rpe_k.lookup_table_weight.grad.isfinite().all()


def test_a_copy_of_a_traced_model_of_relative_positions_holds_no_graph():
    model = timm.create_model("deit_tiny_irpe_ctx_product_50_shared_k", depth=1, num_classes=2).eval()
    traced = torch.fx.symbolic_trace(model)
    other = copy.deepcopy(model)
    assert not hasattr(other.patch_embed, "last_grid")
    with torch.no_grad():
        for size in ((64, 96), (40, 33)):
            x = torch.randn(2, 3, *size)
            assert torch.equal(traced(x), model(x)) and torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"rpe_on": "x"}, "takes some of q, k and v"),
        ({"rpe_on": "v", "mode": "bias"}, "contextual entries only"),
        ({"method": "euclid"}, "method must be one of"),
        ({"ratio": 0.0}, "ratio must be positive"),
    ],
)
def test_wrong_relative_positions_are_one_sentence(args, message):
    with pytest.raises(ValueError, match=message):
        edits.apply(small("vit_tiny_patch16_224")[0], [{"name": "irpe", **args}])


def test_blocks_left_out_are_gone_and_levels_stay():
    model, x = small("vit_tiny_patch16_224")
    count = sum(p.numel() for p in model.parameters())
    expected = copy.deepcopy(model)
    edited(model, "drop_blocks")
    assert isinstance(model.blocks[1], Skip) and sum(p.numel() for p in model.parameters()) < count
    with torch.no_grad():
        start = expected.norm_pre(expected._pos_embed(expected.patch_embed(x)))
        close(model.forward_features(x), expected.norm(expected.blocks[2](expected.blocks[0](start))))
    with pytest.raises(ValueError, match="block 3 does not exist"):
        edits.apply(model, [{"name": "drop_blocks", "blocks": [3]}])


def test_repeated_blocks_share_their_weights():
    model, x = small("vit_tiny_patch16_224")
    count = sum(p.numel() for p in model.parameters())
    edited(model, "repeat_blocks")
    assert len(model.blocks) == 4 and model.blocks[1].attn is model.blocks[2].attn
    assert sum(p.numel() for p in model.parameters()) == count
    assert depth.phase_order([7, 10], [3, 8, 11], 12) == [3] * 7 + [8] * 3 + [11] * 2  # the published DINOv2-B in three
    with pytest.raises(ValueError, match="shares its weights: name it once"):
        edits.apply(model, [{"name": "prune", "heads": {1: [0], 2: [0]}}])
    with pytest.raises(ValueError, match="share its MLP: name it once"):
        edits.apply(model, [{"name": "test_time_registers", "neurons": {1: [0], 2: [0]}}])
    with pytest.raises(ValueError, match="3 phases need 2 rising thresholds"):
        depth.phase_order([7], [1, 2, 3], 12)
    with pytest.raises(ValueError, match="each block of this model has its own rotations"):
        edited(small("vit_small_patch16_rope_mixed_224")[0], "repeat_blocks")


def test_a_line_of_blocks_is_found_again_and_others_are_reported():
    model, x = small("vit_tiny_patch16_224")
    edited(model, "expand_depth")
    assert model.linear_residual > 0.1  # random blocks lie on no line
    state = {key: value.clone() for key, value in model.state_dict().items()}
    edits.apply(model, [{"name": "expand_depth", "depth": 8}])
    assert model.linear_residual < 1e-6 and len(model.blocks) == 8
    edits.apply(model, [{"name": "expand_depth", "depth": 4}])
    for key, value in model.state_dict().items():
        close(value, state[key], 1e-5)


def test_top_k_keeps_as_many_as_it_says():
    model, x = small("vit_tiny_patch16_224")
    edited(model, "topk_mlp")
    seen = []
    model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda m, inputs: seen.append((inputs[0] != 0).sum(-1)))
    with torch.no_grad():
        model(x)
    assert (seen[0] == 20).all()
    with pytest.raises(ValueError, match="of which k = 500 cannot be kept"):
        edits.apply(model, [{"name": "topk_mlp", "k": 500}])


def test_sub_ln_scales_what_the_paper_scales():
    model, _ = small("vit_tiny_patch16_224", embed_dim=192, num_heads=3)
    edited(model, "sub_ln")
    block = model.blocks[0]
    assert isinstance(block.attn.norm, nn.LayerNorm) and block.mlp.norm.normalized_shape == (768,)
    plain = (2 / (192 + 768)) ** 0.5
    assert block.mlp.fc1.weight.std().item() == pytest.approx(plain * torch.tensor(6.0).log().sqrt().item(), rel=0.02)


def test_deepnet_is_what_the_paper_says():
    model, x = small("vit_tiny_patch16_224", embed_dim=192, num_heads=3)
    edited(model, "deepnet")
    block, tokens = model.blocks[1], torch.randn(2, 5, 192)
    plain = (2 / (192 + 768)) ** 0.5
    assert block.mlp.fc1.weight.std().item() == pytest.approx(plain * 24**-0.25, rel=0.02)
    assert block.attn.qkv.weight[:192].std().item() == pytest.approx((2 / 384) ** 0.5, rel=0.02)
    assert block.attn.qkv.weight[384:].std().item() == pytest.approx((2 / 384) ** 0.5 * 24**-0.25, rel=0.02)
    with torch.no_grad():
        middle = block.norm1(6**0.25 * tokens + block.attn(tokens))
        close(block(tokens), block.norm2(6**0.25 * middle + block.mlp(middle)))
    for other, message in (("vit_small_patch14_dinov2", "has LayerScale"), ("eva02_tiny_patch14_224", "got EvaBlock")):
        with pytest.raises(ValueError, match=message):
            edited(small(other)[0], "deepnet")


@pytest.mark.parametrize("vit", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_relu_attention_is_what_the_paper_says(vit):
    model, x = small(vit)
    edited(model, "relu_attention")
    attn, seen = model.blocks[1].attn, []
    with torch.no_grad():
        attn.norm.weight.normal_(), attn.norm.gate.normal_()
        attn.register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True)
        model(x)
        (tokens,), kwargs, out = seen[0]
        q, k, v = rotate(attn, *project(attn, tokens), kwargs.get("rope"))
        mixed = torch.einsum("bhij,bhjd->bihd", torch.einsum("bhid,bhjd->bhij", q, k).mul(attn.scale).clamp(min=0), v).flatten(
            2
        )
        normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attn.norm.weight
        close(out, attn.proj(normed * torch.sigmoid(attn.norm.gate * mixed)))


def test_relu_attention_weighs_masked_pairs_with_zero_and_refuses_a_norm_that_is_there():
    model, x = small("vit_tiny_patch16_224")
    edited(model, "relu_attention")
    with torch.no_grad():
        tokens = torch.randn(2, 6, 48)
        alone = model.blocks[0].attn(tokens[:, :4])
        rows = torch.arange(6)
        close(model.blocks[0].attn(tokens, attn_mask=(rows < 4).expand(6, 6))[:, :4], alone)
        close(model.blocks[0].attn(tokens, is_causal=True)[:, :1], model.blocks[0].attn(tokens[:, :1]))
    for vit, names in (
        ("vit_tiny_patch16_224", ("sub_ln", "relu_attention")),
        ("beit_base_patch16_224", ("relu_attention",)),
        ("vit_tiny_patch16_224", ("token_merging", "relu_attention")),
    ):
        with pytest.raises(ValueError, match="free place for its norm|apply relu_attention first"):
            edited(small(vit)[0], *names)


@pytest.mark.parametrize("name", ["irpe", "relu_attention"])
def test_a_pruned_attention_with_a_forward_of_its_own_is_not_run_by_parts(name):
    model, _ = small("vit_tiny_patch16_224")
    edits.apply(model, [{"name": "prune", "heads": {0: [0], 1: [0], 2: [1]}}, {"name": name}])
    for edit in ("token_merging", "prune"):
        with pytest.raises(ValueError, match="blocks.0.attn of this VisionTransformer is a"):
            edited(model, edit)
