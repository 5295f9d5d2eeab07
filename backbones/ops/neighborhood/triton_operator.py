"""The Triton kernels of neighbourhood attention as operators of torch.library. Importing this module registers them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


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
