"""Attention transfer: a ViT learns where another one looks, or looks where the other looks.

Paper:  Li et al. 2024, "On the Surprising Effectiveness of Attention Transfer for Vision Transformers",
        https://arxiv.org/abs/2411.09702
Source: github.com/alexlioralexli/attention-transfer @ 26963e8 (CC BY-NC 4.0; read for the rule only, all code here is our own).
Differs from the source: the teacher may have another depth (blocks are paired by their place in it) and, for maps, another
width; it runs as in evaluation, where the authors let both networks draw the same stochastic depth.

Shapes: B batch, h heads, N tokens, d channels of a head.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backbones.vit import (
    Part,
    Skip,
    Tokens,
    TokenStream,
    attention_input,
    attention_map,
    attention_output,
    blocks_of,
    checkpointed,
    embed,
    mix,
    mixed_into,
    mlp_branch,
    project,
    restream,
    rotate,
    run_block,
)

KINDS = ("attention", "queries", "keys", "values")


def block_pairs(student: int, teacher: int, count: int | None = None) -> list[int]:
    """The teacher's block for each of the first `count` of the student's blocks; None: for all of them.

    Equal depths pair equal numbers, as the authors do; else the last with the last and the others evenly between. ValueError
    for a count that the student does not have.
    """
    if count is not None and not 1 <= count <= student:
        raise ValueError(f"attention transfer takes 1 to {student} blocks of this student, got {count}")
    return [max((i + 1) * teacher // student - 1, 0) for i in range(student if count is None else count)]


def check_pair(student: Part, teacher: Part, kind: str, pairs: Sequence[int]) -> None:
    """Raises ValueError, with the reason, unless the attention of the teacher's blocks `pairs` fits the student's."""
    if kind not in KINDS:
        raise ValueError(f"attention transfer knows {', '.join(KINDS)}, got {kind!r}")
    for who, model in (("student", student), ("teacher", teacher)):
        blocks_of(model)
        if isinstance(model, TokenStream):
            raise ValueError(f"the {who} {model.differs}: attention transfer needs plain ViTs")
        if getattr(getattr(model, "patch_drop", None), "prob", 0.0) > 0:
            raise ValueError(f"the {who} drops patches, so its attention has no place for each: set patch_drop_rate to 0")
    for what, ours, theirs in (
        ("prefix tokens", student.num_prefix_tokens, teacher.num_prefix_tokens),
        ("a grid of patches", tuple(student.patch_embed.grid_size), tuple(teacher.patch_embed.grid_size)),
    ):
        if ours != theirs:
            raise ValueError(f"attention transfer needs equal tokens: the student has {what} {ours}, the teacher {theirs}")
    for i, j in enumerate(pairs):
        mine, other = student.blocks[i], teacher.blocks[j]
        if isinstance(mine, Skip) or isinstance(other, Skip):
            raise ValueError(f"block {i} of the student and {j} of the teacher are a pair, and one of them is left out")
        heads = mine.attn.num_heads, other.attn.num_heads
        if heads[0] != heads[1]:
            raise ValueError(
                f"attention transfer needs equal heads: block {i} has {heads[0]}, the teacher's {j} has {heads[1]}"
            )
        widths = tuple(attn.proj.in_features // attn.num_heads for attn in (mine.attn, other.attn))
        if kind != "attention" and widths[0] != widths[1]:
            raise ValueError(
                f"{kind} need heads of equal width: block {i} has {widths[0]} channels, the teacher's {j} has {widths[1]}; "
                "'attention' needs none"
            )


def attention_parts(model: Part, index: int, tokens: Tokens) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """(what a block's attention takes, its queries, keys and values as they meet, what is added to its scores)."""
    block = model.blocks[index]
    inside = attention_input(block, tokens.x)
    rope = tokens.block_rope(index, getattr(model, "rope_mixed", False))
    return inside, rotate(block.attn, *project(block.attn, inside), rope), tokens.mask(block.attn)


def selected(attn: Part, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, kind: str) -> Tensor:
    """What is transferred: the map B h N N, or the queries, keys or values B h N d."""
    if kind == "attention":
        return attention_map(attn, qkv[0], qkv[1], mask)
    return qkv[KINDS.index(kind) - 1]


@torch.no_grad()
def teach(teacher: Part, images: Tensor, kind: str, pairs: Sequence[int]) -> list[Tensor]:
    """What the teacher's blocks `pairs` give of `kind` for images B 3 H W; blocks behind the last of them do not run.

    Args:
        teacher: the frozen ViT.
        images: B 3 H W.
        kind: what is transferred.
        pairs: numbers of the teacher's blocks.
    """
    tokens, found = embed(teacher, images), {}
    for i in range(max(pairs) + 1):
        if isinstance(teacher.blocks[i], Skip):
            continue
        block = teacher.blocks[i]
        inside, qkv, mask = attention_parts(teacher, i, tokens)
        if i in pairs:
            found[i] = selected(block.attn, qkv, mask, kind)
        if i < max(pairs):
            x = tokens.x + attention_output(block, inside, mix(block.attn, *qkv, mask))
            tokens = replace(tokens, x=x + mlp_branch(block, x))
    return [found[i] for i in pairs]


def distance(ours: Tensor, taught: Tensor, kind: str) -> Tensor:
    """B: how far a block is from its teacher's, mean over heads and queries.

    attention: cross-entropy of the logarithms of the student's map from the teacher's map, B h N N; otherwise mean squared
    difference.
    """
    if ours.shape != taught.shape:
        raise ValueError(f"student and teacher have {kind} of {tuple(ours.shape)} and {tuple(taught.shape)}: equal images only")
    ours, taught = ours.float(), taught.float()
    if kind == "attention":
        return -(taught * ours).sum(-1).flatten(1).mean(1)
    return (ours - taught).square().flatten(1).mean(1)


# -------------------------------------------------------------------------------------------------------------- distilling


class Learner(nn.Module):
    """A mixin over a ViT's class: with what a teacher gives, the model also returns its distance from it."""

    transfer: str
    blocks: nn.Sequential
    grad_checkpointing: bool

    def forward(self, x: Tensor, taught: list[Tensor] | None = None) -> Any:
        """Logits B K; with `taught`, of `teach`: (logits, distance B, summed over the blocks that have a teacher)."""
        if taught is None or isinstance(taught, torch.fx.Proxy):  # a tracer has a stand-in for what is not given
            return super().forward(x)
        model: Part = self
        tokens, total = embed(model, x), x.new_zeros(len(x), dtype=torch.float32)
        for i in range(len(self.blocks)):
            if i < len(taught):
                step = partial(learn_block, model, i, kind=self.transfer)
                tokens, apart = checkpointed(self.grad_checkpointing, step, tokens, taught[i])
                total = total + apart
            else:
                tokens = checkpointed(self.grad_checkpointing, partial(run_block, model, i), tokens)
        return model.forward_head(model.norm(tokens.x)), total


def learn_block(model: Part, index: int, tokens: Tokens, taught: Tensor, kind: str) -> tuple[Tokens, Tensor]:
    """A block of a student, and its distance B from the teacher's."""
    block = model.blocks[index]
    inside, qkv, mask = attention_parts(model, index, tokens)
    if kind == "attention":
        scores = (qkv[0] * block.attn.scale) @ qkv[1].mT
        ours = (scores if mask is None else scores + mask).float().log_softmax(-1)
    else:
        ours = selected(block.attn, qkv, mask, kind)
    x = tokens.x + attention_output(block, inside, mix(block.attn, *qkv, mask))
    return replace(tokens, x=x + mlp_branch(block, x)), distance(ours, taught, kind)


def learn(student: nn.Module, teacher: nn.Module, kind: str = "attention", blocks: int | None = None) -> list[int]:
    """Make a student, in place, that `forward(images, teach(...))` compares with its teacher; returns the teacher's blocks.

    The student stays what it was otherwise: names, weights and `forward(images)`.

    Args:
        student: timm's VisionTransformer, Eva or Beit.
        teacher: likewise, with as many tokens and heads; for other kinds than "attention" also heads of equal width.
        kind: one of KINDS.
        blocks: how many of the student's first blocks learn; None: all.
    """
    pairs = block_pairs(len(blocks_of(student)), len(blocks_of(teacher)), blocks)
    check_pair(student, teacher, kind, pairs)
    mixed_into(student, Learner)
    learner: Part = student
    learner.transfer = kind
    return pairs


# ----------------------------------------------------------------------------------------------------------------- copying


class CopyingStream(TokenStream):
    """Runs a ViT whose first blocks take a part of their attention from the model `guide`."""

    differs = "takes its attention from another model"
    guide: Part
    transfer: str
    pairs: list[int]

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.guide.eval()
        return self

    def start(self, images: Tensor) -> Tokens:
        return replace(embed(self, images), aside=teach(self.guide, images, self.transfer, self.pairs))

    def step(self, index: int, tokens: Tokens) -> Tokens:
        if index >= len(self.pairs):
            return run_block(self, index, tokens)
        block: Part = self.blocks[index]
        inside, qkv, mask = attention_parts(self, index, tokens)
        given = tokens.aside[index]
        if self.transfer == "attention":
            mixed = block.attn.attn_drop(given.to(qkv[2].dtype)) @ qkv[2]
        else:
            place = KINDS.index(self.transfer) - 1
            q, k, v = (given.to(part.dtype) if i == place else part for i, part in enumerate(qkv))
            mixed = mix(block.attn, q, k, v, mask)
        x = tokens.x + attention_output(block, inside, mixed)
        return replace(tokens, x=x + mlp_branch(block, x))


def copy_attention(student: nn.Module, teacher: nn.Module, kind: str = "attention", blocks: int | None = None) -> nn.Module:
    """Let the first blocks of a student take a part of their attention from a frozen teacher, in place; returns the student.

    The teacher becomes a part of it, `guide`, also in files: it runs at every forward. Parameters of the student that no
    output depends on any more are frozen; rows of a joint qkv layer that nothing uses get a gradient of zero.

    Args:
        student: timm's VisionTransformer, Eva or Beit.
        teacher: as for `learn`.
        kind: what is taken, one of KINDS; "attention" is the whole map, which the student applies to its own values.
        blocks: how many of the student's first blocks take it; None: all.
    """
    pairs = block_pairs(len(blocks_of(student)), len(blocks_of(teacher)), blocks)
    check_pair(student, teacher, kind, pairs)
    copier = restream(student, CopyingStream)
    copier.guide = teacher.eval().requires_grad_(False)
    copier.transfer, copier.pairs = kind, pairs
    names = ("q", "k") if kind == "attention" else (kind[0],)
    idle = [f"{name}_{part}" for name in names for part in ("proj", "norm")]
    idle += ["relative_position_bias_table"] if kind == "attention" else []
    unused = [getattr(copier.blocks[i].attn, name, None) for i in range(len(pairs)) for name in idle]
    if kind == "attention" and len(pairs) == len(copier.blocks):
        unused.append(getattr(copier, "rel_pos_bias", None))
    for part in unused:
        if isinstance(part, nn.Module | nn.Parameter):
            part.requires_grad_(False)
    return student
