"""Dense prediction heads for any timm backbone: `heads.DensePredictor("any timm name", head="upernet", out_channels=150)`.

This package knows timm and torch only. Models of the zoo are timm models once `import backbones` has registered them.
"""

from .dpt import DPT
from .fcn import FCN
from .fpn import FPN
from .glpn import GLPN
from .linear import Linear
from .mask_transformer import MaskTransformer
from .sdt import SDT
from .segformer import SegFormer
from .upernet import UPerNet

# name -> class. A head takes (channels finest first, out_channels, its own typed arguments): list of maps -> B K h w.
HEADS = {
    "linear": Linear,
    "fcn": FCN,
    "fpn": FPN,
    "upernet": UPerNet,
    "segformer": SegFormer,
    "dpt": DPT,
    "sdt": SDT,
    "glpn": GLPN,
    "mask_transformer": MaskTransformer,
}

from .features import FeatureBackbone  # noqa: E402  (after HEADS: model.py reads it)
from .model import DensePredictor, MultiPredictor, build_head  # noqa: E402

__all__ = ["HEADS", "DensePredictor", "FeatureBackbone", "MultiPredictor", "build_head"]
