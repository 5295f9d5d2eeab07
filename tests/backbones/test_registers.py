"""Registers against the authors' code (DINOv2, test-time-registers) and the paper's algorithms."""

import copy
import json

import golden
import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from torch import nn

import backbones  # noqa: F401
import weights
from backbones.registers import (
    LARGE_NEURONS,
    RegisterEdit,
    RegisterViT,
    add_test_time_registers,
    find_register_neurons,
    measure_artefacts,
    outlier_scores,
)
from weights.convert import registers as convert

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}


def named(prefix: str) -> list:
    """Fixtures by what their JSON describes, so that new ones are sorted in by themselves."""

    def kind(case: str) -> str:
        info = json.loads((golden.folder() / f"{case}.json").read_text())
        return "intervention" if "intervention" in info else "ranking" if "official_function" in info else "dinov2"

    cases = golden.cases("registers")
    chosen = [case for case in cases if isinstance(case, str) and kind(case) == prefix]
    return chosen or [pytest.param(None, marks=pytest.mark.skip(reason=f"no fixture of kind {prefix}"))]


OFFICIAL = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values", "in_chans")
OFFICIAL += ("interpolate_antialias", "interpolate_offset", "qkv_bias", "proj_bias", "drop_path_rate")
LAYOUT = ("block_chunks", "num_register_tokens", "ffn_layer", "ffn_bias", "drop_path_uniform")  # read below, or of training


def from_official(kwargs: dict, **registers) -> RegisterViT:
    """The model that DINOv2's constructor arguments describe, without test-time registers unless told."""
    unknown = kwargs.keys() - {*OFFICIAL, *LAYOUT}
    assert not unknown, f"arguments of DINOv2 that this test does not know: {unknown}"
    assert kwargs.get("ffn_bias", True), "no model of the authors has MLPs without biases"
    arguments = {name: kwargs[name] for name in OFFICIAL if name in kwargs}
    arguments["init_values"] = kwargs.get("init_values") or None  # 0 is none too
    if kwargs.get("ffn_layer", "mlp").startswith("swiglu"):
        hidden = int(kwargs["embed_dim"] * kwargs.get("mlp_ratio", 4))
        if kwargs["ffn_layer"] == "swiglufused":  # two thirds, rounded up to eights
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2 * hidden / kwargs["embed_dim"]}
    return RegisterViT(
        **arguments, num_classes=0, **{"reg_tokens": kwargs.get("num_register_tokens", 0), "num_registers": 0} | registers
    )


