"""What every staged backbone of the zoo shares: stem -> stages -> norm -> head, and timm's methods written once.

Shapes: B batch, H W map height and width, C channels.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, to_2tuple
from timm.models import build_model_with_cfg, checkpoint_seq, register_model, register_notrace_function
from timm.models._features import feature_take_indices
from torch import Tensor, nn

import weights


@register_notrace_function
def check_size(x: Tensor, minimum: int) -> Tensor:
    """x, B C H W, unchanged; ValueError if a side is shorter than `minimum` pixels."""
    if min(x.shape[-2:]) < minimum:
        raise ValueError(
            f"images of {x.shape[-2]}x{x.shape[-1]} are too small: this model needs at least {minimum} pixels a side"
        )
    return x


def check_img_size(img_size: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """(height, width) of a side or a pair, pixels; ValueError if one is shorter than `minimum`."""
    height, width = to_2tuple(img_size)
    if min(height, width) < minimum:
        raise ValueError(f"img_size {img_size} is too small: this model needs at least {minimum} pixels a side")
    return height, width


class Stage(nn.Module):
    """Downsampling (Identity in a first stage), then blocks. The output is the authors' tap: before the next downsampling."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def run_blocks(self, x: Tensor) -> Tensor:
        """The blocks in order, each recomputed in the backward pass if gradient checkpointing is on."""
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run_blocks(self.downsample(x))


