"""kMaX-DeepLab: queries as cluster centres, updated by k-means over the pixels.

Paper:  Yu et al. 2022, https://arxiv.org/abs/2207.04044
Source: github.com/bytedance/kmax-deeplab @ f8e1d04 (Apache-2.0), the authors' torch port of
        google-research/deeplab2. Parameter names are those of its `sem_seg_head` (its spelling `_predcitor` too), so released
        heads load as they are.
Differs from the source: any number of maps of any size. The table of relative positions is read by the map's own length, which
gives the source's numbers at its training size.

Shapes: B batch, N queries (clusters), K classes, Q channels of a query, L length of an axis, h attention heads.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .base import Head
from .blocks import BatchNorm2d, resize

LEVELS = 3  # the coarsest maps of the pixel decoder, which the k-means layers read
LONGEST = 255  # of an axis: the relative positions that the released tables hold


class ClusterHead(Head):
    """What heads of k-means clusters share: the axial pixel decoder, and k-means layers on its three coarsest maps.

    `forward` returns the last prediction, and that of each k-means layer in "aux".

    Args:
        channels: of each map, finest first.
        out_channels: K, the number of classes without "void", or of values.
        queries: N.
        widths: of the pixel decoder's stages, coarsest first; a stage gives 4 times its width.
        blocks: of each stage.
        layers: k-means layers on each of the three coarsest maps.
        base: widths of the k-means layers are 1 and 2 times this.
        ffn: hidden width of their MLPs.
        heads: of their self-attention.
        head_width: width of the convolutions before the masks.
        embedding: channels that pixels and mask kernels are compared in.
        drop_path: of the three residuals of a k-means layer.
        axial: how many of the coarsest stages are axial; the others are bottlenecks.
    """

    pyramid = True
    returns_names = True
    void = True  # whether a cluster may be of no class

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        queries: int = 128,
        widths: Sequence[int] = (512, 256, 128, 64, 32),
        blocks: Sequence[int] = (1, 5, 1, 1, 1),
        layers: Sequence[int] = (2, 2, 2),
        base: int = 128,
        ffn: int = 2048,
        heads: int = 8,
        head_width: int = 256,
        embedding: int = 128,
        drop_path: float = 0.2,
        axial: int = 2,
    ):
        super().__init__()
        levels = len(channels)
        widths = [*widths, *[widths[-1]] * (levels - len(widths))][:levels]
        blocks = [*blocks, *[blocks[-1]] * (levels - len(blocks))][:levels]
        self.pixel_decoder = PixelDecoder(channels[::-1], widths, blocks, axial)
        outputs = [4 * width for width in widths]
        self.predictor = KMeansDecoder(
            [*outputs[:LEVELS], outputs[-1]],
            out_channels,
            queries=queries,
            layers=layers[: min(levels, LEVELS)],
            base=base,
            ffn=ffn,
            heads=heads,
            head_width=head_width,
            embedding=embedding,
            drop_path=drop_path,
            void=self.void,
        )
        self.layers = len(self.predictor.level)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Every layer that depends on K: one a prediction, and the auxiliary head's."""
        return tuple(self.predictor.classifiers())

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Any]:
        stages = self.pixel_decoder(maps[::-1])
        return self.predictor([*stages[:LEVELS], stages[-1]], maps)


