"""A backbone under a head: images in, B K H W out, at the size of the images."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from .base import Head, Maps, Output
from .blocks import Pyramid, resize
from .features import FeatureBackbone
from .multilevel import MultiLevelNeck
from .plugins import nearest
from .runs import FromRun
from .table import HEADS

Neck = Pyramid | MultiLevelNeck
NECKS: dict[str, type[Neck]] = {"pyramid": Pyramid, "multilevel": MultiLevelNeck}


class Levels(Protocol):
    """What a head is built for: channels of each map, finest first, whether all have one size, and prefix tokens of each."""

    channels: list[int]
    one_scale: bool
    prefix_counts: list[int] | None


def build_head(
    head: str | type[Head],
    backbone: Levels,
    out_channels: int,
    head_args: Mapping[str, Any] | None = None,
    neck: str | None = "pyramid",
) -> tuple[Neck | None, Head]:
    """(neck or None, head) for this backbone. The neck makes a pyramid of one-scale maps for heads that need one.

    ValueError names the nearest head if the name is unknown, and says why "multilevel" does not go with a head or a backbone;
    TypeError lists the arguments the head takes if one is wrong, and
    refuses a class that does not derive from `heads.Head`.

    Args:
        head: a name of HEADS, or a class that derives from `heads.Head`.
        backbone: what its maps are like.
        out_channels: classes, or what the depth rule reads.
        head_args: further arguments of the head.
        neck: what makes the pyramid, a name of NECKS; None: nothing does, the head reads the maps as they are.
    """
    if neck is not None and neck not in NECKS:
        raise ValueError(f"neck is {neck!r}; use {', '.join(map(repr, NECKS))} or None")
    if isinstance(head, str):
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}: {nearest(head, HEADS)}")
        name, cls = head, HEADS[head]
    elif isinstance(head, type) and issubclass(head, Head):
        name, cls = head.__name__, head
    else:
        raise TypeError(f"a head is a name of heads.HEADS or a class that derives from heads.Head, got {head!r}")
    args = dict(head_args or {})
    valid = [p for p in inspect.signature(cls).parameters if p not in ("channels", "out_channels")]
    for key in args:
        if key not in valid:
            raise TypeError(f"head {name!r} has no argument {key!r}: {nearest(key, valid)}")
    if cls.takes_one_scale:
        args.setdefault("one_scale", backbone.one_scale)
    if cls.takes_prefix_counts:
        args.setdefault("prefix_counts", backbone.prefix_counts)
    made: Neck | None = None
    if neck == "multilevel":
        made = multilevel(backbone, cls)
    elif neck is not None and cls.pyramid and backbone.one_scale:
        made = NECKS[neck](backbone.channels)
    make: Any = cls  # arguments are each head's own
    return made, make(made.channels if made else backbone.channels, out_channels, **args)


def multilevel(backbone: Any, head: type[Head]) -> MultiLevelNeck:
    """mmsegmentation's neck on maps of one size. ValueError for maps of several, and for a head that reads no pyramid."""
    if len(set(strides := getattr(backbone, "strides", ()))) > 1:
        raise ValueError(f"neck 'multilevel' is for maps of one size, and these have strides {', '.join(map(str, strides))}")
    if not head.pyramid:
        raise ValueError(f"neck 'multilevel' makes a pyramid, which {head.__name__} does not read")
    return MultiLevelNeck(backbone.channels)


@dataclass
class Necked:
    """What a head is built for behind a neck."""

    channels: list[int]
    one_scale: bool = False
    prefix_counts: list[int] | None = None


