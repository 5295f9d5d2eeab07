"""What two or more families share and timm.layers lacks."""

from collections.abc import Sequence


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth per block, rising linearly from 0 at the first block of the network to `rate` at the last one.

    Plain numbers, so that it also works while a model is made on the meta device.
    """
    step = rate / max(sum(depths) - 1, 1)
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [[step * (start + i) for i in range(depth)] for start, depth in zip(starts, depths)]
