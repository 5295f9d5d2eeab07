"""Edits against the authors' code and the stored definitions."""

import golden
import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

from backbones import attention_transfer
from backbones.edits import depth, initialisation, relative_position, sigma


def compare(got: dict, tensors: dict, info: dict, at: str = "") -> None:
    stored = {key: value for key, value in tensors.items() if not key.startswith(("input", "state/"))}
    assert stored.keys() <= got.keys(), stored.keys() - got.keys()
    for key, value in stored.items():
        message = f"{at}{key}"
        torch.testing.assert_close(got[key], value, **golden.tolerance(info), msg=lambda m, message=message: f"{message}: {m}")


def part(tensors: dict, name: str) -> dict:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize("case", golden.cases("edit_sigma_op"))
def test_sigma_of_a_layer(case):
    info, tensors = golden.load(case)
    for name, what in info["cases"].items():
        t, kwargs = part(tensors, name), dict(what["kwargs"])
        kwargs.pop("init_multiplier", None)
        stats_only = kwargs.pop("stats_only", False)
        layer = (nn.Conv2d if what["kind"] == "conv" else nn.Linear)(*what["args"], **kwargs)
        with torch.no_grad():
            layer.weight.copy_(t["init_weight"].view_as(layer.weight))
        model = sigma.sigma_reparam(nn.Sequential(layer), stats_only=stats_only)
        scale = layer.parametrizations.weight[0]
        got = {"init_weight": t["init_weight"], "init_gamma": scale.gamma.detach().clone()}
        got["init_u"] = scale.u * (scale.u @ t["init_u"]).sign()
        with torch.no_grad():
            layer.parametrizations.weight.original.copy_(t["weight"].view_as(layer.weight))
            scale.gamma.copy_(t["gamma"])
            scale.u.copy_(t["u_before"])
            if layer.bias is not None:
                layer.bias.copy_(t["bias"])
        x = t["input"].clone().requires_grad_()
        model.eval()
        got |= {"output_eval": model(x).detach(), "u_after_eval": scale.u.clone()}
        got["weight_eval"] = layer.weight.detach().flatten(1)
        model.train()
        out = model(x)
        out.backward(t["grad_output"])
        got |= {"output_train_1": out.detach(), "u_after_train_1": scale.u.clone(), "grad_input": x.grad}
        got["grad_weight"] = layer.parametrizations.weight.original.grad.flatten(1)
        got["grad_gamma"] = torch.zeros(1) if scale.gamma.grad is None else scale.gamma.grad
        got |= {"output_train_2": model(x).detach(), "u_after_train_2": scale.u.clone()}
        got["output_eval_after"] = model.eval()(x).detach()
        skip = ("weight", "gamma", "bias", "u_before", "grad_output")
        compare(got, {key: value for key, value in t.items() if key not in skip}, info, f"{name}/")


@pytest.mark.parametrize("case", golden.cases("edit_sigma_vit"))
def test_sigma_of_a_vit_and_its_merged_form(case):
    info, tensors = golden.load(case)
    what = info["edit"]
    plain = timm.create_model(info["model"], **info["kwargs"])
    model = sigma.sigma_reparam(plain, "authors", what["norms_removed"], what["conv_init_gain"]).eval()
    state = golden.state(tensors)
    for name in info["converted"]:
        layer = model.get_submodule(name)
        original, scale = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
        with torch.no_grad():
            original.copy_(state[f"{name}.weight"].view_as(original))
            scale.gamma.copy_(state[f"{name}.sigma"])
            scale.u.copy_(state[f"{name}.spectral_normed_weight.u"])
    rest = {k: v for k, v in state.items() if k in model.state_dict()}
    assert {k for k in model.state_dict() if "parametrizations" not in k} == set(rest)
    model.load_state_dict(rest, strict=False)
    with torch.no_grad():
        got = {"output": model(tensors["input"])}
        sigma.merge_sigma(model)
        got |= {f"stage/merged/{name}.weight": model.get_submodule(name).weight for name in info["converted"]}
        compare(got, tensors, info)
        torch.testing.assert_close(model(tensors["input"]), tensors["output"], **golden.tolerance(info))
    removed = ("norm1.", "norm2.", "norm.") if what["norms_removed"] else ()
    names = [k for k in timm.create_model(info["model"], **info["kwargs"]).state_dict() if not any(r in k for r in removed)]
    assert sorted(model.state_dict()) == sorted(names)


