"""Who may import whom, read from the source: train -> heads, backbones, weights, configs; the arrows never turn."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"backbones", "heads", "train", "weights", "configs"}
MAY = {
    "train": OURS,
    "heads": {"heads"},
    "backbones": {"backbones", "weights"},
    "weights": {"weights"},
    "configs": {"configs"},
}
# Needed by every installation; anything else is imported inside the one file that needs it.
CORE = {"torch", "torchvision", "timm"}
WEIGHTS_CORE = {"torch", "yaml", "safetensors"}
FAMILIES = {path.stem for path in (ROOT / "weights" / "convert").glob("*.py")} - {"__init__"}
# A family that is another with some parts exchanged: it may import its hosts and their rename rules, never the other way round.
VARIES = {"flatten": {"swin"}, "slab": {"flatten", "swin"}}
FILES = sorted(path for package in MAY for path in (ROOT / package).rglob("*.py"))


def imports(path: Path, top_level: bool = False) -> list[str]:
    """Dotted names that a file imports, relative ones made absolute; top_level: only those run when it is imported."""
    package = path.relative_to(ROOT).with_suffix("").parts
    found = []

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if top_level and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            if isinstance(child, ast.Import):
                found.extend(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level] if child.level else ()
                module = ".".join([*base, *([child.module] if child.module else [])])
                found.extend(f"{module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def top(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    package = path.relative_to(ROOT).parts[0]
    wrong = {name for name in imports(path) if top(name) in OURS - MAY[package]}
    assert not wrong, f"{package} may import {sorted(MAY[package])}"


def foreign_families(path: Path, family: str) -> set[str]:
    """Other families that a family's file imports, from backbones or weights.convert, and does not vary."""
    parts = [name.removeprefix("weights.").split(".") for name in imports(path)]
    found = {part[1] for part in parts if part[0] in ("backbones", "convert") and len(part) > 1 and part[1] in FAMILIES}
    return found - {family} - VARIES.get(family, set())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_import_no_other_but_the_hosts_they_vary(family):
    for path in (ROOT / "backbones" / f"{family}.py", ROOT / "weights" / "convert" / f"{family}.py"):
        if path.exists():
            assert not foreign_families(path, family), f"{path}: a family that varies another stands in VARIES"


def test_no_host_varies_what_varies_it():
    for family, hosts in VARIES.items():
        assert family not in hosts and not any(family in VARIES.get(host, ()) for host in hosts)


def test_this_test_sees_a_host_that_imports_what_varies_it(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "FAMILIES", {"swin", "flatten", "nat"})
    (tmp_path / "backbones").mkdir()
    path = tmp_path / "backbones" / "x.py"
    path.write_text("from backbones import nat, swin\nfrom weights.convert import flatten\nfrom backbones.swin import Swin\n")
    assert foreign_families(path, "swin") == {"nat", "flatten"}
    assert foreign_families(path, "flatten") == {"nat"}


def test_weights_imports_timm_only_inside_functions():
    for path in (ROOT / "weights").rglob("*.py"):
        foreign = {top(name) for name in imports(path, top_level=True)} - set(sys.stdlib_module_names) - {"weights"}
        assert foreign <= WEIGHTS_CORE, f"{path.relative_to(ROOT)} imports {sorted(foreign - WEIGHTS_CORE)}"


def test_backbones_and_heads_need_torch_torchvision_and_timm_alone():
    optional = "NATTEN, triton and whatever else is optional is imported inside a function or by the file that is that option"
    for path in [*(ROOT / "backbones").rglob("*.py"), *(ROOT / "heads").rglob("*.py")]:
        if path.name == "mmseg.py" or path.stem.split("_")[0] in ("natten", "triton"):
            continue
        foreign = {top(name) for name in imports(path, top_level=True)} - set(sys.stdlib_module_names) - OURS
        assert foreign <= CORE, f"{path.relative_to(ROOT)} imports {sorted(foreign - CORE)}: {optional}"


def test_only_the_benchmark_of_peers_imports_the_mmseg_bridge():
    for path in FILES:
        found = imports(path, top_level=path.match("train/bench/heads.py"))  # there inside functions, for the peers
        assert not any(f"{name}.".startswith("heads.mmseg.") for name in found), path


def test_importing_backbones_loads_no_optional_package():
    """In a fresh process: neither the packages of the extras nor those that only training needs."""
    optional = [
        "natten",
        "mmseg",
        "mmengine",
        "mmcv",
        "accelerate",
        "jsonargparse",
        "matplotlib",
        "sklearn",
        "tensorboard",
        "rich",
    ]
    code = f"import sys, backbones; print([name for name in {optional} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(files: list[Path]) -> dict[str, set[str]]:
    """Our modules and those of ours that each imports, at its top or inside a function, by name."""
    names = {module_name(path) for path in files}
    found = {}
    for path in files:
        named = (name if name in names else name.rpartition(".")[0] for name in imports(path))  # a module, or something in one
        found[module_name(path)] = {name for name in named if name in names} - {module_name(path)}
    return found


def circle(found: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in order; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(found[name]):
            if around := walk(other, [*way, name]):
                return around
        done.add(name)
        return []

    return next((around for name in sorted(found) if (around := walk(name, []))), [])


def test_every_test_file_has_a_name_of_its_own():
    """Without packages, pytest cannot collect two files of one name."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count too: a circle that only waits for a call is one all the same."""
    around = circle(graph(FILES))
    assert not around, " -> ".join(around)


def test_a_circle_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "__init__.py").write_text("from .a import x\n")
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from heads import c\n"
    (tmp_path / "heads" / "a.py").write_text(f"{typed}from . import b\n")
    (tmp_path / "heads" / "b.py").write_text("def f():\n    from heads import c\n")
    (tmp_path / "heads" / "c.py").write_text("")
    files = sorted((tmp_path / "heads").glob("*.py"))
    assert circle(graph(files)) == []
    (tmp_path / "heads" / "c.py").write_text("def f():\n    from .a import y\n")
    assert circle(graph(files)) == ["heads.a", "heads.b", "heads.c", "heads.a"]


def test_this_test_sees_an_import_against_the_arrows(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "bad.py").write_text(
        "def f():\n    from train import engine\nfrom . import blocks\nfrom ..backbones import nat\n"
    )
    assert imports(tmp_path / "heads" / "bad.py") == ["train.engine", "heads.blocks", "backbones.nat"]
    assert imports(tmp_path / "heads" / "bad.py", top_level=True) == ["heads.blocks", "backbones.nat"]
