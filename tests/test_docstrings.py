"""Docstrings: whatever takes more than three arguments lists them a line each, so that an editor shows what each one is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("backbones", "heads", "train", "weights")
OPEN = ("heads", "train")  # here every function without an underscore is public; elsewhere those that another file imports
BACKENDS = r"backbones/ops/\w+/(?!__init__)"  # each takes what the op's public function has in its list
MOST = 3  # arguments that a sentence can explain
OF_THE_CLASS = ("__init__", "find", "describe")  # a data set's arguments are those of find and describe
Function = ast.FunctionDef | ast.AsyncFunctionDef


def classes_of(trees: dict[str, ast.Module]) -> dict[str, list[ast.ClassDef]]:
    """The classes of these files by name."""
    found: dict[str, list[ast.ClassDef]] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def arguments(function: Function) -> list[str]:
    """Names of what a caller gives, without self."""
    given = function.args
    return [arg.arg for arg in [*given.posonlyargs, *given.args, *given.kwonlyargs] if arg.arg not in ("self", "cls")]


def listed(docstring: str | None) -> set[str]:
    """The names that lines of an Args: list begin with; arguments of one meaning may share a line."""
    _, _, text = (docstring or "").partition("Args:\n")
    return {name for line in re.findall(r"^ +(\w+(?:, \w+)*): ", text, re.MULTILINE) for name in line.split(", ")}


def inherited(owner: ast.ClassDef, name: str, classes: dict[str, list[ast.ClassDef]]) -> set[str]:
    """What the list of the method of this name has in the classes that `owner` derives from."""
    found: set[str] = set()
    for base in owner.bases:
        for parent in classes.get(ast.unparse(base).split(".")[-1].split("[")[0], []):
            methods = [node for node in parent.body if isinstance(node, Function) and node.name == name]
            found |= listed(ast.get_docstring(methods[0])) if methods else set()
            found |= inherited(parent, name, classes) if parent is not owner else set()
    return found


def imported(trees: dict[str, ast.Module]) -> set[str]:
    """Names that some file imports from another, or takes from a module of ours, as in `reference.run`."""
    names: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
    return names


def unlisted(tree: ast.Module, classes: dict[str, list[ast.ClassDef]], public: set[str] | None = None) -> list[str]:
    """What is public in a file and has too many arguments for its docstring, with the arguments that no line names.

    public: names of the functions that count; None for all without an underscore.
    """
    wrong = []

    def visit(owner: ast.Module | ast.ClassDef) -> None:
        for node in owner.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node)
            if not isinstance(node, Function) or (node.name.startswith("_") and node.name != "__init__"):
                continue
            if public is not None and owner is tree and node.name not in public:
                continue
            names = arguments(node)
            known = listed(ast.get_docstring(node))
            if isinstance(owner, ast.ClassDef):
                known |= listed(ast.get_docstring(owner)) if node.name in OF_THE_CLASS else inherited(owner, node.name, classes)
            if len(names) > MOST and (missing := [name for name in names if name not in known]):
                where = f"{owner.name}." if isinstance(owner, ast.ClassDef) else ""
                wrong.append(f"line {node.lineno}: {where}{node.name}: {', '.join(missing)}")

    visit(tree)
    return wrong


TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
CLASSES = classes_of(TREES)
IMPORTED = imported(TREES)


@pytest.mark.parametrize("file", [file for file in TREES if not re.match(BACKENDS, file)])
def test_more_than_three_arguments_are_listed_one_a_line(file):
    wrong = unlisted(TREES[file], CLASSES, None if file.startswith(OPEN) else IMPORTED)
    assert not wrong, "\n".join(["no line 'name: meaning' under Args: for", *wrong])


def test_this_test_sees_what_is_missing():
    text = '''
def few(a, b, c): ...
def _private(a, b, c, d): ...
def good(a, b, c, d):
    """Does it.

    Args:
        a: one.
        b: two,
            at length.
        c: three.
        d: four.
    """
def bad(a, b, c, *, d=1):
    """Does it: d: not a list.

    Args:
        a, b: two of one meaning.
        c: three.
    """
class Base:
    """A base."""
    def run(self, a, b, c, d):
        """Runs.

        Args:
            a: one.
            b: two.
            c: three.
            d: four.
        """
class Child(Base):
    def __init__(self, a, b, c, d):
        """Args: a, b, c, d."""
    def run(self, a, b, c, d): ...
'''
    tree = ast.parse(text)
    found = [line.partition(": ")[2] for line in unlisted(tree, classes_of({"x": tree}))]
    assert found == ["bad: d", "Child.__init__: a, b, c, d"]
