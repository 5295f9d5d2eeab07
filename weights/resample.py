"""Resizing what depends on the image size: relative bias tables and position embeddings.

Backbones use these at run time, converters when a file was written for another size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def is_open(sizes: Sequence[int]) -> bool:
    """Whether one of these sizes is no number yet, as in a program that is exported with free height and width."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def resample_bias_table(
    table: Tensor, shape: Sequence[int], old_shape: Sequence[int] | None = None, mode: str = "bicubic"
) -> Tensor:
    """A relative position bias table for another window: one image per head, resized (align_corners False, no antialias).

    Args:
        table: heads x rows x columns (NAT), or positions x heads with row-major positions (Swin).
        shape: new (rows, columns), that is 2 * window - 1 each.
        old_shape: (rows, columns) of a flat table, square unless given.
        mode: of the interpolation, torch's name.

    Returns the layout that came in, and the same tensor when its size is right already. Raises ValueError if a flat table does
    not have old_shape's positions.
    """
    flat = table.ndim == 2
    if flat:
        rows, columns = old_shape or square(len(table), "a bias table")
        if rows * columns != len(table):
            raise ValueError(f"a bias table of {len(table)} positions is not {rows}x{columns}")
        images = table.T.reshape(-1, rows, columns)
    elif table.ndim == 3:
        images = table
    else:
        raise ValueError(f"a bias table has 2 or 3 dimensions, got shape {tuple(table.shape)}")
    if images.shape[-2:] == tuple(shape):
        return table
    images = _resize(images[None], shape, mode, antialias=False)[0]
    return images.flatten(1).T.contiguous() if flat else images


