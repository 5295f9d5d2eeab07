"""NAT, DiNAT, DiNAT_s and the isotropic models against the authors' code, and what is easy to get wrong in them."""

import json

import golden
import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models._features_fx import GraphExtractNet, get_graph_node_names
from torch import nn

import weights
from backbones.nat import DENSE_DILATIONS, NAT, FullAttention, NATIsotropic, NeighborhoodAttention, ViTRPB
from weights.convert.nat import source_format, to_official

TINY = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "kernel_size": 3, "dilations": ((2,), (1, 3)), "num_classes": 5}


def facts() -> dict:
    path = golden.ROOT.parent.parent / "shared" / "facts" / "keys_nat.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that no bias or scale hides at its initial zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def from_official(info: dict) -> nn.Module:
    """The model that the authors' constructor arguments describe."""
    kwargs, source = dict(info["kwargs"]), info["official_class"]
    kwargs.pop("drop_path_rate", None)  # no effect in a fixture, which is made in eval mode
    if "isotropic" in source:
        if kwargs.pop("layer") == "vit":
            return ViTRPB(**{key: value for key, value in kwargs.items() if value is not None})
        kwargs.pop("img_size")  # ours takes any
        return NATIsotropic(**kwargs)
    dense = kwargs.pop("out_indices", None) is not None
    model = NAT(overlap="dinats" not in source, feature_norms=dense, **kwargs)
    if dense:
        model.prune_intermediate_layers(len(model.stages), prune_norm=True)  # the dense code has no final norm and no head
    return model


@pytest.mark.parametrize("case", golden.cases("nat"))
def test_every_stored_tensor_is_reproduced(case):
    info, tensors = golden.load(case)
    model = from_official(info).eval()
    weights.load_checkpoint(model, golden.state(tensors))
    with torch.no_grad():
        final, maps = model.forward_intermediates(tensors["input"])
        got = {f"stage/{i}": x for i, x in enumerate(maps)}
        if model.feature_norms is not None:
            got["output"] = torch.cat([x.mean((2, 3)) for x in maps], 1)
        else:
            got = {key: x.permute(0, 2, 3, 1) for key, x in got.items()}
            got |= {"stem": model.patch_embed(tensors["input"]), "output": model(tensors["input"])}
            got["pooled"] = model.forward_head(final, pre_logits=True)
    stored = {key: value for key, value in tensors.items() if key != "input" and not key.startswith("state/")}
    assert stored.keys() <= got.keys()
    for key, value in stored.items():
        torch.testing.assert_close(got[key], value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("variant", list(facts()) or [pytest.param(None, marks=pytest.mark.skip(reason="no keys_nat.json"))])
def test_official_keys_load_strictly_and_convert_back(variant):
    stated = facts()[variant]
    model = timm.create_model(variant.replace("_21k_11x11", "_384_11x11").removesuffix("_21k"), device="meta")
    assert sum(p.numel() for p in model.parameters()) == stated["params"]
    official = {key: torch.empty(shape, device="meta") for key, shape in stated["keys"].items()}
    assert source_format(official) == "official"
    native = weights.convert_state_dict({"module." + key: value for key, value in official.items()}, model)
    model.load_state_dict(native, strict=True)
    assert weights.convert_state_dict(native, model).keys() == native.keys()
    back = to_official(model.state_dict(), model)
    assert {key: list(value.shape) for key, value in back.items()} == stated["keys"]


def test_dense_checkpoint_of_a_segmentation_file_loads_with_features_only():
    full = NAT(**TINY, feature_norms=True)
    official = {key: torch.randn(value.shape) for key, value in to_official(full.state_dict(), full).items()}
    official = {key: value for key, value in official.items() if not key.startswith(("norm.", "head."))}
    assert source_format(official) == "official-dense"
    file = {"state_dict": {f"backbone.{key}": value for key, value in official.items()} | {"decode_head.w": torch.zeros(1)}}
    model = timm.create_model("nat_mini", features_only=True, feature_norms=True, out_indices=(0, 1), **TINY)
    missing, unexpected = model.model.load_state_dict(weights.convert_state_dict(file, model), strict=False)
    assert not missing and not unexpected
    torch.testing.assert_close(model.model.feature_norms["1"].weight, official["norm1.weight"])


def huggingface_state(model: NAT, prefix: str) -> dict[str, torch.Tensor]:
    """The model's weights as transformers' DinatForImageClassification names and splits them."""
    state, out = model.state_dict(), {}
    for key, value in state.items():
        parts = key.split(".")
        if key.startswith("patch_embed.proj"):
            name = key.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        elif key.startswith("patch_embed.norm"):
            name = key.replace("patch_embed", "embeddings")
        elif key.startswith("norm."):
            name = "layernorm." + parts[-1]
        elif key.startswith("head.fc"):
            out["classifier." + parts[-1]] = value
            continue
        elif parts[2] == "downsample":
            name = f"encoder.levels.{int(parts[1]) - 1}.downsample." + ".".join(parts[3:])
        else:
            base, rest = f"encoder.levels.{parts[1]}.layers.{parts[3]}.", ".".join(parts[4:])
            if rest.startswith("attn.qkv"):
                for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                    out[f"{prefix}{base}attention.self.{part}.{parts[-1]}"] = rows
                continue
            if rest == "scale1.gamma":
                name, value = base + "layer_scale_parameters", torch.stack([value, state[key.replace("scale1", "scale2")]])
            elif rest == "scale2.gamma":
                continue
            else:
                table = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense"}
                table |= {"mlp.fc2": "output.dense", "attn.proj": "attention.output.dense", "attn.rpb": "attention.self.rpb"}
                old = next(old for old in table if rest.startswith(old))
                name = base + rest.replace(old, table[old])
        out[prefix + name] = value
    return out


@pytest.mark.parametrize("prefix", ["nat.", "dinat.", ""])
def test_huggingface_files_load(prefix):
    model = randomised(NAT(**TINY, layer_scale=1e-5))
    foreign = huggingface_state(model, prefix)
    assert source_format(foreign) == "huggingface"
    loaded = NAT(**TINY, layer_scale=1e-5).eval()
    loaded.load_state_dict(weights.convert_state_dict(foreign, loaded), strict=True)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)


