"""Readers on files that imitate each layout: what they return, and what they say about input that is wrong."""

import io
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import DATASETS
from train.data.cifar import read_pickle
from train.data.files import ids_from_colors, read_depth, read_ids, read_rgb
from train.sample import KINDS


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)
    return path


def rgb(height=6, width=8, value=7):
    return np.full((height, width, 3), value, np.uint8)


def grey(values):
    return np.asarray(values, np.uint8)


# ---- single files


def test_images_become_rgb_whatever_their_mode(tmp_path):
    save(tmp_path / "grey.png", np.full((4, 5), 9, np.uint8))
    Image.new("RGBA", (5, 4), (1, 2, 3, 255)).save(tmp_path / "alpha.png")
    Image.new("1", (5, 4), 1).save(tmp_path / "bits.png")
    save(tmp_path / "deep.png", np.full((4, 5), 51400, np.uint16))
    assert read_rgb(tmp_path / "deep.png")[:, 0, 0].tolist() == [200] * 3
    assert read_rgb(tmp_path / "grey.png")[:, 0, 0].tolist() == [9, 9, 9]
    assert read_rgb(tmp_path / "alpha.png")[:, 0, 0].tolist() == [1, 2, 3]
    assert read_rgb(tmp_path / "bits.png").shape == (3, 4, 5)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 20])
def test_an_unreadable_image_names_its_file(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.png: not a readable image"):
        read_rgb(path)


def test_a_truncated_image_names_its_file(tmp_path):
    path = save(tmp_path / "cut.png", np.random.default_rng(0).integers(255, size=(64, 64, 3)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cut.png: not a readable image"):
        read_rgb(path)
    with pytest.raises(FileNotFoundError, match="none.png"):
        read_rgb(tmp_path / "none.png")


def test_palette_indices_and_16_bits_are_ids_and_colours_are_not(tmp_path):
    palette = Image.fromarray(grey([[0, 3], [255, 1]]), mode="P")
    palette.putpalette([i for i in range(256) for _ in range(3)])
    palette.save(tmp_path / "palette.png")
    assert read_ids(tmp_path / "palette.png").tolist() == [[0, 3], [255, 1]]
    save(tmp_path / "wide.png", np.array([[0, 300]], np.uint16))
    assert read_ids(tmp_path / "wide.png").tolist() == [[0, 300]]
    save(tmp_path / "colour.png", rgb())
    with pytest.raises(ValueError, match=r"colour.png: a mask must hold one class id.*RGB"):
        read_ids(tmp_path / "colour.png")


def test_colour_masks_become_ids_or_name_the_unknown_colour(tmp_path):
    colors = np.array([[[10, 0, 0], [0, 20, 0], [0, 0, 0]], [[0, 20, 0], [255, 255, 255], [10, 0, 0]]], np.uint8)
    path = save(tmp_path / "m.png", colors)
    assert ids_from_colors(read_rgb(path), [(10, 0, 0), (0, 20, 0)], 99, path).tolist() == [[0, 1, 99], [1, 99, 0]]
    assert ids_from_colors(read_rgb(path), [(0, 0, 0), (0, 20, 0), (10, 0, 0)], 99, path).tolist() == [[2, 1, 0], [1, 99, 2]]
    with pytest.raises(ValueError, match=r"m.png: colour \(10, 0, 0\) \(2 pixels\) is not in the palette of 1"):
        ids_from_colors(read_rgb(path), [(0, 20, 0)], 99, path)


def test_depth_is_metres_with_zero_for_every_kind_of_missing(tmp_path):
    path = save(tmp_path / "d.png", np.array([[0, 500, 65535, 1500]], np.uint16))
    np.testing.assert_allclose(read_depth(path, 1000, (0, 65535)), [[0, 0.5, 0, 1.5]])
    np.testing.assert_allclose(read_depth(path, 1000), [[0, 0.5, 65.535, 1.5]])
    np.save(tmp_path / "d.npy", np.array([[[1.5, np.nan, -2, np.inf]]]))
    np.testing.assert_allclose(read_depth(tmp_path / "d.npy", 1), [[1.5, 0, 0, 0]])
    save(tmp_path / "rgb.png", rgb())
    with pytest.raises(ValueError, match=r"rgb.png: a depth map must have one channel"):
        read_depth(tmp_path / "rgb.png", 1)
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"object.npy: not a readable array"):
        read_depth(tmp_path / "object.npy", 1)


# ---- CIFAR


def cifar(root, folder="cifar-10-batches-py", count=4, batch=None):
    base = root / folder
    base.mkdir(parents=True, exist_ok=True)
    data = np.arange(count * 3072, dtype=np.uint32).astype(np.uint8).reshape(count, 3072)
    content = {b"data": data, b"labels": list(range(count)), **(batch or {})}
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
    (base / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % i for i in range(10)]}, protocol=2))
    return data


