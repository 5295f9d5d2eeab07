"""Mask2Former: queries that name a class and draw a mask.

Paper:  Cheng et al. 2022, https://arxiv.org/abs/2112.01527
Source: github.com/facebookresearch/Mask2Former @ 9b0651c (MIT; deformable attention Apache-2.0). Parameter names are
        those of its `sem_seg_head`, so released heads load as they are.
Differs from the source: any number of maps of any size (its four strides 4, 8, 16, 32 are the default case); the deformable
attention is plain torch and adds up level by level, so no tensor holds the samples of all levels.

Shapes: B batch, N queries, K classes, C width, h heads, d = C // h, L levels of the encoder.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Head
from .blocks import resize

LEVELS = 3  # the coarsest maps, which the encoder and the decoder attend to; finer ones only sharpen the masks


class Mask2Former(Head):
    """Pixel decoder with deformable attention, then a decoder whose queries attend inside the masks they last predicted.

    `forward` returns {"class_logits": B N K+1 (the last is "no object"), "mask_logits": B N h w at the finest map's size,
    "aux": the same pair before each decoder layer}.

    Args:
        channels: of each map, finest first.
        out_channels: K, the number of classes without "no object".
        width: C of encoder and decoder.
        mask_width: channels of the map that mask kernels are multiplied with.
        queries: N.
        heads: of every attention.
        encoder_layers: of the pixel decoder.
        encoder_ffn: hidden width of its MLPs.
        points: samples per head, level and query of the deformable attention.
        decoder_layers: of the query decoder (published configurations count one more, the prediction of the raw queries).
        decoder_ffn: hidden width of its MLPs.
        input_project: put a 1x1 convolution before the decoder's levels.
    """

    pyramid = True
    returns_names = True

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        width: int = 256,
        mask_width: int = 256,
        queries: int = 100,
        heads: int = 8,
        encoder_layers: int = 6,
        encoder_ffn: int = 1024,
        points: int = 4,
        decoder_layers: int = 9,
        decoder_ffn: int = 2048,
        input_project: bool = False,
    ):
        super().__init__()
        if width % heads or width % 4:
            raise ValueError(f"mask2former: width {width} must be a multiple of 4 and of the {heads} heads")
        self.queries, self.layers = queries, decoder_layers
        self.pixel_decoder = PixelDecoder(channels, width, mask_width, heads, encoder_ffn, encoder_layers, points)
        self.predictor = QueryDecoder(
            width,
            out_channels,
            width,
            mask_width,
            queries,
            heads,
            decoder_ffn,
            decoder_layers,
            self.pixel_decoder.levels,
            input_project,
        )

    def get_classifier(self) -> nn.Module:
        return self.predictor.class_embed

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Any]:
        features, levels = self.pixel_decoder(maps)
        return self.predictor(features, levels)

    def scores(self, output: dict[str, Any]) -> Tensor:
        """B K H W: for each class the sum over queries of class probability times mask probability (the authors' rule)."""
        masks = full_masks(output["mask_logits"], output.get("size", output["mask_logits"].shape[-2:]))
        classes = output["class_logits"].softmax(-1)[..., :-1]
        return torch.einsum("bnk,bnhw->bkhw", classes, masks.sigmoid())


def full_masks(
    masks: Tensor, padded: Sequence[int], images: Sequence[int] | None = None, size: Sequence[int] | None = None
) -> Tensor:
    """Mask logits at the size of the padded images, cut to that of the images, resized to `size`.

    Args:
        masks: B N h w.
        padded: (H, W) of the padded images.
        images: (H, W) to cut to; None: nothing is cut.
        size: (H, W) of the result; None: as cut.
    """
    masks = resize(masks, like=padded)
    masks = masks if images is None else masks[..., : images[0], : images[1]]
    return masks if size is None else resize(masks, like=size)


def sine_position(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """The sine embedding of a map's cells, C H W: half of the channels for y, half for x, each normalised to the map's size.

    Args:
        height: of the map.
        width: of the map.
        channels: of the embedding.
        like: a tensor whose device and type it gets.
    """
    half = channels // 2
    exponent = torch.arange(half, device=like.device) // 2 * 2 / half
    frequency = 10000**exponent

    def axis(length: int) -> Tensor:  # length half, sine of even and cosine of odd frequencies
        place = torch.arange(1, length + 1, device=like.device) / (length + 1e-6) * 2 * math.pi
        angle = place[:, None] / frequency
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1)

    rows, columns = axis(height), axis(width)
    grid = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], 2)
    return grid.permute(2, 0, 1).to(like.dtype)


