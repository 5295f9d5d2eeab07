"""model.edits of a configuration: checked, applied after the weights they work on, and part of a run's own file."""

import processes
import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file, save_file

from backbones.edits import EDITS as EDITS_BY_NAME
from backbones.prepbn import PRepBN
from train import config, engine, evaluation, log, results, setup
from train.results import save_product
from train.show import Names

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
EDITS = [{"name": "test_time_registers", "neurons": {1: [3, 5]}, "num_registers": 2}]


def values(**model):
    return tiny.values() | {
        "task": {"name": "classification", "num_classes": 10},
        "model": {"backbone": "vit_tiny_patch16_224", "backbone_args": VIT, "edits": EDITS} | model,
        "data": {"name": "digits", "size": [32, 32], "eval_batch": 50},
        "augment": {},
        "optim": {"lr": 1e-3, "steps": 2, "global_batch": 8},
        "run": {"log_every": 1, "eval_every": 2, "device": "cpu"},
    }


def dense(**model):
    args = {key: value for key, value in VIT.items() if key != "img_size"}
    head = {"backbone": "vit_tiny_patch16_224", "backbone_args": args, "head": "linear", "edits": EDITS}
    return tiny.values(model=head | model, data={"size": [32, 32]})


def resolved(folder, given):
    made = config.resolve(given)
    made.run.dir = str(folder)
    return made


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"neurons": {}}, r"model.edits\[0\]: name is missing"),
        ({"name": "test_time_register"}, r"model.edits\[0\].name: unknown name 'test_time_register'; did you mean"),
        ({"name": "test_time_registers", "scales": 2.0}, r"model.edits\[0\]: unknown key 'scales'.*did you mean 'scale'"),
        ({"name": "test_time_registers", "num_registers": "two"}, r"model.edits\[0\].num_registers: 'two' is not int"),
    ],
    ids=["no name", "name", "argument", "type"],
)
def test_a_wrong_edit_is_one_sentence_before_anything_is_built(edit, message):
    with pytest.raises(ValueError, match=message):
        config.resolve(values(edits=[edit]))


def test_edits_survive_being_written_as_yaml(tmp_path):
    made = config.resolve(values())
    path = tmp_path / "again.yaml"
    path.write_text(config.as_yaml(made))
    again = config.load(str(path))
    assert setup.build(again, config.build_task(again)).num_prefix_tokens == 3


def test_checkpoints_of_the_plain_model_are_loaded_before_the_edits(tmp_path):
    """The edit folds the class token's position into the class token, so the weights must be there already."""
    torch.manual_seed(1)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT)
    torch.nn.init.normal_(plain.pos_embed)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    made = config.resolve(values(checkpoint=str(tmp_path / "plain.safetensors")))
    net = setup.build(made, config.build_task(made))
    assert torch.equal(net.cls_token, plain.cls_token + plain.pos_embed[:, :1])
    assert torch.equal(net.blocks[1].mlp.fc1.weight, plain.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("kind", ["classifier", "dense"])
def test_a_runs_own_file_is_loaded_after_the_edits(tmp_path, kind):
    made = resolved(tmp_path / "run", values() if kind == "classifier" else dense())
    engine.fit(made)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    _, _, model, _ = evaluation.open_run(tmp_path / "run")
    state = model.state_dict()
    assert sorted(state) == sorted(saved) and all(torch.equal(state[key], saved[key]) for key in saved)
    vit = model if kind == "classifier" else model.backbone.model
    assert vit.num_prefix_tokens == 3 and vit.reg_token.abs().sum() > 0  # registers trained, not those the edit starts with


ARGUMENTS = {
    "drop_blocks": {"blocks": [1]},
    "expand_depth": {"depth": 3},
    "prune": {"heads": {0: [1]}},
    "repeat_blocks": {"order": [0, 1, 1]},
    "token_merging": {"r": 2},
    "topk_mlp": {"k": 9},
}


@pytest.mark.parametrize("name", EDITS_BY_NAME)
def test_every_edit_survives_a_run_folder(tmp_path, name):
    made = config.resolve(values(edits=[{"name": name, **ARGUMENTS.get(name, {})}]))
    torch.manual_seed(1)
    net = setup.build(made, config.build_task(made))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in net.parameters():  # as if trained
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = net.eval()(x)
    (tmp_path / "config.yaml").write_text(config.as_yaml(made))
    save_product(tmp_path / "model.safetensors", net, made, 1, {}, Names(), True)
    torch.manual_seed(2)
    _, _, opened, _ = evaluation.open_run(tmp_path)
    with torch.no_grad():
        assert torch.equal(opened(x), expected)


def test_a_run_with_edits_needs_its_first_checkpoint_no_more(tmp_path):
    torch.manual_seed(1)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT)
    path = tmp_path / "plain.safetensors"
    save_file(plain.state_dict(), path)
    engine.fit(resolved(tmp_path / "run", values(checkpoint=str(path))))
    path.unlink()
    assert evaluation.open_run(tmp_path / "run")[2].num_prefix_tokens == 3


