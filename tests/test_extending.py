"""What docs/extending.md shows to people who write their own parts works, from top to bottom."""

import re
import sys
import types
from pathlib import Path

import pytest

import heads
from backbones.edits import EDITS
from train.data import DATASETS
from train.sample import KINDS
from train.tasks import TASKS, Task

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
TABLES = (heads.HEADS, DATASETS, TASKS, EDITS, KINDS)


@pytest.fixture
def tables():
    """The tables of names, as they were again afterwards."""
    before = [list(table) for table in TABLES]
    yield
    for table, names in zip(TABLES, before, strict=True):
        for name in [name for name in table if name not in names]:
            del table[name]


def test_the_examples_run_one_after_another(tables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("extending")  # a module, as whatever is written to a file is in one
    monkeypatch.setitem(sys.modules, "extending", module)
    space = vars(module)
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(code, PAGE.name, "exec"), space)
    assert (tmp_path / "runs/dots/summary.json").is_file()
    assert (heads.HEADS["average"], TASKS["find_heat"]) == (space["Average"], space["FindHeat"])
    misspelt = {"backbone": "resnet10t", "edits": [{"name": "smooth", "kidn": "silu"}]}
    with pytest.raises(ValueError, match="did you mean 'kind'"):
        space["config"].resolve(space["values"] | {"model": misspelt})


@pytest.mark.parametrize("interface, heading", [(heads.Head, "A head"), (Task, "A task")])
def test_what_a_subclass_must_define_is_on_the_page(interface, heading):
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)", section))
    wanted = getattr(interface, "__abstractmethods__", None) or {"forward", "get_classifier", "scores"}
    assert wanted <= named
