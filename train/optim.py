"""Parameter groups, optimiser, schedule and averaged weights: timm's, chosen by the `optim` section."""

import math
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from train.schema import OptimConfig


def head_parameters(model: nn.Module) -> set[int]:
    """ids of the parameters that are no backbone's: all outside `model.backbone`, or a classification model's classifier."""
    if hasattr(model, "backbone"):
        inside = {id(p) for p in cast(nn.Module, model.backbone).parameters()}
        return {id(p) for p in model.parameters()} - inside
    found = cast(Any, model).get_classifier() if hasattr(model, "get_classifier") else None
    found = found if isinstance(found, (tuple, list)) else [found]  # a distilled model has two
    return {id(p) for module in found if isinstance(module, nn.Module) for p in module.parameters()}


def freeze_backbone(model: nn.Module) -> None:
    """Leaves only heads to train. Raises ValueError if the model has none."""
    trained = head_parameters(model)
    if not trained:
        raise ValueError("model.freeze_backbone would freeze the whole model: it has no head")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups that share learning rate factor (`lr_scale`) and weight decay.

    No decay for vectors (biases, norms) and for what the model lists in no_weight_decay(). With layer_decay the factor of the
    backbone falls by it per layer away from the output (Bao et al. 2022, as timm does it). Heads get head_lr_scale, names that
    contain a key of lr_scales its factor. Frozen parameters are in no group. Raises ValueError for a key that no name contains.
    """
    for part in config.lr_scales:
        if not any(part in name for name, _ in model.named_parameters()):
            raise ValueError(f"optim.lr_scales: no parameter of this model has {part!r} in its name")
    excluded = set(cast(Any, model).no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    heads, scale = head_parameters(model), {}
    if config.layer_decay is not None:
        for group in param_groups_layer_decay(model, 0.0, excluded, layer_decay=config.layer_decay):
            scale.update({id(p): group["lr_scale"] for p in group["params"]})
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = scale.get(id(parameter), 1.0) * (config.head_lr_scale if id(parameter) in heads else 1.0)
        factor *= math.prod(value for part, value in config.lr_scales.items() if part in name)
        skip = parameter.ndim <= 1 or name in excluded
        decay = 0.0 if skip else config.weight_decay
        group = groups.setdefault((factor, decay), {"params": [], "lr_scale": factor, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise ValueError("nothing to train: every parameter is frozen")
    return list(groups.values())


def optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimiser `config.name` over `parameter_groups`.

    Raises ValueError if betas or eps are set and the optimiser does not take them.
    """
    extra = {key: value for key in ("betas", "eps") if (value := getattr(config, key)) is not None}
    about = get_optimizer_info(config.name)
    for key in extra:
        if not getattr(about, f"has_{key}"):
            raise ValueError(f"optim.{key}: the optimiser {config.name!r} takes none; set it to null")
    groups = parameter_groups(model, config)
    built = create_optimizer_v2(
        groups, config.name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **extra
    )
    for group in built.param_groups:
        group["lr"] = config.lr * group["lr_scale"]
    return built


def schedule(built: torch.optim.Optimizer, config: OptimConfig, steps: int, steps_per_epoch: float) -> Scheduler:
    """The learning rate as a function of the step: `schedule.step_update(step)` before the update of that step.

    The curve is measured from step 0, warm-up included, as in timm, or from the end of the warm-up (warmup_first).

    Args:
        built: the optimiser.
        config: the section.
        steps: of the run.
        steps_per_epoch: of a pass, may be a fraction.
    """
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        raise ValueError(f"the warm-up takes {warmup} of {steps} steps; shorten optim.warmup_steps or optim.warmup_epochs")
    shared: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": config.warmup_lr, "t_in_epochs": False}
    if config.warmup_first:
        shared, steps = {**shared, "warmup_prefix": True}, steps - warmup
    if config.schedule == "rise_fall":
        if warmup:
            raise ValueError("optim.schedule rise_fall starts with its own rise: set optim.warmup_steps and warmup_epochs to 0")
        return RiseFall(built, round(config.decay_at[0] * steps), config.power, config.min_lr / config.lr)
    if config.schedule == "cosine":
        return CosineLRScheduler(built, t_initial=steps, lr_min=config.min_lr, **shared)
    if config.schedule in ("poly", "linear"):
        power = config.power if config.schedule == "poly" else 1.0
        return PolyLRScheduler(built, t_initial=steps, power=power, lr_min=config.min_lr, **shared)
    at = [round(share * steps) + 1 for share in config.decay_at] if config.schedule == "step" else []  # timm counts from 1
    return MultiStepLRScheduler(built, decay_t=at, decay_rate=config.decay_rate, **shared)


class RiseFall(Scheduler):
    """GLPN's rate: a power of the step up to the peak, and the same curve down from it, which may end a little below the start.

    Args:
        optimizer: whose rates it sets.
        peak: step of the highest rate, the optimiser's own.
        power: of the curve.
        low: rate at the start, as a share of the highest.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, peak: int, power: float, low: float):
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.peak, self.power, self.low = max(peak, 1), power, low

    def _get_lr(self, t: int) -> list[float]:
        place = (t + 1) / self.peak  # GLPN counts steps from 1
        share = place**self.power if place < 1 else 1 - (place - 1) ** self.power
        return [base * (self.low + (1 - self.low) * share) for base in self.base_values]


def averaged(model: nn.Module, config: OptimConfig) -> ModelEmaV3 | None:
    """Exponential moving average of weights and buffers, or None if the config asks for none."""
    if config.ema_decay is None:
        return None
    return ModelEmaV3(model, decay=config.ema_decay, use_warmup=config.ema_warmup)
