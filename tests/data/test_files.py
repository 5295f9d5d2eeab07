"""Files as users have them: channels, depths of pixels, orientation, arrays, lists, links; and files that would do harm."""

import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from train.config import resolve
from train.data import DATASETS, files, open_split
from train.data.check import refuse, run
from train.data.files import PixelRules, TooLarge, Unreadable, load_array, open_image, read_depth, read_image, read_mask
from train.data.finding import read_list, read_names, read_text, walk
from train.schema import DataConfig


def png(path, width, height, bits, color_type, rows):
    """A PNG with the bytes of its rows as given: what Pillow cannot write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def save(path, values, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path, **kwargs)
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def pairs(root, image, mask, count=1, split="train", suffix="png"):
    for i in range(count):
        save(root / "images" / split / f"{i}.{suffix}", image if count == 1 else np.roll(image, i, 0))
        save(root / "masks" / split / f"{i}.png", mask)
    return root


# ---- channels


def test_channels_are_those_that_the_model_takes(tmp_path):
    grey, color, alpha = noise(4, 5), noise(4, 5, 3), noise(4, 5, 4)
    one, four = PixelRules(channels=1), PixelRules(channels=4)
    assert (read_image(save(tmp_path / "g.png", grey), rules=one) == grey[None]).all()
    as_grey = read_image(save(tmp_path / "c.png", color), rules=one)
    assert (as_grey[0] == np.asarray(Image.fromarray(color).convert("L"))).all()
    for suffix in ("png", "tif"):
        assert (read_image(save(tmp_path / f"a.{suffix}", alpha), rules=four) == alpha.transpose(2, 0, 1)).all()
    with pytest.raises(ValueError, match=r"c.png: the image has 3 channels, and model.in_chans is 4; set model.in_chans=3"):
        read_image(tmp_path / "c.png", rules=four)


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_arrays_have_any_number_of_channels(tmp_path, layout):
    bands = noise(6, 9, 11)
    np.save(tmp_path / "a.npy", bands if layout == "CHW" else bands.transpose(1, 2, 0))
    assert (read_image(tmp_path / "a.npy", rules=PixelRules(channels=6)) == bands).all()
    np.save(tmp_path / "f.npy", bands.astype(np.float32) / 255)
    assert (read_image(tmp_path / "f.npy", rules=PixelRules(6, (0, 1))) == bands).all()
    with pytest.raises(ValueError, match=r"f.npy: its float32 pixels of 0 to 1 .* e.g. \[0, 1\]"):
        read_image(tmp_path / "f.npy", rules=PixelRules(channels=6))


def test_a_folder_without_pictures_may_hold_arrays(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name / "train").mkdir(parents=True)
    np.save(tmp_path / "images/train/a.npy", noise(5, 8, 8))
    np.save(tmp_path / "masks/train/a.NPY", np.ones((8, 8), np.uint8))
    os.rename(tmp_path / "masks/train/a.NPY.npy", tmp_path / "masks/train/a.NPY")
    data = open_split(DataConfig("folder", str(tmp_path), args={"classes": 2}), "train", ("mask",), channels=5)
    assert data[0]["image"].shape == (5, 8, 8) and (data[0]["mask"] == 1).all()


def test_data_in_memory_become_grey_and_nothing_else():
    section = DataConfig("scenes", args={"count": 1, "val_count": 1, "size": (16, 16)})
    three, one = (open_split(section, "train", ("mask",), channels)[0]["image"] for channels in (3, 1))
    assert torch.equal(one[0], torch.from_numpy(np.array(Image.fromarray(three.permute(1, 2, 0).numpy()).convert("L"))))
    values = {"task": {"name": "segmentation", "num_classes": 6}, "model": {"in_chans": 4}, "optim": {"steps": 1}}
    with pytest.raises(ValueError, match="model.in_chans is 4, and the images of scenes have 3 channels; set it to 3, or 1"):
        resolve(values | {"data": {"mean": [0.5], "std": [0.2]}})
    ok = resolve(values | {"model": {"in_chans": 1}, "data": {"mean": [0.5], "std": [0.2]}})
    assert ok.data.mean == (0.5,)
    assert resolve(values | {"model": {}, "data": {"mean": [0.5], "std": [0.2]}}).data.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"data": {"image_range": [1, 0]}}, r"data.image_range: scenes|data.image_range is for image files"),
        ({"data": {"name": "folder", "root": "x", "image_range": [5, 5]}}, "must be .black, white. with black < white"),
        ({"data": {"max_pixels": 0}}, "data.max_pixels"),
        ({"augment": {"color_jitter": 0.4}, "model": {"in_chans": 4}}, "color_jitter changes grey and RGB images"),
    ],
)
def test_settings_of_pixels_that_cannot_be_followed_are_refused(keys, message):
    data = {"name": "folder", "root": "x", "mean": [0.5], "std": [0.2], "args": {"classes": 2}} if "augment" in keys else {}
    values = {"task": {"name": "segmentation", "num_classes": 2}, "optim": {"steps": 1}, "data": data}
    with pytest.raises(ValueError, match=message):
        resolve(values | keys)


# ---- depth of pixels


def test_16_bits_are_read_where_all_of_them_are_used(tmp_path):
    full = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert (read_image(save(tmp_path / "full.png", full))[0].ravel() == np.arange(256)).all()
    narrow = (30000 + np.arange(256) * 12).astype(np.uint16).reshape(16, 16)  # centikelvins: 12 levels would be left
    with pytest.raises(ValueError, match=r"narrow.png: its uint16 pixels of 30000 to 33060 .*data.image_range"):
        read_image(save(tmp_path / "narrow.png", narrow))
    seen = read_image(tmp_path / "narrow.png", rules=PixelRules(image_range=(30000, 33060)))
    assert len(np.unique(seen)) == 256


def test_16_bits_per_colour_are_read_only_where_pillow_does_not_lose_them(tmp_path):
    dark = png(tmp_path / "dark.png", 2, 1, 16, 2, [struct.pack(">6H", 1, 2, 3, 4000, 4001, 4002)])
    with pytest.raises(ValueError, match=r"dark.png: a colour image of 16 bits per channel, of which only"):
        read_image(dark)
    bright = png(tmp_path / "bright.png", 2, 1, 16, 2, [struct.pack(">6H", 0, 0, 0, 65535, 65535, 65535)])
    assert read_image(bright)[:, 0, 1].tolist() == [255] * 3


def test_an_8_bit_file_cannot_have_a_wider_range(tmp_path):
    path = save(tmp_path / "a.png", noise(4, 4))
    with pytest.raises(ValueError, match=r"a.png: an 8-bit image, which cannot reach the 4095 of data.image_range"):
        read_image(path, rules=PixelRules(image_range=(0, 4095)))


def test_data_check_warns_below_32_levels(tmp_path):
    data = DATASETS["folder"](pairs(tmp_path, noise(64, 64) % 16, np.zeros((64, 64), np.uint8)), "train", ("mask",), classes=2)
    assert any("have 16 of 256 grey levels (uint8, 1 channel: 0 to 15)" in line for line in run([data]).lines)


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_and_depth_of_few_bits_keep_their_numbers(tmp_path, bits):
    row = bytes([0b00011011]) if bits == 2 else bytes([0x01, 0x2F])
    want = [0, 1, 2, 3 if bits == 2 else 15]
    path = png(tmp_path / "m.png", 4, 1, bits, 0, [row])
    assert read_mask(path)[0].tolist() == want
    assert read_depth(path, 1.0)[0].tolist() == want


@pytest.mark.parametrize("maximum", [21, 255, 1000, 65535])
def test_a_pgm_keeps_its_numbers_whatever_its_maximum(tmp_path, maximum):
    values = np.array([[0, 1, 7, 20, maximum]], np.uint16)
    content = values.astype(np.uint8).tobytes() if maximum < 256 else values.byteswap().tobytes()
    path = tmp_path / "m.pgm"
    path.write_bytes(f"P5 5 1 {maximum}\n".encode() + content)
    assert read_mask(path).tolist() == values.tolist()
    assert read_depth(path, 1.0).tolist() == values.tolist()


def test_masks_of_floats_are_refused_as_such(tmp_path):
    with pytest.raises(ValueError, match=r"f.tif: a mask must hold whole numbers, and this image holds floating-point ones"):
        read_mask(save(tmp_path / "f.tif", np.ones((4, 4), np.float32)))
    np.save(tmp_path / "f.npy", np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match=r"f.npy: a mask must hold whole numbers, and this array holds float32"):
        read_mask(tmp_path / "f.npy")


# ---- colours


def test_a_palette_image_is_read_by_its_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 255]], np.uint8), mode="P")
    colors = [0] * 768
    colors[:6], colors[765:] = [255, 0, 0, 0, 0, 0], [224, 224, 192]
    image.putpalette(colors)
    image.save(tmp_path / "m.png")
    path, own = tmp_path / "m.png", [(0, 0, 0), (255, 0, 0)]
    assert read_mask(path, palette=own).tolist() == [[1, 0, 255]]  # the ignore id may have a colour of its own
    assert read_mask(path, palette=own, id_map={0: 0, 1: 1}).tolist() == [[0, 1, 255]]  # file ids, as id_map says
    with pytest.raises(ValueError, match=r"m.png: colour \(255, 0, 0\) .* is not in the palette of 2"):
        read_mask(path, palette=[(0, 0, 0), (9, 9, 9)])
    with pytest.raises(ValueError, match=r"m.png: classes 1 and 2 have the same colour \(255, 0, 0\)"):
        read_mask(path, palette=[(0, 0, 0), (255, 0, 0), (255, 0, 0)])


def test_a_grey_colour_table_makes_indices_ids(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode="P")
    image.putpalette([value for value in range(256) for _ in range(3)])
    image.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", palette=[(9, 0, 0), (0, 9, 0), (0, 0, 9)]).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("lossless", [True, False])
def test_lossy_webp_masks_are_found_and_lossless_ones_are_fine(tmp_path, lossless):
    root = pairs(tmp_path, noise(16, 16, 3), np.zeros((16, 16), np.uint8))
    os.remove(root / "masks/train/0.png")
    save(root / "masks/train/0.webp", np.zeros((16, 16), np.uint8), lossless=lossless)
    with Image.open(root / "masks/train/0.webp") as image:
        info = open_image(root / "masks/train/0.webp").info
        assert image.format == "WEBP" and info["lossy"] == (None if lossless else "lossy WebP")


def test_lossy_masks_are_said_when_training_starts(tmp_path):
    root = pairs(tmp_path, noise(16, 16, 3), np.zeros((16, 16), np.uint8))
    save(root / "masks/train/0.jpg", np.eye(16, dtype=np.uint8))
    os.remove(root / "masks/train/0.png")
    data = DATASETS["folder"](root, "train", ("mask",), classes=200)
    (sentence,) = refuse([data])
    assert sentence.startswith("train: 1 masks are JPEG") and "save masks as PNG" in sentence


# ---- orientation


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_upright(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = noise(16, 24, 3)
    lossless = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", stored, exif=exif, **lossless)
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    notes = files.FileNotes()
    seen = read_image(path, notes=notes)
    assert seen.shape == turned.transpose(2, 0, 1).shape
    if suffix != "jpg":
        assert (seen == turned.transpose(2, 0, 1)).all()
    assert len(notes.turned) == (orientation != 1)


def test_a_damaged_exif_block_leaves_the_image_as_it_is(tmp_path):
    path = save(tmp_path / "a.jpg", noise(8, 8, 3), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(path).shape == (3, 8, 8)


# ---- arrays and files that are no files


def test_arrays_of_depth_in_npz_and_upper_case(tmp_path):
    depth = np.linspace(1, 2, 12).reshape(3, 4)
    np.savez(tmp_path / "d.NPZ", depth=depth)
    os.rename(tmp_path / "d.NPZ.npz", tmp_path / "d.NPZ")
    np.testing.assert_allclose(read_depth(tmp_path / "d.NPZ", 1.0), depth, rtol=1e-6)
    np.savez_compressed(tmp_path / "two.npz", a=depth, b=depth)
    with pytest.raises(Unreadable, match=r"two.npz: .*it holds 2 arrays \(a.npy, b.npy\), and one is wanted"):
        read_depth(tmp_path / "two.npz", 1.0)


def header(text):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("shape", ["(1048576, 1048576)", "(-1, 4)", "(1099511627776,)", "('a', 2)", "(2, True)"])
def test_a_header_cannot_ask_for_more_than_the_file_holds(tmp_path, suffix, shape):
    content = header("{'descr': '<f4', 'fortran_order': False, 'shape': " + shape + ", }\n") + bytes(16)
    path = tmp_path / f"big{suffix}"
    if suffix == ".npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", content)
    else:
        path.write_bytes(content)
    with pytest.raises(Unreadable, match="big.np.: not a readable array"):
        load_array(path)


def test_a_bomb_of_an_array_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
        file.write(header("{'descr': '|u1', 'fortran_order': False, 'shape': (4096, 4096), }\n") + bytes(2**24))
    with pytest.raises(TooLarge, match=r"a.npz: 17 million numbers are more than 1 million: raise data.max_pixels"):
        load_array(tmp_path / "a.npz", max_numbers=10**6)


@pytest.mark.parametrize("kind", ["image", "mask", "depth"])
def test_pipes_devices_and_folders_are_refused(tmp_path, kind):
    read = {"image": read_image, "mask": read_mask, "depth": lambda path: read_depth(path, 1.0)}[kind]
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.npy").symlink_to("/dev/zero")
    for name, what in (("pipe.png", "a pipe"), ("folder.png", "a folder"), ("device.npy", "a pipe, socket or device")):
        with pytest.raises(Unreadable, match=f"{name}: not a file but {what}"):
            read(tmp_path / name)
    (tmp_path / "lost.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match="lost.png: no such file"):
        read(tmp_path / "lost.png")


def test_a_pipe_among_the_images_does_not_hang(tmp_path):
    root = pairs(tmp_path, noise(8, 8, 3), np.zeros((8, 8), np.uint8))
    os.mkfifo(root / "images/train/p.png")
    save(root / "masks/train/p.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"p.png: not a file but a pipe"):
        DATASETS["folder"](root, "train", ("mask",), classes=2)[1]


def test_a_large_image_is_no_damage_and_the_limit_can_be_set(tmp_path):
    root = pairs(tmp_path, noise(40, 50), np.zeros((40, 50), np.uint8))
    data = DATASETS["folder"](root, "train", ("mask",), classes=2)
    data.may_skip, data.pixels = 1, PixelRules(max_pixels=1999)
    with pytest.raises(TooLarge, match=r"0.png: 40x50 are 2000 pixels, more than data.max_pixels=1999 allows.*raise it"):
        data[0]
    data.pixels = PixelRules(max_pixels=2000)
    assert data[0]["image"].shape == (3, 40, 50)


def test_an_image_above_pillows_limit_is_read_where_ours_allows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = save(tmp_path / "a.png", noise(40, 50))
    assert read_image(path).shape == (3, 40, 50) and Image.MAX_IMAGE_PIXELS == 100


# ---- finding and lists


def test_hidden_entries_are_passed_over_at_any_depth(tmp_path):
    wanted = ["a.png", "deep/er/b.png"]
    for name in (*wanted, "._a.png", ".Trash/c.png", "deep/.ipynb_checkpoints/d.png", "__MACOSX/e.png", "deep/@eaDir/f.png"):
        save(tmp_path / ".hidden_root" / name, noise(4, 4))
    root = tmp_path / ".hidden_root"
    assert [str(path.relative_to(root)) for path in sorted(walk(root))] == wanted


def test_links_to_one_folder_count_twice_and_loops_once(tmp_path):
    save(tmp_path / "store" / "a.png", noise(4, 4))
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    for name in ("one", "two"):
        (root / name).symlink_to(tmp_path / "store")
    (root / "inner" / "loop").symlink_to(root)
    (tmp_path / "store" / "self").symlink_to(tmp_path / "store")
    assert [str(path.relative_to(root)) for path in sorted(walk(root))] == ["one/a.png", "two/a.png"]


def test_an_empty_class_folder_is_a_finding(tmp_path):
    for name in ("cat", "dog"):
        save(tmp_path / "train" / name / "a.png", noise(8, 8, 3))
    (tmp_path / "train" / "empty").mkdir()
    data = DATASETS["class_folder"](tmp_path, "train", ("label",))
    assert data.classes == ["cat", "dog", "empty"]
    assert any(line.startswith("WARNING train: 1 class folders") and "empty" in line for line in run([data]).lines)
    assert "1 class folders" in refuse([data])[0]


@pytest.mark.parametrize("suffix", [".jfif", ".gif", ".JPG", ".PNG", ".Tiff", ".webp"])
def test_suffixes_of_any_case_are_found_and_read(tmp_path, suffix):
    root = pairs(tmp_path, noise(8, 8), np.zeros((8, 8), np.uint8))
    os.remove(root / "images/train/0.png")
    formats = {".jfif": "JPEG", ".gif": "GIF", ".JPG": "JPEG", ".PNG": "PNG", ".Tiff": "TIFF", ".webp": "WEBP"}
    Image.fromarray(noise(8, 8)).save(root / f"images/train/0{suffix}", format=formats[suffix])
    assert DATASETS["folder"](root, "train", ("mask",), classes=2)[0]["image"].shape == (3, 8, 8)


@pytest.mark.parametrize("suffix, name", [("exr", "OpenEXR"), ("h5", "HDF5")])
def test_foreign_depth_formats_are_named_with_the_way_to_convert(tmp_path, suffix, name):
    root = pairs(tmp_path, noise(8, 8), np.zeros((8, 8), np.uint8))
    (root / "depths/train").mkdir(parents=True)
    (root / f"depths/train/0.{suffix}").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=rf"1 \.{suffix} files are {name}, which is not read: convert"):
        DATASETS["folder"](root, "train", ("depth",))


def test_lists_with_marks_tabs_and_spaces(tmp_path):
    path = tmp_path / "l.txt"
    path.write_text("\ufeff# a comment\nmy photo 1.png\n\n  b \n", encoding="utf-8")
    assert read_names(path, "X") == ["my photo 1.png", "b"]
    path.write_text("\ufeffrgb 1.png\tdepth 1.png\t518.8\nrgb 2.jpg  a/depth 2.PNG 518.8\nr.png None 518.8\n")
    rows = [["rgb 1.png", "depth 1.png", "518.8"], ["rgb 2.jpg", "a/depth 2.PNG", "518.8"], ["r.png", "None", "518.8"]]
    assert read_list(path, 2, "X") == rows
    path.write_text("/SegNet/a.png /SegNet/b.png;\n")
    assert read_list(path, 2, "X") == [["/SegNet/a.png", "/SegNet/b.png"]]
    path.write_text("a.png\n")
    with pytest.raises(ValueError, match=r"l.txt, line 1: need 2 columns, got 'a.png'"):
        read_list(path, 2, "X")


def test_text_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("Füße".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt: not UTF-8 text \(.*\); save it as UTF-8"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("Füße", encoding="utf-16")
    with pytest.raises(ValueError, match=r"b.txt: not UTF-8 text .*UTF-16"):
        read_text(tmp_path / "b.txt")


def test_pascals_lists_of_one_class(tmp_path):
    root = pairs(tmp_path, noise(8, 8), np.zeros((8, 8), np.uint8), count=2)
    (root / "aeroplane.txt").write_text("0 -1\n1  1\n")
    assert len(DATASETS["folder"](root, "train", ("mask",), classes=2, lists="aeroplane.txt")) == 2
    (root / "aeroplane.txt").write_text("0 elsewhere\n")
    with pytest.raises(FileNotFoundError, match=r"names '0 elsewhere', and .* has no such image"):
        DATASETS["folder"](root, "train", ("mask",), classes=2, lists="aeroplane.txt")


@pytest.mark.parametrize("pattern", ["images{v1}/{split}", "images/{", "images/{0}", "{split.x.y}"])
def test_braces_other_than_the_split_end_in_a_sentence(tmp_path, pattern):
    root = pairs(tmp_path, noise(8, 8), np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"data.args.images is .*in braces only \{split\} can stand"):
        DATASETS["folder"](root, "train", ("mask",), classes=2, images=pattern)


# ---- training on the validation images


def test_training_on_the_validation_images_is_refused_unless_asked_for(tmp_path):
    for split in ("train", "val"):
        pairs(tmp_path, noise(16, 16, 3), np.eye(16, dtype=np.uint8), count=10, split=split)
    splits = [DATASETS["folder"](tmp_path, split, ("mask",), classes=2) for split in ("train", "val")]
    with pytest.raises(ValueError, match=r"all 10 validation images are training images.*data.val_is_train=true"):
        refuse(splits)
    assert "learnt by heart" in refuse(splits, val_is_train=True)[0]
    save(tmp_path / "images/val/9.png", noise(16, 16, 3, seed=5))
    assert refuse([DATASETS["folder"](tmp_path, split, ("mask",), classes=2) for split in ("train", "val")], 10) == []


def test_validation_on_a_part_of_the_training_files_is_refused_and_a_few_shared_ones_are_said(tmp_path):
    pairs(tmp_path, noise(16, 16, 3), np.eye(16, dtype=np.uint8), count=6)
    pairs(tmp_path, noise(16, 16, 3, seed=1), np.eye(16, dtype=np.uint8), count=3, split="val")
    (tmp_path / "val.txt").write_text("1\n2\n")
    train = DATASETS["folder"](tmp_path, "train", ("mask",), classes=2)
    part = DATASETS["folder"](
        tmp_path, "val", ("mask",), classes=2, images="images/train", masks="masks/train", lists="val.txt"
    )
    with pytest.raises(ValueError, match=r"all 2 validation images are training images, e.g. .*1.png"):
        refuse([train, part])
    assert refuse([train, DATASETS["folder"](tmp_path, "val", ("mask",), classes=2)]) == []
    part.images[1] = tmp_path / "images/val/0.png"
    assert refuse([train, part]) == [f"1 of 2 validation images are training images too, e.g. {tmp_path}/images/train/1.png"]


# ---- what is left out is said


def test_a_folder_that_may_not_be_read_is_an_error_and_no_gap(tmp_path, monkeypatch):
    for name in ("open/a.png", "closed/b.png", ".hidden/c.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        save(tmp_path / name, noise(4, 5))
    scan = os.scandir

    def refused(place):
        if os.path.basename(place) in ("closed", ".hidden"):
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="closed"):
        list(walk(tmp_path))
    (tmp_path / "closed").rename(tmp_path / ".closed")
    assert [path.name for path in walk(tmp_path)] == ["a.png"]


def test_masks_without_an_image_and_images_without_a_class_are_named(tmp_path):
    for name in ("images/train/a.png", "masks/train/a.png", "masks/train/b.png", "masks/train/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name, noise(4, 5))
    (notice,) = DATASETS["folder"](tmp_path, "train", ("mask",), classes=256).notices
    assert notice.startswith("2 mask files have no image and are not used, e.g. ") and notice.endswith("b.png")
    shared = DATASETS["folder"](tmp_path, "train", ("mask",), classes=256, masks="masks/train")
    assert not shared.notices, "one folder of masks for both splits"
    for name in ("classes/train/cat/1.png", "classes/train/dog/2.png", "classes/train/stray.png", "classes/train/._x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name, noise(4, 5))
    labels = DATASETS["class_folder"](tmp_path / "classes", "train", ("label",))
    assert len(labels) == 2
    (notice,) = labels.notices
    assert notice.startswith("1 images of ") and notice.endswith("in no class folder and are not used, e.g. stray.png")


@pytest.mark.parametrize("text", ['"my file"\r\n"other.png"\r\n', "'my file.png'\n'other'\n", "my file\r\nother\r\n"])
def test_lists_with_quotes_and_any_line_ends(tmp_path, text):
    for name in ("my file", "other"):
        for folder in ("images", "masks"):
            (tmp_path / f"{folder}/train").mkdir(parents=True, exist_ok=True)
            save(tmp_path / f"{folder}/train/{name}.png", noise(4, 5))
    (tmp_path / "train.txt").write_bytes(text.encode("utf-8-sig"))
    data = DATASETS["folder"](tmp_path, "train", ("mask",), classes=256, lists="{split}.txt")
    assert [path.stem for path in data.images] == ["my file", "other"]
