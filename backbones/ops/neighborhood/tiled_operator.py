"""The tiled path as one operator of torch.library, for compiled graphs.

A compiler that looks inside makes loops over single numbers of the copies of whole rows, and follows the cut of an axis of open
length position by position. As one operator the path runs as it does in eager mode, at any size; what its backward needs is
computed again there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, Sequence[int], Sequence[int], float], Tensor]
NUMBERS = "int[2] kernel, int[2] dilation, float scale"
_library: Any = None  # registrations live as long as this


def register(run: Forward) -> None:
    """Registers the operator, once.

    run: (q, k, v, bias, kernel, dilation, scale) -> B H W heads d.
    """
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("backbones", "FRAGMENT")
    _library.define(f"neighborhood_tiled(Tensor q, Tensor k, Tensor v, Tensor? bias, {NUMBERS}) -> Tensor")
    _library.define(
        f"neighborhood_tiled_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, {NUMBERS}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )

    def forward(q: Tensor, *others: Any) -> Tensor:
        """`run`, contiguous and in the dtype of q under autocast too, as the stand-in below says."""
        with torch.autocast(q.device.type, enabled=False):
            return run(q, *others).contiguous()

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *numbers: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v and the bias (empty without one), from the forward computed again."""
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        bias = None if bias is None else bias.detach().requires_grad_()
        with torch.enable_grad():
            out = forward(q, k, v, bias, *numbers)
        inputs = [q, k, v] if bias is None else [q, k, v, bias]
        dq, dk, dv, *rest = (x.contiguous() for x in torch.autograd.grad(out, inputs, grad))
        return dq, dk, dv, rest[0] if rest else q.new_empty(0)

    def keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.numbers = inputs[4:]

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        grads = torch.ops.backbones.neighborhood_tiled_backward(grad, q, k, v, bias, *ctx.numbers)
        return *grads[:3], None if bias is None else grads[3], None, None, None

    _library.impl("neighborhood_tiled", forward, "CompositeExplicitAutograd")
    _library.impl("neighborhood_tiled_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_autograd("backbones::neighborhood_tiled", gradients, setup_context=keep, lib=_library)

    @torch.library.register_fake("backbones::neighborhood_tiled", lib=_library)
    def _(q: Tensor, *others: Any) -> Tensor:
        return q.new_empty(q.shape)

    @torch.library.register_fake("backbones::neighborhood_tiled_backward", lib=_library)
    def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *numbers: Any) -> tuple[Tensor, ...]:
        table = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
        return *(x.new_empty(x.shape) for x in (q, k, v)), table
