"""Panoptic maps from queries: which pixels are which thing or stuff, and how good a map is.

Shapes: N queries, K classes, H W the image. A map and its list of segments go together here: the map holds segment ids, 0 =
none, and `Segment` says what each id is. `encode` makes one map of both, as samples and predictions hold it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.metrics import Metric
from train.sample import SEGMENTS, VOID


@dataclass(frozen=True)
class Segment:
    """One segment of a panoptic map.

    Attributes:
        id: its number in the map, from 1.
        label: class id.
        thing: whether it is countable.
        crowd: several things that nobody told apart.
    """

    id: int
    label: int
    thing: bool
    crowd: bool = False


def encode(panoptic: Tensor, segments: Collection[Segment]) -> Tensor:
    """A map of segment ids H W as class * 1000 + number, -1 for none; things are numbered from 1 within their class.

    Raises ValueError for a thousand things of one class in one image.
    """
    table = torch.full((max((segment.id for segment in segments), default=0) + 1,), VOID, dtype=torch.int64)
    numbers: dict[int, int] = {}
    for segment in segments:
        if segment.thing and not segment.crowd:
            numbers[segment.label] = numbers.get(segment.label, 0) + 1
            if numbers[segment.label] >= SEGMENTS:
                raise ValueError(f"more than {SEGMENTS - 1} things of class {segment.label} in one image")
            table[segment.id] = segment.label * SEGMENTS + numbers[segment.label]
        else:
            table[segment.id] = segment.label * SEGMENTS
    return table.to(panoptic.device)[panoptic.long()]


def decode(encoded: Tensor, things: Collection[int]) -> tuple[Tensor, list[Segment]]:
    """(map of segment ids H W, segments) of class * 1000 + number; things: which classes are countable."""
    found = encoded.unique()
    found = found[found >= 0].contiguous()
    where = torch.searchsorted(found, encoded.contiguous())
    panoptic = torch.where(encoded >= 0, where + 1, 0)
    segments = []
    for place, value in enumerate(found.tolist(), 1):
        label, number = divmod(value, SEGMENTS)
        segments.append(Segment(place, label, label in things, label in things and number == 0))
    return panoptic, segments


@dataclass(frozen=True)
class QueryOrder:
    """Mask2Former's rule: sure queries share the pixels out, then each is kept if most of its mask is its own.

    Args:
        score: least class probability of a query.
        overlap: least share of a query's mask that it must have won.
    """

    score: float = 0.8
    overlap: float = 0.8

    def __call__(self, classes: Tensor, masks: Tensor, things: Collection[int]) -> tuple[Tensor, list[Segment]]:
        """(panoptic map H W, segments). classes: N K+1 logits, the last "no object"; masks: N H W logits."""
        chance, label = classes.softmax(-1).max(-1)
        kept = ((label != classes.shape[1] - 1) & (chance > self.score)).nonzero().flatten().tolist()
        paper = _Paper(masks, things)
        if kept:
            share = masks[kept].sigmoid()
            winner = (share * chance[kept, None, None]).argmax(0)
            for place, query in enumerate(kept):
                inside = share[place] >= 0.5
                own = winner == place
                area, original, both = int(own.sum()), int(inside.sum()), own & inside
                if both.any() and area / original >= self.overlap:
                    paper.draw(both, int(label[query]))
        return paper.map, paper.segments


@dataclass(frozen=True)
class ScoreOrder:
    """kMaX-DeepLab's rule: the surest queries draw first, each where nothing is yet, if enough of its mask is left.

    Args:
        pixel: least share of a pixel that belongs to the mask.
        thing, stuff: least class probability of each kind.
        overlap: the share of a mask that must be left, exceeded strictly.
        class_power, mask_power: exponents of class probability and mean mask probability in the order.
    """

    pixel: float = 0.4
    thing: float = 0.7
    stuff: float = 0.5
    overlap: float = 0.8
    class_power: float = 1.0
    mask_power: float = 1.0

    def __call__(self, classes: Tensor, masks: Tensor, things: Collection[int]) -> tuple[Tensor, list[Segment]]:
        """(panoptic map H W, segments). classes: N K+1 logits, the last "void"; masks: N H W logits."""
        chance, label = classes.softmax(-1)[:, :-1].max(-1)
        share = masks.softmax(0)
        inside = share > self.pixel
        sure = (share * inside).sum((1, 2)) / inside.sum((1, 2)).clamp_min(1)
        order = (chance**self.class_power * sure**self.mask_power).argsort(descending=True, stable=True).tolist()
        paper = _Paper(masks, things)
        for query in order:
            kind = int(label[query])
            new = inside[query] & (paper.map == 0)
            area, left = int(inside[query].sum()), int(new.sum())
            if float(chance[query]) > (self.thing if kind in things else self.stuff) and left > self.overlap * area:
                paper.draw(new, kind)
        return paper.map, paper.segments


class _Paper:
    """A panoptic map being drawn: things get a new id each, all stuff of one class the same."""

    def __init__(self, like: Tensor, things: Collection[int]):
        self.map = torch.zeros(like.shape[-2:], dtype=torch.int64, device=like.device)
        self.segments: list[Segment] = []
        self.things, self._stuff = things, dict[int, int]()

    def draw(self, pixels: Tensor, label: int) -> None:
        thing = label in self.things
        number = len(self.segments) + 1 if thing else self._stuff.setdefault(label, len(self.segments) + 1)
        if number > len(self.segments):
            self.segments.append(Segment(number, label, thing))
        self.map[pixels] = number


class PanopticQuality(Metric):
    """PQ, SQ and RQ (Kirillov et al. 2019, eq. 1): over classes, things, and stuff.

    A predicted and a true segment of one class match if their intersection over union exceeds 0.5, void left out of the union.
    A true crowd matches nothing and is not missed. An unmatched prediction of which more than half is void, or a crowd of its
    class, counts for nothing. A class that occurs nowhere is left out of the means.

    `sums` are added over images and processes: "iou", "true", "false_positive", "false_negative", each K.
    """

    def __init__(self, classes: int, things: Collection[int]):
        self.things = sorted(things)
        if any(not 0 <= thing < classes for thing in self.things):
            raise ValueError(f"thing classes {self.things} do not lie in 0..{classes - 1}")
        names = ("iou", "true", "false_positive", "false_negative")
        super().__init__(**{name: torch.zeros(classes, dtype=torch.float64) for name in names})
        self.protocol = (
            f"panoptic quality of {classes} classes, {len(self.things)} of them things, segments match above 0.5 IoU, void out "
            "of the union, absent classes left out"
        )

    def update(self, prediction: Sequence[Tensor], batch: dict[str, Any]) -> None:
        """prediction and batch["panoptic"]: B maps H W of class * 1000 + number, -1 for none."""
        for own, true in zip(prediction, batch["panoptic"], strict=True):
            self.compare(*decode(own, self.things), *decode(true.to(own.device), self.things))

    def compare(self, predicted: Tensor, segments: Collection[Segment], true: Tensor, truth: Collection[Segment]) -> None:
        """Add one image.

        Raises ValueError for maps of different size, or an id in a map that no segment explains.

        Args:
            predicted: H W segment ids, 0 = none.
            segments: what its ids are.
            true: H W segment ids, 0 = void.
            truth: what its ids are.
        """
        if predicted.shape != true.shape:
            raise ValueError(f"the predicted map is {tuple(predicted.shape)}, the true one {tuple(true.shape)}")
        ours, theirs = {s.id: s.label for s in segments}, {s.id: s.label for s in truth}
        base = int(true.max()) + 1
        pairs, counts = (predicted.long() * base + true.long()).unique(return_counts=True)
        overlap = {(int(pair) // base, int(pair) % base): int(count) for pair, count in zip(pairs, counts, strict=True)}
        area: dict[int, int] = {}
        true_area: dict[int, int] = {}
        for (own, other), count in overlap.items():
            area[own] = area.get(own, 0) + count
            true_area[other] = true_area.get(other, 0) + count
        for found, known, name in ((area, ours, "predicted"), (true_area, theirs, "true")):
            unknown = [number for number in found if number and number not in known]
            if unknown:
                raise ValueError(f"the {name} map holds segment {unknown[0]}, which its list of segments does not have")
        crowds = {s.id for s in truth if s.crowd}
        matched, met, ignored = set(), set(crowds), dict.fromkeys(area, 0)
        for (own, other), count in overlap.items():
            if own and (other == 0 or other in crowds and ours[own] == theirs[other]):
                ignored[own] += count
            elif own and other not in crowds and ours[own] == theirs[other]:
                union = area[own] + true_area[other] - count - overlap.get((own, 0), 0)
                if count / union > 0.5:
                    self.sums["iou"][ours[own]] += count / union
                    self.sums["true"][ours[own]] += 1
                    matched.add(own)
                    met.add(other)
        for own in area.keys() - matched - {0}:
            if ignored[own] <= 0.5 * area[own]:
                self.sums["false_positive"][ours[own]] += 1
        for other in true_area.keys() - met - {0}:
            self.sums["false_negative"][theirs[other]] += 1

    def compute(self) -> dict[str, float]:
        """Means over the classes that occur, in 0..1: pq, sq, rq, and the same over things and over stuff."""
        true, iou = self.sums["true"], self.sums["iou"]
        weight = true + 0.5 * self.sums["false_positive"] + 0.5 * self.sums["false_negative"]
        occurs = weight > 0
        quality = iou / weight.clamp_min(1e-12)
        kinds = {"": torch.ones_like(occurs), "_things": torch.zeros_like(occurs)}
        kinds["_things"][self.things] = True
        kinds["_stuff"] = ~kinds["_things"]
        values = {"pq": quality, "sq": iou / true.clamp_min(1e-12), "rq": true / weight.clamp_min(1e-12)}

        def mean(values: Tensor, where: Tensor) -> float:
            return float(values[where].mean()) if bool(where.any()) else float("nan")

        return {f"{name}{kind}": mean(value, occurs & where) for kind, where in kinds.items() for name, value in values.items()}
