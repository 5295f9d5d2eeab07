"""docs/data.md: the trees that it draws are what the readers open."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train import config
from train.data import open_split
from train.reading import parse

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
# a tree and the configuration that follows it; these three show files inside files, which tests/data/test_readers.py makes
TREES = {
    tree.split("\n")[0]: (tree, text)
    for tree, text in re.findall(r"```text\n(.*?)```\n\n```yaml\n(.*?)```", TEXT, re.DOTALL)
    if tree.split("\n")[0] not in ("cifar", "shards")
}
SIZE = 376, 1241  # of a KITTI frame; every other image is small
LISTS = {
    "TrainSplit.txt": "sequence1\n",
    "TestSplit.txt": "sequence3\n",
    "intrinsics.txt": "20 20 15.5 11.5\n",
    **dict.fromkeys(
        ("kitti_train.txt", "kitti_test.txt"),
        "2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000005.png "
        "2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02/0000000005.png 721.5\n",
    ),
}
MASKS = re.compile(r"annot|masks/|_mask|labelIds")
DEPTHS = re.compile(r"depths/|_depth|\.depth|proj_depth")


def make(root: Path, tree: str) -> None:
    """The files of a drawn tree, with something in them that a reader accepts."""
    for name in re.findall(r"[├└]── (\S+)", tree):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = SIZE if tree.startswith("kitti\n") else (24, 32)
        if path.suffix == ".txt":
            path.write_text(LISTS[path.name])
        elif MASKS.search(name):
            Image.fromarray(np.full((height, width), 7 if "labelIds" in name else 1, np.uint8)).save(path)
        elif DEPTHS.search(name):
            Image.fromarray(np.full((height, width), 1500, np.uint16)).save(path)
        else:
            Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(path)


@pytest.mark.parametrize("name", TREES)
def test_the_readers_open_the_trees(tmp_path, name):
    tree, text = TREES[name]
    make(tmp_path, tree)
    loaded = config.resolve(parse(text, "docs/data.md") | {"optim": {"steps": 1}})
    loaded.data.root = str(tmp_path)
    task = config.build_task(loaded)
    for split in ("train", "val"):
        opened = open_split(loaded.data, split, task.targets(split))
        task.check(opened)
        assert len(opened) and set(task.targets(split)) <= set(opened[0])
