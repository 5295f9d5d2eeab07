"""Random numbers of a training step as a function of (seed, step, position in the total batch).

`seed_all(seed, step)` before every micro-batch gives each draw of a forward pass the same word on every process and in every
micro-batch; `uniforms` mixes it with the position of each sample. So stochastic depth and dropout do not depend on how the
batch is cut, and recomputed activations see the masks of the first pass, because torch restores its generator for them.
"""

import contextlib
import math
import random
from collections.abc import Iterator

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

SMALL = 4096  # numbers per micro-batch made on the CPU: below that the launches on a GPU take longer than the copy


def seed_all(*numbers: int) -> None:
    """Seeds Python, NumPy and torch (every device) from any number of integers; near integers give unrelated numbers."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


class _Step:
    """The micro-batch in hand: positions of its samples in the total batch, None outside a training step."""

    positions: Tensor | None = None


_step = _Step()  # one object for all threads: autograd recomputes activations in its own


@contextlib.contextmanager
def drawn_for(positions: range) -> Iterator[None]:
    """Inside the block, forward and backward, modules changed by `by_position` draw for these positions."""
    _step.positions = torch.arange(positions.start, positions.stop)
    try:
        yield
    finally:
        _step.positions = None


def uniforms(each: int, device: torch.device) -> Tensor:
    """samples x each numbers in [0, 1) for the samples in hand: a hash of (a word, position, index).

    The word is drawn from torch's CPU generator. The hash is SplitMix64 (Steele et al. 2014), whose upper 24 bits are kept.
    """
    positions = _step.positions
    assert positions is not None
    word = torch.randint(-(2**62), 2**62, (), dtype=torch.int64)
    place = torch.device("cpu") if len(positions) * each <= SMALL else device
    counter = positions.to(place)[:, None] * each + torch.arange(each, device=place)
    x = word.to(place) + (counter + 1) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return (((x >> 40) & 0xFFFFFF).to(torch.float32) * 2**-24).to(device, non_blocking=True)


def normals(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal numbers, the first axis of `shape` for the samples in hand: by position in a training step, else torch's.

    Box and Muller's of two of `uniforms`.
    """
    if _step.positions is None:
        return torch.randn(shape, device=device)
    count = math.prod(shape[1:])
    radius, angle = uniforms(2 * count, device).chunk(2, 1)
    return ((-2 * (1 - radius).log()).sqrt() * (2 * math.pi * angle).cos()).reshape(shape)


def _mask(x: Tensor, keep: float, rest: int) -> Tensor:
    """0 or 1 with probability `keep`, `rest` numbers for each of x's first axis, whose rows belong to the samples in turn."""
    assert _step.positions is not None
    rows = len(x) // len(_step.positions)
    return (uniforms(rows * rest, x.device) < keep).reshape(len(x), rest).to(x.dtype)


def _in_hand(module: nn.Module, x: Tensor) -> bool:
    """Whether to draw by position: in a training step, on a tensor whose first axis holds the samples, or parts of each."""
    return module.training and _step.positions is not None and len(x) % len(_step.positions) == 0


class _DropPath(DropPath):
    """Stochastic depth (Huang et al. 2016) by position."""

    def forward(self, x: Tensor) -> Tensor:
        if not _in_hand(self, x):
            return super().forward(x)
        keep = 1 - self.drop_prob
        mask = _mask(x, keep, 1).reshape(-1, *[1] * (x.ndim - 1))
        return x * (mask / keep if keep > 0 and self.scale_by_keep else mask)


class _Dropout(nn.Dropout):
    """Dropout of single values by position."""

    def forward(self, input: Tensor) -> Tensor:
        if not _in_hand(self, input):
            return super().forward(input)
        return input * (_mask(input, 1 - self.p, input[0].numel()).reshape(input.shape) / max(1 - self.p, 1e-12))


class _Dropout2d(nn.Dropout2d):
    """Dropout of whole channels by position."""

    def forward(self, input: Tensor) -> Tensor:
        if not _in_hand(self, input) or input.ndim != 4:
            return super().forward(input)
        return input * (_mask(input, 1 - self.p, input.shape[1])[:, :, None, None] / max(1 - self.p, 1e-12))


KINDS: dict[type[nn.Module], type[nn.Module]] = {DropPath: _DropPath, nn.Dropout: _Dropout, nn.Dropout2d: _Dropout2d}


def by_position(model: nn.Module) -> int:
    """Has a model's stochastic depth and dropout drawn by position, in place, names and weights kept; returns how many.

    Attention that would drop weights inside a fused kernel, where no module draws, takes its written-out form (timm's
    `fused_attn`). What draws otherwise (timm's PatchDropout, functional dropout) is left as it is.
    """
    found = [module for module in model.modules() if type(module) in KINDS and _rate(module) > 0]
    for module in found:
        module.__class__ = KINDS[type(module)]
    for module in model.modules():
        if getattr(module, "fused_attn", False) and isinstance(getattr(module, "attn_drop", None), _Dropout):
            module.fused_attn = False  # type: ignore[assignment]  # a plain flag; torch's stub says module
    return len(found)


def _rate(module: nn.Module) -> float:
    return float(getattr(module, "drop_prob", None) or getattr(module, "p", None) or 0.0)