def compare(got: dict, tensors: dict, info: dict) -> None:
    stored = {key: value for key, value in tensors.items() if not key.startswith(("input", "state/"))}
    assert stored.keys() <= got.keys(), stored.keys() - got.keys()
    for key, value in stored.items():
        torch.testing.assert_close(got[key], value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("case", named("dinov2"))
def test_every_stored_tensor_of_dinov2_is_reproduced(case):
    info, tensors = golden.load(case)
    state, x = golden.state(tensors), tensors["input"]
    model = from_official(info["kwargs"]).eval()
    weights.load_checkpoint(model, state)
    with torch.no_grad():
        blocks = info["get_intermediate_layers"]["n"]
        final, maps = model.forward_intermediates(x, indices=blocks, norm=True, return_prefix_tokens=True)
        _, raw = model.forward_intermediates(x, indices=1, output_fmt="NLC", return_prefix_tokens=True)
        grid = maps[0][0].shape[-2:]
        positions = model.resize_positions(model.pos_embed, model.patch_embed.grid_size, tuple(grid))
    registers = model.num_prefix_tokens - 1
    got = {"output": final[:, 0], "stage/x_norm_regtokens": final[:, 1 : 1 + registers]}
    got |= {"stage/x_norm_patchtokens": final[:, 1 + registers :], "stage/x_prenorm": torch.cat(raw[0][::-1], 1)}
    # the class token's entry is part of our class token
    got["stage/pos_embed_used"] = torch.cat([model.cls_token - state["cls_token"], positions], 1)
    for i, (image, prefix) in enumerate(maps):
        got |= {f"stage/inter_{i}_map": image, f"stage/inter_{i}_cls": prefix[:, 0]}
    compare(got, tensors, info)


@pytest.mark.parametrize("case", named("intervention"))
def test_every_stored_tensor_of_the_intervention_is_reproduced(case):
    info, tensors = golden.load(case)
    state, x, what = golden.state(tensors), tensors["input"], info["intervention"]
    if "timm" in info["model"]:
        model = timm.create_model("vit_tiny_patch16_224", **info["kwargs"]).eval()
        model.load_state_dict(state)
    else:
        model = from_official(info["kwargs"]).eval()
        weights.load_checkpoint(model, state)
    paper = what["normal_values"] == "paper_algorithm_2"
    options = {"num_registers": what["num_registers"], "scale": what["scale"], "rule": "paper" if paper else "code"}
    options |= {"patches": "zero" if paper else what["normal_values"]}
    neurons = {int(layer): units for layer, units in what["neurons"].items()}

    def run(model: nn.Module, registers: int, prefix: str = "") -> dict:
        tokens: dict[str, torch.Tensor] = {}

        def at_the_end(t):  # the authors append the registers, timm keeps them behind the class token
            return torch.cat([t[:, :1], t[:, 1 + registers :], t[:, 1 : 1 + registers]], 1)

        def keep(name):
            return lambda module, inputs, output: tokens.__setitem__(name, at_the_end(output))

        for i, block in enumerate(model.blocks):
            block.register_forward_hook(keep(f"stage/{prefix}{i}"))
            block.mlp.drop1.register_forward_hook(keep(f"stage/act_{i}"))
        with torch.no_grad():
            tokens["output"] = at_the_end(model.forward_features(x))
        return tokens

    got = run(copy.deepcopy(model), 0, "base_")
    got["stage/base_output"] = got.pop("output")
    empty = add_test_time_registers(copy.deepcopy(model), {}, what["num_registers"])
    got["stage/reg_noedit_output"] = run(empty, what["num_registers"])["output"]
    got |= run(add_test_time_registers(model, neurons, **options), what["num_registers"])
    compare(got, tensors, info)


class Replay(nn.Module):
    """A "ViT" whose blocks give stored activations and outputs; its images are the numbers of the stored ones."""

    num_prefix_tokens = 1

    def __init__(self, activations: torch.Tensor, outputs: torch.Tensor):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(()))
        self.blocks = nn.ModuleList(nn.Module() for _ in range(activations.shape[1]))
        for i, block in enumerate(self.blocks):
            block.mlp = nn.Module()
            block.mlp.drop1 = nn.Identity()
            block.forward = lambda images, i=i, block=block: (
                block.mlp.drop1(activations[images, i]),
                outputs[images, i],
            )[1]

    def forward_intermediates(self, x, indices, **kwargs):
        for block in self.blocks[: indices[0] + 1]:
            block(x[:, 0, 0, 0].long())


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("case", named("ranking"))
def test_the_stored_ranking_of_neurons_is_reproduced(case, batch_size):
    info, tensors = golden.load(case)
    kwargs, activations = info["kwargs"], tensors["input/activations"]
    model = Replay(activations, tensors["input/layer_outputs"])
    images = torch.arange(len(activations)).float().reshape(-1, 1, 1, 1)
    found = find_register_neurons(
        model,
        images,
        threshold=kwargs["register_norm_threshold"],
        detect_layer=kwargs["detect_outliers_layer"],
        sparse_share=kwargs["sparsity_frac_threshold"] if kwargs["apply_sparsity_filter"] else None,
        sparse_below=kwargs["sparsity_activation_threshold"],
        batch_size=batch_size,
    )
    assert found.images == int(tensors["stage/used_images"].sum()) and found.seen == len(activations)
    torch.testing.assert_close(found.scores, tensors["stage/scores"].float(), **golden.tolerance(info))
    count = int((tensors["stage/scores"] > 0).sum())
    assert torch.equal(found.neurons[:count], tensors["output"][:count])


