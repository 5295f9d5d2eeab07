"""Initialisations for training a ViT from scratch on few images.

Papers: Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers", https://arxiv.org/abs/2305.09828
        Wang et al. 2022, "Foundation Transformers" (Sub-LN), https://arxiv.org/abs/2210.06423
        Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers", https://arxiv.org/abs/2203.00555
From the papers; no code of the authors of the first exists. timm stores the transposes of the papers' matrices.

Shapes: C channels, h heads, d channels of a head, gh gw grid of patches.
"""

import math

import torch
from timm.layers import Mlp, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from backbones.vit import Part, blocks_of, mixed_into, plain_weights


def query_key(noise: Tensor, alpha: float, beta: float, width: int) -> tuple[Tensor, Tensor]:
    """(query rows, key rows) of one head, each d C: their product is the best rank-d part of alpha * noise + beta * I."""
    u, s, vt = torch.linalg.svd(alpha * noise.double() + beta * torch.eye(len(noise), dtype=torch.float64))
    root = s[:width].sqrt()
    return (u[:, :width] * root).mT, vt[:width] * root[:, None]


def value_projection(noise: Tensor, alpha: float, beta: float, width: int) -> tuple[Tensor, Tensor]:
    """(value weight, width C, projection weight, C width): x -> x (alpha * noise - beta * I), at most of rank `width`."""
    u, s, vt = torch.linalg.svd(alpha * noise.double() - beta * torch.eye(len(noise), dtype=torch.float64))
    root = s[:width].sqrt()
    return (u[:, :width] * root).mT, (root[:, None] * vt[:width]).mT


def position_table(grid: tuple[int, int], channels: int) -> Tensor:
    """Sinusoids of a grid, row-major: gh*gw C."""
    if channels % 4:
        raise ValueError(f"sinusoidal positions need channels in fours, this model has {channels}")
    return build_sincos2d_pos_embed(list(grid), channels)


@torch.no_grad()
def mimetic_init(
    model: nn.Module,
    alpha1: float = 0.7,
    beta1: float = 0.7,
    alpha2: float = 0.4,
    beta2: float = 0.4,
    positions: bool = True,
    seed: int = 0,
) -> nn.Module:
    """Initialise attention as trained attention looks, in place: W_Q W_K' near the identity, W_V W_proj near its negative.

    For training from scratch: whatever was learnt is lost. Where queries and keys are rotated or normalised their product has
    no such meaning, and only values and projection are set. Biases, MLPs and the patch embedding stay.

    Args:
        model: timm's VisionTransformer, Eva or Beit.
        alpha1: noise in the product of queries and keys.
        beta1: identity in it.
        alpha2: noise in the product of values and projection.
        beta2: negative identity in it.
        positions: start learnt positions as sinusoids.
        seed: of the noise; drawn and decomposed on the CPU, so every device gets the same weights.
    """
    plain_weights(model, "mimetic_init")
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(model)
    vit: Part = model
    channels = vit.embed_dim
    if positions and getattr(vit, "pos_embed", None) is not None:
        table = position_table(tuple(vit.patch_embed.grid_size), channels)
        prefix = vit.pos_embed.shape[1] - len(table)
        vit.pos_embed.zero_()
        vit.pos_embed[0, prefix:].copy_(table)
    for block in blocks:
        attn: Part = getattr(block, "attn", None)
        if attn is None:
            continue
        if getattr(attn, "num_kv_groups", 1) > 1:
            raise ValueError("mimetic initialisation knows no grouped queries: each head needs keys of its own")
        heads, width = attn.num_heads, attn.proj.in_features
        d = width // heads
        noise = torch.randn(heads + 1, channels, channels, generator=generator) / math.sqrt(channels)
        turned = getattr(vit, "rope", None) is not None
        normed = not all(isinstance(getattr(attn, name, nn.Identity()), nn.Identity) for name in ("q_norm", "k_norm"))
        parts: list[Tensor | None] = [None, None]
        if not (turned or normed):
            pairs = [query_key(noise[i], alpha1, beta1, d) for i in range(heads)]
            parts = [torch.cat([q for q, _ in pairs]), torch.cat([k for _, k in pairs])]
        value, projection = value_projection(noise[heads], alpha2, beta2, width)
        for i, part in enumerate([*parts, value]):
            if part is not None:
                weight = attn.qkv.weight[i * width : (i + 1) * width] if attn.qkv is not None else None
                weight = (attn.q_proj, attn.k_proj, attn.v_proj)[i].weight if weight is None else weight
                weight.copy_(part)
        attn.proj.weight.copy_(projection)
    return model