class KMax(ClusterHead):
    """Axial pixel decoder, then k-means layers on its three coarsest maps, then class and mask of each cluster.

    `forward` returns {"class_logits": B N K+1 (the last is "void"), "mask_logits": B N h w at the finest map's size,
    "pixel_feature": B E h w of unit length, "aux": the same three of each k-means layer, at the same size}, and while training
    "semantic": the scores of an auxiliary semantic head on the backbone's maps.

    Args:
        channels: of each map, finest first.
        out_channels: K, the number of classes without "void".
        queries: N.
        widths, blocks, layers, base, ffn, heads, head_width: of `ClusterHead`.
        embedding: E, of `ClusterHead`.
        aux: auxiliary semantic head: "aspp" (COCO, ADE20K: classes and void), "plain" (Cityscapes: classes), or null for none.
        aux_width: its width.
        aux_projections: of the two finer maps that "aspp" reads.
        drop_path, axial: of `ClusterHead`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        queries: int = 128,
        widths: Sequence[int] = (512, 256, 128, 64, 32),
        blocks: Sequence[int] = (1, 5, 1, 1, 1),
        layers: Sequence[int] = (2, 2, 2),
        base: int = 128,
        ffn: int = 2048,
        heads: int = 8,
        head_width: int = 256,
        embedding: int = 128,
        aux: str | None = "aspp",
        aux_width: int = 256,
        aux_projections: Sequence[int] = (64, 32),
        drop_path: float = 0.2,
        axial: int = 2,
    ):
        if aux not in ("aspp", "plain", None):
            raise ValueError(f"kmax: aux is {aux!r}; use 'aspp', 'plain' or null")
        super().__init__(
            channels,
            out_channels,
            queries,
            widths,
            blocks,
            layers,
            base,
            ffn,
            heads,
            head_width,
            embedding,
            drop_path,
            axial,
        )
        self.queries, self.semantic = queries, aux is not None
        self.predictor._auxiliary_semantic_predictor = auxiliary(aux, channels, out_channels, aux_width, aux_projections)

    def scores(self, output: dict[str, Any]) -> Tensor:
        """B K H W: for each class the sum over clusters of class probability times the pixel's share of the cluster."""
        masks = full_masks(output["mask_logits"], output.get("size", output["mask_logits"].shape[-2:]))
        classes = output["class_logits"].softmax(-1)[..., :-1]
        return torch.einsum("bnk,bnhw->bkhw", classes, masks.softmax(1))


def full_masks(
    masks: Tensor, padded: Sequence[int], images: Sequence[int] | None = None, size: Sequence[int] | None = None
) -> Tensor:
    """Mask logits at the size of the padded images, cut to that of the images, resized to `size`.

    Both resizes align corners if the logits' own width is odd.

    Args:
        masks: B N h w.
        padded: (H, W) of the padded images.
        images: (H, W) to cut to; None: nothing is cut.
        size: (H, W) of the result; None: as cut.
    """
    odd = masks.shape[-1] % 2 == 1
    masks = resize(masks, like=padded, align_corners=odd)
    masks = masks if images is None else masks[..., : images[0], : images[1]]
    return masks if size is None else resize(masks, like=size, align_corners=odd)


def resize_by_own_width(x: Tensor, like: Tensor | Sequence[int]) -> Tensor:
    """The source's rule: corners are aligned if the width of what is resized is odd (sides of 32 n + 1 were meant)."""
    return resize(x, like=like, align_corners=x.shape[-1] % 2 == 1)


def batch_norm(channels: int, dimensions: int = 2, start: float = 1.0) -> nn.Module:
    """The source's batch norm: eps 1e-3, momentum 0.01, weight initialised to `start`."""
    norm = (nn.BatchNorm1d if dimensions == 1 else BatchNorm2d)(channels, eps=1e-3, momentum=0.01)
    nn.init.constant_(norm.weight, start)
    return norm