@pytest.mark.parametrize("variant", golden.variants("registers", "dinov2_"))
def test_every_official_variant_converts_and_converts_back(variant):
    facts = golden.official("registers")[variant]
    keys = facts["keys"]
    official = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    width, trained = keys["cls_token"][-1], keys.get("register_tokens", [1, 0])[1]
    depth = 1 + max(int(key.split(".")[1]) for key in keys if key.startswith("blocks."))
    size = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // 64,
        "img_size": 518,
        "patch_size": 14,
        "init_values": 1e-5,
    }
    with torch.device("meta"):
        model = RegisterViT(**size, num_classes=0, reg_tokens=trained, num_registers=2)
    # ours has no mask token and no separate position of the class token, but two registers
    assert sum(p.numel() for p in model.parameters()) == facts["params"] - 2 * width + 2 * width
    native = weights.convert_state_dict(official, model)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in model.state_dict().items()}
    back = convert.to_official(native, model)
    assert {key: list(value.shape) for key, value in back.items()} == keys
    assert convert.source_format(official) == "official" and convert.source_format(native) == "native"
    assert {k: v.shape for k, v in weights.convert_state_dict(native, model).items()} == {k: v.shape for k, v in native.items()}


@pytest.mark.parametrize("variant", golden.variants("registers", "timm/"))
def test_timm_names_load_with_and_without_trained_registers(variant):
    keys = golden.official("registers")[variant]["keys"]
    width = keys["cls_token"][-1]
    with torch.device("meta"):
        model = RegisterViT(embed_dim=width, depth=12, num_heads=width // 64, img_size=518, patch_size=14, init_values=1e-5,
                            num_classes=0, reg_tokens=keys.get("reg_token", [1, 0])[1], num_registers=1)  # fmt: skip
    native = weights.convert_state_dict({key: torch.empty(shape, device="meta") for key, shape in keys.items()}, model)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_registered_models_have_a_register_and_take_the_weights_without(size):
    name = f"vit_{size}_patch14_ttreg_dinov2"
    model = timm.create_model(name, device="meta")
    plain = timm.create_model(f"vit_{size}_patch14_dinov2", pretrained=False, device="meta").state_dict()
    native = weights.convert_state_dict(plain, model)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in model.state_dict().items()}
    edits = {
        i: block.mlp.drop1[0].indices for i, block in enumerate(model.blocks) if isinstance(block.mlp.drop1, nn.Sequential)
    }
    assert edits == ({layer: list(units) for layer, units in LARGE_NEURONS.items()} if size == "large" else {})
    if size == "large":
        assert sum(map(len, edits.values())) == 45
        with pytest.raises(ValueError, match="layer 12 needs different neurons"):
            timm.create_model(name, device="meta", register_neurons={12: [4096]})


def vit(seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **TINY | kwargs).eval()


VITS = {
    "cls": {},
    "no cls": {"class_token": False, "global_pool": "avg"},
    "trained registers": {"reg_tokens": 2},
    "pre-norm, average": {"pre_norm": True, "global_pool": "avg"},
    "dynamic size": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("kwargs", VITS.values(), ids=VITS)
def test_tokens_and_positions_are_rearranged_without_changing_an_output(kwargs):
    model, x = vit(**kwargs), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model.pos_embed.normal_()
        plain, features = model(x), model.forward_features(x)
        model.blocks.requires_grad_(False)
        extended = add_test_time_registers(copy.deepcopy(model), {})
        prefix = model.num_prefix_tokens
        assert extended.num_prefix_tokens == prefix + 1 and extended.num_reg_tokens == model.num_reg_tokens + 1
        # a register that nobody attends to: its key never wins
        for block in extended.blocks:
            block.attn.forward = blind(block.attn, prefix)
        got = extended.forward_features(x)
        torch.testing.assert_close(torch.cat([got[:, :prefix], got[:, prefix + 1 :]], 1), features)
        torch.testing.assert_close(extended(x), plain)
        maps = extended.forward_intermediates(x, indices=[1], intermediates_only=True)
        torch.testing.assert_close(maps[0], model.forward_intermediates(x, indices=[1], intermediates_only=True)[0])


def blind(attention: nn.Module, position: int):
    """The attention's forward, in which no token sees the one at `position`."""

    def forward(x, *args, **kwargs):
        count = x.shape[1]
        mask = torch.ones(count, count, dtype=torch.bool)
        mask[:, position] = False
        q, k, v = attention.qkv(x).reshape(len(x), count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attention.proj(out.transpose(1, 2).flatten(2))

    return forward


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_a_batch_gives_what_its_images_give_alone(rule):
    model = add_test_time_registers(vit(), {1: [3, 5], 2: [0, 31, 7]}, 2, rule=rule)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]))


