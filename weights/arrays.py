"""Read a pickle of NumPy arrays, as detectron2 saves its weights (.pkl), without running anything in it.

Python's unpickler is used with stand-ins for the few names that such a file needs; any other name is refused. Arrays are made
from their bytes here, after their size is checked, so that nothing but numbers comes out.
"""

import math
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # of torch's older files
TYPES = {  # NumPy's letters
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "b1": torch.bool,
}


class Named(ValueError):
    """A file that names something else than arrays. name: "module.name"."""

    def __init__(self, name: str):
        super().__init__(f"it names {name}")
        self.name = name


class Dtype:
    """Stands in for numpy.dtype: keeps the letters, "f4"."""

    def __init__(self, letters: Any = "", *_: Any):
        self.letters = letters.decode("latin1") if isinstance(letters, bytes) else str(letters)
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode("latin1") if isinstance(order, bytes) else str(order)

    def plain(self) -> torch.dtype:
        """The type of the numbers. ValueError for one that is no number."""
        if self.letters not in TYPES or self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"it holds an array of type {self.order}{self.letters}, which is no weight")
        return TYPES[self.letters]


class Array:
    """Stands in for numpy.ndarray: what its state says."""

    def __init__(self, *_: Any):
        self.shape: tuple[int, ...] = ()
        self.dtype, self.fortran, self.content = Dtype(), False, b""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state

    def tensor(self) -> Tensor:
        """The numbers. ValueError where shape, type and bytes do not belong together."""
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        if not isinstance(self.dtype, Dtype) or not isinstance(content, (bytes, bytearray)):
            raise ValueError("it holds an array that is not of numbers")
        dtype, shape = self.dtype.plain(), self.shape
        if not isinstance(shape, tuple) or not all(isinstance(side, int) and side >= 0 for side in shape):
            raise ValueError(f"it holds an array of shape {shape!r}")
        if math.prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f"it holds an array of shape {list(shape)} with {len(content)} bytes")
        if not content:
            return torch.empty(shape, dtype=dtype)
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if self.dtype.order == ">" and dtype.itemsize > 1:
            values = values.view(-1, dtype.itemsize).flip(1).flatten()
        if dtype == torch.bool:
            values = values.clamp_max(1)  # any other byte is no truth value
        numbers = values.view(dtype)
        if self.fortran:
            return numbers.view(shape[::-1]).permute(*range(len(shape) - 1, -1, -1)).contiguous()
        return numbers.view(shape)


def reconstruct(kind: Any, *_: Any) -> Array:
    """Stands in for numpy's function of this name: an array that its state will fill."""
    if kind is not Array:
        raise ValueError("it holds an array of another class than numpy.ndarray")
    return Array()


def from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    """Stands in for numpy's function of this name, by which protocol 5 writes an array."""
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


def encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Stands in for _codecs.encode, by which old pickles write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("it holds text in an encoding that no array has")
    return text.encode("latin1")


def empty() -> bytes:
    """Stands in for bytes, by which old pickles write none of them."""
    return b""


NAMES: dict[str, Any] = {
    "numpy.ndarray": Array,
    "numpy.dtype": Dtype,
    "numpy.core.multiarray._reconstruct": reconstruct,
    "numpy._core.multiarray._reconstruct": reconstruct,
    "numpy.core.numeric._frombuffer": from_buffer,
    "numpy._core.numeric._frombuffer": from_buffer,
    "__builtin__.bytes": empty,
    "_codecs.encode": encode,
    "collections.OrderedDict": OrderedDict,
}


class Unpickler(pickle._Unpickler):  # the one in Python: the other reserves memory for whatever index a file names
    """Knows `NAMES` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in. Raises Named for another name."""
        full = f"{module}.{name}"
        if full not in NAMES:
            raise Named(full)
        return NAMES[full]

    def persistent_load(self, pid: Any) -> Any:
        """Refused: only torch's own files refer to something outside the pickle."""
        raise ValueError("it refers to tensors outside the pickle")


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins so is a pickle by itself, and not one of torch's, which begin with a magic number."""
    return re.match(rb"\x80[\x02-\x05]", start) is not None and MAGIC not in start


def read_arrays(path: Path) -> Any:
    """What the pickle holds, arrays as tensors. Raises Named for a file that names code, ValueError for a damaged one."""
    try:
        with open(path, "rb") as file:
            return tensors(Unpickler(file, encoding="latin1").load())
    except ValueError:
        raise
    except Exception as error:  # damaged bytes end in any error: KeyError, IndexError, struct.error, MemoryError
        raise ValueError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def tensors(value: Any, depth: int = 0) -> Any:
    """Nested dicts and lists with tensors in the place of arrays; types of arrays become their letters."""
    if depth > 50:
        raise ValueError("it holds lists within lists, too deep for weights")
    if isinstance(value, Array):
        return value.tensor()
    if isinstance(value, Dtype):
        return value.letters
    if isinstance(value, dict):
        return {key: tensors(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(tensors(item, depth + 1) for item in value)
    return value