class ConvNorm(nn.Module):
    """Convolution over pixels or queries, batch norm, exact GELU: `conv`, `norm`; the last two where asked for.

    The weight starts from a normal cut at two std.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: odd; the size of the map stays.
        dimensions: 2 over pixels, 1 over queries.
        norm: with the batch norm.
        act: with the GELU.
        bias: of the convolution.
        groups: of the convolution.
        dilation: of the convolution.
        start: initial weight of the norm.
        std: of the initial weights; None: sqrt(2 / fan).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        dimensions: int = 2,
        norm: bool = True,
        act: bool = False,
        bias: bool = False,
        groups: int = 1,
        dilation: int = 1,
        start: float = 1.0,
        std: float | None = None,
    ):
        super().__init__()
        cls: Any = nn.Conv1d if dimensions == 1 else nn.Conv2d
        padding = dilation * (kernel_size // 2)
        self.conv = cls(in_channels, out_channels, kernel_size, padding=padding, bias=bias, groups=groups, dilation=dilation)
        if groups == 1:
            std = math.sqrt(2 / in_channels) if std is None else std
            nn.init.trunc_normal_(self.conv.weight, std=std, a=-2 * std, b=2 * std)
        else:
            nn.init.xavier_uniform_(self.conv.weight)
        if bias:
            nn.init.zeros_(self.conv.bias)
        self.norm = batch_norm(out_channels, dimensions, start) if norm else nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.gelu(x) if self.act else x


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of B C H W, eps 1e-6."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------------- pixel decoder


class RelativePositions(nn.Module):
    """A learned vector for each distance m - l of an axis."""

    def __init__(self, channels: int):
        super().__init__()
        self._embeddings = nn.Embedding(2 * LONGEST - 1, channels)
        nn.init.trunc_normal_(self._embeddings.weight, std=1.0, a=-2.0, b=2.0)

    def forward(self, length: int) -> Tensor:  # -> L (query) L (key) d
        place = torch.arange(length, device=self._embeddings.weight.device)
        return self._embeddings(place[None] - place[:, None] + LONGEST - 1)


class AxialAttention1D(nn.Module):
    """Self-attention along one axis with relative positions for queries, keys and values (Wang et al. 2020, eq. 4)."""

    def __init__(self, in_channels: int, width: int, heads: int = 8):
        super().__init__()
        self.heads, self.width = heads, width
        conv = nn.Conv1d(in_channels, 4 * width, 1, bias=False)
        nn.init.trunc_normal_(conv.weight, std=in_channels**-0.5)
        self.qkv_transform = nn.ModuleDict({"conv": conv})
        self._query_rpe, self._key_rpe = RelativePositions(width // heads), RelativePositions(width // heads)
        self._value_rpe = RelativePositions(2 * width // heads)
        self._batch_norm_qkv = batch_norm(4 * width, 1)
        self._batch_norm_similarity = batch_norm(3 * heads)
        self._batch_norm_retrieved_output = batch_norm(4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:  # n C L -> n 2*width L
        batch, _, length = x.shape
        if length > LONGEST:
            raise ValueError(
                f"kmax: a map under axial attention has a side of {length}, the most is {LONGEST}: use smaller images"
            )
        qkv = self._batch_norm_qkv(self.qkv_transform["conv"](x))
        q, k, v = (
            part.unflatten(1, (self.heads, -1)) for part in qkv.split([self.width, self.width, 2 * self.width], 1)
        )  # n h d L
        content = torch.einsum("nhdl,nhdm->nhlm", q, k)
        by_query = torch.einsum("nhdl,lmd->nhlm", q, self._query_rpe(length))
        by_key = torch.einsum("nhdm,lmd->nhlm", k, self._key_rpe(length))
        logits = self._batch_norm_similarity(torch.cat([content, by_query, by_key], 1))
        weights = logits.unflatten(1, (3, self.heads)).sum(1).softmax(-1)
        retrieved = torch.einsum("nhlm,nhdm->nhdl", weights, v)
        position = torch.einsum("nhlm,lmd->nhdl", weights, self._value_rpe(length))
        both = torch.cat([retrieved.flatten(1, 2), position.flatten(1, 2)], 1)
        return self._batch_norm_retrieved_output(both).unflatten(1, (2, -1)).sum(1)


class AxialAttention2D(nn.Module):
    """Along the columns, then along the rows."""

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        self._height_axis = AxialAttention1D(in_channels, width)
        self._width_axis = AxialAttention1D(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B 2*width H W
        batch, _, height, width = x.shape
        x = self._height_axis(x.permute(0, 3, 1, 2).flatten(0, 1)).unflatten(0, (batch, width))  # B W C H
        x = self._width_axis(x.permute(0, 3, 2, 1).flatten(0, 1)).unflatten(0, (batch, height))  # B H C W
        return x.permute(0, 2, 1, 3)


class Block(nn.Module):
    """A residual block whose middle is axial attention or a 3x3 convolution; activation first."""

    def __init__(self, in_channels: int, width: int, axial: bool):
        super().__init__()
        middle = 2 * width if axial else width
        self._shortcut = ConvNorm(in_channels, 4 * width) if in_channels != 4 * width else None
        self._conv1_bn_act = ConvNorm(in_channels, middle, act=True)
        if axial:
            self._attention = AxialAttention2D(middle, width)
        else:
            self._conv2_bn_act = ConvNorm(middle, middle, 3, act=True)
        self._conv3_bn = ConvNorm(middle, 4 * width, start=0.0)
        self.axial = axial

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(x)
        shortcut = x if self._shortcut is None else self._shortcut(x)
        x = self._conv1_bn_act(x)
        x = F.gelu(self._attention(x)) if self.axial else self._conv2_bn_act(x)
        return self._conv3_bn(x) + shortcut


class Stage(nn.Module):
    """Blocks one after the other, under the name `_blocks`.

    Args:
        in_channels: of the first block's input.
        width: of the blocks.
        depth: how many blocks.
        axial: blocks of axial attention instead of bottlenecks.
    """

    def __init__(self, in_channels: int, width: int, depth: int, axial: bool):
        super().__init__()
        self._blocks = nn.Sequential(*(Block(4 * width if i else in_channels, width, axial) for i in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self._blocks(x)


class Fuse(nn.Module):
    """A coarse and a fine map summed at the fine one's size; each is projected if its width differs."""

    def __init__(self, low: int, high: int, out: int):
        super().__init__()
        self._conv_bn_low = ConvNorm(low, out) if low != out else None
        self._conv_bn_high = ConvNorm(high, out) if high != out else None

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        low = low if self._conv_bn_low is None else self._conv_bn_low(F.gelu(low))
        wide = resize_by_own_width(low, like=high)
        return wide + (high if self._conv_bn_high is None else self._conv_bn_high(F.gelu(high)))


