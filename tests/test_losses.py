"""Losses: against the authors' stored outputs and gradients, against brute force, and at their edges."""

import golden
import pytest
import torch
import torch.nn.functional as F

from train.losses import (
    DEPTH_LOSSES,
    SEGMENTATION_LOSSES,
    berhu,
    cross_entropy,
    cross_entropy_divisor,
    dice,
    focal,
    gradient,
    gradient_l1,
    l1,
    lovasz,
    ohem,
    omnidata,
    sigloss,
    silog,
    silog_unbiased,
    ssi_mse,
    trimmed_mae,
)


@pytest.fixture(autouse=True)
def seed():
    """The same draws in every run."""
    torch.manual_seed(0)


# fixture family -> variant name in the file -> our call; "" is the main output
VARIANTS = {
    "depth_loss_silog": {
        "": lambda p, t, m: silog(p, t),
        "lambda_0.85": lambda p, t, m: silog(p, t, lam=0.85),
        "lambda_1": lambda p, t, m: silog(p, t, lam=1.0),
        "explicit_mask": lambda p, t, m: silog(p, t, (t >= 0.5) & (t <= 8)),
        "dinov2_sigloss": lambda p, t, m: sigloss(p, t),
        "dinov2_sigloss_max8": lambda p, t, m: sigloss(p, t, max_depth=8.0),
        "dinov2_sigloss_warmup": lambda p, t, m: sigloss(p, t, warmup=True),
        "dinov2_gradient": lambda p, t, m: gradient(p, t, definition="code"),
    },
    "depth_loss_ssi_omnidata": {"": omnidata},
    "depth_loss_ssi": {
        "": ssi_mse,
        "image_based": lambda p, t, m: ssi_mse(p, t, m, reduction="image"),
        "trimmed": trimmed_mae,
        "trimmed_no_trim": lambda p, t, m: trimmed_mae(p, t, m, trim=0.0),
    },
}


@pytest.mark.parametrize("case", golden.cases("depth_loss"))
def test_depth_loss_and_gradient_match_the_authors_code(case):
    info, tensors = golden.load(case)
    calls = next(calls for family, calls in VARIANTS.items() if case.startswith(family))
    stored = [key.removeprefix("output").removeprefix("/") for key in tensors if key == "output" or key.startswith("output/")]
    assert set(stored) <= set(calls), "a variant of the fixture has no counterpart here"
    for variant in stored:
        pred = tensors["input/pred"].clone().requires_grad_()
        loss = calls[variant](pred, tensors["input/target"], tensors["input/mask"])
        loss.backward()
        suffix = f"/{variant}" if variant else ""
        torch.testing.assert_close(loss.detach(), tensors[f"output{suffix}"], **golden.tolerance(info))
        torch.testing.assert_close(pred.grad, tensors[f"grad{suffix}/pred"], **golden.tolerance(info))


@pytest.mark.parametrize("case", golden.cases("zoedepth_losses"))
def test_the_losses_of_zoedepth_match_the_authors_code(case):
    info, tensors = golden.load(case)
    target, mask = tensors["input/target"], tensors["input/mask"]

    def fitted(small):
        return torch.nn.functional.interpolate(small, size=target.shape[-2:], mode="bilinear", align_corners=True)

    for name, key, loss in (
        ("silog", "pred", lambda p: 10 * silog_unbiased(p, target, mask)),
        ("silog_small", "pred_small", lambda p: 10 * silog_unbiased(fitted(p), target, mask)),
        ("grad_l1", "pred", lambda p: gradient_l1(p, target, mask)),
    ):
        pred = tensors[f"input/{key}"].clone().requires_grad_()
        value = loss(pred)
        value.backward()
        torch.testing.assert_close(value.detach(), tensors[f"output/{name}"], **golden.tolerance(info))
        torch.testing.assert_close(pred.grad, tensors[f"grad/{name}/{key}"], **golden.tolerance(info))


@pytest.mark.parametrize("case", golden.cases("seg_loss"))
def test_cross_entropy_matches_mmsegmentation_in_both_averages(case):
    info, tensors = golden.load(case)
    mask = tensors["input/labels"]
    for average, suffix in (("all", ""), ("valid", "_avg_non_ignore")):
        logits = tensors["input/logits"].clone().requires_grad_()
        large = F.interpolate(logits, mask.shape[1:], mode="bilinear", align_corners=info["kwargs"]["align_corners"])
        loss = cross_entropy(large, mask, info["kwargs"]["ignore_index"], average=average)
        loss.backward()
        torch.testing.assert_close(loss.detach(), tensors[f"output{suffix}"], **golden.tolerance(info))
        torch.testing.assert_close(logits.grad, tensors[f"grad/logits{suffix}"], **golden.tolerance(info))


