"""What no type expresses: the range of each number, and which keys say nothing unless another one is set.

Both are tables by key. A key is written as in an override, with * for any part.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from timm.optim import get_optimizer_info

from train.checks import Collected
from train.schema import Config


@dataclass(frozen=True)
class Range:
    """The numbers a key may have.

    Attributes:
        words: what a value must be, after "must".
        low: smallest.
        high: largest.
        above: whether `low` itself is excluded.
        below: whether `high` itself is excluded.
    """

    words: str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a finite value is inside."""
        return (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )


POSITIVE = Range("be positive", 0, above=True)
NOT_NEGATIVE = Range("not be negative", 0)
SHARE = Range("lie in 0..1", 0, 1)
BELOW_ONE = Range("lie in [0, 1)", 0, 1, below=True)
SIDE = Range("be image sides of 8 to 32768 pixels", 8, 32768)

RANGES: dict[str, Range] = {
    "model.in_chans": Range("be 1 to 1024 channels", 1, 1024),
    "model.img_size": SIDE,
    "model.out_indices": Range("be levels from -64 to 64", -64, 64),
    "model.backbone_args.drop_path_rate": BELOW_ONE,
    "model.backbone_args.drop_rate": BELOW_ONE,
    "model.backbone_args.proj_drop_rate": BELOW_ONE,
    "model.backbone_args.attn_drop_rate": BELOW_ONE,
    "model.backbone_args.embed_dim": POSITIVE,
    "model.backbone_args.kernel_size": POSITIVE,
    "model.backbone_args.depths": NOT_NEGATIVE,  # a 0 stands for a stage without, in a few families
    "model.backbone_args.num_heads": POSITIVE,
    "data.size": SIDE,
    "data.workers": Range("be 0 to 1024 processes", 0, 1024),
    "data.eval_batch": POSITIVE,
    "data.repeats": POSITIVE,
    "data.skip_unreadable": Range("be a share of the files in [0, 1)", 0, 1, below=True),
    "data.max_pixels": POSITIVE,
    "data.std": POSITIVE,
    "augment.scale": POSITIVE,
    "augment.ratio": POSITIVE,
    "augment.pad": Range("be 0 to 4096 pixels", 0, 4096),
    "augment.rotate": Range("be 0 to 180 degrees", 0, 180),
    "augment.color_jitter": Range("lie in 0..5", 0, 5),
    "optim.lr": POSITIVE,
    "optim.steps": POSITIVE,
    "optim.epochs": POSITIVE,
    "optim.global_batch": POSITIVE,
    "optim.micro_batch": POSITIVE,
    "optim.clip_norm": POSITIVE,
    "optim.head_lr_scale": POSITIVE,
    "optim.lr_scales.*": NOT_NEGATIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.momentum": BELOW_ONE,
    "optim.betas": BELOW_ONE,
    "optim.eps": NOT_NEGATIVE,
    "optim.power": POSITIVE,
    "optim.decay_at": Range("be shares of the run between 0 and 1", 0, 1, above=True, below=True),
    "optim.decay_rate": Range("lie in (0, 1]", 0, 1, above=True),
    "optim.min_lr": NOT_NEGATIVE,
    "optim.warmup_steps": NOT_NEGATIVE,
    "optim.warmup_epochs": NOT_NEGATIVE,
    "optim.warmup_lr": NOT_NEGATIVE,
    "optim.layer_decay": Range("lie in 0.1..1 (published ones are 0.65 to 0.95)", 0.1, 1),
    "optim.ema_decay": Range("lie in (0, 1): at 1 the average never moves", 0, 1, above=True, below=True),
    "run.seed": Range("be 0 to 4294967295", 0, 2**32 - 1),
    "run.threads": Range("be 1 to 1024", 1, 1024),
    "run.eval_every": POSITIVE,
    "run.save_every": POSITIVE,
    "run.log_every": POSITIVE,
    "infer.window": POSITIVE,
    "infer.stride": POSITIVE,
    "infer.scales": Range("be factors of the image size in (0, 16]", 0, 16, above=True),
    "task.mixup": NOT_NEGATIVE,
    "task.cutmix": NOT_NEGATIVE,
    "task.mixup_prob": SHARE,
    "task.mixup_switch": SHARE,
    "task.temperature": POSITIVE,
    "task.aux_weight": NOT_NEGATIVE,
    "task.class_weights": NOT_NEGATIVE,
    "task.max_depth": POSITIVE,
    "task.min_depth": NOT_NEGATIVE,
    "task.losses.*.factor": POSITIVE,
    "task.parts.*.loss_weight": POSITIVE,
    "task.parts.*.losses.*.factor": POSITIVE,
    "task.parts.*.class_weights": NOT_NEGATIVE,
}


