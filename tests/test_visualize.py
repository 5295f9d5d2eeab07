"""Pictures: right colours in right places, files that open."""

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import DATASETS, DepthSpec
from train.visualize import (
    BAD,
    GOOD,
    MISSING,
    Panel,
    class_legend,
    color_mask,
    depth_panels,
    depth_to_rgb,
    label_panels,
    make_palette,
    mask_panels,
    overlay,
    resize_rgb,
    save_predictions,
    to_rgb,
)


def test_an_image_survives_normalisation():
    image = torch.randint(255, (3, 5, 6), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    normalised = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert np.array_equal(to_rgb(normalised, mean, std), image.permute(1, 2, 0).numpy())
    assert np.array_equal(to_rgb(image), image.permute(1, 2, 0).numpy())
    assert to_rgb(torch.zeros(1, 4, 4)).shape == (4, 4, 3)
    assert to_rgb(torch.zeros(6, 4, 4)).shape == (4, 4, 3)


def test_palette_colours_are_distinct():
    assert len(set(make_palette(150))) == 150
    few = np.array(make_palette(12), float)
    distance = np.linalg.norm(few[:, None] - few[None], axis=-1) + 1000 * np.eye(12)
    assert distance.min() > 30


def test_mask_colours_and_overlay():
    mask = torch.tensor([[0, 1], [1, 255]])
    palette = [(10, 20, 30), (200, 100, 0)]
    colors = color_mask(mask, palette)
    assert colors[0, 0].tolist() == [10, 20, 30]
    assert colors[0, 1].tolist() == [200, 100, 0]
    assert colors[1, 1].tolist() == [0, 0, 0]
    image = np.full((4, 4, 3), 100, np.uint8)
    blended = overlay(image, mask, palette, strength=0.5)
    assert blended.shape == (2, 2, 3)
    assert blended[0, 1].tolist() == [150, 100, 50]
    assert resize_rgb(image, (7, 9)).shape == (7, 9, 3)


def test_depth_is_light_near_dark_far_and_grey_where_missing():
    depth = torch.tensor([[[1.0, 5.0, 9.0, 0.0, float("nan")]]])
    colors = depth_to_rgb(depth, 1.0, 9.0).astype(int)
    brightness = colors.sum(-1)[0]
    assert brightness[0] > brightness[1] > brightness[2]
    assert colors[0, 3].tolist() == colors[0, 4].tolist() == list(MISSING)
    assert depth_to_rgb(torch.zeros(1, 3, 3)).shape == (3, 3, 3)


def test_panels_carry_truth_prediction_and_a_number():
    image = np.zeros((8, 8, 3), np.uint8)
    mask = torch.zeros(4, 6, dtype=torch.int64)
    mask[0] = 255
    guess = mask.clamp_max(1).clone()
    guess[3] = 1
    panels = mask_panels(image, mask, guess, make_palette(2))
    assert [panel.image.shape for panel in panels] == [(4, 6, 3)] * 3
    assert "67% right" in panels[2].title
    depth = torch.full((1, 4, 6), 2.0)
    panels = depth_panels(image, depth, depth * 1.5, DepthSpec())
    assert "AbsRel 0.500" in panels[2].title
    assert len(depth_panels(image, None, depth, DepthSpec())) == 2
    near_far = torch.linspace(9, 1, 24).view(1, 4, 6)  # relative inverse depth: high = near = light
    shown = depth_panels(image, None, near_far, DepthSpec(metric=False, inverse=True))[1].image.astype(int).sum(-1)
    assert shown[0, 0] > shown[3, 5]
    (right,) = label_panels(image, 1, torch.tensor([0.1, 0.9]), ["cat", "dog"])
    (wrong,) = label_panels(image, 0, torch.tensor([0.1, 0.9]), ["cat", "dog"])
    assert (right.title, right.color) == ("dog 90%", GOOD)
    assert wrong.color == BAD
    assert "is cat" in wrong.title


def test_a_sheet_is_written_and_opens(tmp_path):
    scenes = DATASETS["scenes"]("val", ("mask", "depth"), val_count=2, size=(32, 48))
    rows = []
    for sample in scenes:
        image = to_rgb(sample["image"])
        rows.append(mask_panels(image, sample["mask"], sample["mask"], scenes.palette))
        rows[-1] += depth_panels(image, sample["depth"], sample["depth"], scenes.depth)[1:]
    path = tmp_path / "predictions.png"
    save_predictions(path, rows, class_legend(scenes.classes, scenes.palette), (0.5, 10), "title")
    with Image.open(path) as picture:
        assert min(picture.size) > 200
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    save_predictions(tmp_path / "single.png", [[Panel(rows[0][0].image, str(i))] for i in range(9)])
    with Image.open(tmp_path / "single.png") as picture:
        assert picture.width > 2 * picture.height  # six in a row, not one below the other
    with pytest.raises(ValueError, match="nothing to show"):
        save_predictions(path, [])


def test_legend_can_be_cut_to_what_is_present():
    palette = make_palette(5)
    assert class_legend(list("abcde"), palette, present=[3, 1, 1, 255]) == [("b", palette[1]), ("d", palette[3])]
    assert len(class_legend(list("abcde"), palette)) == 5
