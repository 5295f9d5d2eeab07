"""Who may import whom, read from the source: train -> heads, backbones, weights, configs; the arrows never turn."""

import ast
import subprocess
import sys
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


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_do_not_import_each_other(family):
    for path in (ROOT / "backbones" / f"{family}.py", ROOT / "weights" / "convert" / f"{family}.py"):
        if path.exists():
            others = {f"{package}.{other}" for package in ("backbones", "weights.convert") for other in FAMILIES - {family}}
            prefix = "backbones." if path.parent.name == "backbones" else "weights.convert."
            wrong = [name for name in imports(path) for other in others if name == other or name.startswith(f"{other}.")]
            assert not [name for name in wrong if name.startswith(prefix) or path.parent.name == "backbones"]


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
        found = imports(path, top_level=path.name == "bench_heads.py")  # there inside functions, for the peers
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


def test_this_test_sees_an_import_against_the_arrows(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "bad.py").write_text(
        "def f():\n    from train import engine\nfrom . import blocks\nfrom ..backbones import nat\n"
    )
    assert imports(tmp_path / "heads" / "bad.py") == ["train.engine", "heads.blocks", "backbones.nat"]
    assert imports(tmp_path / "heads" / "bad.py", top_level=True) == ["heads.blocks", "backbones.nat"]
