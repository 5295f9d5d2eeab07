"""DPT (Ranftl et al. 2021, https://arxiv.org/abs/2103.13413) and its descendants, one decoder.

Sources: isl-org/DPT @ cd3fe90 and isl-org/MiDaS @ 4545977 (MIT), DepthAnything/Depth-Anything-V2 @ a561b84 (Apache-2.0),
open-mmlab/mmsegmentation 1.2.2 (Apache-2.0). What differs between them is an argument here; `weights/convert/dpt.py` reads all
their files. Not kept: the first residual unit of the coarsest fusion block, which the authors store and never run.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Head
from .blocks import BatchNorm2d, ConvNormAct, resize, resize_double, round_up

READOUTS = ("ignore", "add", "project")
PREDICTORS = ("depth", "segmentation", "linear")


class DPT(Head):
    """Reassemble tokens into a pyramid, fuse it coarse to fine with residual units, predict.

    The result has no final activation: `heads.depth` states what the channels mean.

    Args:
        channels: of each map, finest first, any number of levels. A map may be a pair (map B C H W, prefix tokens B P C).
        out_channels: classes, or what the depth rule reads.
        width: of the fusion path.
        one_scale: all maps have one size (a plain ViT): learned resampling turns n of them into 2^(n-2) .. 1, 1/2 times that
            size.
        reassemble: channels of each map after reassembling (one_scale only); default C/8, C/4, C/2, C as in DPT-Base.
        factors: resampling factor of each level (4, 2, 1, 0.5, ...), None where a map is used as it is; overrides one_scale,
            for backbones that deliver both kinds (DPT-Hybrid: None, None, 1, 0.5).
        prefix_counts: prefix tokens beside each map: those with some are read out (CvT: its last); default: those with a
            factor.
        readout: what becomes of the prefix tokens. "ignore" drops them; "add" adds the class token to every position (the mean
            of class and distillation token where there are exactly two); "project" concatenates the class token to every token
            and projects back.
        norm: batch norm in the residual units (and after `project`).
        unit_bias: bias of the convolutions in the residual units; default: only without norm.
        reassemble_norm: batch norm between readout and projection.
        fusion: "next" resizes each path to the next finer map (MiDaS 3.1, Depth-Anything: any size); "double" doubles it
            exactly (DPT, mmsegmentation: a finer map of another size is resized to the path).
        project: a 3x3 convolution and ReLU between fusion and predictor (mmsegmentation, DINOv3).
        stem: widths of learned x2 steps between fusion and predictor (MiDaS on LeViT: 128, 64).
        predictor: "depth" (3x3, x2, 3x3, ReLU, 1x1), "segmentation" (3x3, norm, ReLU, dropout, 1x1, x2) or "linear" (dropout,
            1x1).
        predictor_widths: of the two 3x3 convolutions of "depth", default width // 2 and 32.
        patch_size: "depth" resizes to this many pixels per token of the incoming maps instead of doubling (Depth-Anything: 14).
        dropout: before the classifier of "segmentation" and "linear".
    """

    family = "dpt"
    takes_one_scale = True
    takes_prefix_counts = True

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        width: int = 256,
        one_scale: bool = False,
        reassemble: Sequence[int] | None = None,
        factors: Sequence[float | None] | None = None,
        prefix_counts: Sequence[int] | None = None,
        readout: str = "ignore",
        norm: bool = False,
        unit_bias: bool | None = None,
        reassemble_norm: bool = False,
        fusion: str = "next",
        project: bool = False,
        stem: Sequence[int] = (),
        predictor: str = "depth",
        predictor_widths: Sequence[int] | None = None,
        patch_size: int | None = None,
        dropout: float = 0.1,
    ):
        super().__init__()
        for name, value, valid in (
            ("readout", readout, READOUTS),
            ("fusion", fusion, ("next", "double")),
            ("predictor", predictor, PREDICTORS),
        ):
            if value not in valid:
                raise ValueError(f"dpt: {name} is {value!r}; use one of {', '.join(valid)}")
        levels = len(channels)
        if factors is None:
            factors = [2.0 ** (levels - 2 - i) if levels > 1 else 1 for i in range(levels)] if one_scale else [None] * levels
        if len(factors) != levels:
            raise ValueError(f"dpt: factors {list(factors)} has {len(factors)} entries for {levels} maps")
        if reassemble is None:
            reassemble = [round_up(c, 2 ** (levels - 1 - i)) for i, c in enumerate(channels)]
        if len(reassemble) != levels:
            raise ValueError(f"dpt: reassemble {list(reassemble)} has {len(reassemble)} entries for {levels} maps")

        tokens = [factor is not None for factor in factors] if prefix_counts is None else [count > 0 for count in prefix_counts]
        if len(tokens) != levels:
            raise ValueError(f"dpt: prefix_counts {list(prefix_counts or ())} has {len(tokens)} entries for {levels} maps")
        if readout != "ignore" and not any(tokens):
            raise ValueError(f"dpt: readout {readout!r} reads the class token and the maps have no prefix tokens: use 'ignore'")
        self.readout = readout
        self.prefix_tokens = readout != "ignore"
        self.reassembles = nn.ModuleList(
            Reassemble(c, c if f is None else r, f, readout if token else "ignore", reassemble_norm and f is not None)
            for c, r, f, token in zip(channels, reassemble, factors, tokens, strict=True)
        )
        bias = not norm if unit_bias is None else unit_bias
        self.layers = nn.ModuleList(
            nn.Conv2d(c if f is None else r, width, 3, padding=1, bias=False)
            for c, r, f in zip(channels, reassemble, factors, strict=True)
        )
        self.fusions = nn.ModuleList(
            Fusion(width, norm, bias, skip=i < levels - 1, double=fusion == "double") for i in range(levels)
        )
        self.project = Project(width, norm) if project else nn.Identity()
        self.stem = nn.Sequential(*(Up(a, b) for a, b in zip([width, *stem], stem)))
        width = stem[-1] if stem else width
        self.predictor: nn.Module
        if predictor == "depth":
            first, second = predictor_widths or (width // 2, 32)
            self.predictor = DepthPredictor(width, out_channels, first, second, double=patch_size is None)
        elif predictor == "segmentation":
            self.predictor = SegmentationPredictor(width, out_channels, dropout)
        else:
            self.predictor = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, out_channels, 1))
        self.patch_size = patch_size if predictor == "depth" else None

    def get_classifier(self) -> nn.Module:
        return list(self.predictor.modules())[-1]  # the last 1x1 convolution

    def forward(self, maps: Sequence[Tensor | tuple[Tensor, Tensor]]) -> Tensor:  # -> B K h w
        x = self.stem(self.project(self.fuse(maps)))
        if self.patch_size is None:
            return self.predictor(x)
        grid = (maps[0] if isinstance(maps[0], Tensor) else maps[0][0]).shape[-2:]
        return self.predictor(x, size=[self.patch_size * n for n in grid])

    def fuse(self, maps: Sequence[Tensor | tuple[Tensor, Tensor]]) -> Tensor:
        """The finest fusion output, at twice the size of the finest reassembled map."""
        return self.paths(self.reassembled(maps))[-1]

    def reassembled(self, maps: Sequence[Tensor | tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Each map at its place in the pyramid, all of one width; finest first."""
        return [layer(reassemble(m)) for layer, reassemble, m in zip(self.layers, self.reassembles, maps, strict=True)]

    def paths(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The output of every fusion of reassembled maps, coarsest first."""
        found = [self.fusions[-1](maps[-1], None, like=maps[-2] if len(maps) > 1 else None)]
        for i in range(len(maps) - 2, -1, -1):
            found.append(self.fusions[i](found[-1], maps[i], like=maps[i - 1] if i else None))
        return found


class Reassemble(nn.Module):
    """Prefix tokens read out, channels projected, size multiplied by `factor` (section 3.1, figure 1 centre).

    Args:
        channels: of the map.
        out_channels: after the projection.
        factor: of the size; None leaves the map as it is.
        readout: "ignore", "add" or "project", see DPT.
        norm: batch norm between readout and projection.
    """

    def __init__(self, channels: int, out_channels: int, factor: float | None, readout: str, norm: bool):
        super().__init__()
        self.how = readout
        self.readout = nn.Sequential(nn.Linear(2 * channels, channels), nn.GELU()) if readout == "project" else nn.Identity()
        self.norm = BatchNorm2d(channels) if norm else nn.Identity()
        self.project = nn.Identity() if factor is None else nn.Conv2d(channels, out_channels, 1)
        if factor is None or factor == 1:
            self.resample: nn.Module = nn.Identity()
        elif factor > 1:
            self.resample = nn.ConvTranspose2d(out_channels, out_channels, int(factor), int(factor))
        else:
            self.resample = nn.Conv2d(out_channels, out_channels, 3, round(1 / factor), padding=1)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        prefix = None
        if not isinstance(x, Tensor):
            x, prefix = x
        if self.how != "ignore":
            if prefix is None or prefix.shape[1] == 0:
                raise ValueError(f"dpt: readout {self.how!r} needs prefix tokens and the backbone has none: use 'ignore'")
            x = self.read(x, prefix)
        return self.resample(self.project(self.norm(x)))

    def read(self, x: Tensor, prefix: Tensor) -> Tensor:  # B C H W, B P C -> B C H W
        if self.how == "add":
            token = prefix.mean(1) if prefix.shape[1] == 2 else prefix[:, 0]
            return x + token[:, :, None, None]
        tokens = x.flatten(2).transpose(1, 2)  # B N C
        tokens = self.readout(torch.cat([tokens, prefix[:, :1].expand_as(tokens)], dim=2))
        return tokens.transpose(1, 2).reshape(x.shape)


class Fusion(nn.Module):
    """RefineNet-style fusion (figure 1 right): path + unit(skip), unit, 1x1 convolution, resize with aligned corners.

    Args:
        width: channels of the path.
        norm: batch norm in the residual units.
        bias: of their convolutions.
        skip: a finer map is added (the coarsest level has none).
        double: double the size instead of taking that of the next finer map.
    """

    def __init__(self, width: int, norm: bool, bias: bool, skip: bool, double: bool):
        super().__init__()
        self.doubles = double
        self.unit1 = ResidualUnit(width, norm, bias) if skip else None
        self.unit2 = ResidualUnit(width, norm, bias)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, path: Tensor, skip: Tensor | None, like: Tensor | None) -> Tensor:
        """The fused path at the size of `like`, the next finer map, unless it is doubled exactly; None doubles."""
        if skip is not None and self.unit1 is not None:
            path = path + self.unit1(resize(skip, like=path))
        path = self.out(self.unit2(path))  # published code resizes first: the same map from four times the work
        return resize_double(path) if self.doubles or like is None else resize(path, like=like, align_corners=True)


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))), batch norm after each convolution when asked for."""

    def __init__(self, width: int, norm: bool, bias: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.bn1 = BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.bn2 = BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(F.relu(x)))
        return x + self.bn2(self.conv2(F.relu(y, inplace=True)))


class Project(nn.Module):
    """3x3 convolution and ReLU; batch norm instead of a bias when the head uses it."""

    def __init__(self, width: int, norm: bool):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.bn = BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Up(nn.Module):
    """Learned doubling: transposed 3x3 convolution, batch norm, hard-swish (MiDaS on LeViT)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 3, 2, padding=1, output_padding=1, bias=False)
        self.bn = BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.bn(self.conv(x)))


class DepthPredictor(nn.Module):
    """3x3, resize with aligned corners, 3x3, ReLU, 1x1. No activation between the first two (as published).

    Args:
        width: channels of the fused map.
        out_channels: of the last convolution.
        first: width after the first 3x3.
        second: width after the second 3x3.
        double: double the size in between.
    """

    def __init__(self, width: int, out_channels: int, first: int, second: int, double: bool):
        super().__init__()
        self.doubles = double
        self.conv1 = nn.Conv2d(width, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.conv3 = nn.Conv2d(second, out_channels, 1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        return self.conv3(self.hidden(x, size))

    def hidden(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """What the last convolution reads."""
        x = self.conv1(x)
        if size is not None:
            x = resize(x, like=size, align_corners=True)
        elif self.doubles:
            x = resize_double(x)
        return F.relu(self.conv2(x))


class SegmentationPredictor(nn.Module):
    """3x3 convolution with batch norm and ReLU, dropout, 1x1 classifier, doubled with aligned corners."""

    def __init__(self, width: int, out_channels: int, dropout: float):
        super().__init__()
        self.block = ConvNormAct(width, width, 3)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Conv2d(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return resize_double(self.classify(self.dropout(self.block(x))))
