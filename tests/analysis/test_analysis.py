"""What analyses must be whatever the model: bounds, closed forms, and a model that is as it was before."""

import copy
import math
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import backbones  # noqa: F401  (registers our models with timm)
import heads as dense_heads
from backbones import edits
from backbones.analysis import activations, attention, dimension, explain, heads, run, similarity, spectrum

sys.path.append(str(Path(__file__).resolve().parents[1] / "edits"))
from vits import KINDS, OTHERS, small

ALL = {
    "attention": attention.attention_statistics,
    "spectrum": spectrum.feature_spectrum,
    "dimension": dimension.effective_dimension,
    "activations": activations.activation_statistics,
    "similarity": lambda model, x: similarity.layer_similarity(model, torch.cat([x, x.flip(0) + 1])),
    "heads": lambda model, x: heads.head_importance(model, x, torch.tensor([0, 1])),
    "rollout": explain.rollout,
    "relevance": explain.relevance,
}


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_the_walk_is_the_model(name):
    """Fused or not, whatever the positions, norms, scales and gates: the last tokens are those of the model."""
    model, x = small(name)
    with torch.no_grad():
        found = list(run.layers(model, x))
        torch.testing.assert_close(model.norm(found[-1].tokens), model.forward_features(x), atol=2e-5, rtol=1e-4)
        for layer in found:
            torch.testing.assert_close(layer.attention.sum(-1), torch.ones(layer.attention.shape[:3]))


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"])
@pytest.mark.parametrize("what", ALL)
def test_nothing_of_the_model_is_changed(what, name):
    model, x = small(name)
    model.train()
    model.blocks[1].eval()  # a frozen block stays frozen
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    fused = [block.attn.fused_attn for block in model.blocks]
    ALL[what](model, x)
    assert [module.training for module in model.modules()] == modes
    assert [block.attn.fused_attn for block in model.blocks] == fused
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )


def test_hooks_and_modes_go_back_after_an_error_too():
    model, _ = small("vit_tiny_patch16_224")
    model.train()
    wrong = torch.randn(2, 3, 64, 60)
    for what in ALL.values():
        with pytest.raises((AssertionError, RuntimeError)):
            what(model, wrong)
    net = dense_heads.DensePredictor(
        "vit_tiny_patch16_224", "linear", 3, backbone_args={"depth": 2, "embed_dim": 48}, img_size=32
    )
    with pytest.raises(ValueError, match=r"channel 3 at \(0, 0\) is outside the output \(1, 3, 32, 32\)"):
        explain.pixel_relevance(net, torch.randn(1, 3, 32, 32), 3, 0, 0)
    for module in (*model.modules(), *net.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module) and module.training


def test_rows_of_rollout_sum_to_one_and_uniform_attention_stays_uniform():
    maps = torch.rand(3, 2, 4, 7, 7).softmax(-1)
    torch.testing.assert_close(explain.rollout_of(list(maps)).sum(-1), torch.ones(2, 7))
    uniform = torch.full((2, 4, 7, 7), 1 / 7)
    result = explain.rollout_of([uniform] * 3)
    off = result - torch.diag_embed(torch.diagonal(result, dim1=1, dim2=2))
    torch.testing.assert_close(off[:, 0, 1:], off[:, 1, 2:3].expand(2, 6))


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_relevance_is_not_negative_and_each_images_own(name):
    model, x = small(name)
    found, shown = explain.relevance(model, x), explain.rollout(model, x)
    assert found.shape == shown.shape == (2, 20) and (found >= 0).all() and (shown >= 0).all()
    torch.testing.assert_close(found, torch.cat([explain.relevance(model, image[None]) for image in x]), atol=1e-6, rtol=1e-4)


def test_a_class_without_weights_has_no_relevance():
    model, x = small("vit_tiny_patch16_224")
    with torch.no_grad():
        model.head.weight[3] = 0
    assert (explain.relevance(model, x, 3) == 0).all() and (explain.relevance(model, x, 2) > 0).any()


