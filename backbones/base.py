"""What every staged backbone of the zoo shares: stem -> stages -> norm -> head, and timm's methods written once.

Shapes: B batch, H W map height and width, C channels.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, to_2tuple
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weights
from backbones.arguments import check_arguments, from_authors, unknown_argument
from backbones.tracing import leaf

MAP_POOLS = ("avg", "max", "avgmax", "catavgmax", "")  # timm's, of a map
State = tuple[Tensor, Tensor | None]  # the map in the family's layout, class tokens B T C


@leaf
def check_size(x: Tensor, minimum: int) -> Tensor:
    """x, B C H W, unchanged; ValueError if a side is shorter than `minimum` pixels."""
    if x.shape[-2] < minimum or x.shape[-1] < minimum:  # each by itself: a program with open sizes keeps both bounds
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

    def run_blocks(self, x: Tensor, *others: Any) -> Tensor:
        """The blocks in order, each recomputed in the backward pass under gradient checkpointing; others go to every block."""
        for block in self.blocks:
            x = checkpoint(block, x, *others, use_reentrant=False) if self.grad_checkpointing else block(x, *others)
        return x

    def forward(self, x: Any) -> Any:  # of the map, with class tokens of the State
        return self.run_blocks(self.downsample(x))


class TokenStage(Stage):
    """A stage whose blocks see class tokens, where there are any, in front of the map's tokens: B T+N C.

    Args:
        downsample: of the map, in the family's layout.
        blocks: on tokens.
        nhwc: the layout is B H W C, else B C H W.
        class_token: channels of a class token that begins here, None for none. Tokens of an earlier stage end here.
        blocks_take_size: a block is called with the map's height and width after the tokens.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        nhwc: bool,
        class_token: int | None = None,
        blocks_take_size: bool = False,
    ):
        super().__init__(downsample, blocks)
        self.nhwc, self.blocks_take_size = nhwc, blocks_take_size
        self.cls_token: nn.Parameter | None = None
        if class_token is not None:
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, class_token), std=0.02))

    def start(self, x: Tensor, tokens: Tensor | None) -> State:
        """What an earlier stage leaves -> the map and the class tokens with which the blocks begin."""
        x = self.downsample(x)
        return x, None if self.cls_token is None else self.cls_token.expand(x.shape[0], -1, -1)

    def forward(self, x: Tensor | State) -> State:
        image, tokens = self.start(*(x if isinstance(x, tuple) else (x, None)))
        image = image if self.nhwc else image.permute(0, 2, 3, 1)
        height, width = image.shape[1:3]
        image = image.flatten(1, 2)
        if tokens is not None:
            count = tokens.shape[1]
            image = torch.cat([tokens, image], 1)
        image = self.run_blocks(image, *((height, width) if self.blocks_take_size else ()))
        if tokens is not None:
            image, tokens = image[:, count:], image[:, :count]
        image = image.unflatten(1, (height, width))
        return image if self.nhwc else image.permute(0, 3, 1, 2), tokens


