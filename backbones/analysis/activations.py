"""How sparse the MLPs of a ViT are, and how massive its largest activations.

Papers: Li et al. 2022, "The Lazy Neuron Phenomenon", https://arxiv.org/abs/2210.06313
        Sun et al. 2024, "Massive Activations in Large Language Models", https://arxiv.org/abs/2402.17762
Source: github.com/locuslab/massive-activations @ 7e5e64c (MIT) for the massive activations; the first has no code.

Shapes: B batch, N tokens, C channels, L blocks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backbones.analysis.run import batches, evaluation, layers, vit_of


@dataclass
class Activations:
    """Per block, means over images.

    Attributes:
        layers: numbers of the blocks.
        active: threshold -> L, share of the MLP's hidden units whose magnitude exceeds it; threshold 0: that are positive.
        largest: L 3, the three largest magnitudes of the block's output over all tokens and channels.
        median: L, the median magnitude there (of an even number the lower one).
        token: L, the token of the largest magnitude, of the image where it is largest; prefix tokens come first.
        channel: L, its channel.
        massive: L, share of the images whose largest magnitude exceeds both 100 and 1000 medians.
        images: how many were measured.
    """

    layers: list[int]
    active: dict[float, Tensor]
    largest: Tensor
    median: Tensor
    token: list[int]
    channel: list[int]
    massive: Tensor
    images: int


def active_share(hidden: Tensor, threshold: float) -> Tensor:
    """Share of hidden units above the threshold for each image, B N K -> B: in magnitude, or positive where it is 0."""
    return ((hidden.abs() if threshold else hidden) > threshold).double().flatten(1).mean(1)


@torch.no_grad()
def activation_statistics(
    model: nn.Module, images: Tensor | Iterable, thresholds: Sequence[float] = (0.0, 0.01), batch_size: int = 8
) -> Activations:
    """Sparsity of the MLPs and massive activations of the blocks. One block's activations are in memory at a time.

    Args:
        model: a timm ViT (VisionTransformer, Eva, Beit), also inside a dense predictor.
        images: n 3 H W, or batches, see run.batches.
        thresholds: for `active`; a GELU is never exactly zero, so one above 0 says more there.
        batch_size: images at a time where `images` is a tensor.
    """
    vit = vit_of(model)
    hidden: dict[int, list[Tensor]] = {}
    rows: dict[int, list[tuple[Tensor, ...]]] = {}
    seen = 0

    def note(module: nn.Module, inputs: tuple[Any, ...], index: int) -> None:
        hidden.setdefault(index, []).append(torch.stack([active_share(inputs[0], t) for t in thresholds], 1).cpu())

    mlps = {i: block.mlp for i, block in enumerate(vit.blocks) if hasattr(block, "mlp")}
    for i, mlp in mlps.items():
        if not hasattr(mlp, "drop1"):
            raise ValueError(
                f"blocks.{i}.mlp is a {type(mlp).__name__}; the hidden units of timm's Mlp, GluMlp and SwiGLU are known"
            )
    handles = [mlp.drop1.register_forward_pre_hook(partial(note, index=i)) for i, mlp in mlps.items()]
    try:
        with evaluation(vit):
            for batch in batches(vit, images, batch_size):
                seen += len(batch)
                for layer in layers(vit, batch):
                    flat = layer.tokens.float().abs().flatten(1)
                    top, places = flat.topk(3)
                    rows.setdefault(layer.index, []).append((top.cpu(), flat.median(1).values.cpu(), places[:, 0].cpu()))
    finally:
        for handle in handles:
            handle.remove()
    shares = torch.stack([torch.cat(hidden[i]).mean(0) for i in rows]).float()
    largest, medians, tokens, channels, massive = [], [], [], [], []
    channel_count = layer.tokens.shape[2]
    for found in rows.values():
        top, median, place = (torch.cat(parts) for parts in zip(*found, strict=True))
        largest.append(top.mean(0))
        medians.append(median.mean())
        token, channel = divmod(int(place[top[:, 0].argmax()]), channel_count)
        tokens.append(token)
        channels.append(channel)
        massive.append(((top[:, 0] > 100) & (top[:, 0] > 1000 * median)).float().mean())
    active = {threshold: shares[:, i] for i, threshold in enumerate(thresholds)}
    return Activations(
        list(rows), active, torch.stack(largest), torch.stack(medians), tokens, channels, torch.stack(massive), seen
    )
