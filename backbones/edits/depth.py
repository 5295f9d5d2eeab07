"""Blocks left out, repeated, or grown from two: the depth of a ViT as an argument.

Papers: Xia et al. 2024, "Transformer as Linear Expansion of Learngene" (TLEG), https://arxiv.org/abs/2312.05614
        Jacobs et al. 2025, "Block-Recurrent Dynamics in Vision Transformers" (Raptor), https://arxiv.org/abs/2512.19941
Source: github.com/AlphaXia/TLEG @ 6e30a5c (badge Apache-2.0), github.com/KempnerInstitute/raptor @ ba3b53f (MIT).
None of these edits keeps accuracy by itself; measure, or train on.

Shapes: B batch, N tokens, C channels, L blocks.
"""

import copy
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import GluMlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from backbones.vit import Part, Skip, TokenStream, blocks_of

# ------------------------------------------------------------------------------------------------ blocks left out, repeated


def drop_blocks(model: nn.Module, blocks: list[int]) -> nn.Module:
    """Leave blocks of a ViT out, in place; the others keep their numbers, so feature levels and names of weights stay.

    Args:
        model: timm's VisionTransformer, Eva or Beit.
        blocks: numbers to leave out, negative from the end.
    """
    found = blocks_of(model)
    depth = len(found)
    for index in blocks:
        if not -depth <= index < depth:
            raise ValueError(f"block {index} does not exist: this model has blocks 0 to {depth - 1}")
    for index in blocks:
        found[index % depth] = Skip()
    return model


def repeat_blocks(model: nn.Module, order: list[int]) -> nn.Module:
    """Run the blocks of a ViT in another order, some of them several times with the same weights, in place.

    The depth becomes the length of `order`, and every step is a feature level. Equal steps share their parameters; in a file
    each step has its copy.

    Args:
        model: timm's VisionTransformer, Eva or Beit; positions that differ by block (mixed RoPE) are refused.
        order: for each step the number of a block, e.g. [0, 1, 2, 2, 2, 3].
    """
    found = list(blocks_of(model))
    vit: Part = model
    if getattr(vit, "rope_mixed", False):
        raise ValueError("each block of this model has its own rotations, so its blocks cannot change places")
    wrong = [index for index in order if not 0 <= index < len(found)]
    if wrong or not order:
        raise ValueError(f"order needs blocks of 0 to {len(found) - 1}, got {list(order)}")
    # a repeated step is a block of its own with the parts of the first: timm's checkpointing passes over the same block twice
    return with_blocks(vit, [copy.copy(found[index]) if index in order[:i] else found[index] for i, index in enumerate(order)])


def phase_order(thresholds: Sequence[int], blocks: Sequence[int], steps: int) -> list[int]:
    """Raptor's order: step t = 1.. runs the first block whose threshold is not below t, the last one after all of them.

    Args:
        thresholds: last step of each phase but the last, rising.
        blocks: number of the block that stands for each phase.
        steps: of the whole.
    """
    if len(thresholds) != len(blocks) - 1 or list(thresholds) != sorted(thresholds):
        raise ValueError(f"{len(blocks)} phases need {len(blocks) - 1} rising thresholds, got {list(thresholds)}")
    return [blocks[sum(t > threshold for threshold in thresholds)] for t in range(1, steps + 1)]


def with_blocks(model: Part, blocks: Sequence[nn.Module]) -> Part:
    """The model with other blocks and the feature levels that go with them."""
    if isinstance(model, TokenStream):
        raise ValueError(f"this model {model.differs}, by a plan for this depth: change the depth before that")
    kind = type(model.blocks)
    model.blocks = kind(*blocks) if kind is nn.Sequential else kind(list(blocks))
    first = model.feature_info[0]
    model.feature_info = [{**first, "module": f"blocks.{i}"} for i in range(len(blocks))]
    return model


# --------------------------------------------------------------------------------------------------------------- TLEG


def expand(base: Tensor, slope: Tensor, depth: int) -> list[Tensor]:
    """A parameter of each of `depth` blocks: base + (l / depth) * slope, l = 0 .. depth - 1 (the last is not base + slope)."""
    return [base + (i / depth) * slope for i in range(depth)]


