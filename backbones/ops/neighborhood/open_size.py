"""Attend as the definition does, a row of the window at a time, for a program that is exported with a free height or width.

The indices of the neighbours are computed in the graph from the size, which is a symbol. `tiled` would need numbers of the
size. Nothing is reshaped: products of symbolic sizes take torch.export minutes. Memory: the keys of one row of the window,
kw times the map, and kh kw scores for each query and head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .reference import neighbours

if TYPE_CHECKING:
    from . import Call


def is_open(call: Call) -> bool:
    """Whether the height or the width of a call is no number yet."""
    return any(isinstance(side, torch.SymInt) for side in call.q.shape[1:3])


def run(call: Call) -> Tensor:  # B H W heads dim -> B H W heads dim
    (height, width), (kh, kw) = call.q.shape[1:3], call.kernel
    rows, row_entries = neighbours(height, kh, call.dilation[0], call.q.device)  # H kh
    columns, column_entries = neighbours(width, kw, call.dilation[1], call.q.device)  # W kw
    wide = torch.float32 if call.q.dtype in (torch.float16, torch.bfloat16) else call.q.dtype
    q, k, v = (call.q[:, :, :, None].to(wide) * call.scale, call.k.to(wide), call.v.to(wide))
    scores = []
    bias = None if call.bias is None else call.bias.to(wide).permute(1, 2, 0)[:, column_entries]  # 2kh-1 W kw heads
    for i in range(kh):
        keys = k.index_select(1, rows[:, i])[:, :, columns]  # B H W kw heads dim
        score = (q * keys).sum(-1)
        scores.append(score if bias is None else score + bias.index_select(0, row_entries[:, i]))
    shares = torch.cat(scores, 3).softmax(3)[..., None]  # B H W kh*kw heads 1
    out = torch.zeros_like(v)
    for i in range(kh):
        values = v.index_select(1, rows[:, i])[:, :, columns]
        out = out + (shares[:, :, :, i * kw : (i + 1) * kw] * values).sum(3)
    return out.to(call.q.dtype)
