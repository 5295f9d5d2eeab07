"""Batch norm over processes equals batch norm over the whole batch; the engine's test compares whole runs."""

import torch
from timm.layers import BatchNormAct2d
from torch import nn

from train import syncbn


def test_every_batch_norm_is_turned_and_keeps_its_names():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4))
    before = set(model.state_dict())
    assert syncbn.synchronise(model) == 2 and set(model.state_dict()) == before
    assert all(isinstance(module, syncbn.SyncBatchNorm) for module in model[1:])


def test_one_process_gives_torch_batch_norm(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4))
        synced = nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4))
        syncbn.synchronise(synced)
        for mode in (True, True, False):
            plain.train(mode), synced.train(mode)
            x = torch.randn(5, 4, 3, 2)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            out, other = plain(a), synced(b)
            (out**2).sum().backward()
            (other**2).sum().backward()
            assert torch.allclose(out, other, atol=1e-5) and torch.allclose(a.grad, b.grad, atol=1e-4)
        for name, value in plain.state_dict().items():
            assert torch.allclose(value.float(), synced.state_dict()[name].float(), atol=1e-6), name
    finally:
        torch.distributed.destroy_process_group()
