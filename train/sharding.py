"""Parameters, gradients, averages and optimiser state split over the processes: torch's FSDP2 (run.parallel: fsdp).

Every process holds a slice of each tensor and gathers a block's weights while that block runs, so that memory per process
falls with the number of processes. Checkpoints hold whole tensors, in the same files as without sharding: a run may go on with
another number of processes, and its weights load anywhere.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def shard(model: nn.Module, device: torch.device) -> None:
    """Splits a model's parameters over all processes, in place; names stay. The main process's values count.

    Blocks are gathered one at a time, what lies outside them (stem, head) for the whole pass. Raises ValueError for a tensor
    that torch cannot split.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(f"run.parallel fsdp: {name} is a single number and cannot be split; use ddp")
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    for block in blocks(getattr(model, "backbone", model)):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What a network repeats, inner ones first: elements of a list that has several of one class, with modules inside."""
    for child in model.children():
        yield from blocks(child)
    if isinstance(model, (nn.ModuleList, nn.Sequential)):
        kinds = [type(element) for element in model]
        for element in model:
            lists = isinstance(element, (nn.ModuleList, nn.Sequential))
            if kinds.count(type(element)) > 1 and not lists and next(element.children(), None) is not None:
                yield element


def whole(value: Any) -> Any:
    """The value with every split tensor inside dicts, lists and tuples gathered. Every process must call it at once."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value


def split(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, cut as `like` is; whole but on every process where the shapes differ."""
    if not isinstance(like, DTensor) or value.ndim == 0:
        return value
    placements = like.placements if value.shape == like.shape else [Replicate()] * like.device_mesh.ndim
    return distribute_tensor(value.to(like.device), like.device_mesh, placements)


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """load_state_dict of whole tensors into a model that may be split."""
    own = model.state_dict()
    model.load_state_dict({name: split(value, own[name]) if name in own else value for name, value in tensors.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """load_state_dict of whole tensors into the optimiser of a model that may be split."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {key: split(value, parameters[number]) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
