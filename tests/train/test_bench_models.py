"""`zoo bench A B`: subjects are read as written, rows are complete, and both programs of `zoo bench train` get one recipe."""

import json
import sys

import pytest
import torch
from torch import nn

from train import cli, config
from train.bench import clock, edits, linear, models, training
from train.bench.models import Settings, parse


def test_a_subject_holds_its_ways():
    found = parse("nat_mini@compile+tiled+channels_last", Settings())
    assert (found.source, found.engine, found.backend, found.channels_last) == ("nat_mini", "compile", "tiled", True)
    assert found.trains and not parse("nat_mini@fuse", Settings()).trains
    assert parse("swin_t", Settings(engine="openvino")).engine == "openvino"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nat_tinny", "nothing to measure is called 'nat_tinny'.*nat_tiny"),
        ("swin_t@compille", "unknown way 'compille'.*compile"),
        ("swin_t@compile+eager", "names compile and eager: give one"),
        ("swin_t@int8+fuse", "int8 is for eager models"),
        ("nothing.onnx", "nothing.onnx is not a file"),
    ],
)
def test_a_subject_that_cannot_be_measured_is_a_sentence(text, sentence):
    with pytest.raises((ValueError, OSError), match=sentence):
        parse(text, Settings())


def test_the_ratio_is_that_of_neighbours():
    assert clock.ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == (2.0, 2.0, 2.5)  # not median over median, 6 / 2
    assert clock.ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_what_was_added_not_what_was_there():
    before = torch.ones(32 << 20)  # 128 MB that come and go before
    del before
    peak = clock.AddedPeak("cpu")
    peak.start()
    torch.ones(16 << 20)  # 64 MiB
    assert 60 < peak.megabytes() < 90


def test_multiply_adds_are_counted_from_shapes():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(), nn.Linear(8 * 64, 10))
    assert models.multiply_adds(model, 3, (32, 32)) == pytest.approx((64 * 8 * 48 + 512 * 10) / 1e9)
    assert not any(p.is_meta for p in model.parameters())


def test_the_command_prints_rows_with_ratio_speed_and_share_of_the_limit(capsys):
    command = ["bench", "test_vit", "test_resnet", "--batches", "1", "--rounds", "2", "--size", "160", "160", "--no-memory"]
    assert cli.main([*command, "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"date", "processor", "instructions", "clock", "threads", "versions"} <= set(found["machine"])
    assert [(row["subject"], row["pass"]) for row in found["rows"]] == [
        (name, kind) for kind in ("inference", "training") for name in ("test_vit", "test_resnet")
    ]
    first, second = found["rows"][:2]
    assert first["ratio"] is None and second["ratio"] > 0 and len(second["ratio_quartiles"]) == 2
    for row in found["rows"]:
        times = 3 if row["pass"] == "training" else 1
        assert row["images_per_s"] == pytest.approx(1e3 / row["ms"])
        assert row["gflops"] == pytest.approx(2 * times * row["gmacs"] / row["ms"] * 1e3)
        assert row["of_matmul"] == pytest.approx(row["gflops"] / found["ceilings"]["matmul_gflops"])


@pytest.mark.parametrize(("way", "least", "most"), [("int8", 1e-5, 0.2), ("fuse", 0.0, 1e-5), ("channels_last", 0.0, 1e-4)])
def test_a_way_says_how_far_its_numbers_are_from_the_plain_models(way, least, most, tmp_path):
    settings = Settings(size=(160, 160))
    runner = models.Runner(parse(f"test_vit@{way}", settings), settings, str(tmp_path))
    error = runner.error()
    assert error is not None and least <= error <= most
    assert models.Runner(parse("test_vit", settings), settings, str(tmp_path)).error() is None


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_runs_a_file(engine, tmp_path):
    pytest.importorskip(engine)
    onnx = pytest.importorskip("onnx")
    shape = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3, 4, 4])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 3, 4, 4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [shape], [out])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), tmp_path / "f.onnx"
    )
    subject = parse(f"{tmp_path / 'f.onnx'}@{engine}", Settings())
    runner = models.Runner(subject, Settings(size=(4, 4)), str(tmp_path))
    images = runner.images(2, torch.float32)
    torch.testing.assert_close(torch.as_tensor(runner.fast(images)[0]), -images)
    assert not subject.trains and runner.gmacs is None


