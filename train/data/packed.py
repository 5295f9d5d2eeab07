"""Samples inside larger files: webdataset's tar shards, and Hugging Face data sets. Labels, masks and depth maps.

Both are read by index, not as a stream, so that the order of a run, its place after a resume and each process's slice are what
they are for folders.
"""

import abc
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from train.data.base import DescribedDataset, FileDataset, Transform

MOST_SHARDS = 100_000  # that braces may spell out


class Packed(DescribedDataset):
    """What both forms share: how the bytes of a sample become arrays. A subclass finds them (`parts`).

    Masks are images of one channel or with a colour table whose indices are the ids.
    """

    provides = ("label", "mask", "depth")

    @abc.abstractmethod
    def parts(self, index: int) -> tuple[str, dict[str, Any]]:
        """(what errors call the sample, {"image": bytes, "label": int or text, "mask" and "depth": (bytes, suffix)})."""

    def read(self, index: int) -> dict[str, Any]:
        place, parts = self.parts(index)
        sample: dict[str, Any] = {"path": place, "image": self.image(io.BytesIO(parts["image"]), place)}
        if "label" in self.targets:
            try:
                sample["label"] = int(parts["label"])
            except ValueError:
                raise ValueError(f"{place}: the label must be a whole number, got {parts['label']!r}") from None
        if "mask" in self.targets:
            content, suffix = parts["mask"]
            sample["mask"] = self.ids(io.BytesIO(content), f"{place} (mask){suffix}", id_map=self.id_map)
        if "depth" in self.targets:
            content, suffix = parts["depth"]
            source = Path(f"{place} (depth){suffix}")
            sample["depth"] = self.metres(source, self.depth.divisor, self.depth_invalid, io.BytesIO(content))
        return sample


class Shards(Packed, FileDataset):
    """Tar files as webdataset writes them.

    Members with one name up to the first dot of the file name are a sample, such as 0001.jpg, 0001.cls, 0001.mask.png and
    0001.depth.png. Every process reads the headers of all shards once at the start and then only the bytes it needs; compressed
    tars cannot be read so and are refused. Raises FileNotFoundError for missing shards, ValueError naming the shard for one
    that is damaged, and for a sample without one of its parts.

    Args:
        train_shards, val_shards: files below root, with wildcards and braces: "train-*.tar", "train-{0000..0063}.tar".
        images: endings that hold the image.
        label, mask, depth: ending of each target (a label is a number as text).
        described: as in DescribedDataset.
    """

    def find(
        self,
        train_shards: str = "train*.tar",
        val_shards: str = "val*.tar",
        images: Sequence[str] = ("jpg", "jpeg", "png", "webp"),
        label: str = "cls",
        mask: str = "mask.png",
        depth: str = "depth.png",
        **described: Any,
    ) -> None:
        self.describe(**described)
        self.endings = {"image": tuple(images), "label": (label,), "mask": (mask,), "depth": (depth,)}
        self.wanted = ("image", *self.targets)
        self.files = shard_files(self.root, train_shards if self.split == "train" else val_shards)
        found = [(number, *row) for number, path in enumerate(self.files) for row in self.samples(path)]
        if not found:
            raise ValueError(f"Shards: no member of {self.files[0]} ends in .{' or .'.join(images)}")
        self.shards = np.array([row[0] for row in found], np.int32)
        self.keys = np.array([row[1].encode() for row in found])  # of one width: a million strings would be a million objects
        self.spans = np.array([row[2] for row in found], np.int64)  # sample, part, (offset, bytes)

    def samples(self, path: Path) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        """(key, (offset, bytes) of each wanted part) of a shard's samples, in their order."""
        grouped: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    part = next((part for part in self.wanted if ending.lower() in self.endings[part]), None)
                    if part is not None:
                        grouped.setdefault(f"{folder}/{stem}" if folder else stem, {})[part] = (member.offset_data, member.size)
                end = tar.offset
        except tarfile.TarError as error:
            raise ValueError(f"{path}: not a readable uncompressed tar file ({error})") from error
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # Python takes a cut tar for a shorter one
                raise ValueError(f"{path}: the file ends without tar's end mark; it was not copied whole")
        for key, spans in grouped.items():
            for part in self.wanted:
                if part not in spans:
                    ending = " or .".join(self.endings[part])
                    raise ValueError(f"{path}: sample {key!r} has no {part}: looked for {key}.{ending}")
            yield key, [spans[part] for part in self.wanted]

    def __len__(self) -> int:
        return len(self.shards)

    def parts(self, index: int) -> tuple[str, dict[str, Any]]:
        path = self.files[self.shards[index]]
        parts: dict[str, Any] = {}
        with open(path, "rb") as file:  # opened for each sample: a handle shared by forked loader workers would be one place
            for part, (offset, size) in zip(self.wanted, self.spans[index].tolist(), strict=True):
                file.seek(offset)
                parts[part] = file.read(size)
        if "label" in parts:
            parts["label"] = parts["label"].decode(errors="replace").strip()
        for part in ("mask", "depth"):
            if part in parts:
                parts[part] = (parts[part], "." + self.endings[part][0].rpartition(".")[2])
        return f"{path}#{self.keys[index].decode()}", parts


