"""A checkpoint is complete or it is passed over."""

import pytest
import torch

from train import checkpoint


def write(folder, step):
    weights = {"model": {"w": torch.full((3,), float(step)), "tied": torch.ones(2)}}
    weights["model"]["also_tied"] = weights["model"]["tied"]
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]}
    return checkpoint.save(folder, step, weights, {"progress": {"step": step, "best": None}, "optimizer": optimizer})


def test_what_was_saved_is_loaded_without_running_code(tmp_path):
    path = write(tmp_path, 3)
    weights, state = checkpoint.load(path)
    assert torch.equal(weights["model"]["w"], torch.full((3,), 3.0)) and torch.equal(
        weights["model"]["also_tied"], torch.ones(2)
    )
    assert state["progress"] == {"step": 3, "best": None} and state["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step_00000002", "step_00000010"]


def truncate(path):
    (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:-10])


def flip(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def remove(path):
    (path / "model.safetensors").unlink()


def no_list(path):
    (path / "checkpoint.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(truncate, "bytes instead of"), (flip, "not have the content"), (remove, "is missing"), (no_list, "unreadable")],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_line(tmp_path, damage, reason):
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    said = []
    assert checkpoint.latest(tmp_path, said.append).name == "step_00000001"
    assert len(said) == 1 and "step_00000002 is damaged" in said[0] and reason in said[0]


def test_no_intact_checkpoint_is_an_error_not_a_new_start(tmp_path):
    truncate(write(tmp_path, 1))
    with pytest.raises(ValueError, match="no intact checkpoint"):
        checkpoint.latest(tmp_path, lambda text: None)


def test_an_unfinished_one_does_not_count(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".step_00000002.tmp").mkdir()
    assert checkpoint.latest(tmp_path).name == "step_00000001"
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save_weights(path, {"w": torch.ones(2)}, {"step": "1"})
    before = path.read_bytes()
    with pytest.raises(OSError, match="full"):
        checkpoint.write(path, fail)
    assert path.read_bytes() == before


def fail(path):
    path.write_bytes(b"half")
    raise OSError("disk full")
