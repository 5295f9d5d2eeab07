"""What is asked of an installed NATTEN, and what is refused, without one: small modules stand in for its two interfaces."""

import sys
import types

import pytest
import torch

from backbones.ops.neighborhood import check, natten_backend, neighborhood_attention, reference


@pytest.fixture
def install(monkeypatch):
    """install("0.21.7", kernels=[...]) makes `import natten` give a stand-in of that version; install(None) makes it fail."""

    def install(version, kernels=()):
        for name in ("natten", "natten.functional", "natten.backends"):
            monkeypatch.setitem(sys.modules, name, None)
        if version is not None:
            natten = types.ModuleType("natten")
            natten.__version__ = version
            functional, backends = types.ModuleType("natten.functional"), types.ModuleType("natten.backends")
            functional.na2d_qk, functional.na2d_av = na2d_qk, na2d_av
            natten.na2d = lambda q, k, v, kernel_size, dilation, scale: reference.run(
                check(q, k, v, kernel_size, dilation, None, scale)
            )
            backends.get_compatible_backends = lambda q, k, v, torch_compile: list(kernels)
            for module in (natten, functional, backends):
                monkeypatch.setitem(sys.modules, module.__name__, module)
        natten_backend._import.cache_clear()

    yield install
    natten_backend._import.cache_clear()


def na2d_qk(query, key, kernel_size, dilation, rpb=None):
    """The unfused interface: [B, heads, H, W, dim] twice -> [B, heads, H, W, kh * kw], rpb of the query's dtype added."""
    assert rpb is None or rpb.dtype == query.dtype
    (rows, up), (columns, across) = (
        reference.neighbours(n, k, d) for n, k, d in zip(query.shape[2:4], kernel_size, dilation, strict=True)
    )
    keys = key[:, :, rows[:, :, None, None], columns[None, None]]  # B heads H kh W kw dim
    scores = torch.einsum("bnhwd,bnhiwjd->bnhwij", query, keys)
    if rpb is not None:
        scores = scores + rpb[:, up[:, :, None, None], across[None, None]].transpose(2, 3)
    return scores.flatten(-2)


def na2d_av(attn, value, kernel_size, dilation):
    rows, columns = (reference.neighbours(n, k, d)[0] for n, k, d in zip(value.shape[2:4], kernel_size, dilation, strict=True))
    values = value[:, :, rows[:, :, None, None], columns[None, None]]
    return torch.einsum("bnhwij,bnhiwjd->bnhwd", attn.unflatten(-1, kernel_size), values)


def call(bias=False, dtype=torch.float32, kernel=3, grad=False):
    q, k, v = (torch.randn(2, 9, 10, 2, 8).to(dtype).requires_grad_(grad) for _ in range(3))
    return check(q, k, v, kernel, (2, 1), torch.randn(2, 2 * kernel - 1, 2 * kernel - 1) if bias else None)


class OnCuda:
    """A call as it would look on a GPU, as far as refuses() looks."""

    def __init__(self, call):
        self.kernel, self.dilation, self.bias, self.scale = call.kernel, call.dilation, call.bias, call.scale
        self.q = self.k = self.v = types.SimpleNamespace(
            dtype=call.q.dtype, shape=call.q.shape, device=torch.device("cuda:0"), requires_grad=True
        )


@pytest.mark.parametrize(
    ("version", "kernels", "asked", "sentence"),
    [
        (None, (), call(), "NATTEN is not installed"),
        ("0.14.6", (), call(), "NATTEN 0.14.6 is older than 0.17"),
        ("0.17.5", (), call(dtype=torch.bfloat16), "no half-precision kernels on the CPU"),
        ("0.21.7", ("flex-fna",), call(bias=True), "NATTEN 0.21.7 has no relative position bias"),
        ("0.21.7+torch2110cu128", ("flex-fna",), call(kernel=1), "no kernels of size 1"),
        ("0.21.7", (), call(dtype=torch.float64), "no kernel for torch.float64 with head dim 8 on cpu"),
        ("0.21.7", ("flex-fna",), call(grad=True), "no backward on the CPU"),
        ("0.21.7", ("flex-fna",), check(*[torch.randn(0, 9, 9, 1, 8)] * 3, 3), "fails on an empty batch"),
        ("0.21.7", ("flex-fna",), OnCuda(call()), "without its compiled kernels"),
    ],
)
def test_refusals_are_sentences(install, version, kernels, asked, sentence):
    install(version, kernels)
    assert sentence in natten_backend.refuses(asked)


def test_what_it_can_do_is_not_refused(install):
    install("0.21.7", ["hopper-fna", "cutlass-fna", "flex-fna"])
    assert natten_backend.refuses(OnCuda(call())) is None
    install("0.21.7", ["flex-fna"])
    assert natten_backend.refuses(call()) is None
    install("0.17.5")
    assert natten_backend.refuses(call(bias=True, grad=True)) is None


def test_an_import_that_breaks_is_reported(install, monkeypatch):
    def broken(name):
        raise OSError("undefined symbol: _ZN3c10")

    install(None)
    monkeypatch.setattr(natten_backend.importlib, "import_module", broken)
    assert "cannot be imported (OSError: undefined symbol" in natten_backend.refuses(call())


@pytest.mark.parametrize(("version", "bias"), [("0.17.5", True), ("0.17.5", False), ("0.21.7", False)])
def test_both_interfaces_are_called_with_what_they_mean(install, version, bias):
    install(version, ["flex-fna"])
    asked = call(bias)
    arguments = (asked.q, asked.k, asked.v, 3, (2, 1), asked.bias, 0.3)
    out = neighborhood_attention(*arguments, backend="natten")
    torch.testing.assert_close(out, neighborhood_attention(*arguments, backend="reference"))


def test_views_of_parameters_run_where_there_is_no_backward(install, monkeypatch):
    install("0.21.7", ["flex-fna"])

    def na2d(q, k, v, kernel_size, dilation, scale):
        if q.requires_grad or k.requires_grad or v.requires_grad:
            raise NotImplementedError("FlexAttention does not support backward on CPU.")  # its words, whatever the grad mode
        return reference.run(check(q, k, v, kernel_size, dilation, None, scale))

    monkeypatch.setattr(sys.modules["natten"], "na2d", na2d)
    qkv = torch.randn(1, 5, 6, 3, 1, 8, requires_grad=True)
    with torch.no_grad():
        assert neighborhood_attention(*qkv.unbind(3), 3, backend="natten").shape == (1, 5, 6, 1, 8)