class TokenHead(nn.Module):
    """Dropout and a linear layer on the first class token ("token"), or on the mean over the map ("avg"); "" pools nothing.

    Args:
        dim: channels of a token.
        num_classes: 0 for no classifier.
        tokens: how many class tokens stand in front of the map's tokens.
        pool: one of `pools`.
        drop_rate: dropout before the linear layer.
    """

    pools: tuple[str, ...] = ("token", "avg", "")

    def __init__(self, dim: int, num_classes: int, tokens: int, pool: str, drop_rate: float):
        super().__init__()
        self.dim, self.tokens, self.pool_type = dim, tokens, pool
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()
        self.reset(num_classes, pool)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """New classifier; 0 classes give the pooled vector, pool "" the tokens as they are."""
        pool = self.pool_type if pool_type is None else pool_type
        if pool not in self.pools:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, self.pools))} for this model, got {pool!r}")
        if pool == "" and num_classes:
            raise ValueError(f"{num_classes} classes need pooled features: they need global_pool='token', as '' pools nothing")
        self.pool_type = pool
        self.fc = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Any:  # B T+N C -> B num_classes
        if self.pool_type == "token":
            x = x[:, 0]
        elif self.pool_type == "avg":
            x = x[:, self.tokens :].mean(1)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class OpenNames(nn.Module):
    """A module whose load_state_dict also takes the names of the authors, and of whoever else its converter reads.

    So `timm.create_model(name, checkpoint_path=...)` loads a published file. It stays strict, and native names pass unchanged.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        converter = weights.convert.converter(self)
        foreign = not state_dict.keys() <= self.state_dict().keys()
        if converter is not None and foreign and converter.source_format(state_dict) != "native":
            state_dict = weights.convert_state_dict(dict(state_dict), self)
        return super().load_state_dict(state_dict, strict, assign)


class StagedBackbone(OpenNames):
    """Image -> patch_embed -> stages -> norm -> head.

    A family's constructor sets `patch_embed` (NCHW image -> the family's layout), `stages` (a ModuleList of `Stage`) and
    `norm`, then calls `finish`. `nhwc` says that patch_embed, stages and norm work on B H W C; a map that leaves the model is
    always NCHW. In a family with class tokens the state between stages is (map, tokens or None) and the stages are
    `TokenStage`s; what its last stage leaves is returned as a ViT returns it, tokens B T+N C with the class tokens first.
    """

    family: str  # names the converter, weights/convert/<family>.py
    nhwc = False
    min_size = 32  # pixels; the smallest image side that the family accepts
    # What features_only returns unless told: stages, or a function of the constructor's arguments.
    default_out_indices: Sequence[int] | Callable[..., Sequence[int]] = (0, 1, 2, 3)
    token_head = TokenHead
    patch_embed: nn.Module
    stages: nn.ModuleList
    norm: nn.Module
    head: Any  # with the fc, reset and pool_type of timm's ClassifierHead

    def finish(
        self,
        dims: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        global_pool: str | None,
        drop_rate: float,
        feature_norms: Sequence[nn.Module] | None = None,
        tokens: Sequence[int] | None = None,
        head: nn.Module | None = None,
    ) -> None:
        """Add the classifier and what timm reads of a model.

        Args:
            dims: channels of each stage's map.
            strides: pixels per side of each stage's map.
            num_classes: 0 for no classifier.
            global_pool: of the classifier; None for the class token where the last stage has one, else the map's mean.
            drop_rate: dropout before the classifier.
            feature_norms: one norm for each stage's map when it is returned as a feature, as the authors' dense-prediction
                code has (norm0..norm3 there), or None.
            tokens: class tokens that each stage leaves, None where the family has none.
            head: the classifier, with the `fc`, `reset` and `pool_type` of timm's ClassifierHead. Unless given it is that
                one, or `token_head` where the last stage leaves tokens.
        """
        tokens = [0] * len(dims) if tokens is None else tokens
        self.num_classes, self.num_prefix_tokens = num_classes, tokens[-1]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}", "prefix_tokens": count}
            for i, (dim, stride, count) in enumerate(zip(dims, strides, tokens))
        ]
        self.feature_norms = None if feature_norms is None else nn.ModuleDict({str(i): n for i, n in enumerate(feature_norms)})
        pool = global_pool if global_pool is not None else "token" if self.num_prefix_tokens else "avg"
        if head is not None:
            self.head = head
        elif self.num_prefix_tokens:
            self.head = self.token_head(self.num_features, num_classes, self.num_prefix_tokens, pool, drop_rate)
        else:
            check_pool(pool)
            self.head = ClassifierHead(self.num_features, num_classes, pool_type=pool, drop_rate=drop_rate)

    def to_nchw(self, x: Tensor) -> Tensor:
        """The family's layout -> B C H W."""
        return x.permute(0, 3, 1, 2) if self.nhwc else x

    def embed(self, x: Tensor) -> Tensor | State:
        """Image -> what the first stage takes."""
        return self.patch_embed(check_size(x, self.min_size))

    def final_norm(self, x: Tensor, tokens: Tensor | None) -> State:
        """The norm on the last map and on the class tokens."""
        return self.norm(x), None if tokens is None else self.norm(tokens)

    def output(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """What `forward_features` returns of the last state: B C H W, or with class tokens B T+N C."""
        if tokens is None:
            return self.to_nchw(x)
        return torch.cat([tokens, x.flatten(1, 2) if self.nhwc else x.flatten(2).mT], 1)

    def forward_features(self, x: Tensor) -> Tensor:  # B 3 H W -> B C H/32 W/32, with class tokens B T+N C
        """The last stage's normalised map, not pooled; with class tokens the tokens of both, class tokens first."""
        state = self.embed(x)
        for stage in self.stages:
            state = stage(state)
        return self.output(*self.final_norm(*as_state(state)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Output of `forward_features` -> B num_classes, or B C when pre_logits (or without a classifier)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor, list]:
        """Maps of the stages as NCHW, in the order of `indices`; finest first if that is an int or None.

        Args:
            x: images, B 3 H W.
            indices: last n stages (int), stage numbers (negative from the end), or all (None).
            return_prefix_tokens: pairs (map, class tokens B T C) instead of maps; T is 0 where a stage leaves none.
            norm: final norm on the last map and its tokens.
            stop_early: do not run stages after the last one asked for.
            output_fmt: "NCHW" alone.
            intermediates_only: the maps alone, else (output of `forward_features`, maps).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = take_indices(len(self.stages), indices)
        state, found = self.embed(x), {}
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            state = stage(state)
            if i in take:
                found[i] = self.feature(*as_state(state), i, norm)
        maps = [found[i] if return_prefix_tokens else found[i][0] for i in take]
        if intermediates_only:
            return maps
        state = as_state(state)
        return self.output(*(self.final_norm(*state) if i == len(self.stages) - 1 else state)), maps

    def feature(self, x: Tensor, tokens: Tensor | None, index: int, norm: bool) -> tuple[Tensor, Tensor]:
        """What stage `index` leaves as a returned feature: its own norm where there is one, else the final norm if asked.

        Args:
            x: the map as the stage leaves it, in the family's layout.
            tokens: class tokens B T C, None for none.
            index: of the stage.
            norm: the final norm on the last stage's, where the stage has no norm of its own.
        """
        if self.feature_norms is not None:
            x = self.feature_norms[str(index)](x)
        elif norm and index == len(self.stages) - 1:
            x, tokens = self.final_norm(x, tokens)
        x = self.to_nchw(x)
        return x, x.new_empty(x.shape[0], 0, x.shape[1]) if tokens is None else tokens

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features `indices` do not need, in place; returns their absolute numbers."""
        take, last = take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if self.feature_norms is not None:
            self.feature_norms = nn.ModuleDict({str(i): self.feature_norms[str(i)] for i in sorted(take)})
        if prune_norm:
            self.norm = nn.Identity()
            if hasattr(self.head, "norm"):  # of the pooled vector
                self.head.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifier, on the device and in the type of the model; 0 classes give pooled features, (0, '') the map."""
        if isinstance(self.head, ClassifierHead) and global_pool is not None:
            check_pool(global_pool)
        like = next(self.parameters())
        with like.device, default_dtype(like.dtype):
            self.head.reset(num_classes, pool_type=global_pool)
        self.num_classes = num_classes

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups, input to output, for layer-wise decay and freezing: stem, then stages (coarse) or blocks."""
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|pos_embed|cls_token)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:norm|feature_norms)", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()