def batch(seed=0, classes=5, size=(6, 7), void=0.2):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, *size, generator=generator)
    mask = torch.randint(classes, (2, *size), generator=generator)
    mask[torch.rand(mask.shape, generator=generator) < void] = 255
    return logits, mask


def depths(seed=0, size=(9, 11)):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(3, 1, *size, generator=generator) * 5 + 0.5
    pred = target * (0.7 + 0.6 * torch.rand(target.shape, generator=generator))
    target[torch.rand(target.shape, generator=generator) < 0.3] = 0
    return pred, target


def test_class_weights_divide_by_the_weight_of_the_valid_pixels():
    logits, mask = batch()
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])
    torch.testing.assert_close(
        cross_entropy(logits, mask, class_weight=weight), F.cross_entropy(logits, mask, weight, ignore_index=255)
    )
    assert cross_entropy_divisor(mask, 255, weight) == pytest.approx(float(weight[mask[mask != 255]].sum()))
    with pytest.raises(ValueError, match="5 classes"):
        cross_entropy(logits, mask, class_weight=[1.0, 2.0])


def test_micro_batches_weighted_by_cross_entropy_divisor_give_the_mean_of_the_whole():
    logits, mask = batch()
    parts = [(cross_entropy(logits[i : i + 1], mask[i : i + 1]), cross_entropy_divisor(mask[i : i + 1])) for i in range(2)]
    merged = sum(loss * weight for loss, weight in parts) / sum(weight for _, weight in parts)
    torch.testing.assert_close(merged, cross_entropy(logits, mask))


def test_focal_is_the_weighted_cross_entropy_of_its_definition():
    logits, mask = batch()
    valid = mask != 255
    p = logits.softmax(1).movedim(1, -1)[valid].gather(1, mask[valid][:, None])[:, 0]
    weight = torch.rand(5)
    expected = (weight[mask[valid]] * (1 - p) ** 1.5 * -p.log()).mean()
    torch.testing.assert_close(focal(logits, mask, gamma=1.5, class_weight=weight), expected)
    torch.testing.assert_close(focal(logits, mask, gamma=0.0), cross_entropy(logits, mask))


def test_dice_is_one_minus_the_f1_of_soft_masks():
    logits, mask = batch()
    mask[mask == 3] = 255  # class 3 is absent from the truth
    valid = mask != 255
    p = logits.softmax(1).movedim(1, -1)[valid]
    g = F.one_hot(mask[valid], 5)
    score = (2 * (p * g).sum(0) + 1) / (p.sum(0) + g.sum(0) + 1)
    torch.testing.assert_close(dice(logits, mask, classes="all"), (1 - score).mean())
    torch.testing.assert_close(dice(logits, mask), (1 - score)[[0, 1, 2, 4]].mean())


def test_lovasz_on_hard_predictions_is_one_minus_iou():
    _, mask = batch(void=0.1)
    guess = torch.where(torch.rand(mask.shape) < 0.5, mask.clamp_max(4), torch.randint(5, mask.shape))
    logits = 200.0 * F.one_hot(guess, 5).movedim(-1, 1)  # softmax is exactly 0 or 1
    valid = mask != 255
    iou = []
    for k in range(5):
        a, b = (guess == k) & valid, mask == k
        iou.append(float((a & b).sum() / (a | b).sum()))
    assert float(lovasz(logits, mask)) == pytest.approx(1 - sum(iou) / 5, abs=1e-5)


def test_lovasz_per_image_is_the_mean_of_the_images():
    logits, mask = batch()
    torch.testing.assert_close(
        lovasz(logits, mask, per_image=True), (lovasz(logits[:1], mask[:1]) + lovasz(logits[1:], mask[1:])) / 2
    )


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.2, 1), (0.05, 10), (0.7, 100_000)])
def test_ohem_keeps_the_hard_pixels(threshold, min_kept):
    logits, mask = batch()
    loss = F.cross_entropy(logits, mask, ignore_index=255, reduction="none")[mask != 255]
    p = torch.exp(-loss)
    limit = max(threshold, float(p.sort().values[min(len(p) - 1, min_kept * 2 - 1)]))
    torch.testing.assert_close(ohem(logits, mask, threshold=threshold, min_kept=min_kept), loss[p <= limit].mean())


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_segmentation_loss_of_void_alone_is_zero_with_zero_gradient(name):
    logits, mask = batch()
    logits.requires_grad_()
    loss = SEGMENTATION_LOSSES[name](logits, torch.full_like(mask, 255))
    loss.backward()
    assert float(loss.detach()) == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_segmentation_loss_falls_when_the_truth_is_predicted_and_ignores_void(name):
    logits, mask = batch()
    loss = SEGMENTATION_LOSSES[name]
    right = 10.0 * F.one_hot(mask.clamp_max(4), 5).movedim(-1, 1)
    assert float(loss(right, mask)) < 0.1 < float(loss(logits, mask))
    changed = torch.where((mask == 255)[:, None], logits + 7 * torch.randn(logits.shape), logits)
    torch.testing.assert_close(loss(changed, mask), loss(logits, mask))


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_segmentation_loss_refuses_a_mask_of_another_size(name):
    logits, mask = batch()
    with pytest.raises(ValueError, match="one size"):
        SEGMENTATION_LOSSES[name](logits, mask[:, :3])


