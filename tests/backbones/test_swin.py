"""Swin against the authors' classification and dense-prediction code, and what is easy to get wrong in it."""

import json

import golden
import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models._features_fx import GraphExtractNet, get_graph_node_names
from torch import nn

import weights
from backbones.layers import PatchEmbed
from backbones.swin import Swin, WindowAttention, cached_shift_mask, shift_mask
from weights.convert.swin import relative_position_index, source_format, to_official

TINY = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "num_classes": 5}
# No effect in a fixture, which is made in eval mode.
IGNORED = ("drop_path_rate", "drop_rate", "attn_drop_rate", "use_checkpoint", "fused_window_process", "frozen_stages")


def facts() -> dict:
    path = golden.ROOT.parent.parent / "shared" / "facts" / "keys_swin.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that no bias hides at its initial zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def from_official(kwargs: dict) -> Swin:
    """The model that the authors' constructor arguments describe."""
    kwargs = {key: value for key, value in kwargs.items() if key not in IGNORED}
    if "pretrain_img_size" in kwargs:
        kwargs["img_size"] = kwargs.pop("pretrain_img_size")
    dense = kwargs.pop("out_indices", None) is not None
    model = Swin(feature_norms=dense, **kwargs)
    if dense:
        model.prune_intermediate_layers(len(model.stages), prune_norm=True)  # the dense code has no final norm and no head
    return model


