"""Pictures: right colours in right places, files that open."""

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import DATASETS, DepthSpec
from train.show import DepthMaps, Labels, Masks, Names, Panel, Several, save_sheet, sheet, to_rgb
from train.show.labels import BAD, GOOD
from train.show.masks import class_legend, color_mask, overlay
from train.show.normals import NormalMaps
from train.show.sheet import MISSING, depth_to_rgb, make_palette, resize_rgb, wrapped


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
    names = Names(["cat", "dog"])
    panels = Masks(2).panels(image, {"mask": mask[None]}, [guess[None]], names)
    assert [panel.image.shape for panel in panels] == [(4, 6, 3)] * 3
    assert "67% right" in panels[2].title and panels[2].legend[1] == ("dog", make_palette(2)[1])
    depth = torch.full((1, 1, 4, 6), 2.0)
    panels = DepthMaps(DepthSpec()).panels(image, {"depth": depth}, [depth * 1.5], names)
    assert "AbsRel 0.500" in panels[2].title and float(panels[2].depth.max()) == 3.0
    assert len(DepthMaps(DepthSpec()).panels(image, {}, [depth], names)) == 2
    near_far = torch.linspace(9, 1, 24).view(1, 1, 4, 6)  # relative inverse depth: high = near = light
    shown = DepthMaps(DepthSpec(metric=False, inverse=True)).panels(image, {}, [near_far], names)[1].image.astype(int).sum(-1)
    assert shown[0, 0] > shown[3, 5]
    scores = torch.tensor([[0.1, 0.9]])
    (right,) = Labels().panels(image, {"label": torch.tensor([1])}, scores, names)
    (wrong,) = Labels().panels(image, {"label": torch.tensor([0])}, scores, names)
    assert (right.title, right.color) == ("dog 90%", GOOD)
    assert wrong.color == BAD
    assert "is cat" in wrong.title


def scenes_rows():
    """Image, mask and depth of two scenes, the truth as the prediction."""
    scenes = DATASETS["scenes"]("val", ("mask", "depth"), val_count=2, size=(32, 48))
    show = Several({"mask": Masks(len(scenes.classes)), "depth": DepthMaps(scenes.depth)})
    rows = []
    for sample in scenes:
        batch = {"mask": sample["mask"][None], "depth": sample["depth"][None]}
        prediction = {"mask": [batch["mask"]], "depth": [batch["depth"]]}
        rows.append(show.panels(to_rgb(sample["image"]), batch, prediction, Names.of(scenes)))
    return rows


def test_a_sheet_is_written_and_opens(tmp_path):
    rows, path = scenes_rows(), tmp_path / "predictions.png"
    assert [len(row) for row in rows] == [5, 5]
    save_sheet(path, rows, "title")
    with Image.open(path) as picture:
        assert min(picture.size) > 200
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    save_sheet(tmp_path / "single.png", [[Panel(rows[0][0].image, str(i))] for i in range(9)])
    with Image.open(tmp_path / "single.png") as picture:
        assert picture.width > 2 * picture.height  # six in a row, not one below the other
    with pytest.raises(ValueError, match="nothing to show"):
        save_sheet(path, [])


@pytest.mark.parametrize("aspect", [(40, 40), (16, 80), (90, 12)])
@pytest.mark.parametrize(
    "title", ["short", "a class of a rather long name, 100%\n(is another class of a long name)", "x" * 200]
)
def test_no_title_is_cut_off(tmp_path, title, aspect):
    """The border of the sheet stays white, and every line of the titles is above the images."""
    image = np.full((*aspect, 3), 200, np.uint8)
    path = tmp_path / "sheet.png"
    save_sheet(path, [[Panel(image, title)] for _ in range(8)])
    with Image.open(path) as picture:
        gray = np.asarray(picture.convert("L"))
    for edge in (gray[:2], gray[-2:], gray[:, :2], gray[:, -2:]):
        assert edge.min() == 255
    lines = wrapped(title, 2.6, 8).count("\n") + 1
    above = gray[: ((gray == 200).sum(1) > 40).argmax()]
    text = (above < 128).any(1)
    starts = int((text[1:] & ~text[:-1]).sum())  # lines of text, which white rows part (descenders may join two)
    assert starts >= max(1, lines // 2) and text[:3].sum() == 0


def test_depths_of_a_sheet_share_the_range_of_their_middle(tmp_path, monkeypatch):
    """One far pixel does not wash out a near scene, and the bar says the range."""
    near, far = np.full((20, 30), 2.0, np.float32), np.full((20, 30), 4.0, np.float32)
    near[0, 0] = 80.0
    low, high = sheet.percentiles([near, far])
    assert (low, high) == (2.0, 4.0) and sheet.percentiles([np.zeros((2, 2))]) == (0.0, 1.0)
    seen = []
    monkeypatch.setattr(
        sheet, "depth_to_rgb", lambda depth, low, high: seen.append((low, high)) or depth_to_rgb(depth, low, high)
    )
    save_sheet(tmp_path / "sheet.png", [[Panel(np.zeros((20, 30, 3), np.uint8), depth=values) for values in (near, far)]])
    assert seen == [(2.0, 4.0)] * 2


def test_legend_holds_the_classes_that_occur():
    palette = make_palette(5)
    mask = np.array([[3, 1], [1, 255]])
    assert class_legend(list("abcde"), palette, mask) == {1: ("b", palette[1]), 3: ("d", palette[3])}
    assert class_legend(None, palette, mask) == {}


def test_normals_have_a_name_and_a_picture_of_the_photographs_size():
    normals = torch.nn.functional.normalize(torch.randn(1, 3, 8, 9), dim=1)
    show, image = NormalMaps(), np.zeros((8, 9, 3), np.uint8)
    assert torch.equal(show.fields(normals)["normal"], normals[0])
    assert show.picture(image, normals, Names()).shape == (8, 9, 3)
    assert np.array_equal(show.moving(Names())(image, normals), show.picture(image, normals, Names()))
