"""Which sample is drawn when, as a function of the seed and the step alone.

Training draws from one endless sequence of positions: step s of a run with total batch G takes the positions s*G .. (s+1)*G.
Each process takes its slice of that range, so a run does not depend on the number of processes, on accumulation, on loader
workers or on having been interrupted. Augmentation is seeded with the position.
"""

import time
from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Samples(Protocol):
    """What is read by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class Order:
    """The endless sequence of draws from `size` samples: position -> sample.

    Every pass is a fresh permutation. With repeats > 1 a pass has as many draws as there are samples but shows only the first
    part of a permutation, each sample `repeats` times in a row (repeated augmentation, Hoffer et al. 2020, as in DeiT).
    """

    def __init__(self, size: int, seed: int, repeats: int = 1):
        self.size, self.seed, self.repeats = size, seed, repeats
        self._pass, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        number, place = divmod(position, self.size)
        if number != self._pass:
            self._pass, self._order = number, np.random.default_rng([self.seed, number]).permutation(self.size)
        return int(self._order[place // self.repeats])


def share(global_batch: int, world: int, rank: int, micro_batch: int | None = None, group: int = 1) -> list[range]:
    """Offsets inside the total batch of one process's micro-batches: the same number of them, none empty, on every process.

    Sizes differ by at most one group where they do not divide. Raises ValueError if there are too few images to share.

    Args:
        global_batch: images of a step.
        world: processes.
        rank: of this process.
        micro_batch: most images at once; null = the whole share.
        group: neighbours that stay together; the last group of the total batch may be smaller.
    """
    groups = -(-global_batch // group)
    if groups < world:
        less = f"the {world} processes" if group == 1 else f"one group of {group} (mixup, cutmix) for each of {world} processes"
        raise ValueError(f"optim.global_batch {global_batch} is less than {less}: raise it or use fewer processes")
    if micro_batch is not None and micro_batch < group:
        raise ValueError(
            f"optim.micro_batch {micro_batch} is less than the {group} images that mixup or cutmix keeps together (twice "
            "data.repeats): raise it"
        )
    largest = -(-groups // world)
    chunks = min(-(-largest // (micro_batch // group if micro_batch else largest)), groups // world)
    start, stop = rank * groups // world, (rank + 1) * groups // world
    edges = [min(group * (start + i * (stop - start) // chunks), global_batch) for i in range(chunks + 1)]
    return [range(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def partners(count: int, repeats: int = 1) -> Tensor:
    """The place of the image that each of `count` neighbours is mixed with; an odd last one is its own.

    In each group of 2 x repeats the first half is paired with the second in order, so that no image meets itself where each is
    drawn `repeats` times in a row (in the last, smaller group of a step it may).
    """
    partner = torch.arange(count)
    for start in range(0, count, 2 * repeats):
        half = min(2 * repeats, count - start) // 2
        first = torch.arange(start, start + half)
        partner[first], partner[first + half] = first + half, first
    return partner


class Steps:
    """Batch sampler: (sample, position) pairs of this process's micro-batches for the steps start .. stop.

    Args:
        order: position -> sample.
        start: first step.
        stop: the step after the last.
        global_batch: images of a step.
        offsets: of this process's micro-batches inside the total batch.
    """

    def __init__(self, order: Order, start: int, stop: int, global_batch: int, offsets: list[range]):
        self.order, self.start, self.stop, self.global_batch, self.offsets = order, start, stop, global_batch, offsets

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            for offsets in self.offsets:
                positions = [step * self.global_batch + i for i in offsets]
                yield [(self.order[position], position) for position in positions]


def training_batches(dataset: Dataset, steps: Steps, workers: int, pin: bool) -> Iterator[dict[str, Any]]:
    """Micro-batches in order.

    Args:
        dataset: indexed by (sample, position): train.transforms.Seeded.
        steps: which samples, in order.
        workers: loader processes.
        pin: into page-locked memory, for a GPU.
    """
    return iter(DataLoader(dataset, batch_sampler=steps, **_options(workers, pin)))


def take(
    batches: Iterator[dict[str, Any]], count: int, device: torch.device, channels_last: bool = False
) -> tuple[list[dict[str, Any]], float]:
    """The next `count` batches on the device, and the seconds spent waiting for them.

    Args:
        batches: an endless iterator.
        count: how many.
        device: where they go.
        channels_last: memory format of the images.
    """
    clock = time.perf_counter()
    micro = [next(batches) for _ in range(count)]
    waited = time.perf_counter() - clock
    return [on_device(batch, device, channels_last) for batch in micro], waited


def on_device(batch: dict[str, Any], device: torch.device, channels_last: bool = False) -> dict[str, Any]:
    """The batch with its tensors on the device, images in the memory format asked for."""
    batch = send_to_device(batch, device, non_blocking=True)
    if channels_last:
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
    return batch


def evaluation_batches(
    dataset: Samples, batch: int, world: int, rank: int, workers: int, pin: bool
) -> Iterator[tuple[bool, dict[str, Any]]]:
    """(counts, batch) pairs covering the dataset once over all processes.

    Whole batches are dealt out in turn, so each holds the same images whatever the number of processes. Every process gets the
    same number of batches; one that only fills up the last round repeats a batch and has counts = False, as has one whose files
    are all damaged. Samples that stand for a damaged file are left out of the others.

    Args:
        dataset: the split.
        batch: images at once.
        world: processes.
        rank: of this process.
        workers: loader processes.
        pin: into page-locked memory, for a GPU.
    """
    batches = [list(range(i, min(i + batch, len(dataset)))) for i in range(0, len(dataset), batch)]
    rounds = -(-len(batches) // world)
    mine = [k * world + rank for k in range(rounds)]
    sampler = [batches[k] if k < len(batches) else batches[0] for k in mine]
    loader = DataLoader(cast(Dataset, dataset), batch_sampler=sampler, **_options(workers, pin) | {"collate_fn": _collate_own})
    for k, (own, items) in zip(mine, loader, strict=True):
        yield own and k < len(batches), items


def _collate_own(samples: list[dict[str, Any]]) -> tuple[bool, dict[str, Any]]:
    """(whether there is any, the batch) of the samples that stand for themselves."""
    own = [sample for sample in samples if "unreadable" not in sample]
    batch = collate(own or samples)
    return bool(own), {**batch, **complaints(samples)}


def complaints(samples: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What the samples say about damaged files; empty if they say nothing."""
    found = [sample["unreadable"] for sample in samples if "unreadable" in sample]
    return {"unreadable": found} if found else {}


