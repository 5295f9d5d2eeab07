"""Analyses against the authors' code and the stored definitions."""

import golden
import pytest
import timm
import torch
from torch import nn

from backbones.analysis import activations, attention, dimension, explain, heads, run, similarity, spectrum

METHODS = ("transformer_attribution", "rollout", "last_layer_grad", "last_layer_attn", "last_layer")


def model_of(info: dict, tensors: dict) -> nn.Module:
    model = timm.create_model(info["model"], **info["kwargs"]).eval()
    model.load_state_dict(golden.state(tensors))
    return model


def compare(got: dict, tensors: dict, info: dict) -> None:
    """Every stored tensor but inputs and weights."""
    stored = {key: value for key, value in tensors.items() if not key.startswith(("input", "state/", "labels"))}
    assert stored.keys() <= got.keys(), stored.keys() - got.keys()
    for key, value in stored.items():
        found = got[key].to(value.dtype)
        torch.testing.assert_close(found, value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("case", golden.cases("analysis_attention"))
def test_attention_statistics(case, batch_size):
    info, tensors = golden.load(case)
    model = model_of(info, tensors)
    found = attention.attention_statistics(model, tensors["input"], batch_size)
    with torch.no_grad():
        got = {f"stage/attn_{layer.index}": layer.attention for layer in run.layers(model, tensors["input"])}
    for i in range(len(found.layers)):
        got |= {f"distance_{i}": found.distance[i], f"nmi_{i}": found.nmi[i], f"entropy_{i}": found.entropy[i]}
    compare(got, tensors, info)


@pytest.mark.parametrize("case", golden.cases("analysis_spectrum"))
def test_spectrum(case):
    info, tensors = golden.load(case)
    model = model_of(info, tensors)
    found = spectrum.feature_spectrum(model, tensors["input"], batch_size=1)
    got = {"log_amplitude": found.log_amplitude, "variance": found.variance}
    with torch.no_grad():
        maps = list(spectrum.latents(model, tensors["input"]))
    got |= {f"stage/latent_{i}": maps[i][1].flatten(2).mT for i in range(len(maps))}
    compare(got, tensors, info)


@pytest.mark.parametrize("case", golden.cases("analysis_cka"))
def test_cka(case):
    info, tensors = golden.load(case)
    features = [tensors[f"input/{i}"] for i in range(len(info["dims"]))]
    batch = info["batch"]
    starts = range(0, info["n"] - batch + 1, batch)
    mean = sum(similarity.hsic([x[i : i + batch] for x in features]) for i in starts) / len(starts)
    whole = similarity.hsic(features)
    biased = torch.stack([torch.stack([similarity.linear_cka(x, y) for y in features]) for x in features])
    got = {"biased": biased, "debiased": similarity.cka_of(whole), "hsic_unbiased_full": whole}
    compare(got | {"minibatch": similarity.cka_of(mean), "minibatch_hsic": mean}, tensors, info)


@pytest.mark.parametrize("case", golden.cases("analysis_phases"))
def test_distances_and_phases(case):
    info, tensors = golden.load(case)
    found = similarity.distances(list(tensors["input"]), info["prefix_tokens"])
    got = {"cosine_distance": found["cosine"].mean(0), "mse": found["mse"].mean(0), "norms": found["norms"].mean(0)}
    compare(got, tensors, info)
    for fraction, expected in info["phases_by_eps_fraction"].items():
        assert similarity.phases(tensors["cosine_distance"], float(fraction), info["min_size"]) == expected, fraction


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("case", golden.cases("analysis_layers"))
def test_dimension_heads_and_activations(case, batch_size):
    info, tensors = golden.load(case)
    model, x, labels = model_of(info, tensors), tensors["input"], tensors["labels"]
    size = dimension.effective_dimension(model, x, batch_size)
    acts = activations.activation_statistics(model, x, batch_size=batch_size)
    found = heads.head_importance(model, x, labels, batch_size)
    got = {"eed": size.uncentred, "eed_centred": size.centred, "spectral_entropy": size.uncentred.log()}
    got |= {"massive_top3": acts.largest, "massive_median": acts.median}
    got |= {"active_share": acts.active[0.0], "active_share_0.01": acts.active[0.01]}
    got |= {"head_importance": found.importance, "head_importance_l2": found.relative}
    compare(got | {"head_gate_gradient": heads.gate_gradients(model, x, labels)}, tensors, info)


@pytest.mark.parametrize("case", golden.cases("analysis_explain", exclude="analysis_explain_general"))
def test_explanations_of_the_authors(case):
    """All images in one batch; the authors ran them one by one."""
    info, tensors = golden.load(case)
    model, x = model_of(info, tensors), tensors["input"]
    got = {}
    for tag, classes in info["classes"].items():
        maps, gradients, got["stage/logits"] = explain.attention_gradients(model, x, classes)
        got[f"generic_{tag}"] = explain.relevance(model, x, classes)
        relevances = explain.map_relevances(model, x, torch.tensor(classes))
        for i, (one, gradient, cam) in enumerate(zip(maps, gradients, relevances, strict=True)):
            got |= {f"stage/attn_{i}": one, f"stage/attn_grad_{i}_{tag}": gradient, f"stage/lrp_attn_cam_{i}_{tag}": cam}
        for start in range(len(maps)):
            got |= {
                f"lrp_{m}_start{start}_{tag}": explain.attribution(model, x, classes, m, start)
                for m in METHODS
                if f"lrp_{m}_start{start}_{tag}" in tensors
            }
            got[f"rollout_start{start}"] = explain.rollout(model, x, start)
    compare(got, tensors, info)


@pytest.mark.parametrize("case", golden.cases("analysis_explain_general"))
def test_explanations_of_models_with_other_tokens_and_pooling(case):
    info, tensors = golden.load(case)
    model, x = model_of(info, tensors), tensors["input"]
    assert model.num_prefix_tokens == info["num_prefix_tokens"]
    maps, _, scores = explain.attention_gradients(model, x)
    assert scores.argmax(1).tolist() == info["classes"]
    got = {"generic": explain.relevance(model, x), "rollout": explain.rollout(model, x), "stage/logits": scores}
    compare(got | {"stage/pool_attn": maps[-1]}, tensors, info)


@pytest.mark.parametrize("case", golden.cases("analysis_rollout_discard"))
def test_rollout_of_the_strongest_attention(case):
    info, tensors = golden.load(case)
    model, x, got = model_of(info, tensors), tensors["input"], {}
    with torch.no_grad():
        maps = [layer.attention for layer in run.layers(model, x)]
        grid = run.grid_of(model, x)
    for key in tensors:
        if key.startswith("rollout_"):
            fusion, discard = key.removeprefix("rollout_").split("_discard")
            row = explain.discarding_rollout(maps, fusion, float(discard), published=True)[0, 0, 1:]
            got[key] = (row / row.max()).reshape(grid)
    compare(got, tensors, info)