def take_indices(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """(numbers of the features that are taken, the last of them) of `count`; timm's rule, for any sequence."""
    return feature_take_indices(count, indices if indices is None or isinstance(indices, int) else list(indices))


def as_state(x: Tensor | State) -> State:
    """(map, class tokens or None) of what a stage leaves."""
    return x if isinstance(x, tuple) else (x, None)


def check_pool(pool: str) -> None:
    """ValueError unless `pool` is a global_pool for maps without class tokens."""
    if pool not in MAP_POOLS:
        raise ValueError(f"global_pool must be one of {', '.join(map(repr, MAP_POOLS))} for this model, got {pool!r}")


def register_variants(cls: type[nn.Module], rows: Mapping[str, dict[str, Any]]) -> None:
    """Register models with timm: name -> the arguments of `cls` that make it, which those of `timm.create_model` override.

    Arguments under the authors' names are translated or answered: backbones.arguments.from_authors.

    The names also become functions `name(pretrained=False, **kwargs)` of the module of `cls`, which holds its `default_cfgs`.
    """
    for name, row in rows.items():
        setattr(sys.modules[cls.__module__], name, register_model(_entry_point(cls, name, row)))


def _entry_point(cls: type[nn.Module], name: str, row: dict[str, Any]) -> Callable[..., nn.Module]:
    """What timm calls to make model `name`, and what it knows the model by."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(cls, name, pretrained, **row | from_authors(name, cls, kwargs))

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = cls.__module__
    entry.__doc__ = f"{cls.__name__} with {', '.join(f'{key}={value}' for key, value in row.items())}."
    return entry


def build(
    cls: type[nn.Module],
    name: str,
    pretrained: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Model `name` of class `cls` as timm builds it: pretrained cfg, weights in any known format, features_only.

    Args:
        cls: class of the model.
        name: under which timm knows it.
        pretrained: load the manifest's file, fetched and its hash checked, or the one that pretrained_cfg_overlay names.
        device: where parameters are made; "meta" makes none.
        dtype: in which type they are made.
        kwargs: further arguments of `cls` and of timm; img_size is only checked where a family builds no size in.

    Raises ValueError for weights that the file lacks, TypeError for an argument that the class lacks.
    """
    family: Any = cls  # has the min_size and default_out_indices of StagedBackbone, though timm's ViT may be its base
    if kwargs.get("features_only") and (reason := getattr(cls, "no_maps", None)):
        raise ValueError(f"{name} gives no feature maps: {reason}")
    check_arguments(name, kwargs, getattr(cls, "zeros", ()))
    if (img_size := kwargs.get("img_size")) is not None:
        check_img_size(img_size, family.min_size)
    if "img_size" not in inspect.signature(cls).parameters:
        kwargs.pop("img_size", None)
    indices = family.default_out_indices
    feature_cfg = {"out_indices": indices(**kwargs) if callable(indices) else indices, "feature_cls": "getter"}
    file = None
    if pretrained:
        names = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
        overlay = kwargs["pretrained_cfg_overlay"] = weights.overlay(name, *(kwargs.get(key) for key in names))
        if file := overlay.pop("file", None):  # read here and not by timm: whatever it is, the error says so
            overlay["state_dict"] = weights.open_checkpoint(file)
    complete = functools.partial(weights.complete_state_dict, features=kwargs.get("features_only", False))
    with torch.device(device) if device is not None else contextlib.nullcontext(), default_dtype(dtype):
        try:
            model = build_model_with_cfg(
                cls, name, pretrained, pretrained_filter_fn=complete, feature_cfg=feature_cfg, **kwargs
            )
        except TypeError as error:
            raise unknown_argument(name, cls, kwargs, error) from error
    if file:  # the model remembers where its weights came from, not a second copy of them
        source: Any = weights.convert.backbone(model)
        source.pretrained_cfg |= {"state_dict": None, "file": file}
    return model


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