GATED = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}, {"mlp_layer": timm.layers.SwiGLU, "act_layer": nn.SiLU}


@pytest.mark.parametrize("kwargs", GATED, ids=["GluMlp", "SwiGLU"])
def test_gated_mlps_are_edited_after_gating(kwargs):
    model, x = vit(**kwargs), torch.randn(1, 3, 32, 32)
    add_test_time_registers(model, {1: [2, 4]})
    seen = {}
    mlp = model.blocks[1].mlp
    mlp.register_forward_pre_hook(lambda m, inputs: seen.__setitem__("in", inputs[0]))
    mlp.fc2.register_forward_pre_hook(lambda m, inputs: seen.__setitem__("hidden", inputs[0]))
    with torch.no_grad():
        model(x)
        if hasattr(mlp, "fc1_g"):
            hidden = nn.functional.silu(mlp.fc1_g(seen["in"])) * mlp.fc1_x(seen["in"])
        else:
            gate, value = mlp.fc1(seen["in"]).chunk(2, -1)
            hidden = nn.functional.silu(gate) * value
        expected = mlp.drop1[0](hidden)
    torch.testing.assert_close(seen["hidden"], expected)
    assert (seen["hidden"][:, 2:, [2, 4]] == 0).all() and (seen["hidden"][:, 1, [2, 4]] != 0).all()


def test_rotary_models_skip_the_register_as_they_skip_their_prefix():
    torch.manual_seed(0)
    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2, num_classes=3).eval()
    x = torch.randn(1, 3, 56, 56)
    add_test_time_registers(model, {0: [1, 2]})
    assert {block.attn.num_prefix_tokens for block in model.blocks} == {2}
    with torch.no_grad():
        assert model(x).shape == (1, 3) and model.forward_features(x).shape == (1, 2 + 16, 192)


def edit(x: torch.Tensor, **kwargs) -> torch.Tensor:
    """What RegisterEdit makes of activations B N K (class token, one register, patches), all K neurons being listed."""
    options = {"first": 1, "count": 1, "scale": 1.0, "rule": "code", "patches": "zero"} | kwargs
    return RegisterEdit(range(x.shape[2]), **options)(x)


def test_the_codes_rule_takes_the_signed_extreme_of_all_neurons_and_tokens():
    x = torch.tensor([[[1.0, 9.0], [0.0, 0.0], [-12.0, 2.0], [3.0, 4.0]]])
    assert edit(x).tolist() == [[[1, 9], [-12, -12], [0, 0], [0, 0]]]  # negative, of one neuron, for both
    x[0, 0, 1] = 20  # the class token counts, and is not edited
    assert edit(x).tolist() == [[[1, 20], [20, 20], [0, 0], [0, 0]]]


def test_the_papers_rule_takes_each_neurons_maximum_and_clears_the_class_token():
    x = torch.tensor([[[1.0, 9.0], [0.0, 0.0], [-12.0, 2.0], [3.0, 4.0]]])
    assert edit(x, rule="paper").tolist() == [[[0, 0], [3, 9], [0, 0], [0, 0]]]
    assert edit(x, rule="paper", scale=2.0).tolist() == [[[0, 0], [6, 18], [0, 0], [0, 0]]]


