"""Tasks by the name a config gives them; the interface is in train/tasks/base.py."""

from heads.plugins import Table
from train.tasks.base import Task
from train.tasks.classification import Classification
from train.tasks.depth import Depth
from train.tasks.mask_classification import MaskClassification
from train.tasks.multitask import MultiTask
from train.tasks.normals import Normals
from train.tasks.panoptic import Panoptic
from train.tasks.segmentation import Segmentation
from train.tasks.selfsup_depth import SelfSupDepth
from train.tasks.sparsifiner import SparsifinerPhase

TASKS: Table[type[Task]] = Table(
    "backbone_zoo.tasks",
    Task,
    {
        "classification": Classification,
        "segmentation": Segmentation,
        "depth": Depth,
        "mask_classification": MaskClassification,
        "normals": Normals,
        "panoptic": Panoptic,
        "multitask": MultiTask,
        "selfsup_depth": SelfSupDepth,
        "sparsifiner": SparsifinerPhase,
    },
)

__all__ = ["TASKS", "Task"]
