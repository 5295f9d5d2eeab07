"""Any timm model as a source of feature maps: B C H W, finest first.

timm 1.0.26 and newer give every architecture `forward_intermediates`, which settles taps, NHWC layouts and prefix tokens. What
timm says only in part is which image sizes a model takes: where it refuses one, that is measured once, on the meta device.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import padding
from .plugins import nearest
from .positions import follow
from .sizes import as_pair, create_backbone, measured_size, meta_image, native_size, on_meta, stated_size


class FeatureBackbone(nn.Module):
    """Feature maps of a timm model or of a module with timm's `forward_intermediates` and `feature_info`.

    Args:
        backbone: a timm name (ours too, once `import backbones` has registered them) or a module.
        pretrained: load the released weights of a name.
        in_chans: image channels (also stated for a module).
        out_indices: which entries of `feature_info`; default: the last block of each stride, at most the four coarsest (ResNet,
            VGG: strides 4, 8, 16, 32; CrossViT: 2 levels). One-scale models (plain ViTs, mixers): four evenly spaced blocks.
        img_size: (H, W) or int the model is built for, where its constructor takes one. Models that accept other sizes at run
            time still do; a model bound to one size takes images up to it (padded) and refuses larger ones. For a module: the
            size it was built for, where it does not say so itself.
        prefix_tokens: forward returns pairs (map, prefix tokens B P C) instead of maps; ValueError if the model has none. P is
            0 where a stage has none (CvT's and LIT-Ti's earlier stages).
        norm: apply the model's final norm to every map (what DINOv2's dense heads expect).
        pad_patches: a ConvNeXt pads its maps as kMaX-DeepLab's does (see heads/padding.py).
        multiple: images are padded to a multiple of it, right and bottom, also where the model takes others (Mask2Former: 32).
        exact_size: (H, W) or int: images of any other size are refused, for published networks whose authors' code runs at one
            size alone (MiDaS on Swin, SwinV2 and LeViT).
        positions: the rule by which a plain ViT resizes its positions, "dpt", "dinov2" or "mmsegmentation" (see
            heads/positions.py); default: timm's.
        taps: instead of out_indices, names of the modules whose outputs are the maps, for places that forward_intermediates
            does not reach (DPT-Hybrid: ResNet stages inside the patch embedding). Tokens are laid out at the image's aspect
            ratio.
        backbone_args: passed to `timm.create_model`; a misspelt one raises TypeError there.

    Attributes:
        model: the timm model.
        channels: of each map.
        strides: as timm states them (hints: PiT's 7, 14, 28 give 31, 16, 8 at 224).
        one_scale: all maps have one size.
        prefix_counts: prefix tokens beside each map, None with taps.
        multiple: images are padded to a multiple of it (known in full after the first image that the model refused).
        fixed_size: (H, W) or None (known in full likewise).
    """

    model: Any  # a timm model: what it has beyond a module differs from one to the next

    def __init__(
        self,
        backbone: str | nn.Module,
        pretrained: bool = False,
        out_indices: Sequence[int] | None = None,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
        prefix_tokens: bool = False,
        norm: bool = False,
        taps: Sequence[str] | None = None,
        positions: str | None = None,
        pad_patches: bool = False,
        multiple: int = 1,
        exact_size: int | Sequence[int] | None = None,
        **backbone_args: Any,
    ):
        super().__init__()
        self.exact_size = as_pair(exact_size)
        if exact_size is not None and self.exact_size is None:
            raise ValueError(f"exact_size is {exact_size!r}; give the height and width of the images")
        if isinstance(backbone, nn.Module):
            if pretrained or backbone_args:
                raise TypeError("pretrained and backbone_args describe a model to create; a module was given")
            model, self.name, built_size = backbone, type(backbone).__name__, as_pair(img_size)
        else:
            model, built_size = create_backbone(backbone, pretrained, in_chans, img_size, backbone_args)
            self.name = backbone
        if reason := getattr(model, "no_maps", None):
            raise ValueError(f"{self.name} gives no feature maps: {reason}")
        if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
            raise TypeError(f"{self.name} has no forward_intermediates and feature_info, which timm models give maps with")

        entries = feature_entries(model)
        reductions = [entry["reduction"] for entry in entries]
        if out_indices is None:
            out_indices = range(len(entries)) if taps else default_indices(reductions)
        elif taps:
            raise TypeError("out_indices and taps both say where the maps come from: give one of them")
        for index in out_indices:
            if not -len(entries) <= index < len(entries):
                raise ValueError(f"{self.name}: out_indices has {index}; the model has maps 0 to {len(entries) - 1}")
        self.out_indices = sorted(index % len(entries) for index in out_indices)
        self.channels: list[int] = [entries[i]["num_chs"] for i in self.out_indices]
        self.strides: list[int] = [reductions[i] for i in self.out_indices]
        self.one_scale = not taps and len(set(self.strides)) == 1 and len(set(reductions)) == 1
        if not isinstance(backbone, nn.Module) and hasattr(model, "prune_intermediate_layers"):
            # what no map needs is cut, so that every parameter left gets a gradient (DDP insists)
            prune: Any = model.prune_intermediate_layers
            self.out_indices = list(prune(self.out_indices, prune_norm=not norm and "norm" not in (taps or ())))
        count = getattr(model, "num_prefix_tokens", 0)
        counts = [entries[i].get("prefix_tokens", count) for i in self.out_indices]
        self.prefix_counts: list[int] | None = None if taps else counts
        self.model = model if positions is None else follow(model, positions)
        if pad_patches:
            padding.pad_patches(self.model)
        self.norm = norm
        self.taps = tuple(taps or ())
        modules = dict(model.named_modules())
        for tap in self.taps:
            if tap not in modules:
                raise ValueError(f"{self.name} has no module {tap!r}: {nearest(tap, modules)}")
        self.prefix_tokens = False
        if prefix_tokens:
            self.return_prefix_tokens()
        self._in_chans, self._built_size = in_chans, built_size
        if img_size is not None and self.exact_size is not None:
            self._check_exact(*(as_pair(img_size) or self.exact_size))
        self._measured = False
        self._taken: set[tuple[int, ...]] = set()
        if multiple < 1:
            raise ValueError(f"multiple is {multiple}: images can be padded to a multiple of a positive number")
        self._least_multiple = multiple
        self.multiple, self.fixed_size = stated_size(model)
        if self.taps:
            self._describe_taps()

    def return_prefix_tokens(self) -> None:
        """From now on return pairs (map, prefix tokens). ValueError if the model has no prefix tokens."""
        counts = self.prefix_counts or [getattr(self.model, "num_prefix_tokens", 0)]
        if not any(counts) or "return_prefix_tokens" not in inspect.signature(self.model.forward_intermediates).parameters:
            raise ValueError(
                f"{self.name} has no prefix tokens (class token, registers): use a ViT that has, or readout 'ignore'"
            )
        self.prefix_tokens = True

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size to which images of this size are padded (right and bottom). ValueError if the model cannot take them."""
        self._check_exact(height, width)
        if self.fixed_size is not None:
            if height > self.fixed_size[0] or width > self.fixed_size[1]:
                raise ValueError(
                    f"{self.name} was built for images of {self.fixed_size[0]} x {self.fixed_size[1]} and cannot take "
                    f"{height} x {width}; build it with img_size=({height}, {width}), or predict in windows of its size"
                )
            return self.fixed_size
        multiple = math.lcm(self.multiple, self._least_multiple)
        # as ONNX rounds every quotient of sizes towards zero
        return (height + multiple - 1) // multiple * multiple, (width + multiple - 1) // multiple * multiple

    def forward(self, images: Tensor) -> Sequence[Tensor]:  # B 3 H W -> [B C_i H_i W_i]
        size = (images.shape[-2], images.shape[-1])
        if images.ndim != 4 or images.shape[1] != self._in_chans:
            raise ValueError(f"{self.name} takes images B {self._in_chans} H W, got shape {tuple(images.shape)}")
        if torch.compiler.is_compiling() or size in self._taken:
            return self._intermediates(self._pad(images))
        padded = self._pad(images)
        try:
            maps = self._intermediates(padded)
        except (AssertionError, RuntimeError, ValueError) as error:
            if self._takes(*padded.shape[-2:]):
                raise  # not the size
            self.fit(*size, error)
            maps = self._intermediates(self._pad(images))
        self._taken.add(size)
        return maps

    def fit(self, height: int, width: int, error: Exception | None = None) -> tuple[int, int]:
        """Settle, on the meta device, to which size images of this size are padded; ValueError if the model cannot take them.

        timm says nowhere which sizes a model takes, so forward does this when the model refuses an image. torch.compile and
        torch.export trace one path: call it before them where the size is not known to fit. error: what was refused.
        """
        tried = self.padded_size(height, width)
        if error is None and self._takes(*tried):
            return tried
        if not self._measured:
            self._measured = True
            self.multiple, self.fixed_size = self._measure_sizes()
        if (size := self.padded_size(height, width)) == tried:
            reason = f" ({error})" if error else ""
            raise ValueError(f"{self.name} cannot take images of {height} x {width}: larger ones fit{reason}") from error
        return size

    def _check_exact(self, height: int, width: int) -> None:
        """Raises ValueError for another size than `exact_size`."""
        if self.exact_size is not None and (height, width) != self.exact_size:
            raise ValueError(
                f"{self.name} takes images of {self.exact_size[0]} x {self.exact_size[1]} alone, as its authors' code does, "
                f"and these are {height} x {width}: resize them, or build it without exact_size to train it at another size"
            )

    def _pad(self, images: Tensor) -> Tensor:
        height, width = self.padded_size(*images.shape[-2:])
        return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))

    def _intermediates(self, images: Tensor) -> list:
        if self.taps:
            return self._tapped(images)
        extra = {"return_prefix_tokens": True} if self.prefix_tokens else {}
        return self.model.forward_intermediates(
            images, indices=self.out_indices, norm=self.norm, output_fmt="NCHW", intermediates_only=True, **extra
        )

    def _tapped(self, images: Tensor) -> list:
        outputs: dict[str, Tensor] = {}
        # hooked for this call only: hooks that stay would write into the original from a copy (the average of the weights)
        handles = [
            self.model.get_submodule(tap).register_forward_hook(lambda _, __, out, tap=tap: outputs.__setitem__(tap, out))
            for tap in self.taps
        ]
        try:
            self.model.forward_features(images)
        finally:
            for handle in handles:
                handle.remove()
        return [self._as_map(outputs[tap], images.shape[-2:]) for tap in self.taps]

    def _describe_taps(self) -> None:
        """channels and strides of tapped modules, which timm does not describe."""
        size = self.fixed_size or self._built_size or native_size(self.model) or (16 * self.multiple, 16 * self.multiple)
        maps = [m if isinstance(m, Tensor) else m[0] for m in self._on_meta(*size)]
        self.channels = [m.shape[1] for m in maps]
        self.strides = [round(size[0] / m.shape[2]) for m in maps]

    def _as_map(self, x: Tensor, size: Sequence[int]) -> Tensor | tuple[Tensor, Tensor]:
        """A tapped module's output, B C H W, B H W C (by the model's output_fmt) or B N C, as forward returns it."""
        if x.ndim == 4:
            return x.permute(0, 3, 1, 2) if str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC") else x
        prefix, x = x[:, : (count := getattr(self.model, "num_prefix_tokens", 0))], x[:, count:]
        height = max(1, round((x.shape[1] * size[0] / size[1]) ** 0.5))
        if x.shape[1] % height:
            raise ValueError(f"{self.name}: {x.shape[1]} tokens do not lie on a grid like an image of {size[0]} x {size[1]}")
        x = x.mT.unflatten(2, (height, -1))
        return (x, prefix) if self.prefix_tokens else x

    def _measure_sizes(self) -> tuple[int, tuple[int, int] | None]:
        """(multiple, fixed size) of the model, measured."""
        largest = max(entry["reduction"] for entry in feature_entries(self.model))
        return measured_size(self._takes, largest, self._built_size or native_size(self.model))

    def _takes(self, height: int, width: int) -> bool:
        try:
            self._on_meta(height, width)
        except Exception:  # whatever a foreign model raises at a size it cannot take
            return False
        return True

    def _on_meta(self, height: int, width: int) -> list:
        """What _intermediates returns for one image, on the meta device: shapes without arithmetic."""
        with torch.no_grad():
            copied: Any = on_meta(self)
            return copied._intermediates(meta_image(self.model, self._in_chans, height, width))


def feature_entries(model: Any) -> list[dict]:
    """feature_info as a list of dicts, whichever of timm's two forms the model has."""
    info = model.feature_info
    return list(info.info if hasattr(info, "info") else info)


def default_indices(reductions: Sequence[int]) -> list[int]:
    """Four evenly spaced entries if all strides agree, else the last entry of each stride, at most the four coarsest."""
    count = len(reductions)
    if len(set(reductions)) == 1:
        return sorted({max(0, (i + 1) * count // 4 - 1) for i in range(4)})
    last = {reduction: i for i, reduction in enumerate(reductions)}
    return sorted(last.values())[-4:]