@pytest.mark.parametrize("inside", [True, False])
def test_cifar_pickles(tmp_path, inside):
    data = cifar(tmp_path)
    root = tmp_path / "cifar-10-batches-py" if inside else tmp_path
    train, val = (DATASETS["cifar10"](root, split, ("label",)) for split in ("train", "val"))
    assert (len(train), len(val)) == (20, 4)
    assert torch.equal(val[2]["image"], torch.from_numpy(data[2].reshape(3, 32, 32)))
    assert val[2]["label"] == 2
    assert val[2]["path"].endswith("test_batch#2")
    assert len(train.classes) == 10


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, protocol):
    cifar(tmp_path)
    marker = tmp_path / "executed"
    bad = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [Malicious(marker)]}
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(bad, protocol=protocol))
    with pytest.raises(ValueError, match=r"test_batch: not a CIFAR pickle .*system; only arrays and lists"):
        DATASETS["cifar10"](tmp_path, "val", ("label",))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "numpy load", "numpy.core.multiarray scalar", "numpy.ndarray __class__", "os system"]
)
def test_the_unpickler_knows_four_names(tmp_path, name):
    module, attribute = name.split()
    path = tmp_path / "p"
    path.write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(ValueError, match="only arrays and lists"):
        read_pickle(path)


def test_damaged_pickles_never_raise_anything_else(tmp_path):
    cifar(tmp_path, count=1)
    whole = (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(whole)
        broken[int(generator.integers(200))] = int(generator.integers(256))
        path = tmp_path / "p"
        path.write_bytes(broken)
        try:
            read_pickle(path)
        except ValueError as error:
            assert "not a CIFAR pickle" in str(error)


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"hello", pickle.dumps([1, 2]), pickle.dumps({"data": "x"})[:-3]])
def test_other_files_are_not_cifar(tmp_path, content):
    path = tmp_path / "p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a CIFAR pickle"):
        read_pickle(path)


def test_cifar_with_wrong_shapes_labels_or_folders(tmp_path):
    cifar(tmp_path, batch={b"data": np.zeros((4, 10), np.uint8)})
    with pytest.raises(ValueError, match=r"data_batch_1: 'data' must be uint8 N x 3072, got \(4, 10\)"):
        DATASETS["cifar10"](tmp_path, "train", ("label",))
    cifar(tmp_path, batch={b"labels": [1]})
    with pytest.raises(ValueError, match="must be a list of 4 labels"):
        DATASETS["cifar10"](tmp_path, "train", ("label",))
    cifar(tmp_path, batch={b"labels": [0, 1, 2, 10]})
    with pytest.raises(ValueError, match="test_batch#3: label 10 is outside the 10 classes"):
        DATASETS["cifar10"](tmp_path, "val", ("label",))[3]
    with pytest.raises(FileNotFoundError, match=r"looked for the official pickles at .*cifar-10-batches-py.*holds folder"):
        (tmp_path / "other" / "folder").mkdir(parents=True)
        DATASETS["cifar10"](tmp_path / "other", "val", ("label",))
    with pytest.raises(FileNotFoundError, match="not a folder"):
        DATASETS["cifar10"](tmp_path / "nothing", "val", ("label",))
    with pytest.raises(ValueError, match="set data.root"):
        DATASETS["cifar10"](None, "val", ("label",))


