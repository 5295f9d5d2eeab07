"""No key is accepted and ignored, no number is nonsense, and mistakes that do not hide each other come together."""

import dataclasses
import inspect
from fnmatch import fnmatchcase

import pytest
import tiny

from train import config
from train.checks import Mistakes
from train.rules import APPLIES, RANGES
from train.schema import SECTIONS
from train.tasks import TASKS

CLASSES = {"task": {"name": "classification", "num_classes": 10}, "data": {"name": "digits"}, "optim": {"steps": 5}}
WITHOUT_EFFECT = {  # key -> (value, what the rest of the configuration is)
    "model.head": ("upernet", CLASSES),
    "model.head_args": ({}, CLASSES),
    "model.checkpoint_which": ("model_ema", {}),
    "model.aux_head": ("fcn", CLASSES),
    "model.aux_args": ({"width": 3}, {**CLASSES, "model": {"aux_head": "fcn"}}),
    "model.neck": ("multilevel", CLASSES),
    "model.out_indices": ([0, 1], CLASSES),
    "data.skip_unreadable": (0.5, {}),
    "augment.scale": ([0.5, 2], {"augment": {"crop": "resize"}}),
    "augment.ratio": ([0.5, 2], {"augment": {"crop": "scale"}}),
    "augment.pad": (4, {"augment": {"crop": "area"}}),
    "augment.color_jitter_prob": (0.3, {"augment": {"color_jitter": 0}}),
    "augment.zoom_depth": (True, {"augment": {"crop": "scale"}}),
    "augment.cut_depth": (0.5, {}),
    "augment.cut_depth_form": ("file_units", {}),
    "optim.betas": ([0.9, 0.99], {"optim": {"name": "sgd"}}),
    "optim.eps": (1e-6, {"optim": {"name": "lion"}}),
    "optim.momentum": (0.9, {}),
    "optim.power": (0.9, {}),
    "optim.decay_at": ([0.5], {}),
    "optim.decay_rate": (0.5, {}),
    "optim.min_lr": (1e-5, {"optim": {"schedule": "constant"}}),
    "optim.warmup_lr": (1e-5, {"optim": {"warmup_steps": None}}),
    "optim.warmup_first": (True, {"optim": {"warmup_steps": None}}),
    "optim.ema_warmup": (False, {"optim": {"ema_decay": None}}),
    "infer.window": ([32, 32], {}),
    "infer.stride": ([32, 32], {}),
    "infer.blend": ("smooth", {}),
    "task.aux_weight": (0.4, {}),
    "task.mixup_prob": (0.5, CLASSES),
    "task.mixup_switch": (0.5, {**CLASSES, "task": {**CLASSES["task"], "mixup": 0.8}}),
    "task.teacher_args": ({"depth": 2}, CLASSES),
    "task.teacher_pretrained": (True, CLASSES),
    "task.teacher_checkpoint": ("file.pth", CLASSES),
    "task.teacher_checkpoint_which": (
        "model_ema",
        {**CLASSES, "task": {**CLASSES["task"], "teacher": "resnet10t", "teacher_pretrained": False}},
    ),
    "task.distillation": ("soft", CLASSES),
    "task.distillation_blocks": (2, {**CLASSES, "task": {**CLASSES["task"], "teacher": "resnet10t", "distillation": "soft"}}),
    "task.distillation_weight": (
        0.5,
        {**CLASSES, "task": {**CLASSES["task"], "teacher": "vit_tiny_patch16_224", "distillation": "copy_keys"}},
    ),
    "task.temperature": (3.0, {**CLASSES, "task": {**CLASSES["task"], "teacher": "resnet10t"}}),
}


def with_key(values, key, value):
    section, name = key.split(".")
    base = values if values.get("task") else tiny.values(**values)
    return {**base, section: {**base.get(section, {}), name: value}}


def test_the_table_of_this_test_is_that_of_the_rules():
    assert set(WITHOUT_EFFECT) == set(APPLIES)


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_a_key_that_does_nothing_is_named(key):
    value, values = WITHOUT_EFFECT[key]
    with pytest.raises(ValueError, match=rf"{key}: .* has no effect, it applies .*: leave it out"):
        config.resolve(with_key(values, key, value))


def test_rules_name_keys_that_exist():
    args = {f"task.{name}" for task in TASKS.values() for name in inspect.signature(task).parameters}
    keys = {f"{name}.{field.name}" for name, cls in SECTIONS.items() for field in dataclasses.fields(cls)} | args
    assert set(APPLIES) <= keys
    for pattern in RANGES:
        assert any(fnmatchcase(key, ".".join(pattern.split(".")[:2])) for key in keys), pattern


def test_overrides_count_as_given_and_a_printed_configuration_does_not(tmp_path):
    with pytest.raises(ValueError, match="optim.momentum: 0.9 has no effect"):
        config.load("quickstart", ["--optim.momentum=0.9"])  # the default: it is still ignored
    loaded = config.load("quickstart")
    (tmp_path / "config.yaml").write_text(config.as_yaml(loaded), encoding="utf-8")
    assert config.as_dict(config.load(str(tmp_path / "config.yaml"))) == config.as_dict(loaded)
    assert config.as_dict(config.load_run(tmp_path)) == config.as_dict(loaded)
    with pytest.raises(ValueError, match="infer.stride: .* has no effect"):
        config.load_run(tmp_path, ["--infer.stride=[8, 8]"])


