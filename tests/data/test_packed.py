"""Tar shards and Hugging Face data sets: what they hold, in the order of any other data, and errors that name the shard."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from train import loader
from train.data import DATASETS
from train.data.packed import shard_files
from train.schema import AugmentConfig
from train.transforms import Seeded, build_transform

SIZE = (12, 16)


def encoded(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def sample(i):
    """Members of sample i: every value tells which one it is."""
    generator = np.random.default_rng(i)
    depth = io.BytesIO()
    np.save(depth, np.full(SIZE, i / 4, np.float32))
    return {
        "jpg": encoded(generator.integers(0, 255, (*SIZE, 3), np.uint8), "JPEG"),
        "cls": str(i % 3).encode(),
        "mask.png": encoded(np.full(SIZE, i % 5, np.uint8)),
        "depth.png": encoded(np.full(SIZE, 1000 + i, np.uint16)),
        "depth.npy": depth.getvalue(),
        "json": b"{}",
    }


def write(path, numbers, leave_out=None, mode="w"):
    with tarfile.open(path, mode) as tar:
        for i in numbers:
            for ending, content in sample(i).items():
                if (i, ending) != leave_out:
                    info = tarfile.TarInfo(f"part/{i:04}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def root(tmp_path):
    """Two training shards of 7 and 4 samples, one validation shard of 3."""
    write(tmp_path / "train-000.tar", range(7))
    write(tmp_path / "train-001.tar", range(7, 11))
    write(tmp_path / "val-000.tar", range(3))
    return tmp_path


def shards(root, split="train", targets=("label", "mask", "depth"), **arguments):
    return DATASETS["shards"](root, split, targets, **{"classes": 5, **arguments})


def test_a_sample_has_all_its_targets(root):
    data = shards(root, train_shards="train-{000..001}.tar")
    assert (len(data), len(shards(root, "val"))) == (11, 3)
    for i, got in enumerate(data):
        assert got["image"].shape == (3, *SIZE) and got["label"] == i % 3
        assert got["mask"].unique().tolist() == [i % 5]
        assert got["depth"].unique().tolist() == pytest.approx([1 + i / 1000])
        assert got["path"].endswith(f"train-00{int(i > 6)}.tar#part/{i:04}")
    assert shards(root, targets=("depth",), depth="depth.npy", depth_divisor=1)[4]["depth"].unique().tolist() == [1.0]
    moved = shards(root, targets=("mask",), id_map={0: 255, 1: 0, 2: 1, 3: 2, 4: 3}, classes=4)
    assert [int(got["mask"][0, 0]) for got in moved][:6] == [255, 0, 1, 2, 3, 255]


def test_each_sample_goes_to_one_process_in_the_same_order_with_any_workers(root):
    def drawn(start, world, rank, workers, seed=0):
        data = shards(root, targets=("mask",))
        transform = build_transform(True, ("mask",), SIZE, (0.5,) * 3, (0.2,) * 3, AugmentConfig(hflip=0.5, color_jitter=0.5))
        order = loader.Order(len(data), seed)
        steps = loader.Steps(order, start, 11, 4, loader.share(4, world, rank))
        return list(loader.training_batches(Seeded(data, transform, seed), steps, workers, pin=False))

    whole = drawn(0, 1, 0, workers=0)
    paths = [path for batch in whole for path in batch["path"]]
    for number in range(4):  # 11 steps of 4 images are four passes over 11 samples
        assert len(set(paths[11 * number : 11 * (number + 1)])) == 11
    assert paths[:11] != paths[11:22], "every pass has its own order"
    assert [path for batch in drawn(0, 1, 0, 0, seed=1) for path in batch["path"]] != paths
    first = {path: image for batch in whole[:2] for path, image in zip(batch["path"], batch["image"], strict=True)}
    later = {path: image for batch in whole[3:] for path, image in zip(batch["path"], batch["image"], strict=True)}
    assert any(not torch.equal(first[path], later[path]) for path in first), "another pass augments differently"
    same(drawn(0, 1, 0, workers=2), whole)
    same(drawn(5, 1, 0, workers=2), whole[5:])  # resumed
    halves = zip(drawn(0, 2, 0, workers=0), drawn(0, 2, 1, workers=1), strict=True)
    same([{k: (torch.cat([a[k], b[k]]) if k != "path" else a[k] + b[k]) for k in a} for a, b in halves], whole)


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a["path"] == b["path"] and torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])


def test_wrong_shards_say_which_and_why(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for train-002.tar in"):
        shards(root, train_shards="train-{000..002}.tar")
    with pytest.raises(FileNotFoundError, match=r"looked for nothing\*.tar in"):
        shards(root, "val", val_shards="nothing*.tar")
    write(root / "train-002.tar", range(2), leave_out=(1, "mask.png"))
    with pytest.raises(ValueError, match=r"train-002.tar: sample 'part/0001' has no mask: looked for part/0001.mask.png"):
        shards(root)
    assert len(shards(root, targets=("label",))) == 13, "what is not wanted may be absent"
    whole = (root / "train-000.tar").read_bytes()
    for cut in (3000, 3584, 5200):
        (root / "train-002.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"train-002.tar: (not a readable uncompressed tar|.*it was not copied whole)"):
            shards(root)
    write(root / "train-002.tar", range(2), mode="w:gz")
    with pytest.raises(ValueError, match=r"train-002.tar: not a readable uncompressed tar file"):
        shards(root)
    with pytest.raises(ValueError, match="masks need their classes"):
        shards(root, classes=None)
    with pytest.raises(ValueError, match=r"val-000.tar#part/0002: label 2 is outside the 2 classes"):
        shards(root, "val", ("label",), classes=2)[2]


def test_a_damaged_member_is_unreadable_and_can_be_skipped(root):
    path = root / "train-000.tar"
    content = bytearray(path.read_bytes())
    start = content.index(sample(3)["jpg"])
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    data = shards(root, targets=("mask",))
    with pytest.raises(ValueError, match=r"train-000.tar#part/0003: not a readable image"):
        data[3]
    data.may_skip = 1
    assert "part/0003" in data[3]["unreadable"] and data[3]["path"].endswith("0004")


def test_patterns_with_braces(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-08.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in shard_files(tmp_path, "{a,b}-{08..08}.tar")] == ["a-08.tar", "b-08.tar"]
    assert [path.name for path in shard_files(tmp_path, "a-{08..10}.tar")] == ["a-08.tar", "a-09.tar", "a-10.tar"]


def test_timm_tars_give_the_same_images_to_workers_that_were_forked_after_a_read(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for i in range(24):
            content = encoded(np.full((40, 40, 3), 10 * i, np.uint8))
            info = tarfile.TarInfo(f"{'ab'[i % 2]}/{i:02}.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data = DATASETS["timm"](tmp_path / "train.tar", "train", ("label",), num_classes=2)
    expected = [int(data[i]["image"][0, 0, 0]) for i in range(24)]  # opens the tar in this process
    loaded = torch.utils.data.DataLoader(data, batch_size=1, num_workers=3, collate_fn=lambda samples: samples[0])
    for _ in range(3):
        assert [int(got["image"][0, 0, 0]) for got in loaded] == expected
    assert data.owner == os.getpid()


def test_timm_does_not_pass_over_a_damaged_image(tmp_path):
    for name, content in (("a/0.png", encoded(np.zeros((*SIZE, 3), np.uint8))), ("b/0.png", b"")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    data = DATASETS["timm"](tmp_path, "train", ("label",), num_classes=2)
    with pytest.raises(ValueError, match=r"#b/0.png: not a readable image"):
        data[1]


def test_hugging_face_data_sets_with_masks_depth_and_labels(tmp_path):
    pytest.importorskip("datasets", reason="needs datasets: pip install backbone-zoo[data]")
    import pyarrow
    import pyarrow.parquet

    members = [sample(i) for i in range(5)]
    columns = {"image": "jpg", "annotation": "mask.png", "depth_map": "depth.png"}
    content = {column: [{"bytes": m[ending], "path": None} for m in members] for column, ending in columns.items()}
    content["label"] = [i % 3 for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "train-00000.parquet")
    data = DATASETS["huggingface"](str(tmp_path), "train", ("mask", "depth"), classes=5)
    assert [int(got["mask"][0, 0]) for got in data] == list(range(5))
    assert [float(got["depth"][0, 0, 0]) for got in data] == pytest.approx([1 + i / 1000 for i in range(5)])
    labelled = DATASETS["huggingface"](str(tmp_path), "train", ("label",), classes=3)
    assert [got["label"] for got in labelled] == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match=r"no column 'seg' for mask; it has image"):
        DATASETS["huggingface"](str(tmp_path), "train", ("mask",), mask="seg", classes=5)


def test_an_id_map_that_leaves_the_classes_is_refused(root):
    with pytest.raises(ValueError, match="Shards: id_map sends 1 to 7, which is outside the 5 classes"):
        shards(root, id_map={0: 255, 1: 7})


@pytest.mark.parametrize(
    "pattern, message", [("a{0..99999999}.tar", "more than 100000 files"), ("/a.tar", "relative to data.root")]
)
def test_shards_that_no_disk_holds_are_refused_at_once(tmp_path, pattern, message):
    with pytest.raises(ValueError, match=message):
        DATASETS["shards"](tmp_path, "train", ("label",), train_shards=pattern)