def test_cifar100_has_two_kinds_of_labels(tmp_path):
    base = tmp_path / "cifar-100-python"
    base.mkdir()
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [99, 0], b"coarse_labels": [19, 1]}
    for name in ("train", "test"):
        (base / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"fine_label_names": [b"f"] * 100, b"coarse_label_names": [b"c"] * 20}
    (base / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    assert DATASETS["cifar100"](tmp_path, "val", ("label",))[0]["label"] == 99
    coarse = DATASETS["cifar100"](tmp_path, "train", ("label",), labels="coarse")
    assert (coarse[0]["label"], len(coarse.classes)) == (19, 20)
    with pytest.raises(ValueError, match="'fine' or 'coarse'"):
        DATASETS["cifar100"](tmp_path, "train", ("label",), labels="all")


# ---- classes in folders


def test_imagenet_folders_keep_their_official_index(tmp_path):
    for wnid in ("n01440764", "n13044778"):
        save(tmp_path / "val" / wnid / "a.JPEG", rgb())
    data = DATASETS["imagenet"](tmp_path, "val", ("label",))
    assert [sample["label"] for sample in data] == [0, 995]
    assert (len(data.classes), data.classes[0]) == (1000, "tench")
    save(tmp_path / "val" / "n00000000" / "a.JPEG", rgb())
    with pytest.raises(ValueError, match="n00000000.*not one of the 1000"):
        DATASETS["imagenet"](tmp_path, "val", ("label",))


def test_imagenet_as_shipped_is_explained(tmp_path):
    save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", rgb())
    with pytest.raises(FileNotFoundError, match="Sort them into wnid folders"):
        DATASETS["imagenet"](tmp_path, "val", ("label",))
    with pytest.raises(FileNotFoundError, match="looked for the train folder"):
        DATASETS["imagenet"](tmp_path, "train", ("label",))


def test_class_folders_count_by_the_training_names(tmp_path):
    for name in ("ant", "bee", "cow"):
        save(tmp_path / "train" / name / "deep" / "1.png", rgb())
    save(tmp_path / "val" / "cow" / "1.png", rgb())
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    train, val = (DATASETS["class_folder"](tmp_path, split, ("label",)) for split in ("train", "val"))
    assert [sample["label"] for sample in train] == [0, 1, 2]
    assert val[0]["label"] == 2
    save(tmp_path / "val" / "dog" / "1.png", rgb())
    with pytest.raises(ValueError, match="'dog' is not one of the 3 classes"):
        DATASETS["class_folder"](tmp_path, "val", ("label",))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no class folder holds an image"):
        DATASETS["class_folder"](tmp_path / "empty", "train", ("label",))


def test_tiny_imagenet_in_the_layout_of_the_archive(tmp_path):
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    (tmp_path / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\ttoad\n")
    save(tmp_path / "train" / "n01" / "images" / "n01_0.JPEG", rgb())
    save(tmp_path / "val" / "images" / "val_0.JPEG", rgb())
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t1\t1\n")
    train, val = (DATASETS["tiny_imagenet"](tmp_path, split, ("label",)) for split in ("train", "val"))
    assert (train[0]["label"], val[0]["label"]) == (0, 1)
    assert train.classes == ["goldfish", "toad"]


def test_timm_reads_a_tar(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for wnid in ("a", "b"):
            buffer = io.BytesIO()
            Image.fromarray(rgb()).save(buffer, "PNG")
            info = tarfile.TarInfo(f"{wnid}/0.png")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)
    data = DATASETS["timm"](tmp_path / "train.tar", "train", ("label",), num_classes=2)
    assert [sample["label"] for sample in data] == [0, 1]
    assert data[0]["image"].shape == (3, 6, 8)


# ---- masks


def ade(root, values):
    base = root / "ADEChallengeData2016"
    for folder in ("training", "validation"):
        save(base / "images" / folder / "ADE_1.jpg", rgb(*np.shape(values)))
        save(base / "annotations" / folder / "ADE_1.png", grey(values))
    return base


@pytest.mark.parametrize("inside", [True, False])
def test_ade20k_zero_is_void_and_the_rest_moves_down(tmp_path, inside):
    base = ade(tmp_path, [[0, 1], [150, 20]])
    data = DATASETS["ade20k"](base if inside else tmp_path, "train", ("mask",))
    assert data[0]["mask"].tolist() == [[255, 0], [149, 19]]
    assert len(data.classes) == 150
    assert (data.classes[0], data.classes[149]) == ("wall", "flag")


def test_ade20k_with_shifted_labels_or_names_is_refused(tmp_path):
    base = ade(tmp_path, [[255, 1]])
    with pytest.raises(ValueError, match=r"ADE_1.png: label 255 is outside 0..150.*already shifted"):
        DATASETS["ade20k"](tmp_path, "val", ("mask",))[0]
    (base / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0\t0\t0\twall, x\n")
    with pytest.raises(ValueError, match="expected 150 classes, found 1"):
        DATASETS["ade20k"](tmp_path, "val", ("mask",))
    with pytest.raises(FileNotFoundError, match=r"looked for the training images at .*images/training"):
        DATASETS["ade20k"](tmp_path / "ADEChallengeData2016" / "images", "train", ("mask",))


def test_ade20k_from_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    def png(array):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    rows = [{"image": png(rgb(2, 2, i)), "annotation": png(grey([[0, 1], [2, 3 + i]]))} for i in range(5)]
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "data").mkdir()
    parquet.write_table(table.slice(0, 3), tmp_path / "data" / "train-00000.parquet", row_group_size=2)
    parquet.write_table(table.slice(3), tmp_path / "data" / "train-00001.parquet", row_group_size=2)
    data = DATASETS["ade20k_parquet"](tmp_path, "train", ("mask",))
    assert len(data) == 5
    for i in (4, 0, 2, 3, 1):
        assert data[i]["mask"].tolist() == [[255, 0], [1, 2 + i]]
        assert int(data[i]["image"][0, 0, 0]) == i
    with pytest.raises(FileNotFoundError, match=r"looked for val\*.parquet"):
        DATASETS["ade20k_parquet"](tmp_path, "val", ("mask",))
    parquet.write_table(pyarrow.table({"image": [1]}), tmp_path / "data" / "val.parquet")
    with pytest.raises(ValueError, match="no column 'annotation'"):
        DATASETS["ade20k_parquet"](tmp_path, "val", ("mask",))


def camvid(root, values=((0, 10), (11, 3)), listing=None):
    for split in ("train", "val"):
        save(root / split / "f1.png", rgb(2, 2))
        save(root / f"{split}annot" / "f1.png", grey(values))
        if listing:
            (root / f"{split}.txt").write_text(listing.format(split=split))


@pytest.mark.parametrize(
    "listing",
    [
        None,
        "{split}/f1.png {split}annot/f1.png\n",
        "/SegNet/CamVid/{split}/f1.png /SegNet/CamVid/{split}annot/f1.png;\n\n",
    ],
)
def test_camvid_lists_folders_and_void(tmp_path, listing):
    camvid(tmp_path, listing=listing)
    data = DATASETS["camvid"](tmp_path, "val", ("mask",))
    assert data[0]["mask"].tolist() == [[0, 10], [255, 3]]
    assert (len(data), len(data.classes), len(data.palette)) == (1, 11, 11)


def test_camvid_bad_input(tmp_path):
    camvid(tmp_path, values=[[0, 12], [11, 3]])
    with pytest.raises(ValueError, match=r"trainannot/f1.png: mask id 12 \(1 such pixels\) is outside the 11 classes"):
        DATASETS["camvid"](tmp_path, "train", ("mask",))[0]
    camvid(tmp_path, values=[[0, 1, 2]])
    with pytest.raises(ValueError, match=r"valannot/f1.png: the mask has height x width 1x3 but its image .*f1.png has 2x2"):
        DATASETS["camvid"](tmp_path, "val", ("mask",))[0]
    (tmp_path / "val.txt").write_text("val/gone.png valannot/gone.png\n")
    with pytest.raises(FileNotFoundError, match="gone.png"):
        DATASETS["camvid"](tmp_path, "val", ("mask",))
    (tmp_path / "val.txt").write_text("val/f1.png\n")
    with pytest.raises(ValueError, match="val.txt, line 1: need 2 columns"):
        DATASETS["camvid"](tmp_path, "val", ("mask",))
    with pytest.raises(FileNotFoundError, match=r"test.txt or the test images at .*which does not exist; .* holds train"):
        DATASETS["camvid"](tmp_path, "val", ("mask",), val="test")


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    name = "bochum_000000_000313"
    save(tmp_path / "leftImg8bit/train/bochum" / f"{name}_leftImg8bit.png", rgb(2, 3))
    mask = tmp_path / "gtFine/train/bochum" / f"{name}_gtFine_labelIds.png"
    save(mask, grey([[7, 33, 0], [8, 255, 29]]))
    data = DATASETS["cityscapes"](tmp_path, "train", ("mask",))
    assert data[0]["mask"].tolist() == [[0, 18, 255], [1, 255, 255]]
    assert (len(data.classes), data.classes[18]) == (19, "bicycle")
    save(mask, grey([[7, 33, 0], [8, 40, 29]]))
    with pytest.raises(ValueError, match=r"labelIds.png: labelId 40 is outside 0..33"):
        data[0]
    mask.unlink()
    with pytest.raises(FileNotFoundError, match="fine annotation"):
        DATASETS["cityscapes"](tmp_path, "train", ("mask",))


# ---- depth


def test_nyu_lists_folders_and_labels(tmp_path):
    for split in ("train", "test"):
        scene = tmp_path / "official_splits" / split / "kitchen"
        save(scene / "rgb_00007.jpg", rgb(2, 2))
        save(scene / "sync_depth_00007.png", np.array([[0, 2500], [10000, 725]], np.uint16))
    save(tmp_path / "labels40" / "00007.png", grey([[0, 39], [38, 5]]))
    data = DATASETS["nyuv2"](tmp_path, "val", ("depth", "mask"))
    torch.testing.assert_close(data[0]["depth"].as_subclass(torch.Tensor), torch.tensor([[[0, 2.5], [10, 0.725]]]))
    assert data[0]["mask"].tolist() == [[0, 255], [38, 5]]
    (tmp_path / "nyu_train.txt").write_text("/kitchen/rgb_00007.jpg /kitchen/sync_depth_00007.png 518.8579\nx None 1\n")
    assert len(DATASETS["nyuv2"](tmp_path, "train", ("depth",))) == 1
    with pytest.raises(FileNotFoundError, match=r"looked for the val frames at .*sync"):
        DATASETS["nyuv2"](tmp_path, "val", ("depth",), val_folder="sync")


def test_nyu_mat(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed")
    images = np.random.default_rng(0).integers(255, size=(3, 3, 5, 4)).astype(np.uint8)  # N 3 W H
    depths = np.random.default_rng(1).uniform(1, 9, size=(3, 5, 4)).astype(np.float32)
    depths[1, 0, 0] = np.nan
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"] = images, depths
    scipy_io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[1], [3]], "testNdxs": [[2]]})
    train, val = (DATASETS["nyuv2_mat"](tmp_path, split, ("depth",)) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    assert np.array_equal(train[1]["image"].numpy(), images[2].transpose(0, 2, 1))
    assert np.array_equal(train[1]["depth"][0].numpy(), depths[2].T)
    assert float(val[0]["depth"][0, 0, 0]) == 0
    again = pickle.loads(pickle.dumps(val))  # as a loader process gets it
    assert torch.equal(again[0]["depth"], val[0]["depth"])
    scipy_io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[9]], "testNdxs": [[2]]})
    with pytest.raises(ValueError, match="frame 9 of trainNdxs is not among the 3"):
        DATASETS["nyuv2_mat"](tmp_path, "train", ("depth",))
    other = tmp_path / "other"
    other.mkdir()
    (other / "nyu_depth_v2_labeled.mat").write_bytes(b"MATLAB 5")
    (other / "splits.mat").write_bytes((tmp_path / "splits.mat").read_bytes())
    with pytest.raises(ValueError, match="not the official file"):
        DATASETS["nyuv2_mat"](other, "val", ("depth",))


