"""SReT: a pyramid of transformer blocks that each run several times, with attention inside slices of the token sequence.

Paper:  Shen et al. 2022, "Sliced Recursive Transformer", https://arxiv.org/abs/2111.05297
Source: github.com/szq0214/SReT @ af6db0a (MIT; parts from PiT and timm, Apache-2.0). Released weights load through
    weights/convert/sret.py.
Differs from the source: the authors draw new token permutations at every call, in evaluation too, so that their outputs change
from call to call. Here evaluation is deterministic: the permutations follow from `permutation_seed`, or are given by
`set_permutations`; training draws new ones. Any image size runs: the position embedding is resized, and a token count that the
slices do not divide is cut into runs that differ by one token.

Shapes: B batch, H W map height and width, N = H * W tokens (row-major), C channels, h heads, g slices.
"""

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from backbones.arguments import NO_SCORE_DROPOUT
from backbones.base import Stage, StagedBackbone, check_img_size, check_size, register_variants
from backbones.layers import PooledNormHead, covering, sdpa
from backbones.tracing import leaf
from weights.manifest import default_cfgs as _default_cfgs
from weights.resample import is_open, resample_position_embedding

default_cfgs = _default_cfgs("sret")

OPEN_PERMUTATIONS = "given permutations are of maps of one size; set_permutations(None) takes the seed's again"

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


@leaf
def resize_to(embedding: Tensor, x: Tensor) -> Tensor:
    """Position embedding 1 C h w, resized (bicubic) to the map x, B C H W; the same tensor if it fits already."""
    return resample_position_embedding(embedding, tuple(x.shape[-2:]))


def seeded_permutation(count: int, seed: int, number: int, device: torch.device) -> Tensor:
    """A fixed permutation of `count` positions for each (seed, number), the same on every device.

    The positions in the order of their hashes (the finaliser of MurmurHash3, 32 bits).
    """
    mask = 0xFFFFFFFF
    x = (torch.arange(count, device=device) * 0x9E3779B1 + (seed * 0x27D4EB2F + number * 0x165667B1 + 1)) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return torch.argsort(x ^ (x >> 16))  # no two hashes are equal: each step is a bijection


LONGEST = 1 << 16  # tokens of a map for which an exported program of open size knows the orders: 2048 x 2048 pixels


@functools.lru_cache(maxsize=16)
def exported_ranks(count: int, seed: int, number: int) -> list[int]:
    """Which place each position has in `seeded_permutation`, as plain numbers: a program keeps them as a constant.

    Its arithmetic of 64 bits is no matter of course in exchange formats.
    """
    hashes = []
    for position in range(count):
        x = (position * 0x9E3779B1 + (seed * 0x27D4EB2F + number * 0x165667B1 + 1)) & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        hashes.append(x ^ (x >> 16))
    ranks = [0] * count
    for rank, position in enumerate(sorted(range(count), key=hashes.__getitem__)):
        ranks[position] = rank
    return ranks


def exported_permutation(count: int, seed: int, number: int, device: torch.device) -> Tensor:
    """`seeded_permutation` in an exported program, where `count` may be open (up to LONGEST)."""
    ranks = torch.tensor(exported_ranks(LONGEST if is_open((count,)) else count, seed, number), device=device)
    return torch.argsort(ranks.index_select(0, torch.arange(count, device=device)))


