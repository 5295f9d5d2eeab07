"""Keys times values first: d x e numbers for all queries, linear in the number of tokens.

Sums over keys are kept as means, so that they do not grow with the map.
"""

import contextlib

import torch
from torch import Tensor


def run(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    count, dtype = k.shape[-2], torch.promote_types(v.dtype, torch.float32)
    # Autocast would take the products back to half precision; it knows no meta device.
    with contextlib.nullcontext() if q.device.type == "meta" else torch.autocast(q.device.type, enabled=False):
        q, k, v32 = q.to(dtype), k.to(dtype) / count, v.to(dtype)
        total = q @ k.sum(-2, keepdim=True).mT + eps / count  # ... N 1
        return (q @ (k.mT @ v32) / total).to(v.dtype)
