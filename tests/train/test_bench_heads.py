"""`zoo bench heads`: rows are complete, compare heads of one size, and name a peer that is missing. No test says how fast."""

import builtins

import pytest
import torch

from heads import HEADS
from train.bench import heads as bench_heads
from train.bench.heads import CASES, Case


def test_every_head_is_measured():
    assert {case.head for case in CASES} == set(HEADS)


def test_names_choose_heads():
    assert bench_heads.cases_of([]) is None
    assert [CASES[i].head for i in bench_heads.cases_of(["kmax", "fpn"])] == ["fpn", "fpn", "kmax"]
    with pytest.raises(ValueError, match="zoo bench heads: unknown name 'kmx'.*kmax"):
        bench_heads.cases_of(["kmx"])


def test_rows_hold_times_work_memory_and_share(monkeypatch):
    monkeypatch.setattr(bench_heads, "CASES", [Case("linear", "linear", features=("swin_t", [8, 16], [4, 8]))])
    monkeypatch.setattr(bench_heads, "FeatureBackbone", lambda *_, **__: torch.nn.Identity())
    monkeypatch.setattr(bench_heads, "peak_memory", lambda *_: ("1", "2"))
    (row,) = bench_heads.bench_heads((64, 32), rounds=1)
    assert row["head"] == "linear" and (row["MB"], row["with backward"]) == ("1", "2")
    assert row["G mult-adds"] == f"{24 * 150 * 16 * 8 / 1e9:.1f}" and row["of the model"].endswith("%")
    assert all(float(row[key].split()[0]) > 0 for key in ("forward ms (min)", "with backward ms (min)"))


def peers() -> list:
    return [pytest.param(case, name, id=name) for case in CASES for name in case.peers]


@pytest.mark.parametrize("case, name", peers())
def test_a_peer_gives_an_output_of_the_same_size_with_as_many_weights(case, name):
    package = name.split()[0]
    pytest.importorskip({"smp": "segmentation_models_pytorch"}.get(package, package))
    maps = bench_heads.maps_of(case, (64, 96), "cpu")
    ours, theirs = (case.variants()[key](case.features[1]).eval() for key in ("ours", name))
    with torch.no_grad():
        assert ours(maps).shape == theirs(maps).shape
    sizes = [sum(p.numel() for p in module.parameters()) for module in (ours, theirs)]
    # smp: norms of the inputs, biases instead of norms, and in DPT a residual unit of the coarsest level with nothing to add
    assert 0.99 * sizes[0] < sizes[1] < 1.05 * sizes[0]


def test_a_peer_that_is_not_installed_is_a_row_that_says_so(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("segmentation_models_pytorch"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    case = Case("segformer", "segformer", features=("swin_t", [8, 16], [4, 8]), peers={"smp": bench_heads.smp_segformer})
    monkeypatch.setattr(bench_heads, "CASES", [case])
    monkeypatch.setattr(bench_heads, "FeatureBackbone", lambda *_, **__: torch.nn.Identity())
    rows = bench_heads.bench_heads((32, 32), rounds=1, training=False, memory=False)
    assert rows[1]["whose"].startswith("smp: No module named 'segmentation_models_pytorch")
    with pytest.raises(ValueError, match="sizes that 32 divides, got 50 x 64"):
        bench_heads.bench_heads((50, 64))
