"""Which frequencies the feature maps of a ViT hold, layer by layer.

Papers: Park and Kim 2022, "How Do Vision Transformers Work?", https://arxiv.org/abs/2202.06709; Park et al. 2023,
        https://arxiv.org/abs/2305.00729
Source: github.com/xxxnell/how-do-vits-work @ 9571ff1 (Apache-2.0), github.com/naver-ai/cl-vs-mim @ eafe516 (MIT).
Differs from the source: a grid that is not square is read at the nearest frequency of each axis.

Shapes: B batch, C channels, gh gw grid of patches.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backbones.analysis.run import batches, evaluation, grid_of, vit_of, walk
from backbones.vit import Part, embed


@dataclass
class Spectrum:
    """Means over images and channels.

    Attributes:
        places: what each row is: "embedding", then "attention i" and "block i" for every block.
        log_amplitude: rows x frequencies, natural logarithm, minus that of the lowest frequency; the last column is the
            papers' "high-frequency amplitude".
        variance: rows, over the places of a map.
        images: how many were measured.
    """

    places: list[str]
    log_amplitude: Tensor
    variance: Tensor
    images: int

    @property
    def frequencies(self) -> Tensor:
        """Of the columns, as shares of the highest."""
        return torch.linspace(0, 1, self.log_amplitude.shape[1])


def log_amplitude(maps: Tensor) -> Tensor:
    """Mean logarithm of the amplitudes of maps B C gh gw along the diagonal from frequency 0 on: B x frequencies."""
    height, width = maps.shape[-2:]
    count = min(height, width)
    steps = torch.arange(count - count // 2)
    rows, columns = (steps * height / count).round().long(), (steps * width / count).round().long()
    amplitude = (torch.fft.fft2(maps.float()).abs() + 1e-6).log().mean(1)
    return amplitude[:, rows, columns]


def latents(model: Part, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(place, patch tokens as a map B C gh gw): after the embedding, after each attention and after each block."""
    start, grid = embed(model, images), grid_of(model, images)

    def as_map(x: Tensor) -> Tensor:
        return x[:, model.num_prefix_tokens :].mT.unflatten(2, grid)

    yield "embedding", as_map(start.x)
    for layer in walk(model, start):
        yield f"attention {layer.index}", as_map(layer.middle)
        yield f"block {layer.index}", as_map(layer.tokens)


@torch.no_grad()
def feature_spectrum(model: nn.Module, images: Tensor | Iterable, batch_size: int = 8) -> Spectrum:
    """Fourier profile and variance of the feature maps. One map is in memory at a time.

    Args:
        model: a timm ViT (VisionTransformer, Eva, Beit), also inside a dense predictor.
        images: n 3 H W of one size, or batches, see run.batches.
        batch_size: images at a time where `images` is a tensor.
    """
    vit = vit_of(model)
    amplitudes: dict[str, Tensor] = {}
    variances: dict[str, Tensor] = {}
    seen = 0
    with evaluation(vit):
        for batch in batches(vit, images, batch_size):
            seen += len(batch)
            for place, maps in latents(vit, batch):
                if min(maps.shape[-2:]) < 2:
                    raise ValueError(f"a grid of {tuple(maps.shape[-2:])} patches has no frequencies: use larger images")
                amplitude = log_amplitude(maps).double().sum(0).cpu()
                variance = maps.float().flatten(2).var(-1).mean(1).double().sum().cpu()
                if place in amplitudes and amplitudes[place].shape != amplitude.shape:
                    raise ValueError("all images must have one size: resize them first")
                amplitudes[place] = amplitudes[place] + amplitude if place in amplitudes else amplitude
                variances[place] = variances[place] + variance if place in variances else variance
    table = torch.stack(list(amplitudes.values())) / seen
    return Spectrum(
        list(amplitudes), (table - table[:, :1]).float(), (torch.stack(list(variances.values())) / seen).float(), seen
    )