class PixelDecoder(nn.Module):
    """Stages from the coarsest map to the finest, each fused with the next map of the backbone.

    The output of every stage is returned, coarsest first.

    Args:
        channels: of the backbone's maps, coarsest first.
        widths: of the stages, coarsest first.
        blocks: of each stage.
        axial: how many of the coarsest stages have axial attention.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], blocks: Sequence[int], axial: int):
        super().__init__()
        self._in_norms = nn.ModuleList(ChannelNorm(c) for c in channels)
        self._stages = nn.ModuleList(
            Stage(width if i else channels[0], width, depth, i < axial)
            for i, (width, depth) in enumerate(zip(widths, blocks, strict=True))
        )
        self._resized_fuses = nn.ModuleList(
            Fuse(4 * widths[i], channels[i + 1], widths[i + 1]) for i in range(len(channels) - 1)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        x, found = self._in_norms[0](maps[0]), []
        for i, stage in enumerate(self._stages):
            if i:
                x = self._resized_fuses[i - 1](x, self._in_norms[i](maps[i]))
            x = stage(x)
            found.append(x)
        return found


# ---------------------------------------------------------------------------------------------------------- k-means decoder


class Predictor(nn.Module):
    """Class and mask of each cluster from its embeddings and a map of pixels.

    Args:
        pixels: channels of the map of pixels.
        query: channels of a cluster's centre.
        classes: without the no-object class.
        head_width: of the convolution before the masks.
        embedding: channels that pixels and clusters are compared in.
        void: with a class for none; without it the classes are values of any kind.
    """

    def __init__(self, pixels: int, query: int, classes: int, head_width: int, embedding: int, void: bool = True):
        super().__init__()
        self._pixel_space_head_conv0bnact = ConvNorm(pixels, pixels, 5, groups=pixels, act=True)
        self._pixel_space_head_conv1bnact = ConvNorm(pixels, head_width, act=True)
        self._pixel_space_head_last_convbn = ConvNorm(head_width, embedding, bias=True, std=0.01)
        self._transformer_mask_head = ConvNorm(query, embedding, dimensions=1)
        self._transformer_class_head = ConvNorm(query, classes + void, dimensions=1, norm=False, bias=True, std=0.01)
        self._pixel_space_mask_batch_norm = batch_norm(1, start=0.1)
        self.void_bias = math.log(classes * 0.9 / 0.1) if void else None  # a constant of the source, not in its files

    def forward(self, class_embeddings: Tensor, mask_embeddings: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """Class and mask logits of clusters, from embeddings B Q N and pixels B C H W."""
        x = self._pixel_space_head_conv1bnact(self._pixel_space_head_conv0bnact(pixels))
        feature = F.normalize(self._pixel_space_head_last_convbn(x), dim=1)
        classes = self._transformer_class_head(class_embeddings).mT
        if self.void_bias is not None:
            classes = torch.cat([classes[..., :-1], classes[..., -1:] + self.void_bias], -1)
        masks = torch.einsum("behw,ben->bnhw", feature, self._transformer_mask_head(mask_embeddings))
        masks = self._pixel_space_mask_batch_norm(masks.flatten(1, 2)[:, None])[:, 0].view_as(masks)
        return {"class_logits": classes, "mask_logits": masks, "pixel_feature": feature}


class QueryAttention(nn.Module):
    """Self-attention among the clusters, not scaled, with batch norm where others scale."""

    def __init__(self, base: int, heads: int):
        super().__init__()
        self.heads, self.base = heads, base
        self._batch_norm_similarity = batch_norm(heads)
        self._batch_norm_retrieved_value = batch_norm(2 * base, 1)

    def forward(self, qkv: Tensor) -> Tensor:  # B 4*base N -> B 2*base N
        q, k, v = (part.unflatten(1, (self.heads, -1)) for part in qkv.split([self.base, self.base, 2 * self.base], 1))
        weights = self._batch_norm_similarity(torch.einsum("bhdn,bhdm->bhnm", q, k)).softmax(-1)
        retrieved = torch.einsum("bhnm,bhdm->bhdn", weights, v).flatten(1, 2)
        return F.gelu(self._batch_norm_retrieved_value(retrieved))


class KMeansLayer(nn.Module):
    """One k-means step: pixels go to the cluster that claims them most, their values are summed into its centre (eq. 5).

    Args:
        pixels: channels of the map of pixels.
        classes: without the no-object class.
        base: widths of the layer are 1 and 2 times this.
        query: channels of a cluster's centre.
        ffn: width of the MLP.
        heads: of the centres' self-attention.
        head_width: of the convolutions before the masks.
        embedding: channels that pixels and clusters are compared in.
        drop_path: stochastic depth of the layer.
        void: see Predictor.
    """

    def __init__(
        self,
        pixels: int,
        classes: int,
        base: int,
        query: int,
        ffn: int,
        heads: int,
        head_width: int,
        embedding: int,
        drop_path: float,
        void: bool = True,
    ):
        super().__init__()
        width = 2 * base
        self._query_conv1_bn_act = ConvNorm(query, width, dimensions=1, act=True)
        self._pixel_conv1_bn_act = ConvNorm(pixels, width, act=True)
        self._query_qkv_conv_bn = ConvNorm(width, 2 * width, dimensions=1, std=width**-0.5)
        self._pixel_v_conv_bn = ConvNorm(width, width, std=width**-0.5)
        self._query_self_attention = QueryAttention(base, heads)
        self._query_conv3_bn = ConvNorm(width, query, dimensions=1, start=0.0)
        self._query_ffn_conv1_bn_act = ConvNorm(query, ffn, dimensions=1, act=True)
        self._query_ffn_conv2_bn = ConvNorm(ffn, query, dimensions=1, start=0.0)
        self._predcitor = Predictor(width, width, classes, head_width, embedding, void)
        self._kmeans_query_batch_norm_retrieved_value = batch_norm(width, 1)
        self._kmeans_query_conv3_bn = ConvNorm(width, query, dimensions=1, start=0.0)
        self.drop_path = DropPath(drop_path)

    def forward(self, pixels: Tensor, centres: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The centres B Q N after one step over pixels B C H W, and the prediction that moved them."""
        pixels = self._pixel_conv1_bn_act(F.gelu(pixels))
        query = self._query_conv1_bn_act(centres)
        value = self._pixel_v_conv_bn(pixels)
        prediction = self._predcitor(query, query, pixels)
        with torch.no_grad():
            cluster = prediction["mask_logits"].flatten(2).argmax(1)
        update = value.new_zeros(*value.shape[:2], centres.shape[2])
        update = update.scatter_add(2, cluster[:, None].expand(-1, value.shape[1], -1), value.flatten(2))
        update = self._kmeans_query_conv3_bn(self._kmeans_query_batch_norm_retrieved_value(update))
        centres = centres + self.drop_path(update)
        own = self._query_conv3_bn(self._query_self_attention(self._query_qkv_conv_bn(query)))
        centres = F.gelu(centres + self.drop_path(own))
        own = self._query_ffn_conv2_bn(self._query_ffn_conv1_bn_act(centres))
        return F.gelu(centres + self.drop_path(own)), prediction