def slices(count: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Consecutive runs of `count` tokens whose lengths differ by at most one.

    Returns the tokens of each run, g L, padded to one length; which of them exist; and where each token stands in g * L.
    """
    if not is_open((count,)):  # else slices without a token may come of it, to which none belongs
        groups = min(groups, count)
    length = covering(count, groups)
    starts = torch.arange(groups + 1, device=device) * count // groups
    index = starts[:-1, None] + torch.arange(length, device=device)
    exists = index < starts[1:, None]
    tokens = torch.arange(count, device=device)
    group = ((tokens + 1) * groups - 1) // count
    return torch.where(exists, index, 0), exists, group * length + tokens - group * count // groups


@leaf
def attend(qkv: Tensor, groups: int, heads: int) -> Tensor:  # B N 3C -> B N C
    """Attention inside `groups` consecutive runs of the tokens."""
    batch, count, _ = qkv.shape
    if groups == 1 or (not is_open((count,)) and count % groups == 0):
        return attend_inside(qkv.unflatten(1, (groups, -1)), heads).flatten(1, 2)
    index, exists, places = slices(count, groups, qkv.device)
    inside = qkv.index_select(1, index.flatten()).unflatten(1, index.shape)
    if torch.compiler.is_exporting():  # slices and heads share an axis, so that the mask needs no batch
        q, k, v = inside.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # each B g*h L d
        out = sdpa(q, k, v, exists.repeat_interleave(heads, 0)[None, :, None]).unflatten(1, (-1, heads))
        return out.transpose(2, 3).flatten(3).flatten(1, 2).index_select(1, places)
    mask = exists[:, None, None].expand(batch, -1, -1, -1, -1).flatten(0, 1)
    return attend_inside(inside, heads, mask).flatten(1, 2).index_select(1, places)


def attend_inside(qkv: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:  # B g L 3C, B*g 1 1 L -> B g L C
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # each B*g h L d
    return sdpa(q, k, v, mask).transpose(1, 2).flatten(2).unflatten(0, qkv.shape[:2])


@leaf
def order(x: Tensor, number: int, seed: int, given: Tensor | None, drawn: bool) -> Tensor:
    """The order of the tokens x, B N C, at permuted pass `number`: the given one, else drawn, else that of the seed.

    Args:
        x: tokens, B N C.
        number: of the permuted pass.
        seed: of the orders.
        given: an order of N places, None for none.
        drawn: draw a new one, as the authors do.
    """
    count = x.shape[1]
    if given is not None:
        if is_open((count,)):
            raise ValueError(OPEN_PERMUTATIONS)
        if len(given) != count:
            raise ValueError(f"permutation {number} is of {len(given)} tokens, the map here has {count}")
        return given.to(x.device)
    if drawn:
        return torch.randperm(count, device=x.device)
    return (exported_permutation if torch.compiler.is_exporting() else seeded_permutation)(count, seed, number, x.device)


class GroupAttention(nn.Module):
    """Attention inside `groups` consecutive runs of the tokens, taken in the order of `permutation` if there is one."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor, groups: int = 1, permutation: Tensor | None = None) -> Tensor:  # B N C -> B N C
        if permutation is not None:
            x = x[:, permutation]
        out = attend(self.qkv(x), groups, self.heads)
        if permutation is not None:
            if torch.compiler.is_exporting():
                out = out.index_select(1, permutation.argsort())
            else:
                out = torch.empty_like(out).index_copy(1, permutation, out)
        return self.proj(out)


class Coefficient(nn.Module):
    """A learned factor, 1 at first; the authors' files call it a bias."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias * x

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + c y, in one pass."""
        return torch.addcmul(x, self.bias, y)


class Block(nn.Module):
    """c1 x + c2 DP(attn(norm1 x)), then c3 x + c4 DP(mlp(norm2 x)).

    Args:
        dim: channels.
        heads: of the attention.
        mlp_ratio: hidden channels per channel.
        drop_path: stochastic depth.
        qkv_bias: whether q, k and v have a bias.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float, qkv_bias: bool = True):
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim), GroupAttention(dim, heads, qkv_bias)
        self.norm2, self.mlp = LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio))
        self.coefficient1, self.coefficient2 = Coefficient(), Coefficient()
        self.coefficient3, self.coefficient4 = Coefficient(), Coefficient()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, groups: int = 1, permutation: Tensor | None = None) -> Tensor:  # B N C -> B N C
        x = self.coefficient2.add(self.coefficient1(x), self.drop_path(self.attn(self.norm1(x), groups, permutation)))
        return self.coefficient4.add(self.coefficient3(x), self.drop_path(self.mlp(self.norm2(x))))


class NonProjection(nn.Module):
    """c1 x + c2 mlp(norm1 x): the layer between two passes of a block (paper, "non-linear projection")."""

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.mlp = LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio))
        self.coefficient1, self.coefficient2 = Coefficient(), Coefficient()

    def forward(self, x: Tensor) -> Tensor:  # B N C -> B N C
        return self.coefficient2.add(self.coefficient1(x), self.mlp(self.norm1(x)))


class Recursion(nn.Module):
    """One block run once for each of its non-projections, which follow its passes."""

    def __init__(
        self, block: Block, projections: Sequence[NonProjection], groups: Sequence[int], numbers: Sequence[int | None]
    ):
        """Set up the recursion.

        Args:
            block: what is run.
            projections: what follows each pass.
            groups: slices of the attention at each pass.
            numbers: of the permutation at each pass, counted through the network; None for a pass without.
        """
        super().__init__()
        self.block, self.projections = block, nn.ModuleList(projections)
        self.groups, self.numbers = list(groups), list(numbers)
        self.seed = 0
        self.given: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:  # B N C -> B N C
        for groups, number, projection in zip(self.groups, self.numbers, self.projections):
            permutation = None if number is None else order(x, number, self.seed, self.given.get(number), self.training)
            x = self.block(x, groups, permutation)
            x = projection(x)
        return x


class Stem(nn.Module):
    """Three 3x3 convolutions of stride 2, each followed by BatchNorm and ReLU."""

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv3: nn.Conv2d
    bn1: nn.BatchNorm2d
    bn2: nn.BatchNorm2d
    bn3: nn.BatchNorm2d

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        for i, (inputs, outputs) in enumerate(((in_chans, dim // 2), (dim // 2, dim), (dim, dim)), 1):
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 3, stride=2, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:  # B 3 H W -> B C H/8 W/8, rounded up
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)))


class SlicedStage(Stage):
    """A stage on maps whose blocks take tokens."""

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B D H/2 W/2
        x = self.downsample(x)
        size = x.shape[-2:]
        return self.run_blocks(x.flatten(2).mT).mT.unflatten(2, size)


class SReT(StagedBackbone):
    """The final LayerNorm is of the pooled vector; maps have no norm."""

    family = "sret"
    min_size = 1
    authors_names = {"image_size": "img_size", "recursive_num": "depths", "groups1": "groups", "groups2": "recursive_groups"}
    authors_others = {
        "depth": "is `depths` times `loops` here: blocks with weights of their own, and passes through each of them",
        "patch_size": "is read by nothing: the stem is three convolutions of stride 2",
        "stride": "is read by nothing: the stem is three convolutions of stride 2",
        "attn_drop_rate": NO_SCORE_DROPOUT,
    }
    default_out_indices = (0, 1, 2)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        base_dims: Sequence[int] = (32, 32, 32),
        depths: Sequence[int] = (2, 5, 3),
        loops: int | Sequence[int] = 2,
        heads: Sequence[int] = (2, 4, 8),
        groups: Sequence[int] = (8, 4, 1),
        recursive_groups: Sequence[int] = (2, 1, 1),
        mlp_ratio: float = 3.6,
        np_mlp_ratio: float = 1.0,
        qkv_bias: bool = True,
        permutation_seed: int = 0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        """Set up the network; sequences have an entry a stage.

        Args:
            img_size: side, or (height, width), for which the position embedding is made; other sizes run too.
            base_dims: channels of a head, which times `heads` are the stage's channels.
            depths: different blocks.
            loops: passes of every block.
            heads: attention heads.
            groups: slices of the attention, at passes 0, 2, 4, ... of a stage.
            recursive_groups: slices at passes 1, 3, 5, ...; more than one takes the tokens in a permuted order.
            mlp_ratio, np_mlp_ratio: hidden channels per channel, in blocks and in non-projections.
            qkv_bias: whether q, k and v have a bias.
            permutation_seed: from which the permutations in evaluation follow.
            in_chans, num_classes, global_pool, drop_rate: as timm's.
            drop_path_rate: a block that begins at pass p of P has p / P of it.
        """
        super().__init__()
        dims = [base * count for base, count in zip(base_dims, heads)]
        loops = [loops] * len(dims) if isinstance(loops, int) else list(loops)
        passes = [depth * count for depth, count in zip(depths, loops)]
        numbers = iter(range(sum(passes)))

        def recursion(i: int, j: int) -> Recursion:
            # The authors number a block's rate by its place among the different blocks, after all earlier passes.
            rate = drop_path_rate * (sum(passes[:i]) + j) / sum(passes)
            block = Block(dims[i], heads[i], mlp_ratio, rate, qkv_bias)
            # Odd passes are "recursive", whatever pass of their block they are.
            odd = [number % 2 == 1 for number in range(j * loops[i], (j + 1) * loops[i])]
            return Recursion(
                block,
                [NonProjection(dims[i], np_mlp_ratio) for _ in odd],
                [recursive_groups[i] if recursive else groups[i] for recursive in odd],
                [next(numbers) if recursive and recursive_groups[i] > 1 else None for recursive in odd],
            )

        def pool(i: int) -> nn.Module:
            """Output channel c reads input channel c // 2."""
            return nn.Conv2d(dims[i - 1], dims[i], 3, stride=2, padding=1, groups=dims[i - 1]) if i else nn.Identity()

        self.patch_embed = Stem(in_chans, dims[0])
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dims[0], *self.grid(img_size)), std=0.02))
        self.stages = nn.ModuleList(
            SlicedStage(pool(i), [recursion(i, j) for j in range(depth)]) for i, depth in enumerate(depths)
        )
        self.norm = nn.Identity()
        self.finish(dims, [8 * 2**i for i in range(len(dims))], num_classes, global_pool, drop_rate)
        self.head = PooledNormHead(dims[-1], num_classes, global_pool, drop_rate, eps=1e-6)
        for module in self.recursions():
            module.seed = permutation_seed

    @property
    def one_size(self) -> str | None:
        """Why an exported program takes images of one size, None if it may take any."""
        return OPEN_PERMUTATIONS if any(module.given for module in self.recursions()) else None

    def recursions(self) -> list[Recursion]:
        return [module for module in self.modules() if isinstance(module, Recursion)]

    @torch.jit.ignore
    def set_permutations(self, permutations: Sequence[Tensor] | None) -> None:
        """Use these token orders, one a permuted pass in the order of a forward, in evaluation and training; None undoes it.

        Raises ValueError if their number is not that of the permuted passes.
        """
        numbers = [number for module in self.recursions() for number in module.numbers if number is not None]
        if permutations is not None and len(permutations) != len(numbers):
            raise ValueError(f"this model permutes tokens in {len(numbers)} passes, got {len(permutations)} permutations")
        given = dict(zip(numbers, permutations or ()))
        for module in self.recursions():
            module.given = {number: given[number] for number in module.numbers if number in given}

    def grid(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the first stage's map for images of this size, pixels."""
        height, width = check_img_size(img_size, self.min_size)
        return -(-height // 8), -(-width // 8)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the position embedding itself to images of this size, so that no resize is left for run time."""
        resized = resample_position_embedding(self.pos_embed.detach(), self.grid(img_size))
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)

    def embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(check_size(x, self.min_size))
        return x + resize_to(self.pos_embed, x)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return super().group_matcher(coarse) | {"stem": r"^(?:patch_embed|pos_embed)"}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


WHOLE = {"groups": (1, 1, 1), "recursive_groups": (1, 1, 1)}
S = {"base_dims": (42, 42, 42), "heads": (3, 6, 12), "mlp_ratio": 3.0, "np_mlp_ratio": 2.0}
T, LT = {"mlp_ratio": 3.6}, {"mlp_ratio": 4.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "sret_t": T,
    "sret_t_distill": T,
    "sret_t_wo_slice": T | WHOLE,
    "sret_t_wo_slice_distill": T | WHOLE,
    "sret_t_wo_slice_384": T | WHOLE | {"img_size": 384},
    "sret_lt": LT,
    "sret_lt_distill": LT,
    "sret_lt_16_14_1": LT | {"groups": (16, 14, 1), "recursive_groups": (1, 1, 1)},
    "sret_lt_wo_slice": LT | WHOLE,
    "sret_lt_wo_slice_distill": LT | WHOLE,
    "sret_s": S,
    "sret_s_wo_slice": S | WHOLE,
    "sret_s_wo_slice_384": S | WHOLE | {"img_size": 384},
    "sret_s_wo_slice_512": S | WHOLE | {"img_size": 512},
}
register_variants(SReT, VARIANTS)
