"""Where in an image a ViT finds its evidence: attention rollout, attention relevance, transformer attribution.

Papers: Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928 (rollout)
        Chefer et al. 2021, "Generic Attention-model Explainability", https://arxiv.org/abs/2103.15679 (relevance)
        Chefer et al. 2021, "Transformer Interpretability Beyond Attention Visualization", https://arxiv.org/abs/2012.09838
        (attribution)
Source: github.com/hila-chefer/Transformer-MM-Explainability @ 58eaea8, github.com/hila-chefer/Transformer-Explainability
        @ c3e578f, github.com/jacobgil/vit-explain @ 15a81d3 (all MIT).
Differs from the source: batches (the authors' code is right for one image only), fused attention, any number of prefix
tokens, RoPE, average and attention pooling; gradients of parameters are left alone.

Shapes: B batch, h heads, N tokens, P prefix tokens, n patches, C channels, K classes, L blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from backbones.analysis.run import Layer, evaluation, layers, logits, vit_of, walk
from backbones.vit import Part, Tokens, attention_map, embed, finish, position_bias, project, rotate

# ---------------------------------------------------------------------------------------------------- from maps to relevance


def rollout_of(maps: Sequence[Tensor], start: int = 0) -> Tensor:
    """Attention rollout of maps B h N N, first block first: B N N, rows sum to one. start: the first block that counts."""
    result = torch.eye(maps[0].shape[-1], device=maps[0].device).expand(len(maps[0]), -1, -1)
    for attention in maps[start:]:
        step = attention.float().mean(1) + torch.eye(attention.shape[-1], device=attention.device)
        result = (step / step.sum(-1, keepdim=True)) @ result
    return result


def discarding_rollout(maps: Sequence[Tensor], fusion: str = "mean", discard: float = 0.9, published: bool = False) -> Tensor:
    """Rollout of the strongest attention only, after jacobgil/vit-explain: B N N.

    Args:
        maps: B h N N, first block first.
        fusion: of the heads: "mean", "max" or "min".
        discard: share of the entries, the smallest, that are set to zero in each layer and image.
        published: divide entry (i, j) by the sum of row j, as that program does, instead of by the sum of its own row i.
    """
    if fusion not in ("mean", "max", "min"):
        raise ValueError(f"fusion must be 'mean', 'max' or 'min', got {fusion!r}")
    if not 0 <= discard < 1:
        raise ValueError(f"discard is a share of the entries in [0, 1), got {discard}")
    eye = torch.eye(maps[0].shape[-1], device=maps[0].device)
    result = eye.expand(len(maps[0]), -1, -1)
    for attention in maps:
        fused = attention.float().mean(1) if fusion == "mean" else getattr(attention.float(), f"a{fusion}")(1)
        flat = fused.flatten(1)
        smallest = flat.topk(int(flat.shape[1] * discard), largest=False).indices
        dropped = torch.zeros_like(flat, dtype=torch.bool).scatter(1, smallest, True)
        dropped[:, 0] = False  # the class token's attention to itself stays
        step = (flat.masked_fill(dropped, 0).view_as(fused) + eye) / 2
        sums = step.sum(-1)
        result = (step / (sums[:, None] if published else sums[..., None])) @ result
    return result


def relevance_of(maps: Sequence[Tensor], gradients: Sequence[Tensor], start: int = 0) -> Tensor:
    """Generic attention relevance: B N N. gradients: of the class's logit with respect to the maps, B h N N."""
    result = torch.eye(maps[0].shape[-1], device=maps[0].device).expand(len(maps[0]), -1, -1)
    for attention, gradient in zip(maps[start:], gradients[start:], strict=True):
        result = result + (gradient * attention).float().clamp_min(0).mean(1) @ result
    return result


def read_out(matrix: Tensor, model: Part, pool: Tensor | None = None) -> Tensor:
    """What the classifier reads of a matrix B N N: B n, by class token (both of a distilled model), mean patch or pooling.

    pool: B latents n (or N where it sees prefix tokens), one more layer for models with attention pooling.
    """
    prefix = model.num_prefix_tokens
    if pool is not None:
        seen = matrix if pool.shape[-1] == matrix.shape[-1] else matrix[:, prefix:]
        rows = pool @ seen
        rows = rows[:, 0] if getattr(model.attn_pool, "pool", "token") == "token" else rows.mean(1)
    elif hasattr(model, "dist_token"):
        rows = matrix[:, :2].mean(1)
    elif str(model.global_pool) in ("token", ""):
        if not prefix:
            raise ValueError("this model has neither a class token nor pooling, so nothing reads its patches")
        rows = matrix[:, 0]
    elif getattr(model, "pool_include_prefix", False):
        rows = matrix.mean(1)
    else:
        rows = matrix[:, prefix:].mean(1)
    return rows[:, prefix:]