@pytest.mark.parametrize("case", golden.cases("edit_mimetic"))
def test_products_of_mimetic_weights(case):
    info, tensors = golden.load(case)
    kwargs, got = info["kwargs"], {}
    width = kwargs["dim"] // kwargs["num_heads"]
    for i in range(kwargs["depth"]):
        pairs = [
            initialisation.query_key(noise, kwargs["alpha1"], kwargs["beta1"], width) for noise in tensors[f"input/{i}/z_qk"]
        ]
        got[f"stage/{i}/qk"] = torch.stack([q.mT @ k for q, k in pairs])
        value, projection = initialisation.value_projection(
            tensors[f"input/{i}/z_vo"], kwargs["alpha2"], kwargs["beta2"], kwargs["dim"]
        )
        got[f"stage/{i}/vo"] = (projection @ value).mT
    got["stage/pos_embed_timm"] = initialisation.position_table(tuple(kwargs["grid"]), kwargs["dim"])
    compare({key: value.float() for key, value in got.items()}, {k: v.float() for k, v in tensors.items()}, info)


@pytest.mark.parametrize("case", golden.cases("edit_irpe_buckets"))
def test_buckets_of_relative_positions(case):
    info, tensors = golden.load(case)
    for name, what in info["cases"].items():
        method, _, axis = what["method"].partition("_")
        found = relative_position.buckets(method, what["height"], what["width"], what["skip"], what["ratio"])
        assert torch.equal(found[axis == "cols"], tensors[name].long()), name
        assert relative_position.bucket_count(method, what["skip"], what["ratio"]) == what["num_buckets"], name
    for ratio, expected in info["piecewise"]["integer_input_0_to_400"].items():
        assert relative_position.piecewise(torch.arange(len(expected)), float(ratio)).tolist() == expected, ratio


class Grid:
    def __init__(self, height: int, width: int):
        self.grid_size = (height, width)


@pytest.mark.parametrize("case", golden.cases("edit_irpe_attention"))
def test_attention_with_relative_positions(case):
    info, tensors = golden.load(case)
    for name, what in info["cases"].items():
        t, c = part(tensors, name), what["config"]
        attn = Attention(what["dim"], what["heads"], qkv_bias="state/qkv.bias" in t)
        shared = next(iter(what["tables"].values()))[0] == 1
        relative_position.add_tables(attn, what["skip"], c["rpe_on"], c["method"], c["mode"], c["ratio"], shared)
        attn.grid_source = [Grid(what["height"], what["width"])]
        attn.load_state_dict(golden.state(t))
        x = t["input"].clone().requires_grad_()
        out = attn(x)
        out.square().sum().backward()
        got = {"output": out.detach(), "grad_input": x.grad}
        got |= {f"grad_state/{key}": p.grad for key, p in attn.named_parameters()}
        compare(got, t, info, f"{name}/")


