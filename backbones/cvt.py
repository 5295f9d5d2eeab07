"""CvT: attention whose queries, keys and values come from depthwise convolutions over the map of tokens.

Paper:  Wu et al. 2021, "CvT: Introducing Convolutions to Vision Transformers", https://arxiv.org/abs/2103.15808
Source: github.com/microsoft/CvT @ f851e68 (MIT). Released weights load through weights/convert/cvt.py.
Differs from the source: a batch of one keeps its batch axis; any H, W (the source has no fixed size either).

Shapes: B batch, H W map height and width, C channels, h heads, d = C // h, N tokens of a stage: T + HW with T = 1 in a stage
that has a class token (in the released models the last), else 0. Maps are B C H W views of tokens in memory: the convolutions
read them as channels_last, without a copy.
"""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, Mlp, QuickGELU
from torch import Tensor, nn

from backbones.arguments import BUILT_IN
from backbones.base import StagedBackbone, State, TokenStage, init_linear, register_variants
from backbones.fuse import fold_batch_norm
from backbones.layers import sdpa
from weights.manifest import default_cfgs as _default_cfgs

default_cfgs = _default_cfgs("cvt")


class ConvEmbed(nn.Module):
    """Overlapping patches by a strided convolution, then LayerNorm over channels (paper, sec. 3.1).

    Args:
        in_chans: channels that come in.
        dim: channels that leave.
        kernel: side of a patch.
        stride: between patches.
        padding: zeros at each side.
    """

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B dim H/s W/s
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Depthwise convolution and BatchNorm, with no activation between or after (paper, sec. 3.2).

    Args:
        dim: channels.
        kernel: side of the convolution.
        stride: of the convolution.
        padding: zeros at each side.
    """

    def __init__(self, dim: int, kernel: int, stride: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, stride=stride, padding=padding, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B C H/s W/s
        return self.bn(self.conv(x))

    def fused(self) -> nn.Conv2d:
        """One convolution with the same result in evaluation."""
        return fold_batch_norm(self.conv, self.bn)


class Attention(nn.Module):
    """Attention over projections of convolved maps; the class token skips the convolutions.

    Args:
        dim: channels.
        heads: number of heads.
        convolution: "dw_bn", or "avg": q is left as it is, k and v are one average-pooled map.
        kernel: of k and v; q keeps the map's size.
        stride: likewise.
        padding: likewise.
        class_token: whether the first token is one.
        qkv_bias: of the three projections only.
        attn_drop: dropout of the weights.
        proj_drop: dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        convolution: str,
        kernel: int,
        stride: int,
        padding: int,
        class_token: bool,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be split over {heads} heads")
        self.heads, self.class_token, self.attn_drop = heads, class_token, attn_drop
        self.scale = dim**-0.5  # of the whole width, as the released weights were trained; not of a head
        self.conv_proj_q: nn.Module
        self.conv_proj_k: nn.Module
        self.conv_proj_v: nn.Module | None = None
        if convolution == "dw_bn":
            self.conv_proj_q = ConvNorm(dim, kernel, 1, kernel // 2)
            self.conv_proj_k = ConvNorm(dim, kernel, stride, padding)
            self.conv_proj_v = ConvNorm(dim, kernel, stride, padding)
        elif convolution == "avg":
            self.conv_proj_q = nn.Identity()
            self.conv_proj_k = nn.AvgPool2d(kernel, stride, padding, ceil_mode=True)
        else:
            raise ValueError(f"convolution must be 'dw_bn' or 'avg', got {convolution!r}")
        self.proj_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # B N C -> B N C
        image = x[:, 1:].contiguous() if self.class_token else x  # one copy here, else one in each convolution
        image = image.mT.unflatten(2, (height, width))
        q, k = self.conv_proj_q(image), self.conv_proj_k(image)
        v = k if self.conv_proj_v is None else self.conv_proj_v(image)
        q, k, v = self.proj_q(self.tokens(q, x)), self.proj_k(self.tokens(k, x)), self.proj_v(self.tokens(v, x))
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # B h N d
        out = sdpa(q, k, v, scale=self.scale, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def tokens(self, image: Tensor, x: Tensor) -> Tensor:
        """The map as tokens, with the class token of x in front if there is one."""
        image = image.flatten(2).mT
        return torch.cat([x[:, :1], image], 1) if self.class_token else image


class QuickGeluMlp(Mlp):
    """fc1, x * sigmoid(1.702 x), fc2. The exact GELU of the Hugging Face port gives other logits."""

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__(dim, hidden, act_layer=QuickGELU, drop=drop)

    @torch.no_grad()
    def fused(self) -> Mlp:
        """The same with SiLU, one pass over the hidden map instead of three: quick_gelu(x) = silu(1.702 x) / 1.702."""
        self.fc1.weight.mul_(1.702)
        assert self.fc1.bias is not None
        self.fc1.bias.mul_(1.702)
        self.fc2.weight.div_(1.702)
        self.act = nn.SiLU()
        return self


class Block(nn.Module):
    """x + attn(norm1 x), then x + mlp(norm2 x), on all tokens.

    Args:
        dim: channels.
        heads: of the attention.
        mlp_ratio: hidden channels per channel.
        proj_drop: dropout of the attention's output and in the MLP.
        drop_path: stochastic depth.
        attention: further arguments of Attention.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, proj_drop: float, drop_path: float, **attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, heads, proj_drop=proj_drop, **attention)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = QuickGeluMlp(dim, int(dim * mlp_ratio), proj_drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # B N C -> B N C
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CvT(StagedBackbone):
    """Convolutional vision transformer; sequences have an entry a stage.

    Args:
        dims: channels.
        depths: blocks.
        heads: of the attentions.
        mlp_ratios: hidden channels per channel.
        patches: (kernel, stride, padding) of the embeddings.
        convolutions: "dw_bn" (released) or "avg".
        kv: (kernel, stride, padding) of keys and values.
        class_tokens: whether a stage has a class token.
        qkv_bias: whether the projections have a bias.
        in_chans: image channels.
        num_classes: 0 for no classifier.
        global_pool: "token" (default where the last stage has a class token), "avg" or "".
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout of attention outputs and in MLPs.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: of the last block, rising linearly from 0 within the last stage, the others having none (the authors
            trained with 0.1, W24 with 0.3).
    """

    family = "cvt"
    min_size = 3  # of the released stem: its 7x7 kernel with a padding of 2 on both sides
    default_out_indices = (0, 1, 2)
    authors_others = {
        "spec": "is several arguments here: dims (DIM_EMBED), depths (DEPTH), heads (NUM_HEADS), mlp_ratios, patches (size, "
        "stride, padding), convolutions (QKV_PROJ_METHOD), kv (kernel, stride, padding), class_tokens (CLS_TOKEN), qkv_bias",
        "act_layer": BUILT_IN,
        "norm_layer": BUILT_IN,
        "init": BUILT_IN,
    }

    def __init__(
        self,
        dims: Sequence[int] = (64, 192, 384),
        depths: Sequence[int] = (1, 2, 10),
        heads: Sequence[int] = (1, 3, 6),
        mlp_ratios: Sequence[float] = (4, 4, 4),
        patches: Sequence[tuple[int, int, int]] = ((7, 4, 2), (3, 2, 1), (3, 2, 1)),
        convolutions: Sequence[str] = ("dw_bn", "dw_bn", "dw_bn"),
        kv: Sequence[tuple[int, int, int]] = ((3, 2, 1), (3, 2, 1), (3, 2, 1)),
        class_tokens: Sequence[bool] = (False, False, True),
        qkv_bias: Sequence[bool] = (True, True, True),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        last = len(dims) - 1
        self.min_size = patches[0][0] - 2 * patches[0][2]
        self.patch_embed = ConvEmbed(in_chans, dims[0], *patches[0])
        self.stages = nn.ModuleList(
            TokenStage(
                ConvEmbed(dims[i - 1], dim, *patches[i]) if i else nn.Identity(),
                [
                    Block(
                        dim,
                        heads[i],
                        mlp_ratios[i],
                        proj_drop_rate,
                        drop_path_rate * b / max(depths[i] - 1, 1) if i == last else 0.0,
                        convolution=convolutions[i],
                        kernel=kv[i][0],
                        stride=kv[i][1],
                        padding=kv[i][2],
                        class_token=class_tokens[i],
                        qkv_bias=qkv_bias[i],
                        attn_drop=attn_drop_rate,
                    )
                    for b in range(depths[i])
                ],
                nhwc=False,
                class_token=dim if class_tokens[i] else None,
                blocks_take_size=True,
            )
            for i, dim in enumerate(dims)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5)
        strides = [patches[0][1]]
        for _, stride, _ in patches[1:]:
            strides.append(strides[-1] * stride)
        tokens = [int(token) for token in class_tokens]
        self.finish(dims, strides, num_classes, global_pool, drop_rate, tokens=tokens)
        self.apply(init_linear)

    def final_norm(self, x: Tensor, tokens: Tensor | None) -> State:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), None if tokens is None else self.norm(tokens)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}


VARIANTS = {
    "cvt_13": {"dims": (64, 192, 384), "depths": (1, 2, 10), "heads": (1, 3, 6)},
    "cvt_21": {"dims": (64, 192, 384), "depths": (1, 4, 16), "heads": (1, 3, 6)},
    "cvt_13_384": {"dims": (64, 192, 384), "depths": (1, 2, 10), "heads": (1, 3, 6)},
    "cvt_21_384": {"dims": (64, 192, 384), "depths": (1, 4, 16), "heads": (1, 3, 6)},
    "cvt_w24_384": {"dims": (192, 768, 1024), "depths": (2, 2, 20), "heads": (3, 12, 16)},
}
register_variants(CvT, VARIANTS)