def test_optional_packages_are_named_when_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name in ("nyuv2_mat", "ade20k_parquet"):
        with pytest.raises(ImportError, match=r"pip install backbone-zoo\[data\]"):
            DATASETS[name](tmp_path, "train", ())


@pytest.mark.parametrize("official", [True, False])
def test_sevenscenes_has_two_values_for_missing(tmp_path, official):
    folder = tmp_path / "seq-03" if official else tmp_path / "data"
    save(folder / "frame-000000.color.png", rgb(1, 3))
    save(folder / "frame-000000.depth.png", np.array([[0, 65535, 1234]], np.uint16))
    if official:
        (tmp_path / "TrainSplit.txt").write_text("sequence3\n")
    else:
        (tmp_path / "train.txt").write_text("data/frame-000000.color.png data/frame-000000.depth.png 585.0\n")
    data = DATASETS["sevenscenes"](tmp_path, "train", ("depth",))
    torch.testing.assert_close(data[0]["depth"].as_subclass(torch.Tensor), torch.tensor([[[0, 0, 1.234]]]))
    with pytest.raises(FileNotFoundError, match="val.txt or the official split"):
        DATASETS["sevenscenes"](tmp_path, "val", ("depth",))


def test_kitti_divides_by_256_crops_and_skips_rows_without_truth(tmp_path):
    image = np.zeros((370, 1224, 3), np.uint8)
    image[369, 4] = 255
    save(tmp_path / "raw/a.png", image)
    depth = np.zeros((370, 1224), np.uint16)
    depth[369, 4] = 512
    save(tmp_path / "gt/a.png", depth)
    (tmp_path / "kitti_test.txt").write_text("a.png a.png 721.5\nb.png None 721.5\n")
    data = DATASETS["kitti"](tmp_path, "val", ("depth",), images="raw", depths="gt")
    assert len(data) == 1
    sample = data[0]
    assert sample["image"].shape == (3, 352, 1216)
    assert (float(sample["depth"][0, 351, 0]), int((sample["depth"] > 0).sum())) == (2.0, 1)
    assert sample["image"][:, 351, 0].tolist() == [255] * 3
    whole = DATASETS["kitti"](tmp_path, "val", ("depth",), images="raw", depths="gt", benchmark_crop=False)
    assert whole[0]["depth"].shape == (1, 370, 1224)
    save(tmp_path / "gt/a.png", np.zeros((375, 1242), np.uint16))
    with pytest.raises(ValueError, match="the depth has height x width 375x1242 but its image"):
        data[0]
    save(tmp_path / "raw/a.png", rgb(100, 1224))
    with pytest.raises(ValueError, match="smaller than the benchmark crop"):
        data[0]
    with pytest.raises(FileNotFoundError, match="kitti_train.txt"):
        DATASETS["kitti"](tmp_path, "train", ("depth",))