def tleg_state(auxiliary: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A state dict of the authors' auxiliary network -> that of a timm ViT of any depth (average pooling, no class token).

    The auxiliary network normalises before it averages, its descendants after: not quite the same function at equal depth.
    """
    state = {}
    for key, value in auxiliary.items():
        match = re.fullmatch(r"blocks\.block\.(.+)\.instances\.0\.(weight|bias)_base", key)
        if match:
            slope = auxiliary[key.removesuffix("_base") + "_ilayer"]
            for i, grown in enumerate(expand(value, slope, depth)):
                state[f"blocks.{i}.{match[1]}.{match[2]}"] = grown
        elif not key.startswith("blocks."):
            state[re.sub(r"^norm\.", "fc_norm.", key)] = value
    return state


def linear_fit(values: Tensor) -> tuple[Tensor, Tensor, float]:
    """(base, slope, share not explained) of a parameter of L blocks, stacked L ..., by least squares over l / L."""
    depth = len(values)
    flat = values.flatten(1).double()
    places = torch.arange(depth, dtype=torch.float64, device=flat.device) / depth
    design = torch.stack([torch.ones_like(places), places], 1)
    solution = torch.linalg.pinv(design) @ flat
    rest = (flat - design @ solution).norm() / flat.norm().clamp_min(1e-30)
    base, slope = (row.reshape(values.shape[1:]).to(values.dtype) for row in solution)
    return base, slope, rest.item()


@torch.no_grad()
def expand_depth(model: nn.Module, depth: int) -> nn.Module:
    """Grow or shrink a ViT to `depth` blocks whose parameters lie on the line through those it has, in place (after TLEG).

    `model.linear_residual` then holds the share of its blocks that no line explains, 0 for a model that was expanded before.

    Args:
        model: timm's VisionTransformer, Eva or Beit with at least two equal blocks.
        depth: blocks of the new model.
    """
    vit: Part = model
    blocks = list(blocks_of(model))
    if depth < 1 or len(blocks) < 2:
        raise ValueError(f"a line needs at least two blocks and gives at least one, got {len(blocks)} and depth {depth}")
    if getattr(vit, "rope_mixed", False):
        raise ValueError("each block of this model has its own rotations: its depth cannot change")
    states = [block.state_dict() for block in blocks]
    shapes = [{key: value.shape for key, value in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("the blocks of this model differ in shape, so there is no line through them")
    grown = [copy.deepcopy(blocks[min(i, len(blocks) - 1)]) for i in range(depth)]
    rest, size = 0.0, 0.0
    for key in states[0]:
        stacked = torch.stack([state[key] for state in states])
        if not stacked.is_floating_point():
            continue
        base, slope, residual = linear_fit(stacked)
        norm = stacked.double().norm().item() ** 2
        rest, size = rest + residual**2 * norm, size + norm
        for block, value in zip(grown, expand(base, slope, depth), strict=True):
            block.state_dict()[key].copy_(value)
    with_blocks(vit, grown)
    vit.linear_residual = (rest / max(size, 1e-30)) ** 0.5
    return model


# -------------------------------------------------------------------------------------------------------------- Raptor


class RecurrentBlock(Block):
    """A pre-norm block with LayerScale that is told the number of the step and scales its branches and output by it.

    Args:
        dim: channels.
        num_heads: of the attention.
        mlp_ratio: hidden channels per channel.
        t_scale: scale the branches and the output by the number of the step.
        swiglu: SwiGLU in place of GELU's MLP.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, t_scale: bool = False, swiglu: bool = False):
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias=True, init_values=1e-5, norm_layer=nn.LayerNorm)
        if swiglu:
            self.mlp = GluMlp(dim, 2 * int(dim * mlp_ratio), act_layer=nn.SiLU, gate_last=False)
        self.t_proj = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 3 * dim)) if t_scale else None
        if self.t_proj is not None:
            for parameter in self.t_proj[2].parameters():
                nn.init.normal_(parameter, std=1e-4)

    def step(self, x: Tensor, t: int) -> Tensor:
        """Tokens B N C after step t (1-based)."""
        if self.t_proj is None:
            return self(x)
        s1, s2, s3 = (self.t_proj(x.new_full((1,), float(t))) + 1).chunk(3)
        x = x + s1 * self.ls1(self.attn(self.norm1(x)))
        return s3 * (x + s2 * self.ls2(self.mlp(self.norm2(x))))


class RecurrentBlocks(nn.Module):
    """Raptor's student: a few blocks, each run for the steps of its phase, in place of a teacher's depth.

    It takes tokens with their positions, and its output goes through the teacher's own norm and head.

    Args:
        dim: channels.
        num_heads: of each block.
        mlp_ratio: hidden width by channels.
        t_scale: scale branches by the number of the step.
        swiglu: gated MLPs.
        thresholds: last step of each phase but the last.
        steps: of the whole, the teacher's depth.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        thresholds: Sequence[int],
        steps: int,
        mlp_ratio: float = 4.0,
        t_scale: bool = False,
        swiglu: bool = False,
    ):
        super().__init__()
        count = len(thresholds) + 1
        self.order = phase_order(thresholds, range(count), steps)
        self.blocks = nn.ModuleList(RecurrentBlock(dim, num_heads, mlp_ratio, t_scale, swiglu) for _ in range(count))

    def states(self, x: Tensor) -> list[Tensor]:
        """Tokens B N C after every step."""
        found = []
        for t, index in enumerate(self.order, 1):
            block: Part = self.blocks[index]
            x = block.step(x, t)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.states(x)[-1]


def raptor_state(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names -> those of RecurrentBlocks."""
    renamed = {}
    for key, value in official.items():
        key = re.sub(r"\.attn\.in_proj_", ".attn.qkv.", key).replace(".attn.out_proj.", ".attn.proj.")
        renamed[key.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.2.", ".mlp.fc2.")] = value
    return renamed


def raptor_loss(output: Tensor, target: Tensor, kind: str = "mse", weights: Sequence[float] = (0.45, 0.10, 0.45)) -> Tensor:
    """Distance of a student's tokens from the teacher's, B N C, 0-d.

    Args:
        output: of the student.
        target: of the teacher.
        kind: "mse", "mse_cosine" (half of each), or "weighted" by class token, registers (tokens 1 to 4) and patches.
        weights: of the three for "weighted"; (0.34, 0.33, 0.33) while blocks are trained one by one.
    """
    if kind == "mse":
        return F.mse_loss(output, target)
    if kind == "mse_cosine":
        return 0.5 * F.mse_loss(output, target) - 0.5 * F.cosine_similarity(output, target, dim=-1).mean()
    if kind != "weighted":
        raise ValueError(f"kind must be 'mse', 'mse_cosine' or 'weighted', got {kind!r}")
    parts = (slice(0, 1), slice(1, 5), slice(5, None))
    return sum((w * F.mse_loss(output[:, p], target[:, p]) for w, p in zip(weights, parts, strict=True)), output.new_zeros(()))
