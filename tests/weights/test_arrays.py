"""Pickles of NumPy arrays, detectron2's .pkl: numbers come out, and nothing in them runs."""

import contextlib
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from weights import arrays, read


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def save(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_type_and_order_come_back(protocol, tmp_path):
    rng = np.random.default_rng(0)
    found = OrderedDict(
        half=rng.random((2, 3)).astype("f2"),
        big=rng.random((2, 3)).astype(">f4"),
        columns=np.asfortranarray(rng.random((2, 3, 4))),
        whole=np.arange(4),
        few=np.zeros((0, 3), np.float32),
        one=np.array(7, np.uint8),
        yes=np.array([True, False]),
    )
    content = read.open_checkpoint(save(tmp_path / "model_final.pkl", {"model": found, "__author__": "someone"}, protocol))
    assert content["__author__"] == "someone" and list(content["model"]) == list(found)
    for name, value in found.items():
        expected = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        assert torch.equal(content["model"][name], expected) and content["model"][name].dtype == expected.dtype


@pytest.mark.parametrize("call", [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (os.makedirs, "{}")])
def test_code_is_refused_and_never_run(call, tmp_path):
    mark = tmp_path / "ran"
    path = save(tmp_path / "evil.pkl", {"model": {"w": np.zeros(2)}, "x": Evil(call[0], call[1].format(mark))})
    with pytest.raises(ValueError, match="is refused: reading it would execute code from the file"):
        read.open_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ({"w": np.array([object()])}, "refused|no weight"),
        ({"w": np.array(["text"])}, "no weight"),
        ({"w": np.zeros(3, np.complex64)}, "no weight"),
        ({"w": np.zeros(2, [("a", "f4")])}, "no weight"),
    ],
)
def test_arrays_that_are_no_numbers_are_refused(content, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        read.open_checkpoint(save(tmp_path / "x.pkl", content))


def test_a_state_that_does_not_fit_is_refused():
    for shape, content in (((3,), b"12345678"), ((-2,), b"12345678"), ("ab", b""), ((10**12,), b"1234")):
        array, dtype = arrays.Array(), arrays.Dtype("f4")
        array.__setstate__((1, shape, dtype, False, content))
        with pytest.raises(ValueError, match="it holds an array of shape"):
            array.tensor()
    with pytest.raises(ValueError, match="another class"):
        arrays.reconstruct(dict)
    with pytest.raises(ValueError, match="encoding"):
        arrays.encode("x", "rot13")


@pytest.mark.parametrize("cut", [3, 20, 60, 100])
def test_a_damaged_file_is_a_sentence(cut, tmp_path):
    path = save(tmp_path / "x.pkl", {"model": {"w": np.arange(9.0)}})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match="x.pkl is not a readable weights file"):
        read.open_checkpoint(path)


def test_random_bytes_never_run_or_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    good = pickle.dumps({"model": {"w": np.arange(9.0), "b": np.zeros((2, 2), np.float32)}}, 4)
    for _ in range(300):
        damaged = bytearray(good)
        for place in rng.integers(2, len(good), 3):
            damaged[place] = rng.integers(256)
        (tmp_path / "x.pkl").write_bytes(bytes(damaged))
        with contextlib.suppress(ValueError):
            read.open_checkpoint(tmp_path / "x.pkl")


def test_torchs_own_older_files_are_still_torchs(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not arrays.is_pickle((tmp_path / "old.pth").read_bytes()[:64])
    assert torch.equal(read.open_checkpoint(tmp_path / "old.pth")["w"], torch.ones(2))
