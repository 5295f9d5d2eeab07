"""Data that need no files: generated scenes and the digits of scikit-learn."""

import numpy as np
import pytest
import torch

from train.data import DATASETS
from train.data.scenes import BODIES, CLASSES, FOCAL, Box, Cone, Cylinder, Plane, Sphere, camera_rays, render


def scenes(split="train", **kwargs):
    return DATASETS["scenes"](split, ("mask", "depth"), **{"count": 8, "val_count": 8, "size": (48, 64), **kwargs})


def test_a_scene_is_image_classes_and_metres():
    data = scenes()
    for sample in data:
        assert sample["image"].shape == (3, 48, 64)
        assert sample["image"].dtype == torch.uint8
        assert (sample["mask"].dtype, sample["depth"].dtype) == (torch.int64, torch.float32)
        assert sample["depth"].shape == (1, 48, 64)
        assert data.depth.valid(sample["depth"]).all()
        assert float(sample["image"].float().std()) > 10


def test_scenes_are_the_same_again_and_other_with_another_seed_or_split():
    for i in (0, 5):
        first, again = scenes()[i], scenes()[i]
        assert all(torch.equal(first[key], again[key]) for key in ("image", "mask", "depth"))
        assert not torch.equal(first["image"], scenes(seed=1)[i]["image"])
        assert not torch.equal(first["image"], scenes("val")[i]["image"])


def test_a_scene_is_rendered_once_and_cannot_be_changed_from_outside():
    data = scenes()
    first = data[0]
    first["image"].zero_()
    assert data[0]["image"].float().mean() > 5
    assert list(data.rendered) == [0]


def test_all_classes_occur_and_overlap():
    data = scenes(count=40)
    seen = torch.bincount(torch.cat([sample["mask"].flatten() for sample in data]), minlength=len(CLASSES))
    share = seen / seen.sum()
    assert (share[2:] > 0.02).all(), share
    assert (share[:2] > 0.2).all(), share


def test_class_does_not_show_in_the_hue():
    """Mean hues of the classes lie close together beside the spread inside a class (brightness is shading, which may tell)."""
    colors = {i: [] for i in range(2, len(CLASSES))}
    for sample in scenes(count=60):
        for i in colors:
            where = sample["mask"] == i
            if where.sum() > 20:
                color = sample["image"][:, where].float().mean(1)
                colors[i].append(color / color.sum())
    means = torch.stack([torch.stack(values).mean(0) for values in colors.values()])
    spread = torch.stack([torch.stack(values).std(0) for values in colors.values()]).mean()
    assert (means - means.mean(0)).abs().max() < 0.4 * spread


def axis(p):
    """Distance from the upright axis through x = 0.1, z = 3."""
    return np.hypot(p[..., 0] - 0.1, p[..., 2] - 3)


SOLIDS = [
    (Sphere((0.2, -0.3, 3.0), 0.7), lambda p: np.linalg.norm(p - (0.2, -0.3, 3.0), axis=-1) <= 0.7),
    (Cylinder((0.1, -1.0, 3.0), 0.5, 1.2), lambda p: (axis(p) <= 0.5) & (p[..., 1] <= 0.2) & (p[..., 1] >= -1)),
    (Cone((0.1, -1.0, 3.0), 0.5, 1.2), lambda p: (axis(p) <= 0.5 * (0.2 - p[..., 1]) / 1.2) & (p[..., 1] >= -1)),
    (Box((0.1, -0.4, 3.0), (0.5, 0.6, 0.3), 0.0), lambda p: (np.abs(p - (0.1, -0.4, 3.0)) <= (0.5, 0.6, 0.3)).all(-1)),
]  # fmt: skip


@pytest.mark.parametrize(("solid", "inside"), SOLIDS, ids=lambda value: type(value).__name__)
def test_a_ray_meets_a_solid_where_walking_along_it_enters(solid, inside):
    """Against a march in steps of a millimetre with the solid's own inequality."""
    rays = camera_rays(9, 13, 0.15).astype(np.float64)
    t = np.arange(1.0, 5.0, 1e-3)
    walked = inside(rays[:, None] * t[:, None])
    expected = np.where(walked.any(1), t[walked.argmax(1)], np.inf)
    found = solid.hit(np.zeros(3, np.float32), rays.astype(np.float32))
    both = np.isfinite(expected) & np.isfinite(found)
    assert both.sum() >= 3
    assert (np.isfinite(expected) != np.isfinite(found)).sum() <= 2  # rays that graze the outline
    assert np.abs(found[both] - expected[both]).max() < 0.02
    normals = solid.normal((rays * np.where(both, found, 1)[:, None])[both].astype(np.float32))
    assert np.allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-3)
    assert ((normals * rays[both]).sum(-1) < 0.02).all()  # they face the camera


