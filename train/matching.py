"""Losses of mask classification: predictions are matched with the masks of an image, then compared with them.

Two published sets: Mask2Former (Cheng et al. 2022, section 3.3; facebookresearch/Mask2Former @ 9b0651c) compares sampled
points; kMaX-DeepLab (Yu et al. 2022; bytedance/kmax-deeplab @ f8e1d04) is the panoptic quality as a loss. The assignment is
SciPy's.

Shapes: B images, N queries, K classes, M masks of one image, P points.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.sample import SEGMENTS

# (what for, image of the batch, shape) -> uniform numbers in [0, 1)
Draw = Callable[[str, int, tuple[int, ...]], Tensor]


@dataclass
class Masks:
    """The masks of one image. labels: M class ids; masks: M H W, 1 inside."""

    labels: Tensor
    masks: Tensor

    @classmethod
    def of_classes(cls, mask: Tensor, ignore_index: int) -> "Masks":
        """One mask for each class that occurs in a map of class ids H W; void belongs to none."""
        labels = mask.unique()
        labels = labels[labels != ignore_index]
        return cls(labels, (mask[None] == labels[:, None, None]).float())

    @classmethod
    def of_segments(cls, panoptic: Tensor, things: Collection[int]) -> "Masks":
        """One mask for each segment of a map H W of class * 1000 + number; void and crowds of things have none."""
        found = panoptic.unique()
        labels = found.div(SEGMENTS, rounding_mode="floor")
        crowd = torch.isin(labels, torch.tensor(sorted(things), device=found.device)) & (found % SEGMENTS == 0)
        kept = (found >= 0) & ~crowd
        return cls(labels[kept], (panoptic[None] == found[kept, None, None]).float())


def seeded(seeds: Sequence[int], device: torch.device) -> Draw:
    """Numbers that depend on each image's seed and on what they are for, not on the batch the image is in."""

    def draw(purpose: str, image: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash_words(int(seeds[image]), purpose))
        return torch.rand(shape, generator=generator).to(device)

    return draw


def hash_words(seed: int, purpose: str) -> int:
    """A 63-bit number from both; Python's own hash of text changes from process to process."""
    value = seed & (2**63 - 1)
    for letter in purpose.encode():
        value = (value * 1_000_003 ^ letter) & (2**63 - 1)
    return value


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the cheapest one-to-one assignment of a cost matrix N M. ValueError if it is not finite."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("matching masks needs SciPy: pip install 'backbone-zoo[masks]'") from error
    if not bool(torch.isfinite(cost).all()):
        raise ValueError("the costs of matching masks are not finite: the predictions are NaN or infinite")
    rows, columns = linear_sum_assignment(cost.detach().double().cpu().numpy())
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


# --------------------------------------------------------------------------------------------------------------- Mask2Former