def test_bias_tables_are_resized_to_another_kernel():
    small, large = randomised(NAT(**TINY)), NAT(**TINY | {"kernel_size": 5})
    native = weights.convert_state_dict(to_official(small.state_dict(), small), large)
    large.load_state_dict(native, strict=True)
    table = small.state_dict()["stages.0.blocks.0.attn.rpb"]
    expected = nn.functional.interpolate(table[None], (9, 9), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(native["stages.0.blocks.0.attn.rpb"], expected)


DILATIONS = {  # papers' tables, block by block
    "nat_mini": [[1] * 3, [1] * 4, [1] * 6, [1] * 5],
    "dinat_mini": [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5],
    "dinat_base": [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5],
    "dinat_large_384": [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5],
    "dinat_large_384_11x11": [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5],
    "dinat_s_tiny": [[1, 8], [1, 4], [1, 2] * 3, [1, 1]],
    "dinat_s_large_384": [[1, 13], [1, 6], [1, 3] * 9, [1, 1]],
    "dinat_isotropic_small": [[1 + i % 2] for i in range(12)],
    "nat_isotropic_base": [[1]] * 12,
}


@pytest.mark.parametrize("name", DILATIONS)
def test_dilations_are_those_of_the_paper(name):
    model = timm.create_model(name, device="meta")
    assert [[block.attn.dilation for block in stage.blocks] for stage in model.stages] == DILATIONS[name]


def test_dense_dilations_by_name_and_by_value():
    model = timm.create_model("dinat_tiny", device="meta", dilations="ade20k_512")
    got = [[block.attn.dilation for block in stage.blocks] for stage in model.stages]
    assert got == [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]]
    assert len(DENSE_DILATIONS["ade20k_640"][2]) == len(DENSE_DILATIONS["mask2former"][2]) == 18
    with pytest.raises(ValueError, match="did you mean 'ade20k_512'"):
        timm.create_model("dinat_tiny", device="meta", dilations="ade20k_51")
    with pytest.raises(ValueError, match="each of the 4 stages"):
        timm.create_model("dinat_tiny", device="meta", dilations=((1,),))