def test_frozen_models_are_explained_too():
    model, x = small("vit_tiny_patch16_224")
    expected = explain.relevance(model, x)
    assert torch.equal(explain.relevance(model.requires_grad_(False), x), expected)


def test_a_pixel_of_a_dense_predictor():
    torch.manual_seed(0)
    args = {"depth": 3, "embed_dim": 48, "num_heads": 2}
    net = dense_heads.DensePredictor("vit_small_patch16_dinov3", "linear", 3, backbone_args=args, img_size=(64, 80)).eval()
    x = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        before = net(x)
    found = explain.pixel_relevance(net, x, channel=1, row=40, column=70)
    assert found.shape == (2, 20) and (found >= 0).all() and (found > 0).any()
    with torch.no_grad():
        assert torch.equal(net(x), before)


def test_cka_of_a_layer_with_itself_is_one_and_of_independent_ones_zero_on_average():
    torch.manual_seed(0)
    x, y = torch.randn(200, 5), torch.randn(200, 9)
    table = similarity.cka_of(similarity.hsic([x, y, 3 * x @ torch.linalg.qr(torch.randn(5, 5))[0] + 7]))
    torch.testing.assert_close(table, table.mT)
    torch.testing.assert_close(table.diagonal(), torch.ones(3, dtype=torch.float64))
    assert table[0, 2] == pytest.approx(1, abs=1e-6)  # shifted, turned, scaled
    found = [similarity.hsic([torch.randn(8, 3), torch.randn(8, 3)])[0, 1] for _ in range(400)]
    mean, error = torch.stack(found).mean(), torch.stack(found).std() / 20
    assert abs(mean) < 4 * error
    assert similarity.linear_cka(x, y) > 0.01  # the biased one is not


def test_phases_of_a_depth_with_two_halves():
    halves = torch.zeros(6, 6)
    halves[:2, 2:] = halves[2:, :2] = 1.0
    assert similarity.phases(halves, 0.2) == [[0, 1], [2, 3, 4, 5]]
    deep = torch.zeros(24, 24)
    deep[:9, 9:] = deep[9:, :9] = 1.0
    assert similarity.phases(deep, 0.2) == [list(range(9)), list(range(9, 24))]  # too deep for every cut to be tried


def test_distance_entropy_and_information_of_known_attention():
    grid, prefix = (3, 4), 2
    count = 12
    distances = attention.patch_distances(grid, (8.0, 16.0))
    assert distances[0, 1] == 16 and distances[0, 4] == 8 and distances[0, 5] == pytest.approx(math.hypot(8, 16))
    uniform = torch.full((1, 1, 14, 14), 1 / 14)
    assert attention.attention_distance(uniform, prefix, distances).item() == pytest.approx(distances.mean().item(), rel=1e-5)
    assert attention.attention_entropy(uniform, prefix).item() == pytest.approx(math.log(14), rel=1e-5)
    assert attention.attention_nmi(uniform, prefix).item() == pytest.approx(0, abs=1e-5)
    itself = torch.eye(14)[None, None]
    assert attention.attention_distance(itself, prefix, distances).item() == 0
    assert attention.attention_entropy(itself, prefix).item() == 0
    assert attention.attention_nmi(itself, prefix).item() == pytest.approx(1, abs=1e-5)
    shuffled = itself[:, :, :, [0, 1, *(torch.randperm(count) + 2).tolist()]]
    assert attention.attention_nmi(shuffled, prefix).item() == pytest.approx(1, abs=1e-5)


def test_dimension_of_white_and_of_rank_one_data():
    torch.manual_seed(0)
    white = torch.randn(20000, 8)
    assert dimension.spectral_entropy(white.mT @ white).exp() == pytest.approx(8, rel=1e-2)
    line = torch.outer(torch.randn(50), torch.randn(8))
    assert dimension.spectral_entropy(line.mT @ line).exp() == pytest.approx(1, abs=1e-4)


