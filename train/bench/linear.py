"""`zoo bench linear`: F.linear beside weights packed once for oneDNN, by rows of the input, which `backbones.fuse` asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.fuse import LEAST_ROWS, LEAST_WEIGHTS, MOST_ROWS
from train.bench.clock import interleaved, ratio

# (inputs, outputs) of the linear layers of a Swin-T's stages
WIDTHS = (
    (96, 288),
    (96, 384),
    (384, 96),
    (192, 768),
    (768, 192),
    (384, 1152),
    (384, 1536),
    (1536, 384),
    (768, 3072),
    (3072, 768),
)
ROWS = (1, 8, 16, 49, 98, 196, 392, 784, 1568, 3136)


def bench_linear(
    rounds: int = 7, threads: int = 1, widths: Sequence[tuple[int, int]] = WIDTHS, rows: Sequence[int] = ROWS
) -> list[dict[str, str]]:
    """A row per layer and number of rows: the packed layer's time over the plain one's, with quartiles, and what fuse does.

    GELU inside the product is the third: oneDNN's own, over a plain layer and GELU.

    Args:
        rounds: measurements of each.
        threads: of torch.
        widths: (inputs, outputs) of each layer.
        rows: how many the input has.
    """
    found = []
    for inputs, outputs in widths:
        weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        for count in rows:
            x = torch.randn(count, inputs)
            product = partial(torch.ops.mkldnn._linear_pointwise, x, packed, bias)
            plain = partial(F.linear, x, weight, bias)
            with torch.inference_mode():
                times = interleaved(
                    {
                        "plain": plain,
                        "packed": partial(product, "none", [], ""),
                        "gelu": partial(activated, plain),
                        "packed gelu": partial(product, "gelu", [], "none"),
                    },
                    rounds,
                    "cpu",
                    threads,
                )
            pays = LEAST_ROWS <= count <= MOST_ROWS and weight.numel() >= LEAST_WEIGHTS
            found.append(
                {
                    "layer": f"{inputs} -> {outputs}",
                    "rows": str(count),
                    "plain GFLOP/s": f"{2e-6 * count * weight.numel() / min(times['plain']):.0f}",
                    "packed / plain": "{:.2f} ({:.2f} to {:.2f})".format(*ratio(times["packed"], times["plain"])),
                    "packed with GELU / plain, GELU": "{:.2f} ({:.2f} to {:.2f})".format(
                        *ratio(times["packed gelu"], times["gelu"])
                    ),
                    "fuse packs": "yes" if pays else "",
                }
            )
    return found


def activated(layer: Callable[[], Tensor]) -> Tensor:
    return F.gelu(layer())