@torch.no_grad()
def sub_ln(model: nn.Module) -> nn.Module:
    """Sub-LN, from the paper: a LayerNorm before every output projection, weights scaled to the depth; from scratch only.

    In place. Values, projections and MLPs are drawn Xavier-normal with gain sqrt(ln 2L) for L blocks, queries and keys with 1.

    Args:
        model: timm's VisionTransformer or Eva with plain MLPs.
    """
    plain_weights(model, "sub_ln")
    blocks = [block for block in blocks_of(model) if hasattr(block, "attn")]
    gain = math.sqrt(math.log(2 * len(blocks)))
    for i, block in enumerate(blocks):
        attn: Part = block.attn
        mlp: Part = block.mlp
        if not isinstance(mlp, Mlp) or not hasattr(attn, "norm"):
            raise ValueError(f"blocks.{i}: Sub-LN needs timm's Mlp and an attention with a norm, got {type(mlp).__name__}")
        eps = getattr(block.norm1, "eps", 1e-6)
        like = attn.proj.weight
        attn.norm = nn.LayerNorm(attn.proj.in_features, eps=eps, device=like.device, dtype=like.dtype)
        mlp.norm = nn.LayerNorm(mlp.fc2.in_features, eps=eps, device=like.device, dtype=like.dtype)
        draw_by_depth(block, gain)
    return model


def draw_by_depth(block: Part, gain: float) -> None:
    """Draw the weights of a block Xavier-normal, with this gain for values, projection and MLP and 1 for queries and keys."""
    attn: Part = block.attn
    width = attn.proj.in_features
    weights = attn.qkv.weight.split(width) if attn.qkv is not None else [
        layer.weight for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
    ]  # fmt: skip
    for weight, scale in zip(weights, (1.0, 1.0, gain), strict=True):
        nn.init.xavier_normal_(weight, gain=scale)
    for layer in (attn.proj, block.mlp.fc1, block.mlp.fc2):
        nn.init.xavier_normal_(layer.weight, gain=gain)


class DeepNorm(nn.Module):
    """A mixin over timm's block: norms after the residuals, which are scaled by `residual`: LN(residual * x + branch(x))."""

    residual: float

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        block: Part = self
        attended = block.attn(x, attn_mask=attn_mask, is_causal=is_causal)
        x = block.norm1(self.residual * x + block.drop_path1(attended))
        return block.norm2(self.residual * x + block.drop_path2(block.mlp(x)))


@torch.no_grad()
def deepnet(model: nn.Module) -> nn.Module:
    """DeepNet, from the paper: norms after scaled residuals and weights scaled to the depth; from scratch only, in place.

    For L blocks x = LN((2L)^(1/4) x + branch(x)), and values, projections and MLPs are drawn Xavier-normal with gain
    (8L)^(-1/4), queries and keys with 1. The ViT's final norm stays.

    Args:
        model: timm's VisionTransformer with its plain blocks and MLPs, without LayerScale.
    """
    plain_weights(model, "deepnet")
    blocks = [block for block in blocks_of(model) if hasattr(block, "attn")]
    for i, block in enumerate(blocks):
        if type(block) is not Block or type(block.mlp) is not Mlp or block.attn.qkv is None:
            raise ValueError(f"blocks.{i}: deepnet needs timm's Block with its Mlp and a joint qkv, got {type(block).__name__}")
        if not isinstance(block.ls1, nn.Identity):
            raise ValueError(f"blocks.{i} has LayerScale, which contradicts deepnet's scale of the residual")
    for block in blocks:
        draw_by_depth(block, (8 * len(blocks)) ** -0.25)
        mixed_into(block, DeepNorm)
        block.residual = (2 * len(blocks)) ** 0.25
    return model