def shard_files(root: Path, pattern: str) -> list[Path]:
    """Files below root for a pattern with wildcards and braces ("{000..003}", "{a,b}"), sorted.

    Raises FileNotFoundError if a pattern, or one of the names that braces spell out, finds nothing.
    """
    if Path(pattern).is_absolute():
        raise ValueError(f"Shards: {pattern} starts at the top; shards are named relative to data.root, which is {root}")
    pieces = re.split(r"\{([^{}]*)\}", pattern)  # text, braces, text, ...
    choices: list[list[str]] = []
    for i, piece in enumerate(pieces):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", piece) if i % 2 else None
        if span:
            first, last = span.groups()
            if int(last) - int(first) >= MOST_SHARDS:
                raise ValueError(f"Shards: {pattern} names more than {MOST_SHARDS} files; use a wildcard")
            choices.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
        else:
            choices.append(piece.split(",") if i % 2 else [piece])
    found: list[Path] = []
    for words in product(*choices):
        matches = sorted(root.glob("".join(words)))
        if not matches:
            raise FileNotFoundError(f"Shards: looked for {''.join(words)} in {root}, and there is none")
        found += matches
    return found


class HuggingFace(Packed):
    """A data set of the `datasets` library with columns for image and targets.

    Needs the `data` extra. Raises ImportError without it, ValueError for a column that is not there.

    Args:
        root: "owner/name" of the hub, or a folder of parquet files.
        split: "train" or "val".
        targets: which of label, mask and depth to read.
        transform: called with every sample.
        name: its configuration, if it has several.
        train_split, val_split: what it calls them.
        image, label, mask, depth: column names.
        described: as in DescribedDataset.
    """

    def __init__(
        self,
        root: str,
        split: str,
        targets: tuple[str, ...],
        transform: Transform | None = None,
        name: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        image: str = "image",
        label: str = "label",
        mask: str = "annotation",
        depth: str = "depth_map",
        **described: Any,
    ):
        super().__init__(split, targets, transform)
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"reading a Hugging Face data set needs datasets (pip install backbone-zoo[data]): {error}"
            ) from error
        part = train_split if split == "train" else val_split
        self.data = datasets.load_dataset(str(root), name, split=part)
        self.place = f"{root}/{part}"
        self.columns = {"image": image, "label": label, "mask": mask, "depth": depth}
        self.wanted = ("image", *self.targets)
        for key in self.wanted:
            column = self.columns[key]
            if column not in self.data.column_names:
                raise ValueError(f"{self.place}: no column {column!r} for {key}; it has {', '.join(self.data.column_names)}")
            if key != "label":
                self.data = self.data.cast_column(column, datasets.Image(decode=False))
        self.data = self.data.select_columns([self.columns[key] for key in self.wanted])
        if described.get("classes") is None and "label" in targets:
            described["classes"] = getattr(self.data.features[label], "names", None)
        self.describe(**described)

    def __len__(self) -> int:
        return len(self.data)

    def parts(self, index: int) -> tuple[str, dict[str, Any]]:
        row, parts = self.data[index], {}
        for key in self.wanted:
            value = row[self.columns[key]]
            if key != "label":
                value = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
            parts[key] = (value, ".png") if key in ("mask", "depth") else value
        return f"{self.place}#{index}", parts
