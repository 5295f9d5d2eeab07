"""`zoo plan`: what it counts is what a model keeps and what two processes send; a mistake is a sentence."""

import json
import re
import socket

import processes
import pytest
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from train import cli, plan, sharding
from train.plan import GPUS, Counts
from train.schema import OptimConfig

COUNTS = Counts(1000, 800, 10, 300, 100, 50, 6, 7, 2, 1000, half=True, checkpointing=False)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(Branch(), Branch(), Branch()), nn.Linear(8, 2))


class Collectives(TorchDispatchMode):
    """Bytes of the tensors that each kind of collective gathers or reduces."""

    def __init__(self):
        super().__init__()
        self.gathered = self.scattered = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        if "allgather_base" in name or "all_gather_into_tensor" in name:
            self.gathered += arguments[0].numel() * arguments[0].element_size()  # the whole tensor
        if "reduce_scatter" in name:
            self.scattered += arguments[1].numel() * arguments[1].element_size()
        return function(*arguments, **(options or {}))


def one_step(rank, port, out):
    """What a process of two sends in a step by DDP and by FSDP, written by the first."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    net = DistributedDataParallel(network())
    net.register_comm_hook(None, hook)
    net(torch.ones(3, 4)).sum().backward()
    split = network()
    sharding.shard(split, torch.device("cpu"))
    with Collectives() as seen:
        split(torch.ones(3, 4)).sum().backward()
    if rank == 0:
        with open(out, "w") as file:
            json.dump([sum(reduced), seen.gathered, seen.scattered], file)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_send_what_is_counted(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "bytes.json"
    running = [processes.CONTEXT.Process(target=one_step, args=(rank, port, str(out))) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0, 0]
    reduced, gathered, scattered = json.loads(out.read_text())
    net = network()
    size = sum(p.numel() for p in net.parameters()) * 4
    blocks = plan.block_bytes(net)
    assert blocks == [(64 + 8) * 4] * 3
    counts = Counts(size, size, 0, max(blocks), size - sum(blocks), 0, 0, 1, 2, 0, half=False, checkpointing=False)
    # a ring sends (gpus - 1) / gpus of a tensor to gather or to reduce it, and both to reduce it to everyone
    assert plan.communication(counts, 2, "ddp") == 2 * reduced // 2
    assert plan.communication(counts, 2, "fsdp") == (gathered + scattered) // 2


def test_resident_bytes_are_those_of_the_formula():
    # weights, gradients and moments of trained ones, average, buffers, 16-bit copy
    alone = 1000 + 800 * 3 + 1000 + 10 + 500
    assert plan.resident(COUNTS, 1, "ddp") == alone
    assert plan.resident(COUNTS, 4, "ddp") == alone + 800
    gathered = 100 + 2 * 300
    assert plan.resident(COUNTS, 4, "fsdp") == (1000 + 800 * 3 + 1000) // 4 + 10 + 2 * gathered + gathered // 2


def test_at_the_bound_computing_takes_as_long_as_sending():
    gpu = GPUS["h100"]
    counts = Counts(4 * 10**8, 4 * 10**8, 0, 0, 0, 1, 0, 10**9, 2, 0, half=True, checkpointing=False)
    batch = plan.bound_batch(counts, 8, "ddp", gpu, gpu.half)
    seconds = 2 * 4e8 * 7 / 8 / gpu.link
    assert (batch - 1) * 6e9 / gpu.half * 2 / 3 < seconds <= batch * 6e9 / gpu.half * 2 / 3


def test_activations_are_what_autograd_keeps():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(), nn.Conv2d(8, 2, 1))
    kept, outputs = plan.forward_bytes(net, 3, (5, 7), "no")
    assert kept == (3 + 8 + 8) * 35 * 4  # the image, GELU's input, GELU's output; weights are there anyway
    assert outputs[0].shape[1:] == (2, 5, 7)


def test_the_command_counts_a_configuration(tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(tiny.values()))
    assert cli.main(["plan", str(path), "--gpus", "2", "--images", "1000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sums = {kind: found[f"{kind}: sent by a GPU a step (GB)"] for kind in ("ddp", "fsdp")}
    assert sums["ddp"] * 1e9 == pytest.approx(4e6 * found["parameters (M)"]) and sums["fsdp"] > sums["ddp"]
    assert found["images of a GPU at once"] == 2
    assert found["minutes of an epoch"] == pytest.approx(1000 / found["images/s when compute-bound"] / 60)
    assert cli.main(["plan", str(path), "--run.precision=bf16"]) == 0
    assert "precision bf16" in capsys.readouterr().out


def test_the_optimisers_state_is_that_of_a_step():
    for name, numbers in (("adamw", 2), ("sgd", 1)):
        assert plan.state_factor(OptimConfig(name=name, lr_scales={"offset.weight": 0.1}, layer_decay=0.7)) == numbers


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--gpu", "h10"], "unknown GPU 'h10'.*h100"),
        (["--utilisation", "40"], "a share between 0 and 1"),
    ],
)
def test_a_mistake_is_a_sentence(words, sentence, capsys):
    assert cli.main(["plan", "quickstart", *words]) == 2
    assert re.search(sentence, capsys.readouterr().err)