@pytest.mark.parametrize("case", golden.cases("swin"))
def test_every_stored_tensor_is_reproduced(case):
    info, tensors = golden.load(case)
    model = from_official(info["kwargs"]).eval()
    weights.load_checkpoint(model, golden.state(tensors))
    with torch.no_grad():
        final, maps = model.forward_intermediates(tensors["input"])
        if model.dense:
            got = {f"stage/{i}": x for i, x in enumerate(maps)}
            got["output"] = torch.cat([x.mean((2, 3)) for x in maps], 1)
        else:
            got = {f"stage/{i}": x.flatten(2).mT for i, x in enumerate(maps)}
            stem = PatchEmbed.forward(model.patch_embed, tensors["input"])  # before the absolute position
            got |= {"stem": stem.flatten(1, 2), "output": model(tensors["input"])}
            got["pooled"] = model.forward_head(final, pre_logits=True)
    stored = {key: value for key, value in tensors.items() if key != "input" and not key.startswith("state/")}
    assert stored.keys() <= got.keys()
    for key, value in stored.items():
        torch.testing.assert_close(got[key], value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")
    state = golden.state(tensors)
    back = to_official(model.state_dict(), model)
    assert back.keys() == state.keys()
    for key, value in state.items():  # masks and indices included
        torch.testing.assert_close(back[key], value, rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("variant", list(facts()) or [pytest.param(None, marks=pytest.mark.skip(reason="no keys_swin.json"))])
def test_official_keys_load_strictly_and_convert_back(variant):
    stated = facts()[variant]
    with torch.device("meta"):
        model = from_official(stated["kwargs"])
    assert sum(p.numel() for p in model.parameters()) == stated["params"]
    official = {key: torch.empty(shape, device="meta") for key, shape in stated["keys"].items()}
    assert source_format(official) == "official"
    native = weights.convert_state_dict({"model": official}, model)
    model.load_state_dict(native, strict=True)
    assert weights.convert_state_dict(native, model).keys() == native.keys()
    assert {key: list(value.shape) for key, value in to_official(model.state_dict(), model).items()} == stated["keys"]


def test_dense_checkpoint_of_a_segmentation_file_loads_with_features_only():
    full = randomised(Swin(**TINY, feature_norms=True, ape=True, img_size=32))
    official = {
        key: value for key, value in to_official(full.state_dict(), full).items() if not key.startswith(("norm.", "head."))
    }
    assert source_format(official) == "official-dense" and official["absolute_pos_embed"].shape == (1, 16, 8, 8)
    assert not any(key.endswith("attn_mask") for key in official)
    file = {"state_dict": {f"backbone.{key}": value for key, value in official.items()} | {"decode_head.w": torch.zeros(1)}}
    model = timm.create_model(
        "swin_t", features_only=True, feature_norms=True, ape=True, img_size=32, out_indices=(0, 1), **TINY
    )
    model.model.load_state_dict(weights.convert_state_dict(file, model), strict=True)
    images = torch.randn(1, 3, 50, 70)
    expected = full.forward_intermediates(images, intermediates_only=True)
    for a, b in zip(model.eval()(images), expected):
        torch.testing.assert_close(a, b)


def test_timm_weights_load_and_give_timms_numbers_on_square_images():
    args = {"img_size": 64, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": 4, "num_classes": 5}
    theirs = randomised(timm.create_model("swin_tiny_patch4_window7_224", **args))
    assert source_format(theirs.state_dict()) == "timm"
    ours = Swin(**args).eval()
    ours.load_state_dict(weights.convert_state_dict(theirs.state_dict(), ours), strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_without_a_norm_after_the_patch_embedding():
    """The authors' patch_norm=False: no such weights, in both directions."""
    model = randomised(Swin(**TINY, patch_norm=False, img_size=32))
    official = to_official(model.state_dict(), model)
    assert not any(key.startswith("patch_embed.norm") for key in official)
    again = Swin(**TINY, patch_norm=False, img_size=32).eval()
    weights.load_checkpoint(again, official)
    image = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(again(image), model(image))


class PlainAttention(nn.Module):
    """Another attention for the test of a family that varies Swin: a linear layer, windows remembered."""

    def __init__(self, dim: int, window: int):
        super().__init__()
        self.window, self.fc = window, nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)

    def set_window(self, window: int, unshifted: tuple[int, int] | None) -> None:
        self.window = window


class Varied(Swin):
    """Plain attention in wider windows in the first stage, Swin's own after it; RMSNorm everywhere."""

    def make_attn(self, stage, block, dim, num_heads, **attention):
        if stage == 0:
            return PlainAttention(dim, self.window(stage, block)[0])
        return super().make_attn(stage, block, dim, num_heads, **attention)

    def make_norm(self, dim):
        return nn.RMSNorm(dim)

    def window_side(self, stage, block):
        return 8 if stage == 0 else self.window_size


def test_a_family_may_vary_attention_windows_and_norms():
    model = Varied(**TINY, img_size=64)
    first, second = ([block.attn for block in stage.blocks] for stage in model.stages)
    assert [type(attn) for attn in first + second] == [PlainAttention] * 2 + [WindowAttention] * 2
    assert [attn.window for attn in first + second] == [8, 8, 4, 4]
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    model.set_input_size(24)
    assert [attn.window for attn in first + second] == [6, 6, 3, 3]
    assert {type(m) for m in Varied(**TINY, feature_norms=True).feature_norms.values()} == {nn.LayerNorm}  # for dense heads


def test_norm_eps_and_gelu_are_those_of_the_released_weights():
    model = Swin(**TINY, feature_norms=True)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.act.approximate for m in model.modules() if isinstance(m, Mlp)} == {"none"}


def slow_attention(attn: WindowAttention, x: torch.Tensor, shift: int) -> torch.Tensor:
    """The authors' dense attention written out: pad, roll, one window after the other with index table and mask, roll, crop."""
    (_, height, width, channels), w, heads = x.shape, attn.window, attn.num_heads
    x = nn.functional.pad(x, (0, 0, 0, -width % w, 0, -height % w))
    rows, columns = x.shape[1:3]
    x = torch.roll(x, (-shift, -shift), (1, 2))
    bias = attn.relative_position_bias_table[relative_position_index(w)].permute(2, 0, 1)
    label = lambda i, size: int(i >= size - w) + int(i >= size - shift) if shift else 0  # noqa: E731
    out = torch.zeros_like(x)
    for top in range(0, rows, w):
        for left in range(0, columns, w):
            tokens = x[:, top : top + w, left : left + w].reshape(-1, w * w, channels)
            q, k, v = attn.qkv(tokens).reshape(-1, w * w, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
            places = [(label(top + i, rows), label(left + j, columns)) for i in range(w) for j in range(w)]
            mask = torch.tensor([[0.0 if a == b else -100.0 for b in places] for a in places])
            weights_ = ((q * attn.scale) @ k.mT + bias + mask).softmax(-1)
            tokens = attn.proj((weights_ @ v).transpose(1, 2).reshape(-1, w * w, channels))
            out[:, top : top + w, left : left + w] = tokens.view(-1, w, w, channels)
    return torch.roll(out, (shift, shift), (1, 2))[:, :height, :width]


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (9, 14), (3, 5), (1, 1)])
@pytest.mark.parametrize("shifted", [False, True])
def test_attention_is_the_authors_dense_attention(size, shifted):
    attn = randomised(WindowAttention(16, 2, 4, shifted, None, True, None, 0.0))
    x = torch.randn(2, *size, 16)
    torch.testing.assert_close(attn(x), slow_attention(attn, x, 2 if shifted else 0), rtol=1e-4, atol=1e-5)


def test_mask_adds_minus_100_and_not_minus_infinity():
    mask = shift_mask(2, 2, 4, 2, torch.device("cpu"), torch.float32)
    assert mask.shape == (4, 16, 16) and mask.unique().tolist() == [-100.0, 0.0]
    assert not mask[0].any() and mask[1, 0].view(4, 4).tolist() == [[0, 0, -100, -100]] * 4


@pytest.mark.parametrize("index, official", [((0, 0), [0, 9, 18, 27]), ((1, 0), [9, 0, 9, 18])])
def test_bias_index_is_query_minus_key(index, official):
    window = 4
    attn = WindowAttention(4, 1, window, False, None, True, None, 0.0)
    with torch.no_grad():
        attn.relative_position_bias_table.copy_(torch.arange(49.0)[:, None])
    expected = torch.arange(49.0)[relative_position_index(window)]
    torch.testing.assert_close(attn.bias()[0], expected, rtol=0, atol=0)
    query, key = divmod(5, 4), divmod(2, 4)  # written out for one pair
    assert expected[5, 2] == (query[0] - key[0] + 3) * 7 + query[1] - key[1] + 3


def test_shrink_rule_of_the_classification_code():
    def rule(**kwargs):
        with torch.device("meta"):
            model = Swin(**TINY | {"depths": (2, 2, 2), "num_heads": (1, 2, 4)} | kwargs)
        return [
            (stage.blocks[1].attn.window, stage.blocks[1].attn.shift(*model.grid(i))) for i, stage in enumerate(model.stages)
        ]

    assert rule(img_size=64) == [(4, 2), (4, 2), (4, 0)]  # maps 16, 8, 4
    assert rule(img_size=(64, 128)) == [(4, 2), (4, 2), (4, 0)]  # 4 x 8: off on both axes, though the width exceeds the window
    assert rule(img_size=48, window_size=6) == [(6, 3), (6, 0), (3, 0)]  # 12, 6, 3: the window shrinks
    assert rule(img_size=48, window_size=6, dense=True) == [(6, 3), (6, 3), (6, 3)]
    assert rule(img_size=48, window_size=6, feature_norms=True) == [(6, 3), (6, 3), (6, 3)]


def test_other_sizes_follow_the_dense_code_and_the_native_size_does_not():
    plain, dense = randomised(Swin(**TINY, img_size=32)), Swin(**TINY, img_size=32, dense=True).eval()
    dense.load_state_dict(plain.state_dict(), strict=True)
    native, other = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 45, 70)
    torch.testing.assert_close(plain(other), dense(other), rtol=0, atol=0)
    assert (plain(native) - dense(native)).abs().max() > 1e-5  # the 4 x 4 map is one window: shifted only in the dense code


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (33, 47), (64, 96)])
@pytest.mark.parametrize("ape", [False, True])
def test_any_size_at_run_time_and_at_creation(size, ape):
    images = torch.randn(2, 3, *size)
    for model in (Swin(**TINY, ape=ape), Swin(**TINY, ape=ape, img_size=size)):
        final, maps = model.eval().forward_intermediates(images)
        assert [x.shape[-2:] for x in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8)]
        assert model(images).isfinite().all()