class DensePredictor(FromRun):
    """A backbone and a head: images B 3 H W -> scores B K H W in evaluation, named outputs while training.

    The one resize to the images' size happens here; heads work at the sizes of their maps.

    Args:
        backbone: timm name, module, or a FeatureBackbone.
        head: a name of `heads.HEADS`, or a class that derives from `heads.Head`.
        out_channels: K: classes, or what the depth rule reads.
        head_args: the head's own arguments.
        pretrained: load the backbone's released weights.
        backbone_args: of `timm.create_model`, and `out_indices`, `norm` of FeatureBackbone.
        aux_head: a second head on the same maps (usually "fcn") that only training uses; it adds nothing to inference.
        aux_args: the second head's own arguments.
        in_chans: image channels.
        img_size: (H, W) the images will have; only models bound to one size need it.
        neck: of a plain ViT under heads that read a pyramid: "pyramid" (ViTDet's), "multilevel" (mmsegmentation's UPerNet; the
            auxiliary head reads its maps too), or None: the maps as they are.
    """

    family = "dense"

    def __init__(
        self,
        backbone: str | nn.Module,
        head: str | type[Head],
        out_channels: int,
        head_args: Mapping[str, Any] | None = None,
        pretrained: bool = False,
        backbone_args: Mapping[str, Any] | None = None,
        aux_head: str | type[Head] | None = None,
        aux_args: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
        neck: str | None = "pyramid",
    ):
        super().__init__()
        self.backbone = as_features(backbone, pretrained, backbone_args, in_chans, img_size)
        self.out_channels = out_channels
        self.neck, self.head = build_head(head, self.backbone, out_channels, head_args, neck)
        self.aux_neck: Neck | None = None
        self.aux_head: Head | None = None
        self.shared_neck = isinstance(self.neck, MultiLevelNeck)
        if aux_head is not None:
            levels: Levels = Necked(self.neck.channels) if isinstance(self.neck, MultiLevelNeck) else self.backbone
            own = None if self.shared_neck else neck
            self.aux_neck, self.aux_head = build_head(aux_head, levels, out_channels, aux_args, own)
        elif aux_args:
            raise TypeError(f"aux_args {sorted(aux_args)} without an aux_head")
        want_prefix_tokens(self.backbone, [head for head in (self.head, self.aux_head) if head is not None])

    def forward(self, images: Tensor, *, named: bool = False) -> Tensor | dict[str, Any]:
        """In evaluation the head's scores B K H W at the size of the images; while training, or if `named`, what `outputs`
        gives.
        """
        if self.training or named:
            return self.outputs(images)
        return scores(self.backbone, self.neck, self.head, self.backbone(images), images)

    def outputs(self, images: Tensor) -> dict[str, Any]:
        """{"main": .., "aux": ..}, in training and evaluation alike; "aux" only with an auxiliary head.

        A head that is trained in its earlier layers too has their maps in "layers", a list of such as "main".

        A head's one map is B K H W at the size of the images. Named outputs stay as the head returned them, at the head's own
        sizes, because a loss may sample points of a mask or want a disparity at each size; "size" among them says what image
        size their maps cover: (H, W) of the images after the backbone's padding, right and bottom.
        """
        maps, neck = self.backbone(images), self.neck
        if neck is not None and self.shared_neck:
            maps, neck = neck(without_prefix(maps)), None
        named = outputs(self.backbone, neck, self.head, maps, images)
        if self.aux_head is not None:
            named["aux"] = outputs(self.backbone, self.aux_neck, self.aux_head, maps, images)["main"]
        return named

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The head's last layer (or layers), which depends on the number of classes."""
        return self.head.get_classifier()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return no_weight_decay(self.backbone)

    def group_matcher(self, coarse: bool = False) -> dict:
        return group_matcher(self.backbone, coarse)


