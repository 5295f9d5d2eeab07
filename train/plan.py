"""`zoo plan CONFIG --gpus N`: memory, communication, the batch that keeps GPUs computing, and the bandwidth of storage.

Nothing is measured: bytes and multiply-adds are counted from the configuration's model with tensors that hold no numbers, the
speeds of a GPU are its maker's, and the share of them that a training reaches is an argument. docs/scale.md has the formulas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from train import config as configuration
from train import sharding
from train.bench.models import multiply_adds
from train.checks import nearest
from train.schema import Config, OptimConfig

FULL = 4  # bytes of a float32, in which weights, gradients and optimiser state are kept whatever the precision


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's data sheet: FLOP/s without sparsity, bytes, and bytes/s to the other GPUs of its node, one way."""

    half: float
    full: float
    memory: float
    link: float


GPUS = {  # SXM forms with NVLink; `full` is float32 without TF32, as torch computes by default
    "a100": Gpu(312e12, 19.5e12, 80e9, 300e9),
    "h100": Gpu(989e12, 67e12, 80e9, 450e9),
    "h200": Gpu(989e12, 67e12, 141e9, 450e9),
}


@dataclass(frozen=True)
class Counts:
    """What one model needs, in bytes of float32 unless it says otherwise.

    Args:
        weights: of all parameters.
        trained: of those with a gradient.
        buffers: running statistics and the like.
        largest_block: of the largest group of parameters that FSDP gathers at once.
        outer: of the parameters in no block, which FSDP gathers for the whole pass.
        activations: what the forward keeps for the backward, for one image, in the run's precision.
        loss: reckoned for one image: two maps of scores at the image's size where the task is dense.
        macs: multiply-adds of one image's forward.
        state: of the optimiser, per byte of trained weights.
        average: of the weights' running average.
        half: the run computes in a 16-bit type.
        checkpointing: activations are computed again in the backward.
    """

    weights: int
    trained: int
    buffers: int
    largest_block: int
    outer: int
    activations: int
    loss: int
    macs: int
    state: int
    average: int
    half: bool
    checkpointing: bool