def picture(patches: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Relevance B n -> maps B H W in 0..1, bilinear; a constant map becomes zeros."""
    maps = F.interpolate(patches.float().unflatten(1, grid)[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


# ------------------------------------------------------------------------------------------------------------- with a model


def pooling(pool: Part, x: Tensor) -> tuple[Tensor, Tensor]:
    """(map B h latents n, values B h n d) of timm's attention pooling on tokens B n C. ValueError for another pooling."""
    if not isinstance(pool, AttentionPoolLatent):
        raise ValueError(f"pooling by {type(pool).__name__} is not understood; timm's AttentionPoolLatent is")
    if pool.pos_embed is not None:
        x = x + pool.pos_embed[None].to(x.dtype)
    q = pool.q(pool.latent.expand(len(x), -1, -1)).unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
    k, v = pool.kv(x).unflatten(2, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return ((pool.q_norm(q) * pool.scale) @ pool.k_norm(k).mT).softmax(-1), v


@contextmanager
def recorded_pool(model: Part, store: list[Tensor]) -> Iterator[None]:
    """Inside, attention pooling multiplies out its map, appends it to `store`, and gives the same result up to rounding."""
    pool: Part = getattr(model, "attn_pool", None)
    if pool is None:
        yield
        return

    def forward(x: Tensor) -> Tensor:
        attention, v = pooling(pool, x)
        store.append(attention)
        x = pool.proj_drop(pool.proj((attention @ v).transpose(1, 2).flatten(2)))
        x = x + pool.mlp(pool.norm(x))
        return x[:, 0] if pool.pool == "token" else x.mean(1) if pool.pool == "avg" else x

    pool.forward = forward
    try:
        yield
    finally:
        del pool.forward


@torch.no_grad()
def rollout(model: nn.Module, images: Tensor, start: int = 0) -> Tensor:
    """Attention rollout of images B 3 H W: B n, patches row-major.

    Args:
        model: a timm ViT (VisionTransformer, Eva, Beit).
        images: as the model takes them; B N N floats for each image are in memory.
        start: the first block that counts.
    """
    vit = vit_of(model)
    check_start(vit, start)
    result, pool = None, None
    with evaluation(vit):
        for layer in layers(vit, images):
            if layer.index >= start:
                step = rollout_of([layer.attention])
                result = step if result is None else step @ result
        if result is None:
            raise ValueError(f"no block from {start} on attends: all were left out")
        if getattr(vit, "attn_pool", None) is not None:
            x = vit.norm(layer.tokens)
            x = x if getattr(vit, "pool_include_prefix", False) else x[:, vit.num_prefix_tokens :]
            pool = pooling(vit.attn_pool, x)[0].float().mean(1)
    return read_out(result, vit, pool)


def check_start(model: Part, start: int) -> None:
    """ValueError if the first block that counts does not exist."""
    if not 0 <= start < len(model.blocks):
        raise ValueError(f"start must be a block, 0 to {len(model.blocks) - 1}, got {start}")


def attention_gradients(
    model: nn.Module, images: Tensor, classes: Tensor | Sequence[int] | int | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(maps B h N N, d logit of the class / d map, logits B K); with attention pooling its map is the last of each list.

    classes: for each image one id, one for all, or None for the best. Raises ValueError for a class the model lacks.
    """
    vit = vit_of(model)
    maps: list[Tensor] = []
    pooled: list[Tensor] = []
    with evaluation(vit), torch.enable_grad(), recorded_pool(vit, pooled):
        start = embed(vit, images)
        start.x = start.x.detach().requires_grad_()  # a graph even where every parameter is frozen
        for layer in walk(vit, start):
            maps.append(layer.attention)
            tokens = layer.tokens
        scores = logits(vit, tokens)
        chosen = chosen_classes(scores, classes)
        maps += pooled
        gradients = torch.autograd.grad(scores.gather(1, chosen[:, None]).sum(), maps)
    return [m.detach() for m in maps], [g.detach() for g in gradients], scores.detach()


def chosen_classes(scores: Tensor, classes: Tensor | Sequence[int] | int | None) -> Tensor:
    """Class ids B for scores B K; ValueError for ids that are out of range or of another count."""
    if classes is None:
        return scores.argmax(1)
    chosen = torch.as_tensor(classes, device=scores.device).long().reshape(-1)
    if len(chosen) not in (1, len(scores)):
        raise ValueError(f"{len(scores)} images need one class or one for each, got {len(chosen)}")
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < scores.shape[1]:
        raise ValueError(f"class {int(chosen.max())} does not exist: the model has classes 0 to {scores.shape[1] - 1}")
    return chosen.expand(len(scores))


def relevance(model: nn.Module, images: Tensor, classes: Tensor | Sequence[int] | int | None = None, start: int = 0) -> Tensor:
    """Generic attention relevance of a class in images B 3 H W: B n, not negative, patches row-major.

    Args:
        model: a timm ViT (VisionTransformer, Eva, Beit) with its classifier.
        images: as the model takes them; the maps of all blocks are in memory, L h N N floats for each image.
        classes: for each image one id, one for all, or None for the best class of each.
        start: the first block that counts; the last one alone is the usual choice for CLIP.
    """
    vit = vit_of(model)
    check_start(vit, start)
    maps, gradients, _ = attention_gradients(vit, images, classes)
    pool = None
    if getattr(vit, "attn_pool", None) is not None:
        pool = (gradients.pop() * maps.pop()).float().clamp_min(0).mean(1)
    return read_out(relevance_of(maps, gradients, start), vit, pool)


@contextmanager
def recorded(model: Part, store: list[Tensor]) -> Iterator[None]:
    """Inside, the model's own forward multiplies out its attention and appends the maps B h N N to `store`, block by block."""

    def forward(
        attn: Part, x: Tensor, rope: Tensor | None = None, attn_mask: Any = None, is_causal: bool = False,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        q, k, v = rotate(attn, *project(attn, x), rope)
        store.append(attention_map(attn, q, k, position_bias(attn, shared_rel_pos_bias)))
        return finish(attn, x, store[-1] @ v)

    changed = [block.attn for block in model.blocks if hasattr(block, "attn")]
    for attn in changed:
        attn.forward = partial(forward, attn)
    try:
        yield
    finally:
        for attn in changed:
            del attn.forward


def pixel_relevance(net: nn.Module, images: Tensor, channel: int, row: int, column: int, start: int = 0) -> Tensor:
    """Generic attention relevance of one output pixel of a dense predictor over a ViT: B n, patches row-major.

    The row that is read is that of the patch in which the pixel lies; heads that mix patches add what they saw elsewhere only
    through the gradient.

    Args:
        net: a dense predictor, images B 3 H W -> B K H W.
        images: as it takes them; the maps of all blocks are in memory.
        channel: of the output, a class or 0 for depth.
        row: of the pixel.
        column: of the pixel.
        start: the first block that counts.
    """
    vit = vit_of(net)
    check_start(vit, start)
    maps: list[Tensor] = []
    with evaluation(net), torch.enable_grad(), recorded(vit, maps):
        out = net(images.detach().requires_grad_())
        if out.ndim != 4 or not (0 <= channel < out.shape[1] and 0 <= row < out.shape[2] and 0 <= column < out.shape[3]):
            raise ValueError(f"channel {channel} at ({row}, {column}) is outside the output {tuple(out.shape)}")
        gradients = torch.autograd.grad(out[:, channel, row, column].sum(), maps)
    found = relevance_of([m.detach() for m in maps], gradients, start)
    height, width = vit.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    place = row * height // images.shape[2] * width + column * width // images.shape[3]
    prefix = vit.num_prefix_tokens
    return found[:, prefix + place, prefix:]


# ------------------------------------------------------------------------------------- attribution by layer-wise relevance


def attribution(
    model: nn.Module,
    images: Tensor,
    classes: Tensor | Sequence[int] | int | None = None,
    method: str = "transformer_attribution",
    start: int = 0,
) -> Tensor:
    """Relevance of a class by layer-wise propagation of relevance into the attention maps: B n.

    Args:
        model: a plain timm VisionTransformer read at its class token: no q/k norm, gate or RoPE, which have no rule.
        images: B 3 H W; the maps of all blocks are in memory.
        classes: for each image one id, one for all, or None for the best class of each.
        method: "transformer_attribution"; "rollout" of the relevance; "last_layer", "last_layer_grad" or "last_layer_attn"
            for the last block's relevance, relevance times gradient, or attention alone.
        start: the first block that counts.
    """
    vit = vit_of(model)
    methods = ("transformer_attribution", "rollout", "last_layer", "last_layer_grad", "last_layer_attn")
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")
    check_start(vit, start)
    maps, gradients, scores = attention_gradients(vit, images, classes)
    prefix = vit.num_prefix_tokens
    if method == "last_layer_attn":
        return maps[-1].mean(1)[:, 0, prefix:]
    relevances = map_relevances(vit, images, chosen_classes(scores, classes))
    if method.startswith("last_layer"):
        last = relevances[-1] * gradients[-1] if method.endswith("grad") else relevances[-1]
        return last.clamp_min(0).mean(1)[:, 0, prefix:]
    factors = [g * r for g, r in zip(gradients, relevances, strict=True)] if method != "rollout" else relevances
    eye = torch.eye(maps[0].shape[-1], device=images.device)
    result = eye.expand(len(images), -1, -1)
    for factor in factors[start:]:
        result = (factor.clamp_min(0).mean(1) + eye) @ result
    return result[:, 0, prefix:]


def check_rules(model: Part) -> None:
    """ValueError, with the part, for a model in which relevance would have to pass something it has no rule for."""
    if str(model.global_pool) != "token" or hasattr(model, "dist_token") or model.num_prefix_tokens != 1:
        raise ValueError("attribution starts at one class token; this model is read otherwise: use relevance")
    for i, block in enumerate(model.blocks):
        attn: Part = getattr(block, "attn", None)
        plain = type(block) is Block and isinstance(block.mlp, Mlp) and isinstance(block.mlp.norm, nn.Identity)
        if not plain or attn.qkv is None or attn.gate is not None:
            raise ValueError(f"blocks.{i} is not timm's plain pre-norm block with Mlp: attribution has no rule for it")
        if not all(isinstance(norm, nn.Identity) for norm in (attn.q_norm, attn.k_norm, attn.norm)):
            raise ValueError(f"blocks.{i}.attn normalises queries, keys or heads: attribution has no rule for that")


@torch.no_grad()
def map_relevances(model: Part, images: Tensor, classes: Tensor) -> list[Tensor]:
    """Relevance of every attention map for the classes B, first block first: L times B h N N (alpha = 1 rule)."""
    check_rules(model)
    with evaluation(model):
        start: Tokens = embed(model, images)
        run: list[Layer] = list(walk(model, start))
        last = model.fc_norm(model.norm(run[-1].tokens)[:, 0])
        one_hot = F.one_hot(classes, model.num_classes).to(images.dtype)
        relevance = torch.zeros_like(run[-1].tokens)
        relevance[:, 0] = through_linear(last, model.head.weight, one_hot)
        found = []
        inputs = [start.x, *(layer.tokens for layer in run[:-1])]
        for layer, x in zip(reversed(run), reversed(inputs), strict=True):
            block: Part = model.blocks[layer.index]
            attention, relevance = through_block(block, x, layer, relevance)
            found.append(attention)
    return found[::-1]


def through_block(block: Part, x: Tensor, layer: Layer, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """(relevance of the attention map, relevance of the block's input x) from that of its output."""
    attn, mlp = block.attn, block.mlp
    straight, branch = through_add(layer.middle, layer.tokens - layer.middle, relevance)
    inside = block.norm2(layer.middle)
    hidden = mlp.act(mlp.fc1(inside))
    branch = through_linear(hidden, mlp.fc2.weight, branch)
    branch = through_linear(inside, mlp.fc1.weight, branch)
    relevance = through_clone(layer.middle, straight, branch)

    straight, branch = through_add(x, layer.middle - x, relevance)
    inside = block.norm1(x)
    q, k, v = project(attn, inside)
    merged = through_linear(layer.heads.transpose(1, 2).flatten(2), attn.proj.weight, branch)
    share = divided(merged.unflatten(2, (attn.num_heads, -1)).transpose(1, 2), layer.attention @ v)
    of_map, of_v = layer.attention * (share @ v.mT) / 2, v * (layer.attention.mT @ share) / 2
    share = divided(of_map, q @ k.mT)
    of_q, of_k = q * (share @ k) / 2, k * (share.mT @ q) / 2
    joined = torch.stack([of_q, of_k, of_v]).permute(1, 3, 0, 2, 4).flatten(2)
    branch = through_linear(inside, attn.qkv.weight, joined)
    return of_map, through_clone(x, straight, branch)


def divided(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0, kept away from it by 1e-9."""
    shifted = b + 1e-9
    return a / torch.where(shifted == 0, 1e-9, shifted) * (b != 0)


def through_linear(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of a linear layer's input from that of its output: products of equal sign only, no bias."""
    high, low, up, down = x.clamp_min(0), x.clamp_max(0), weight.clamp_min(0), weight.clamp_max(0)
    share = divided(relevance, high @ up.mT + low @ down.mT)
    return high * (share @ up) + low * (share @ down)


def through_add(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of two summands, each image's total kept and split by the size of their shares."""
    share = divided(relevance, a + b)
    a, b = a * share, b * share
    inner = tuple(range(1, a.ndim))
    total_a, total_b, total = (t.sum(inner, keepdim=True) for t in (a, b, relevance))
    size = total_a.abs() + total_b.abs()
    part_a, part_b = divided(total_a.abs(), size) * total, divided(total_b.abs(), size) * total
    return a * divided(part_a, total_a), b * divided(part_b, total_b)


def through_clone(x: Tensor, *relevances: Tensor) -> Tensor:
    """Relevance of a tensor that is used several times."""
    return x * sum(divided(r, x) for r in relevances)