def check_ranges(values: Mapping[str, Any]) -> None:
    """Raises Mistakes with every number of a configuration, as plain nested values, that is not finite or out of its range."""
    found = Collected()
    for key, value in leaves(values):
        rule = next((rule for pattern, rule in RANGES.items() if fnmatchcase(key, pattern)), None)
        bad = [number for number in numbers(value) if not math.isfinite(number)]
        if bad:
            found.sentences.append(f"{key} must be finite, got {shown(value)}")
        elif rule is not None and not all(map(rule.holds, numbers(value))):
            found.sentences.append(f"{key} must {rule.words}, got {shown(value)}")
    found.done()


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key with dots, value) of everything in nested dicts that is no dict. lr_scales' keys have dots of their own."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def numbers(value: Any) -> Iterator[float]:
    """The numbers in nested lists; a boolean is none."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value if isinstance(value, float) or abs(value) < 2**63 else math.inf


def shown(value: Any) -> str:
    """A value as an error prints it, not too long."""
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Applies:
    """When a key says something.

    Attributes:
        when: in words, after "applies".
        test: of the configuration and of whether its task is dense.
    """

    when: str
    test: Callable[[Config, bool], bool]


def _dense(words: str) -> Applies:
    return Applies(f"to dense tasks; {words}", lambda config, dense: dense)


def _optimiser(part: str, words: str) -> Applies:
    return Applies(
        f"to optimisers {words}; optim.name is another",
        lambda config, dense: bool(getattr(get_optimizer_info(config.optim.name), part)),
    )


def _schedule(*names: str) -> Applies:
    return Applies(f"to optim.schedule {' or '.join(names)}", lambda config, dense: config.optim.schedule in names)


def _crop(*names: str) -> Applies:
    return Applies(f"to augment.crop {' or '.join(names)}", lambda config, dense: config.augment.crop in names)


def _task(key: str, words: str, test: Callable[[Any], bool] = bool) -> Applies:
    return Applies(words, lambda config, dense: test(config.task.get(key)))


def _warms_up(config: Config, dense: bool) -> bool:
    return bool(config.optim.warmup_steps or config.optim.warmup_epochs)


def _distils(config: Config) -> str:
    """What a classifier learns from its teacher; "none" without one."""
    return config.task["distillation"] if config.task["teacher"] else "none"


CLASSES = ("none", "hard", "soft")
OWN_CLASSIFIER = "classification uses the backbone's own classifier"
HEAD = Applies(
    f"to dense tasks whose parts do not name their own; {OWN_CLASSIFIER}",
    lambda config, dense: dense and not all("head" in part for part in config.task.get("parts", {"": {}}).values()),
)
TEACHER = _task("teacher", "with task.teacher")
SLIDE = Applies("to infer.mode slide", lambda config, dense: config.infer.mode == "slide")
AUXILIARY = Applies("with model.aux_head", lambda config, dense: config.model.aux_head is not None)
MIXING = Applies("with task.mixup or task.cutmix", lambda config, dense: bool(config.task["mixup"] or config.task["cutmix"]))
BOTH_MIX = Applies(
    "with both task.mixup and task.cutmix", lambda config, dense: bool(config.task["mixup"] and config.task["cutmix"])
)
WARM_UP = Applies("with optim.warmup_steps or optim.warmup_epochs", _warms_up)
DEPTH = Applies(
    "to tasks with depth", lambda config, dense: config.task["name"] == "depth" or "depth" in config.task.get("parts", {})
)

APPLIES: dict[str, Applies] = {
    "model.head": HEAD,
    "model.head_args": HEAD,
    "model.checkpoint_which": Applies("with model.checkpoint", lambda config, dense: config.model.checkpoint is not None),
    "model.aux_head": _dense(OWN_CLASSIFIER),
    "model.aux_args": _dense(OWN_CLASSIFIER),
    "model.neck": Applies(
        f"to dense tasks with one head; {OWN_CLASSIFIER}", lambda config, dense: dense and "parts" not in config.task
    ),
    "model.out_indices": _dense(OWN_CLASSIFIER),
    "data.skip_unreadable": Applies("to data sets of files", lambda config, dense: config.data.root is not None),
    "augment.scale": _crop("area", "scale", "native"),
    "augment.ratio": _crop("area"),
    "augment.pad": _crop("pad"),
    "augment.color_jitter_prob": Applies("with augment.color_jitter", lambda config, dense: config.augment.color_jitter > 0),
    "augment.zoom_depth": DEPTH,
    "augment.cut_depth": DEPTH,
    "augment.cut_depth_form": Applies("with augment.cut_depth", lambda config, dense: config.augment.cut_depth > 0),
    "optim.betas": _optimiser("has_betas", "with betas"),
    "optim.eps": _optimiser("has_eps", "with eps"),
    "optim.momentum": _optimiser("has_momentum", "with momentum, such as sgd"),
    "optim.power": _schedule("poly", "rise_fall"),
    "optim.decay_at": _schedule("step", "rise_fall"),
    "optim.decay_rate": _schedule("step"),
    "optim.min_lr": _schedule("cosine", "poly", "linear", "rise_fall"),
    "optim.warmup_lr": WARM_UP,
    "optim.warmup_first": WARM_UP,
    "optim.ema_warmup": Applies("with optim.ema_decay", lambda config, dense: config.optim.ema_decay is not None),
    "infer.window": SLIDE,
    "infer.stride": SLIDE,
    "infer.blend": SLIDE,
    "task.aux_weight": AUXILIARY,
    "task.mixup_prob": MIXING,
    "task.mixup_switch": BOTH_MIX,
    "task.teacher_args": TEACHER,
    "task.teacher_pretrained": TEACHER,
    "task.teacher_checkpoint": TEACHER,
    "task.teacher_checkpoint_which": Applies(
        "with task.teacher_checkpoint", lambda config, dense: config.task["teacher_checkpoint"] is not None
    ),
    "task.distillation": TEACHER,
    "task.distillation_blocks": Applies(
        "with task.teacher and a task.distillation of attention", lambda config, dense: _distils(config) not in CLASSES
    ),
    "task.distillation_weight": Applies(
        "with task.teacher and a task.distillation that does not copy",
        lambda config, dense: not _distils(config).startswith(("none", "copy_")),
    ),
    "task.temperature": Applies(
        "with task.teacher and task.distillation soft", lambda config, dense: _distils(config) == "soft"
    ),
}


def check_applies(config: Config, dense: bool, given: Collection[str]) -> None:
    """Raises Mistakes with every key of `given` (with dots) that says nothing in this configuration."""
    found = Collected()
    for key, rule in APPLIES.items():
        if key in given and not rule.test(config, dense):
            value = shown(_value(config, key))
            found.sentences.append(f"{key}: {value} has no effect, it applies {rule.when}: leave it out")
    found.done()


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    part = getattr(config, section)
    return part.get(name) if isinstance(part, dict) else getattr(part, name)
