"""PoolFormer: a transformer block whose token mixer is average pooling.

Paper:  Yu et al. 2022, "MetaFormer Is Actually What You Need for Vision", https://arxiv.org/abs/2111.11418
Source: github.com/sail-sg/poolformer @ a075575 (Apache-2.0). Released weights load through weights/convert/poolformer.py.
Differs from timm's `poolformer_*`: the final GroupNorm normalises the map before pooling, as the authors' does, so logits
are theirs (timm normalises the pooled vector); layer decay groups are defined. The names end in `_gn` for that norm.

Shapes: B batch, H W map height and width, C channels.
"""

from collections.abc import Sequence

from timm.layers import DropPath, LayerScale2d, Mlp
from torch import Tensor, nn

from backbones.base import Stage, StagedBackbone, register_variants
from backbones.layers import channels_last_on_cpu, drop_path_rates
from weights.manifest import default_cfgs as _default_cfgs

default_cfgs = _default_cfgs("poolformer")


class Stem(nn.Conv2d):
    """7x7 convolution of stride 4, padding 2; on a CPU its map, and so every later one, lies in memory channels-last.

    All that follows keeps that layout, in which a CPU multiplies 1x1 convolutions without copying their maps.
    """

    def __init__(self, in_chans: int, dim: int):
        super().__init__(in_chans, dim, 7, stride=4, padding=2)

    def forward(self, x: Tensor) -> Tensor:  # B 3 H W -> B C H/4 W/4
        return super().forward(channels_last_on_cpu(x))


class GroupNorm1(nn.GroupNorm):
    """Statistics over channels and positions together, affine per channel."""

    def __init__(self, dim: int):
        super().__init__(1, dim, eps=1e-5)


class PoolMixer(nn.Module):
    """Average over the neighbours minus the input (paper, eq. 4); at borders over the pixels that exist."""

    def __init__(self, pool_size: int):
        super().__init__()
        self.pool = nn.AvgPool2d(pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        return self.pool(x) - x


class Block(nn.Module):
    """x + DP(s1 * mix(norm1 x)), then x + DP(s2 * MLP(norm2 x)).

    Args:
        dim: channels.
        pool_size: side of the average, odd.
        mlp_ratio: hidden channels per channel.
        layer_scale: initial value, None for none.
        drop: dropout in the MLP.
        drop_path: stochastic depth.
    """

    layer_scales = (("mlp.fc2", "scale2"),)

    def __init__(self, dim: int, pool_size: int, mlp_ratio: float, layer_scale: float | None, drop: float, drop_path: float):
        super().__init__()
        scale = nn.Identity if layer_scale is None else lambda: LayerScale2d(dim, layer_scale)
        self.norm1, self.mixer, self.scale1 = GroupNorm1(dim), PoolMixer(pool_size), scale()
        self.norm2 = GroupNorm1(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, use_conv=True)
        self.scale2 = scale()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B C H W
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class PoolFormer(StagedBackbone):
    """PoolFormer; sequences have an entry a stage.

    Args:
        depths: blocks.
        dims: channels.
        mlp_ratios: hidden channels per channel.
        pool_size: side of the average that mixes tokens, odd.
        layer_scale: initial value, None for none.
        in_chans: image channels.
        num_classes: 0 for no classifier.
        global_pool: "avg", or another of timm's for maps.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        feature_norms: a norm for each returned map, as the authors' dense code has.
    """

    family = "poolformer"
    min_size = 3  # the stem's 7x7 kernel with its padding of 2
    authors_names = {"layers": "depths", "embed_dims": "dims", "layer_scale_init_value": "layer_scale"}
    authors_others = {
        "use_layer_scale": "is `layer_scale` here: the initial value, or None for none",
        "downsamples": "has no counterpart: every stage but the first begins with one",
        "fork_feat": "is `features_only=True` of timm.create_model here, and `feature_norms=True` for the dense norms",
    }

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        pool_size: int = 3,
        layer_scale: float | None = 1e-5,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
    ):
        super().__init__()
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = Stem(in_chans, dims[0])
        self.stages = nn.ModuleList(
            Stage(
                nn.Conv2d(dims[i - 1], dim, 3, stride=2, padding=1) if i else nn.Identity(),
                [Block(dim, pool_size, mlp_ratios[i], layer_scale, proj_drop_rate, rate) for rate in rates[i]],
            )
            for i, dim in enumerate(dims)
        )
        self.norm = GroupNorm1(dims[-1])
        norms = [GroupNorm1(dim) for dim in dims] if feature_norms else None
        self.finish(dims, [4 * 2**i for i in range(len(dims))], num_classes, global_pool, drop_rate, norms)
        self.apply(init_weights)


def init_weights(module: nn.Module) -> None:
    """Convolution weights of the MLPs and the classifier as the authors'; stem and downsampling keep torch's default."""
    if isinstance(module, Mlp):
        for layer in (module.fc1, module.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


S, M = (64, 128, 320, 512), (96, 192, 384, 768)

VARIANTS = {
    "poolformer_s12_gn": {"depths": (2, 2, 6, 2), "dims": S, "layer_scale": 1e-5},
    "poolformer_s24_gn": {"depths": (4, 4, 12, 4), "dims": S, "layer_scale": 1e-5},
    "poolformer_s36_gn": {"depths": (6, 6, 18, 6), "dims": S, "layer_scale": 1e-6},
    "poolformer_m36_gn": {"depths": (6, 6, 18, 6), "dims": M, "layer_scale": 1e-6},
    "poolformer_m48_gn": {"depths": (8, 8, 24, 8), "dims": M, "layer_scale": 1e-6},
}
register_variants(PoolFormer, VARIANTS)
