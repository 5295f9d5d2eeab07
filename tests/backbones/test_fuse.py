"""backbones.fuse: the same outputs with fewer passes, for every family; it says what it did and gives the model back."""

import copy
import io

import pytest
import timm
import torch
from timm.layers import LayerScale, LayerScale2d
from torch import nn

import backbones
from backbones.fuse import LEAST_ROWS, MOST_ROWS, InPlaceGELU, PackedLinear, said

# the cheapest model of a family; the second value: whether nothing with the name BatchNorm may be left
CHEAP = {
    "cvt_13": True,
    "deit_tiny_irpe_ctx_product_50_shared_k": True,
    "fan_tiny_8_p4_hybrid": False,
    "fcaformer_l1": False,
    "flatten_pvt_v2_b0": True,
    "hvt_ti_1": False,
    "lit_ti": True,
    "litv2_s": True,
    "nat_mini": True,
    "pit_ti": True,
    "poolformer_s12_gn": True,
    "slab_deit_t_prepbn": True,
    "sparsifiner_lvvit_s": True,
    "sret_t": False,
    "stvit_small": False,
    "swin_t": True,
    "vit_small_patch14_ttreg_dinov2": True,
}

# a family that is not named above is tested by the first of its models
FAMILIES = {timm.model_entrypoint(name).__module__: (name, False) for name in reversed(backbones.list_models())}
FAMILIES |= {timm.model_entrypoint(name).__module__: (name, whole) for name, whole in CHEAP.items()}


def made(name, **args):
    """A model with statistics and scales that are not the initial ones, so that folding them is seen."""
    torch.manual_seed(0)
    model = timm.create_model(name, **args).eval()
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
        if isinstance(part, LayerScale | LayerScale2d):
            nn.init.uniform_(part.gamma, 0.5, 1.5)
    return model


@pytest.mark.parametrize(("name", "no_batch_norm"), FAMILIES.values(), ids=lambda value: str(value))
def test_a_fused_model_gives_the_same(name, no_batch_norm):
    # 70: patches of 14 divide it; blocks beyond the first few say nothing new
    fixed = name.startswith(("hvt", "deit", "slab_deit"))
    size = 224 if fixed else 70 if "patch14" in name else 64
    model = made(name, img_size=size)
    fused = backbones.fuse(model)
    if no_batch_norm:
        assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in fused.modules())
    assert sum(fused.fusion.values()) > 0
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        bound = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(fused(x), expected, atol=bound, rtol=0.0)
        torch.testing.assert_close(model(x), expected, atol=0.0, rtol=0.0)  # the model itself is as it was


def test_fusing_folds_batch_norms_in_sequences_and_keeps_what_cannot_be_folded():
    torch.manual_seed(0)
    foldable = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2)]
    foldable += [nn.BatchNorm2d(6, affine=False)]
    kept = [nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 6, 2), nn.BatchNorm2d(6)]
    kept += [nn.Conv2d(6, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)]
    model = nn.Sequential(*foldable, *kept, nn.Flatten(), nn.Linear(2 * 49, 5), nn.BatchNorm1d(5))
    x = torch.randn(8, 3, 8, 8)
    model(x)  # statistics that are not the initial ones
    model.eval()
    fused = backbones.fuse(model)
    assert [type(m) for m in fused if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)] == [nn.BatchNorm2d] * 3
    assert fused.fusion == {"batch norms folded": 3}
    torch.testing.assert_close(fused(x), model(x), atol=1e-5, rtol=1e-5)


def test_it_says_what_it_did_and_gives_the_model_back():
    model = made("test_vit")
    fused = backbones.fuse(model)
    assert said(fused.fusion).startswith(f"{fused.fusion['activations in place']} activations in place")
    assert backbones.unfuse(fused) is model and backbones.unfuse(backbones.fuse(fused)) is model
    assert not any(key.startswith("_unfused") for key in fused.state_dict())
    for other, reason in ((model, "backbones.fuse did not make it"), (backbones.fuse(model, keep=False), "keep=False")):
        with pytest.raises(ValueError, match=reason):
            backbones.unfuse(other)


def test_layer_scales_are_folded():
    fused = backbones.fuse(made("nat_mini", depths=(1, 1, 1, 1), layer_scale=1e-5))
    assert fused.fusion["layer scales folded"] == 8
    assert not any(isinstance(part, LayerScale) for part in fused.modules())


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(384, 512), InPlaceGELU(), nn.Linear(512, 384)).eval()


@pytest.mark.parametrize("rows", [1, LEAST_ROWS, MOST_ROWS, MOST_ROWS + 1])
def test_packed_weights_are_used_where_they_pay_and_follow_the_weights(rows, monkeypatch):
    model, x = wide(), torch.randn(2, rows, 384)[:1]
    fused = backbones.fuse(model)
    assert [type(part) for part in fused] == [PackedLinear, InPlaceGELU, PackedLinear]
    assert [id(p) for p in fused.parameters()] != [id(p) for p in model.parameters()]
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), model(x.clone()), atol=1e-5, rtol=1e-5)
        assert (fused[0]._packed is not None) == (LEAST_ROWS <= rows <= MOST_ROWS)
        for part in (model, fused):
            part[0].weight.mul_(2)
        torch.testing.assert_close(fused(x.clone()), model(x.clone()), atol=1e-5, rtol=1e-5)
        fused.load_state_dict(wide().state_dict())
        torch.testing.assert_close(fused(x.clone()), wide()(x.clone()), atol=1e-5, rtol=1e-5)
        copied = copy.deepcopy(fused)
        assert copied[0]._packed is None
        torch.testing.assert_close(copied(x.clone()), fused(x.clone()), atol=0.0, rtol=0.0)
    torch.save(fused, io.BytesIO())


def test_a_fused_model_has_gradients_and_other_types():
    fused, x = backbones.fuse(wide()), torch.randn(1, 16, 384, requires_grad=True)
    fused(x).sum().backward()
    assert x.grad.abs().sum() > 0 and fused[0].weight.grad.abs().sum() > 0
    with torch.no_grad():
        fused(x.detach())  # packs
        assert fused.double()(x.detach().double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert fused.float()(x.detach()).dtype == torch.bfloat16


def test_tracers_and_export_meet_ordinary_layers():
    fused, x = backbones.fuse(wide()), torch.randn(2, 16, 384)
    with torch.no_grad():
        expected = fused(x.clone())
        program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert {str(node.target) for node in program.graph.nodes if node.op == "call_function"} == {
            "aten.linear.default",
            "aten.gelu.default",
        }
        torch.testing.assert_close(program.module()(x.clone()), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x.clone()), expected, atol=1e-5, rtol=1e-5)


def test_a_count_of_operations_includes_packed_layers():
    from torch.utils.flop_counter import FlopCounterMode

    fused, x = backbones.fuse(wide()), torch.randn(2, 16, 384)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fused(x)
    assert counter.get_total_flops() == 2 * 32 * 384 * 512 * 2
