"""Heads whose parameters carry their authors' names: linear, FCN, FPN, UPerNet, SegFormer (mmsegmentation), SDT, GLPN,
Mask2Former and kMaX-DeepLab (detectron2).

Only the prefix of the program around them is taken off; `weights/convert/dense.py` does whole models.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

PREFIXES = ("decode_head.", "auxiliary_head.", "depth_head.", "sem_seg_head.", "head.")
UNUSED = (
    "weighted_fusion.readout_projects.",  # stored by AnyDepth also where the class token is not read
    "criterion.",  # Mask2Former's class weights, a constant of the loss
    "pixel_mean",  # of the image, which older detectron2 stores
    "pixel_std",
)
OLD = {"predictor.static_query.": "predictor.query_feat."}  # in Mask2Former's first files


def source_format(keys: Iterable[str]) -> str:
    """ "official-dense" with a program's prefix, else "native", which is what the authors' names are here."""
    return "official-dense" if any(key.startswith(PREFIXES) for key in keys) else "native"


def to_native(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The head's names without prefix; parameters that the authors store and this head does not use are dropped."""
    own = model.state_dict().keys()
    native = {}
    for key, value in state_dict.items():
        if key not in own:
            for old, new in OLD.items():
                key = key.replace(old, new)
            key = next((key.removeprefix(p) for p in PREFIXES if key.removeprefix(p) in own), key)
        if key in own or not key.startswith(UNUSED):
            native[key] = value
    return native


def to_official(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Unchanged: the names are the authors'."""
    return dict(state_dict)
