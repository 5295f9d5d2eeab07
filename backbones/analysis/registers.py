"""Which neurons make a ViT's outlier tokens, and how strong these artefacts are.

Papers: Darcet et al. 2023, "Vision Transformers Need Registers", https://arxiv.org/abs/2309.16588
        Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", https://arxiv.org/abs/2506.08010
Source: github.com/nickjiang2378/test-time-registers @ 860df43

    neurons = find_register_neurons(model, images)           # any layer range, images streamed
    add_test_time_registers(model, neurons.top(50))          # in place
    measure_artefacts(model, images, threshold=...)          # before and after, at the same threshold

Shapes: B batch, N tokens, P prefix tokens (class token, registers), R registers added, C channels, K neurons edited in a layer.
A neuron is a hidden unit of an MLP, read after the non-linearity (SwiGLU: after gating), before the last linear layer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from backbones.analysis.run import batches, evaluation
from backbones.edits.registers import RULES, mlp_blocks
from backbones.vit import Part


@dataclass
class RegisterNeurons:
    """Neurons ranked by how strongly they fire at outlier tokens.

    neurons: n 2 (layer, neuron), highest score first; scores: n; images: how many had an outlier, of `seen`; threshold: the
    norm above which a token is one.
    """

    neurons: Tensor
    scores: Tensor
    images: int
    seen: int
    threshold: float

    def top(self, count: int) -> dict[int, list[int]]:
        """The first `count` neurons of positive score as layer -> neurons, as add_test_time_registers takes them."""
        found: dict[int, list[int]] = {}
        for (layer, neuron), score in zip(self.neurons[:count].tolist(), self.scores[:count].tolist()):
            if score > 0:
                found.setdefault(layer, []).append(neuron)
        return found


@torch.no_grad()
def find_register_neurons(
    model: Part,
    images: Tensor | Iterable,
    threshold: float | None = None,
    detect_layer: int = -2,
    layers: Iterable[int] | None = None,
    rule: str = "code",
    sparse_share: float | None = None,
    sparse_below: float = 0.5,
    batch_size: int = 8,
) -> RegisterNeurons:
    """Rank the neurons of a timm ViT by their activation at tokens that become outliers on these images (paper, algorithm 1).

    Args:
        model: a timm ViT.
        images: n 3 H W, or an iterable of batches (a tensor, a tuple that starts with one, or a dictionary with "image").
        threshold: a token is an outlier if the norm of the output of block detect_layer exceeds it; None for mean + 3 std over
            the patches of all images, which are then read twice. Images without one do not count.
        detect_layer: block whose output is measured, negative from the end.
        layers: which to rank, None for all.
        rule: an image's score of a neuron is its mean activation over the outliers, in magnitude ("code") or signed ("paper").
        sparse_share: the score is 0 unless at least that share of all tokens is below sparse_below; None for no such rule.
        sparse_below: see sparse_share (the authors' notebook: 0.5).
        batch_size: images taken at a time of a tensor.

    The authors' settings for DINOv2-L: threshold 150, layers up to 17, the top 50. Each batch runs twice, first for the norms,
    then for the scores, so memory does not grow with layers or images: one layer's activations at a time. Raises ValueError if
    no image has an outlier.
    """
    blocks = mlp_blocks(model)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    searched = sorted(set(range(len(blocks)) if layers is None else layers))
    if not searched or not 0 <= searched[0] <= searched[-1] < len(blocks):
        raise ValueError(f"layers must be some of 0..{len(blocks) - 1}, got {searched}")
    if threshold is None:
        if isinstance(images, Iterator):
            raise ValueError("images can be read only once; give a threshold, or a list, DataLoader or tensor of images")
        threshold = measure_artefacts(model, images, detect_layer, batch_size=batch_size).threshold
    scores: dict[int, Tensor] = {}
    seen = used = 0
    largest = 0.0
    for batch in batches(model, images, batch_size):
        norms = _token_norms(model, batch, detect_layer)
        outliers = norms > threshold
        seen, used = seen + len(batch), used + int(outliers.any(1).sum())
        largest = max(largest, norms.max().item())
        if not outliers.any():
            continue

        def add(module, inputs, layer, outliers=outliers):
            x = outlier_scores(inputs[0], outliers, rule, sparse_share, sparse_below).sum(0).double()
            scores[layer] = scores[layer] + x if layer in scores else x

        mlps: list[Part] = [block.mlp for block in blocks]
        hooks = [(mlps[layer].drop1, partial(add, layer=layer)) for layer in searched]
        _run(model, batch, searched[-1], hooks)
    if not used:
        raise ValueError(f"none of {seen} images has a token with norm above {threshold:g}; the largest is {largest:g}")
    order = [torch.stack([torch.full_like(s, layer), torch.arange(len(s), device=s.device)], 1) for layer, s in scores.items()]
    flat, pairs = torch.cat(list(scores.values())) / used, torch.cat(order).long()
    flat, ranks = flat.sort(descending=True, stable=True)
    return RegisterNeurons(pairs[ranks].cpu(), flat.float().cpu(), used, seen, threshold)


def outlier_scores(x: Tensor, outliers: Tensor, rule: str, sparse_share: float | None, sparse_below: float) -> Tensor:
    """Mean activation at the outlier tokens, by image and neuron; 0 for an image without any.

    Returns B K.

    Args:
        x: activations of a layer, B N K.
        outliers: B N bool.
        rule: see find_register_neurons.
        sparse_share: see find_register_neurons.
        sparse_below: see find_register_neurons.
    """
    x = x.float()
    share = outliers / outliers.sum(1, keepdim=True).clamp(min=1)
    scores = torch.einsum("bn,bnk->bk", share.to(x.dtype), x if rule == "paper" else x.abs())
    if sparse_share is not None:
        scores = scores * ((x < sparse_below).float().mean(1) >= sparse_share)
    return scores


@dataclass
class Artefacts:
    """How much a ViT's patches suffer: largest patch norm, share of patches above `threshold`, number of patches measured."""

    largest_norm: float
    outlier_share: float
    threshold: float
    patches: int


@torch.no_grad()
def measure_artefacts(
    model: Part, images: Tensor | Iterable, layer: int = -2, threshold: float | None = None, batch_size: int = 8
) -> Artefacts:
    """Norms of the patch tokens (class token and registers apart) at the output of block `layer`, before any final norm.

    Compare a model before and after registers at the same threshold, that of before.

    Args:
        model: a timm ViT.
        images: as in find_register_neurons.
        layer: block whose output is measured, negative from the end.
        threshold: what counts as an outlier; None for mean + 3 std of these norms, the paper's heuristic.
        batch_size: images taken at a time of a tensor.
    """
    mlp_blocks(model)
    norms = [
        _token_norms(model, batch, layer)[:, model.num_prefix_tokens :].flatten()
        for batch in batches(model, images, batch_size)
    ]
    if not norms:
        raise ValueError("no images to measure")
    flat = torch.cat(norms)
    if threshold is None:
        threshold = (flat.mean() + 3 * flat.std()).item()
    return Artefacts(flat.max().item(), (flat > threshold).float().mean().item(), threshold, flat.numel())


def _token_norms(model: Part, images: Tensor, layer: int) -> Tensor:
    """Norms of all tokens, prefix included, at the output of block `layer` (negative from the end): B N."""
    count = len(model.blocks)
    if not -count <= layer < count:
        raise ValueError(f"layer {layer} is not in {-count}..{count - 1}")
    norms: list[Tensor] = []
    last = layer % count

    def keep(module, inputs, output):
        norms.append(output.float().norm(dim=-1))

    handle = model.blocks[last].register_forward_hook(keep)
    try:
        _run(model, images, last)
    finally:
        handle.remove()
    return norms[0]


def _run(model: Part, images: Tensor, last: int, hooks: Sequence[tuple] = ()) -> None:
    """The model up to block `last` in evaluation mode, with forward pre-hooks (module, function)."""
    with evaluation(model):
        handles = [module.register_forward_pre_hook(function) for module, function in hooks]
        try:
            model.forward_intermediates(images, indices=[last], stop_early=True, intermediates_only=True, output_fmt="NLC")
        finally:
            for handle in handles:
                handle.remove()
