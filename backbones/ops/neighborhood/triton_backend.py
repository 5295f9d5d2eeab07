"""Neighbourhood attention on CUDA in Triton: fused forward and recomputing backward with the bias gradient.

float32, float16 and bfloat16 with float32 sums, head dims up to 128, any odd kernel and any dilation, also not square. No
attention map is stored: the forward keeps one number per query, the backward another. The kernels and how they divide the work
are in triton_kernels.py. With TRITON_INTERPRET=1 the same kernels run on the CPU, slowly: so they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import Call

WIDEST = 128  # head dim: beyond it the tiles of a program do not fit into its registers


def refuses(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    if call.q.device.type != "cuda" and not interpreting():
        return f"it runs on CUDA, and the tensors are on {call.q.device}"
    if not installed():
        return "Triton is not installed"
    if call.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes float32, float16 and bfloat16, not {call.q.dtype}"
    if call.q.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter multiplies bfloat16 as if it were integers"
    if call.q.shape[-1] > WIDEST:
        return f"it has head dims up to {WIDEST}, not {call.q.shape[-1]}"
    if max(call.kernel) > 31:
        return f"its tiles hold kernels up to 31, not {call.kernel}"
    needs_table = call.bias is not None and call.bias.requires_grad and torch.is_grad_enabled()
    if needs_table and torch.are_deterministic_algorithms_enabled():
        return "its bias gradient is summed with atomics, and torch.use_deterministic_algorithms is on"
    return None


def run(call: Call) -> Tensor:  # B H W heads dim -> B H W heads dim
    """Strides are free, only the numbers of one token must be contiguous; the bias is read as float32."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (call.q, call.k, call.v))
    bias = None if call.bias is None else call.bias.float().contiguous()
    return forward(q, k, v, bias, list(call.kernel), list(call.dilation), call.scale)[0]


@torch.compiler.assume_constant_result
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def tile(kernel: tuple[int, int], dtype: torch.dtype, dim: int) -> dict[str, int]:
    """Shape of the tiles: 64 queries and chunks of about 64 keys, ROWS x BW; half of each for float32 tokens above 32 numbers,
    which would not fit into shared memory."""
    side = 32 if dtype == torch.float32 and dim > 32 else 64
    # 4 columns of queries for wide kernels keep BW at 16 up to 13 columns; beyond, the window alone decides.
    width = 8 if kernel[1] <= 9 else 4
    columns = 1 << (width + kernel[1] - 2).bit_length()
    return {"TH": side // width, "TW": width, "BW": columns, "ROWS": max(1, side // columns)}


def launch(q: Tensor) -> dict[str, int]:
    """Warps and pipeline stages. Wide tokens and float32 need the registers of 8 warps, and stages would need more shared
    memory than a consumer GPU has (99 KB)."""
    heavy = q.dtype == torch.float32 or q.shape[-1] > 64
    return {"num_warps": 8, "num_stages": 1} if heavy else {"num_warps": 4, "num_stages": 2}


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, kernel: list[int], dilation: list[int]
) -> tuple[int, list[int], dict[str, Any]]:
    """(number of tiles in all images, sizes and strides in the kernels' order, compile-time constants)."""
    batch, height, width, heads, dim = q.shape
    shape = tile((kernel[0], kernel[1]), q.dtype, dim)
    tiles = batch * heads * dilation[0] * dilation[1]
    for length, step, side in zip((height, width), dilation, (shape["TH"], shape["TW"]), strict=True):
        tiles *= -(-length // (step * side))  # of the longest residue group, ceil(length / step) positions
    sizes = [height, width, *dilation, heads, *(s for t in (q, k, v) for s in t.stride()[:4])]
    constants = {"D": dim, "BD": max(16, 1 << (dim - 1).bit_length()), "KH": kernel[0], "KW": kernel[1], **shape}
    return tiles, sizes, constants


@functools.cache
def _kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


@torch.library.custom_op("backbones::neighborhood_triton", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel: list[int], dilation: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """(out, log2 of the sum of 2^score per query [B, heads, H, W] float32)."""
    batch, height, width, heads, _ = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((batch, heads, height, width), dtype=torch.float32)
    tiles, sizes, constants = _arguments(q, k, v, kernel, dilation)
    if batch:
        _kernels().forward_kernel[(tiles,)](
            q, k, v, bias, out, lse, scale, *sizes, **constants, HAS_BIAS=bias is not None, **launch(q)
        )
    return out, lse


@torch.library.custom_op("backbones::neighborhood_triton_backward", mutates_args=())
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel: list[int],
    dilation: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias); dbias is float32, and empty without a bias."""
    # here: a traced backward may drop such calls outside and pass an expanded gradient
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    bias = None if bias is None else bias.contiguous()
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    dbias = q.new_zeros((0,) if bias is None else bias.shape, dtype=torch.float32)
    batch, delta = q.shape[0], torch.empty_like(lse)
    tiles, sizes, constants = _arguments(q, k, v, kernel, dilation)
    if not batch:
        return dq, dk, dv, dbias
    kernels, has_bias = _kernels(), bias is not None
    kernels.dq_kernel[(tiles,)](
        q, k, v, bias, out, lse, dout, delta, dq, scale, *sizes, **constants, HAS_BIAS=has_bias, **launch(q)
    )
    flat = {name: value for name, value in constants.items() if name not in ("ROWS", "BW")}
    kernels.dkdv_kernel[(tiles,)](
        q,
        k,
        v,
        bias,
        lse,
        dout,
        delta,
        dk,
        dv,
        scale,
        *sizes,
        **flat,
        BN=constants["TH"] * constants["TW"],
        HAS_BIAS=has_bias,
        **launch(q),
    )
    if has_bias:
        chunks = -(-(constants["TH"] + kernel[0] - 1) // constants["ROWS"])
        # about 2000 programs fill a large GPU; more would only add to the same table more often
        tiles //= batch
        splits = max(1, min(batch, 2048 // (tiles * chunks)))
        kernels.dbias_kernel[(tiles * splits * chunks,)](
            q, k, v, bias, lse, dout, delta, dbias, scale, batch, splits, *sizes, **constants, CHUNKS=chunks, **launch(q)
        )
    return dq, dk, dv, dbias


@forward.register_fake
def _(q, k, v, bias, kernel, dilation, scale):
    batch, height, width, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, height, width), dtype=torch.float32)


@backward.register_fake
def _(dout, q, k, v, bias, out, lse, kernel, dilation, scale):
    table = (0,) if bias is None else bias.shape
    return *(q.new_empty(q.shape) for _ in range(3)), q.new_empty(table, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    q, k, v, bias, *ctx.arguments = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, bias, *output)


def _backward(ctx, grad, _):
    if torch.is_grad_enabled():  # create_graph=True: a second derivative would silently be zero
        raise RuntimeError("the Triton neighbourhood attention has no second derivative: use backend='reference'")
    q, k, v, bias, out, lse = ctx.saved_tensors
    grads = backward(grad.contiguous(), q, k, v, bias, out, lse, *ctx.arguments)
    return *grads[:3], None if bias is None else grads[3], None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)
