"""What the README tells a user to type works."""

import re
from pathlib import Path

import pytest

import backbones
from train import recipes
from train.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
LINES = [line.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_screen_holds_two_commands_and_the_gate_reads_them():
    block = re.search(r"<!-- commands -->\n```bash\n(.*?)```\n<!-- end commands -->", README, re.DOTALL)
    run, test = block[1].splitlines()
    assert README[: block.start()].count("\n") < 25
    assert run == 'pip install -e ".[train]" && zoo train quickstart'
    assert test.startswith('pip install -e ".[test]" && ') and test.split(" && ")[-1].startswith("pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_extras_that_commands_name_exist():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = pyproject.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))
    named = {name for line in LINES for group in re.findall(r"\.\[([\w,]+)\]", line) for name in group.split(",")}
    assert named and named <= extras


@pytest.mark.parametrize("line", [line for line in LINES if re.search(r"(^|&& |python )zoo train ", line)])
def test_a_training_command_names_a_shipped_configuration(line):
    words = line.split()
    name = next(after for word, after in zip(words, words[1:]) if word == "train" and after != "train")
    assert name in recipes.shipped()


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("zoo ")])
def test_a_command_of_the_readme_parses(line):
    build_parser().parse_known_args(line.split()[1:])


def test_the_table_of_families_has_every_family():
    table = README.partition("| family | names")[2].partition("\n\n")[0]
    missing = {name for name in backbones.list_models() if not re.search(rf"`{name.split('_')[0]}_", table)}
    assert not missing


def test_the_table_of_small_runs_names_shipped_configurations_and_what_they_reached():
    table = README.partition("| configuration | data | reached |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([\w/]+)` \| [^|]* \| (?:AbsRel )?([\d.]+)", table, re.MULTILINE)
    assert len(rows) > 5
    for name, number in rows:
        assert number in recipes.about(name)["measured"], name


@pytest.mark.parametrize("code", CODE)
def test_the_code_of_the_readme_runs(code):
    exec(compile(code.replace("pretrained=True", "pretrained=False"), "README.md", "exec"), {})
