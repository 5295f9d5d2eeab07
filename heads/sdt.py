"""AnyDepth's Simple Depth Transformer head (https://arxiv.org/abs/2601.02760; AIGeeksGroup/AnyDepth @ 8603751).

Its up-sampling is DySample (Liu et al. 2023, https://arxiv.org/abs/2308.15085): bilinear sampling at learned positions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Head
from .blocks import BatchNorm2d, resize


class SDT(Head):
    """All maps projected to one width and averaged with learned weights, details added, 16 times larger by learned sampling.

    The result has no final activation (AnyDepth: ReLU plus 1 mm, `heads.depth`). Parameter names are the authors'.

    Args:
        channels: of each map; a map may be a pair (map B C H W, prefix tokens B P C). Maps of one size are expected (plain
            ViTs); others are brought to the size of the second coarsest (stride 16 of a 4-8-16-32 backbone).
        out_channels: classes, or what the depth rule reads.
        width: after the projection.
        readout: "project" concatenates the class token to every token before the projection, "ignore" does not.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, width: int = 256, readout: str = "ignore"):
        super().__init__()
        if readout not in ("ignore", "project"):
            raise ValueError(f"sdt: readout is {readout!r}; use 'ignore' or 'project'")
        self.prefix_tokens = readout == "project"
        self.weighted_fusion = WeightedFusion(channels, width, self.prefix_tokens)
        self.detail_enhancer = DetailEnhancer(width)
        self.upsample_1, self.refinement_1 = Upsample(width), refinement(width)
        self.upsample_2, self.refinement_2 = Upsample(width), refinement(width)
        self.output_conv = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width // 2, 32, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, out_channels, 1),
        )

    def get_classifier(self) -> nn.Module:
        return self.output_conv[4]

    def forward(self, maps: Sequence[Tensor | tuple[Tensor, Tensor]]) -> Tensor:  # -> B K 16h 16w
        x = self.detail_enhancer(self.weighted_fusion(maps))
        x = self.refinement_1(self.upsample_1(x))
        x = self.refinement_2(self.upsample_2(x))
        return self.output_conv(x)


class WeightedFusion(nn.Module):
    """sum_i softmax(w)_i * GELU(project_i(tokens_i)), B width h w."""

    def __init__(self, channels: Sequence[int], width: int, readout: bool):
        super().__init__()
        self.layer_weights = nn.Parameter(torch.ones(len(channels)))
        self.projections = nn.ModuleList(nn.Sequential(nn.Linear(c, width, bias=False), nn.GELU()) for c in channels)
        self.readout_projects = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * c, c), nn.GELU()) for c in channels if readout
        )  # empty when unused: a parameter without gradient stops distributed training

    def forward(self, maps: Sequence[Tensor | tuple[Tensor, Tensor]]) -> Tensor:
        pairs = [(m, None) if isinstance(m, Tensor) else m for m in maps]
        size = pairs[-2 if len(pairs) > 1 else -1][0].shape[-2:]
        total: Tensor | float = 0.0
        for i, (weight, (x, prefix)) in enumerate(zip(self.layer_weights.softmax(0), pairs, strict=True)):
            tokens = x.flatten(2).mT  # B N C
            if self.readout_projects:
                if prefix is None:
                    raise ValueError("sdt: readout 'project' needs prefix tokens and the backbone has none: use 'ignore'")
                tokens = self.readout_projects[i](torch.cat([tokens, prefix[:, :1].expand_as(tokens)], dim=2))
            tokens = self.projections[i](tokens)
            total = total + weight * resize(tokens.mT.unflatten(2, x.shape[-2:]), like=size)
        assert isinstance(total, Tensor)
        return total


