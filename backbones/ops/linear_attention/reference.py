"""The definition: every weight of every query written out, N x n numbers."""

import torch
from torch import Tensor


def run(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    dtype = torch.promote_types(v.dtype, torch.float32)
    weights = q.to(dtype) @ k.to(dtype).mT
    return (weights @ v.to(dtype) / (weights.sum(-1, keepdim=True) + eps)).to(v.dtype)
