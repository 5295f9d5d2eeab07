"""Neighbourhood attention on CUDA in Triton: fused forward and recomputing backward with the bias gradient.

float32, float16 and bfloat16 with float32 sums, head dims up to 128, any odd kernel and any dilation, also not square. No
attention map is stored: the forward keeps one number per query, the backward another. The operators are in triton_operator.py,
the kernels and how they divide the work in triton_kernels.py. With TRITON_INTERPRET=1 the same kernels run on the CPU, slowly:
so they are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

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
    _register_operators()
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (call.q, call.k, call.v))
    bias = None if call.bias is None else call.bias.float().contiguous()
    return torch.ops.backbones.neighborhood_triton(q, k, v, bias, list(call.kernel), list(call.dilation), call.scale)[0]


@torch.compiler.assume_constant_result
def _register_operators() -> None:
    """Not at every import of ours: torch takes longer for it than for all of our files but a few."""
    from . import triton_operator  # noqa: F401


@torch.compiler.assume_constant_result
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