@pytest.mark.slow  # exports
def test_an_engine_runs_the_exported_model(tmp_path):
    pytest.importorskip("onnxruntime")
    subject = parse("test_vit", Settings(engine="onnxruntime"))
    assert not subject.trains
    runner = models.Runner(subject, Settings(size=(160, 160)), str(tmp_path))
    with torch.no_grad():
        images = runner.images(2, torch.float32)
        torch.testing.assert_close(torch.from_numpy(runner.fast(images)[0]), runner.model.eval()(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ops", "heads"], "'ops' is measured alone"),
        (["swin_t", "--script", "train.py"], "--script goes with"),
        (["swin_t", "--compile", "--engine", "openvino"], "--compile contradicts"),
        (["swin_t", "swin_t"], "named twice"),
        (["train"], "clone https://github.com/huggingface/pytorch-image-models"),
    ],
)
def test_contradictions_end_with_a_sentence(words, sentence, capsys):
    assert cli.main(["bench", *words, "--device", "cpu"]) == 2
    assert sentence in capsys.readouterr().err


def test_the_number_of_rounds_is_positive(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "swin_t", "--rounds", "0"])
    assert "'0' is not a whole number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("run", training.RUNS, ids=lambda run: run.config)
def test_both_programs_train_as_many_steps(run, tmp_path):
    training.write_images(tmp_path)
    assert len(list(tmp_path.glob("train/*/*.png"))) == training.TRAIN_IMAGES
    for steps in (training.SHORT, training.LONG):
        words = training.our_command(run, tmp_path, steps, str(tmp_path / "out"))
        found = config.load(words[4], words[5:])
        assert found.optim.epochs * training.TRAIN_IMAGES / found.optim.global_batch == steps
        theirs = training.timm_command(run, "train.py", tmp_path, steps, "out")
        assert int(theirs[theirs.index("--epochs") + 1]) == found.optim.epochs
        assert theirs[theirs.index("--model") + 1].startswith(found.model.backbone.split("_patch")[0])
        assert float(theirs[theirs.index("--lr") + 1]) == found.optim.lr


def test_packed_layers_are_compared_by_rows():
    (row,) = linear.bench_linear(rounds=1, widths=[(384, 512)], rows=[16])
    assert (row["layer"], row["rows"], row["fuse packs"]) == ("384 -> 512", "16", "yes")
    assert float(row["packed / plain"].split()[0]) > 0


def test_a_program_that_fails_is_named_with_its_last_line():
    with pytest.raises(RuntimeError, match="failed: ValueError: no images"):
        training.cpu_seconds([sys.executable, "-c", "raise ValueError('no images')"])
    assert training.cpu_seconds([sys.executable, "-c", "sum(range(2_000_000))"]) > 0.01


def test_edits_are_measured_beside_the_plain_model(monkeypatch):
    create = edits.timm.create_model
    monkeypatch.setattr(
        edits.timm, "create_model", lambda name, **args: create(name, depth=2, embed_dim=96, num_heads=6, **args)
    )
    rows = edits.bench_edits(batches=[1], rounds=1, size=(64, 64))
    assert len(rows) == 2 * len(edits.variants())
    for i in range(0, len(rows), len(rows) // 2):
        macs = [int(row["of plain"].removesuffix("%")) for row in rows[i : i + len(rows) // 2]]
        assert rows[i]["edit"] == "plain" and macs[0] == 100
        assert macs[0] > macs[1] > macs[2] and macs[0] > macs[4] > macs[5]  # merged, then pruned
        assert all(float(row["ms (min)"].split()[0]) > 0 for row in rows)