def test_dilations_are_not_stored_and_change_the_output():
    a, b = randomised(NAT(**TINY)), NAT(**TINY | {"dilations": None}).eval()
    b.load_state_dict(a.state_dict(), strict=True)
    images = torch.randn(1, 3, 48, 48)
    assert (a(images) - b(images)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name, scaled",
    [("nat_tiny", False), ("nat_small", True), ("dinat_small", False), ("dinat_base", True), ("dinat_large", False)],
)
def test_layer_scale_exists_only_where_the_authors_have_it(name, scaled):
    assert any(key.endswith("gamma") for key in timm.create_model(name, device="meta").state_dict()) == scaled


@pytest.mark.parametrize(
    "model", [NAT(**TINY), NAT(**TINY, overlap=False, feature_norms=True), NATIsotropic(32, 2, 2), ViTRPB(64, 32, 2, 2)]
)
def test_norm_eps_and_gelu_are_those_of_the_released_weights(model):
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.act.approximate for m in model.modules() if isinstance(m, Mlp)} == {"none"}


def test_neighbourhood_of_the_whole_map_is_full_attention():
    near, full = NeighborhoodAttention(16, 2, 5, 1), FullAttention(16, 2, (5, 5))
    randomised(near)
    full.load_state_dict(near.state_dict(), strict=True)
    x = torch.randn(2, 5, 5, 16)
    torch.testing.assert_close(near(x), full(x), rtol=1e-5, atol=1e-5)


def test_padded_positions_are_ordinary_keys():
    near, full = randomised(NeighborhoodAttention(16, 2, 5, 1)), FullAttention(16, 2, (5, 5))
    full.load_state_dict(near.state_dict(), strict=True)
    x = torch.randn(2, 3, 4, 16)
    padded = nn.functional.pad(x, (0, 0, 0, 1, 0, 2))  # bottom and right, before the linear layer
    torch.testing.assert_close(near(x), full(padded)[:, :3, :4], rtol=1e-5, atol=1e-5)


def test_bias_entry_is_key_minus_query():
    attn = NeighborhoodAttention(4, 1, 3, 1)
    with torch.no_grad():
        attn.qkv.weight.copy_(torch.cat([torch.zeros(8, 4), torch.eye(4)]))  # equal scores, value = input
        attn.proj.weight.copy_(torch.eye(4))
        attn.qkv.bias.zero_(), attn.proj.bias.zero_()
        attn.rpb.zero_()[0, 1, 2] = 50.0  # one row above, same column
    x = torch.randn(1, 6, 6, 4)
    torch.testing.assert_close(attn(x)[0, 2:5, 2:5], x[0, 1:4, 2:5])


def test_patch_merging_takes_the_phases_in_the_authors_order():
    merge = NAT(**TINY, overlap=False).stages[1].downsample
    x = torch.arange(2 * 2 * 16.0).view(1, 2, 2, 16)
    seen = []
    merge.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    merge(x)
    torch.testing.assert_close(seen[0].view(4, 16), torch.stack([x[0, 0, 0], x[0, 1, 0], x[0, 0, 1], x[0, 1, 1]]))


def test_merging_and_patch_stem_pad_with_zeros_at_the_bottom_and_on_the_right():
    model = randomised(NAT(**TINY, overlap=False))
    images = torch.randn(1, 3, 21, 34)
    whole = nn.functional.pad(images, (0, 2, 0, 3))
    torch.testing.assert_close(model.patch_embed(images), model.patch_embed(whole), rtol=0, atol=0)
    x = model.patch_embed(images)  # 6 x 9
    even = nn.functional.pad(x, (0, 0, 0, 1))
    merge = model.stages[1].downsample
    torch.testing.assert_close(merge(x), merge(even), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (33, 47), (64, 96)])