def test_progressive_norms_move_once_a_step_however_the_batch_is_cut_and_over_a_resume(tmp_path, monkeypatch):
    seen = []
    forward = PRepBN.forward
    monkeypatch.setattr(PRepBN, "forward", lambda norm, x: seen.append(float(norm.share)) or forward(norm, x))

    def run(name, micro, **edit):
        given = values(edits=[{"name": "prepbn", **edit}])
        given["optim"] |= {"steps": 4, "micro_batch": micro}
        given["run"] |= {"eval_every": 4, "save_every": 2}
        return resolved(tmp_path / name, given)

    for name, micro in (("whole", 8), ("cut", 4)):
        seen.clear()
        engine.fit(run(name, micro, steps=2))
        counters = {
            key: value for key, value in load_file(tmp_path / name / "model.safetensors").items() if key.endswith("iter")
        }
        assert len(counters) == 5 and not any(counters.values())
        norms = 5 * 8 // micro
        assert seen[: 4 * norms] == [1.0] * norms + [0.5] * norms + [0.0] * 2 * norms
    engine.fit(run("to the end", 8))
    first = run("resumed", 8)
    with monkeypatch.context() as patch:
        patch.setattr(engine.Log, "step", stops_after(2))
        with pytest.raises(KeyboardInterrupt):
            engine.fit(first)
    engine.fit(run("resumed", 8), resume=True)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("to the end", "resumed"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def stops_after(steps):
    """Log.step that interrupts the run in the step after that many."""
    step = engine.Log.step

    def stopping(log, number, *args):
        if number > steps:
            raise KeyboardInterrupt
        return step(log, number, *args)

    return stopping


@pytest.mark.slow  # each starts two processes
@pytest.mark.parametrize("micro", [None, 2], ids=["whole", "accumulated"])
@pytest.mark.parametrize("name", ["prepbn", "relu_attention", "sigma_reparam", "token_merging"])
def test_two_processes_train_an_edited_model_as_one_does(tmp_path, monkeypatch, name, micro):
    if name == "prepbn" and micro:
        pytest.skip("batch norm sees how micro-batches cut the batch")
    given = values(edits=[{"name": name, **ARGUMENTS.get(name, {})}])
    changes = {key: given[key] for key in ("task", "model", "run")}
    changes["data"] = given["data"] | {"args": {}}
    changes["optim"] = {"steps": 12, "global_batch": 8, "micro_batch": micro}
    changes["run"] |= {"eval_every": 12}
    monkeypatch.setattr(results, "pictures", lambda *args: None)
    monkeypatch.setattr(results, "curves", lambda folder: None)
    engine.fit(tiny.make(tmp_path / "one", **changes))
    said = processes.fit(2, tmp_path / "two", changes)
    assert f"total batch 8 = 2 processes x {2 if micro else 1} micro-batch" in said
    one, two = (log.read(tmp_path / run / "log.csv") for run in ("one", "two"))
    assert two["step"] == one["step"] == list(range(1, 13))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    ours, theirs = (load_file(tmp_path / run / "last.safetensors") for run in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, atol=1e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")