class MultiPredictor(FromRun):
    """One backbone, several heads: images B 3 H W -> {name: B K H W} in evaluation.

    While training every name has the outputs of its head as DensePredictor gives them: {name: {"main": ..}}.

    Args:
        backbone: timm name, module, or a FeatureBackbone.
        heads: name -> (head, out_channels, head arguments): {"mask": ("fpn", 19, {}), "depth": ("dpt", 1, {"width": 128})}.
        pretrained: load the backbone's released weights.
        backbone_args: of `timm.create_model`, and `out_indices`, `norm` of FeatureBackbone.
        in_chans: image channels.
        img_size: (H, W) the images will have; only models bound to one size need it.
    """

    family = "dense"

    def __init__(
        self,
        backbone: str | nn.Module,
        heads: Mapping[str, tuple[str | type[Head], int, Mapping[str, Any] | None]],
        pretrained: bool = False,
        backbone_args: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
    ):
        super().__init__()
        if not heads:
            raise ValueError("MultiPredictor needs a head, e.g. heads={'mask': ('fpn', 19, {}), 'depth': ('dpt', 1, {})}")
        self.backbone = as_features(backbone, pretrained, backbone_args, in_chans, img_size)
        self.heads, self.necks = nn.ModuleDict(), nn.ModuleDict()
        built: list[Head] = []
        for name, (head, out_channels, args) in heads.items():
            neck, module = build_head(head, self.backbone, out_channels, args)
            self.heads[name], self.necks[name] = module, neck or nn.Identity()
            built.append(module)
        want_prefix_tokens(self.backbone, built)

    def forward(self, images: Tensor) -> dict[str, Any]:
        maps = self.backbone(images)
        run = outputs if self.training else scores
        return {name: run(self.backbone, self.necks[name], head, maps, images) for name, head in self.heads.items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return no_weight_decay(self.backbone)

    def group_matcher(self, coarse: bool = False) -> dict:
        return group_matcher(self.backbone, coarse)


def as_features(
    backbone: str | nn.Module,
    pretrained: bool,
    backbone_args: Mapping[str, Any] | None,
    in_chans: int,
    img_size: int | Sequence[int] | None,
) -> FeatureBackbone:
    """The backbone as a FeatureBackbone.

    Args:
        backbone: a timm name or a module.
        pretrained: load the released weights of a name.
        backbone_args: further arguments of FeatureBackbone and the model.
        in_chans: image channels.
        img_size: side, or (H, W), that the model is built for.
    """
    if isinstance(backbone, FeatureBackbone):
        if pretrained or backbone_args or img_size is not None:
            raise TypeError("pretrained, img_size and backbone_args describe a backbone to create; a FeatureBackbone was given")
        return backbone
    return FeatureBackbone(backbone, pretrained, in_chans=in_chans, img_size=img_size, **(backbone_args or {}))


def want_prefix_tokens(backbone: FeatureBackbone, heads: Iterable[Head]) -> None:
    if any(head.prefix_tokens for head in heads):
        backbone.return_prefix_tokens()


def without_prefix(maps: Maps) -> list[Tensor]:
    """Maps alone, of maps or of pairs (map, prefix tokens)."""
    return [m if isinstance(m, Tensor) else m[0] for m in maps]


def run_head(neck: nn.Module | None, head: Head, maps: Maps, size: Sequence[int]) -> Output:
    """A head's output on the backbone's maps.

    The prefix tokens are left out where the head does not ask for them.

    Args:
        neck: makes a pyramid of the maps, or None.
        head: the head.
        maps: of the backbone on padded images.
        size: (H, W) of these images, which named outputs carry as "size".
    """
    if not head.prefix_tokens:
        maps = without_prefix(maps)
    output = head(neck(maps) if neck is not None else maps)
    return output if isinstance(output, Tensor) else {**output, "size": tuple(size)}


def scores(backbone: FeatureBackbone, neck: nn.Module | None, head: Any, maps: Maps, images: Tensor) -> Tensor:
    """Maps -> B K H W at the size of the images.

    Args:
        backbone: that made the maps; it knows the padding.
        neck: makes a pyramid of the maps, or None.
        head: the head.
        maps: of the backbone.
        images: B C H W, whose size the scores get.
    """
    size = backbone.padded_size(*images.shape[-2:])
    return at_image_size(head.scores(run_head(neck, head, maps, size)), size, images)


def outputs(backbone: FeatureBackbone, neck: nn.Module | None, head: Any, maps: Maps, images: Tensor) -> dict[str, Any]:
    """Maps -> {"main": ..}, as `DensePredictor.outputs` describes it.

    Args:
        backbone: that made the maps; it knows the padding.
        neck: makes a pyramid of the maps, or None.
        head: the head.
        maps: of the backbone.
        images: B C H W.
    """
    size = backbone.padded_size(*images.shape[-2:])
    output = run_head(neck, head, maps, size)
    if head.returns_layers:
        assert not isinstance(output, Tensor)  # said by the head
        layers = [at_image_size(layer, size, images) for layer in output["layers"]]
        return {"main": at_image_size(output["map"], size, images), "layers": layers}
    return {"main": at_image_size(output, size, images) if isinstance(output, Tensor) else output}


def at_image_size(x: Tensor, padded_size: Sequence[int], images: Tensor) -> Tensor:
    """Resize a map B K h w that covers the padded images to their size, and crop it to the size of the images."""
    height, width = images.shape[-2:]
    return resize(x, like=padded_size)[..., :height, :width]


def no_weight_decay(backbone: FeatureBackbone) -> set[str]:
    names: set[str] = getattr(backbone.model, "no_weight_decay", set)()
    return {f"backbone.model.{name}" for name in names}


def group_matcher(backbone: FeatureBackbone, coarse: bool) -> dict:
    """timm's layer grouping of the backbone under the names it has here; neck and heads fall into the last group."""
    matcher = getattr(backbone.model, "group_matcher", None)
    if matcher is None:
        raise ValueError(f"{backbone.name} has no group_matcher, so no learning rate per layer: set layer_decay to null")

    def prefixed(pattern):
        if isinstance(pattern, str):  # also of alternatives, "^cls_token|pos_embed", and not of the ^ in [^a]
            return r"^backbone\.model\.(?:" + re.sub(r"(?<![\[\\])\^", "", pattern) + ")"
        return type(pattern)(prefixed(p) if isinstance(p, (str, tuple, list)) else p for p in pattern)

    return {group: prefixed(pattern) for group, pattern in matcher(coarse=coarse).items()}