@pytest.mark.parametrize("key", ["optim.lr=1", "model.checkpoint=other.pth", "model.pretrained=true", "run.dir=elsewhere"])
def test_a_finished_run_takes_no_override_of_where_it_started(tmp_path, key):
    (tmp_path / "config.yaml").write_text(config.as_yaml(config.load("quickstart")), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{key.partition('=')[0]} can change nothing in .*, which has its weights already"):
        config.load_run(tmp_path, [f"--{key}"])


def test_a_run_in_windows_is_evaluated_whole_by_one_override(tmp_path):
    loaded = config.load("quickstart", ["--infer.mode=slide", "--infer.window=[64, 64]"])
    (tmp_path / "config.yaml").write_text(config.as_yaml(loaded), encoding="utf-8")
    assert config.load_run(tmp_path, ["--infer.mode=whole"]).infer.mode == "whole"


NONSENSE = [
    ("optim.lr", ".nan", "must be finite"),
    ("optim.lr", ".inf", "must be finite"),
    ("optim.min_lr", ".nan", "must be finite"),
    ("optim.min_lr", "0.5", "is above optim.lr"),
    ("optim.warmup_steps", "-1", "must not be negative"),
    ("optim.lr_scales", "{weight: -1}", "must not be negative"),
    ("optim.ema_decay", "1", "must lie in"),
    ("optim.layer_decay", "1e-30", "must lie in"),
    ("optim.betas", "[0.9, 1.5]", "must lie in"),
    ("optim.global_batch", "null", "null is not int"),
    ("optim.lr", "null", "null is not float"),
    ("run.seed", "null", "null is not int"),
    ("run.seed", "-1", "must be 0 to"),
    ("run.threads", "100000", "must be 1 to 1024"),
    ("run.log_every", "null", "null is not int"),
    ("data.eval_batch", "null", "null is not int"),
    ("data.workers", "null", "null is not int"),
    ("data.repeats", "null", "null is not int"),
    ("data.size", "[1, 1]", "must be image sides"),
    ("data.size", "[100000000000000000000, 64]", "must be"),
    ("data.mean", "[]", "is empty"),
    ("data.std", "[.inf]", "must be finite"),
    ("data.std", "[0.0]", "must be positive"),
    ("augment.rotate", "-10", "must be 0 to 180"),
    ("augment.rotate", ".nan", "must be finite"),
    ("augment.color_jitter", "-1", "must lie in"),
    ("infer.scales", "[0, 0]", "must be factors"),
    ("infer.scales", "[-1]", "must be factors"),
    ("infer.scales", "[]", "scales must be positive factors"),
    ("infer.scales", "[.nan]", "must be finite"),
    ("infer.scales", "[1000]", "must be factors"),
    ("infer.window", "[0, 5]", "must be positive"),
    ("task.losses", "{cross_entropy: {factor: -1}}", "factor must be positive"),
    ("task.losses", "{cross_entropy: {factor: 0}}", "factor must be positive"),
    ("task.class_weights", "[0, 0, 0, 0, 0, 0]", "are all 0"),
    ("task.class_weights", "[-1, 1, 1, 1, 1, 1]", "must not be negative"),
    ("model.backbone_args.embed_dim", "-8", "must be positive"),
    ("model.backbone_args.kernel_size", "0", "must be positive"),
    ("model.backbone_args.drop_path_rate", "2", "must lie in"),
    ("model.backbone_args.anything", ".nan", "must be finite"),
    ("model.out_indices", "[]", "is empty"),
    ("model.in_chans", "0", "must be 1 to"),
]


@pytest.mark.parametrize("key, value, message", NONSENSE)
def test_nonsense_is_named_before_anything_is_built(key, value, message):
    with pytest.raises(ValueError, match=message) as error:
        config.load("quickstart", [f"--{key}={value}"])
    assert key in str(error.value) or key == "infer.scales"


@pytest.mark.parametrize("key, value", [("kernel_size", "4"), ("depths", "[1, two]"), ("mlp_ratio", "-1"), ("stride", "0")])
def test_backbone_arguments_that_make_no_model_of_ours_are_named_before_anything_is_built(key, value):
    with pytest.raises(ValueError, match=f"model.backbone_args: {key} must be") as error:
        config.load("quickstart", [f"--model.backbone_args.{key}={value}"])
    assert not isinstance(error.value, Mistakes) or len(error.value.sentences) == 1


def test_other_models_and_stages_without_blocks_keep_their_arguments():
    for backbone, args in [("convmixer_768_32", "{kernel_size: 4}"), ("fan_tiny_8_p4_hybrid", "{depths: [3, 0]}")]:
        config.load("quickstart", [f"--model.backbone={backbone}", f"--model.backbone_args={args}"])


def test_a_window_or_stride_that_leaves_pixels_out_is_found_before_training():
    with pytest.raises(ValueError, match="infer: stride .* at most the window"):
        config.load("quickstart", ["--infer.mode=slide", "--infer.window=[32, 32]", "--infer.stride=[64, 64]"])


def test_the_mistakes_of_a_first_configuration_come_together():
    values = {"task": {"name": "depth"}, "data": {"name": "folder", "args": {"clases": []}}, "optim": {"lrr": 1}}
    with pytest.raises(ValueError) as error:
        config.resolve(values)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{len(lines) - 1} mistakes"
    for part in ("Depth needs 'max_depth'", "data.root is missing", "unknown key 'clases'", "unknown key 'lrr'"):
        assert sum(part in line for line in lines) == 1, part
