"""Panoptic maps and their quality: the authors' maps, hand-made cases, and properties of the definition."""

import golden
import pytest
import torch

from heads.kmax import KMax
from heads.mask2former import Mask2Former
from train.matching import Masks
from train.panoptic import PanopticQuality, QueryOrder, ScoreOrder, Segment, decode, encode

CASES = golden.cases("mask2former_inference") + golden.cases("kmax_inference")


@pytest.mark.parametrize("case", CASES)
def test_maps_match_the_authors(case):
    info, tensors = golden.load(case)
    kwargs = info["kwargs"]
    classes, masks = tensors["input/class_logits"], tensors["input/mask_logits"]
    if info["family"] == "mask2former":
        head, rule = Mask2Former, QueryOrder(kwargs["object_mask_threshold"], kwargs["overlap_threshold"])
    else:
        names = ("pixel_confidence_threshold", "class_threshold_thing", "class_threshold_stuff", "overlap_threshold")
        head, powers = KMax, (kwargs["reorder_class_weight"], kwargs["reorder_mask_weight"])
        rule = ScoreOrder(*(kwargs[name] for name in names), *powers)
    panoptic, segments = rule(classes, masks, kwargs["thing_classes"])
    assert torch.equal(panoptic, tensors["output/panoptic"].long())
    expected = [Segment(s["id"], s["category_id"], s["isthing"]) for s in info["segments"]]
    assert segments == expected
    scores = head.scores(None, {"class_logits": classes[None], "mask_logits": masks[None]})[0]
    torch.testing.assert_close(scores, tensors["output/semantic"], **golden.tolerance(info))


def quality(predicted, segments, true, truth, classes=3, things=(0,)):
    metric = PanopticQuality(classes, things)
    metric.compare(torch.tensor(predicted), segments, torch.tensor(true), truth)
    return metric


def test_a_perfect_map_has_quality_one_whatever_its_ids():
    true = [[1, 1, 2, 2], [1, 1, 2, 0]]
    truth = [Segment(1, 0, True), Segment(2, 1, False)]
    other = [[7, 7, 3, 3], [7, 7, 3, 3]]  # void may be anything
    result = quality(other, [Segment(7, 0, True), Segment(3, 1, False)], true, truth).compute()
    assert result == dict.fromkeys([f"{name}{kind}" for kind in ("", "_things", "_stuff") for name in ("pq", "sq", "rq")], 1)


def test_quality_by_hand():
    """Thing A: 3 of 4 pixels found (IoU 3/4); thing B missed; one thing invented where stuff is; stuff IoU 6/8."""
    true = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 3, 3], [3, 3, 3, 3]]
    truth = [Segment(1, 0, True), Segment(2, 0, True), Segment(3, 1, False)]
    predicted = [[1, 1, 0, 0], [1, 0, 0, 0], [3, 3, 3, 3], [3, 3, 4, 4]]
    segments = [Segment(1, 0, True), Segment(3, 1, False), Segment(4, 0, True)]
    result = quality(predicted, segments, true, truth).compute()
    things = 0.75 / (1 + 0.5 + 0.5)
    assert result["pq_things"] == pytest.approx(things) and result["pq_stuff"] == pytest.approx(0.75)
    assert result["pq"] == pytest.approx((things + 0.75) / 2)
    assert result["sq"] == pytest.approx(0.75) and result["rq"] == pytest.approx((0.5 + 1) / 2)


def test_a_prediction_mostly_on_void_counts_for_nothing():
    true = [[0, 0, 0, 1]]
    counted = quality([[1, 1, 1, 2]], [Segment(1, 0, True), Segment(2, 1, False)], true, [Segment(1, 1, False)])
    assert counted.sums["false_positive"].sum() == 0 and counted.compute()["pq"] == 1


def test_segments_of_another_class_do_not_match():
    result = quality([[1, 1]], [Segment(1, 2, False)], [[1, 1]], [Segment(1, 1, False)])
    assert result.compute()["pq"] == 0
    assert result.sums["false_positive"].tolist() == [0, 0, 1] and result.sums["false_negative"].tolist() == [0, 1, 0]


