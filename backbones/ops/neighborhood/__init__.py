"""Neighbourhood attention with a relative position bias: one public function, one definition, several backends.

`reference` is the definition; every other file computes the same thing faster on some kind of call. Each backend is a module
with two functions: `refuses(call)` gives a sentence when it cannot run the call (None when it can), `run(call)` runs it.

A backend asked for by name runs or raises with that sentence; it never falls back. Without a name the fastest on the call's
device that does not refuse runs; `with neighborhood.using("reference"):` says what runs without a name inside. A program that
is being exported always takes the tiled path, which consists of standard operators only.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from backbones.arguments import nearest

from . import cpp_backend, natten_backend, reference, tiled, triton_backend
from .call import Call

__all__ = [
    "AUTOMATIC",
    "BACKENDS",
    "Call",
    "check",
    "choose",
    "explain",
    "na2d",
    "neighborhood_attention",
    "recording",
    "settle",
    "using",
]

_logger = logging.getLogger(__name__)

BACKENDS = {  # fastest first
    "natten": natten_backend,
    "triton": triton_backend,
    "cpp": cpp_backend,
    "tiled": tiled,
    "reference": reference,
}

# What each kind of device tries without a name, fastest first. On a CPU NATTEN is left out: its one path there has no backward
# and takes 10 to 960 ms where the tiled path takes 0.8 to 4 (kernel 7, 14x14 to 56x56).
AUTOMATIC = {"cuda": ("natten", "triton", "tiled"), "cpu": ("cpp", "tiled")}

_default: contextvars.ContextVar[str | None] = contextvars.ContextVar("default backend", default=None)
_record: contextvars.ContextVar[Counter | None] = contextvars.ContextVar("record of calls", default=None)

# What NATTEN's users pass and this op lacks, with what to do instead.
UNSUPPORTED = {
    "stride": "every pixel is a query here (stride 1)",
    "is_causal": "neighbourhoods are not causal here",
    "additional_keys": "there are no keys beside the neighbourhood here",
    "additional_values": "there are no values beside the neighbourhood here",
    "return_lse": "the log of the softmax's sum is not returned here",
    "rpb": "the relative position bias is the argument `bias` here",
}


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Inside, calls that name no backend run on this one, or raise if it cannot run them; for this thread and task alone.

    Raises ValueError for an unknown name.
    """
    _known(backend)
    token = _default.set(backend)
    try:
        yield
    finally:
        _default.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[Counter]:
    """Inside, counts the calls by (shape of q, kernel, dilation, whether there is a bias)."""
    counter: Counter = Counter()
    token = _record.set(counter)
    try:
        yield counter
    finally:
        _record.reset(token)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    **others: Any,
) -> Tensor:
    """Attention of every pixel to its kernel_size neighbours (the definition is in reference.py).

    Args:
        q: [B, H, W, heads, dim], floating, any strides.
        k: like q.
        v: like q.
        kernel_size: odd; int or (rows, columns).
        dilation: int or (rows, columns).
        bias: [heads, 2 kh - 1, 2 kw - 1], any floating dtype, added to the scores, entry = key position - query position +
            k - 1.
        scale: factor on q k^T, default dim ** -0.5.
        backend: a key of BACKENDS, or None for that of `using`, else the fastest that can run the call.
        others: none; an argument of NATTEN that this op lacks is refused with what to do instead.

    Returns [B, H, W, heads, dim].
    Raises ValueError or TypeError for arguments that do not fit, for a map smaller than kernel_size * dilation on an axis
    (pad it first, as the authors' modules do), and, when `backend` is given, for a call that this backend cannot run.
    """
    if others:
        _refuse_arguments(others)
    call = check(q, k, v, kernel_size, dilation, bias, scale)
    if (counter := _record.get()) is not None:
        counter[tuple(q.shape), call.kernel, call.dilation, bias is not None] += 1
    return BACKENDS[choose(call, backend)].run(call)


def _refuse_arguments(others: dict[str, Any]) -> NoReturn:
    name = next(iter(others))
    reason = UNSUPPORTED.get(name) or "q, k, v, kernel_size, dilation, bias, scale and backend are its arguments"
    raise TypeError(f"neighborhood_attention takes no {name!r}: {reason}")


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    """`neighborhood_attention` under the name and arguments of NATTEN's `natten.functional.na2d` (HDiT calls it).

    Args:
        query: B H W heads dim, floating.
        key: like query.
        value: like query.
        kernel_size: odd; int or (rows, columns).
        stride: 1, the only one here.
        dilation: int or (rows, columns).
        is_causal: False, the only one here.
        scale: factor on q k^T, default dim ** -0.5.
        others: `backend` and `bias` of neighborhood_attention; NATTEN's other arguments may stand at their neutral value.

    Returns B H W heads dim.
    Raises as neighborhood_attention does, and TypeError for an argument of NATTEN that this op lacks.
    """
    given = {"stride": stride, "is_causal": is_causal} | others
    ours = {name: given.pop(name) for name in ("backend", "bias") if name in given}
    for name, argument in given.items():
        neutral = (1, (1, 1)) if name == "stride" else (None, False, (False, False))
        if isinstance(argument, Tensor) or argument not in neutral:
            _refuse_arguments({name: argument})
    return neighborhood_attention(query, key, value, kernel_size, dilation, scale=scale, **ours)