def test_any_size_at_run_time(size):
    models = [
        NAT(**TINY),
        NAT(**TINY, overlap=False),
        NATIsotropic(32, 2, 2, num_classes=5),
        ViTRPB(64, 32, 2, 2, num_classes=5),
    ]
    for model, stride in zip(models, (8, 8, 16, 16)):
        _, maps = model.eval().forward_intermediates(torch.randn(2, 3, *size))
        assert maps[-1].shape[-2:] == (-(-size[0] // stride), -(-size[1] // stride))
        assert model(torch.randn(2, 3, *size)).isfinite().all()


def test_vitrpb_resamples_its_table_for_another_grid():
    model = randomised(ViTRPB(64, 32, 2, 2, num_classes=5))
    native, images, other = model.stages[0].blocks[0].attn.rpb.clone(), torch.randn(1, 3, 64, 64), torch.randn(1, 3, 90, 130)
    before = model(images)
    run_time = model(other)
    model.set_input_size((90, 130))
    assert model.stages[0].blocks[0].attn.rpb.shape == (2, 11, 17)
    torch.testing.assert_close(model(other), run_time)
    loaded = ViTRPB((90, 130), 32, 2, 2, num_classes=5).eval()
    model = randomised(ViTRPB(64, 32, 2, 2, num_classes=5))
    loaded.load_state_dict(weights.convert_state_dict(to_official(model.state_dict(), model), loaded), strict=True)
    torch.testing.assert_close(loaded(other), run_time)
    model.set_input_size(64)
    assert torch.equal(model(images), before) and torch.equal(model.stages[0].blocks[0].attn.rpb, native)


@pytest.mark.parametrize("depth, taps", [(12, [2, 5, 8, 11]), (3, [0, 1, 2]), (2, [0, 1])])
def test_features_of_a_flat_model_are_spread_over_its_depth(depth, taps):
    model = timm.create_model("nat_isotropic_small", features_only=True, depth=depth, device="meta")
    assert list(model.feature_info.out_indices) == taps
    assert [x.shape[-2:] for x in model(torch.empty(1, 3, 64, 80, device="meta"))] == [(4, 5)] * len(taps)


MODELS = {
    "dinat": lambda: NAT(**TINY),
    "dinat_s": lambda: NAT(**TINY, overlap=False),
    "isotropic": lambda: NATIsotropic(32, 2, 2, kernel_size=3, dilation=2, num_classes=5),
    "vitrpb": lambda: ViTRPB(64, 32, 1, 2, num_classes=5),
}


@pytest.mark.parametrize("kind", MODELS)
def test_traced_compiled_and_exported_programs_agree(kind):
    model = randomised(MODELS[kind]())
    images = torch.randn(2, 3, 50, 61)  # padded everywhere
    expected = model(images)
    assert torch.equal(GraphExtractNet(model, get_graph_node_names(model)[1][-1:])(images), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), expected)
    sizes = {0: torch.export.Dim("batch", min=1, max=64)}
    if kind == "vitrpb":  # the tiles of neighbourhood attention depend on the map's size, full attention does not
        sizes |= dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (images,), dynamic_shapes={"x": sizes})
    more = torch.randn(3, 3, 50, 61) if kind != "vitrpb" else torch.randn(3, 3, 90, 40)
    torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)


def test_an_exported_program_may_keep_the_size_open():
    """Smaller and larger than traced, and maps smaller than a neighbourhood, which are padded."""
    args = {
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (2, 2),
        "kernel_size": 3,
        "dilations": ((1,), (4,)),
        "num_classes": 3,
    }
    model = randomised(NAT(**args))
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (torch.randn(2, 3, 75, 110),), dynamic_shapes=(free,))
    assert {getattr(node.target, "namespace", "aten") for node in program.graph.nodes if node.op == "call_function"} <= {"aten"}
    for size in [(64, 96), (101, 134), (33, 50)]:
        x = torch.randn(3, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
