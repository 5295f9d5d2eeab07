"""The thin-plate-spline layers of Dense Transformer Networks: sample a map where it matters, and put the result back.

Paper:  Li et al. 2017, https://arxiv.org/abs/1705.08881
Source: github.com/divelab/dtn @ 91d78e9 (no licence file; written from its behaviour). Parameter names are its own.
Differs from the source: the layers start at the identity (`start="authors"` gives the published start, which does not).

Shapes: B batch, C channels, H W the map (fixed at construction, as published), n control points.
"""

from typing import Literal

import torch
from torch import Tensor, nn


class SplineTransform(nn.Module):
    """A localisation network and the thin-plate spline that its control points define (section 3.2).

    Call it with the encoder's features for the spline; `sample` and `restore` apply it. An image side of -1..1 maps to 0..W, as
    published: even the identity leaves out the last row and column, which become 0 in `sample`.

    Args:
        channels: C of the features that place the control points.
        height, width: H, W of the maps.
        ratio: pixels per control point; there are int(H / ratio) along x and int(W / ratio) along y, in the source's order.
        start: "identity" places the points on the regular grid; "authors" on tanh of a grid of -5..5, whose inner points lie
            near the borders, so that with more than 3 points per axis most of the sampled map is 0.
        hidden: width of the localisation network.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        ratio: int,
        start: Literal["identity", "authors"] = "identity",
        hidden: int = 20,
    ):
        super().__init__()
        if start not in ("identity", "authors"):
            raise ValueError(f"start is {start!r}; use 'identity' or 'authors'")
        across, down = int(height / ratio), int(width / ratio)
        if min(across, down) < 2:
            raise ValueError(f"a map of {height}x{width} has {across}x{down} control points at ratio {ratio}; it needs 2x2")
        self.size, self.channels = (height, width), channels
        reach = 5.0 if start == "authors" else 1.0
        x, y = torch.linspace(-reach, reach, across), torch.linspace(-reach, reach, down)
        grid = torch.stack([x.repeat(down), y.repeat_interleave(across)])  # 2 n, y outer
        self.W_fc_loc1 = nn.Parameter(torch.zeros(height * width * channels, hidden))
        self.b_fc_loc1 = nn.Parameter(torch.randn(hidden) * 0.01)
        self.W_fc_loc2 = nn.Parameter(torch.zeros(hidden, 2 * across * down))
        self.b_fc_loc2 = nn.Parameter((grid if start == "authors" else grid.clamp(-0.9999, 0.9999).atanh()).flatten())
        source = torch.stack(
            [torch.linspace(-1, 1, across).repeat(down), torch.linspace(-1, 1, down).repeat_interleave(across)], 1
        )
        pixels = torch.stack(
            [torch.linspace(-1, 1, width).repeat(height), torch.linspace(-1, 1, height).repeat_interleave(width)], 1
        )
        self.register_buffer("inverse", spline_system(source).inverse().float(), persistent=False)
        self.register_buffer("basis", spline_basis(pixels, source).float(), persistent=False)
        self.inverse: Tensor
        self.basis: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Features B C H W -> the spline B 2 n+3 (x and y as sums over 1, x, y and the n radial functions)."""
        if features.shape[1:] != (self.channels, *self.size):
            raise ValueError(
                f"the layer was made for {self.channels} channels of {self.size[0]}x{self.size[1]}, "
                f"got {tuple(features.shape[1:])}"
            )
        flat = features.permute(0, 2, 3, 1).flatten(1)
        points = (torch.tanh(flat @ self.W_fc_loc1 + self.b_fc_loc1) @ self.W_fc_loc2 + self.b_fc_loc2).tanh()
        points = points.unflatten(1, (2, -1)).mT  # B n 2
        right = torch.cat([points, points.new_zeros(len(points), 3, 2)], 1)
        return (self.inverse @ right).mT

    def corners(self, spline: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Places of the pixels in the map: (columns x0 x1, rows y0 y1), each B HW, clipped to the map, and px, py."""
        height, width = self.size
        x, y = (spline @ self.basis.T).unbind(1)
        px, py = (x + 1) * width / 2, (y + 1) * height / 2
        columns = [(px.floor() + i).clamp(0, width - 1) for i in (0, 1)]
        rows = [(py.floor() + i).clamp(0, height - 1) for i in (0, 1)]
        return columns, rows, px, py

    def sample(self, x: Tensor, spline: Tensor) -> Tensor:
        """The map x B C H W read where the spline sends each pixel, bilinearly; 0 outside."""
        height, width = self.size
        (x0, x1), (y0, y1), px, py = self.corners(spline)
        total = torch.zeros_like(x.flatten(2))
        for column, row, weight in (
            (x0, y0, (x1 - px) * (y1 - py)),
            (x0, y1, (x1 - px) * (py - y0)),
            (x1, y0, (px - x0) * (y1 - py)),
            (x1, y1, (px - x0) * (py - y0)),
        ):
            index = (row * width + column).long()[:, None].expand(-1, x.shape[1], -1)
            total = total + weight[:, None] * x.flatten(2).gather(2, index)
        return total.unflatten(2, (height, width))

    def restore(self, x: Tensor, spline: Tensor) -> Tensor:
        """The map x B C H W put back to where the spline took its pixels from (the decoder layer).

        Sums of values and of weights are kept apart per corner, as published: several pixels on one corner give their sum times
        the corner's weight. A cell that no pixel reaches keeps its value of x.
        """
        height, width = self.size
        columns, rows, px, py = self.corners(spline)

        def near(place: Tensor, corner: Tensor) -> Tensor:
            distance = (place - corner).abs()
            return torch.where(distance > 1, 0, distance)

        flat = x.flatten(2)
        value, weight = torch.zeros_like(flat), flat.new_zeros(len(flat), height * width)
        for i, column in enumerate(columns):
            for j, row in enumerate(rows):
                index = (row * width + column).long()
                share = near(px, columns[1 - i]) * near(py, rows[1 - j])
                sums = torch.zeros_like(flat).scatter_add(2, index[:, None].expand(-1, flat.shape[1], -1), flat)
                shares = torch.zeros_like(weight).scatter_add(1, index, share)
                value, weight = value + shares[:, None] * sums, weight + shares
        weight = weight.clamp(1e-5, 1e10)
        out = value / weight[:, None] + torch.where(weight <= 1e-5, 1.0, 0.0)[:, None] * flat
        return out.unflatten(2, (height, width))


def radial(a: Tensor, b: Tensor) -> Tensor:
    """r^2 ln r^2 between points a P 2 and b n 2: P n."""
    squared = (a[:, None] - b[None]).square().sum(2)
    return squared * squared.clamp(1e-10, 1e10).log()


def spline_basis(points: Tensor, source: Tensor) -> Tensor:
    """1, x, y and the radial functions of the source points, at points P 2: P n+3."""
    return torch.cat([torch.ones(len(points), 1), points, radial(points, source)], 1)


def spline_system(source: Tensor) -> Tensor:
    """The matrix whose solution are the spline's coefficients (values at the points, then the three side conditions)."""
    source = source.double()
    side = torch.cat([torch.ones(len(source), 1), source], 1).double().T
    upper = torch.cat([side.T, radial(source, source)], 1)
    return torch.cat([upper, torch.cat([torch.zeros(3, 3), side], 1)])
