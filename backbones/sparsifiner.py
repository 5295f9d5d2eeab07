"""Sparsifiner: a ViT whose blocks predict, per image, head and query, the few keys that are worth attending to.

Paper:  Wei et al. 2023, "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        https://arxiv.org/abs/2303.13755
Source: github.com/lim142857/Sparsifiner @ 9a11e26 (MIT). Names of parameters are the authors'; they published no weights.
Differs from the source: any image size (position embedding and predictors are resampled over the token grid, images padded with
zeros to whole patches); tokens that pruning drops are removed, which gives the authors' logits without their work; the
column budget lives in no module, so that one call does not change the next.

About speed: this attention is computed densely and masked, as in the source. Predicting and choosing the keys is work that
dense attention does not have, and choosing the top quarter alone costs more on a CPU than the attention it would save, so a
Sparsifiner is slower than the DeiT it came from (224 pixels, one image, one CPU thread: DeiT-S 90 ms, sparsifiner_deit_s 156
ms, with token_keep_rate 0.7 113 ms). What it tells is which connections matter.

Shapes: B batch, N tokens with the class token first, C channels, h heads, d head width, r reduced tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from backbones.arguments import BUILT_IN
from backbones.base import OpenNames, check_size, init_linear, register_variants
from backbones.fuse import fold_batch_norm
from backbones.layers import drop_path_rates, sdpa, vit_positions
from backbones.ops.predicted_keys import Rule, choose_keys, class_attention, fit_matrices, masked_attention
from backbones.tracing import leaf
from backbones.vit import Tokens, TokenStream, checkpointed, finish, project
from weights.manifest import default_cfgs as _default_cfgs
from weights.resample import is_open

default_cfgs = _default_cfgs("sparsifiner")

OPEN_PRUNING = "a Sparsifiner that drops tokens (token_keep_rate below 1) keeps a number of them that a size fixes"


@dataclass
class BlockDetails:
    """What a block's attention did. Maps over all N tokens; None where the block has no predictor or nothing is pruned."""

    unmasked_attn: Tensor  # B h N N, ordinary attention
    masked_attn: Tensor  # B h N N, what was used; rows of masked-out queries are zero
    basis_coef: Tensor | None = None  # B h N-1 r
    approx_attn: Tensor | None = None  # B h N-1 N, predicted connectivity of the patch queries
    attn_mask: Tensor | None = None  # B h N N bool, True = attended; the class token attends to all
    basis_zeros: Tensor | None = None  # 0-d share of zeros in the basis
    token_mask: Tensor | None = None  # B N-1 bool, patch tokens that go on to the next block


def there(value: Tensor | None) -> Tensor:
    """A detail of a block that has a predictor; ValueError if it has none."""
    if value is None:
        raise ValueError("this block has no mask predictor: the model is dense")
    return value


@dataclass
class Details:
    """Everything that the losses and statistics need of one forward pass."""

    logits: Tensor  # B classes
    features: Tensor  # B N-1 C, normalised patch tokens; of an LV-ViT B N-1 classes, their auxiliary logits
    blocks: list[BlockDetails]

    def sparsity(self) -> dict[str, Tensor]:
        """Shares of exact zeros in basis, coefficients and mask, means over the blocks, 0-d each."""
        zeros = {
            "basis": [there(block.basis_zeros) for block in self.blocks],
            "basis_coef": [(there(block.basis_coef) == 0).float().mean() for block in self.blocks],
            "attn_mask": [(~there(block.attn_mask)).float().mean() for block in self.blocks],
        }
        return {name: torch.stack(values).mean() for name, values in zeros.items()}