def test_a_turned_box_is_as_far_as_the_same_box_seen_turned():
    angle = 0.6
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], np.float32)
    rays = camera_rays(15, 21, 0.1)
    centre = np.array([0.1, -0.2, 3.0], np.float32)
    turned = Box(centre, (0.6, 0.4, 0.3), angle).hit(np.zeros(3, np.float32), rays)
    straight = Box(turn @ centre, (0.6, 0.4, 0.3), 0.0).hit(np.zeros(3, np.float32), rays @ turn.T)
    both = np.isfinite(turned) & np.isfinite(straight)
    assert both.sum() > 10
    assert np.allclose(turned[both], straight[both], atol=1e-4)


def test_depth_of_the_floor_is_what_perspective_says():
    """Pixel rows of bare floor: depth * (y of the ray) must be the camera's height, the same in the whole picture."""
    scene = render(np.random.default_rng(3), 48, 64)
    mask, depth = scene.mask, scene.depth
    pitches = np.linspace(0.15, 0.33, 181)
    spreads = []
    for pitch in pitches:
        y = camera_rays(48, 64, pitch)[:, 1].reshape(48, 64)
        heights = (y * depth[0])[mask == CLASSES.index("floor")]
        spreads.append(heights.std())
        if spreads[-1] == min(spreads):
            height = -heights.mean()
    assert min(spreads) < 0.01
    assert 1.35 <= height <= 1.65
    assert Plane((0, 1, 0), -1.0).hit(np.zeros(3, np.float32), np.array([[0, -0.5, 1]], np.float32)) == 2


def test_bad_sizes_counts_targets_and_splits_are_refused():
    with pytest.raises(ValueError, match="at least one scene"):
        scenes(count=0)
    with pytest.raises(ValueError, match="16x16"):
        scenes(size=(8, 64))
    with pytest.raises(ValueError, match="'train' or 'val', got 'test'"):
        scenes("test")
    with pytest.raises(ValueError, match="Digits has no target 'mask'; it provides label"):
        DATASETS["digits"]("train", ("mask",))
    with pytest.raises(IndexError):
        scenes()[8]
    assert len(BODIES) == 4


def test_digits_are_split_once_and_evenly():
    train, val = (DATASETS["digits"](split, ("label",)) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    assert not set(train.indices) & set(val.indices)
    labels = np.array([val[i]["label"] for i in range(len(val))])
    assert np.bincount(labels).min() >= 34
    sample = train[0]
    assert sample["image"].shape == (3, 8, 8)
    assert int(sample["image"].max()) > 200
    assert isinstance(sample["label"], int)


def test_bodies_are_numbered_and_normals_face_the_camera():
    data = DATASETS["scenes"]("train", ("mask", "panoptic", "depth", "normal"), count=4, val_count=1, size=(48, 64))
    for i in range(4):
        sample = data[i]
        segments, normal = sample["panoptic"], sample["normal"]
        assert torch.equal(segments // 1000, sample["mask"])
        numbers = segments.unique()
        assert all(bool(value % 1000) == (int(value) // 1000 in data.things) for value in numbers.tolist())
        assert len(numbers) > 3
        torch.testing.assert_close(normal.norm(dim=0), torch.ones(48, 64), atol=1e-4, rtol=0)
        rows, columns = torch.meshgrid(torch.arange(48) + 0.5 - 24, torch.arange(64) + 0.5 - 32, indexing="ij")
        rays = torch.stack([columns / (FOCAL * 48), rows / (FOCAL * 48), torch.ones(48, 64)])
        assert ((normal * rays).sum(0) < 1e-3).all()
        # the floor is a plane: its normal, times each point of it, is the camera's height
        floor = sample["mask"] == CLASSES.index("floor")
        heights = -(normal * rays * sample["depth"]).sum(0)[floor]
        assert float(heights.std()) < 1e-3 and 1.3 < float(heights.mean()) < 1.7
