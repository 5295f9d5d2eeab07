"""The definition of neighbourhood attention: slow, obvious, any device and dtype. Every other backend agrees with this file.

Papers: Hassani et al. 2023 (NAT), https://arxiv.org/abs/2204.07143; Hassani and Shi 2022 (DiNAT),
https://arxiv.org/abs/2209.15001.

One axis at a time, length L, kernel k (odd), dilation d. Query i has the residue r = i mod d and the position p = i // d
among the n = ceil((L - r) / d) indices of that residue; it sees only those. Its window of k positions starts at clamp(p - k
// 2, 0, n - k): at the borders the window slides inwards, so that every query has exactly k keys and nothing is padded or
masked. The bias entry of a key is its position minus the query's, in units of d, plus k - 1. Two axes: the product of the two
windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import Call


def neighbours(length: int, kernel: int, dilation: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """For every query on one axis, [length, kernel] each: the indices of its keys, and their entries in the bias table."""
    query = torch.arange(length, device=device)
    residue, position = query % dilation, query // dilation
    group = (length - residue + dilation - 1) // dilation
    start = torch.minimum((position - kernel // 2).clamp(min=0), group - kernel)
    key = start[:, None] + torch.arange(kernel, device=device)
    return residue[:, None] + key * dilation, key - position[:, None] + kernel - 1


def refuses(call: Call) -> str | None:
    """None: the definition runs every valid call."""
    return None


def run(call: Call) -> Tensor:  # B H W heads dim -> B H W heads dim
    """Half-precision inputs are computed in float32 and rounded once, at the end; memory: every key and value kh * kw times."""
    (height, width), (kh, kw) = call.q.shape[1:3], call.kernel
    wide = torch.float32 if call.q.dtype in (torch.float16, torch.bfloat16) else call.q.dtype
    q, k, v = (t.to(wide) for t in (call.q, call.k, call.v))
    rows, row_entries = (t[:, :, None, None] for t in neighbours(height, kh, call.dilation[0], q.device))
    columns, column_entries = (t[None, None] for t in neighbours(width, kw, call.dilation[1], q.device))
    scores = torch.einsum("bhwnd,bhiwjnd->bnhwij", q * call.scale, k[:, rows, columns])
    if call.bias is not None:
        scores = scores + call.bias.to(wide)[:, row_entries, column_entries].transpose(2, 3)  # heads H W kh kw
    weights = scores.flatten(-2).softmax(-1).unflatten(-1, (kh, kw))
    return torch.einsum("bnhwij,bhiwjnd->bhwnd", weights, v[:, rows, columns]).to(call.q.dtype)
