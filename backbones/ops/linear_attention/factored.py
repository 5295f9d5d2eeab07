"""Keys times values first: d x e numbers for all queries, linear in the number of tokens.

Sums over keys are kept as means, so that they do not grow with the map.
"""

import contextlib

import torch
from torch import Tensor

from weights.resample import is_open


def run(q: Tensor, k: Tensor, v: Tensor, eps: float, per_key: bool = False) -> Tensor:
    count, dtype = k.shape[-2], torch.promote_types(v.dtype, torch.float32)
    # Autocast would take the products back to half precision; it knows no meta device.
    with contextlib.nullcontext() if q.device.type == "meta" else torch.autocast(q.device.type, enabled=False):
        q, k, v32 = q.to(dtype), k.to(dtype), v.to(dtype)
        if is_open((count,)):  # an exchange format divides by no size: sums instead of means
            added = eps * torch.ones_like(k[..., :1]).sum(-2, keepdim=True) if per_key else eps
            return (q @ (k.mT @ v32) / (q @ k.sum(-2, keepdim=True).mT + added)).to(v.dtype)
        k = k / count
        total = q @ k.sum(-2, keepdim=True).mT + (eps if per_key else eps / count)  # ... N 1
        return (q @ (k.mT @ v32) / total).to(v.dtype)
