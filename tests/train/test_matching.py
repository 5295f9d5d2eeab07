"""Losses of mask classification against the authors' code."""

import golden
import pytest
import torch

from train.matching import Masks, PanopticLosses, PointLosses, hash_words, seeded

pytest.importorskip("scipy")
PREDICTED = ("class_logits", "mask_logits", "pixel_feature", "aux_semantic")


def parts(tensors):
    """Predictions "", "aux_0", ... with gradients, and the targets."""
    predictions: dict = {}
    for name, value in tensors.items():
        place = name.removeprefix("input/").split("/")
        if name.startswith("input/") and "noise" not in place and place[-1] in PREDICTED:
            predictions.setdefault("/".join(place[:-1]), {})[place[-1]] = value.clone().requires_grad_()
    images = sum(name.startswith("input/target_") and name.endswith("labels") for name in tensors)
    targets = [Masks(tensors[f"input/target_{i}/labels"], tensors[f"input/target_{i}/masks"]) for i in range(images)]
    return predictions, targets


def check(total, predictions, tensors, info):
    torch.testing.assert_close(total, tensors["output"], **golden.tolerance(info))
    total.backward()
    for place, prediction in predictions.items():
        for name, value in prediction.items():
            expected = tensors[f"grad/{place}/{name}" if place else f"grad/{name}"]
            torch.testing.assert_close(value.grad, expected, **golden.tolerance(info))


@pytest.mark.parametrize("case", golden.cases("mask2former_criterion"))
def test_mask2former_losses_match_the_authors(case):
    info, tensors = golden.load(case)
    kwargs, weights = info["kwargs"], info["kwargs"]["weights"]
    losses = PointLosses(
        kwargs["num_points"], kwargs["oversample_ratio"], kwargs["importance_sample_ratio"], kwargs["no_object_weight"]
    )
    predictions, targets = parts(tensors)
    total = 0
    for place, prediction in predictions.items():
        draws = f"input/draws/{place or 'final'}"
        starts = [0]
        for target in targets:
            starts.append(starts[-1] + len(target.labels))

        def draw(purpose, image, shape, draws=draws, starts=starts):
            if purpose == "match":
                return tensors[f"{draws}/match_{image}"][0]
            if purpose == "points":
                return tensors[f"{draws}/points"][starts[image] : starts[image + 1]]
            permutation = tensors[f"{draws}/permutation"]
            return permutation.argsort().float() / len(permutation)  # numbers whose order is the permutation

        terms = losses(prediction, targets, draw)
        for name, key in (("class", "loss_ce"), ("mask", "loss_mask"), ("dice", "loss_dice")):
            expected = tensors[f"output/{key}" + (f"_{place.removeprefix('aux_')}" if place else "")]
            torch.testing.assert_close(terms[name], expected, **golden.tolerance(info))
            total = total + weights[key] * terms[name]
    check(total, predictions, tensors, info)


@pytest.mark.parametrize("case", golden.cases("kmax_criterion"))
def test_kmax_losses_match_the_authors(case):
    info, tensors = golden.load(case)
    kwargs, weights = info["kwargs"], info["kwargs"]["weights"]
    losses = PanopticLosses(
        kwargs["pixel_insdis_sample_k"],
        kwargs["pixel_insdis_temperature"],
        kwargs["instance_discrimination_temperature"],
        kwargs["aux_semantic_sample_k"],
        kwargs["aux_semantic_temperature"],
    )
    predictions, targets = parts(tensors)
    classes = kwargs["num_classes_without_void"]
    final = losses.match(predictions[""], targets)
    for name in ("mask_weight", "class_weight"):
        torch.testing.assert_close(getattr(final, name), tensors[f"stage/pq_loss_{name}"], **golden.tolerance(info))
    torch.testing.assert_close(final.void, tensors["stage/void"].float())
    torch.testing.assert_close(final.labels, tensors["stage/labels"].long())
    total = 0
    names = {"class": "loss_ce", "mask": "loss_mask", "dice": "loss_dice", "pixels": "loss_pixel_insdis"}
    for place, prediction in predictions.items():

        def draw(purpose, image, shape, place=place):
            if purpose == "semantic":
                return tensors["input/noise/aux_semantic"][image]
            return tensors[f"input/noise/{place or 'final'}_pixels"][image]

        padded = final if kwargs["share_final_matching"] else losses.match(prediction, targets)
        terms = losses(prediction, padded, draw)
        for name, key in names.items():
            expected = tensors[f"output/{key}" + (f"_{place.removeprefix('aux_')}" if place else "")]
            torch.testing.assert_close(terms[name], expected, **golden.tolerance(info))
            total = total + weights[key] * terms[name]
        if not place:
            semantic = torch.stack([tensors[f"input/target_{i}/semantic"] for i in range(len(targets))]).long()
            semantic = torch.where(semantic < 0, classes, semantic)
            loss = losses.semantic(prediction["aux_semantic"], semantic, classes, padded, draw)
            torch.testing.assert_close(loss, tensors["output/loss_aux_semantic"], **golden.tolerance(info))
            total = total + weights["loss_aux_semantic"] * loss
    check(total, predictions, tensors, info)


def test_draws_depend_on_the_seed_and_the_purpose_alone():
    one, two = seeded([3, 5], torch.device("cpu")), seeded([5, 3, 7], torch.device("cpu"))
    assert torch.equal(one("match", 0, (4, 2)), two("match", 1, (4, 2)))
    assert not torch.equal(one("match", 0, (4, 2)), one("points", 0, (4, 2)))
    assert hash_words(3, "match") != hash_words(5, "match")


def test_an_image_without_masks_counts_for_the_class_term_alone():
    torch.manual_seed(0)
    prediction = {"class_logits": torch.randn(2, 5, 4), "mask_logits": torch.randn(2, 5, 8, 8)}
    none = Masks.of_classes(torch.full((32, 32), 255), 255)
    some = Masks.of_classes(torch.arange(32).expand(32, -1) // 16, 255)
    assert len(none.labels) == 0 and some.labels.tolist() == [0, 1]
    losses = PointLosses(points=16)
    draw = seeded([1, 2], torch.device("cpu"))
    terms = losses(prediction, [none, some], draw)
    assert losses.counts(5, [none, some]) == {"class": pytest.approx(2 + 0.1 * 8), "mask": 2, "dice": 2}
    alone = losses({key: value[1:] for key, value in prediction.items()}, [some], seeded([2], torch.device("cpu")))
    torch.testing.assert_close(terms["mask"], alone["mask"])
    assert losses({key: value[:1] for key, value in prediction.items()}, [none], draw)["dice"] == 0


def test_costs_that_are_not_finite_are_refused():
    prediction = {"class_logits": torch.full((1, 5, 4), torch.nan), "mask_logits": torch.randn(1, 5, 8, 8)}
    some = Masks.of_classes(torch.zeros(32, 32, dtype=torch.long), 255)
    with pytest.raises(ValueError, match="not finite"):
        PointLosses(points=16)(prediction, [some], seeded([1], torch.device("cpu")))