def _options(workers: int, pin: bool) -> dict[str, Any]:
    return {
        "collate_fn": collate,
        "num_workers": workers,
        "pin_memory": pin,
        "prefetch_factor": 4 if workers else None,
        "worker_init_fn": _one_thread,
        "generator": torch.Generator(),  # private: the loader must not draw from the model's random numbers
    }


def _one_thread(worker: int) -> None:
    """A worker decodes and resizes single images: more threads than workers only fight each other."""
    torch.set_num_threads(1)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> batch: tensors of one shape are stacked, numbers become a tensor, anything else stays a list.

    Raises ValueError for images of different sizes, which no network takes at once.
    """
    sizes = sorted({tuple(sample["image"].shape[-2:]) for sample in samples if "image" in sample})
    if len(sizes) > 1:
        raise ValueError(
            f"images of {sizes[0][0]}x{sizes[0][1]} and {sizes[-1][0]}x{sizes[-1][1]} do not make a batch: set "
            "data.eval_batch=1, or data.eval_resize=null to resize all to data.size"
        )
    batch: dict[str, Any] = {}
    for key in (key for key in samples[0] if key != "unreadable"):
        values = [sample[key] for sample in samples]
        if isinstance(values[0], Tensor):
            values = [value.as_subclass(Tensor) for value in values]
            batch[key] = torch.stack(values) if len({value.shape for value in values}) == 1 else values
        elif isinstance(values[0], (int, float)):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return {**batch, **complaints(samples)}
