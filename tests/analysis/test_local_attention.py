"""Attention statistics of windows, neighbourhoods and HiLo, against maps read off the modules by probing their values."""

import itertools

import pytest
import timm
import torch
from torch import Tensor, nn

import backbones  # noqa: F401  (registers our models with timm)
import heads as dense_heads
from backbones.analysis import local
from backbones.analysis.local import LocalAttention, local_attention_statistics, measured
from backbones.litv2 import HiLo
from backbones.nat import FullAttention, NeighborhoodAttention
from backbones.swin import WindowAttention

HEADS, WIDTH = 2, 4
DIM = HEADS * WIDTH
MODULES = {
    "windows": (lambda: WindowAttention(DIM, HEADS, 3, False, None, True, None, 0.0), (6, 9)),
    "shifted windows": (lambda: WindowAttention(DIM, HEADS, 4, True, None, True, None, 0.0), (8, 8)),
    "shifted windows, padded": (lambda: WindowAttention(DIM, HEADS, 4, True, None, True, None, 0.0), (6, 7)),
    "windows not shifted, padded": (lambda: WindowAttention(DIM, HEADS, 4, True, (6, 6), True, None, 0.0), (6, 6)),
    "neighbourhoods": (lambda: NeighborhoodAttention(DIM, HEADS, 3, 1), (5, 6)),
    "dilated neighbourhoods": (lambda: NeighborhoodAttention(DIM, HEADS, 3, 2), (7, 6)),
    "neighbourhoods, padded": (lambda: NeighborhoodAttention(DIM, HEADS, 5, 1), (4, 6)),
    "whole map": (lambda: FullAttention(DIM, HEADS, (4, 5)), (4, 5)),
    "whole map, another grid": (lambda: FullAttention(DIM, HEADS, (3, 3)), (4, 5)),
    "HiLo": (lambda: HiLo(DIM, HEADS, 2, 0.5), (4, 6)),
    "Hi-Fi alone": (lambda: HiLo(DIM, HEADS, 2, 0.0), (4, 6)),
    "Lo-Fi alone": (lambda: HiLo(DIM, HEADS, 1, 0.5), (3, 4)),
}


def probed(attn: nn.Module, x: Tensor) -> Tensor:
    """h N N: the attention of x, 1 H W C, read off the outputs.

    The last channel of the input becomes the values and nothing else.
    """
    height, width = x.shape[1:3]
    count = height * width
    with torch.no_grad():
        for layer, first in ((n, f) for n, f in (("qkv", 2), ("h_qkv", 2), ("l_kv", 1), ("l_q", None)) if hasattr(attn, n)):
            weight, bias = getattr(attn, layer).weight, getattr(attn, layer).bias
            weight[:, -1] = 0
            if first is not None:
                part = len(weight) // (first + 1)
                weight[first * part :], bias[first * part :] = 0, 0
                weight[first * part :: WIDTH, -1] = 1  # the first channel of every head
        for layer in ("proj", "h_proj", "l_proj"):
            if hasattr(attn, layer):
                nn.init.eye_(getattr(attn, layer).weight)
                nn.init.zeros_(getattr(attn, layer).bias)
        inputs = x.expand(count, -1, -1, -1).clone()
        inputs[..., -1] = torch.eye(count).view(count, height, width)
        return attn(inputs)[..., ::WIDTH].flatten(1, 2).permute(2, 1, 0)  # key query head -> head query key


@pytest.mark.parametrize("name", MODULES)
def test_distances_and_entropies_are_those_of_the_maps_that_the_modules_use(name):
    torch.manual_seed(0)
    make, (height, width) = MODULES[name]
    attn = make().eval()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.7)
    x = torch.randn(1, height, width, DIM)
    maps = probed(attn, x)
    looks = local.READERS[type(attn)](attn, x)
    found = [measured(look, (2.0, 3.0)) for look in looks]
    distance, entropy = (torch.cat([one[i][0] for one in found]) for i in range(2))
    places = list(itertools.product(range(height), range(width)))
    split = getattr(attn, "hi_heads", 0) if isinstance(attn, HiLo) else HEADS
    centre = getattr(attn, "window", 1)
    for head, one in enumerate(maps):
        far = torch.zeros(len(places), len(places))
        for (i, (a, b)), (j, (c, d)) in itertools.product(enumerate(places), enumerate(places)):
            if head >= split:  # Lo-Fi looks at windows: their centres
                c, d = (side // centre * centre + (centre - 1) / 2 for side in (c, d))
            far[i, j] = ((2 * (a - c)) ** 2 + (3 * (b - d)) ** 2) ** 0.5
        expected = ((one * far).sum(-1) / one.sum(-1)).mean()
        torch.testing.assert_close(distance[head], expected, atol=1e-4, rtol=1e-4)
        if "padded" not in name:  # keys of padding have no place in the probed maps
            torch.testing.assert_close(one.sum(-1), torch.ones(len(places)), atol=1e-4, rtol=1e-4)
            groups = (
                one if head < split else one.view(-1, height // centre, centre, width // centre, centre).sum((2, 4)).flatten(1)
            )
            torch.testing.assert_close(entropy[head], -torch.xlogy(groups, groups).sum(-1).mean(), atol=1e-3, rtol=1e-3)
        assert entropy[head] <= found[head >= split and len(found) > 1][3] + 1e-4


NETWORKS = {
    "swin": ("swin_t", {"depths": (2, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 1, 2)}),
    "dinat": ("dinat_mini", {"depths": (2, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 1, 2), "mlp_ratio": 2}),
    "litv2": ("litv2_s", {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "heads": (1, 1, 2, 2)}),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model, args = NETWORKS[name]
    return timm.create_model(model, num_classes=3, **args)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_measured_image_by_image_and_is_the_same_afterwards(name):
    model, images = network(name), torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        expected = model.eval()(images)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = local_attention_statistics(model, images, batch_size=2)
    assert isinstance(found, LocalAttention) and found.images == 3 and len(found.layers) == len(found.distance) >= 3
    one_by_one = local_attention_statistics(model, images, batch_size=1)
    for a, b in zip([*found.distance, *found.entropy], [*one_by_one.distance, *one_by_one.entropy], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="all images must have one size"):
        local_attention_statistics(model, [images, images[..., :64]])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(m.training and not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model.eval()(images), expected)


def test_dense_predictors_are_measured_and_other_networks_refused():
    net = dense_heads.DensePredictor("dinat_mini", "linear", 3, backbone_args=NETWORKS["dinat"][1]).eval()
    assert local_attention_statistics(net, torch.randn(1, 3, 64, 96)).images == 1
    with pytest.raises(ValueError, match="ResNet has no local attention that can be read; understood are WindowAttention"):
        local_attention_statistics(timm.create_model("resnet10t"), torch.randn(1, 3, 64, 64))