def test_registers_with_scales_of_their_own_follow_one_another():
    x = torch.tensor([[[1.0], [0.0], [0.0], [5.0]]])
    assert edit(x, count=2, scale=[2.0, 0.5])[0, :, 0].tolist() == [1, 10, 5, 0]  # the second saw the first one's 10
    assert edit(x, count=2, scale=2.0)[0, :, 0].tolist() == [1, 10, 10, 0]


def test_patches_become_their_mean_or_only_the_high_outliers_do_or_none():
    x = torch.tensor([[[7.0], [0.0], [1.0], [1.0], [1.0], [-9.0], [6.0]]])
    assert edit(x, patches="mean")[0, 2:, 0].tolist() == [0] * 5
    assert edit(x, patches="only_outliers")[0, 2:, 0].tolist() == [1, 1, 1, -9, 0]  # upper side only
    assert edit(x, patches="same")[0, 2:, 0].tolist() == x[0, 2:, 0].tolist()
    # unbiased deviation: of (0, 0, 3), mean 1, it is 1.73 (biased 1.41), so 2.6 of (0, 0, 2.6) stays below 0.87 + 1.5
    y = torch.tensor([[[0.0], [0.0], [0.0], [0.0], [2.0], [2.0]]])  # mean 1, std 1.15 unbiased, 1.0 biased: 2 is not above 2.15
    assert edit(y, patches="only_outliers")[0, 2:, 0].tolist() == [0, 0, 2, 2]


