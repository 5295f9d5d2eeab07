"""The benchmark and the doctor: what they report is complete and true; how fast anything is, no test says."""

import subprocess
import sys

import pytest
import torch

from backbones.ops import neighborhood
from backbones.ops.neighborhood import neighborhood_attention
from train import doctor
from train.bench import clock, ops
from train.cli import main


def test_variants_are_interleaved_and_the_first_round_does_not_count(monkeypatch):
    ticks = iter(range(1, 100))
    order = []
    monkeypatch.setattr(clock, "once", lambda variant, *_: (variant(), float(next(ticks)))[1])
    times = clock.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, device="cpu")
    assert "".join(order) == "abababab"
    assert times == {"a": (5.0, 3.0), "b": (6.0, 4.0)}  # a took 1, 3, 5, 7


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with clock.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_ops_rows_hold_time_share_and_error():
    rows = ops.bench_ops([(1, (8, 9), 1, 1)], rounds=1, backends=["tiled", "reference"])
    assert [row["backend"] for row in rows] == ["tiled", "reference"]
    for row in rows:
        assert float(row["error"]) < 1e-5 and row["of matmul speed"].endswith("%")
        assert float(row["with backward ms (min)"].split()[0]) > 0


def test_the_flex_peer_computes_the_same_attention():
    qkv, bias = torch.randn(1, 9, 11, 3, 2, 16), torch.randn(2, 5, 5)
    with torch.no_grad():
        peer = ops.flex_attention(*qkv.unbind(3), bias, kernel=3, dilation=2, compiled=False)()
        torch.testing.assert_close(peer, neighborhood_attention(*qkv.unbind(3), 3, 2, bias), rtol=0.0, atol=1e-5)


def test_peak_memory_is_that_of_the_call():
    # in a process of its own, whose peak nothing else has set; the definition holds every key and every value 49 times
    command = "from train.bench.ops import peak_memory; print(peak_memory('reference', 96, 'cpu', False))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=300)
    assert 98 < float(done.stdout) < 400


def test_memory_rows_name_the_backend_and_what_went_wrong(monkeypatch):
    results = iter([(0, "1.04", ""), (0, "5.02", ""), (1, "", "Traceback\nMemoryError: no more")])
    monkeypatch.setattr(clock.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], *next(results)))
    assert ops.bench_memory(96, backends=["tiled"]) == [{"backend": "tiled", "forward": "1.0", "with backward": "5.0"}]
    with pytest.raises(RuntimeError, match="memory of 'cpp' failed: MemoryError: no more"):
        ops.bench_memory(96, backends=["cpp"])


def test_what_cannot_be_measured_is_named(capsys):
    assert main(["bench", "nat_tinny"]) == 2
    assert "'nat_tinny'" in (said := capsys.readouterr().err) and "nat_tiny" in said.replace("nat_tinny", "")
    with pytest.raises(ValueError, match="unknown model 'nat_tinny'.*nat_tiny"):
        doctor.run("nat_tinny")


def test_the_doctor_counts_the_calls_of_a_model_and_puts_everything_back(monkeypatch):
    choose = neighborhood.choose
    found = doctor.calls_of("dinat_mini", (64, 64), "cpu")
    assert neighborhood.choose is choose
    assert sum(found.values()) == 18  # 3 + 4 + 6 + 5 blocks
    assert ((1, 56, 56, 2, 32), (7, 7), (8, 8), True) in found  # padded to kernel x dilation
    assert doctor.calls_of("poolformer_s12_gn", (64, 64), "cpu") == {}


def test_the_doctor_has_a_row_for_every_backend(capsys):
    rows = doctor.examine((1, 8, 9, 2, 16), (3, 3), (2, 1), True, "cpu", rounds=1)
    assert [row["backend"].split()[0] for row in rows] == list(neighborhood.BACKENDS)
    assert sum("automatic" in row["backend"] for row in rows) == 1
    for row in rows:
        if row["runs"] == "yes":
            assert float(row["largest error"]) < 1e-5 and row["ms (min)"] != "-"
        else:
            assert len(row["runs"].split()) > 3 and row["ms (min)"] == "-"
    assert {"torch", "C++ attention kernel"} <= doctor.system().keys()