# ---- own folders


def folder(root, values=((0, 1), (255, 2)), depth=((0, 1000), (2000, 3000))):
    save(root / "images/train/a.jpg", rgb(2, 2))
    save(root / "masks/train/a.png", np.asarray(values, np.uint8))
    save(root / "depths/train/a.png", np.asarray(depth, np.uint16))


def test_folder_pairs(tmp_path):
    folder(tmp_path)
    data = DATASETS["folder"](tmp_path, "train", ("mask", "depth"), classes=["x", "y", "z"])
    assert data[0]["mask"].tolist() == [[0, 1], [255, 2]]
    assert data[0]["depth"].tolist() == [[[0, 1], [2, 3]]]
    assert DATASETS["folder"](tmp_path, "train", ("depth",), depth_divisor=500.0)[0]["depth"].max() == 6
    assert len(DATASETS["folder"](tmp_path, "train", ("mask",), classes=4).classes) == 4


def test_folder_id_map_and_palette(tmp_path):
    folder(tmp_path, values=[[7, 9], [255, 0]])
    make = DATASETS["folder"]
    data = make(tmp_path, "train", ("mask",), classes=2, id_map={7: 0, 9: 1, 0: 255})
    assert data[0]["mask"].tolist() == [[0, 1], [255, 255]]
    with pytest.raises(ValueError, match=r"a.png: id 9 is not in id_map \(0, 7\)"):
        make(tmp_path, "train", ("mask",), classes=2, id_map={7: 0, 0: 1})[0]
    with pytest.raises(ValueError, match="sends 7 to 2, which is outside the 2 classes"):
        make(tmp_path, "train", ("mask",), classes=2, id_map={7: 2})
    save(tmp_path / "masks/train/a.png", np.array([[[9, 0, 0], [0, 9, 0]], [[0, 0, 0], [9, 0, 0]]], np.uint8))
    data = make(tmp_path, "train", ("mask",), classes=2, palette=[[9, 0, 0], [0, 9, 0]])
    assert data[0]["mask"].tolist() == [[0, 1], [255, 0]]
    with pytest.raises(ValueError, match=r"colour \(0, 9, 0\)"):
        make(tmp_path, "train", ("mask",), classes=2, palette=[[9, 0, 0], [0, 0, 9]])[0]
    with pytest.raises(ValueError, match="1 palette colours for 2 classes"):
        make(tmp_path, "train", ("mask",), classes=2, palette=[[9, 0, 0]])


