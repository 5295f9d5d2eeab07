"""Pictures of samples and predictions, and the files that `zoo predict` writes: one file a kind.

A task names its Show. Images are uint8 H W 3 arrays here; `to_rgb` makes one from whatever a batch holds. Nothing touches
matplotlib's global state, so it works in a thread, on a server and inside a notebook alike.
"""

from train.show.base import Names, Several, Show
from train.show.depth import DepthMaps
from train.show.labels import Labels
from train.show.masks import Masks
from train.show.normals import NormalMaps
from train.show.panoptic import Segments
from train.show.sheet import Panel, save_sheet, to_rgb

__all__ = [
    "DepthMaps",
    "Labels",
    "Masks",
    "Names",
    "NormalMaps",
    "Panel",
    "Segments",
    "Several",
    "Show",
    "save_sheet",
    "to_rgb",
]
