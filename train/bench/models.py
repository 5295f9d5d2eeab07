"""`zoo bench MODEL`: forward and training step beside a peer, on random weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backbones  # noqa: F401  (registers the zoo's models with timm)
from backbones.ops import neighborhood
from train.bench.clock import measure, shown

PEER = "swin_tiny_patch4_window7_224"


def bench_model(
    name: str,
    size: tuple[int, int] = (224, 224),
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    device: str = "cpu",
    training: bool = True,
    peer: str | None = PEER,
) -> list[dict[str, str]]:
    """Forward and training step (forward, backward, AdamW) with random weights, and their ratio to the peer's.

    A model whose attention has several backends is measured with each that can run it. A peer that cannot take the size is left
    out.
    """
    model = timm.create_model(name).to(device)
    variants = {f"{name}, {backend}" if backend else name: (model, backend) for backend in backends_of(model)}
    if peer is not None and peer != name:
        with contextlib.suppress(AssertionError, RuntimeError, ValueError):
            other = timm.create_model(peer).to(device).eval()
            other(torch.zeros(1, 3, *size, device=device))
            variants[peer] = (other, None)
    rows = []
    for batch in batches:
        images = torch.randn(batch, 3, *size, device=device)
        with torch.no_grad():
            forward = measure({key: forward_of(*variant, images) for key, variant in variants.items()}, rounds, device)
        steps = {key: step_of(*variant, images) for key, variant in variants.items()} if training else {}
        step = measure(steps, rounds, device)
        for key in variants:
            rows.append(
                {
                    "model": key,
                    "batch": str(batch),
                    "forward ms (min)": shown(forward[key]),
                    "of the peer": f"{forward[key][0] / forward[peer][0]:.2f}" if peer in forward else "-",
                    "step ms (min)": shown(step[key]) if step else "-",
                    "of the peer's": f"{step[key][0] / step[peer][0]:.2f}" if peer in step else "-",
                }
            )
    return rows


def backends_of(model: nn.Module) -> list[str | None]:
    """Names of the attention backends to measure a model with; [None] where there is nothing to choose."""
    if not any(hasattr(module, "backend") for module in model.modules()):
        return [None]
    device = next(model.parameters()).device
    x, bias = torch.empty(1, 7, 7, 1, 32, device=device), torch.empty(1, 13, 13, device=device)
    able = neighborhood.explain(x, x, x, 7, 1, bias)
    return [name for name in neighborhood.AUTOMATIC.get(device.type, ("tiled",)) if able[name] is None]


def attention_by(backend: str | None) -> contextlib.AbstractContextManager[None]:
    """Neighbourhood attention by this backend inside; None leaves the choice."""
    return contextlib.nullcontext() if backend is None else neighborhood.using(backend)


def forward_of(model: nn.Module, backend: str | None, images: Tensor) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with attention_by(backend):
            return model.eval()(images)

    return forward


def step_of(model: nn.Module, backend: str | None, images: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def step() -> None:
        with attention_by(backend):
            F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
