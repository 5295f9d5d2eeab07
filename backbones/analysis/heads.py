"""Which heads of a ViT matter, on labelled images.

Paper:  Michel et al. 2019, "Are Sixteen Heads Really Better than One?", https://arxiv.org/abs/1905.10650
Source: huggingface/transformers, bertology (Apache-2.0).
Differs from the source: absolute values are taken for each image, as the paper writes it, so the batch size changes nothing.

Shapes: B batch, L blocks, h heads, K classes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.analysis.run import batches, evaluation, logits, vit_of, walk
from backbones.vit import Part, embed


@dataclass
class HeadImportance:
    """Per block and head.

    Attributes:
        importance: L h, mean over images of the magnitude of d cross entropy / d gate of the head.
        relative: L h, each layer divided by its Euclidean norm.
        images: how many were measured.
    """

    importance: Tensor
    relative: Tensor
    images: int

    def least(self, count: int) -> dict[int, list[int]]:
        """The `count` least important heads as layer -> heads, as the edit prune takes them; each layer keeps one."""
        chosen: dict[int, list[int]] = {}
        heads = self.importance.shape[1]
        for flat in self.importance.flatten().argsort(stable=True).tolist():
            layer, head = divmod(flat, heads)
            if sum(map(len, chosen.values())) < count and len(chosen.get(layer, ())) < heads - 1:
                chosen.setdefault(layer, []).append(head)
        return {layer: sorted(found) for layer, found in sorted(chosen.items())}


def gate_gradients(model: Part, images: Tensor, labels: Tensor) -> Tensor:
    """d cross entropy / d gate for each image and head at gates of one: B L h. Gradients of parameters are left alone."""
    with torch.enable_grad():
        gates = torch.ones(len(images), len(model.blocks), heads_of(model), device=images.device, dtype=images.dtype)
        gates.requires_grad_()
        for layer in walk(model, embed(model, images), gates):
            tokens = layer.tokens
        loss = F.cross_entropy(logits(model, tokens).float(), labels, reduction="sum")
        return torch.autograd.grad(loss, gates)[0]


def heads_of(model: Part) -> int:
    """Heads of each block. ValueError if the blocks differ."""
    counts = {block.attn.num_heads for block in model.blocks if hasattr(block, "attn")}
    if len(counts) != 1:
        raise ValueError(f"the blocks of this model have different numbers of heads, {sorted(counts)}")
    return counts.pop()


def labelled(
    model: nn.Module, images: Tensor | Iterable, labels: Tensor | None, batch_size: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """(images, labels) batch by batch. ValueError for labels that are missing or name a class that the model lacks.

    Args:
        model: says how many classes there are.
        images: n 3 H W, or an iterable of batches.
        labels: n, of a tensor of images; None where the batches hold them.
        batch_size: images taken at a time of a tensor.
    """
    classes = int(getattr(model, "num_classes", 0))
    if isinstance(images, Tensor):
        if labels is None or len(labels) != len(images):
            raise ValueError(f"{len(images)} images need as many labels, got {0 if labels is None else len(labels)}")
        pairs: Iterable = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    else:
        pairs = ((b["image"], b["label"]) if isinstance(b, Mapping) else (b[0], b[1]) for b in images)
    for batch, target in pairs:
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < classes:
            raise ValueError(
                f"the labels reach from {int(target.min())} to {int(target.max())}, the model has {classes} classes"
            )
        moved = next(batches(model, batch, len(batch)))
        yield moved, target.to(moved.device)


def head_importance(
    model: nn.Module, images: Tensor | Iterable, labels: Tensor | None = None, batch_size: int = 8
) -> HeadImportance:
    """Importance of every head for the classification of these images.

    Args:
        model: a timm ViT with its classifier.
        images: n 3 H W with `labels`, or batches of (images, labels) or of dictionaries with "image" and "label".
        labels: n class ids.
        batch_size: images at a time where `images` is a tensor.
    """
    vit = vit_of(model)
    total, seen = torch.zeros(len(vit.blocks), heads_of(vit), dtype=torch.float64), 0
    with evaluation(vit):
        for batch, target in labelled(vit, images, labels, batch_size):
            total += gate_gradients(vit, batch, target).abs().double().sum(0).cpu()
            seen += len(batch)
    if not seen:
        raise ValueError("no images to measure")
    mean = (total / seen).float()
    return HeadImportance(mean, mean / (mean.norm(dim=1, keepdim=True) + 1e-20), seen)


@torch.no_grad()
def head_masking(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 8) -> Tensor:
    """Loss of top-1 accuracy when each head alone is put to zero: L h, in 0..1, negative where it helps.

    Args:
        model: a timm ViT with its classifier.
        images: n 3 H W; every one runs once for each head.
        labels: n class ids.
        batch_size: images at a time.
    """
    vit = vit_of(model)
    depth, heads = len(vit.blocks), heads_of(vit)
    right = torch.zeros(depth * heads + 1)
    with evaluation(vit):
        for batch, target in labelled(vit, images, labels, batch_size):
            for one in range(depth * heads + 1):
                gates = torch.ones(depth * heads + 1, device=batch.device, dtype=batch.dtype)
                gates[one] = 0
                gates = gates[:-1].reshape(1, depth, heads)
                for layer in walk(vit, embed(vit, batch), gates):
                    tokens = layer.tokens
                right[one] += (logits(vit, tokens).argmax(1) == target).sum().cpu()
    return ((right[-1] - right[:-1]) / len(images)).reshape(depth, heads)