def test_wrong_options_and_models_are_refused_with_what_to_do():
    for kwargs, message in [
        ({"rule": "papers"}, "rule must be one of code, paper"),
        ({"patches": "none"}, "patches must be one of zero, mean"),
        ({"rule": "paper", "patches": "mean"}, "needs rule='code'"),
        ({"num_registers": 2, "scale": [1.0]}, "one for each, got 1"),
        ({"num_registers": 0}, "at least 1, got 0"),
        ({"neurons": {4: [0]}}, r"layer 4 is not in 0\.\.3"),
        ({"neurons": {0: [32]}}, r"neurons of 0\.\.31"),
        ({"neurons": {0: [1, 1]}}, "different neurons"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_test_time_registers(vit(), **{"neurons": {0: [1]}} | kwargs)
    with pytest.raises(ValueError, match="has test-time registers already"):
        add_test_time_registers(add_test_time_registers(vit(), {0: [1]}), {0: [1]})
    with pytest.raises(ValueError, match="keeps no register tokens"):
        add_test_time_registers(timm.create_model("deit_tiny_distilled_patch16_224", device="meta"), {})
    with pytest.raises(ValueError, match="is not a ViT"):
        add_test_time_registers(timm.create_model("resnet18", device="meta"), {})
    with pytest.raises(TypeError, match="register_nurons"):
        timm.create_model("vit_small_patch14_ttreg_dinov2", register_nurons={}, device="meta")


def planted(strength: float = 40.0) -> nn.Module:
    """A ViT in which neuron 5 of layer 1 writes a huge residual wherever the first pixel channel of a patch is bright."""
    model = vit()
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.weight[0, 0] = 1.0
        mlp, norm = model.blocks[1].mlp, model.blocks[1].norm2
        mlp.fc1.weight[5] = torch.eye(16)[0] * 10
        mlp.fc1.bias[5] = -20.0
        mlp.fc2.weight[:, 5] = strength * torch.eye(16)[3]
        norm.weight.fill_(1.0)
    return model


def bright(count: int = 4) -> torch.Tensor:
    """Images with one bright patch each."""
    images = torch.zeros(count, 3, 32, 32)
    for i in range(count):
        images[i, 0, 8 * (i % 4) : 8 * (i % 4) + 8, 8:16] = 1.0
    return images


def test_planted_register_neurons_are_found_and_their_artefacts_removed():
    model, images = planted(), bright()
    before = measure_artefacts(model, images, threshold=100.0)
    assert before.largest_norm > 300 and before.outlier_share == pytest.approx(1 / 16) and before.patches == 64
    found = find_register_neurons(model, images, threshold=100.0, sparse_share=0.5)
    assert found.neurons[0].tolist() == [1, 5] and found.images == 4
    assert found.top(1) == {1: [5]}
    limited = find_register_neurons(model, images, threshold=100.0, layers=[0, 2])
    assert set(limited.neurons[:, 0].tolist()) == {0, 2}
    add_test_time_registers(model, found.top(1))
    after = measure_artefacts(model, images, threshold=before.threshold)
    assert after.largest_norm < before.largest_norm / 4 and after.outlier_share == 0 and after.patches == 64


def test_the_default_threshold_is_three_deviations_above_the_mean_patch_norm():
    model, images = planted(), bright()
    norms = []
    model.blocks[2].register_forward_hook(lambda m, i, o: norms.append(o[:, 1:].norm(dim=-1).flatten()))
    measured = measure_artefacts(model, images)
    flat = torch.cat(norms)
    assert measured.threshold == pytest.approx((flat.mean() + 3 * flat.std()).item(), rel=1e-5)
    assert find_register_neurons(model, list(images.split(2))).threshold == pytest.approx(measured.threshold)


def test_scores_are_signed_by_the_papers_rule_and_magnitudes_by_the_codes():
    x = torch.tensor([[[1.0, -2.0], [3.0, -4.0], [5.0, 6.0]]])
    outliers = torch.tensor([[True, True, False]])
    assert outlier_scores(x, outliers, "code", None, 0.5).tolist() == [[2, 3]]
    assert outlier_scores(x, outliers, "paper", None, 0.5).tolist() == [[2, -3]]
    assert outlier_scores(x, outliers, "code", 0.5, 0.5).tolist() == [[0, 3]]  # 2 of 3 tokens are below 0.5, signed


def test_images_may_come_in_batches_of_any_kind_and_bad_ones_are_named():
    model, images = planted(), bright()
    whole = find_register_neurons(model, images, threshold=100.0)
    for batches in (
        [images[:1], images[1:]],
        [(images[:3], "labels"), (images[3:], "labels")],
        iter([{"image": images[:2]}, {"image": images[2:]}]),
    ):
        found = find_register_neurons(model, batches, threshold=100.0)
        assert torch.equal(found.neurons, whole.neurons) and found.seen == 4
    with pytest.raises(ValueError, match="read only once"):
        find_register_neurons(model, iter([images]))
    with pytest.raises(ValueError, match="none of 4 images has a token with norm above 1e"):
        find_register_neurons(model, images, threshold=1e9)
    with pytest.raises(ValueError, match="B 3 H W"):
        find_register_neurons(model, [images[0]], threshold=1.0)
    with pytest.raises(ValueError, match=r"some of 0\.\.3, got \[7\]"):
        find_register_neurons(model, images, layers=[7])


def test_finding_keeps_one_layers_activations_at_a_time_and_leaves_no_hook():
    model, images = planted().train(), bright()
    find_register_neurons(model, images, threshold=100.0)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_whole_model_compiles_in_one_graph_and_traces():
    model = add_test_time_registers(vit(), {1: [3, 5]}, patches="only_outliers")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=8)},))
        torch.testing.assert_close(program.module()(x[:1]), model(x[:1]))


