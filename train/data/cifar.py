"""CIFAR-10 and CIFAR-100 from the official Python pickles (Krizhevsky 2009), read without executing anything."""

import io
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.data.base import FileDataset
from train.data.finding import need


def latin1(value: str, encoding: str) -> bytes:
    """What bytes are in a pickle that Python 3 wrote with protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the pickle asks for the codec {encoding!r}; only arrays and lists are read")
    return value.encode("latin1")


# What a pickled numpy array is made of, and what stands for it: nothing in the file makes Python import anything.
# numpy 2 writes numpy._core where numpy 1 wrote numpy.core.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SAFE = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("_codecs", "encode"): latin1,
}

# What damaged or foreign bytes can make the unpickler and numpy's constructors raise.
_DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError)


class ArrayUnpickler(pickle.Unpickler):
    """Arrays, lists, dicts, text and numbers; anything else in the file is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; only arrays and lists are read")
        return _SAFE[module, name]


def read_pickle(path: Path) -> dict:
    """The dict of a CIFAR file with text keys. ValueError names the file if it is not one, or holds anything but plain data."""
    try:
        content = ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a CIFAR pickle ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a CIFAR pickle (holds a {type(content).__name__}, not a dict)")
    return {text(key): value for key, value in content.items()}


def text(value: str | bytes) -> str:
    """Names are text in the official files and bytes in pickles that Python 3 wrote."""
    return value.decode() if isinstance(value, bytes) else str(value)


class Cifar10(FileDataset):
    """CIFAR-10: data_batch_1..5 train, test_batch validates; root holds `cifar-10-batches-py` or is that folder."""

    provides = ("label",)
    any_channels = False
    folder, train_files, val_files = "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
    meta_file, label_key, names_key = "batches.meta", "labels", "label_names"

    def find(self) -> None:
        self.read_batches()

    def read_batches(self) -> None:
        """Read all images and labels of the split into memory."""
        name, split = type(self).__name__, self.split
        base = (
            self.root if (self.root / self.meta_file).exists() else need(self.root / self.folder, "the official pickles", name)
        )
        meta = read_pickle(need(base / self.meta_file, "the class names", name))
        if not isinstance(meta.get(self.names_key), list):
            raise ValueError(f"{base / self.meta_file}: no list {self.names_key!r}; it has {', '.join(meta)}")
        self.classes = [text(label) for label in meta[self.names_key]]
        images, self.labels, self.origins = [], [], []
        for file in self.train_files if split == "train" else self.val_files:
            path = need(base / file, f"the {split} images", name)
            batch = read_pickle(path)
            data, labels = batch.get("data"), batch.get(self.label_key)
            if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
                raise ValueError(f"{path}: 'data' must be uint8 N x 3072, got {getattr(data, 'shape', type(data).__name__)}")
            if not isinstance(labels, list) or len(labels) != len(data):
                raise ValueError(f"{path}: {self.label_key!r} must be a list of {len(data)} labels")
            images.append(data.reshape(-1, 3, 32, 32))
            self.labels += [int(label) for label in labels]
            self.origins += [f"{path}#{i}" for i in range(len(data))]
        self.images = np.concatenate(images)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index].copy(), "label": self.labels[index], "path": self.origins[index]}


class Cifar100(Cifar10):
    """CIFAR-100; root holds `cifar-100-python` or is that folder.

    Args:
        labels: "fine", the 100 classes, or "coarse", the 20.
    """

    folder, train_files, val_files, meta_file = "cifar-100-python", ["train"], ["test"], "meta"

    def find(self, labels: Literal["fine", "coarse"] = "fine") -> None:
        if labels not in ("fine", "coarse"):
            raise ValueError(f"labels must be 'fine' or 'coarse', got {labels!r}")
        self.label_key, self.names_key = f"{labels}_labels", f"{labels}_label_names"
        self.read_batches()
