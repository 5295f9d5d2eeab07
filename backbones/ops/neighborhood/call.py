"""What a backend is called with."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One checked call. q, k, v: [B, H, W, heads, dim]; bias: [heads, 2 kh - 1, 2 kw - 1] or None; kernel, dilation: (rows,
    columns)."""

    q: Tensor
    k: Tensor
    v: Tensor
    kernel: tuple[int, int]
    dilation: tuple[int, int]
    bias: Tensor | None
    scale: float
