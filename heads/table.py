"""The heads by the name that a config or a call gives them."""

from .base import Head
from .disparity import LiteMonoDecoder, Monodepth2
from .dpt import DPT
from .fcn import FCN
from .fpn import FPN
from .glpn import GLPN
from .kmax import KMax
from .linear import Linear
from .mask2former import Mask2Former
from .plugins import Table
from .polymax import PolyMax
from .sdt import SDT
from .segformer import SegFormer
from .upernet import UPerNet
from .zoedepth import ZoeDepth

HEADS: Table[type[Head]] = Table(
    "backbone_zoo.heads",
    Head,
    {
        "linear": Linear,
        "fcn": FCN,
        "fpn": FPN,
        "upernet": UPerNet,
        "segformer": SegFormer,
        "dpt": DPT,
        "sdt": SDT,
        "glpn": GLPN,
        "mask2former": Mask2Former,
        "kmax": KMax,
        "polymax": PolyMax,
        "monodepth2": Monodepth2,
        "lite_mono": LiteMonoDecoder,
        "zoedepth": ZoeDepth,
    },
)