@dataclass
class PointLosses:
    """The terms of Mask2Former for one prediction, each a mean.

    Args:
        points: P, of matching and of the mask terms.
        oversample: times P points are drawn for the mask terms ...
        importance: ... and this share of P are those the prediction is least sure of.
        void_weight: of "no object" in the class term.
        class_cost, mask_cost, dice_cost: weights of the matching.
    """

    points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75
    void_weight: float = 0.1
    class_cost: float = 2.0
    mask_cost: float = 5.0
    dice_cost: float = 5.0

    def __call__(self, prediction: Mapping[str, Tensor], targets: Sequence[Masks], draw: Draw) -> dict[str, Tensor]:
        """The terms "class", "mask" and "dice" of {"class_logits": B N K+1, "mask_logits": B N h w}.

        class: over all queries, "no object" with its weight; mask and dice: over the masks of the batch (0 if there is none).
        """
        classes, masks = prediction["class_logits"].float(), prediction["mask_logits"].float()
        labels = torch.full(classes.shape[:2], classes.shape[2] - 1, device=classes.device)
        logits, wanted = [], []
        for image, target in enumerate(targets):
            if not len(target.labels):
                continue
            queries, columns = self.match(classes[image], masks[image], target, draw("match", image, (self.points, 2)))
            labels[image, queries] = target.labels[columns]
            own, theirs = masks[image, queries][:, None], target.masks[columns][:, None].float()
            places = self.uncertain(own, draw, image)
            logits.append(sample(own, places)[:, 0])
            wanted.append(sample(theirs, places)[:, 0])
        weight = torch.ones(classes.shape[2], device=classes.device)
        weight[-1] = self.void_weight
        terms = {"class": F.cross_entropy(classes.flatten(0, 1), labels.flatten(), weight)}
        if not logits:
            nothing = masks.sum() * 0
            return {**terms, "mask": nothing, "dice": nothing}
        values, truth = torch.cat(logits), torch.cat(wanted)
        share = values.sigmoid()
        dice = 1 - (2 * (share * truth).sum(1) + 1) / (share.sum(1) + truth.sum(1) + 1)
        return {**terms, "mask": F.binary_cross_entropy_with_logits(values, truth), "dice": dice.mean()}

    def counts(self, queries: int, targets: Sequence[Masks]) -> dict[str, float]:
        """What each term is a mean over: the weights of all queries, and the masks. Known before any prediction."""
        found = sum(len(target.labels) for target in targets)
        return {"class": found + self.void_weight * (queries * len(targets) - found), "mask": found, "dice": found}

    @torch.no_grad()
    def match(self, classes: Tensor, masks: Tensor, target: Masks, places: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and their masks in one image.

        Args:
            classes: N K+1, scores.
            masks: N h w, logits.
            target: the masks of the image.
            places: P 2, where masks are compared, shared by all of them.
        """
        values = sample(masks[:, None], places.expand(len(masks), -1, -1))[:, 0]
        truth = sample(target.masks[:, None].float(), places.expand(len(target.masks), -1, -1))[:, 0]
        bce = (F.softplus(-values) @ truth.T + F.softplus(values) @ (1 - truth).T) / len(places)
        share = values.sigmoid()
        dice = 1 - (2 * share @ truth.T + 1) / (share.sum(1)[:, None] + truth.sum(1) + 1)
        chance = classes.softmax(-1)[:, target.labels]
        return assign(self.mask_cost * bce - self.class_cost * chance + self.dice_cost * dice)

    @torch.no_grad()
    def uncertain(self, masks: Tensor, draw: Draw, image: int) -> Tensor:
        """M P 2: places where the masks M 1 h w are near 0, and others of those drawn."""
        drawn, sure = int(self.points * self.oversample), int(self.importance * self.points)
        places = draw("points", image, (len(masks), drawn, 2))
        order = sample(masks, places)[:, 0].abs().neg().argsort(1)
        shuffled = draw("permutation", image, (drawn - sure,)).argsort()[: self.points - sure]
        chosen = torch.cat([order[:, drawn - sure :], order[:, : drawn - sure][:, shuffled]], 1)
        return places.gather(1, chosen[..., None].expand(-1, -1, 2))


def sample(maps: Tensor, places: Tensor) -> Tensor:
    """Values of maps M C h w at places M P 2, (x, y) in 0..1, bilinear, zero outside: M C P."""
    return F.grid_sample(maps, (2 * places - 1)[:, None], mode="bilinear", padding_mode="zeros", align_corners=False)[:, :, 0]


# ---------------------------------------------------------------------------------------------------------------------- kMaX


@dataclass
class Padded:
    """The masks of a batch dealt out to the queries they were matched with.

    masks: B N H W, those of a query (0 where unmatched), divided by how many masks share a pixel; void: B H W, 1 where no mask
    is; labels: B N, K for unmatched; mask_weight, class_weight: B N; area: B H W, of the mask a pixel belongs to, at least 1.
    """

    masks: Tensor
    void: Tensor
    labels: Tensor
    mask_weight: Tensor
    class_weight: Tensor
    area: Tensor


@dataclass
class PanopticLosses:
    """The terms of kMaX-DeepLab for one prediction, each a mean over images.

    Args:
        pixels: sampled per image for the pixel term.
        temperature: of that sampling; higher prefers small masks.
        similarity: temperature of the pixel term's softmax.
        semantic_pixels: sampled per image for the auxiliary semantic term; 0 takes all.
        semantic_temperature: of that sampling.
    """

    pixels: int = 4096
    temperature: float = 1.5
    similarity: float = 0.3
    semantic_pixels: int = 4096
    semantic_temperature: float = 2.0

    def match(self, prediction: Mapping[str, Tensor], targets: Sequence[Masks]) -> Padded:
        """Deal the masks (at the size of the mask logits) out to the queries, by dice times class probability."""
        with torch.no_grad():
            classes, masks = prediction["class_logits"].float().softmax(-1), prediction["mask_logits"].float().softmax(1)
            batch, count, height, width = masks.shape
            padded = masks.new_zeros(masks.shape)
            labels = torch.full((batch, count), classes.shape[2] - 1, device=masks.device)
            mask_weight, class_weight = masks.new_zeros(batch, count), masks.new_zeros(batch, count)
            found = torch.zeros(batch, count, dtype=torch.bool, device=masks.device)
            for image, target in enumerate(targets):
                if not len(target.labels):
                    continue
                wanted = target.masks.float().flatten(1)
                share = (masks[image] * target.masks.any(0)).flatten(1)
                dice = share @ wanted.T / ((share.sum(1)[:, None] + wanted.sum(1)) / 2 + 1e-5)
                chance = classes[image][:, target.labels]
                queries, columns = assign(-dice * chance)
                padded[image, queries] = target.masks[columns].float()
                labels[image, queries] = target.labels[columns]
                mask_weight[image, queries] = chance[queries, columns].clamp_min(1e-5)
                class_weight[image, queries] = dice[queries, columns].clamp_min(1e-5)
                found[image, queries] = True
            padded = padded / padded.sum(1, keepdim=True).clamp_min(1)
            void = (padded.sum(1) < 1).float()
            on_void = (masks * void[:, None]).sum((2, 3)) / (masks.sum((2, 3)) + 1e-5)
            class_weight = torch.where(found, class_weight, on_void.clamp_min(1e-5))
            area = (padded * padded.sum((2, 3), keepdim=True)).sum(1).clamp_min(1)
            return Padded(padded, void, labels, mask_weight, class_weight, area)

    def __call__(self, prediction: Mapping[str, Tensor], padded: Padded, draw: Draw) -> dict[str, Tensor]:
        """The terms "class", "mask", "dice" and "pixels" of {"class_logits", "mask_logits", "pixel_feature"}.

        Each is 0 where nothing counts.
        """
        classes, masks = prediction["class_logits"].float(), prediction["mask_logits"].float()
        feature = prediction["pixel_feature"].float()
        per_query = F.cross_entropy(classes.flatten(0, 1), padded.labels.flatten(), reduction="none").view_as(padded.labels)
        kind = torch.where(padded.labels == classes.shape[2] - 1, 0.25, 0.75)
        per_pixel = -(padded.masks * masks.log_softmax(1)).sum(1) * (1 - padded.void)
        share = masks.softmax(1) * (1 - padded.void)[:, None]
        both = 2 * (share * padded.masks).sum((2, 3)) + 1
        dice = 1 - both / (share.sum((2, 3)) + padded.masks.sum((2, 3)) + 1)
        places = self.places(padded.area, padded.void, draw, "pixels", self.pixels, self.temperature)
        return {
            "class": over_non_zero(per_query * kind * padded.class_weight),
            "mask": over_non_zero(per_pixel),
            "dice": ((dice * padded.mask_weight).sum(1) * 0.75 / masks.shape[1]).mean(),
            "pixels": over_non_zero(self.discrimination(feature, padded.masks, places)),
        }

    def discrimination(self, feature: Tensor, masks: Tensor, places: Tensor) -> Tensor:
        """Cross entropy of pixels' similarities against sharing a mask, B P (Wang et al. 2021, section 3.3)."""
        ours = feature.flatten(2).gather(2, places[:, None].expand(-1, feature.shape[1], -1))
        theirs = masks.flatten(2).gather(2, places[:, None].expand(-1, masks.shape[1], -1))
        wanted = theirs.mT @ theirs
        wanted = wanted / wanted.sum(1, keepdim=True).clamp_min(1)
        return -(wanted * (ours.mT @ ours / self.similarity).log_softmax(1)).sum(1)

    def semantic(self, scores: Tensor, labels: Tensor, void_label: int, padded: Padded, draw: Draw) -> Tensor:
        """Cross entropy of the auxiliary head's scores against labels on some pixels, void left out.

        Args:
            scores: B K h w, or K+1 with void.
            labels: B H W.
            void_label: that is left out.
            padded: the matched masks.
            draw: chooses the pixels.
        """
        area, void, classes = padded.area, padded.void, labels
        if scores.shape[-1] < labels.shape[-1]:
            step = (labels.shape[-1] - 1) // max(scores.shape[-1] - 1, 1)
            area, void, classes = (part[:, ::step, ::step] for part in (area, void, classes))
        loss = F.cross_entropy(scores.float(), classes, ignore_index=void_label, reduction="none").flatten(1)
        if self.semantic_pixels:
            loss = loss.gather(1, self.places(area, void, draw, "semantic", self.semantic_pixels, self.semantic_temperature))
        return over_non_zero(loss)

    def places(self, area: Tensor, void: Tensor, draw: Draw, purpose: str, count: int, temperature: float) -> Tensor:
        """Pixels drawn without replacement, small masks preferred and void last (Gumbel top-k): B count.

        Args:
            area: B H W, pixels of the mask that each pixel is in.
            void: B H W, true where no mask is.
            draw: gives the random numbers.
            purpose: what they are for.
            count: pixels to draw.
            temperature: how strongly small masks are preferred.
        """
        size = area[0].numel()
        noise = torch.stack([draw(purpose, image, (size,)) for image in range(len(area))])
        score = temperature * (size / area.flatten(1)).log() - 99999 * void.flatten(1) - (-noise.log()).log()
        return score.topk(min(count, size), 1).indices


def over_non_zero(values: Tensor) -> Tensor:
    """Per image the sum over the number of entries that are not exactly 0, then the mean over images."""
    values = values.flatten(1)
    return (values.sum(1) / (values != 0).sum(1).clamp_min(1)).mean()
