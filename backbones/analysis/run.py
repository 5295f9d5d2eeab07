"""Running a ViT block by block with everything in sight, without a hook and without a change to the model.

Shapes: B batch, N tokens, P prefix tokens, C channels, h heads, d channels of a head, L blocks.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

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
    embed,
    mlp_branch,
    project,
    rotate,
)


@dataclass
class Layer:
    """One block of a run.

    Attributes:
        index: number of the block.
        attention: B h N N, softmax map, row = query.
        heads: B h N d, what each head gives, before the norm, gate and projection that follow.
        middle: B N C, tokens after the attention.
        tokens: B N C, tokens after the block.
    """

    index: int
    attention: Tensor
    heads: Tensor
    middle: Tensor
    tokens: Tensor


def vit_of(model: nn.Module) -> Part:
    """The ViT inside a dense predictor or a feature wrapper, or the model itself.

    Raises ValueError, with the reason, for a model whose attention cannot be read.
    """
    for wrapped in ("backbone", "model"):
        if isinstance(inner := getattr(model, wrapped, None), nn.Module):
            return vit_of(inner)
    blocks_of(model)
    if isinstance(model, TokenStream):
        raise ValueError(f"this model {model.differs}, which an analysis would not see: analyse it before that")
    return model


def walk(model: Part, start: Tokens, gates: Tensor | None = None) -> Iterator[Layer]:
    """The blocks of a ViT from the tokens `start` on; blocks left out by an edit are passed over.

    gates: B L h, factor on the output of each head, or None.
    """
    x = start.x
    for i, block in enumerate(model.blocks):
        if isinstance(block, Skip):
            continue
        attn: Part = block.attn
        inside = attention_input(block, x)
        q, k, v = rotate(attn, *project(attn, inside), start.block_rope(i, getattr(model, "rope_mixed", False)))
        attention = attention_map(attn, q, k, start.mask(attn))
        heads = attention @ v
        if gates is not None:
            heads = heads * gates[:, i, :, None, None]
        middle = x + attention_output(block, inside, heads)
        x = middle + mlp_branch(block, middle)
        yield Layer(i, attention, heads, middle, x)


def layers(model: Part, images: Tensor) -> Iterator[Layer]:
    """The blocks of a ViT on images B 3 H W."""
    return walk(model, embed(model, images))


def logits(model: Part, tokens: Tensor) -> Tensor:
    """The classifier's output for the last block's tokens: B K. ValueError if the model has no classifier."""
    if not getattr(model, "num_classes", 0):
        raise ValueError(f"this {type(model).__name__} has no classifier, so there is no class to explain")
    return model.forward_head(model.norm(tokens))


def grid_of(model: Part, images: Tensor) -> tuple[int, int]:
    """Patches per column and row for images B 3 H W."""
    rows, columns = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return int(rows), int(columns)


def batches(model: nn.Module, images: Tensor | Iterable, batch_size: int) -> Iterator[Tensor]:
    """Batches of images, B 3 H W, where the model is and in its type.

    images: n 3 H W, taken `batch_size` at a time, or an iterable of batches: a tensor, a tuple that starts with one, or a
    dictionary with "image". Raises ValueError for anything else, and for no image at all.
    """
    parameter = next(model.parameters())
    empty = True
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        batch = batch["image"] if isinstance(batch, Mapping) else batch
        batch = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            raise ValueError(f"a batch of images must be a tensor B 3 H W, got {getattr(batch, 'shape', type(batch))}")
        if len(batch):
            empty = False
            yield batch.to(parameter.device, parameter.dtype)
    if empty:
        raise ValueError("no images to measure")


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside, every module has the mode of before."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
