"""bfloat16 on a CPU that has no instructions for it is named, wherever it can be chosen."""

import pytest

from train import doctor, halves, setup
from train.bench import clock


@pytest.mark.parametrize(
    ("flags", "slow"), [({"avx2", "fma"}, True), ({"avx2", "avx512_bf16"}, False), ({"amx_bf16"}, False), (set(), False)]
)
def test_slow_products_are_said(flags, slow, monkeypatch):
    monkeypatch.setattr(halves, "cpu_flags", lambda: frozenset(flags))
    assert (halves.slow_bfloat16() is not None) == slow
    assert ("avx512_bf16" in clock.instructions()) == ("avx512_bf16" in flags)
    assert ("use float32 here" in doctor.system()["bfloat16 on the CPU"]) == slow


def test_a_run_says_it_at_its_start(tmp_path, monkeypatch, capsys):
    import tiny

    monkeypatch.setattr(setup, "slow_bfloat16", lambda: "slow here")
    for precision, said in (("bf16", "run.precision bf16: slow here\n"), ("no", "")):
        setup.start(tiny.make(tmp_path, run={"precision": precision}))
        assert capsys.readouterr().out == said
