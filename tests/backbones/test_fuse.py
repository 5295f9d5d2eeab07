"""backbones.fuse: the same outputs with fewer passes, for every family."""

import pytest
import timm
import torch
from torch import nn

import backbones


# every family with BatchNorms, and one without
@pytest.mark.parametrize("name", ["cvt_13", "lit_ti", "litv2_s", "sparsifiner_lvvit_s", "pit_ti"])
def test_a_fused_model_gives_the_same_and_holds_no_batch_norm(name):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    fused = backbones.fuse(model)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), atol=1e-5, rtol=1e-5)


def test_fusing_folds_batch_norms_in_sequences_and_keeps_what_cannot_be_folded():
    torch.manual_seed(0)
    foldable = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2)]
    foldable += [nn.BatchNorm2d(6, affine=False)]
    kept = [nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 6, 2), nn.BatchNorm2d(6)]
    kept += [nn.Conv2d(6, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)]
    model = nn.Sequential(*foldable, *kept, nn.Flatten(), nn.Linear(2 * 49, 5), nn.BatchNorm1d(5))
    x = torch.randn(8, 3, 8, 8)
    model(x)  # statistics that are not the initial ones
    model.eval()
    fused = backbones.fuse(model)
    assert [type(m) for m in fused if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)] == [nn.BatchNorm2d] * 3
    torch.testing.assert_close(fused(x), model(x), atol=1e-5, rtol=1e-5)
