"""What one place attends to: the weights that are drawn are those the model used."""

import families
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import backbones  # noqa: F401  (registers our models with timm)
from backbones.analysis import points
from backbones.edits import irpe, token_merging
from backbones.fcaformer import FcaBlock, keys_and_values, to_windows
from backbones.litv2 import HiLo
from backbones.nat import NeighborhoodAttention
from backbones.sret import GroupAttention
from backbones.swin import WindowAttention

AT = (0.8, 0.3)
FLAT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}


def attended(weights, v):
    """Heads' mean values h H W, H W h d -> h*d."""
    return torch.einsum("hij,ijhd->hd", weights, v).flatten()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (4, 4)])
@torch.no_grad()
def test_window_attention_is_the_modules_own(shifted, size):
    torch.manual_seed(0)
    attn = WindowAttention(8, 2, 4, shifted, None, True, None, 0.0)
    nn.init.normal_(attn.relative_position_bias_table)
    x = torch.randn(1, *size, 8)
    ((kind, weights),) = points.of_windows(attn, x, AT)
    row, column = points.cell(AT, *size)
    v = attn.qkv(x)[0].unflatten(-1, (3, 2, -1))[:, :, 2]
    torch.testing.assert_close(attn.proj(attended(weights, v)), attn(x)[0, row, column])
    assert kind == ("window 4, shifted by 2" if shifted else "window 4") and (weights > 1e-12).sum((1, 2)).max() <= 16


@torch.no_grad()
def test_padding_takes_its_share_of_a_window():
    attn = WindowAttention(8, 2, 4, False, None, True, None, 0.0)
    ((_, weights),) = points.of_windows(attn, torch.randn(1, 6, 6, 8), (0.99, 0.99))
    assert weights.shape == (2, 6, 6) and ((weights > 0).sum((1, 2)) == 4).all() and (weights.sum((1, 2)) < 0.9).all()


@pytest.mark.parametrize("dilation", [1, 2])
@torch.no_grad()
def test_neighbourhood_attention_is_the_modules_own(dilation):
    torch.manual_seed(0)
    attn = NeighborhoodAttention(8, 2, 3, dilation)
    nn.init.normal_(attn.rpb)
    x = torch.randn(1, 7, 9, 8)
    ((kind, weights),) = points.of_neighbourhood(attn, x, AT)
    row, column = points.cell(AT, 7, 9)
    v = attn.qkv(x)[0].unflatten(-1, (3, 2, -1))[:, :, 2]
    torch.testing.assert_close(attn.proj(attended(weights, v)), attn(x)[0, row, column])
    assert ((weights > 0).sum((1, 2)) == 9).all() and kind == f"3x3 neighbours, {dilation} apart"


@torch.no_grad()
def test_high_and_low_frequencies_are_the_modules_own():
    torch.manual_seed(0)
    attn = HiLo(12, 3, 2, 0.34)
    x = torch.randn(1, 6, 8, 12)
    (high, hi), (low, lo) = points.of_hilo(attn, x, AT)
    row, column = points.cell(AT, 6, 8)
    v = attn.h_qkv(x)[0].unflatten(-1, (3, attn.hi_heads, -1))[:, :, 2]
    means = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)[0]
    pooled = attn.l_kv(means).unflatten(-1, (2, attn.lo_heads, -1))[:, :, 1]
    expected = torch.cat([attn.h_proj(attended(hi, v)), attn.l_proj(attended(lo, pooled))])
    torch.testing.assert_close(expected, attn(x)[0, row, column])
    assert (high, low) == ("high: window 2", "low: means of 2x2") and lo.shape == (attn.lo_heads, 3, 4)


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_a_vit_shows_its_maps_with_fused_attention_too(fused):
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 80), depth=2, embed_dim=24, num_heads=3).eval()
    image, maps = torch.randn(1, 3, 48, 80), []
    for block in model.blocks:  # what hooks on the dropout find, which runs without the fused kernel only
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: maps.append(output))
    model(image)
    for block in model.blocks:
        block.attn.fused_attn = fused
    found = points.point_attention(model, image, AT, {0: (3, 5)})
    row, column = points.cell(AT, 3, 5)
    for one, expected in zip(found, maps[:2], strict=True):
        torch.testing.assert_close(one.weights.flatten(1), expected[0, :, 1 + row * 5 + column, 1:])


class Stand(nn.Module):
    """A stand-in for a network: one attention, and calls that are nobody's."""

    num_prefix_tokens = 1

    def __init__(self, call):
        super().__init__()
        self.stages = nn.ModuleList([Cells(call)])

    def forward(self, image):
        window = torch.randn(1, 2, 24, 4)
        F.scaled_dot_product_attention(window, window, window)  # as many tokens as cells, and none of CELLS
        return self.stages[0](image)