@pytest.mark.parametrize("name", DEPTH_LOSSES)
def test_depth_loss_without_a_reading_is_zero_with_zero_gradient(name):
    pred, target = depths()
    pred.requires_grad_()
    loss = DEPTH_LOSSES[name](pred, torch.zeros_like(target))
    loss.backward()
    assert float(loss.detach()) == 0
    assert (pred.grad == 0).all()


@pytest.mark.parametrize("name", DEPTH_LOSSES)
def test_depth_loss_is_small_for_the_truth_and_blind_to_missing_pixels(name):
    pred, target = depths()
    loss = DEPTH_LOSSES[name]
    perfect = torch.where(target > 0, target, 3.0).requires_grad_()
    best = loss(perfect, target)
    best.backward()
    assert float(best.detach()) < 1e-3 < float(loss(pred, target))
    assert perfect.grad.isfinite().all()
    wild = torch.where(target > 0, pred, torch.rand(pred.shape) * 50)
    if name != "trimmed_mae":  # zero pixels stay in the median of the authors' code
        torch.testing.assert_close(loss(wild, target), loss(pred, target))
    torch.testing.assert_close(trimmed_mae(wild, target, definition="paper"), trimmed_mae(pred, target, definition="paper"))


@pytest.mark.parametrize("name", DEPTH_LOSSES)
def test_depth_loss_takes_maps_with_and_without_channel_and_refuses_others(name):
    pred, target = depths()
    loss = DEPTH_LOSSES[name]
    torch.testing.assert_close(loss(pred[:, 0], target[:, 0]), loss(pred, target))
    with pytest.raises(ValueError, match="one shape"):
        loss(pred, target[:, :, :4])
    with pytest.raises(ValueError, match="B 1 H W"):
        loss(pred.expand(-1, 2, -1, -1), target.expand(-1, 2, -1, -1))


@pytest.mark.parametrize("name", DEPTH_LOSSES)
def test_depth_loss_survives_predictions_at_zero_and_bfloat16(name):
    pred, target = depths()
    pred[0] = 0
    pred = pred.bfloat16().requires_grad_()
    loss = DEPTH_LOSSES[name](pred, target.bfloat16())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert pred.grad.isfinite().all()


