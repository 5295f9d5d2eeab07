"""Whatever a configuration, an override or a flag holds, the command ends with an exit code, never with a traceback.

The gate runs 100 examples of each kind; ZOO_FUZZ=10000 pytest tests/fuzz runs as many as it says.
"""

import contextlib
import dataclasses
import inspect
import io
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heads import HEADS
from train import cli, recipes
from train.data import DATASETS
from train.reading import parse
from train.rules import RANGES
from train.schema import SECTIONS
from train.tasks import TASKS

MANY = settings(
    max_examples=int(os.environ.get("ZOO_FUZZ", 100)),
    deadline=None,
    derandomize="ZOO_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
KEYS = {name: [field.name for field in dataclasses.fields(cls)] for name, cls in SECTIONS.items()}
KEYS["task"] = sorted({"name"} | {key for task in TASKS.values() for key in inspect.signature(task).parameters})
DOTTED = [f"{name}.{key}" for name, keys in KEYS.items() for key in keys] + [key for key in RANGES if "*" not in key]
NAMES = [*HEADS, *DATASETS, *TASKS, "nat_mini", "swin_t", "adamw", "sgd", "slide", "area", "scale", "native", "poly", "no", "."]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from(NAMES), st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=5)), inner, max_size=3)
    ),
    max_leaves=6,
)
SECTION = {name: st.dictionaries(st.sampled_from(keys), VALUES, max_size=4) for name, keys in KEYS.items()}
CONFIGS = st.fixed_dictionaries({}, optional={name: st.one_of(section, VALUES) for name, section in SECTION.items()})
SHIPPED = [
    yaml.safe_dump(recipes.read(name)[1])
    for name in ("quickstart", "quickstart_depth", "imagenet/nat_tiny", "ade20k/upernet_swin_t")
]
YAMLS = ["[1", "{a: 1, a: 2}", "!!python/name:os.system x", "&a [*a]", "*a", "- -", ": :", "\x00", "'", "1e400", "0x", "1:2:3"]
YAMLS += ["<<: 3", "!!set {a}", "{<<: [1]}", "!!binary x", "!!float x", "!!int ''", "!!timestamp x"]
COMMANDS = ["list", "info", "train", "eval", "predict", "config", "data-check", "convert", "export", "bench", "doctor", ""]
FLAGS = ["--size", "--out", "--weights", "--resume", "--debug", "--batches", "--configs", "--license", "--heads"]
WORDS = ["quikstart", "nat_minii", "nowhere", "0", "-1", "1e9", "--optim.lr", "--optim.lr=", "--.=", "--a.b.c=1"]
STARTS = ["quickstart", "quickstart_depth", "quickstart_digits", "quickstart_multitask", "imagenet/pit_s_distilled"]
OVERRIDES = st.tuples(st.sampled_from(DOTTED), st.one_of(VALUES.map(repr), st.sampled_from(YAMLS), st.text(max_size=10)))


def ends(arguments):
    """The exit code of a command; what it prints is kept off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
    assert code in (0, 1, 2) and "Traceback" not in errors.getvalue()
    return code


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "run.yaml"


@MANY
@given(CONFIGS)
def test_any_values_in_a_file(path, values):
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    ends(["config", str(path)])


@MANY
@given(st.sampled_from(STARTS), st.lists(OVERRIDES, max_size=3))
def test_any_overrides(name, overrides):
    ends(["config", name, *(f"--{key}={value}" for key, value in overrides)])


@MANY
@given(st.data())
def test_any_bytes_in_a_file(path, data):
    text = data.draw(st.sampled_from(SHIPPED)).encode()
    at, width = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 20))
    path.write_bytes(text[:at] + data.draw(st.binary(max_size=8)) + text[at + width :])
    ends(["config", str(path)])


@MANY
@given(st.text(max_size=60))
def test_any_text_is_plain_values_or_one_error(text):
    with contextlib.suppress(ValueError):
        parse(text, "x")


@MANY
@given(
    st.sampled_from(COMMANDS),
    st.lists(
        st.one_of(st.sampled_from(FLAGS), st.sampled_from(WORDS), st.text(max_size=6)),
        max_size=5,
    ),
)
def test_any_flags(command, flags):
    parser = cli.build_parser()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        args, rest = parser.parse_known_args([command, *flags])
        cli.overrides(parser, rest, args.takes_overrides)
