"""Token merging: similar patches become one, block by block, and are put back to the input grid wherever tokens leave.

Paper:  Bolya et al. 2023, "Token Merging: Your ViT But Faster", https://arxiv.org/abs/2210.09461
Source: github.com/facebookresearch/ToMe @ af95e4b (read for the rule only; all code here is our own).
Differs from the source: keeps LayerScale, q/k norm, gates and fused attention; protects every prefix token, not only the
first; runs on rotary models (a merged token keeps the rotation of the token it was merged into) and on BEiT's position bias
(likewise); un-merges every tensor that leaves the blocks, so pooling is weighted by size and every dense head works; the
schedule is not state, so calls may be nested, recomputed and exported.

Shapes: B batch, T tokens, P prefix tokens, C channels, d channels of the metric.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.vit import Skip, Tokens, TokenStream, attention_branch, blocks_of, mlp_branch, restream, run_block


def token_merging(model: nn.Module, r: int | list[int] = 8, inflect: float = 0.0, prop_attn: bool = True) -> nn.Module:
    """Merge r pairs of patches in every block of a ViT, in place; features, maps and pooling keep the input grid.

    r = 0 is the model itself, to the bit. Raises ValueError for a model whose tokens cannot be followed.

    Args:
        model: timm's VisionTransformer, Eva or Beit, or a subclass.
        r: pairs merged in each block, at most half of its patches; or one number for each block, 0 where the list ends.
        inflect: tilts a single r over the depth: -1 from 2r down to 0, +1 from 0 up to 2r.
        prop_attn: attention counts a merged token as often as the patches it holds. Off only for MAE weights that were not
            trained with merging (the authors' advice).
    """
    if not (any(r) if isinstance(r, list) else r):
        return model
    merged = schedule(r, inflect, len(blocks_of(model)))
    stream = restream(model, MergingStream)
    stream.merged_per_block, stream.prop_attn = merged, prop_attn
    return stream


def schedule(r: int | Sequence[int], inflect: float, depth: int) -> list[int]:
    """Pairs to merge in each of `depth` blocks. ValueError for negative numbers or a list with an inflection."""
    if not isinstance(r, int):
        if inflect:
            raise ValueError(f"inflect tilts a single r; with one r for each block it must be 0, got {inflect}")
        result = [*r, *[0] * depth][:depth]
    elif depth == 1:
        result = [r]
    else:
        low = int(r * (1 - inflect))
        result = [int(low + (2 * r - 2 * low) / (depth - 1) * i) for i in range(depth)]
    if any(count < 0 for count in result):
        raise ValueError(f"token merging needs r of at least 0 in every block, got {result}")
    return result


class MergingStream(TokenStream):
    """Runs a ViT with `merged_per_block[i]` pairs of patches merged between attention and MLP of block i."""

    differs = "merges tokens"
    merged_per_block: list[int]
    prop_attn: bool

    def step(self, index: int, tokens: Tokens) -> Tokens:
        r = min(self.merged_per_block[index], (tokens.x.shape[1] - tokens.prefix) // 2)
        if isinstance(self.blocks[index], Skip) or (r == 0 and tokens.leader is None):
            return run_block(self, index, tokens)  # timm's own forward
        block = self.blocks[index]
        rope = tokens.block_rope(index, getattr(self, "rope_mixed", False))
        out, keys = attention_branch(block, tokens.x, rope, tokens.mask(block.attn, self.prop_attn))
        tokens = replace(tokens, x=tokens.x + out)
        if r > 0:
            tokens = merge_tokens(tokens, match(keys.mean(1), r, tokens.prefix))
        return replace(tokens, x=tokens.x + mlp_branch(block, tokens.x))


@dataclass
class Match:
    """Which tokens become one. target: B T, new number of each token; leader: B T - r, the old token that gives the place."""

    target: Tensor
    leader: Tensor


@torch.no_grad()
def match(metric: Tensor, r: int, prefix: int) -> Match:
    """ToMe's bipartite matching: of the tokens at even places, the r most similar to one at an odd place join that one.

    metric: B T d, compared by cosine; r: at most half of the patches; prefix: tokens at the front that stay. The new sequence
    is: prefix, patches at even places that were not merged (in the old order; without prefix tokens by falling similarity, as
    the authors do), patches at odd places.
    """
    batch, count, _ = metric.shape
    metric = F.normalize(metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].mT
    even, odd = scores.shape[1:]
    even_prefix, odd_prefix = (prefix + 1) // 2, prefix // 2
    scores[:, :even_prefix] = -torch.inf
    scores[:, :, :odd_prefix] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    gone, stay = order[:, :r], order[:, r:]
    if prefix:
        stay = stay.sort(-1).values
    places = torch.arange(count, device=metric.device)
    kept = even - even_prefix - r
    new_even = torch.cat([places[:prefix:2], prefix + places[:kept]]).expand(batch, -1)
    new_odd = torch.cat([places[1:prefix:2], prefix + kept + places[: odd - odd_prefix]]).expand(batch, -1)
    target = torch.empty_like(order).scatter(1, stay, new_even)
    target = target.scatter(1, gone, new_odd.gather(1, partner.gather(1, gone)))
    whole = torch.empty(batch, count, dtype=torch.long, device=metric.device)
    whole[:, ::2], whole[:, 1::2] = target, new_odd
    leader = torch.empty(batch, count - r, dtype=torch.long, device=metric.device)
    leader = leader.scatter(1, new_even, 2 * stay).scatter(1, new_odd, places[1::2].expand(batch, -1))
    return Match(whole, leader)


def merge_tokens(tokens: Tokens, found: Match) -> Tokens:
    """The tokens after a match: means weighted by size, sizes added, positions those of the leaders."""
    x, old = tokens.x, tokens.size
    size = torch.ones(x.shape[:2], device=x.device) if old is None else old
    total = size.new_zeros(found.leader.shape).scatter_add(1, found.target, size)
    group = found.target if tokens.group is None else found.target.gather(1, tokens.group)
    leader = found.leader if tokens.leader is None else tokens.leader.gather(1, found.leader)
    return replace(tokens, x=merge(x, size, total, found), group=group, leader=leader, size=total)


def merge(x: Tensor, size: Tensor, total: Tensor, found: Match) -> Tensor:
    """B T C -> B T-r C: each new token is the mean of those it holds, weighted by size.

    Args:
        x: tokens, B T C.
        size: how many tokens of the image each holds, B T.
        total: B T-r, sizes of the new tokens.
        found: which tokens become one.
    """
    weighted = x * size[..., None]  # float32 at least
    batch, left = found.leader.shape
    places = found.target + left * torch.arange(batch, device=x.device)[:, None]  # rows of all images, one under the other
    rows = weighted.new_zeros(batch * left, x.shape[2])
    rows = rows.index_add(0, places.flatten(), weighted.flatten(0, 1))  # whole rows: a scatter goes number by number
    return (rows.view(batch, left, -1) / total[..., None]).to(x.dtype)