class KMeansDecoder(nn.Module):
    """Centres through the k-means layers, the final prediction, and the auxiliary semantic head (training only).

    Args:
        channels: of the pixel decoder's maps that the layers read, coarsest first, and of its finest map, which the masks are
            on.
        classes: without the no-object class.
        queries: clusters.
        layers: how many read each of these maps.
        base, ffn, heads: see KMeansLayer.
        head_width, embedding: of the predictions.
        drop_path: the largest stochastic depth.
        aux: the auxiliary semantic head, or None.
        void: see Predictor.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        queries: int,
        layers: Sequence[int],
        base: int,
        ffn: int,
        heads: int,
        head_width: int,
        embedding: int,
        drop_path: float,
        aux: nn.Module | None = None,
        void: bool = True,
    ):
        super().__init__()
        query = 2 * base
        self.level = [level for level, count in enumerate(layers) for _ in range(count)]
        self._kmax_transformer_layers = nn.ModuleList(
            KMeansLayer(channels[level], classes, base, query, ffn, heads, head_width, embedding, drop_path, void)
            for level in self.level
        )
        self._cluster_centers = nn.Embedding(query, queries)
        nn.init.trunc_normal_(self._cluster_centers.weight, std=1.0, a=-2.0, b=2.0)
        self._class_embedding_projection = ConvNorm(query, query, dimensions=1, act=True)
        self._mask_embedding_projection = ConvNorm(query, query, dimensions=1, act=True)
        self._predcitor = Predictor(channels[-1], query, classes, head_width, embedding, void)
        self._auxiliary_semantic_predictor = aux

    def classifiers(self) -> list[nn.Module]:
        predictors: list[Any] = [*(layer._predcitor for layer in self._kmax_transformer_layers), self._predcitor]
        aux: Any = self._auxiliary_semantic_predictor
        return [predictor._transformer_class_head.conv for predictor in predictors] + (
            [] if aux is None else [aux.get_classifier()]
        )

    def forward(self, pixels: Sequence[Tensor], maps: Sequence[Tensor]) -> dict[str, Any]:
        """The last prediction, from the pixel decoder's maps (as `channels`) and the backbone's, finest first."""
        centres = self._cluster_centers.weight.expand(len(pixels[0]), -1, -1)
        aux = []
        for level, layer in zip(self.level, self._kmax_transformer_layers, strict=True):
            centres, prediction = layer(pixels[level], centres)
            aux.append(prediction)
        classes, masks = self._class_embedding_projection(centres), self._mask_embedding_projection(centres)
        output: dict[str, Any] = self._predcitor(classes, masks, pixels[-1])
        for prediction in aux:
            for name in ("mask_logits", "pixel_feature"):
                odd = output[name].shape[-2] % 2 == 1  # here the source looks at the height of the target
                prediction[name] = resize(prediction[name], like=output[name], align_corners=odd)
        output["aux"] = aux
        if self.training and self._auxiliary_semantic_predictor is not None:
            output["semantic"] = self._auxiliary_semantic_predictor(maps)
        return output


# ------------------------------------------------------------------------------------------------------ auxiliary semantic head


def auxiliary(
    kind: str | None, channels: Sequence[int], classes: int, width: int, projections: Sequence[int]
) -> nn.Module | None:
    """The auxiliary semantic head on the backbone's maps, or None.

    Args:
        kind: its name; None for none.
        channels: of the backbone's maps, finest first.
        classes: of the semantic map.
        width: of the head.
        projections: widths of the finer maps that are joined.
    """
    if kind is None:
        return None
    if kind == "plain":
        return PlainSemantic(channels[-1], classes, width)
    return AsppSemantic(channels[-1], channels[-3:][0], channels[-4:][0], classes + 1, width, projections)


class PlainSemantic(nn.Sequential):
    """Depth-wise 5x5, 1x1, classifier, on the coarsest map."""

    def __init__(self, channels: int, classes: int, width: int):
        super().__init__(
            ConvNorm(channels, channels, 5, groups=channels, act=True),
            ConvNorm(channels, width, act=True),
            ConvNorm(width, classes, norm=False, bias=True, std=0.01),
        )

    def get_classifier(self) -> nn.Module:
        last = self[-1]
        assert isinstance(last, ConvNorm)
        return last.conv

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # a list, as the other kind takes
        return super().forward(maps[-1])


class ASPP(nn.Module):
    """A 1x1, three dilated 3x3 convolutions and the mean of the map, mixed (Chen et al. 2017, section 3.2)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self._aspp_conv0 = ConvNorm(channels, width, act=True)
        self._aspp_conv1 = ConvNorm(channels, width, 3, dilation=6, act=True)
        self._aspp_conv2 = ConvNorm(channels, width, 3, dilation=12, act=True)
        self._aspp_conv3 = ConvNorm(channels, width, 3, dilation=18, act=True)
        self._aspp_pool = ConvNorm(channels, width, act=True)
        self._proj_conv_bn_act = ConvNorm(5 * width, width, act=True)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        pool = self._aspp_pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        found = [self._aspp_conv0(x), self._aspp_conv1(x), self._aspp_conv2(x), self._aspp_conv3(x), pool]
        return self.dropout(self._proj_conv_bn_act(torch.cat(found, 1)))