class NormConv(nn.Conv2d):
    """A convolution without bias, group norm under the name `norm`, and ReLU where asked for.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: odd; the size of the map stays.
        relu: with the ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, relu: bool):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm, self.relu = group_norm(out_channels), relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(super().forward(x))
        return F.relu(x) if self.relu else x


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, as published; a width that 32 does not divide has as many as it can."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


class DeformableAttention(nn.Module):
    """Each query reads a few places of each level, at offsets it chooses (Zhu et al. 2021, eq. 3).

    Args:
        width: C of queries and values.
        heads: of the attention.
        levels: maps that are read.
        points: places in each of them.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.reset()

    def reset(self) -> None:
        """Offsets in one direction a head, 1 to `points` cells away; equal weights."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], 1)
        direction = direction / direction.abs().amax(1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[:, None]
        bias = (direction[:, None, None] * steps).expand(-1, self.levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        for layer in (self.attention_weights.weight, self.attention_weights.bias, self.value_proj.bias, self.output_proj.bias):
            nn.init.zeros_(layer)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)

    def forward(self, query: Tensor, value: Tensor, reference: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Attend; returns B Q C.

        Args:
            query: B Q C.
            value: B sum(H W) C, level after level.
            reference: B Q L 2, (x, y) in 0..1 where each query looks.
            shapes: (H, W) of each level.
        """
        batch, count, width = query.shape
        offsets = self.sampling_offsets(query).view(batch, count, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(query).view(batch, count, self.heads, -1).softmax(-1)
        weights = weights.view(batch, count, self.heads, self.levels, self.points)
        values = self.value_proj(value).view(batch, -1, self.heads, width // self.heads)
        total: Any = 0
        for level, (part, (height, wide)) in enumerate(zip(values.split([h * w for h, w in shapes], 1), shapes, strict=True)):
            size = torch.tensor([wide, height], device=query.device, dtype=query.dtype)
            places = reference[:, :, None, level, None] + offsets[:, :, :, level] / size  # B Q h P 2
            grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # (B h) Q P 2
            image = part.permute(0, 2, 3, 1).reshape(batch * self.heads, -1, height, wide)
            samples = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)  # (B h) d Q P
            share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]  # (B h) 1 Q P
            total = total + (samples * share).sum(-1)
        return self.output_proj(total.view(batch, width, count).transpose(1, 2))


class EncoderLayer(nn.Module):
    """Deformable self-attention over the tokens of all levels, then an MLP; norms after the sums.

    Args:
        width: C of the tokens.
        heads: of the attention.
        levels: maps.
        points: places that a token reads in each of them.
        ffn: width of the MLP.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int, ffn: int):
        super().__init__()
        self.self_attn = DeformableAttention(width, heads, levels, points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Attend, then the MLP; the same shape.

        Args:
            x: B sum(H W) C, level after level.
            position: added to it in the attention's queries.
            reference: B sum(H W) L 2, where each token is, in 0..1.
            shapes: (H, W) of each level.
        """
        x = self.norm1(x + self.self_attn(x + position, x, reference, shapes))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class Encoder(nn.Module):
    """The layers under the authors' names, `transformer.encoder.layers`, beside `transformer.level_embed`.

    Args:
        width: C of the tokens.
        heads: of the attention.
        levels: maps.
        points: places that a token reads in each of them.
        ffn: width of the MLPs.
        layers: how many.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int, ffn: int, layers: int):
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(levels, width))
        nn.init.normal_(self.level_embed)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(EncoderLayer(width, heads, levels, points, ffn) for _ in range(layers))}
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:  # [B C H W], coarsest first, in and out
        shapes = [(m.shape[2], m.shape[3]) for m in levels]
        tokens = torch.cat([m.flatten(2) for m in levels], 2).transpose(1, 2)
        position = torch.cat(
            [
                sine_position(*shape, tokens.shape[2], tokens).flatten(1).T + embed
                for shape, embed in zip(shapes, self.level_embed, strict=True)
            ]
        )
        reference = torch.cat([centres(*shape, tokens) for shape in shapes])  # sum(H W) 2
        reference = reference[None, :, None].expand(len(tokens), -1, len(shapes), -1)
        layers: Any = self.encoder["layers"]
        for layer in layers:
            tokens = layer(tokens, position, reference, shapes)
        parts = tokens.split([height * width for height, width in shapes], 1)
        return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


def centres(height: int, width: int, like: Tensor) -> Tensor:
    """(x, y) of the cells' centres in 0..1, row after row: H*W 2."""
    y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
    x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], 1)