class DetailEnhancer(nn.Module):
    """ReLU(x + BN(depth-wise 3x3(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.dwconv(x)))


class Upsample(nn.Module):
    """Four times larger: twice DySample, 3x3 convolution, batch norm, ReLU."""

    def __init__(self, width: int):
        super().__init__()
        self.dysample1, self.dysample2 = (
            nn.Sequential(
                DySample(width), nn.Conv2d(width, width, 3, padding=1, bias=False), BatchNorm2d(width), nn.ReLU(inplace=True)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.dysample2(self.dysample1(x))


def refinement(width: int) -> nn.Sequential:
    """3x3 convolution (with bias, as published), batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), BatchNorm2d(width), nn.ReLU(inplace=True))


class DySample(nn.Module):
    """B C H W -> B C sH sW: bilinear samples at positions displaced by learned offsets (Liu et al. 2023, figure 3).

    Offsets are in source pixels, channel order: axis (x, y), group, sub-pixel row-major.

    Args:
        channels: C.
        scale: s.
        style: "lp" predicts the offsets at the coarse resolution, "pl" at the fine one (channels spread over space first).
        groups: channels are displaced in this many groups.
        dynamic_scope: offsets are multiplied by 0.5 sigmoid(scope(x)), else by 0.25.
    """

    def __init__(self, channels: int, scale: int = 2, style: str = "lp", groups: int = 4, dynamic_scope: bool = True):
        super().__init__()
        if style not in ("lp", "pl"):
            raise ValueError(f"DySample: style is {style!r}; use 'lp' or 'pl'")
        if channels % groups or (style == "pl" and channels % scale**2):
            raise ValueError(
                f"DySample: {channels} channels are not divisible by {groups} groups (and {scale}^2 for style 'pl')"
            )
        self.scale, self.style, self.groups = scale, style, groups
        inputs = channels if style == "lp" else channels // scale**2
        outputs = 2 * groups * (scale**2 if style == "lp" else 1)
        self.offset = nn.Conv2d(inputs, outputs, 1)
        assert self.offset.bias is not None
        self.scope = nn.Conv2d(inputs, outputs, 1, bias=False) if dynamic_scope else None
        nn.init.normal_(self.offset.weight, std=0.001)  # starts as plain bilinear up-sampling
        nn.init.zeros_(self.offset.bias)
        if self.scope is not None:
            nn.init.zeros_(self.scope.weight)
        centre = (torch.arange(scale) - (scale - 1) / 2) / scale  # of each sub-pixel, from the pixel's centre
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        self.register_buffer("init_pos", torch.stack([x, y])[:, None].repeat(1, groups, 1, 1).reshape(1, -1, 1, 1))

    def offsets(self, x: Tensor) -> Tensor:  # B C H W -> B (2 groups s^2) H W
        if self.style == "pl":
            x = F.pixel_shuffle(x, self.scale)
        offset = self.offset(x) * (0.25 if self.scope is None else 0.5 * self.scope(x).sigmoid())
        if self.style == "pl":
            offset = F.pixel_unshuffle(offset, self.scale)
        return offset + self.init_pos

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        exact = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has 8 bits: positions would be pixels apart
        offset = F.pixel_shuffle(self.offsets(x), self.scale).to(exact)  # B (2 groups) sH sW
        offset = offset.view(batch, 2, self.groups, *offset.shape[-2:])
        # the pixel each fine position lies in, its centre at +0.5
        rows = torch.arange(height, device=x.device, dtype=exact).repeat_interleave(self.scale) + 0.5
        columns = torch.arange(width, device=x.device, dtype=exact).repeat_interleave(self.scale) + 0.5
        place_x = 2 * (columns + offset[:, 0]) / width - 1  # B groups sH sW
        place_y = 2 * (rows[:, None] + offset[:, 1]) / height - 1
        # the backward of grid_sample on the CPU crashes the process where a position is NaN, so a diverged model would
        grid = torch.stack([place_x, place_y], dim=-1).nan_to_num().flatten(0, 1)  # (B groups) sH sW 2
        sampled = F.grid_sample(
            x.reshape(batch * self.groups, -1, height, width).to(exact),
            grid,
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        return sampled.view(batch, channels, self.scale * height, self.scale * width).to(x.dtype)
