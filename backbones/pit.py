"""PiT: a vision transformer whose map is halved between stages by a strided depthwise convolution.

Paper:  Heo et al. 2021, "Rethinking Spatial Dimensions of Vision Transformers", https://arxiv.org/abs/2103.16302
Source: github.com/naver-ai/pit @ 9d97a62 (Apache-2.0). Released weights load through weights/convert/pit.py.
Differs from the source: accepts any H, W (the position embedding, an image, is resized to the grid). Differs from timm's
`pit_*`: that, `set_input_size`, gradient checkpointing, layer decay groups and the authors' stochastic depth.

Shapes: B batch, H W map height and width, C channels, T class tokens (1, or 2 with a distillation token). The stem does not
pad: n pixels give (n - patch) // stride + 1 positions, so a 224 image has maps of 27, 14 and 7.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from backbones.base import StagedBackbone, State, TokenHead, TokenStage, check_img_size, check_size, register_variants
from backbones.tracing import leaf
from weights.manifest import default_cfgs as _default_cfgs

default_cfgs = _default_cfgs("pit")

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


@leaf
def resize_to(embedding: Tensor, x: Tensor) -> Tensor:
    """Position embedding 1 C h w, resized (bicubic) to the map x, B C H W; the same tensor if it fits already.

    A size that torch.export keeps open always goes through the resize, which is exact where nothing changes.
    """
    size = x.shape[-2:]
    if all(isinstance(side, int) for side in size) and size == embedding.shape[-2:]:
        return embedding
    return F.interpolate(embedding.float(), size, mode="bicubic", align_corners=False).to(embedding.dtype)


class Pool(nn.Module):
    """Between stages: the map by a strided depthwise convolution, the tokens by one shared linear layer (paper, sec. 3.3).

    The convolution has `dim` groups: output channel c reads input channel c // (out_dim // dim).
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, groups=dim)
        self.fc = nn.Linear(dim, out_dim)

    def forward(self, x: State) -> State:  # B C H W, B T C -> B D H/2 W/2, B T D
        return self.conv(x[0]), self.fc(x[1])


class PiTStage(TokenStage):
    """A stage that takes the class tokens of the stage before, pooled with the map."""

    def start(self, x: Tensor, tokens: Tensor | None) -> State:
        return self.downsample((x, tokens))


class PiTHead(TokenHead):
    """A linear layer on the class token and, if there are two tokens, another on the second, for distillation.

    Distilled, the result is the mean of both; with `separate`, while training, the pair (for a loss on each).
    """

    fc_dist: nn.Module | None
    pools = ("token", "")  # the map has no norm to be pooled after
    separate = False

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """New classifiers; 0 classes give the pooled token (distilled: their mean), pool "" all tokens."""
        super().reset(num_classes, pool_type)
        self.fc_dist = None
        if self.tokens == 2:
            self.fc_dist = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:  # B T C -> B num_classes
        x = self.drop(x)
        if self.pool_type == "":
            return x
        main = x[:, 0] if pre_logits else self.fc(x[:, 0])
        if self.fc_dist is None:
            return main
        distillation = x[:, 1] if pre_logits else self.fc_dist(x[:, 1])
        if self.separate and self.training:
            return main, distillation
        return (main + distillation) / 2