def test_merging_takes_the_phases_in_the_authors_order_and_pads_odd_maps():
    merge = randomised(Swin(**TINY)).stages[1].downsample
    seen = []
    merge.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(1, 3, 2, 16)
    merge(x)
    expected = torch.stack([x[0, 0, 0], x[0, 1, 0], x[0, 0, 1], x[0, 1, 1]]).flatten()
    torch.testing.assert_close(seen[0][0, 0, 0], expected)
    torch.testing.assert_close(
        seen[0][0, 1, 0].view(4, 16), torch.stack([x[0, 2, 0], 0 * x[0, 2, 0], x[0, 2, 1], 0 * x[0, 2, 0]])
    )


def test_set_input_size_resamples_tables_and_positions_as_loading_does():
    model = randomised(Swin(**TINY | {"window_size": 7}, img_size=112, ape=True))
    other = Swin(**TINY | {"window_size": 6}, img_size=(96, 48), ape=True).eval()
    other.load_state_dict(weights.convert_state_dict(to_official(model.state_dict(), model), other), strict=True)
    table = model.stages[0].blocks[0].attn.relative_position_bias_table
    expected = nn.functional.interpolate(table.T.reshape(1, 1, 13, 13), (11, 11), mode="bicubic", align_corners=False)
    torch.testing.assert_close(other.stages[0].blocks[0].attn.relative_position_bias_table[:, 0], expected.flatten())
    model.set_input_size((96, 48), window_size=6)
    images = torch.randn(1, 3, 96, 48)
    torch.testing.assert_close(model(images), other(images), rtol=0, atol=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_input_size((96, 48))  # nothing to do: nothing changes by a bit
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_positions_are_resized_bicubically_at_run_time():
    model = randomised(Swin(**TINY, ape=True, img_size=64))
    other = randomised(Swin(**TINY, ape=True, img_size=(40, 90)))
    position = model.patch_embed.absolute_pos_embed
    with torch.no_grad():
        resized = nn.functional.interpolate(position, (10, 23), mode="bicubic", align_corners=False)
        other.patch_embed.load_state_dict(model.patch_embed.state_dict() | {"absolute_pos_embed": resized})
    images = torch.randn(1, 3, 40, 90)
    torch.testing.assert_close(model.patch_embed(images), other.patch_embed(images), rtol=0, atol=0)


def test_masks_made_under_inference_mode_serve_training():
    cached_shift_mask.cache_clear()
    model, images = randomised(Swin(**TINY)), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images)
    out = model.train()(images)
    out.sum().backward()
    assert cached_shift_mask.cache_info().hits > 0
    hits = cached_shift_mask.cache_info().hits
    mask = cached_shift_mask(4, 4, 4, 2, torch.device("cpu"), torch.float32)  # of the first stage's 16 x 16 map
    assert cached_shift_mask.cache_info().hits == hits + 1 and not mask.is_inference()
    torch.testing.assert_close(out, expected)


def test_masks_of_fake_tensors_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    cached_shift_mask.cache_clear()
    model = randomised(Swin(**TINY))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(torch.randn(1, 3, 64, 64)))
    assert cached_shift_mask.cache_info().currsize == 0
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("ape", [False, True])
def test_traced_and_compiled_programs_agree(ape):
    model = randomised(Swin(**TINY, ape=ape))
    images = torch.randn(2, 3, 50, 61)  # padded everywhere
    expected = model(images)
    assert torch.equal(GraphExtractNet(model, get_graph_node_names(model)[1][-1:])(images), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), expected)


def test_exported_program_takes_any_batch_and_any_size_above_one_window():
    model = randomised(Swin(**TINY | {"depths": (1, 2)}, ape=True))
    batch, height, width = (torch.export.Dim(name, min=low, max=512) for name, low in (("b", 1), ("h", 40), ("w", 40)))
    sizes = {"x": {0: batch, 2: height, 3: width}}
    program = torch.export.export(model, (torch.randn(2, 3, 50, 61),), dynamic_shapes=sizes)
    for shape in ((3, 3, 50, 61), (1, 3, 96, 77)):
        images = torch.randn(shape)
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)
