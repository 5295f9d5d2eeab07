"""Our backbones and heads in a configuration of mmsegmentation 1.2.2, without compiled mmcv.

    custom_imports = dict(imports=["backbones", "heads.mmseg"])
    model = dict(
        type="EncoderDecoder",
        backbone=dict(type="ZooBackbone", backbone="nat_mini", pretrained=True),
        decode_head=dict(type="ZooHead", head="upernet", in_channels=[64, 128, 256, 512], num_classes=150),
        auxiliary_head=dict(type="ZooHead", head="fcn", in_channels=[64, 128, 256, 512], num_classes=150,
                            loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4)),
        ...)

ZooBackbone also serves mmsegmentation's own heads, and ZooHead mmsegmentation's own backbones. Checkpoints that mmengine wrote
load again. Nothing of the zoo imports this file, but for `zoo bench heads` where mmsegmentation is installed. The packages that
work together on today's torch: `pip install "backbone-zoo[mmseg]"`.
"""

import importlib.machinery
import importlib.util
import pickle
import sys
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .features import FeatureBackbone
from .model import build_head
from .table import HEADS

NEEDED = ("mmseg", "mmengine", "mmcv", "ftfy", "regex")


class NotCompiled(types.ModuleType):
    """Stands in for `mmcv._ext`, the compiled part of mmcv that mmcv-lite lacks: every name is an op that refuses the call.

    `mmseg.models` imports `mmcv.ops`, which looks its ops up here, whether or not a model uses them. What `mmcv.ops` writes in
    plain torch (point_sample, criss-cross attention) works as it is.
    """

    def __init__(self, name: str):
        super().__init__(name, "Refuses every op: mmcv is not compiled here.")
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)  # importlib.util.find_spec raises for a module without one

    def __getattr__(self, op: str) -> Callable:
        if op.startswith("__"):
            raise AttributeError(op)

        def refuse(*args, **kwargs):
            raise NotImplementedError(
                f"mmcv's op {op!r} needs compiled mmcv, and mmcv-lite is installed: use a model or a loss without it, "
                "or build mmcv 2.1.0 with its ops"
            )

        return refuse


def stand_in() -> None:
    """Lets `mmseg.models` be imported with mmcv-lite; nothing happens where mmcv is compiled.

    ImportError if a package is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"heads.mmseg needs {', '.join(missing)}: pip install backbone-zoo[mmseg]")
    if importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = NotCompiled("mmcv._ext")


stand_in()
try:
    import numpy as np
    from mmengine.logging import HistoryBuffer
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules
except ImportError as error:  # a package of a package, or versions that do not go together
    raise ImportError(f"mmsegmentation cannot be imported ({error}): pip install backbone-zoo[mmseg]") from error

register_all_modules(init_default_scope=False)


def statistic(owner: type, name: str) -> Callable:
    """What mmengine's checkpoints use getattr for, and nothing else: a method of HistoryBuffer by its name."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"a checkpoint asks for {name!r} of {owner!r}, which mmengine's own never do")
    return getattr(HistoryBuffer, name)


def allow_history() -> None:
    """Lets torch.load(weights_only=True), the default since torch 2.6, read the checkpoints mmengine 0.10.7 writes.

    They hold the logged numbers: HistoryBuffers of numpy arrays. Without this neither resuming nor tools/test.py works.
    """
    array, scalar = np.zeros(1), np.float64(0)
    kinds = [type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64")]
    functions = [array.__reduce__()[0], scalar.__reduce__()[0]]
    torch.serialization.add_safe_globals(
        [HistoryBuffer, np.ndarray, np.dtype, *kinds, *functions, (statistic, "builtins.getattr")]
    )


allow_history()


@MODELS.register_module()
class ZooBackbone(FeatureBackbone):
    """FeatureBackbone, arguments included, as a backbone of mmsegmentation: B 3 H W -> tuple of B C_i H_i W_i, finest first.

    Raises ValueError for images that it would have to pad: mmsegmentation's heads know only the size of the image, and would
    stretch the padded prediction over it.
    """

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = super().forward(images)
        size = tuple(images.shape[-2:])
        if (padded := self.padded_size(*size)) != size:
            raise ValueError(
                f"{self.name} pads images of {size[0]} x {size[1]} to {padded[0]} x {padded[1]}, which mmsegmentation's heads "
                f"do not undo: let the data preprocessor pad, size={padded} in training and test_cfg=dict(size={padded}), or "
                "predict in windows of that size"
            )
        return tuple(maps)


@MODELS.register_module()
class ZooHead(BaseDecodeHead):
    """A head of `heads.HEADS` with mmsegmentation's losses, samplers and prediction.

    Args:
        head: its name.
        in_channels: of the maps, finest first.
        num_classes: of the data, void not counted.
        head_args: its own arguments; dropout and widths are among them, so none of BaseDecodeHead's are taken.
        in_index: which of the backbone's maps they are, by default the first ones in order.
        one_scale: all maps have one size (plain ViTs): a head that needs a pyramid gets one made of them.
        loss_decode, ignore_index, sampler: as in BaseDecodeHead.
        align_corners: of the resize to the label's size.
        out_channels, threshold: as in BaseDecodeHead.
        init_cfg: as in BaseDecodeHead; None: the head keeps its own initialisation.
    """

    def __init__(
        self,
        head: str,
        in_channels: Sequence[int],
        num_classes: int,
        head_args: dict | None = None,
        in_index: Sequence[int] | None = None,
        one_scale: bool = False,
        loss_decode: dict | Sequence[dict] | None = None,
        ignore_index: int | None = 255,
        sampler: dict | None = None,
        align_corners: bool = False,
        out_channels: int | None = None,
        threshold: float | None = None,
        init_cfg: dict | list | None = None,
    ):
        in_channels = list(in_channels)
        super().__init__(
            in_channels,
            channels=1,  # of conv_seg, which goes below: our heads end with their own
            num_classes=num_classes,
            dropout_ratio=0,
            in_index=list(range(len(in_channels)) if in_index is None else in_index),
            input_transform="multiple_select",
            loss_decode=loss_decode or {"type": "CrossEntropyLoss"},
            ignore_index=ignore_index,
            sampler=sampler,
            align_corners=align_corners,
            out_channels=out_channels,
            threshold=threshold,
            init_cfg=init_cfg,
        )
        del self.conv_seg
        if head in HEADS and HEADS[head].returns_names:
            raise ValueError(
                f"head {head!r} returns named outputs, which mmsegmentation's losses cannot read: train it with the zoo's tasks"
            )
        maps = types.SimpleNamespace(
            channels=in_channels, one_scale=one_scale, prefix_counts=None
        )  # what build_head reads of a backbone
        self.pyramid, self.head = build_head(head, maps, self.out_channels, head_args)

    def forward(self, inputs: Sequence) -> Tensor:  # [B C_i H_i W_i], or pairs with prefix tokens -> B K h w
        maps = self._transform_inputs(inputs)
        if not self.head.prefix_tokens:
            maps = [m if isinstance(m, Tensor) else m[0] for m in maps]
        elif any(isinstance(m, Tensor) for m in maps):
            raise ValueError("this head reads the class token: give the ZooBackbone prefix_tokens=True")
        return self.head(self.pyramid(maps) if self.pyramid is not None else maps)