class PiT(StagedBackbone):
    """Pooling-based vision transformer.

    Returned maps are as the blocks leave them: the final norm is for the class tokens, which `forward_features` returns.

    Args:
        img_size: side, or (height, width), for which the position embedding is made; other sizes run too.
        patch_size: side of the stem's overlapping patches, pixels.
        stride: between them.
        base_dims: channels per head of each stage.
        depths: blocks of each stage.
        heads: of each stage, whose width is base_dims times heads.
        mlp_ratio: hidden channels per channel.
        distilled: a second token and classifier.
        in_chans: image channels.
        num_classes: 0 for no classifier.
        global_pool: "token" or "".
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout of the map with its positions.
        proj_drop_rate: dropout of attention outputs and in MLPs.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth; block b of n has rate * b / n.
    """

    family = "pit"
    token_head = PiTHead
    min_size = 1  # of a model: its patch_size
    authors_names = {"image_size": "img_size", "depth": "depths"}
    default_out_indices = (0, 1, 2)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 8,
        base_dims: Sequence[int] = (48, 48, 48),
        depths: Sequence[int] = (2, 6, 4),
        heads: Sequence[int] = (2, 4, 8),
        mlp_ratio: float = 4.0,
        distilled: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.patch_size, self.stride, self.min_size = patch_size, stride, patch_size
        dims = [base * count for base, count in zip(base_dims, heads)]
        self.patch_embed = nn.Conv2d(in_chans, dims[0], patch_size, stride=stride)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dims[0], *self.grid(img_size)), std=0.02))
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + distilled, dims[0]), std=0.02))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        first = [sum(depths[:i]) for i in range(len(depths))]

        def block(i: int, b: int) -> Block:
            return Block(
                dims[i],
                heads[i],
                mlp_ratio,
                qkv_bias=True,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * (first[i] + b) / sum(depths),
                norm_layer=cast(type[nn.Module], LayerNorm),
            )

        self.stages = nn.ModuleList(
            PiTStage(Pool(dims[i - 1], dims[i]) if i else nn.Identity(), [block(i, b) for b in range(depth)], nhwc=False)
            for i, depth in enumerate(depths)
        )
        self.norm = LayerNorm(dims[-1])
        strides, tokens = [stride * 2**i for i in range(len(dims))], [1 + distilled] * len(dims)
        self.finish(dims, strides, num_classes, global_pool, drop_rate, tokens=tokens)

    def grid(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the first stage's map for images of this size, pixels."""
        height, width = check_img_size(img_size, self.min_size)
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the position embedding itself to images of this size, so that no resize is left for run time."""
        resized = resize_to(self.pos_embed.detach(), torch.empty(1, 1, *self.grid(img_size), device="meta"))
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)

    def embed(self, x: Tensor) -> State:
        x = self.patch_embed(check_size(x, self.min_size))
        x = self.pos_drop(x + resize_to(self.pos_embed, x))
        return x, self.cls_token.expand(x.shape[0], -1, -1)

    def final_norm(self, x: Tensor, tokens: Tensor | None) -> State:
        """The norm on the class tokens; the map has none."""
        return x, self.norm(tokens)

    def output(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """The class tokens alone, B T C, as the authors and timm return them: the map beside them is not normalised."""
        assert tokens is not None
        return tokens

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """While training, return the logits of the class token and of the distillation token apart, for a loss on each."""
        if self.head.fc_dist is None:
            raise ValueError("this model has no distillation token; create a pit_*_distilled")
        self.head.separate = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return self.head.fc if self.head.fc_dist is None else (self.head.fc, self.head.fc_dist)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return super().group_matcher(coarse) | {"stem": r"^(?:patch_embed|pos_embed|cls_token)"}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}


TI = {"patch_size": 16, "stride": 8, "base_dims": (32, 32, 32), "depths": (2, 6, 4), "heads": (2, 4, 8)}
XS = {"patch_size": 16, "stride": 8, "base_dims": (48, 48, 48), "depths": (2, 6, 4), "heads": (2, 4, 8)}
S = {"patch_size": 16, "stride": 8, "base_dims": (48, 48, 48), "depths": (2, 6, 4), "heads": (3, 6, 12)}
B = {"patch_size": 14, "stride": 7, "base_dims": (64, 64, 64), "depths": (3, 6, 4), "heads": (4, 8, 16)}
DISTILLED = {"distilled": True}

VARIANTS = {
    "pit_ti": TI,
    "pit_xs": XS,
    "pit_s": S,
    "pit_b": B,
    "pit_ti_distilled": TI | DISTILLED,
    "pit_xs_distilled": XS | DISTILLED,
    "pit_s_distilled": S | DISTILLED,
    "pit_b_distilled": B | DISTILLED,
}
register_variants(PiT, VARIANTS)