class StagedBackbone(nn.Module):
    """Image -> patch_embed -> stages -> norm -> head.

    A family's constructor sets `patch_embed` (NCHW image -> the family's layout), `stages` (a ModuleList of `Stage`) and
    `norm`, then calls `finish`. `nhwc` says that patch_embed, stages and norm work on B H W C; what leaves the model is
    always NCHW.
    """

    family: str  # names the converter, weights/convert/<family>.py
    nhwc = False
    min_size = 32  # pixels; the smallest image side that the family accepts
    # What features_only returns unless told: stages, or a function of the constructor's arguments.
    default_out_indices: Sequence[int] | Callable[..., Sequence[int]] = (0, 1, 2, 3)

    def finish(
        self,
        dims: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        feature_norms: Sequence[nn.Module] | None = None,
        head: nn.Module | None = None,
    ) -> None:
        """Add the classifier and what timm reads of a model.

        dims, strides: channels and pixels per side of each stage's map; feature_norms: one norm for each stage's map when it
        is returned as a feature, as the authors' dense-prediction code has (norm0..norm3 there), or None; head: for class
        tokens, with the `fc`, `reset` and `pre_logits` of timm's ClassifierHead, which is the default.
        """
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"} for i, (dim, stride) in enumerate(zip(dims, strides))
        ]
        self.feature_norms = None if feature_norms is None else nn.ModuleDict({str(i): n for i, n in enumerate(feature_norms)})
        self.head = head or ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def to_nchw(self, x: Tensor) -> Tensor:
        """The family's layout -> B C H W."""
        return x.permute(0, 3, 1, 2) if self.nhwc else x

    def embed(self, x: Tensor) -> Tensor:
        """Image -> what the first stage takes."""
        return self.patch_embed(check_size(x, self.min_size))

    def output(self, x: Tensor) -> Tensor:
        """What the stages (and the norm) leave -> what `forward_features` returns; a family with class tokens says how."""
        return self.to_nchw(x)

    def forward_features(self, x: Tensor) -> Tensor:  # B 3 H W -> B C H/32 W/32
        """The last stage's normalised map, not pooled."""
        x = self.embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.output(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """B C H W -> B num_classes, or B C when pre_logits (or without a classifier)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def feature(self, x: Tensor, index: int, norm: bool) -> Tensor:
        """Output of stage `index` as a returned feature: its own norm where there is one, else the final norm if asked."""
        if self.feature_norms is not None:
            x = self.feature_norms[str(index)](x)
        elif norm and index == len(self.stages) - 1:
            x = self.norm(x)
        return self.to_nchw(x)

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages as NCHW, in the order of `indices`; finest first if that is an int or None.

        indices: last n stages (int), stage numbers (negative from the end), or all (None); norm: final norm on the last map;
        stop_early: do not run stages after the last one asked for. Returns the maps, and before them the output of
        `forward_features` unless intermediates_only.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        x, found = self.embed(x), {}
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                found[i] = self.feature(x, i, norm)
        maps = [found[i] for i in take]
        if intermediates_only:
            return maps
        return self.output(self.norm(x) if i == len(self.stages) - 1 else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features `indices` do not need, in place; returns their absolute numbers."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if self.feature_norms is not None:
            self.feature_norms = nn.ModuleDict({str(i): self.feature_norms[str(i)] for i in sorted(take)})
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifier, on the device and in the type of the model; 0 classes give pooled features, (0, '') the map."""
        self.num_classes = num_classes
        like = next(self.parameters())
        with like.device, default_dtype(like.dtype):
            self.head.reset(num_classes, pool_type=global_pool)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups, input to output, for layer-wise decay and freezing: stem, then stages (coarse) or blocks."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:norm|feature_norms)", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()


def register_variants(cls: type[nn.Module], rows: dict[str, dict[str, Any]]) -> None:
    """Register models with timm: name -> the arguments of `cls` that make it, which those of `timm.create_model` override.

    The names also become functions `name(pretrained=False, **kwargs)` of the module of `cls`, which holds its `default_cfgs`.
    """
    for name, row in rows.items():
        setattr(sys.modules[cls.__module__], name, register_model(_entry_point(cls, name, row)))


def _entry_point(cls: type[nn.Module], name: str, row: dict[str, Any]) -> Callable[..., nn.Module]:
    """What timm calls to make model `name`, and what it knows the model by."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(cls, name, pretrained, **row | kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = cls.__module__
    entry.__doc__ = f"{cls.__name__} with {', '.join(f'{key}={value}' for key, value in row.items())}."
    return entry


def build(cls: type[nn.Module], name: str, pretrained: bool = False, device=None, dtype=None, **kwargs) -> nn.Module:
    """Model `name` of class `cls` as timm builds it: pretrained cfg, weights in any known format, features_only.

    device, dtype: where and in which type parameters are made ("meta" makes none). With pretrained, the file is the manifest's,
    fetched and its hash checked, or the one that pretrained_cfg_overlay names; weights that it lacks are a ValueError.
    img_size: side or (height, width); a family that builds no size in runs any, so there it is only checked.
    """
    if kwargs.get("features_only") and (reason := getattr(cls, "no_maps", None)):
        raise ValueError(f"{name} gives no feature maps: {reason}")
    if (img_size := kwargs.get("img_size")) is not None:
        check_img_size(img_size, cls.min_size)
    if "img_size" not in inspect.signature(cls).parameters:
        kwargs.pop("img_size", None)
    indices = cls.default_out_indices
    feature_cfg = {"out_indices": indices(**kwargs) if callable(indices) else indices, "feature_cls": "getter"}
    source = contextlib.nullcontext()
    if pretrained:
        names = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
        overlay = kwargs["pretrained_cfg_overlay"] = weights.overlay(name, *(kwargs.get(key) for key in names))
        source = weights.safe_reading(overlay.get("file"))
    complete = functools.partial(weights.complete_state_dict, features=kwargs.get("features_only", False))
    with source, torch.device(device) if device is not None else contextlib.nullcontext(), default_dtype(dtype):
        return build_model_with_cfg(cls, name, pretrained, pretrained_filter_fn=complete, feature_cfg=feature_cfg, **kwargs)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype | None):
    """New floating tensors have this type inside; None changes nothing."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def init_linear(module: nn.Module) -> None:
    """Linear weights from a normal of std 0.02 cut at two std, biases zero: the initialisation of most transformers here."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