def test_images_add_up_and_no_segment_matches_twice():
    torch.manual_seed(0)
    whole, parts = PanopticQuality(4, (0, 1)), []
    for _ in range(20):
        true, predicted = torch.randint(0, 5, (6, 6)), torch.randint(0, 5, (6, 6))
        truth = [Segment(i, i - 1, i < 3) for i in range(1, 5)]
        for metric in (whole, PanopticQuality(4, (0, 1))):
            metric.compare(predicted, truth, true, truth)
        parts.append(metric)
        count = metric.sums["true"] * 2 + metric.sums["false_positive"] + metric.sums["false_negative"]
        assert bool((metric.sums["true"] <= 1).all()) and bool((count <= 2).all())
    for name, value in whole.sums.items():
        torch.testing.assert_close(value, sum(part.sums[name] for part in parts))
    assert 0 <= whole.compute()["pq"] <= 1


@pytest.mark.parametrize(
    "predicted, true, words",
    [([[1, 2]], [[1, 1]], "predicted map holds segment 2"), ([[1, 1]], [[1, 3]], "true map holds segment 3")],
)
def test_ids_without_a_segment_are_refused(predicted, true, words):
    with pytest.raises(ValueError, match=words):
        quality(predicted, [Segment(1, 0, True)], true, [Segment(1, 0, True)])


def test_maps_of_other_sizes_and_classes_are_refused():
    with pytest.raises(ValueError, match="the true one"):
        quality([[1, 1]], [Segment(1, 0, True)], [[1]], [Segment(1, 0, True)])
    with pytest.raises(ValueError, match="thing classes"):
        PanopticQuality(3, (5,))


def test_a_crowd_is_neither_missed_nor_found():
    """Things on a crowd of their class, and on void, count for nothing; a thing of another class there is wrong."""
    true = [[1, 1, 1, 0], [2, 2, 2, 2]]
    truth = [Segment(1, 0, True, crowd=True), Segment(2, 1, False)]
    stuff = Segment(9, 1, False)
    for predicted, label, wrong in (([3, 3, 3, 9], 0, 0), ([9, 9, 3, 3], 0, 0), ([3, 3, 3, 9], 2, 1)):
        metric = quality([predicted, [9, 9, 9, 9]], [Segment(3, label, True), stuff], true, truth, things=(0, 2))
        assert metric.sums["true"].tolist() == [0, 1, 0] and metric.sums["false_negative"].sum() == 0
        assert metric.sums["false_positive"].tolist() == [0, 0, wrong]


def test_a_map_and_its_segments_are_one_map_and_back():
    panoptic = torch.tensor([[0, 1, 2, 3], [5, 5, 0, 2]])
    segments = [Segment(1, 4, True), Segment(2, 0, False), Segment(3, 4, True), Segment(5, 2, True, crowd=True)]
    encoded = encode(panoptic, segments)
    assert encoded.tolist() == [[-1, 4001, 0, 4002], [2000, 2000, -1, 0]]
    again, found = decode(encoded, {2, 4})
    assert torch.equal(encode(again, found), encoded)
    assert {(s.label, s.thing, s.crowd) for s in found} == {(s.label, s.thing, s.crowd) for s in segments}
    assert encode(torch.zeros(2, 2), []).tolist() == [[-1, -1], [-1, -1]]
    with pytest.raises(ValueError, match="more than 999 things of class 0"):
        encode(torch.zeros(1, 1), [Segment(i, 0, True) for i in range(1, 1001)])


def test_quality_of_encoded_maps():
    true = torch.tensor([[[1000, 1000, 2001, 2002], [1000, -1, 2001, 2002]]])
    perfect, swapped = PanopticQuality(3, [2]), PanopticQuality(3, [2])
    perfect.update(true, {"panoptic": true})
    swapped.update([torch.tensor([[1000, 1000, 2002, 2001], [1000, 1000, 2002, 2001]])], {"panoptic": true})
    assert perfect.compute() == swapped.compute() and perfect.compute()["pq"] == 1
    merged = PanopticQuality(3, [2])
    merged.update(true.clamp_max(2001), {"panoptic": true})  # two things taken for one: IoU 1/2, which is no match
    assert merged.sums["false_positive"].tolist() == [0, 0, 1] and merged.sums["false_negative"].tolist() == [0, 0, 2]


def test_masks_of_segments_leave_out_void_and_crowds():
    masks = Masks.of_segments(torch.tensor([[-1, 0, 0], [2000, 2001, 2002]]), {2})
    assert masks.labels.tolist() == [0, 2, 2]
    assert masks.masks.tolist() == [[[0, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 1]]]
