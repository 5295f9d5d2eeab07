"""ZoeDepth: metric depth as bins whose centres move from coarse to fine, on DPT's decoder.

Paper:  Bhat et al. 2023, https://arxiv.org/abs/2302.12288
Source: github.com/isl-org/ZoeDepth @ d87f17b (MIT). Parameter names of the bins are its own; the decoder's are `heads.dpt`'s.
Differs from the source: any number of maps, any backbone.

Shapes: B batch, C channels, K bins, E channels of an embedding.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Head, Maps
from .blocks import resize
from .dpt import DPT, DepthPredictor

KINDS = ("softplus", "normed", "hybrid1", "hybrid2")
STRENGTH = 300  # of attraction; the source's option of 1000 never reaches its code


class ZoeDepth(Head):
    """Metres B 1 h w from DPT's decoder and metric bins; use the depth rule "relu" with min_depth 0.

    Args:
        channels: of each map, finest first; a map may be a pair (map, prefix tokens).
        out_channels: 1.
        width: of DPT's fusion path.
        one_scale: all maps have one size (a plain ViT).
        prefix_counts: prefix tokens beside each map.
        readout, reassemble: as in `heads.dpt.DPT`.
        bins: K.
        embedding: E.
        attractors: points per level, coarsest first; the last is repeated where there are more levels.
        kind: what is unbounded: nothing ("normed"), the centres ("hybrid1" starts, "hybrid2" ends normed) or all ("softplus").
        attraction: "inv" or "exp": how pull falls with distance.
        pull: "mean" or "sum" over the points of a level.
        min_temperature, max_temperature: of the softmax over bins.
        min_depth, max_depth: metres, the range of the normed kinds.
        inverse: the relative depth is inverted and stretched to 0..1 over the batch before it is read.
    """

    only_channels = 1
    takes_one_scale = True
    takes_prefix_counts = True

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        width: int = 256,
        one_scale: bool = False,
        prefix_counts: Sequence[int] | None = None,
        readout: str = "ignore",
        reassemble: Sequence[int] | None = None,
        bins: int = 64,
        embedding: int = 128,
        attractors: Sequence[int] = (16, 8, 4, 1),
        kind: Literal["softplus", "normed", "hybrid1", "hybrid2"] = "softplus",
        attraction: Literal["inv", "exp"] = "inv",
        pull: Literal["mean", "sum"] = "mean",
        min_temperature: float = 0.0212,
        max_temperature: float = 50.0,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        inverse: bool = False,
    ):
        super().__init__()
        if out_channels != 1:
            raise ValueError(f"zoedepth gives metres, one channel; out_channels is {out_channels}: use the depth rule 'relu'")
        self.core = DPT(
            channels, 1, width, one_scale, reassemble, prefix_counts=prefix_counts, readout=readout, predictor="depth"
        )
        self.prefix_tokens = self.core.prefix_tokens
        levels = len(channels)
        counts = [*attractors, *[attractors[-1]] * levels][:levels]
        self.bins = MetricBins(
            width,
            [width] * levels,
            32,
            bins,
            embedding,
            counts,
            kind,
            attraction,
            pull,
            min_temperature,
            max_temperature,
            min_depth,
            max_depth,
            inverse,
        )

    def get_classifier(self) -> nn.Module:
        return self.core.get_classifier()

    def forward(self, maps: Maps) -> Tensor:
        found = self.core.reassembled(maps)
        paths = self.core.paths(found)
        predictor = self.core.predictor
        assert isinstance(predictor, DepthPredictor)
        hidden = predictor.hidden(self.core.stem(self.core.project(paths[-1])))
        return self.bins(hidden, F.relu(predictor.conv3(hidden)), found[-1], paths)[0]


class Pointwise(nn.Module):
    """Two 1x1 convolutions with ReLU between them, `_net.0` and `_net.2`."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int):
        super().__init__()
        self._net = nn.Sequential(nn.Conv2d(in_channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._net(x)


def fit(x: Tensor, like: Tensor) -> Tensor:
    """x at the size of `like`, corners aligned: every resize of this head."""
    return resize(x, like=like, align_corners=True)


class MetricBins(nn.Module):
    """The head proper: bin centres, moved level by level, and their probabilities at every pixel.

    Args:
        bottleneck: channels of the coarsest map of the decoder.
        blocks: channels of the fusion outputs, coarsest first.
        last: channels of the map that the relative depth was read from.
        bins, embedding: K and E.
        attractors: points per block.
        kind, attraction, pull: as in `ZoeDepth`.
        min_temperature, max_temperature, min_depth, max_depth, inverse: as in `ZoeDepth`.
        hidden: width of projectors and attractors.
        seed_hidden: width of the seed regressor.
    """

    def __init__(
        self,
        bottleneck: int,
        blocks: Sequence[int],
        last: int,
        bins: int,
        embedding: int,
        attractors: Sequence[int],
        kind: str = "softplus",
        attraction: str = "inv",
        pull: str = "mean",
        min_temperature: float = 0.0212,
        max_temperature: float = 50.0,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        inverse: bool = False,
        hidden: int = 128,
        seed_hidden: int = 256,
    ):
        super().__init__()
        for name, value, valid in (
            ("kind", kind, KINDS),
            ("attraction", attraction, ("inv", "exp")),
            ("pull", pull, ("mean", "sum")),
        ):
            if value not in valid:
                raise ValueError(f"zoedepth: {name} is {value!r}; use one of {', '.join(valid)}")
        if not 0 <= min_depth < max_depth:
            raise ValueError(f"zoedepth: need 0 <= min_depth < max_depth, got {min_depth} and {max_depth} m")
        self.kind, self.attraction, self.pull, self.inverse = kind, attraction, pull, inverse
        self.min_depth, self.max_depth = min_depth, max_depth
        self.normed_points = kind in ("normed", "hybrid2")
        self.conv2 = nn.Conv2d(bottleneck, bottleneck, 1)
        self.seed_bin_regressor = Pointwise(bottleneck, seed_hidden, bins)
        self.seed_projector = Pointwise(bottleneck, hidden, embedding)
        self.projectors = nn.ModuleList(Pointwise(c, hidden, embedding) for c in blocks)
        per_point = 2 if self.normed_points else 1  # the second of each pair is never read, as published
        self.attractors = nn.ModuleList(Pointwise(embedding, hidden, per_point * n) for n in attractors)
        self.conditional_log_binomial = LogBinomial(last + 1 + embedding, embedding, bins, min_temperature, max_temperature)

    def forward(
        self, last: Tensor, relative: Tensor, bottleneck: Tensor, blocks: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(metres B 1 h w, probabilities B K h w, bin centres of every level), at the size of `last`.

        Args:
            last: B C h w, the map that the relative depth was read from.
            relative: B 1 h w, relative depth.
            bottleneck: the decoder's coarsest map.
            blocks: the fusion outputs, coarsest first.
        """
        x = self.conv2(bottleneck)
        centres, found = self.seed(x), []
        embedding = self.seed_projector(x)
        for project, attract, block in zip(self.projectors, self.attractors, blocks, strict=True):
            own = project(block)
            centres, shown = self.attract(attract(own + fit(embedding, own)), fit(centres, own))
            found.append(shown)
            embedding = own
        if self.inverse:
            relative = 1 / (relative + 1e-6)
            low, high = relative.min(), relative.max()
            relative = (relative - low) / (high - low)
        last = torch.cat([last, fit(relative, last)], 1)
        chance = self.conditional_log_binomial(last, fit(embedding, last))
        return (chance * fit(found[-1], last)).sum(1, keepdim=True), chance, found

    def seed(self, x: Tensor) -> Tensor:
        """The first bin centres, B K h w: metres, or 0..1 where the attractors' points are normed."""
        raw = self.seed_bin_regressor(x)
        if self.kind in ("softplus", "hybrid2"):
            centres = F.softplus(raw)
        else:
            widths = F.relu(raw) + 1e-3
            widths = widths / widths.sum(1, keepdim=True) * (self.max_depth - self.min_depth)
            edges = self.min_depth + F.pad(widths, (0, 0, 0, 0, 1, 0)).cumsum(1)
            centres = (edges[:, :-1] + edges[:, 1:]) / 2
        if self.normed_points:
            centres = (centres - self.min_depth) / (self.max_depth - self.min_depth)
        return centres

    def attract(self, raw: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """(centres for the next level, centres as metres): each centre pulled towards the level's points."""
        if self.normed_points:
            points = (F.relu(raw) + 1e-3).unflatten(1, (-1, 2))[:, :, 0]
        else:
            points = F.softplus(raw)
        moves = torch.zeros_like(centres)
        for point in points.split(1, 1):  # one at a time: K times the points would be the largest tensor of the model
            distance = point - centres
            if self.attraction == "inv":
                moves = moves + distance / (1 + STRENGTH * distance**2)
            else:
                moves = moves + (-STRENGTH * distance.abs() ** 2).exp() * distance
        centres = centres + (moves / points.shape[1] if self.pull == "mean" else moves)
        if not self.normed_points:
            return centres, centres
        metres = (centres * (self.max_depth - self.min_depth) + self.min_depth).sort(1).values
        return centres, metres.clamp(self.min_depth, self.max_depth)


class LogBinomial(nn.Module):
    """Probabilities of K ordered bins: a binomial's, with a mode and a temperature at every pixel (paper, eq. 2).

    Args:
        in_channels: of the map that modes and temperatures are read from.
        embedding: channels of the bin embedding beside it.
        bins: K.
        min_temperature, max_temperature: of the softmax over bins.
    """

    def __init__(self, in_channels: int, embedding: int, bins: int, min_temperature: float, max_temperature: float):
        super().__init__()
        width = in_channels // 2
        self.mlp = nn.Sequential(nn.Conv2d(in_channels, width, 1), nn.GELU(), nn.Conv2d(width, 4, 1))
        self.range = min_temperature, max_temperature
        self.log_binomial_transform = nn.Module()
        self.log_binomial_transform.register_buffer("k_idx", torch.arange(bins).view(1, -1, 1, 1))
        self.log_binomial_transform.register_buffer("K_minus_1", torch.tensor([bins - 1.0]).view(1, 1, 1, 1))

    def forward(self, last: Tensor, embedding: Tensor) -> Tensor:
        raw = F.softplus(self.mlp(torch.cat([last, embedding], 1))) + 1e-4
        p = raw[:, :1] / (raw[:, :1] + raw[:, 1:2])
        low, high = self.range
        temperature = raw[:, 2:3] / (raw[:, 2:3] + raw[:, 3:4]) * (high - low) + low
        constants: Any = self.log_binomial_transform
        k, n = constants.k_idx, constants.K_minus_1
        choose = self.log_choose(n, k.to(p.dtype))
        logits = choose + k * p.clamp(1e-4, 1).log() + (n - k) * (1 - p).clamp(1e-4, 1).log()
        return (logits / temperature).softmax(1)

    @staticmethod
    def log_choose(n: Tensor, k: Tensor) -> Tensor:
        """ln of n over k by Stirling's formula without its roots, as published."""
        n, k = n + 1e-7, k + 1e-7
        return n * n.log() - k * k.log() - (n - k) * (n - k + 1e-7).log()