class PixelDecoder(nn.Module):
    """The coarsest maps encoded together, the finer ones added top-down, and the map that masks are read from.

    `levels`: how many maps are encoded: the three coarsest, but one map is left to sharpen the masks where there are fewer than
    four (a single map is encoded and read).

    Args:
        channels: of each map, finest first.
        width: of the tokens.
        mask_width: channels of the map that masks are read from.
        heads: of the attention.
        ffn: width of the MLPs.
        layers: of the encoder.
        points: places that a token reads in each map.
    """

    def __init__(self, channels: Sequence[int], width: int, mask_width: int, heads: int, ffn: int, layers: int, points: int):
        super().__init__()
        self.levels = min(LEVELS, max(len(channels) - 1, 1))
        coarse, fine = channels[len(channels) - self.levels :], channels[: len(channels) - self.levels]
        self.input_proj = nn.ModuleList(nn.Sequential(nn.Conv2d(c, width, 1), group_norm(width)) for c in coarse[::-1])
        self.transformer = Encoder(width, heads, self.levels, points, ffn, layers)
        self.fine = len(fine)
        for i, c in enumerate(fine, 1):  # adapter_1 belongs to the finest map
            self.add_module(f"adapter_{i}", NormConv(c, width, 1, relu=False))
            self.add_module(f"layer_{i}", NormConv(width, width, 3, relu=True))
        self.mask_features = nn.Conv2d(width, mask_width, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Maps, finest first -> (mask features at the finest map's size, the encoded maps, coarsest first)."""
        coarse = [project(m) for project, m in zip(self.input_proj, maps[::-1][: self.levels], strict=True)]
        levels = self.transformer(coarse)
        x = levels[-1]
        for i in range(self.fine, 0, -1):
            lateral = self.get_submodule(f"adapter_{i}")(maps[i - 1])
            x = self.get_submodule(f"layer_{i}")(lateral + resize(x, like=lateral))
        return self.mask_features(x), levels


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, query_position: Tensor, memory: Tensor, position: Tensor, blocked: Tensor) -> Tensor:
        """Attend; returns B N C.

        Args:
            x: B N C, the queries.
            query_position: B N C, added to them.
            memory: B HW C, what they read.
            position: B HW C, added to the memory's keys.
            blocked: (B h) N HW, True where a query may not look.
        """
        out = self.multihead_attn(x + query_position, memory + position, memory, attn_mask=blocked, need_weights=False)[0]
        return self.norm(x + out)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, query_position: Tensor) -> Tensor:
        q = x + query_position
        return self.norm(x + self.self_attn(q, q, x, need_weights=False)[0])


class FeedForward(nn.Module):
    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class QueryDecoder(nn.Module):
    """Learned queries read one level after another, each only inside the mask it predicted last (section 3.2).

    Args:
        in_channels: of the encoded maps.
        classes: without the no-object class.
        width: of the queries.
        mask_width: channels of the map that masks are read from.
        queries: how many.
        heads: of the attention.
        ffn: width of the MLPs.
        layers: how many.
        levels: maps, read in turn.
        input_project: project the maps although they have the queries' width.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        width: int,
        mask_width: int,
        queries: int,
        heads: int,
        ffn: int,
        layers: int,
        levels: int,
        input_project: bool,
    ):
        super().__init__()
        self.heads, self.levels = heads, levels
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttention(width, heads) for _ in range(layers))
        self.transformer_cross_attention_layers = nn.ModuleList(CrossAttention(width, heads) for _ in range(layers))
        self.transformer_ffn_layers = nn.ModuleList(FeedForward(width, ffn) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.query_feat = nn.Embedding(queries, width)
        self.query_embed = nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(levels, width)
        project = in_channels != width or input_project
        self.input_proj = nn.ModuleList(nn.Conv2d(in_channels, width, 1) if project else nn.Identity() for _ in range(levels))
        self.class_embed = nn.Linear(width, classes + 1)
        self.mask_embed = MLP(width, width, width, mask_width)

    def forward(self, features: Tensor, levels: Sequence[Tensor]) -> dict[str, Any]:
        """Predict from features B M h w, which mask kernels are multiplied with, and levels B C H W, coarsest first."""
        sizes = [(m.shape[2], m.shape[3]) for m in levels]
        levels = [project(m) for project, m in zip(self.input_proj, levels, strict=True)]
        positions = [sine_position(*size, m.shape[1], m).flatten(1).T for size, m in zip(sizes, levels, strict=True)]
        memories = [m.flatten(2).mT + embed for m, embed in zip(levels, self.level_embed.weight, strict=True)]
        x = self.query_feat.weight.expand(len(features), -1, -1)
        query_position = self.query_embed.weight
        found = [self.predict(x, features)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for i, (cross, own, feed_forward) in enumerate(layers):
            level = i % self.levels
            blocked = self.blocked(found[-1]["mask_logits"], sizes[level])
            x = cross(x, query_position, memories[level], positions[level], blocked)
            x = feed_forward(own(x, query_position))
            found.append(self.predict(x, features))
        return {**found[-1], "aux": found[:-1]}

    def predict(self, x: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Class and mask of each query: B N K+1 and B N h w."""
        x = self.decoder_norm(x)
        masks = torch.einsum("bnm,bmhw->bnhw", self.mask_embed(x), features)
        return {"class_logits": self.class_embed(x), "mask_logits": masks}

    def blocked(self, mask_logits: Tensor, size: Sequence[int]) -> Tensor:
        """(B h) N HW: True outside a query's mask; a query whose mask is empty looks everywhere. Without gradient."""
        with torch.no_grad():
            outside = resize(mask_logits.detach(), like=size).flatten(2).sigmoid() < 0.5
            outside &= ~outside.all(2, keepdim=True)
            return outside.repeat_interleave(self.heads, 0)