def plan(
    loaded: Config, gpus: int, gpu: str = "h100", utilisation: float = 0.4, image_kb: float = 110.0, images: int | None = None
) -> dict[str, Any]:
    """What the configuration needs on `gpus` of these GPUs: names that say the unit -> numbers.

    Args:
        loaded: the configuration. Its model is built with random weights.
        gpus: processes, one GPU each, of one node.
        gpu: a key of GPUS.
        utilisation: share of the GPU's peak that training reaches; an assumption (0.3 to 0.5 is usual for vision models).
        image_kb: mean size of an image file, kilobytes; ImageNet's is about 110.
        images: of an epoch; without it no time per epoch is given.

    Raises ValueError for values that make no sense.
    """
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    if gpu not in GPUS:
        raise ValueError(f"unknown GPU {gpu!r}; {nearest(gpu, GPUS)}")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation is a share between 0 and 1, got {utilisation}")
    if image_kb <= 0 or (images is not None and images < 1):
        raise ValueError(f"--image-kb and --images must be positive, got {image_kb} and {images}")
    counts, device = count(loaded), GPUS[gpu]
    speed = (device.half if counts.half else device.full) * utilisation
    per_image = step_flops(counts) / speed  # seconds of one GPU
    global_batch = loaded.optim.global_batch
    share = -(-global_batch // gpus)
    micro = min(share, loaded.optim.micro_batch or share)
    found: dict[str, Any] = {
        "model": f"{loaded.model.backbone}, {loaded.data.size[0]} x {loaded.data.size[1]}, precision {loaded.run.precision}",
        "parameters (M)": counts.weights / FULL / 1e6,
        "GMACs an image": counts.macs / 1e9,
        "activations an image (MB)": (counts.activations + counts.loss) / 1e6,
        "images of a GPU at once": micro,
    }
    for kind in ("ddp", "fsdp") if gpus > 1 else ("ddp",):
        fixed, moved = resident(counts, gpus, kind), communication(counts, gpus, kind)
        step = fixed + micro * (counts.activations + counts.loss)
        room = device.memory * 0.9 - fixed  # a tenth for the context, workspaces and fragmentation
        found |= {
            f"{kind}: memory without activations (GB)": fixed / 1e9,
            f"{kind}: memory of a step (GB)": step / 1e9,
            f"{kind}: images that fit a GPU": max(0, int(room // max(counts.activations + counts.loss, 1))),
            f"{kind}: sent by a GPU a step (GB)": moved / 1e9,
            f"{kind}: compute-bound from images a GPU": bound_batch(counts, gpus, kind, device, speed),
        }
    throughput = gpus / per_image
    found |= {
        "images/s when compute-bound": throughput,
        "storage (GB/s)": throughput * image_kb * 1e3 / 1e9,
        "images a GPU a second": 1 / per_image,
    }
    if images is not None:
        found["minutes of an epoch"] = images / throughput / 60
    return found


def step_flops(counts: Counts) -> int:
    """FLOPs of one image's training step: forward, and twice that for the gradients of inputs and weights."""
    return 2 * counts.macs * (4 if counts.checkpointing else 3)


def resident(counts: Counts, gpus: int, kind: str) -> int:
    """Bytes of a GPU before the first activation: weights, gradients, optimiser state, averages, and what is made beside them.

    Autocast keeps a 16-bit copy of the weights through the forward. DDP adds its buckets, which are as large as the gradients.
    FSDP cuts everything kept by the number of GPUs and adds what it gathers: the outer parameters, and two blocks at once.
    """
    kept = counts.weights + counts.trained * (1 + counts.state) + counts.average
    half = counts.weights // 2 if counts.half else 0
    if gpus == 1:
        return kept + counts.buffers + half
    if kind == "ddp":
        return kept + counts.buffers + half + counts.trained
    gathered = counts.outer + 2 * counts.largest_block
    # of a gathered block also the gradient, before it is cut; a 16-bit copy of what is gathered
    return kept // gpus + counts.buffers + 2 * gathered + (gathered // 2 if counts.half else 0)


def communication(counts: Counts, gpus: int, kind: str) -> int:
    """Bytes that a GPU sends in a step, by rings: each byte of a tensor passes (gpus - 1) / gpus of the way.

    DDP reduces the gradients and spreads the sums: twice. FSDP gathers the weights in the forward and in the backward, and
    reduces the gradients to their owners. All in float32.
    """
    moved = 2 * counts.trained if kind == "ddp" else 2 * counts.weights + counts.trained
    return moved * (gpus - 1) // gpus


def bound_batch(counts: Counts, gpus: int, kind: str, device: Gpu, speed: float) -> int:
    """The fewest images of a GPU at which computing takes as long as sending, when sending hides behind computing.

    DDP sends during the backward, which is two thirds of a step; FSDP during all of it.

    Args:
        counts: of the model.
        gpus: how many there are.
        kind: "ddp" or "fsdp".
        device: one of them.
        speed: operations a second that it computes with.
    """
    hidden = 2 / 3 if kind == "ddp" else 1.0
    sending = communication(counts, gpus, kind) / device.link
    return max(1, -(-int(sending * speed * 1e6) // int(step_flops(counts) * hidden * 1e6)))


def count(loaded: Config) -> Counts:
    """The bytes and multiply-adds of a configuration's model. The model is built; nothing runs with numbers."""
    plain = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, pretrained=False, checkpoint=None))
    task = configuration.build_task(plain)
    from train.setup import build

    net = build(plain, task, say=lambda text: None).train()
    size, channels = tuple(loaded.data.size), loaded.model.in_chans
    parameters = list(net.parameters())
    weights = sum(p.numel() for p in parameters) * FULL
    trained = sum(p.numel() for p in parameters if p.requires_grad) * FULL
    groups = block_bytes(net)
    macs = int(multiply_adds(net, channels, (size[0], size[1])) * 1e9)
    kept, outputs = forward_bytes(net.train(), channels, size, loaded.run.precision)
    dense = [t for t in outputs if t.ndim == 4]
    return Counts(
        weights=weights,
        trained=trained,
        buffers=sum(b.numel() * b.element_size() for b in net.buffers()),
        largest_block=max(groups, default=0),
        outer=weights - sum(groups),
        activations=kept,
        loss=sum(2 * FULL * t.shape[1] * size[0] * size[1] for t in dense),
        macs=macs,
        state=state_factor(loaded.optim),
        average=weights if loaded.optim.ema_decay is not None else 0,
        half=loaded.run.precision != "no",
        checkpointing=loaded.run.grad_checkpointing,
    )


def block_bytes(net: nn.Module) -> list[int]:
    """Bytes of every group of parameters that FSDP gathers at once: blocks, inner ones apart from those around them."""
    seen: set[int] = set()
    groups = []
    for block in sharding.blocks(getattr(net, "backbone", net)):
        own = [p for p in block.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        groups.append(sum(p.numel() for p in own) * FULL)
    return groups


def forward_bytes(net: nn.Module, channels: int, size: tuple[int, ...], precision: str) -> tuple[int, list[Tensor]]:
    """(bytes kept for the backward, outputs) of one image in training, from three images less two.

    A tensor that several operations keep counts once, and parameters, which are there anyway, do not.

    Args:
        net: the model.
        channels: of an image.
        size: (height, width) of an image.
        precision: "no", "bf16" or "fp16".
    """
    found = []
    for batch in (2, 3):  # batch norms refuse one image on a map of one pixel
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
        storages: dict[int, tuple[int, Any]] = {}

        def keep(tensor: Tensor, own: set[int] = own, storages: dict[int, tuple[int, Any]] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and not isinstance(tensor, nn.Parameter):
                storages[storage._cdata] = (storage.nbytes(), storage)  # the storage too: its address must not be used again
            return tensor

        half = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        with mode:
            images = torch.empty(batch, channels, *size)
            with (
                saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None, cache_enabled=False),
            ):
                output = net(images)
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        found.append((sum(size for size, _ in storages.values()), tensors))
    (two, outputs), (three, _) = found
    return three - two, outputs


def state_factor(optim: OptimConfig) -> int:
    """How many numbers the optimiser keeps for a weight, from one step of it."""
    from train.optim import optimizer as make_optimizer

    weight = nn.Linear(4, 4, bias=False)
    optimizer = make_optimizer(weight, dataclasses.replace(optim, lr_scales={}, layer_decay=None))  # these name layers
    weight(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() for value in states if value.numel() > 1) // weight.weight.numel()


def shown(found: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of `plan` as text."""
    return {
        key: value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        for key, value in found.items()
    }