def small(**kwargs) -> RegisterViT:
    torch.manual_seed(0)
    sizes = {"img_size": 42, "patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return RegisterViT(**sizes | kwargs).eval()


@pytest.mark.parametrize("size", [(14, 14), (42, 42), (50, 97)])
def test_any_size_runs_padded_to_whole_patches(size):
    model = small(register_neurons={0: [1]})
    maps = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
    assert [list(m.shape) for m in maps] == [[2, 16, -(-size[0] // 14), -(-size[1] // 14)]] * 2
    assert model(torch.randn(2, 3, *size)).shape == (2, 3)


def test_positions_are_resized_once_or_at_run_time_with_the_same_result():
    model, x = small(register_neurons={0: [1]}), torch.randn(1, 3, 56, 28)
    with torch.no_grad():
        at_run_time = model(x)
        other = small(register_neurons={0: [1]}, img_size=(56, 28))
        weights.load_checkpoint(other, model.state_dict())
        assert torch.equal(other(x), at_run_time)
        model.set_input_size((56, 28))
        assert model.pos_embed.shape[1] == 8 and torch.equal(model(x), at_run_time)


def test_without_dynamic_img_size_the_model_keeps_its_size():
    bound, free = small(register_neurons={0: [1]}, dynamic_img_size=False), small(register_neurons={0: [1]})
    bound.load_state_dict(free.state_dict())
    with torch.no_grad():
        x = torch.randn(1, 3, 42, 42)
        torch.testing.assert_close(bound(x), free(x))
        with pytest.raises(AssertionError, match="height"):
            bound(torch.randn(1, 3, 56, 28))


def test_indices_made_on_the_meta_device_are_filled_in_later():
    with torch.device("meta"):
        model = RegisterViT(**TINY, register_neurons={1: [3, 5]})
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    assert model.blocks[1].mlp.drop1[0].neurons.tolist() == [3, 5]


def test_a_plain_checkpoint_loads_into_a_model_that_has_its_registers_already():
    plain, model = vit(), add_test_time_registers(vit(1), {1: [3]})
    weights.load_checkpoint(model, plain.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), add_test_time_registers(plain, {1: [3]})(x), atol=0, rtol=0)


@pytest.mark.parametrize("trained", [0, 2])
def test_registers_that_were_trained_after_all_survive_the_authors_names(trained):
    model = small(reg_tokens=trained, num_registers=1)
    assert set(convert.to_official(model.state_dict(), model)) == set(official_names(model, trained))
    with torch.no_grad():
        model.reg_token.normal_()
    official = convert.to_official(model.state_dict(), model)
    native = weights.convert_state_dict(official, model)
    assert all(torch.equal(native[key], value) for key, value in model.state_dict().items())
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "reg_token"}


def official_names(model: nn.Module, trained: int) -> list[str]:
    names = [name for name in model.state_dict() if name != "reg_token"] + ["mask_token"]
    return names + ["register_tokens"] * (trained > 0)


def test_gated_mlps_have_the_authors_names():
    model = small(mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU)
    official = convert.to_official(model.state_dict(), model)
    assert {key.split(".")[3] for key in official if ".mlp." in key} == {"w12", "w3"}
    native = weights.convert_state_dict(official, model)
    assert native.keys() == model.state_dict().keys()
    assert all(torch.equal(native[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layer", ["swiglu", "swiglufused"])
def test_dinov2s_gated_mlps_are_read_from_the_authors_arguments(layer):
    """An independent reading of SwiGLUFFN: w3(silu(x1) * x2), x1 and x2 the halves of w12(x)."""
    torch.manual_seed(0)
    model = from_official(
        {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 1, "num_heads": 2, "ffn_layer": layer}
    ).eval()
    hidden = 96 if layer == "swiglu" else 64
    state = model.state_dict()
    official = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): torch.randn_like(t) for key, t in state.items()}
    assert official["blocks.0.mlp.w12.weight"].shape == (2 * hidden, 24)
    official["mask_token"] = torch.zeros(1, 24)
    official["pos_embed"] = torch.randn(1, 5, 24)
    weights.load_checkpoint(model, official)
    x = torch.randn(2, 5, 24)
    own = {key.removeprefix("blocks.0.mlp."): value for key, value in official.items() if key.startswith("blocks.0.mlp.")}
    first, second = nn.functional.linear(x, own["w12.weight"], own["w12.bias"]).chunk(2, -1)
    expected = nn.functional.linear(nn.functional.silu(first) * second, own["w3.weight"], own["w3.bias"])
    torch.testing.assert_close(model.blocks[0].mlp(x), expected)