@pytest.mark.parametrize("case", golden.cases("edit_irpe_vit"))
def test_a_vit_with_relative_positions(case):
    info, tensors = golden.load(case)
    what, state = info["edit"], golden.state(tensors)
    plain = timm.create_model(info["model"], **info["kwargs"]).eval()
    plain.load_state_dict({k: v for k, v in state.items() if ".rpe_" not in k})
    with torch.no_grad():
        got = {"stage/base_output": plain(tensors["input"])}
        model = relative_position.irpe(plain, what["rpe_on"], what["method"], what["mode"], what["ratio"], what["shared_head"])
        torch.testing.assert_close(model(tensors["input"]), got["stage/base_output"], atol=1e-6, rtol=1e-5)  # tables of zeros
        model.load_state_dict(state)
        for i, block in enumerate(model.blocks):
            block.register_forward_hook(lambda m, x, out, i=i: got.__setitem__(f"stage/{i}", out))
        got["output"] = model(tensors["input"])
    assert sorted(k for k in model.state_dict() if ".rpe_" in k) == sorted(info["extra_keys"])
    compare(got, tensors, info)


@pytest.mark.parametrize("case", golden.cases("edit_tleg"))
def test_descendants_of_a_learngene(case):
    info, tensors = golden.load(case)
    state, x, got = golden.state(tensors), tensors["input"], {}
    for size in info["expand_to"]:
        model = timm.create_model(info["model"], **info["kwargs"], depth=size).eval()
        model.load_state_dict(depth.tleg_state(state, size))
        with torch.no_grad():
            got[f"stage/depth{size}/output"] = model(x)
        got[f"stage/depth{size}/last_fc1"] = model.blocks[-1].mlp.fc1.weight.detach()
        if size == info["depth"]:  # the authors' network: eps 1e-5, the final norm before the mean
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 1e-5
            with torch.no_grad():
                got["output"] = model.head(model.fc_norm(model.forward_features(x)).mean(1))
    compare(got, tensors, info)


@pytest.mark.parametrize("case", golden.cases("edit_raptor"))
def test_recurrent_blocks_and_their_losses(case):
    info, tensors = golden.load(case)
    model = depth.RecurrentBlocks(**info["kwargs"] | {"num_heads": info["kwargs"]["num_heads"]}).eval()
    model.load_state_dict(depth.raptor_state(golden.state(tensors)))
    with torch.no_grad():
        states = model.states(tensors["input"])
    got = {"output": states[-1], "target": tensors["target"]} | {f"stage/{i}": x for i, x in enumerate(states, 1)}
    compare(got, tensors, info)
    for kind, value in info["losses"].items():
        assert depth.raptor_loss(states[-1], tensors["target"], kind).item() == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("case", golden.cases("edit_attention_transfer"))
def test_attention_is_distilled_and_copied_as_by_the_authors(case):
    info, tensors = golden.load(case)
    blocks, x, got = info["edit"]["layers_used"], tensors["input"], {}
    kinds = {"": "attention", "_q": "queries", "_k": "keys", "_v": "values"}

    def pair():
        models = [timm.create_model(info["model"], **info["kwargs"]) for _ in range(2)]
        for model, who in zip(models, ("student", "teacher"), strict=True):
            model.load_state_dict(part(golden.state(tensors), who))
        return models

    for suffix, kind in kinds.items():
        student, teacher = pair()
        pairs = attention_transfer.learn(student, teacher, kind, blocks)
        taught = attention_transfer.teach(teacher, x, kind, pairs)
        output, apart = student(x, taught)
        apart.mean().backward()
        assert apart.mean().item() == pytest.approx(info["results"][f"distill{suffix}"], rel=1e-4)
        at = f"stage/distill{suffix}"
        got |= {f"{at}/loss": apart.mean().detach(), f"{at}/student_output": output.detach()}
        got[f"{at}/grad_qkv0"] = student.blocks[0].attn.qkv.weight.grad
        copier = attention_transfer.copy_attention(*pair(), kind, blocks)
        output = copier(x)
        output.square().sum().backward()
        got[f"stage/copy{suffix}/output"] = output.detach()
        rows = copier.blocks[0].attn.qkv.weight.grad.chunk(3)
        expected = info["results"][f"copy{suffix}"]["grad_norm_of_q_k_v_rows_block0"]
        assert [row.norm().item() for row in rows] == pytest.approx(expected, rel=1e-4)
    compare(got, tensors, info)
