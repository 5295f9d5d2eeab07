"""Neighbourhood attention through whatever NATTEN is installed (https://github.com/SHI-Labs/NATTEN, an optional package).

NATTEN 0.17 to 0.19: unfused kernels with the bias, forward and backward, on CPU and CUDA. NATTEN 0.20 and later: fused CUDA
kernels without a bias; without its compiled library (as the package index installs it) only uncompiled Flex attention.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import Call

UNFUSED, FUSED = (0, 17), (0, 20)  # the first versions with the functions used below


def refuses(call: Call) -> str | None:
    """Why this call cannot run here, or None."""
    found = installed()
    if isinstance(found, str):
        return found
    name = "NATTEN " + ".".join(map(str, found))
    if found < UNFUSED:
        return (
            f"{name} is older than 0.17, the first version whose functions take a bias and a scale the way this file calls them"
        )
    if min(call.kernel) < 2:
        return f"{name} has no kernels of size 1, got {call.kernel}"
    if found < FUSED:
        if call.q.dtype in (torch.float16, torch.bfloat16) and call.q.device.type == "cpu":
            return f"{name} has no half-precision kernels on the CPU, got {call.q.dtype}"
        return None
    if call.bias is not None:
        return f"{name} has no relative position bias (dropped in 0.20)"
    if call.q.shape[0] == 0:
        return f"{name} fails on an empty batch"
    kernels = fused_kernels(call)
    setting = f"{call.q.dtype} with head dim {call.q.shape[-1]} on {call.q.device}"
    if not kernels:
        return f"{name} has no kernel for {setting}"
    if call.q.device.type == "cuda" and kernels == ["flex-fna"]:
        return (
            f"{name} is installed without its compiled kernels for {setting}: uncompiled Flex attention would hold N x N scores"
        )
    if call.q.device.type == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v)):
        return f"{name} has no backward on the CPU; use torch.no_grad() or another backend"
    return None


def run(call: Call) -> Tensor:  # B H W heads dim -> B H W heads dim
    """The fused function has our layout; the unfused ones want B heads H W dim, a scaled q and a bias in q's dtype."""
    kernel, dilation = call.kernel, call.dilation
    found = installed()
    if not isinstance(found, str) and found >= FUSED:
        q, k, v = call.q, call.k, call.v
        if not torch.is_grad_enabled():  # a view of a leaf still says that it requires a gradient, which Flex would refuse
            q, k, v = q.detach(), k.detach(), v.detach()
        return importlib.import_module("natten").na2d(q, k, v, kernel_size=kernel, dilation=dilation, scale=call.scale)
    functional = importlib.import_module("natten.functional")
    q, k, v = (t.permute(0, 3, 1, 2, 4).contiguous() for t in (call.q * call.scale, call.k, call.v))
    bias = None if call.bias is None else call.bias.to(q.dtype)
    scores = functional.na2d_qk(q, k, kernel_size=kernel, dilation=dilation, rpb=bias)
    out = functional.na2d_av(scores.softmax(-1), v, kernel_size=kernel, dilation=dilation)
    return out.permute(0, 2, 3, 1, 4)


@torch.compiler.assume_constant_result
def installed() -> tuple[int, ...] | str:
    """The version of the installed NATTEN, or the sentence why there is none."""
    return _import()


@functools.cache
def _import() -> tuple[int, ...] | str:
    try:
        natten = importlib.import_module("natten")
    except ImportError:
        return "NATTEN is not installed"
    except Exception as error:  # a build for another torch fails in many ways
        return f"NATTEN is installed but cannot be imported ({type(error).__name__}: {error})"
    parts = getattr(natten, "__version__", "0").split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def fused_kernels(call: Call) -> list[str]:
    """NATTEN's own names of the kernels that can run this call, fastest first."""
    backends = importlib.import_module("natten.backends")
    return backends.get_compatible_backends(call.q, call.k, call.v, torch_compile=False)