def test_a_colour_mask_of_greys_alone_still_uses_the_palette(tmp_path):
    """A mask whose only colours are grey is a colour mask too: its values must not be taken for ids."""
    folder(tmp_path)
    save(tmp_path / "masks/train/a.png", np.array([[[64, 64, 64], [64, 64, 64]], [[0, 0, 0], [64, 64, 64]]], np.uint8))
    data = DATASETS["folder"](tmp_path, "train", ("mask",), classes=2, palette=[[9, 0, 0], [64, 64, 64]])
    assert data[0]["mask"].tolist() == [[1, 1], [255, 1]]


def test_pascal_layout_with_lists(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "JPEGImages" / f"{name}.jpg", rgb(2, 2))
    save(tmp_path / "SegmentationClass" / "b.png", grey([[0, 20], [255, 1]]))
    lists = tmp_path / "ImageSets/Segmentation/train.txt"
    lists.parent.mkdir(parents=True)
    lists.write_text("b\n")
    layout = {
        "images": "JPEGImages",
        "masks": "SegmentationClass",
        "lists": "ImageSets/Segmentation/{split}.txt",
        "classes": 21,
    }
    data = DATASETS["folder"](tmp_path, "train", ("mask",), **layout)
    assert len(data) == 1
    assert data[0]["mask"].tolist() == [[0, 20], [255, 1]]
    lists.write_text("b\nc\n")
    with pytest.raises(FileNotFoundError, match="names 'c'"):
        DATASETS["folder"](tmp_path, "train", ("mask",), **layout)


