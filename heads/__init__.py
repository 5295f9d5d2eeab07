"""Dense prediction heads for any timm backbone: `heads.DensePredictor("any timm name", head="upernet", out_channels=150)`.

This package knows timm and torch only. Models of the zoo are timm models once `import backbones` has registered them.
"""

from .base import Head
from .features import FeatureBackbone
from .model import DensePredictor, MultiPredictor, build_head
from .runs import RunModel
from .table import HEADS

__all__ = ["HEADS", "RunModel", "DensePredictor", "FeatureBackbone", "Head", "MultiPredictor", "build_head"]