def resample_position_embedding(
    embedding: Tensor,
    grid: Sequence[int],
    prefix_tokens: int = 0,
    old_grid: Sequence[int] | None = None,
    mode: str = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """A learned position embedding for another grid (align_corners False).

    Args:
        embedding: 1 C h w, or 1 tokens C with the entries of prefix tokens before the row-major grid.
        grid: new (rows, columns).
        prefix_tokens: entries (class token, registers) that are kept as they are.
        old_grid: (rows, columns) of a token embedding, square unless given.
        mode: of the interpolation, torch's name.
        antialias: smooth before a map is made smaller.

    Returns the layout that came in, and the same tensor when its grid is right already. An open grid is always resized to; this
    changes nothing where it is the old one.
    """
    if embedding.ndim == 4:
        if not is_open(grid) and embedding.shape[-2:] == tuple(grid):
            return embedding
        return _resize(embedding, grid, mode, antialias)
    if embedding.ndim != 3:
        raise ValueError(f"a position embedding has 3 or 4 dimensions, got shape {tuple(embedding.shape)}")
    prefix, tokens = embedding[:, :prefix_tokens], embedding[:, prefix_tokens:]
    rows, columns = old_grid or square(tokens.shape[1], "a position embedding")
    if rows * columns != tokens.shape[1]:
        raise ValueError(f"a position embedding of {tokens.shape[1]} tokens is not {rows}x{columns}")
    if not is_open(grid) and (rows, columns) == tuple(grid):
        return embedding
    image = tokens.mT.reshape(1, -1, rows, columns)
    return torch.cat([prefix, _resize(image, grid, mode, antialias).flatten(2).mT], 1)


def dino_positions(table: Tensor, old: Sequence[int], new: Sequence[int], antialias: bool, offset: float) -> Tensor:
    """DINOv2's position embedding of patches resized (bicubic); the same tensor if the grids are equal.

    Args:
        table: 1 (h w) C.
        old: (rows, columns) of the table.
        new: (rows, columns) that are wanted.
        antialias: smooth before a map is made smaller.
        offset: 0 for a resize to the new size, as the models with trained registers; else the factors are (new + offset) /
            old, which are also the steps of the sampling: not quite the same as resizing to the new size.
    """
    if is_open(new):
        return _by_matrices(table.mT.unflatten(2, tuple(old)), new, antialias, offset).flatten(2).mT
    if tuple(old) == tuple(new):
        return table
    image = table.float().mT.unflatten(2, tuple(old))
    how = {"scale_factor": tuple((n + offset) / o for n, o in zip(new, old, strict=True))} if offset else {"size": tuple(new)}
    image = F.interpolate(image, mode="bicubic", align_corners=False, antialias=antialias, **how)
    if tuple(image.shape[-2:]) != tuple(new):
        raise ValueError(f"positions of a {tuple(old)} grid cannot be resized to {tuple(new)} with offset {offset}")
    return image.flatten(2).mT.to(table.dtype)


def resample_predictor(matrix: Tensor, grid: Sequence[int], summing: bool, old_grid: Sequence[int] | None = None) -> Tensor:
    """A matrix of Sparsifiner's predictors for another grid (bicubic, antialiased).

    Args:
        matrix: N r, over class token and patches.
        grid: new (rows, columns).
        summing: it sums over patches, so more of them count less each.
        old_grid: (rows, columns), square unless given.
    """
    new = resample_position_embedding(matrix[None], grid, 1, old_grid, antialias=True)[0]
    if not summing:
        return new
    share: Tensor | float
    if is_open(grid):
        share = (matrix.shape[0] - 1) / torch.ones_like(new[1:, :1]).sum()
    else:
        share = (matrix.shape[0] - 1) / (grid[0] * grid[1])
    return torch.cat([new[:1], new[1:] * share])


def square(count: int, what: str) -> tuple[int, int]:
    """(side, side) of `count` row-major positions; ValueError, naming `what`, if they make no square."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{what} of {count} positions is not square: give its old rows and columns")
    return side, side


def _resize(image: Tensor, grid: Sequence[int], mode: str, antialias: bool) -> Tensor:
    """Interpolated in float32 whatever the type, as bfloat16 weights would lose digits."""
    if antialias and mode == "bicubic" and torch.compiler.is_exporting():  # not every program resizes so
        return _by_matrices(image, grid, antialias)
    resized = F.interpolate(image.float(), tuple(grid), mode=mode, align_corners=False, antialias=antialias)
    return resized.to(image.dtype)


def _by_matrices(image: Tensor, grid: Sequence[int], antialias: bool, offset: float = 0.0) -> Tensor:
    """What a bicubic resize gives, ... h w -> ... of `grid`, as two matrix products: every program has them.

    Args:
        image: ... h w.
        grid: (rows, columns), which may be open.
        antialias: smooth before a map is made smaller.
        offset: of `dino_positions`.
    """
    rows, columns = (
        bicubic_matrix(old, new, antialias, offset, image.device) for old, new in zip(image.shape[-2:], grid, strict=True)
    )
    return (rows @ image.float() @ columns.mT).to(image.dtype)


def bicubic_matrix(old: int, new: int, antialias: bool, offset: float = 0.0, device: torch.device | None = None) -> Tensor:
    """The shares of `old` places in each of `new` ones, new x old, of torch's bicubic resize with align_corners False.

    Args:
        old: places that there are.
        new: places that are wanted; may be open.
        antialias: smooth before there are fewer.
        offset: the factor is (new + offset) / old.
        device: of the result.
    """
    place = torch.arange(new, device=device, dtype=torch.float32)
    step = old / (torch.ones_like(place).sum() + offset)  # of a tensor: an exchange format has few operators on sizes
    centre = ((place + 0.5) * step - 0.5)[:, None]
    sites = torch.arange(old, device=device, dtype=torch.float32)
    if antialias:
        shares = _cubic((sites - centre) / step.clamp(min=1), -0.5)  # torch's constants, of either way
        return shares / shares.sum(1, keepdim=True)
    taps = [centre.floor() + tap for tap in (-1, 0, 1, 2)]  # beyond the border counts the border's place
    return torch.stack([(tap.clamp(0, old - 1) == sites) * _cubic(tap - centre, -0.75) for tap in taps]).sum(0)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic kernel at the distances x."""
    x = x.abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x <= 1, near, far) * (x < 2)