def test_a_head_that_nobody_reads_has_no_importance_and_is_the_least():
    model, x = small("vit_tiny_patch16_224", num_heads=4)
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[:, 24:36] = 0
    labels = torch.tensor([0, 1])
    found = heads.head_importance(model, x, labels)
    assert found.importance[1, 2] == 0 and (found.importance > 0).sum() == 11
    assert found.least(1) == {1: [2]}
    assert all(len(chosen) <= 3 for chosen in found.least(99).values())
    assert heads.head_masking(model, x, labels)[1, 2] == 0


def test_the_spectrum_of_one_wave_is_at_its_frequency():
    rows = torch.arange(8)
    wave = torch.cos(2 * math.pi * 2 * (rows[:, None] + rows) / 8)[None, None]
    found = spectrum.log_amplitude(wave + 1e-3 * torch.randn(1, 1, 8, 8))
    assert found.shape == (1, 4) and found.argmax(1).item() == 2
    assert spectrum.log_amplitude(torch.randn(1, 2, 6, 9)).shape == (1, 3)  # the shorter side counts


def test_sparsity_counts_what_a_relu_lets_through():
    model, x = small("vit_tiny_patch16_224", act_layer="relu")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias.fill_(-1e3)
    found = activations.activation_statistics(model, x)
    assert found.active[0.0][0] == 0 and 0 < found.active[0.0][1] < 1
    with torch.no_grad():
        model.blocks[2].mlp.fc2.bias[5] = 1e6
    massive = activations.activation_statistics(model, x)
    assert massive.massive[2] == 1 and massive.channel[2] == 5 and massive.massive[0] == 0


@pytest.mark.parametrize("name", OTHERS.values(), ids=OTHERS)
def test_models_without_one_map_for_each_block_are_refused(name):
    model, x = small(name)
    for what in ALL.values():
        with pytest.raises(ValueError, match="understood are|is not one of timm's"):
            what(model, x)


def test_what_cannot_be_measured_is_one_sentence():
    model, x = small("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="at least 4 in a batch, got 2"):
        similarity.layer_similarity(model, x)
    with pytest.raises(ValueError, match="class 7 does not exist: the model has classes 0 to 6"):
        explain.relevance(model, x, 7)
    with pytest.raises(ValueError, match="labels reach from 0 to 9, the model has 7 classes"):
        heads.head_importance(model, x, torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="2 images need as many labels, got 0"):
        heads.head_importance(model, x)
    with pytest.raises(ValueError, match="no images to measure"):
        attention.attention_statistics(model, [])
    with pytest.raises(ValueError, match="all images must have one size"):
        attention.attention_statistics(small("vit_tiny_patch16_224", dynamic_img_size=True)[0], [x, x[..., :48]])
    with pytest.raises(ValueError, match="start must be a block, 0 to 2, got 3"):
        explain.rollout(model, x, 3)
    with pytest.raises(ValueError, match="has no classifier"):
        explain.relevance(small("vit_tiny_patch16_224", num_classes=0)[0], x)
    with pytest.raises(ValueError, match="is not one of timm's"):
        explain.rollout(timm.create_model("resnet18", device="meta"), x)
    with pytest.raises(ValueError, match="merges tokens.*analyse it before that"):
        explain.rollout(edits.apply(model, [{"name": "token_merging", "r": 1}]), x)
    with pytest.raises(ValueError, match="this model is read otherwise"):
        explain.attribution(*small("vit_small_patch16_dinov3"))
    with pytest.raises(ValueError, match=r"blocks.0.attn normalises .* attribution has no rule"):
        explain.attribution(*small("vit_tiny_patch16_224", qk_norm=True))
    with pytest.raises(ValueError, match="method must be one of"):
        explain.attribution(*small("vit_tiny_patch16_224"), method="grad")


def test_a_model_under_a_wrapper_is_found():
    model, x = small("vit_tiny_patch16_224")
    wrapped = nn.Module()
    wrapped.model = copy.deepcopy(model)
    found, expected = (attention.attention_statistics(m, x) for m in (wrapped, model))
    assert torch.equal(found.distance, expected.distance) and found.images == 2
