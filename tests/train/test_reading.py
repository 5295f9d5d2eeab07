"""Files of configurations: variants, and YAML that must not surprise, grow or run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from train import config, recipes
from train.reading import parse

ROOT = Path(__file__).resolve().parents[2]
TABLE = """
source: a paper
measured: not yet run
task: {name: segmentation, num_classes: 6}
model: {backbone_args: {depths: [1, 1, 1, 1]}}
optim: {steps: 5}
variants:
  small: {published: 1.5, model.backbone: nat_mini, model.backbone_args.embed_dim: 16}
  large: {model.backbone: nat_tiny, optim.steps: 7, measured: 40 mIoU}
"""


@pytest.fixture
def table(tmp_path):
    (tmp_path / "mine.yaml").write_text(TABLE, encoding="utf-8")
    return tmp_path / "mine.yaml"


def test_a_variant_changes_the_keys_it_names(table):
    small, large = (config.load(f"{table}:{name}") for name in ("small", "large"))
    assert (small.model.backbone, small.optim.steps, small.run.dir) == ("nat_mini", 5, "runs/mine_small")
    assert small.model.backbone_args == {"depths": [1, 1, 1, 1], "embed_dim": 16}
    assert (large.model.backbone, large.optim.steps) == ("nat_tiny", 7)
    assert large.model.backbone_args == {"depths": [1, 1, 1, 1]}  # what one variant sets does not reach the next


def test_a_variant_may_have_facts_of_its_own():
    found = recipes.variants_of(parse(TABLE, "mine.yaml"), "mine.yaml")
    assert found["small"].about == {"source": "a paper", "measured": "not yet run", "published": "1.5"}
    assert found["large"].about == {"source": "a paper", "measured": "40 mIoU"}


def test_variants_share_keys_by_a_merge_and_names_may_hold_a_folder(tmp_path):
    text = TABLE + "  cifar10/a: &a {model.backbone: nat_mini, optim.steps: 9}\n  cifar100/a: {<<: *a, optim.lr: 0.5}\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    first, second = (config.load(f"{tmp_path / 'mine.yaml'}:{name}/a") for name in ("cifar10", "cifar100"))
    assert (first.optim.steps, second.optim.steps, second.optim.lr) == (9, 9, 0.5) and first.optim.lr != 0.5
    assert {"kitti/dpt_vit_base", "nyuv2/dpt_vit_base"} <= set(recipes.shipped())


def test_a_table_of_variants_needs_a_choice(table, tmp_path):
    with pytest.raises(ValueError, match="several variants; choose one, e.g. .*mine.yaml:small"):
        config.load(str(table))
    with pytest.raises(ValueError, match="no variant 'smal'; did you mean 'small'"):
        config.load(f"{table}:smal")
    (tmp_path / "plain.yaml").write_text("task: {name: segmentation, num_classes: 6}", encoding="utf-8")
    with pytest.raises(ValueError, match="has no variants: leave out ':small'"):
        config.load(f"{tmp_path / 'plain.yaml'}:small")
    with pytest.raises(FileNotFoundError, match="imagenet/nat is a table of variants.*imagenet/nat_tiny"):
        config.load("imagenet/nat")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[]", "variants must be a table"),
        ("{a: 3}", "variants must be a table"),
        ("{a: {model: {}}}", "'model' is no key of a section"),
        ("{a: {modle.head: fpn}}", "'modle.head' is no key of a section"),
        ("{a: {task.name.x: fpn}}", "'name' is 'segmentation', which has no keys"),
    ],
)
def test_a_table_of_another_form_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        recipes.variants_of(parse(f"task: {{name: segmentation}}\nvariants: {rows}", "x"), "x")


LAUGHS = "\n".join(["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)])
REFUSED = {
    "a key twice": ("optim: {lr: 1, steps: 2, lr: 3}", "the key 'lr' is given twice"),
    "a section twice": ("run: {}\noptim: {}\nrun: {}", "the key 'run' is given twice"),
    "billion laughs": (LAUGHS, "stands for more than 100000 values"),
    "itself": ("a: &a [*a]", "stands inside what it names"),
    "deep": ("a: " + 3000 * "[" + 3000 * "]", "more than 40 brackets"),
    "long": ("a: " + 600_000 * "x", "more than a configuration has"),
    "code": ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "bytes": ("a: !!binary aGVsbG8=", "bytes is no value of a configuration"),
    "a set": ("a: !!set {b, c}", "set is no value of a configuration"),
    "a list as key": ("{[1, 2]: 3}", "unhashable key"),
    "open": ("a: [1", "not valid YAML"),
    "a control character": ("a: \x00", "not valid YAML"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_what_surprises_or_grows_is_refused_at_once(text, message):
    begun = time.process_time()
    with pytest.raises(ValueError, match=message):
        parse(text, "x.yaml")
    assert time.process_time() - begun < 5


def test_plain_values_are_read():
    text = "{a: &a [1, 1.5e-3, true, no, null], b: *a, d: 2020-01-01, <<: {e: 1}}"
    values = [1, 1.5e-3, True, "no", None]
    assert parse(text, "x") == {"a": values, "b": values, "d": "2020-01-01", "e": 1}
    assert parse("", "x") is None


def test_an_override_that_is_no_yaml_is_a_sentence():
    for text in ("--optim.lr=[1", "--optim.lr=!!python/name:os.getcwd ''", "--optim.lr={a: 1, a: 2}", "--optim.lr=\x07"):
        with pytest.raises(ValueError, match="of --optim.lr is not valid YAML"):
            config.load("quickstart", [text])


def test_utf8_with_a_mark_and_other_encodings(tmp_path):
    path = tmp_path / "größe.yaml"
    path.write_bytes(
        b"\xef\xbb\xbf" + "# für Häuser\ntask: {name: segmentation, classes: [Straße, 家]}\noptim: {steps: 1}\n".encode()
    )
    assert recipes.read(str(path))[1]["task"]["classes"] == ["Straße", "家"]
    path.write_bytes("# für Häuser\n".encode("latin-1"))
    with pytest.raises(ValueError, match="größe.yaml is not text in UTF-8"):
        recipes.read(str(path))


@pytest.mark.parametrize("case", ["utf8_config_other_locale"])
def test_a_configuration_is_utf8_whatever_the_system_prefers(case):
    path = Path(__file__).parent.parent / "cases" / case / "run.yaml"
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [sys.executable, "-m", "train", "config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ascii_only}, cwd=ROOT, check=True)
    assert yaml.safe_load(done.stdout)["data"]["args"]["classes"] == ["背景", "物体"]