def test_files_of_one_name_in_two_folders_are_not_mixed_up(tmp_path):
    for i, place in enumerate(("north", "south")):
        save(tmp_path / f"images/train/{place}/a.jpg", rgb(2, 2, 10 * i))
        save(tmp_path / f"masks/train/{place}/a.png", grey([[i, i], [i, i]]))
    data = DATASETS["folder"](tmp_path, "train", ("mask",), classes=2)
    assert [int(sample["mask"][0, 0]) for sample in data] == [0, 1]
    np.save(tmp_path / "masks/train/north/a.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="have the same name"):
        DATASETS["folder"](tmp_path, "train", ("mask",), classes=2)


def test_image_and_target_side_by_side(tmp_path):
    save(tmp_path / "all/7_color.jpg", rgb(2, 2))
    save(tmp_path / "all/7_depth.png", np.array([[500, 0], [0, 0]], np.uint16))
    layout = {"images": "all", "depths": "all", "image_suffix": "_color", "depth_suffix": "_depth"}
    data = DATASETS["folder"](tmp_path, "val", ("depth",), **layout)
    assert len(data) == 1
    assert float(data[0]["depth"].max()) == 0.5
    with pytest.raises(FileNotFoundError, match="no file ends in _metres.jpg, _metres.jpeg"):
        DATASETS["folder"](tmp_path, "val", ("depth",), **{**layout, "depth_suffix": "_metres"})


def test_folder_says_what_is_missing(tmp_path):
    make = DATASETS["folder"]
    with pytest.raises(FileNotFoundError, match=r"looked for the train images at .*images/train"):
        make(tmp_path, "train", ("mask",), classes=2)
    save(tmp_path / "images/train/a.jpg", rgb(2, 2))
    with pytest.raises(FileNotFoundError, match="looked for the train masks"):
        make(tmp_path, "train", ("mask",), classes=2)
    save(tmp_path / "masks/train/b.png", grey([[0, 0]]))
    with pytest.raises(FileNotFoundError, match=r"a.jpg has no mask: looked for a.\* in"):
        make(tmp_path, "train", ("mask",), classes=2)
    with pytest.raises(ValueError, match="set data.args.classes"):
        make(tmp_path, "train", ("mask",))
    (tmp_path / "images/val").mkdir()
    with pytest.raises(FileNotFoundError, match="no file ends in"):
        make(tmp_path, "val", ("mask",), classes=2)


# ---- what every data set promises


@pytest.mark.parametrize("name", DATASETS)
def test_arguments_are_named_and_typed(name):
    """A config's data.args are checked against the signature: **kwargs would let a typo pass."""
    import inspect

    parameters = inspect.signature(DATASETS[name]).parameters
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters.values())
    assert list(parameters)[: 2 + ("root" in parameters)][-2:] == ["split", "targets"]
    assert set(DATASETS[name].provides) <= {"label", *KINDS}
    assert DATASETS[name].__doc__
