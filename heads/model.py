"""A backbone under a head: images in, B K H W out, at the size of the images."""

import difflib
import inspect
import re
from collections.abc import Sequence

from torch import Tensor, nn

from . import HEADS
from .blocks import Pyramid, resize
from .features import FeatureBackbone


def build_head(
    head: str | type[nn.Module], backbone: FeatureBackbone, out_channels: int, head_args: dict | None = None
) -> tuple[nn.Module | None, nn.Module]:
    """(neck or None, head) for this backbone. The neck makes a pyramid of one-scale maps for heads that need one.

    ValueError names the nearest head if the name is unknown; TypeError lists the arguments the head takes if one is wrong.
    """
    if isinstance(head, str):
        if head not in HEADS:
            near = difflib.get_close_matches(head, HEADS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the heads are {', '.join(sorted(HEADS))}"
            raise ValueError(f"unknown head {head!r}: {hint}")
        name, head = head, HEADS[head]
    else:
        name = head.__name__
    args = dict(head_args or {})
    valid = [p for p in inspect.signature(head).parameters if p not in ("channels", "out_channels")]
    for key in args:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(valid)}"
            raise TypeError(f"head {name!r} has no argument {key!r}: {hint}")
    if "one_scale" in valid:
        args.setdefault("one_scale", backbone.one_scale)
    neck = Pyramid(backbone.channels) if getattr(head, "pyramid", False) and backbone.one_scale else None
    return neck, head(neck.channels if neck else backbone.channels, out_channels, **args)


class DensePredictor(nn.Module):
    """images B 3 H W -> B K H W. The one resize to the images' size happens here; heads work at the sizes of their maps.

    backbone: timm name, module, or a FeatureBackbone; head: a name of `heads.HEADS` or a head class; out_channels: K.
    head_args: the head's own arguments; backbone_args: of `timm.create_model`, and `out_indices`, `norm` of FeatureBackbone.
    aux_head, aux_args: a second head on the same maps (usually "fcn") that only training uses; it adds nothing to inference.
    img_size: (H, W) the images will have; only models bound to one size need it.
    """

    family = "dense"

    def __init__(
        self,
        backbone: str | nn.Module,
        head: str | type[nn.Module],
        out_channels: int,
        head_args: dict | None = None,
        pretrained: bool = False,
        backbone_args: dict | None = None,
        aux_head: str | type[nn.Module] | None = None,
        aux_args: dict | None = None,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
    ):
        super().__init__()
        self.backbone = as_features(backbone, pretrained, backbone_args, in_chans, img_size)
        self.out_channels = out_channels
        self.neck, self.head = build_head(head, self.backbone, out_channels, head_args)
        self.aux_neck, self.aux_head = None, None
        if aux_head is not None:
            self.aux_neck, self.aux_head = build_head(aux_head, self.backbone, out_channels, aux_args)
        elif aux_args:
            raise TypeError(f"aux_args {sorted(aux_args)} without an aux_head")
        want_prefix_tokens(self.backbone, [self.head, self.aux_head])

    def forward(self, images: Tensor, aux: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """B K H W; with aux=True and an auxiliary head the pair (main, auxiliary), both B K H W."""
        maps = self.backbone(images)
        main = predict(self.backbone, self.neck, self.head, maps, images)
        if not aux or self.aux_head is None:
            return main
        return main, predict(self.backbone, self.aux_neck, self.aux_head, maps, images)

    def get_classifier(self) -> nn.Module:
        """The head's last layer, which depends on the number of classes."""
        return self.head.get_classifier()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return no_weight_decay(self.backbone)

    def group_matcher(self, coarse: bool = False) -> dict:
        return group_matcher(self.backbone, coarse)


class MultiPredictor(nn.Module):
    """One backbone, several heads: images B 3 H W -> {name: B K H W}.

    heads: {"mask": ("upernet", 150, {}), "depth": ("dpt", 1, {"width": 128})}: name -> (head, out_channels, head arguments).
    """

    family = "dense"

    def __init__(
        self,
        backbone: str | nn.Module,
        heads: dict[str, tuple[str | type[nn.Module], int, dict | None]],
        pretrained: bool = False,
        backbone_args: dict | None = None,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
    ):
        super().__init__()
        if not heads:
            raise ValueError("MultiPredictor needs a head, e.g. heads={'mask': ('fpn', 19, {}), 'depth': ('dpt', 1, {})}")
        self.backbone = as_features(backbone, pretrained, backbone_args, in_chans, img_size)
        self.heads, self.necks = nn.ModuleDict(), nn.ModuleDict()
        for name, (head, out_channels, args) in heads.items():
            neck, self.heads[name] = build_head(head, self.backbone, out_channels, args)
            self.necks[name] = neck or nn.Identity()
        want_prefix_tokens(self.backbone, self.heads.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(images)
        return {name: predict(self.backbone, self.necks[name], head, maps, images) for name, head in self.heads.items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return no_weight_decay(self.backbone)

    def group_matcher(self, coarse: bool = False) -> dict:
        return group_matcher(self.backbone, coarse)


def as_features(backbone, pretrained, backbone_args, in_chans, img_size) -> FeatureBackbone:
    if isinstance(backbone, FeatureBackbone):
        if pretrained or backbone_args or img_size is not None:
            raise TypeError("pretrained, img_size and backbone_args describe a backbone to create; a FeatureBackbone was given")
        return backbone
    return FeatureBackbone(backbone, pretrained, in_chans=in_chans, img_size=img_size, **(backbone_args or {}))


def want_prefix_tokens(backbone: FeatureBackbone, heads) -> None:
    if any(getattr(head, "prefix_tokens", False) for head in heads):
        backbone.return_prefix_tokens()


def predict(backbone: FeatureBackbone, neck: nn.Module | None, head: nn.Module, maps: list, images: Tensor) -> Tensor:
    """Maps -> B K H W at the size of the images: the head's output resized to the padded size, then cropped."""
    if not getattr(head, "prefix_tokens", False):
        maps = [m if isinstance(m, Tensor) else m[0] for m in maps]
    out = head(neck(maps) if neck is not None else maps)
    height, width = images.shape[-2:]
    return resize(out, like=backbone.padded_size(height, width))[..., :height, :width]


def no_weight_decay(backbone: FeatureBackbone) -> set[str]:
    names = getattr(backbone.model, "no_weight_decay", set)()
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
