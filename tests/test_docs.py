"""The site: it builds without a warning, every page is in its menu, and what the pages tell people to type works."""

import ast
import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from heads import HEADS
from train import config, reference
from train.cli import build_parser, overrides
from train.reading import parse

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
API = sorted((DOCS / "api").glob("*.md"))
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}


def blocks(page: str, language: str) -> list[str]:
    """The code of a page in one language, indentation of lists taken off."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", PAGES[page], re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def menu(entries: list) -> list[str]:
    """The pages of mkdocs.yml's nav, in order."""
    found: list[str] = []
    for entry in entries:
        (value,) = entry.values()
        found += menu(value) if isinstance(value, list) else [value]
    return found


COMMANDS = [
    (page, line)
    for page in PAGES
    for code in blocks(page, "bash")
    for line in code.splitlines()
    if line.startswith("zoo ") and not re.search(r"\[|\.\.\.", line)  # those show a form, not a call
]

WHOLE = [
    (page, parse(code, page))
    for page in PAGES
    for code in blocks(page, "yaml")
    if all(len(re.findall(rf"^{key}:", code, re.MULTILINE)) == 1 for key in ("task", "model", "data"))
]


def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip('mkdocs and mkdocstrings are not installed: pip install -e ".[docs]"')
    for name in ("docs", "backbones", "heads", "train", "weights"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "commands" / "index.html").is_file()


def test_every_page_is_in_the_menu_once():
    found = menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(found) == sorted(PAGES)


@pytest.mark.parametrize("page", API, ids=lambda page: page.stem)
def test_every_object_of_the_api_pages_exists(page):
    names = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert names
    for name in names:
        module, _, rest = name.rpartition(".")
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:
            found = getattr(importlib.import_module(module), rest)
        assert found.__doc__, name


def test_links_between_the_pages_lead_somewhere():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).resolve().is_relative_to(DOCS), f"{page.name}: {target} is outside the site"
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", reference.PAGES)
def test_the_pages_made_from_the_program_are_what_it_says(page):
    assert PAGES[page] == reference.PAGES[page](), f"docs/{page} is older than the program: python -m train.reference docs"


FAMILIES = [page for page in PAGES if page.startswith("families/")]


@pytest.mark.parametrize("page", FAMILIES)
def test_the_table_of_a_family_is_that_of_all_models(page):
    made = reference.family_page(PAGES[page], PAGES["models.md"])
    assert PAGES[page] == made, f"docs/{page} differs from docs/models.md: python -m train.reference docs"


def test_every_model_is_in_one_family():
    named = [name for page in FAMILIES for name in re.findall(r"^\| `(\w+)` \| [\d.]+ \|", PAGES[page], re.MULTILINE)]
    assert sorted(named) == sorted(reference.rows_of(PAGES["models.md"]))


def test_the_command_that_makes_them_says_how_it_is_called(tmp_path, capsys):
    assert reference.main([]) == 2 and "usage" in capsys.readouterr().err
    assert reference.main([str(tmp_path / "none")]) == 2


def test_every_command_has_an_example():
    assert set(reference.EXAMPLES) == set(build_parser().commands)


@pytest.mark.parametrize("page, line", COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in COMMANDS])
def test_a_command_of_the_pages_is_accepted(page, line):
    parser = build_parser()
    words = shlex.split(line.partition(" > ")[0], comments=True)
    args, rest = parser.parse_known_args(words[1:])
    overrides(parser, rest, args.takes_overrides)


@pytest.mark.parametrize("page, values", WHOLE, ids=[f"{page}-{i}" for i, (page, _) in enumerate(WHOLE)])
def test_a_configuration_of_the_pages_is_accepted(page, values):
    config.resolve({"optim": {"steps": 1}} | values)


def test_every_head_has_a_section():
    assert re.findall(r"^## (\w+)$", PAGES["heads.md"], re.MULTILINE) == [*HEADS]
    assert all(re.search(rf"^## {name}\n.*?arxiv\.org", PAGES["heads.md"], re.MULTILINE | re.DOTALL) for name in HEADS)


@pytest.mark.parametrize("page", ["heads.md", "families/registers.md"])
def test_the_python_of_a_page_runs(page):
    space: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), space)


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_the_pages_is_python(page):
    for code in blocks(page, "python"):
        ast.parse(code)