class MaskPredictor(nn.Module):
    """Chooses the keys of each patch query from a low-rank estimate of the attention map.

    Args:
        dim: channels of a token.
        heads: of the attention.
        grid: (rows, columns) of patches for which the weights are made.
        keep_rate: share of the N keys kept per query, rounded up.
        reduce_n: N divided by this, rounded down, is the rank of the estimate.
        reduce_c: d divided by this, rounded down, is the width in which queries and keys are compared.
        share_proj: one matrix both reduces the keys and holds the basis.
        basis_threshold: basis entries not above it are zero.
        coef_top: how many coefficients remain, or 0, then those above coef_threshold do.
        coef_threshold: see coef_top.
        score_threshold: keys that score higher are kept, whatever their number; None keeps keep_rate of them.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        keep_rate: float = 0.25,
        reduce_n: int = 6,
        reduce_c: int = 2,
        share_proj: bool = False,
        basis_threshold: float = 0.02,
        coef_top: int = 8,
        coef_threshold: float = 0.0,
        score_threshold: float | None = None,
    ):
        super().__init__()
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate, the share of keys kept per query, must be above 0 and at most 1, got {keep_rate}")
        self.grid = (grid[0], grid[1])
        width, tokens = dim // heads, 1 + grid[0] * grid[1]
        scale = heads**-0.5  # of the released code: the number of heads, not the reduced width
        self.rule = Rule(scale, keep_rate, basis_threshold, coef_top, coef_threshold, score_threshold)
        self.proj_c_q = nn.Linear(width, width // reduce_c)
        self.proj_c_k = nn.Linear(width, width // reduce_c)
        self.proj_n = nn.Parameter(torch.empty(tokens, max(tokens // reduce_n, 1)))
        self.proj_back_n = self.proj_n if share_proj else nn.Parameter(torch.empty_like(self.proj_n))
        for matrix in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(matrix, std=0.02)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        grid: tuple[int, int],
        kept: Tensor | None = None,
        alive: Tensor | None = None,
        raw: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys, class token first -> mask B h n-1 n (bool), scores, coefficients B h n-1 r, basis.

        Args:
            q: queries, B h n d.
            k: keys, B h n d.
            grid: (rows, columns) of the image's patches.
            kept: B n, which of all N tokens are left, in q and k too; None for all.
            alive: B N bool, which tokens count where the dropped ones are still in q and k; None for all.
            raw: signed basis and all coefficients, as while the scores are trained to reconstruct attention.
        """
        q, k = self.proj_c_q(q[:, :, 1:]), self.proj_c_k(k)
        return choose_keys(q, k, self.proj_n, self.proj_back_n, self.rule, self.grid, grid, kept, alive, raw)

    def matrices(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """proj_n and proj_back_n, N r each, for another grid of patches."""
        return fit_matrices(self.proj_n, self.proj_back_n, self.grid, grid)

    def resize(self, grid: tuple[int, int]) -> None:
        """Make `grid` the native one. Raises ValueError for a shared matrix, which cannot be both rescaled and not."""
        if tuple(grid) == self.grid:
            return
        if self.proj_back_n is self.proj_n:
            raise ValueError(f"a predictor with share_proj keeps its grid {self.grid}; it is resampled in each forward instead")
        down, back = (matrix.detach() for matrix in self.matrices(grid))
        self.proj_n = nn.Parameter(down, self.proj_n.requires_grad)
        self.proj_back_n = nn.Parameter(back, self.proj_back_n.requires_grad)
        self.grid = (grid[0], grid[1])

    def set_rank(self, rank: int) -> None:
        """Room for matrices with another number of reduced tokens; nothing is kept of the old ones."""
        shared = self.proj_back_n is self.proj_n
        self.proj_n = nn.Parameter(self.proj_n.new_empty(len(self.proj_n), rank), self.proj_n.requires_grad)
        self.proj_back_n = self.proj_n if shared else nn.Parameter(torch.empty_like(self.proj_n), self.proj_n.requires_grad)


@leaf
def keep_most_attended(
    x: Tensor, attention: Tensor, kept: Tensor | None, grid: tuple[int, int], rate: float
) -> tuple[Tensor, Tensor | None]:
    """Tokens B n C without the patches that the class token (weights B h 1 n) heeds least; and which ones of all N are left.

    ceil(rate * patches of the full grid) remain, in their order; nothing happens if there are not more.
    """
    if is_open(grid):
        raise ValueError(OPEN_PRUNING)
    remain = math.ceil(rate * grid[0] * grid[1])
    if remain >= x.shape[1] - 1:
        return x, kept
    importance = attention[:, :, 0, 1:].mean(1)
    patches = 1 + importance.topk(remain).indices.sort(-1).values
    index = torch.cat([torch.zeros_like(patches[:, :1]), patches], 1)
    return take(x, index), index if kept is None else kept.gather(1, index)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens B N C at B n -> B n C."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


@dataclass
class SparseTokens(Tokens):
    """Tokens of which pruning has dropped some.

    Attributes:
        grid: (rows, columns) of the image's patches.
        kept: B T, which of all N the tokens are; None while all are there.
    """

    grid: tuple[int, int] = (0, 0)
    kept: Tensor | None = None

    def full(self) -> Tensor:
        """B N C: zeros for the dropped tokens, as the source leaves them."""
        return restore(self.x, self.kept, self.grid)


@leaf
def restore(x: Tensor, kept: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Tokens B n C -> B N C with zeros for the dropped ones."""
    if kept is None:
        return x
    full = x.new_zeros(x.shape[0], 1 + grid[0] * grid[1], x.shape[-1])
    return full.scatter(1, kept[..., None].expand_as(x), x)


@leaf
def used(x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    """x; each parameter gets a zero gradient instead of none, which DistributedDataParallel would wait for."""
    return x + 0 * sum(parameter.sum() for parameter in parameters)


class SparseAttention(Attention):
    """timm's self-attention under the mask of its predictor; ordinary attention if it has none (`predictor` None).

    Args:
        dim: channels.
        heads: number of heads.
        qkv_bias: whether q, k and v have a bias.
        predictor: arguments of MaskPredictor after dim and heads, None for ordinary attention.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool, predictor: dict | None):
        super().__init__(dim, heads, qkv_bias=qkv_bias)
        self.mask_predictor = None if predictor is None else MaskPredictor(dim, heads, **predictor)

    def forward(  # type: ignore[override]  # the mask is predicted here
        self, x: Tensor, grid: tuple[int, int], kept: Tensor | None, prunes: bool
    ) -> tuple[Tensor, Tensor | None]:  # B n C -> B n C
        """Output, and the class token's weights B h 1 n if the block prunes or tokens are missing.

        Args:
            x: tokens, B n C.
            grid: (rows, columns) of the image's patches.
            kept: B n, which of all N tokens they are; None for all.
            prunes: whether the block drops tokens after it.
        """
        (q, k, v), weights = project(self, x), None
        if self.mask_predictor is None:
            return finish(self, x, sdpa(q, k, v, scale=self.scale)), None
        mask = self.mask_predictor(q, k, grid, kept)[0]
        attend = partial(masked_attention, scale=self.scale, may_be_empty=self.mask_predictor.rule.score_threshold is not None)
        if prunes or kept is not None:
            dropped = 0 if kept is None else 1 + grid[0] * grid[1] - kept.shape[1]
            first, weights = class_attention(q[:, :, :1], k, v, self.scale, dropped)
            out = torch.cat([first, attend(q[:, :, 1:], k, v, mask)], 2)
        else:
            out = attend(q, k, v, F.pad(mask, (0, 0, 1, 0), value=True))
        out = finish(self, x, out)
        return (used(out, tuple(self.mask_predictor.parameters())) if self.training else out), weights

    def detailed(
        self, x: Tensor, grid: tuple[int, int], alive: Tensor | None, reconstruct: bool
    ) -> tuple[Tensor, BlockDetails]:
        """The same over all tokens, as in the source, with every map.

        Args:
            x: tokens, B N C.
            grid: (rows, columns) of the image's patches.
            alive: B N bool, tokens not dropped before; None for all.
            reconstruct: nothing is masked, and the scores keep their signs.
        """
        q, k, v = project(self, x)
        if alive is not None:
            q, k, v = (t * alive[:, None, :, None] for t in (q, k, v))
        scores = q @ k.mT * self.scale
        unmasked = masked = scores.softmax(-1)
        details = BlockDetails(unmasked, masked)
        if self.mask_predictor is not None:
            mask, approx, coef, basis = self.mask_predictor(q, k, grid, alive=alive, raw=reconstruct)
            mask = F.pad(mask, (0, 0, 1, 0), value=True)
            if not reconstruct:
                masked = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num()
            details = BlockDetails(unmasked, masked, coef, approx, mask, (basis == 0).float().mean())
        return finish(self, x, masked @ v), details


class Block(nn.Module):
    """x + DP(attn(norm1 x)) / skip, then x + DP(MLP(norm2 x)) / skip; then, if it prunes, fewer tokens.

    Args:
        dim: channels.
        heads: of the attention.
        mlp_ratio: hidden channels per channel.
        qkv_bias: whether q, k and v have a bias.
        eps: of the norms.
        predictor: arguments of MaskPredictor after dim and heads, None for ordinary attention.
        token_keep_rate: share of all patches that remain after this block, None to drop none here.
        skip: what both branches are divided by.
        drop: dropout in the MLP.
        drop_path: stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        eps: float,
        predictor: dict | None,
        token_keep_rate: float | None = None,
        skip: float = 1.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SparseAttention(dim, heads, qkv_bias, predictor)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)
        self.token_keep_rate, self.skip = token_keep_rate, skip

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's tokens, from those that came and what its attention made of them."""
        x = torch.add(x, self.drop_path(attended), alpha=1 / self.skip)
        return torch.add(x, self.drop_path(self.mlp(self.norm2(x))), alpha=1 / self.skip)

    def forward(self, x: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens B n C and which of all N they are, B n (None for all) -> the same after this block."""
        out, attention = self.attn(self.norm1(x), grid, kept, self.token_keep_rate is not None)
        x = self.after_attention(x, out)
        if self.token_keep_rate is not None:
            x, kept = keep_most_attended(x, attention, kept, grid, self.token_keep_rate)
        return x, kept

    def detailed(
        self, x: Tensor, grid: tuple[int, int], alive: Tensor | None = None, reconstruct: bool = False
    ) -> tuple[Tensor, BlockDetails, Tensor | None]:
        """The same over all N tokens, dropped ones being zero: tokens B N C, every map, and which are alive, B N bool.

        Args:
            x: tokens, B N C.
            grid: (rows, columns) of the image's patches.
            alive: B N bool, tokens not dropped before; None for all.
            reconstruct: nothing is masked, and the scores keep their signs.
        """
        out, details = self.attn.detailed(self.norm1(x), grid, alive, reconstruct)
        x = self.after_attention(x, out)
        if self.token_keep_rate is not None:
            importance = details.masked_attn[:, :, 0, 1:].mean(1)
            if alive is not None:
                importance = importance.masked_fill(~alive[:, 1:], -math.inf)
            index = 1 + importance.topk(math.ceil(self.token_keep_rate * grid[0] * grid[1])).indices
            new = torch.zeros_like(x[..., 0], dtype=torch.bool).scatter(1, index, True)
            new[:, 0] = True
            alive = new if alive is None else new & alive
        if alive is not None:
            x, details.token_mask = x * alive[..., None], alive[:, 1:]
        return x, details, alive


class ConvPatchEmbed(PatchEmbed):
    """LV-ViT's stem ("4_2"): three convolutions at half the size, then patches. B 3 H W -> B rows columns C.

    Args:
        img_size: side, or (height, width), pixels.
        patch_size: side of a patch, pixels.
        in_chans: image channels.
        embed_dim: channels of a token.
        bias: of the last convolution.
        kwargs: further arguments of timm's PatchEmbed.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=384, bias=True, **kwargs):
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, **kwargs)
        self.conv1, self.bn1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        self.proj = nn.Conv2d(64, embed_dim, patch_size // 2, patch_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % self.patch_size[1], 0, -x.shape[2] % self.patch_size[0]))
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        return self.proj(x).permute(0, 2, 3, 1)

    def fused(self) -> "ConvPatchEmbed":
        """With the BatchNorms folded into the convolutions."""
        for i in "123":
            setattr(self, f"conv{i}", fold_batch_norm(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")))
            setattr(self, f"bn{i}", nn.Identity())
        return self


@leaf
def with_positions(x: Tensor, cls_token: Tensor, pos_embed: Tensor, native: tuple[int, int]) -> Tensor:
    """Patches B rows columns C -> tokens B 1+N C, class token first, plus the embedding (1 1+N' C, for the grid `native`)."""
    pos_embed = vit_positions(pos_embed, (x.shape[1], x.shape[2]), native, 1)
    return torch.cat([cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1) + pos_embed


class Sparsifiner(OpenNames, TokenStream, VisionTransformer):
    """timm's ViT with predicted attention masks.

    `forward` has the masks of training's second phase; `details` gives both phases and all maps. Weights of DeiT-S or LV-ViT-S
    start it: `model.load_state_dict(state, strict=False)`.

    Args:
        img_size: side, or (height, width), of the images for which positions and predictors are made; others run too.
        patch_size, in_chans, num_classes, global_pool, embed_dim, depth, mlp_ratio: as timm's VisionTransformer has them.
        heads: of each attention.
        lvvit: LV-ViT instead of DeiT (convolutional stem, branches halved, no qkv bias, and at inference half the strongest
            auxiliary logits of the patches added; it cannot prune tokens).
        keep_rate: share of keys kept per query, one number or one per block.
        dense: build no predictors, which is the network from which training starts and its teacher.
        token_keep_rate: share of patch tokens left after each block, one number per block (a block prunes if its share is
            lower than the one before), or the share that the second, third and last quarter of the blocks each keep of what
            the one before kept; 1 prunes nothing.
        reduce_n, reduce_c, share_proj, basis_threshold, coef_top, coef_threshold, score_threshold: of the predictors, see
            `MaskPredictor`.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the classifier, inside MLPs, stochastic depth at the last
            block, rising linearly from 0.
    """

    family = "sparsifiner"
    differs = "predicts which keys its queries see"
    default_out_indices = 3  # the last three blocks, as in timm's ViTs
    min_size = 16
    authors_names = {
        "num_heads": "heads",
        "attn_keep_rate_list": "keep_rate",
        "token_keep_rate_list": "token_keep_rate",
        "reduce_n_factor": "reduce_n",
        "reduce_c_factor": "reduce_c",
        "share_inout_proj": "share_proj",
    }
    authors_others = {
        "token_pruning_loc_indicator": "is `token_keep_rate` here: a rate below that of the block before removes tokens",
        "qkv_bias": "has no counterpart: the DeiT form has it and the LV-ViT form has none",
        "distill": "has no counterpart: the attentions are kept when a loss asks for them",
        "cfg": "is `coef_top`, `coef_threshold`, `basis_threshold` and `score_threshold` here",
        "norm_layer": BUILT_IN,
        "qk_scale": BUILT_IN,
        "p_emb": "has no counterpart: `lvvit=True` makes the published form",
        "skip_lam": "has no counterpart: `lvvit=True` makes the published form",
        "return_dense": "has no counterpart: `lvvit=True` makes the published form",
        "mix_token": "has no counterpart: `lvvit=True` makes the published form",
    }

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        lvvit: bool = False,
        keep_rate: float | Sequence[float] = 0.25,
        dense: bool = False,
        token_keep_rate: float | Sequence[float] = 1.0,
        reduce_n: int = 6,
        reduce_c: int = 2,
        share_proj: bool = False,
        basis_threshold: float = 0.02,
        coef_top: int = 8,
        coef_threshold: float = 0.0,
        score_threshold: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        eps = 1e-5 if lvvit else 1e-6
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes,
            cast(Literal["token", "avg", ""], global_pool),
            embed_dim,
            depth=0,  # its blocks are ours
            num_heads=heads,
            drop_rate=drop_rate,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            norm_layer=partial(nn.LayerNorm, eps=eps),
            embed_layer=ConvPatchEmbed if lvvit else PatchEmbed,
        )
        rates = per_block(keep_rate, depth, "keep_rate")
        tokens = token_shares(token_keep_rate, depth)
        if lvvit and min(tokens) < 1:
            raise ValueError("the authors' LV-ViT cannot prune tokens: its logits need all of them; leave token_keep_rate at 1")
        if dense and min(tokens) < 1:
            raise ValueError("a dense network prunes no tokens: leave token_keep_rate at 1, or mask nothing with keep_rate 1")
        choice = {"coef_top": coef_top, "coef_threshold": coef_threshold, "score_threshold": score_threshold}
        predictor = {"grid": self.patch_embed.grid_size, "reduce_n": reduce_n, "reduce_c": reduce_c, "share_proj": share_proj}
        predictor |= choice | {"basis_threshold": basis_threshold}
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    heads,
                    mlp_ratio,
                    qkv_bias=not lvvit,
                    eps=eps,
                    predictor=None if dense else predictor | {"keep_rate": rates[i]},
                    token_keep_rate=tokens[i] if tokens[i] < ([1.0] + tokens)[i] else None,
                    skip=2.0 if lvvit else 1.0,
                    drop=proj_drop_rate,
                    drop_path=path,
                )
                for i, path in enumerate(drop_path_rates(drop_path_rate, [depth])[0])
            )
        )
        self.blocks.apply(init_linear)
        self.feature_info = [{"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)]
        self.aux_head = nn.Linear(embed_dim, num_classes) if lvvit and num_classes else nn.Identity() if lvvit else None
        if self.aux_head is not None:
            init_linear(self.aux_head)
        self.training_phase: str | None = None

    @property
    def one_size(self) -> str | None:
        """Why an exported program takes images of one size, None if it may take any."""
        return None if all(block.token_keep_rate is None for block in cast(Any, self.blocks)) else OPEN_PRUNING

    def start(self, images: Tensor) -> "SparseTokens":
        x = self.patch_embed(check_size(images, self.min_size))
        assert self.cls_token is not None and self.pos_embed is not None
        positioned = with_positions(x, self.cls_token, self.pos_embed, self.patch_embed.grid_size)
        return SparseTokens(positioned, self.num_prefix_tokens, grid=(x.shape[1], x.shape[2]))

    def step(self, index: int, tokens: Tokens) -> Tokens:
        assert isinstance(tokens, SparseTokens)
        x, kept = self.blocks[index](tokens.x, tokens.grid, tokens.kept)
        return replace(tokens, x=x, kept=kept)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]  # B 3 H W -> B num_classes, or Details
        """Logits; during `set_training_phase`, while training, the details that its losses need."""
        if self.training and self.training_phase is not None:
            return self.details(x, reconstruct=self.training_phase == "attn_recon")
        return self.forward_head(self.forward_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens B N C -> B num_classes, or B C when pre_logits (or without a classifier)."""
        out = super().forward_head(x, pre_logits)
        if pre_logits or self.aux_head is None or not self.num_classes or self.global_pool != "token":
            return out
        return used(out, tuple(self.aux_head.parameters())) if self.training else out + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    @torch.jit.ignore
    def details(self, x: Tensor, reconstruct: bool = False) -> Details:
        """Logits, features and every attention map and mask, computed over all tokens as in the source.

        reconstruct: the first phase of training, where attention is not masked and the scores keep their signs. The attention
        maps of a dense model are a teacher's.
        """
        tokens, alive, blocks = self.start(x), None, []
        x = tokens.x
        for block in cast(Any, self.blocks):
            given = (x, tokens.grid, alive, reconstruct)
            x, details, alive = checkpointed(self.grad_checkpointing, block.detailed, *given)
            blocks.append(details)
        x = self.norm(x)
        return Details(self.forward_head(x), x[:, 1:] if self.aux_head is None else self.aux_head(x[:, 1:]), blocks)

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        """What the authors optimise: in "attn_recon" the predictors, in "cls_distill" all the rest."""
        if phase not in ("attn_recon", "cls_distill"):
            raise ValueError(f"phase must be 'attn_recon' or 'cls_distill', got {phase!r}")
        return [p for name, p in self.named_parameters() if (".mask_predictor." in name) == (phase == "attn_recon")]

    @torch.jit.ignore
    def set_training_phase(self, phase: str | None) -> None:
        """Let only `phase_parameters` train, and `forward` return `details` while training; None undoes both."""
        trained = list(self.parameters()) if phase is None else self.phase_parameters(phase)
        if not trained:
            raise ValueError("a dense Sparsifiner has no predictors to train; build it without dense=True")
        self.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self.training_phase = phase

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifier (and auxiliary one); 0 classes give pooled features, (0, '') the tokens."""
        super().reset_classifier(num_classes, global_pool)
        if self.aux_head is not None:
            like = self.cls_token
            assert like is not None
            linear = partial(nn.Linear, device=like.device, dtype=like.dtype)
            self.aux_head = linear(self.embed_dim, num_classes) if num_classes else nn.Identity()

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample positions and predictors for images of this size, so that no forward has to."""
        super().set_input_size(img_size=cast(Any, img_size))  # timm takes a side too
        block: Any
        for block in self.blocks:
            if block.attn.mask_predictor is not None:
                block.attn.mask_predictor.resize(self.patch_embed.grid_size)

    @torch.jit.ignore
    def adapt(self, state: dict[str, Tensor]) -> None:
        """Make room for the weights in `state` (our names), before they are loaded.

        Their number of reduced tokens is kept, whatever reduce_n and img_size made of it here: reduced tokens have no order in
        which they could be resampled.
        """
        for name, module in self.named_modules():
            rank = state[f"{name}.proj_n"].shape[1] if f"{name}.proj_n" in state else None
            if isinstance(module, MaskPredictor) and rank not in (None, module.proj_n.shape[1]):
                module.set_rank(rank)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Also the predictors: they get zero gradients outside their own phase, and must not shrink meanwhile."""
        return {"pos_embed", "cls_token"} | {name for name, _ in self.named_parameters() if ".mask_predictor." in name}


def per_block(value, depth: int, name: str) -> list:
    """One value per block from one for all or a sequence; ValueError if its length is another."""
    values = list(value) if isinstance(value, Sequence) else [value] * depth
    if len(values) != depth:
        raise ValueError(f"{name} has {len(values)} values for {depth} blocks")
    return values


def token_shares(rate: float | Sequence[float], depth: int) -> list[float]:
    """Share of patch tokens left after each block; see `Sparsifiner`. ValueError unless above 0 and never rising."""
    if not isinstance(rate, Sequence):
        rate = [rate ** (4 * i // depth) for i in range(depth)]
    rates = [float(value) for value in per_block(rate, depth, "token_keep_rate")]
    if not all(0 < late <= early <= 1 for early, late in zip([1.0] + rates, rates)):
        raise ValueError(f"token_keep_rate must be above 0, at most 1 and must not rise from block to block, got {rates}")
    return rates


VARIANTS = {
    "sparsifiner_deit_s": {"depth": 12, "mlp_ratio": 4.0},
    "sparsifiner_lvvit_s": {"depth": 16, "mlp_ratio": 3.0, "lvvit": True},
}
register_variants(Sparsifiner, VARIANTS)