class AsppSemantic(nn.Module):
    """ASPP on the coarsest map, fused with the third and the fourth from the coarsest (the finest, where there are fewer).

    Args:
        coarse: channels of the coarsest map.
        middle: channels of the third map from the coarsest.
        fine: channels of the fourth.
        classes: of the semantic map.
        width: of the head.
        projections: widths of the two finer maps after their projection.
    """

    def __init__(self, coarse: int, middle: int, fine: int, classes: int, width: int, projections: Sequence[int]):
        super().__init__()
        self._aspp = ASPP(coarse, width)
        self._low_level_projection_os8 = ConvNorm(middle, projections[0], act=True)
        first = width + projections[0]
        self._low_level_fusion_os8_conv0_bn_act = ConvNorm(first, first, 5, groups=first, act=True)
        self._low_level_fusion_os8_conv1_bn_act = ConvNorm(first, width, act=True)
        self._low_level_projection_os4 = ConvNorm(fine, projections[1], act=True)
        second = width + projections[1]
        self._low_level_fusion_os4_conv0_bn_act = ConvNorm(second, second, 5, groups=second, act=True)
        self._low_level_fusion_os4_conv1_bn_act = ConvNorm(second, width, act=True)
        self.conv_block_0 = ConvNorm(width, width, 5, groups=width, act=True)
        self.conv_block_1 = ConvNorm(width, width, act=True)
        self.final_conv = ConvNorm(width, classes, norm=False, bias=True, std=0.01)

    def get_classifier(self) -> nn.Module:
        return self.final_conv.conv

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self._aspp(maps[-1])
        odd = x.shape[-1] % 2 == 1  # both resizes follow the width of this map
        middle, fine = maps[-3:][0], maps[-4:][0]
        x = torch.cat([resize(x, like=middle, align_corners=odd), self._low_level_projection_os8(middle)], 1)
        x = self._low_level_fusion_os8_conv1_bn_act(self._low_level_fusion_os8_conv0_bn_act(x))
        x = torch.cat([resize(x, like=fine, align_corners=odd), self._low_level_projection_os4(fine)], 1)
        x = self._low_level_fusion_os4_conv1_bn_act(self._low_level_fusion_os4_conv0_bn_act(x))
        return self.final_conv(self.conv_block_1(self.conv_block_0(x)))