class Cells(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, image):
        return F.scaled_dot_product_attention(*self.call[:3], attn_mask=self.call[3], scale=0.3)


@torch.no_grad()
def test_calls_of_the_fused_kernel_are_read_with_prefix_mask_and_pooled_keys(monkeypatch):
    """A class token, keys of half the map and a bias."""
    torch.manual_seed(0)
    monkeypatch.setattr(points, "CELLS", (Cells,))
    q, k, v = torch.randn(1, 2, 1 + 24, 4), torch.randn(1, 2, 1 + 6, 4), torch.randn(1, 2, 1 + 6, 4)
    bias = torch.randn(1, 1, 25, 7)
    model = Stand((q, k, v, bias))
    (found,) = points.point_attention(model, torch.zeros(1), AT, {0: (4, 6)}, model)
    row, column = points.cell(AT, 4, 6)
    expected = (q[0, :, 1 + row * 6 + column, None] @ k[0].mT * 0.3 + bias[0, 0, 1 + row * 6 + column]).softmax(-1)[:, 0, 1:]
    torch.testing.assert_close(found.weights.flatten(1), expected)
    assert found.weights.shape == (2, 2, 3) and found.kind == "2x3 pooled keys of 4x6"
    monkeypatch.setattr(Stand, "num_prefix_tokens", 0)  # then 25 queries are no map of 4 x 6
    assert points.point_attention(model, torch.zeros(1), AT, {0: (4, 6)}, model) == []