def __getattr__(name: str) -> NoReturn:
    if name in ("na1d", "na3d"):
        raise AttributeError(f"NATTEN's {name} is not here: only maps of two axes are, with na2d or neighborhood_attention")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, str | None]:
    """For every backend, fastest first: None if it can run this call, else the sentence why not.

    Args:
        q: queries, B H W heads d.
        k: keys, B H W heads d.
        v: values, B H W heads d.
        kernel_size: side of a neighbourhood, odd, or one a side.
        dilation: between neighbours, or one a side.
        bias: of relative positions, None for none.
        scale: of the scores, d ** -0.5 unless given.
    """
    call = check(q, k, v, kernel_size, dilation, bias, scale)
    return {name: module.refuses(call) for name, module in BACKENDS.items()}


def choose(call: Call, backend: str | None = None) -> str:
    """Name of the backend that runs this call. Raises ValueError if `backend` (or that of `using`) is unknown or refuses."""
    backend = backend or _default.get()
    if backend is not None:
        _known(backend)
        reason = BACKENDS[backend].refuses(call)
        if reason is not None:
            raise ValueError(f"the neighbourhood attention backend {backend!r} cannot run this call: {reason}")
        return backend
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "tiled"
    for name in AUTOMATIC.get(call.q.device.type, ("tiled",)):
        module: Any = BACKENDS[name]
        reason = getattr(module, "refuses_now", module.refuses)(call)
        if reason is None:
            return name
        if not torch.compiler.is_compiling():
            _logger.debug("neighbourhood attention: %s refuses: %s", name, reason)
    raise AssertionError("the tiled backend never refuses")


def settle(model: nn.Module) -> None:
    """Waits until the choice of a backend on the CPU will not change any more: what is measured or must repeat asks for it.

    Only a model with this attention waits, and only for the C++ library's first compilation on a machine.
    """
    if any(hasattr(module, "rpb") and hasattr(module, "backend") for module in model.modules()):
        cpp_backend.unavailable()


def _known(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown neighbourhood attention backend {backend!r}; {nearest(backend, BACKENDS)}")


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Call:
    """The arguments as a Call, or an error that says what does not fit.

    Args:
        q: queries, B H W heads d.
        k: keys, B H W heads d.
        v: values, B H W heads d.
        kernel_size: side of a neighbourhood, odd, or one a side.
        dilation: between neighbours, or one a side.
        bias: of relative positions, None for none.
        scale: of the scores, d ** -0.5 unless given.
    """
    kernel, step = _pair("kernel_size", kernel_size), _pair("dilation", dilation)
    for name, value in (("kernel_size", kernel), ("dilation", step)):
        if min(value) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that a window has a centre; got {kernel}")
    if q.dim() != 5:
        raise ValueError(f"q must be [B, H, W, heads, dim], got {q.dim()} dimensions: {tuple(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise TypeError(f"{name} must be {q.dtype} on {q.device} like q, got {tensor.dtype} on {tensor.device}")
    if not q.dtype.is_floating_point:
        raise TypeError(f"q, k, v must be floating point, got {q.dtype}")
    heads, dim = q.shape[3:]
    for axis, size, window, stride in zip("HW", q.shape[1:3], kernel, step, strict=True):
        if size < window * stride:
            raise ValueError(
                f"{axis} = {size} is smaller than kernel_size * dilation = {window} * {stride} = {window * stride}: "
                f"pad the map to at least {window * stride} on that axis, or use a smaller dilation (at most {size // window})"
            )
    if bias is not None:
        table = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        if tuple(bias.shape) != table:
            raise ValueError(f"bias must be [heads, 2 kh - 1, 2 kw - 1] = {table}, got {tuple(bias.shape)}")
        if not bias.dtype.is_floating_point or bias.device != q.device:
            raise TypeError(f"bias must be floating point on {q.device}, got {bias.dtype} on {bias.device}")
    return Call(q, k, v, kernel, step, bias, float(dim**-0.5 if scale is None else scale))


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(item, int) for item in pair):
        raise TypeError(f"{name} must be an int or a pair of ints (rows, columns), got {value!r}")
    return pair
