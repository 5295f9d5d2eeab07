"""Which heads work on a backbone: measured, not assumed."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import tensors
from .features import FeatureBackbone
from .model import at_image_size, build_head, run_head
from .table import HEADS

NARROW: dict[str, dict[str, Any]] = {  # arguments that make a head small: only shapes and gradients are checked
    "linear": {},
    "fcn": {"width": 16},
    "fpn": {"width": 16, "head_width": 16},
    "mask2former": {"width": 16, "mask_width": 8, "queries": 4, "encoder_layers": 1, "encoder_ffn": 8, "decoder_layers": 3}
    | {"decoder_ffn": 8, "heads": 2},
    "kmax": {"queries": 4, "widths": [8], "blocks": [1], "layers": [1, 1, 1], "base": 8, "ffn": 8, "heads": 2}
    | {"head_width": 8, "embedding": 8, "aux_width": 8, "aux_projections": [4, 4]},
    "polymax": {"queries": 4, "widths": [8], "blocks": [1], "layers": [1, 1, 1], "base": 8, "ffn": 8, "heads": 2}
    | {"head_width": 8, "embedding": 8},
    "monodepth2": {"widths": [8]},
    "lite_mono": {},
    "zoedepth": {"width": 16, "bins": 4, "embedding": 8},
}


def row(
    backbone: str | nn.Module, size: Sequence[int] = (128, 160), heads: Iterable[str] = tuple(HEADS), **backbone_args: Any
) -> dict[str, str]:
    """Try a backbone under heads: head -> "ok", or why not.

    Each takes one step forward and backward on two images of `size`, not square on purpose.

    Weights are random and heads narrow. A backbone that cannot be built or cannot take the size fails under every head, with
    the same sentence.
    """
    heads = list(heads)
    try:
        features = backbone if isinstance(backbone, FeatureBackbone) else None
        if features is None:
            own_size: dict[str, Any] = {} if isinstance(backbone, nn.Module) else {"img_size": tuple(size)}
            features = FeatureBackbone(backbone, **own_size, **backbone_args)
        images = torch.randn(2, 3, *size)
        maps = features.train()(images)
        # one pass through the backbone serves every head: its way back does not depend on which head asked
        results = {head: step(features, maps, head, images) for head in heads}
        torch.autograd.backward(maps, [torch.ones_like(m) for m in maps])
    except Exception as error:  # whatever a foreign model raises; the sentence is the result
        return dict.fromkeys(heads, sentence(error))
    return results


def step(features: FeatureBackbone, maps: Sequence[Tensor], head: str, images: Tensor) -> str:
    """ "ok", or why this head does not train on these maps.

    Args:
        features: the backbone.
        maps: of `features` on the images.
        head: a name of HEADS.
        images: B 3 H W.
    """
    leaves = [m.detach().requires_grad_() for m in maps]
    try:
        channels = HEADS[head].only_channels or 3
        neck, module = build_head(head, features, channels, NARROW.get(head, {"width": 16}))
        size = features.padded_size(*images.shape[-2:])
        output = run_head(neck, module, leaves, size)
        out = at_image_size(module.scores(output), size, images)
        if out.shape != (2, channels, *images.shape[-2:]):
            return f"gives {tuple(out.shape)} for images of {tuple(images.shape)}"
        torch.stack([part.square().mean() for part in [out, *tensors(output)] if part.requires_grad]).sum().backward()
    except Exception as error:
        return sentence(error)
    if not out.isfinite().all():
        return "gives values that are not finite"
    lost = [name for name, p in module.named_parameters() if p.grad is None]
    if lost or all(leaf.grad is None for leaf in leaves):
        return f"gives no gradient to {', '.join(lost) or 'the backbone'}"
    return "ok"


def sentence(error: Exception) -> str:
    """The first line of an error, with its type where it has no words."""
    text = str(error).strip().partition("\n")[0]
    return text or f"{type(error).__name__} without words"
