"""What a program of open size computes instead of the eager form is the same, at sizes below, at and above a window."""

import pytest
import torch
import torch.nn.functional as F

from backbones import fcaformer, swin
from backbones.layers import open_windows
from backbones.sret import exported_permutation, seeded_permutation
from weights.resample import bicubic_matrix

SIZES = [(5, 9), (7, 7), (14, 3), (15, 22)]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), [(16, 9), (37, 14), (14, 30), (6, 6), (5, 1)])
def test_a_bicubic_resize_is_two_matrix_products(old, new, antialias):
    image = torch.randn(1, 3, old, 11)
    expected = F.interpolate(image, (new, 20), mode="bicubic", align_corners=False, antialias=antialias)
    rows, columns = bicubic_matrix(old, new, antialias), bicubic_matrix(11, 20, antialias)
    torch.testing.assert_close(rows @ image @ columns.mT, expected, rtol=1e-4, atol=1e-4)


def test_a_resize_by_a_factor_is_dinov2s():
    image = torch.randn(1, 3, 37, 37)
    factors = [(new + 0.1) / 37 for new in (20, 45)]
    expected = F.interpolate(image, scale_factor=factors, mode="bicubic", align_corners=False)
    rows, columns = (bicubic_matrix(37, new, False, 0.1) for new in (20, 45))
    torch.testing.assert_close(rows @ image @ columns.mT, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [0, 3])
def test_windows_as_indices_are_those_of_swin(size, shift):
    x = torch.randn(2, *size, 4)
    windows = open_windows(x[0, :, :, 0], (7, 7), shift)
    cut = windows.cut(x.flatten(1, 2))
    assert torch.equal(cut, swin.to_windows(x, 7, shift > 0, None))
    assert torch.equal(windows.joined(cut), x.flatten(1, 2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("front", [False, True])
def test_windows_as_indices_are_those_of_fcaformer(size, front):
    x = torch.randn(2, 4, *size)
    windows = open_windows(x[0, 0], (4, 6), front=front)
    tokens = windows.cut(x.flatten(2).mT)
    assert torch.equal(tokens.flatten(0, 1).mT.unflatten(2, (4, 6)), fcaformer.to_windows(x, (4, 6), front))
    assert torch.equal(windows.joined(tokens), x.flatten(2).mT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("unshifted", [None, (7, 7)])
def test_shifted_windows_attend_as_swin_does(size, shifted, unshifted):
    torch.manual_seed(0)
    x, table = torch.randn(2, *size, 8), torch.randn(13**2, 2)
    qkv = torch.randn(*swin.to_windows(x, 7, shifted, unshifted).shape[:3], 24)
    expected = swin.attend(qkv, x, table, 2, 0.5, 7, shifted, unshifted)
    q, k, v = qkv.unflatten(-1, (3, 2, -1)).permute(3, 0, 1, 4, 2, 5)
    bias = swin.window_bias(table, 7)
    got = swin.open_attend(q, k, v, bias, x[0, :, :, 0], 0.5, 7, shifted, unshifted)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "seed", "number"), [(17, 0, 0), (196, 3, 5), (784, 0, 1)])
def test_the_order_of_a_program_is_the_seeds(count, seed, number):
    device = torch.device("cpu")
    assert torch.equal(exported_permutation(count, seed, number, device), seeded_permutation(count, seed, number, device))
