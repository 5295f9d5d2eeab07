"""The Triton kernels without a GPU, in Triton's interpreter (a process of its own: the switch is read when Triton is imported).

On a machine with CUDA the last test compares them there, in every dtype.
"""

import os
import subprocess
import sys
import types

import pytest
import torch

from backbones.ops.neighborhood import check, neighborhood_attention, triton_backend, triton_operator

pytest.importorskip("triton", reason="Triton is not installed")

# shape, kernel, dilation, dtype, bias: few and small, since the interpreter takes a tenth of a second per program
CASES = [
    ((1, 5, 9, 1, 20), 3, (1, 2), "float32", True),  # ragged groups, head dim no power of two
    ((2, 9, 8, 1, 33), 7, 1, "float32", True),  # two tiles, two images in the bias gradient
    (
        (1, 14, 11, 1, 16),
        (13, 11),
        1,
        "float32",
        False,
    ),  # several chunks of keys, nothing square, inverse windows at both borders
    ((1, 6, 7, 1, 16), 5, 1, "float16", True),
    ((0, 6, 7, 1, 16), 5, 1, "float32", True),
]

PROGRAM = """
import sys, torch
from backbones.ops.neighborhood import neighborhood_attention
for shape, kernel, dilation, dtype, has_bias in eval(sys.argv[1]):
    dtype, (kh, kw) = getattr(torch, dtype), (kernel, kernel) if isinstance(kernel, int) else kernel
    torch.manual_seed(0)
    batch, height, width, heads, dim = shape
    qkv, grad = torch.randn(batch, height, width, 3, heads, dim), torch.randn(shape)
    bias = torch.randn(heads, 2 * kh - 1, 2 * kw - 1)
    found = []
    for backend, at in (("reference", torch.float64), ("triton", dtype)):
        x, b = qkv.to(dtype).to(at).requires_grad_(), bias.to(dtype).to(at).requires_grad_()
        out = neighborhood_attention(*x.unbind(3), kernel, dilation, b if has_bias else None, backend=backend)
        assert out.dtype == at
        out.backward(grad.to(dtype).to(at))
        found.append([out.detach(), x.grad, *([b.grad] if has_bias else [])])
    for seen, wanted in zip(found[1], found[0]):
        limit = 2e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(seen.double(), wanted, rtol=limit, atol=limit, msg=lambda m: f"{shape} {kernel}: {m}")
    print("agrees", shape)
# A table of 5x5 numbers between two runs of NaN: an index beyond it shows.
x = torch.randn(1, 4, 5, 1, 8)
guarded = torch.full((3, 1, 5, 5), float("nan"))
guarded[1] = torch.randn(1, 5, 5)
found = []
for backend in ("reference", "triton"):
    y, b = x.clone().requires_grad_(), guarded[1].requires_grad_()
    neighborhood_attention(y, y, y, 3, 1, b, 0.5, backend=backend).square().sum().backward()
    found.append([y.grad, b.grad])
for seen, wanted in zip(found[1], found[0]):
    torch.testing.assert_close(seen, wanted, rtol=2e-5, atol=2e-5)
print("stays inside")
x, b = x.requires_grad_(), guarded[1].clone().requires_grad_()
torch.library.opcheck(torch.ops.backbones.neighborhood_triton, (x, x, x, b, [3, 3], [1, 1], 0.5))
print("opcheck passes")
"""


def test_the_kernels_agree_with_the_definition_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, repr(CASES)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == len(CASES) and "stays inside\nopcheck passes" in done.stdout


def on_cuda(shape=(1, 9, 9, 1, 32), kernel=3, dtype=torch.float32):
    """A call as it would look on a GPU, as far as refuses() looks."""
    call = check(*[torch.zeros(shape, dtype=dtype)] * 3, kernel)
    q = types.SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype, shape=shape)
    bias = types.SimpleNamespace(requires_grad=True)
    return types.SimpleNamespace(q=q, kernel=call.kernel, dilation=call.dilation, bias=bias)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (on_cuda(dtype=torch.float64), "not torch.float64"),
        (on_cuda(shape=(1, 9, 9, 1, 160)), "head dims up to 128, not 160"),
        (on_cuda(shape=(1, 33, 33, 1, 32), kernel=33), "kernels up to 31"),
    ],
)
def test_refusals_are_sentences(call, sentence):
    assert sentence in triton_backend.refuses(call)


def test_every_head_dim_and_kernel_of_the_zoo_is_accepted():
    for dim in (16, 24, 32, 48, 64, 96, 128):
        for kernel in (3, 5, 7, 9, 11, 13):
            assert triton_backend.refuses(on_cuda((1, 13, 13, 1, dim), kernel)) is None
            for dtype in (torch.float32, torch.bfloat16):
                tile = triton_operator.tile((kernel, kernel), dtype, dim)
                assert tile["TH"] * tile["TW"] in (32, 64) and tile["BW"] >= tile["TW"] + kernel - 1
    assert triton_backend.refuses(on_cuda(dtype=torch.bfloat16)) is None


def test_a_bias_gradient_with_atomics_is_refused_where_determinism_is_asked():
    torch.use_deterministic_algorithms(True)
    try:
        assert "atomics" in triton_backend.refuses(on_cuda())
        with torch.no_grad():
            assert triton_backend.refuses(on_cuda()) is None
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_cpu_is_refused_without_the_interpreter():
    x = torch.zeros(1, 5, 5, 1, 16)
    assert "it runs on CUDA, and the tensors are on cpu" in triton_backend.refuses(check(x, x, x, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kernel", "dilation"),
    [
        ((2, 56, 56, 2, 32), 7, 1),
        ((2, 56, 56, 2, 32), 7, 8),
        ((1, 29, 41, 3, 24), (5, 13), (3, 1)),
        ((1, 16, 20, 1, 128), 11, 1),
    ],
)
def test_the_kernels_agree_with_the_definition_on_cuda(shape, kernel, dilation, dtype):
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    torch.manual_seed(0)
    qkv = torch.randn(*shape[:3], 3, *shape[3:], device="cuda")
    table, grad = torch.randn(shape[3], 2 * kh - 1, 2 * kw - 1, device="cuda"), torch.randn(shape, device="cuda")
    found = []
    for backend, at in (("reference", torch.float64), ("triton", dtype)):
        x, b = qkv.to(dtype).to(at).requires_grad_(), table.to(at).requires_grad_()
        out = neighborhood_attention(*x.unbind(3), kernel, dilation, b, backend=backend)
        out.backward(grad.to(dtype).to(at))
        found.append([out.detach(), x.grad, b.grad])
    for seen, wanted in zip(found[1], found[0], strict=True):
        limit = 5e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(seen.double(), wanted, rtol=limit, atol=limit * wanted.abs().max().item())
