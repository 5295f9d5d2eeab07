"""MViT version 1 for images, against torchvision's video model with one frame and the paper's numbers."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video.mvit import MSBlockConfig
from torchvision.models.video.mvit import MViT as VideoMViT

import backbones  # noqa: F401
import weights
from backbones.mvit import MViT

TINY = {"embed_dim": 8, "depths": (1, 2, 2, 2), "num_heads": 1, "num_classes": 5, "img_size": (64, 96)}


def video_model(frames: int = 1) -> VideoMViT:
    """torchvision's model with the blocks of TINY over images that stand still."""
    blocks, dim, time = [], 8, [1]
    for stage, depth in enumerate(TINY["depths"]):
        for j in range(depth):
            pools, widens = stage > 0 and j == 0, stage < 3 and j == depth - 1
            stride = [1, max(4 >> stage, 1), max(4 >> stage, 1)]
            q = ([*time, 3, 3], [1, 2, 2]) if pools else ([], [])
            out = 2 * dim if widens else dim
            blocks.append(MSBlockConfig(2**stage, dim, out, q[0], [*time, 3, 3], q[1], stride))
            dim = out
    patch = {"patch_embed_kernel": (1, 7, 7), "patch_embed_stride": (1, 4, 4), "patch_embed_padding": (0, 3, 3)}
    how = dict.fromkeys(("residual_pool", "residual_with_cls_embed", "rel_pos_embed", "proj_after_attn"), False)
    return VideoMViT((64, 96), frames, blocks, num_classes=5, **how, **patch)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    theirs = video_model().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = MViT(**TINY).eval()
    report = weights.load_checkpoint(ours, theirs.state_dict())
    assert not report.missing and not report.unexpected and not report.resized
    return ours, theirs


def test_one_frame_gives_what_torchvisions_video_model_gives(pair):
    ours, theirs = pair
    x = torch.randn(2, 3, 64, 96)
    x.requires_grad_(True)
    for model, image in ((ours, x), (theirs, x[:, :, None])):
        model(image).square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x[:, :, None]), atol=1e-5, rtol=1e-4)  # fp32, 7 blocks
    grad = dict(theirs.named_parameters())
    for key, name in [
        ("patch_embed.proj", "conv_proj"),
        ("stages.1.blocks.0.attn.pool_q", "blocks.1.attn.pool_q.pool"),
        ("stages.2.blocks.1.attn.norm_v", "blocks.4.attn.pool_v.norm_act.0"),
        ("stages.2.blocks.1.proj", "blocks.4.project"),
    ]:
        expected = grad[f"{name}.weight"].grad
        torch.testing.assert_close(ours.get_parameter(f"{key}.weight").grad.view_as(expected), expected, atol=1e-3, rtol=1e-3)


def test_the_maps_are_those_of_the_stages_last_blocks(pair):
    ours, theirs = pair
    x, seen = torch.randn(1, 3, 64, 96), {}
    for i, block in enumerate(theirs.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out[0]))
    with torch.no_grad():
        theirs(x[:, :, None])
        pairs = ours.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)
    for (image, token), last in zip(pairs, (0, 2, 4, 6)):
        torch.testing.assert_close(torch.cat([token, image.flatten(2).mT], 1), seen[last], atol=1e-4, rtol=1e-4)


def test_the_published_model_has_the_papers_size_and_work():
    model = timm.create_model("mvit_v1_b_16", device="meta").eval()
    parameters = sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert round(parameters / 1e6, 1) == 37.0
    assert round(counter.get_total_flops() / 2e9, 1) == 7.8  # multiply-accumulates, those of the attention too


def test_slowfasts_names_load_strictly_and_come_back():
    model = timm.create_model("mvit_v1_b_16", device="meta")
    official = weights.convert.converter(model).to_official(model.state_dict(), model)
    assert official["blocks.1.attn.pool_q.weight"].shape == (96, 1, 1, 3, 3)
    assert official["blocks.13.proj.weight"].shape == (768, 384) and official["head.projection.weight"].shape == (1000, 768)
    assert official["pos_embed"].shape == (1, 3137, 96) and official["patch_embed.proj.weight"].shape == (96, 3, 7, 7)
    assert sum(key.startswith("blocks.") and key.endswith("qkv.weight") for key in official) == 16
    assert "blocks.0.attn.pool_q.weight" not in official and "blocks.15.attn.pool_k.weight" in official
    report = weights.load_checkpoint(model, {"model_state": official, "epoch": 300})
    assert report.format == "official" and not report.missing and not report.unexpected


def test_weights_of_several_frames_are_refused():
    model = MViT(**TINY)
    state = video_model().state_dict()
    with pytest.raises(ValueError, match="of 2 frames"):
        weights.convert_state_dict(state | {"pos_encoding.temporal_pos": torch.zeros(2, 8)}, model)
    key = "blocks.0.attn.pool_k.pool.weight"
    with pytest.raises(ValueError, match="over 3 frames"):
        weights.convert_state_dict(state | {key: state[key].repeat(1, 1, 3, 1, 1)}, model)


def test_weights_of_another_size_load_with_resized_positions():
    small, large = MViT(**TINY | {"img_size": 64}), MViT(**TINY | {"img_size": (96, 64)})
    report = weights.load_checkpoint(large, small.state_dict())
    assert list(report.resized) == ["pos_embed"]
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(large.eval()(x), small.eval()(x), atol=1e-5, rtol=1e-5)


def test_no_map_is_too_small_and_odd_ones_round_up():
    model = MViT(**TINY).eval()
    for height, width in [(1, 1), (33, 70)]:
        maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
        sides = [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32)]
        assert [tuple(m.shape[2:]) for m in maps] == sides and all(m.isfinite().all() for m in maps)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