def test_scale_and_shift_do_not_matter_where_they_should_not():
    pred, target = depths()
    for loss in (ssi_mse, trimmed_mae):
        for definition in ("code", "paper"):
            if (loss, definition) == (trimmed_mae, "code"):
                continue  # its median counts missing pixels as 0
            value = loss(pred, target, definition=definition)
            torch.testing.assert_close(loss(3 * pred + 2, target, definition=definition), value, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(silog(3 * pred, target, lam=1.0), silog(pred, target, lam=1.0))


def test_the_papers_definitions_by_brute_force():
    """Ranftl et al. 2020, written out for one image at a time."""
    pred, target = depths()
    total_mse, total_mae = [], []
    for p, t in zip(pred[:, 0].double(), target[:, 0].double(), strict=True):
        valid = t > 0
        n = int(valid.sum())
        design = torch.stack([p[valid], torch.ones(n, dtype=p.dtype)], 1)
        s, b = torch.linalg.lstsq(design, t[valid][:, None]).solution[:, 0]
        both = []
        for values in (p, t):
            centred = values - values[valid].median()
            both.append(centred / centred[valid].abs().mean())
        for residual, totals, power in ((s * p + b - t, total_mse, 2), (both[0] - both[1], total_mae, 1)):
            r = residual[valid].abs().sort().values
            data = (r**2).sum() if power == 2 else r[: int(n * 0.8)].sum()
            steps = 0.0
            for k in (1, 2, 4, 8):
                d, v = residual[::k, ::k], valid[::k, ::k]
                steps += float(((d[1:] - d[:-1]).abs() * (v[1:] & v[:-1])).sum())
                steps += float(((d[:, 1:] - d[:, :-1]).abs() * (v[:, 1:] & v[:, :-1])).sum())
            totals.append(float(data) / (2 * n) + 0.5 * steps / n)
    assert float(ssi_mse(pred, target, definition="paper")) == pytest.approx(sum(total_mse) / 3, rel=1e-4)
    assert float(trimmed_mae(pred, target, definition="paper")) == pytest.approx(sum(total_mae) / 3, rel=1e-4)


def test_l1_and_berhu_by_hand():
    pred, target = torch.tensor([[[1.0, 2.0, 9.0, 4.0]]]), torch.tensor([[[1.5, 4.0, 0.0, 4.0]]])
    assert float(l1(pred, target)) == pytest.approx(2.5 / 3)
    c = 0.2 * 2.0
    assert float(berhu(pred, target)) == pytest.approx(((0.25 + c * c) / (2 * c) + (4 + c * c) / (2 * c) + 0) / 3)


def test_unknown_options_are_refused():
    logits, mask = batch()
    pred, target = depths()
    for call in (
        lambda: cross_entropy(logits, mask, average="some"),
        lambda: dice(logits, mask, classes="few"),
        lambda: lovasz(logits, mask, classes="few"),
        lambda: ohem(logits, mask, threshold=0.0),
        lambda: gradient(pred, target, definition="book"),
        lambda: ssi_mse(pred, target, definition="book"),
        lambda: trimmed_mae(pred, target, trim=1.0),
        lambda: trimmed_mae(pred, target, reduction="sum"),
    ):
        with pytest.raises(ValueError, match="got"):
            call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [*SEGMENTATION_LOSSES, *DEPTH_LOSSES])
def test_a_gpu_gives_the_same_loss_and_gradient(name):
    if name in SEGMENTATION_LOSSES:
        (pred, target), loss = batch(), SEGMENTATION_LOSSES[name]
        options = {"class_weight": [1.0, 2.0, 0.5, 1.0, 3.0]} if name in ("cross_entropy", "focal") else {}
    else:
        (pred, target), loss, options = depths(), DEPTH_LOSSES[name], {}
    results = []
    for device in ("cpu", "cuda"):
        p = pred.detach().to(device).requires_grad_()
        value = loss(p, target.to(device), **options)
        value.backward()
        results.append((value.detach().cpu(), p.grad.cpu()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


# What a model says where nothing is known


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_logits_at_void_pixels_reach_neither_loss_nor_gradient(name, value):
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    mask[:, 1:3] = 255
    odd = logits.clone()
    odd[:, :, 1:3] = value
    loss, want = SEGMENTATION_LOSSES[name](odd.requires_grad_(), mask), SEGMENTATION_LOSSES[name](logits.requires_grad_(), mask)
    assert loss.item() == want.item()
    assert torch.equal(torch.autograd.grad(loss, odd)[0], torch.autograd.grad(want, logits)[0])
    nothing = SEGMENTATION_LOSSES[name](odd, torch.full_like(mask, 255))
    assert nothing.item() == 0 and torch.autograd.grad(nothing, odd)[0].abs().max() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("name", DEPTH_LOSSES)
def test_predictions_at_missing_readings_reach_neither_loss_nor_gradient(name, value):
    torch.manual_seed(0)
    pred, target = torch.rand(2, 1, 6, 7) + 0.5, torch.rand(2, 1, 6, 7) + 0.5
    target[:, :, 2:4] = 0
    odd = pred.clone()
    odd[:, :, 2:4] = value
    loss, want = DEPTH_LOSSES[name](odd.requires_grad_(), target), DEPTH_LOSSES[name](pred.requires_grad_(), target)
    assert loss.item() == want.item() and loss.isfinite()
    assert torch.equal(torch.autograd.grad(loss, odd)[0], torch.autograd.grad(want, pred)[0])
    nothing = DEPTH_LOSSES[name](odd, torch.zeros_like(target))
    assert nothing.item() == 0 and torch.autograd.grad(nothing, odd)[0].abs().max() == 0


def test_berhu_of_enormous_residuals_is_finite():
    """Residuals 1e30 and 0, c = 2e29: ((1e60 + 4e58) / 4e29 + 0) / 2 = 1.3e30, gradient r / c / 2 = 2.5 for the first."""
    pred = torch.tensor([[[1e30 + 1, 1.0]]], requires_grad=True)
    loss = berhu(pred, torch.ones(1, 1, 2))
    loss.backward()
    assert loss.item() == pytest.approx(1.3e30, rel=1e-6) and pred.grad.flatten().tolist() == pytest.approx([2.5, 0.0])
