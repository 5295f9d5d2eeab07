"""Joint transforms: image, mask and depth stay aligned, and no value appears that was not there."""

import random

import golden
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as vision

from train.sample import KINDS, Look, pick_nearest
from train.schema import AugmentConfig
from train.transforms import Seeded, build_transform, cut_strip, evaluation_size, seeded, timm_policy


@pytest.fixture(autouse=True)
def seed():
    """The same draws in every run."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.5)


def sample(height=48, width=64):
    """A picture that encodes its own position: red = row, green = column; mask and depth repeat it in coarse steps."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    image = torch.stack([rows * 4, columns * 3, torch.full_like(rows, 90)]).to(torch.uint8)
    mask = (rows // 8 * 8 + columns // 8) % 200
    depth = 1 + rows.float() / height + (columns // 8).float()
    depth[:6] = 0
    return {
        "image": image,
        "mask": mask.long(),
        "depth": depth[None],
        "path": "here",
    }


def image_values(image):
    """Back from normalised to 0..255."""
    return 255 * (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])


GEOMETRY = [
    AugmentConfig(),
    AugmentConfig(hflip=1.0, vflip=1.0),
    AugmentConfig(crop="area", scale=(0.3, 1.0), hflip=0.5),
    AugmentConfig(crop="scale", scale=(0.5, 2.0), hflip=0.5),
    AugmentConfig(crop="scale", scale=(0.5, 2.0), interpolation="bicubic", color_jitter=0.4, color_jitter_prob=1.0),
    AugmentConfig(crop="native", scale=(0.7, 1.5)),
    AugmentConfig(crop="pad", pad=7, vflip=0.5),
    AugmentConfig(rotate=30.0),
]


@pytest.mark.parametrize("augment", GEOMETRY)
def test_training_output_has_the_size_and_only_values_of_the_input(augment):
    transform = build_transform(True, ("mask", "depth"), (40, 56), MEAN, STD, augment)
    source = sample()
    for _ in range(5):
        out = transform(source)
        assert {key: tuple(value.shape) for key, value in out.items() if key != "path"} == {
            "image": (3, 40, 56),
            "mask": (40, 56),
            "depth": (1, 40, 56),
        }
        assert (out["image"].dtype, out["mask"].dtype, out["depth"].dtype) == (torch.float32, torch.int64, torch.float32)
        assert all(type(out[key]) is torch.Tensor for key in ("image", "mask", "depth"))
        assert set(out["mask"].unique().tolist()) <= set(source["mask"].unique().tolist()) | {255}
        assert set(out["depth"].unique().tolist()) <= set(source["depth"].unique().tolist()) | {0.0}


@pytest.mark.parametrize("augment", [a for a in GEOMETRY if not a.color_jitter])
def test_image_mask_and_depth_show_the_same_place(augment):
    """The colour of a pixel says where it came from; mask and depth there must be those of that place."""
    source = sample()
    transform = build_transform(True, ("mask", "depth"), (40, 56), MEAN, STD, augment)
    for _ in range(5):
        out = transform(source)
        red, green, blue = image_values(out["image"])
        rows, columns = red / 4, green / 3
        inside = (out["mask"] != 255) & ((blue - 90).abs() < 1)  # not padding, not blended with it
        within = (rows % 8 - 4).abs() < 1.5  # away from the coarse steps' borders
        within &= ((columns % 8 - 4).abs() < 1.5) & inside
        assert within.sum() > 20
        expected = (rows[within] // 8 * 8 + columns[within] // 8) % 200
        assert (out["mask"][within] == expected).float().mean() > 0.99
        depth = out["depth"][0][within]
        near = (depth - (1 + rows[within] / 48 + columns[within] // 8)).abs() < 0.06
        assert (near | (depth == 0)).float().mean() > 0.99
        assert (depth > 0).any()


def test_padding_is_void_missing_and_mean_colour():
    transform = build_transform(
        True, ("mask", "depth"), (40, 56), MEAN, STD, AugmentConfig("scale", (0.5, 0.5)), ignore_index=99
    )
    out = transform(sample())
    border = out["mask"] == 99
    assert 0.5 < border.float().mean() < 0.9
    assert (out["depth"][0][border] == 0).all()
    assert out["image"][:, border].abs().max() < 0.02  # mean colour, up to rounding to 8 bits


def test_zoom_changes_depth_only_when_asked():
    source = sample()
    kept = build_transform(True, ("depth",), (40, 56), MEAN, STD, AugmentConfig("scale", (2.0, 2.0)))(source)
    zoomed = build_transform(True, ("depth",), (40, 56), MEAN, STD, AugmentConfig("scale", (2.0, 2.0), zoom_depth=True))(source)
    values = set(source["depth"].unique().tolist())
    assert set(kept["depth"].unique().tolist()) <= values
    assert set((2 * zoomed["depth"]).unique().tolist()) <= values


def test_native_crop_keeps_the_pixels_of_the_file():
    source = sample()
    out = build_transform(True, ("mask",), (40, 56), MEAN, STD, AugmentConfig("native"))(source)
    red, green, _ = image_values(out["image"]).round().long()
    top, left = int(red[0, 0]) // 4, int(green[0, 0]) // 3
    assert torch.equal(out["mask"], source["mask"].as_subclass(torch.Tensor)[top : top + 40, left : left + 56])
    assert torch.equal(red, source["image"][0, top : top + 40, left : left + 56].long())


@pytest.mark.parametrize("case", golden.cases("cutdepth_strips"))
def test_the_published_strip_matches_the_authors(case):
    """Every fourth sample gets one; depth stays as it is."""
    info, tensors = golden.load(case)
    count = sum(name.startswith("input/image_") for name in tensors)
    for i in range(count):
        image, depth = tensors[f"input/image_{i}"].permute(2, 0, 1), tensors[f"input/depth_{i}"][None]
        if i % info["kwargs"]["every"] == 0:
            image = cut_strip(image, depth, *tensors[f"input/draws_{i}"].tolist())
        torch.testing.assert_close(image / 255, tensors[f"output/image_{i}"], **golden.tolerance(info))
        assert torch.equal(depth[0], tensors[f"output/depth_{i}"])


def test_the_published_strip_holds_file_units_before_the_flip():
    source = {**sample(48, 64), "depth": torch.full((1, 48, 64), 1.3)}
    augment = AugmentConfig(cut_depth=1.0, cut_depth_form="file_units", hflip=1.0)
    out = build_transform(True, ("depth",), (48, 64), (0.0,) * 3, (1.0,) * 3, augment, depth_divisor=1000)(source)
    strip = (out["image"] * 255).round()[:, 0] == 1300 % 256
    plain = (source["image"].flip(-1)[:, 0] == (out["image"] * 255).round()[:, 0]).all(0)
    assert strip.all(0).any() and (strip.all(0) | plain).all()


def test_cut_depth_puts_a_strip_of_the_depth_into_the_image():
    source = sample()
    plain = build_transform(True, ("depth",), (48, 64), MEAN, STD)(source)
    cut = build_transform(True, ("depth",), (48, 64), MEAN, STD, AugmentConfig(cut_depth=1.0))(source)
    changed = (cut["image"] != plain["image"]).any(0).any(0)
    assert changed.any()
    strip = torch.arange(64)[changed]
    assert strip.max() - strip.min() + 1 == len(strip)
    assert torch.equal(cut["image"][:, :, changed], cut["depth"].expand(3, -1, -1)[:, :, changed])
    assert torch.equal(cut["depth"], plain["depth"])


@pytest.mark.parametrize(("old", "new"), [((6, 8), (3, 4)), ((6, 8), (12, 24)), ((5, 7), (3, 4)), ((5, 7), (9, 11))])
def test_nearest_is_the_pixel_under_the_centre(old, new):
    values = torch.arange(old[0] * old[1]).view(old)
    expected = torch.nn.functional.interpolate(values[None, None].double(), new, mode="nearest-exact")[0, 0].long()
    assert torch.equal(pick_nearest(values, new), expected)


def test_evaluation_resizes_the_image_and_leaves_targets_alone():
    source = sample()
    out = build_transform(False, ("mask", "depth"), (24, 20), MEAN, STD)(source)
    assert out["image"].shape == (3, 24, 20)
    assert torch.equal(out["mask"], source["mask"].as_subclass(torch.Tensor))
    assert torch.equal(out["depth"], source["depth"].as_subclass(torch.Tensor))


@pytest.mark.parametrize(
    ("rule", "size", "seen"),
    [
        (None, (480, 640), (40, 56)),
        ("native", (480, 641), (480, 641)),
        ((512, 2048), (480, 641), (512, 684)),  # 683.7 rounded
        ((512, 2048), (641, 480), (684, 512)),
        ((512, 2048), (300, 1500), (410, 2048)),  # the long side binds: 409.6
        ((512, 2048), (512, 2048), (512, 2048)),
    ],
)
def test_evaluation_size_keeps_the_ratio_when_it_is_asked_to(rule, size, seen):
    """The numbers of mmcv.imrescale for scale=(2048, 512): the smaller of the two factors, halves up."""
    assert evaluation_size(*size, (40, 56), rule) == seen


def test_evaluation_shows_the_image_at_its_evaluation_size():
    source = sample()
    height, width = source["image"].shape[-2:]
    short = 2 * min(height, width)
    out = build_transform(False, ("mask",), (40, 56), MEAN, STD, eval_resize=(short, 10 * short))(source)
    assert out["image"].shape == (3, 2 * height, 2 * width)
    assert torch.equal(out["mask"], source["mask"].as_subclass(torch.Tensor))


@pytest.mark.parametrize(
    ("targets", "rule", "message"),
    [
        (("label",), "native", "for dense tasks"),
        (("mask",), (2048, 512), r"short side, largest long side\) in pixels, got \(2048, 512\)"),
        (("depth",), (0, 512), "in pixels, got"),
    ],
)
def test_evaluation_sizes_that_cannot_be_meant_are_refused(targets, rule, message):
    with pytest.raises(ValueError, match=message):
        build_transform(False, targets, (40, 56), MEAN, STD, eval_resize=rule)


def test_classification_evaluation_is_resize_and_centre_crop():
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    image[:, 25:75, 75:125] = 255  # the middle quarter of the square centre
    out = build_transform(False, ("label",), (50, 50), (0.0,) * 3, (1.0,) * 3, AugmentConfig(eval_crop=0.5))(
        {"image": image, "label": 3, "path": ""}
    )
    assert out["image"].shape == (3, 50, 50)
    assert out["image"].mean() > 0.97  # 100x100 at half the crop: only white is left
    assert out["label"] == 3


def test_normalisation_is_by_channel():
    source = {"image": torch.full((3, 8, 8), 51, dtype=torch.uint8), "label": 0, "path": ""}
    out = build_transform(False, ("label",), (8, 8), MEAN, STD)(source)["image"]
    torch.testing.assert_close(out[:, 0, 0], (0.2 - torch.tensor(MEAN)) / torch.tensor(STD))
    with pytest.raises(ValueError, match="3 channels, mean and std have 1"):
        build_transform(False, ("label",), (8, 8), (0.5,), (0.5,))(source)


def test_timm_policies_and_erasing_change_the_image():
    source = {"image": torch.randint(255, (3, 32, 32), dtype=torch.uint8), "label": 1, "path": ""}
    plain = build_transform(True, ("label",), (32, 32), MEAN, STD)(source)["image"]
    for augment in (
        AugmentConfig(auto_augment="rand-m9-n2"),
        AugmentConfig(auto_augment="v0"),
        AugmentConfig(random_erasing=1.0),
    ):
        changed = build_transform(True, ("label",), (32, 32), MEAN, STD, augment)
        assert any((changed(source)["image"] != plain).any() for _ in range(8))


@pytest.mark.parametrize(
    ("targets", "augment", "words"),
    [
        (("mask",), AugmentConfig(auto_augment="rand-m9"), "classification only"),
        (("depth",), AugmentConfig(random_erasing=0.5), "classification only"),
        (("mask",), AugmentConfig(eval_crop=0.9), "classification only"),
        (("label",), AugmentConfig(auto_augment="best"), "must start with"),
        (("label",), AugmentConfig(crop="centre"), "resize, area, scale, native or pad"),
        (("label",), AugmentConfig(crop="area", scale=(0.5, 1.5)), "share"),
        (("label",), AugmentConfig(scale=(2.0, 1.0)), "low <= high"),
        (("label",), AugmentConfig(hflip=2.0), "probability"),
        (("depth",), AugmentConfig(zoom_depth=True), "crop 'scale'"),
    ],
)
def test_settings_that_contradict_are_refused(targets, augment, words):
    with pytest.raises(ValueError, match=words):
        build_transform(True, targets, (32, 32), MEAN, STD, augment)


class Noise(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {**sample(), "path": str(index)}


def draws(dataset):
    return [dataset[i]["image"] for i in range(len(dataset))]


def test_augmentation_is_a_function_of_seed_draw_and_index():
    augment = AugmentConfig("scale", (0.5, 2.0), color_jitter=0.4, color_jitter_prob=1.0)
    transform = build_transform(True, ("mask",), (24, 24), MEAN, STD, augment)
    first = draws(Seeded(Noise(), transform, seed=1))
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    again = Seeded(Noise(), transform, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(again), strict=True))
    assert torch.equal(again[2, 0]["image"], first[2])
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(first[i], again[i, 1]["image"]) for i in range(4))
    assert not torch.equal(Seeded(Noise(), transform, seed=2)[0]["image"], first[0])


def test_loader_workers_draw_the_same():
    transform = build_transform(True, ("mask",), (24, 24), MEAN, STD, AugmentConfig("scale", (0.5, 2.0)))
    dataset = Seeded(Noise(), transform, seed=1)
    order = [(index, draw) for draw in (0, 1) for index in range(4)]
    loader = DataLoader(dataset, batch_size=2, sampler=order, num_workers=1)
    loaded = torch.cat([batch["image"] for batch in loader])
    assert torch.equal(loaded, torch.stack([dataset[pair]["image"] for pair in order]))


def test_seeding_leaves_the_generators_as_they_were():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with seeded(1, 2, 3):
        inside = random.random(), np.random.rand(), float(torch.rand(()))
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    with seeded(1, 2, 3):
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == inside != expected


@pytest.mark.parametrize("policy", ["rand-m10-n4-inc1", "v0", "v0r", "original", "originalr", "3a"])
def test_every_magnitude_of_a_policy_gives_an_image(policy):
    """Magnitude 10 posterises to 0 bits, which Pillow 13 refuses and timm asks for: black, as Pillow gave it before."""
    change = timm_policy(policy, (124, 116, 104), 24)
    pairs = getattr(change, "policy", None) or [change.ops]
    image = vision.to_pil_image(torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8))
    seen = set()
    for operation in {id(op): op for pair in pairs for op in pair}.values():
        operation.prob = 1.0
        changed = operation(image)
        assert changed.size == image.size and changed.mode == "RGB"
        if operation.name.startswith("Posterize"):
            (bits,) = operation.level_fn(operation.magnitude, operation.hparams)
            seen.add(bits)
            assert (changed.getextrema() == ((0, 0),) * 3) == (bits == 0)
    assert seen if policy != "3a" else not seen
    assert 0 in seen or policy not in ("rand-m10-n4-inc1", "v0")


def look():
    return Look([0, 0, 0], 255, vision.InterpolationMode.BILINEAR)


@pytest.mark.parametrize("axis, sign", [(-1, (-1, 1, 1)), (-2, (1, -1, 1))])
def test_a_flip_mirrors_normals_too(axis, sign):
    normal = torch.nn.functional.normalize(torch.randn(3, 4, 5), dim=0)
    flipped = KINDS["normal"].flip(normal, axis, (4, 5))
    assert torch.equal(flipped, normal.flip(axis) * torch.tensor(sign).view(3, 1, 1))
    assert torch.equal(KINDS["normal"].flip(flipped, axis, (4, 5)), normal)


def test_a_rotation_turns_normals_with_the_image():
    """A quarter turn counter-clockwise: what looked right looks up, and y points down."""
    normal = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 5, 5)
    turned = KINDS["normal"].rotate(normal, 90.0, (5, 5), look())
    torch.testing.assert_close(turned[:, 2, 2], torch.tensor([0.0, -1.0, 0.0]), atol=1e-6, rtol=0)
    back = KINDS["normal"].rotate(turned, -90.0, (5, 5), look())
    torch.testing.assert_close(back, normal, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name, value", [("mask", 255), ("panoptic", -1), ("depth", 0), ("normal", 0), ("image", 7)])
def test_every_kind_says_what_padding_holds(name, value):
    kind = KINDS[name]
    shape = {"mask": (3, 4), "panoptic": (3, 4), "depth": (1, 3, 4), "normal": (3, 3, 4), "image": (1, 3, 4)}[name]
    ones = kind.tensor(torch.ones(shape, dtype=torch.uint8))
    padded = kind.pad(ones, [1, 2, 3, 4], Look([7], 255, vision.InterpolationMode.BILINEAR))
    assert padded.shape[-2:] == (9, 8) and kind.size(padded) == (9, 8)
    assert (kind.crop(padded, 2, 1, (3, 4)) == ones).all()
    assert (padded[..., :2, :] == value).all() and (padded[..., -3:] == value).all()


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("image", torch.zeros(3, 4, 4)),
        ("mask", torch.zeros(4, 4)),
        ("depth", torch.zeros(2, 4, 4)),
        ("normal", torch.zeros(4, 4)),
        ("panoptic", torch.zeros(4, 4)),
    ],
)
def test_an_entry_of_another_shape_or_type_is_refused(name, wrong):
    with pytest.raises(ValueError, match="must be .*, got float32 "):
        KINDS[name].tensor(wrong)


@pytest.mark.parametrize("size", [(224, 224), (96, 96), (96, 128)])
@pytest.mark.parametrize("photo", [(427, 320), (320, 481), (500, 308), (333, 333), (101, 640)])
@pytest.mark.parametrize("crop", [0.875, 0.95, 1.0])
def test_the_classification_evaluation_is_timms(size, photo, crop):
    """Every pixel: a resize that is one pixel longer moves all of them."""
    from PIL import Image
    from timm.data import create_transform

    pixels = np.random.default_rng(0).integers(0, 255, (photo[1] // 8 + 1, photo[0] // 8 + 1, 3), np.uint8)
    image = Image.fromarray(pixels).resize(photo, Image.Resampling.BICUBIC)
    mean = std = (0.5, 0.5, 0.5)
    theirs = create_transform((3, *size), interpolation="bicubic", mean=mean, std=std, crop_pct=crop)(image)
    augment = AugmentConfig(eval_crop=crop, interpolation="bicubic")
    transform = build_transform(False, ("label",), size, mean, std, augment)
    ours = transform({"image": torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()), "label": 0, "path": "a"})["image"]
    assert (ours - theirs).abs().max() <= 2.5 / 127.5  # rounding to bytes once more, or once less
