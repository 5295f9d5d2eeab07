"""The predictor: windows, scales and flips against what they are defined to be."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train.inference import Predictor, window_weight, windows

IMAGES = torch.randn(2, 3, 37, 53, generator=torch.Generator().manual_seed(0))


def pixelwise(images: torch.Tensor) -> torch.Tensor:
    """A model whose output at a pixel depends on that pixel alone, so windows cannot change it."""
    return torch.cat([images * 2, images.square(), images[:, :1] - images[:, 1:2]], 1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()


def test_one_window_as_large_as_the_image_is_the_whole_image(model):
    whole = Predictor(model, average="values")(IMAGES)
    torch.testing.assert_close(Predictor(model, "slide", window=(37, 53), average="values")(IMAGES), whole)
    larger = Predictor(model, "slide", window=(64, 64), average="values")(IMAGES)
    torch.testing.assert_close(larger, whole)


@pytest.mark.parametrize("blend", ["mean", "smooth"])
@pytest.mark.parametrize(("window", "stride"), [((16, 16), (16, 16)), ((16, 24), (7, 11)), ((37, 20), None), ((5, 5), (1, 1))])
def test_overlaps_do_not_change_a_pixelwise_model(blend, window, stride):
    got = Predictor(pixelwise, "slide", window, stride, blend=blend, average="values")(IMAGES)
    torch.testing.assert_close(got, pixelwise(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("blend", ["mean", "smooth"])
def test_weights_are_positive_and_sum_to_one_on_a_constant(blend):
    assert (window_weight((5, 8), blend, IMAGES.device) > 0).all()
    ones = Predictor(lambda x: torch.ones_like(x), "slide", 16, 5, blend=blend, average="values")(IMAGES)
    torch.testing.assert_close(ones, torch.ones_like(ones))


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 40), (33, 50)])
@pytest.mark.parametrize(("window", "stride"), [((16, 16), (16, 16)), ((16, 24), (5, 9))])
def test_windows_cover_every_pixel_with_one_shape(size, window, stride):
    seen, shapes = torch.zeros(size), set()
    for rows, columns in windows(size, window, stride):
        seen[rows, columns] += 1
        shapes.add((rows.stop - rows.start, columns.stop - columns.start))
    assert (seen > 0).all()
    assert shapes == {(min(size[0], window[0]), min(size[1], window[1]))}


def test_the_model_never_sees_more_than_a_window():
    seen = []
    Predictor(lambda x: seen.append(x.shape[-2:]) or x, "slide", (16, 20), scales=(0.5, 1.0, 2.0), flip=True)(IMAGES)
    assert max(h for h, _ in seen) == 16 and max(w for _, w in seen) == 20


@pytest.mark.parametrize("mode", [{}, {"mode": "slide", "window": (20, 24), "stride": (10, 12)}])
def test_flip_makes_the_prediction_equivariant(model, mode):
    predictor = Predictor(model, **mode, flip=True)
    torch.testing.assert_close(predictor(IMAGES.flip(-1)), predictor(IMAGES).flip(-1), rtol=1e-5, atol=1e-6)
    without = Predictor(model, **mode)
    assert not torch.allclose(without(IMAGES.flip(-1)), without(IMAGES).flip(-1), rtol=1e-5, atol=1e-6)


def test_several_scales_and_flips_are_the_mean_of_softmax_over_the_passes(model):
    size = (50, 60)
    passes = []
    for scale in (0.5, 1.0, 1.5):
        scaled = F.interpolate(IMAGES, [round(37 * scale), round(53 * scale)], mode="bilinear") if scale != 1 else IMAGES
        for flipped in (False, True):
            logits = model(scaled.flip(-1)).flip(-1) if flipped else model(scaled)
            passes.append(F.interpolate(logits, size, mode="bilinear").softmax(1))
    got = Predictor(model, scales=(0.5, 1.0, 1.5), flip=True)(IMAGES, size)
    torch.testing.assert_close(got, torch.stack(passes).mean(0))
    torch.testing.assert_close(got.sum(1), torch.ones(2, *size))


def test_values_are_averaged_as_they_are():
    got = Predictor(lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:]), average="values", flip=True)(IMAGES)
    torch.testing.assert_close(got, IMAGES.mean((2, 3), keepdim=True).expand_as(IMAGES))


def test_classifiers_are_averaged_over_views_and_refuse_windows():
    def classify(x):
        return torch.stack([x.mean((1, 2, 3)), x[..., :10].mean((1, 2, 3))], 1)

    got = Predictor(classify, flip=True)(IMAGES)
    torch.testing.assert_close(got, (classify(IMAGES).softmax(1) + classify(IMAGES.flip(-1)).softmax(1)) / 2)
    with pytest.raises(ValueError, match="use 'whole'"):
        Predictor(classify, "slide", 16)(IMAGES)


def test_named_outputs_are_averaged_each_in_its_way():
    def both(x):
        return {"mask": pixelwise(x), "depth": x[:, :1]}

    got = Predictor(both, "slide", 16, average={"mask": "probabilities", "depth": "values"})(IMAGES)
    torch.testing.assert_close(got["mask"], pixelwise(IMAGES).softmax(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["depth"], IMAGES[:, :1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'depth'"):
        Predictor(both, average={"mask": "values"})(IMAGES)


def test_the_input_is_left_as_it_is():
    before = IMAGES.clone()
    Predictor(lambda x: x, scales=(1.0, 0.5), flip=True, average="values")(IMAGES)
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("average", ["values", "probabilities"])
@pytest.mark.parametrize("settings", [{}, {"flip": True, "scales": (1.0, 0.5), "blend": "smooth"}])
def test_windows_use_the_memory_of_the_image_before(settings, average, model):
    """No buffer grows over images, also where their sizes go up and down; and no result is written over by the next one."""
    predictor = Predictor(model, "slide", window=(16, 16), average=average, **settings)
    fresh = [
        Predictor(model, "slide", window=(16, 16), average=average, **settings)(image) for image in (IMAGES, IMAGES.flip(1))
    ]
    with torch.inference_mode():
        first = predictor(IMAGES)
    kept = predictor._sums._kept[None]
    assert kept.numel() == 2 * 4 * 37 * 53
    predictor(IMAGES[..., :20, :30])
    second = predictor(IMAGES.flip(1))
    assert predictor._sums._kept == {None: kept} and len(predictor._weights) == 1
    assert torch.equal(first, fresh[0]) and torch.equal(second, fresh[1])


def test_two_threads_do_not_share_the_windows_sums():
    predictor = Predictor(pixelwise, "slide", window=(16, 16), average="values")
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(predictor, [IMAGES, -IMAGES] * 8))
    for result, image in zip(results, [IMAGES, -IMAGES] * 8, strict=True):
        torch.testing.assert_close(result, pixelwise(image), rtol=1e-5, atol=1e-6)


def test_the_protocol_says_how():
    assert Predictor(pixelwise).protocol == "whole image, single scale"
    predictor = Predictor(pixelwise, "slide", (512, 512), (341, 341), (0.5, 1.0), flip=True, blend="smooth")
    assert predictor.protocol == "windows 512x512 every 341x341, smooth blending, scales 0.5 1, flip"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mode": "tile"}, "'whole' or 'slide'"),
        ({"mode": "slide"}, "needs a window"),
        ({"mode": "slide", "window": 16, "stride": 20}, "left out"),
        ({"mode": "slide", "window": (16, 0)}, "positive"),
        ({"window": 16}, "belong to mode 'slide'"),
        ({"scales": ()}, "positive factors"),
        ({"average": "logits"}, "'values'"),
        ({"blend": "hard"}, "'smooth'"),
    ],
)
def test_senseless_settings_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        Predictor(pixelwise, **settings)
