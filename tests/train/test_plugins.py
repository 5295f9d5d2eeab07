"""Another package adds a backbone, a head, a task and a data set: a throw-away one, installed into a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
import timm
from timm.models import register_model
import backbones
from heads.linear import Linear
from train.data.scenes import Scenes
from train.tasks.segmentation import Segmentation

@register_model
def throwaway_net(pretrained=False, **kwargs):
    return timm.create_model("nat_mini", embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], kernel_size=3, **kwargs)

class Head(Linear):
    pass

class Task(Segmentation):
    pass

class Data(Scenes):
    pass
"""
POINTS = """
[backbone_zoo.backbones]
throwaway_net = throwaway

[backbone_zoo.heads]
throwaway_head = throwaway:Head
broken_head = throwaway.missing:Head
no_head = throwaway:Task

[backbone_zoo.tasks]
throwaway_task = throwaway:Task

[backbone_zoo.datasets]
throwaway_data = throwaway:Data
"""
CONFIG = """
task: {name: throwaway_task, num_classes: 6}
model: {backbone: throwaway_net, head: throwaway_head}
data: {name: throwaway_data, size: [32, 48], eval_batch: 3, args: {count: 4, val_count: 2, size: [32, 48]}}
optim: {steps: 1, global_batch: 2}
run: {device: cpu, threads: 1, dir: run}
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Runs a command where the package is installed: (exit code, output, errors)."""
    site, work = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    (site / "throwaway.py").write_text(MODULE)
    about = site / "throwaway-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: throwaway\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    (work / "own.yaml").write_text(CONFIG)

    def run(*arguments):
        code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(site)!r}]; from train.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=work, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_run_uses_what_another_package_adds(zoo):
    code, out, err = zoo("train", "own.yaml")
    assert code == 0, err
    assert "throwaway_net" in out


def test_what_is_added_is_listed_and_suggested(zoo):
    assert "throwaway_net" in zoo("list", "throwaway*")[1]
    code, _, err = zoo("config", "own.yaml", "--model.head=throwaway_hea")
    assert code == 2 and "did you mean 'throwaway_head'" in err


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            "broken_head",
            "the package throwaway adds 'broken_head' (backbone_zoo.heads) and fails to load throwaway.missing",
        ),
        ("no_head", "does not derive from Head"),
    ],
)
def test_a_broken_package_is_named_when_its_name_is_used(zoo, head, message):
    code, _, err = zoo("config", "own.yaml", f"--model.head={head}")
    assert code == 2 and message in err and "Traceback" not in err