SMALL = {
    "swin_t": ({"img_size": (64, 96), "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}, {"window 7": 4}),
    "nat_mini": ({"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "kernel_size": 3}, {"3x3 neighbours": 2}),
    "litv2_s": ({"dims": (8, 8, 12, 12), "depths": (1,) * 4, "heads": (1, 1, 3, 3)}, {"high": 1, "low": 1, "all cells": 1}),
    "sparsifiner_deit_s": ({"img_size": (64, 96), "depth": 2, "embed_dim": 24, "heads": 3}, {"of the keys": 2}),
    "pit_ti": ({"depths": (1, 1, 1)}, {"all cells": 3}),
    "cvt_13": ({"depths": (1, 1, 1)}, {"pooled keys": 3}),
    "lit_s": ({"depths": (1, 1, 1, 1)}, {"all cells": 2}),
    "poolformer_s12_gn": ({"depths": (1, 1, 1, 1)}, {}),
    "stvit_small": ({"depths": (1, 1, 1, 1)}, {}),  # its super tokens are as many as the cells of the next stage
    "sret_t": ({"depths": (1, 1, 1)}, {"of 8 slices": 1, "of 2 slices of permuted": 1, "of 4 slices": 1, "all tokens": 3}),
    "fcaformer_l1": (
        {"img_size": (64, 96), "dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "heads": (0, 0, 2, 2)},
        {"window 4x6 and tokens left behind": 1, "window": 2},
    ),
    "deit_tiny_irpe_ctx_product_50_shared_k": ({"embed_dim": 24, "depth": 2, "num_heads": 2}, {"relative positions": 2}),
}


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_every_family_shows_its_attention(name):
    args, kinds = SMALL[name]
    model = timm.create_model(name, **args)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    image = torch.randn(1, 3, 64, 96)
    model.eval()
    maps = model.forward_intermediates(image, intermediates_only=True)
    model.train()
    sizes = {stage: tuple(one.shape[2:]) for stage, one in enumerate(maps)}
    found = points.point_attention(model, image, AT, sizes)
    for text, count in kinds.items():
        fitting = [one for one in found if next(kind for kind in kinds if kind in one.kind) == text]
        assert len(fitting) == count, [one.kind for one in found]
    assert len(found) == sum(kinds.values())
    for one in found:
        total = one.weights.sum((1, 2))
        assert (one.weights >= 0).all() and (total > 0.2).all() and (total < 1 + 1e-5).all(), one
    assert model.training and not model._forward_hooks
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_relative_positions_are_the_modules_own():
    torch.manual_seed(0)
    model = irpe(timm.create_model("vit_tiny_patch16_224", **FLAT, dynamic_img_size=True), "qk", "cross")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    attn, x = model.blocks[0].attn, torch.randn(1, 12, 16)
    attn.grid_source[0].last_grid = (3, 4)
    ((_, weights),) = points.of_relative(attn, points.Given("blocks.0.attn", (x,), (3, 4)), AT)
    row, column = points.cell(AT, 3, 4)
    v = attn.qkv(x)[0].view(3, 4, 3, 2, 8)[:, :, 2]
    torch.testing.assert_close(attn.proj(attended(weights, v)), attn(x)[0, row * 4 + column])


@pytest.mark.parametrize(("groups", "permuted"), [(1, False), (4, True), (5, True), (5, False)])
@torch.no_grad()
def test_slices_are_the_modules_own(groups, permuted):
    torch.manual_seed(0)
    attn, x = GroupAttention(8, 2), torch.randn(1, 24, 8)
    order = torch.randperm(24) if permuted else None
    ((kind, weights),) = points.of_slices(attn, points.Given("stages.0", (x, groups, order), (4, 6)), AT)
    row, column = points.cell(AT, 4, 6)
    v = attn.qkv(x)[0].view(4, 6, 3, 2, 4)[:, :, 2]
    torch.testing.assert_close(attn.proj(attended(weights, v)), attn(x, groups, order)[0, row * 6 + column])
    assert (weights > 0).sum((1, 2)).max() <= -(-24 // groups) and ("permuted" in kind) == permuted


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_windows_with_tokens_left_behind_are_the_modules_own(left):
    torch.manual_seed(0)
    block = FcaBlock(8, 2, (2, 3), earlier=1, leaves=True, mlp_ratio=1, layer_scale=1.0, drop_path=0.0).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, behind = torch.randn(1, 8, 5, 7), torch.randn(9, 1, 8) if left else None
    tiles = to_windows(x, (2, 3), front=False)
    ((_, weights),) = points.of_fca(block, points.Given("stages.2.blocks.1", (tiles, behind), (5, 7)), AT)
    row, column = points.cell(AT, 5, 7)
    number, token = row // 2 * 3 + column // 3, row % 2 * 3 + column % 3
    inside = block.norm1(tiles.flatten(2).mT)
    v = block.qkv(block.norm1(x.permute(0, 2, 3, 1)))[0, :, :, 16:].unflatten(-1, (2, 4))
    out = block.proj.weight @ attended(weights, v) + block.proj.bias
    expected = block.attention(inside, behind)[number, token]
    rest = 1 - weights.sum((1, 2))  # of the tokens left behind; the window of this place has no padding
    if left:
        assert (rest > 0).all()
        others = keys_and_values(block.s_norm(behind[[number]] * block.s_scale_factors), block.qkv.weight, block.qkv.bias)
        out = out + block.proj.weight @ (rest[:, None] * others[0, 0, 8:].view(2, 4)).flatten()
    torch.testing.assert_close(out, expected)


def test_why_nothing_is_shown():
    assert points.why_unread(timm.create_model("poolformer_s12_gn", **families.narrow("poolformer_s12_gn"))) == (
        "it has no attention"
    )
    assert "super tokens" not in points.why_unread(timm.create_model("resnet18"))
    merged = token_merging(timm.create_model("vit_tiny_patch16_224", **FLAT), 1)
    assert "merges tokens" in points.why_unread(merged)


@pytest.mark.parametrize("name", ["nat_isotropic_small", "vitrpb_small"])
@torch.no_grad()
def test_an_attention_of_a_flat_network_belongs_to_its_own_block(name):
    """Maps of two of the blocks are asked for, and all have one size."""
    args = {"embed_dim": 24, "depth": 4, "num_heads": 2} | (
        {"img_size": (64, 96)} if name == "vitrpb_small" else {"kernel_size": 3}
    )
    model = timm.create_model(name, **args).eval()
    found = points.point_attention(model, torch.randn(1, 3, 64, 96), AT, {1: (4, 6), 3: (4, 6)})
    assert [one.stage for one in found] == [1, 3]


@torch.no_grad()
def test_kept_connections_are_those_of_the_mask():
    model = timm.create_model("sparsifiner_deit_s", img_size=(64, 96), depth=2, embed_dim=24, heads=3, keep_rate=0.5).eval()
    for one in points.point_attention(model, torch.randn(1, 3, 64, 96), AT, {0: (4, 6)}):
        assert one.kept.dtype == torch.bool and 11 <= one.kept.sum((1, 2)).min() <= one.kept.sum((1, 2)).max() <= 13  # of 25
        assert (one.weights[~one.kept] == 0).all() and (one.dense > 0).all()


def test_the_salient_place_is_the_odd_one_out_and_not_the_loudest():
    features = torch.ones(8, 6, 10) + 0.01 * torch.randn(8, 6, 10)
    features[:, 1, 1] *= 1000  # an outlier in norm alone
    features[:4, 3:6, 6:9] *= -1
    x, y = points.most_salient(features)
    assert 0.6 <= x <= 0.9 and 0.5 <= y <= 1


def test_main_components_part_what_differs():
    features = torch.randn(16, 6, 10) * 0.01
    features[0, :, 5:] += 5
    colors = points.principal_colors(features)
    assert colors.shape == (6, 10, 3) and colors.min() >= 0 and colors.max() <= 1
    assert (colors[:, :5, 0].mean() - colors[:, 5:, 0].mean()).abs() > 0.8
    assert points.principal_colors(torch.randn(2, 1, 1)).shape == (1, 1, 3)
