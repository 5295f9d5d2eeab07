"""What timm and its consumers expect of every model that is registered; a new model is tested the moment it is.

Shapes and names are checked for every name, on the meta device. What must be computed is computed for one model of each kind of
network (`kinds` in tests/families.py), with few blocks, on small images.
"""

import copy
import functools
import importlib.util
import inspect
import math
import re
from pathlib import Path

import families
import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules, group_parameters
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import backbones
import weights

NAMES = backbones.list_models()
CHECKED = [name for name in families.every("kinds") if name in NAMES]
OPEN = ["hvt_s_4", "vit_small_patch14_ttreg_dinov2", "deit_small_irpe_ctx_product_50_shared_qkv"]  # free sizes in ONNX
QUICK = ["swin_t", "lit_s", "poolformer_s12_gn"]  # exported to ONNX in the gate, the others in the slow tests


@functools.cache
def on_meta(name: str) -> nn.Module:
    """The model without memory. Not to be changed: tests share it."""
    return timm.create_model(name, device="meta").eval()


def fewer_blocks(name: str) -> dict:
    """Arguments that leave two blocks to the first and last stage, one to the others; three to a flat model (features)."""
    model = on_meta(name)
    arguments = inspect.signature(type(model).__init__).parameters
    if "depths" in arguments:
        return {"depths": (2, *[1] * (len(model.stages) - 2), 2)}
    return {"depth": 3}


def create(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, **(fewer_blocks(name) | kwargs)).eval()


@pytest.fixture(scope="module", params=CHECKED)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name) -> nn.Module:
    """A model with few blocks. Not to be changed: tests share it."""
    torch.manual_seed(0)
    return noisy(create(name))


def noisy(model: nn.Module) -> nn.Module:
    """Parameters moved off their initial zeros and ones, so that a branch that is lost shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def images(batch: int = 1, height: int = 64, width: int = 96, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height))


def as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def channels_of(features: Tensor) -> int:
    return features.shape[-1 if features.ndim == 3 else 1]


def comparable(name, model, image):
    """(model, image) whose outputs can be compared number by number: where a network divides by sums that come near 0 (SLAB),
    float32 shows the order of summation in the third digit, and float64 does not."""
    return (copy.deepcopy(model).double(), image.double()) if families.family_of(name).float64 else (model, image)


def needs_maps(model: nn.Module) -> None:
    """Skip the test for a model that has no feature maps and says why (`no_maps`)."""
    if reason := getattr(model, "no_maps", None):
        pytest.skip(f"no feature maps: {reason}")


# ---------------------------------------------------------------- every name, shapes only


def test_every_family_has_a_row_that_promises_its_names():
    ours = {}
    for each in NAMES:
        ours.setdefault(families.file_of(each), []).append(each)
    assert ours.keys() == families.FAMILIES.keys(), "a family of backbones/ is one row of tests/families.py"
    for file, row in families.FAMILIES.items():
        assert sorted(row.promised()) == sorted(ours[file]), file
        assert {*row.kinds, *row.free_size, *row.pyramid} <= set(ours[file]) and set(row.free_size) <= set(
            row.kinds or ours[file]
        )
        assert all(families.narrow(each) for each in ours[file]), file


@pytest.mark.parametrize("each", NAMES)
def test_the_configuration_describes_the_model(each):
    model = timm.create_model(each, device="meta").eval()
    cfg = model.default_cfg
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    pooled = model.forward_head(features, pre_logits=True)
    assert model.num_classes == cfg["num_classes"]
    assert channels_of(features) == model.num_features and pooled.shape == (1, model.head_hidden_size)
    assert (features.ndim == 3) == families.gives_tokens(each), "`tokens` in tests/families.py"
    if features.ndim == 4:
        assert tuple(features.shape[2:]) == tuple(cfg["pool_size"])
    assert model.forward_head(features).shape == (1, model.num_classes or model.head_hidden_size)
    names = model.state_dict().keys()
    assert all(f"{conv}.weight" in names for conv in as_tuple(cfg["first_conv"]))
    if cfg["num_classes"]:
        assert all(f"{layer}.weight" in names for layer in as_tuple(cfg["classifier"]))
        classifiers = [model.get_submodule(layer) for layer in as_tuple(cfg["classifier"])]
        assert any(layer is classifiers[0] for layer in as_tuple(model.get_classifier()))
    model.reset_classifier(0)
    assert model.num_classes == 0 and model.forward_head(features).shape == pooled.shape
    model.reset_classifier(7)
    assert model.num_classes == 7 and model.forward_head(features).shape == (1, 7)
    model.reset_classifier(0, "")
    bare = timm.create_model(each, num_classes=0, global_pool="", device="meta").eval()
    unpooled = bare.forward_head(features)
    assert unpooled.ndim == features.ndim and channels_of(unpooled) == model.num_features
    assert model.forward_head(features).shape == unpooled.shape


@pytest.mark.parametrize("each", NAMES)
def test_a_name_is_a_row_of_its_family_and_a_function_of_its_module(each):
    entry = timm.model_entrypoint(each)
    module = importlib.import_module(entry.__module__)
    assert entry.__name__ == each and getattr(module, each) is entry and each in module.__all__
    tables = [table for name, table in vars(module).items() if name.endswith("VARIANTS")]
    (row,) = [table[each] for table in tables if each in table]
    assert isinstance(module.__dict__[each](device="meta", **row), type(on_meta(each)))  # arguments given again change nothing
    assert each in timm.list_models(module=module.__name__.split(".")[-1])


@pytest.mark.parametrize("each", NAMES)
def test_feature_info_describes_the_maps_or_their_absence_is_explained(each):
    if reason := getattr(on_meta(each), "no_maps", None):
        assert list(on_meta(each).feature_info) == []
        with pytest.raises(ValueError, match=f"{each} gives no feature maps: {reason}"):
            timm.create_model(each, features_only=True, device="meta")
        return
    info = on_meta(each).feature_info
    reductions = [entry["reduction"] for entry in info]
    assert len(info) >= 3 and reductions == sorted(reductions)
    assert all(isinstance(on_meta(each).get_submodule(entry["module"]), nn.Module) for entry in info)
    wrapped = timm.create_model(each, features_only=True, device="meta").eval()
    height, width = 96, 128
    maps = wrapped(torch.empty(2, 3, height, width, device="meta"))
    assert [m.shape[1] for m in maps] == wrapped.feature_info.channels()
    for m, reduction in zip(maps, wrapped.feature_info.reduction()):
        assert m.ndim == 4 and m.shape[0] == 2
        assert m.shape[2] <= math.ceil(height / reduction) + 1 and m.shape[3] <= math.ceil(width / reduction) + 1
    assert getattr(wrapped, "output_fmt", "NCHW") in ("NCHW", timm.layers.Format.NCHW)


@pytest.mark.parametrize("each", CHECKED)
def test_features_of_chosen_stages(each):
    needs_maps(on_meta(each))
    info = on_meta(each).feature_info
    last = len(info) - 1
    for indices, expected in [((0, last), [0, last]), ((-1,), [last]), (2, [last - 1, last])]:
        chosen = timm.create_model(each, features_only=True, out_indices=indices, device="meta").eval()
        assert chosen.feature_info.channels() == [info[i]["num_chs"] for i in expected]
        maps = chosen(torch.empty(1, 3, 64, 96, device="meta"))
        assert [m.shape[1] for m in maps] == chosen.feature_info.channels()


@pytest.mark.parametrize("each", NAMES)
def test_layer_groups_and_decay_name_every_parameter_once(each):
    model = on_meta(each)
    names = {name for name, _ in model.named_parameters()}
    assert set(model.no_weight_decay()) <= names
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        grouped = [name for group in groups.values() for name in group]
        assert sorted(grouped) == sorted(names)
        layer = {name: i for i, group in groups.items() for name in group}
        first = [layer[f"{conv}.weight"] for conv in as_tuple(model.default_cfg["first_conv"])]
        assert set(first) == {0}, "the stem is layer 0"
        blocks = [(re.findall(r"\d+", name)[:2], layer[name]) for name in names if re.match(r"(stages|blocks)\.\d+", name)]
        blocks = sorted(([int(n) for n in numbers], i) for numbers, i in blocks)
        assert blocks[0][1] >= 0 and blocks[-1][1] < len(groups)
        if model.num_classes:
            heads = [layer[f"{name}.weight"] for name in as_tuple(model.default_cfg["classifier"])]
            assert set(heads) == {max(groups)}, "the classifier is the last layer"
    by_depth = {}
    fine = group_parameters(model, model.group_matcher(coarse=False))
    for i, group in fine.items():
        for name in group:
            if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.|blocks\.(\d+)\.", name):
                by_depth.setdefault(tuple(int(n) for n in match.groups() if n is not None), set()).add(i)
    assert all(len(layers) == 1 for layers in by_depth.values()), "a block is one layer"
    order = [layers.pop() for _, layers in sorted(by_depth.items())]
    assert order == sorted(order) and len(set(order)) == len(order), "layers follow the depth of the network"


@pytest.mark.parametrize("each", CHECKED)
@pytest.mark.parametrize("channels", [1, 5])
def test_other_input_channels(each, channels):
    model = timm.create_model(each, in_chans=channels, device="meta").eval()
    assert model(torch.empty(1, channels, max(64, model.min_size), 96, device="meta")).shape[0] == 1


@pytest.mark.parametrize("each", NAMES)
def test_a_misspelt_argument_raises(each):
    with pytest.raises(TypeError, match="drop_pth_rate"):
        timm.create_model(each, drop_pth_rate=0.1, device="meta")


NONSENSE = [
    ("drop_path_rate", 1.5),
    ("drop_path_rate", -1),
    ("drop_rate", float("nan")),
    ("proj_drop_rate", 1.0),
    ("in_chans", 0),
    ("in_chans", 2.5),
    ("num_classes", -1),
    ("embed_dim", 0),
    ("embed_dim", -8),
    ("kernel_size", 4),
    ("kernel_size", 0),
    ("pool_size", 2),
    ("patch_size", 0),
    ("window_size", 0),
    ("depth", 0),
    ("depths", (2, 0, 2, 2)),
    ("depths", ()),
    ("dims", (64, -1, 32, 32)),
    ("num_heads", (1, 0, 2, 4)),
    ("heads", "six"),
    ("mlp_ratio", 0),
    ("mlp_ratios", (4, 4, -4, 4)),
]


@pytest.mark.parametrize("each", CHECKED)
def test_nonsense_is_refused_at_creation_with_a_sentence(each):
    taken = inspect.signature(type(on_meta(each)).__init__).parameters
    tried = [(key, value) for key, value in NONSENSE if key in taken or key in ("in_chans", "num_classes")]
    zeros = getattr(type(on_meta(each)), "zeros", ())
    tried = [(key, value) for key, value in tried if not (key in zeros and isinstance(value, tuple) and 0 in value)]
    for key, value in tried:
        with pytest.raises(ValueError, match=rf"{each}: {key} must be .*, got"):
            timm.create_model(each, device="meta", **{key: value})
    assert len(tried) >= 3


# ---------------------------------------------------------------- one model of each kind, computed


@torch.no_grad()
def test_forward_is_head_of_features_and_checkpointing_changes_nothing(name, model):
    model, image = comparable(name, model, images(2))
    out = model(image)
    assert out.shape[0] == 2 and out.isfinite().all()
    torch.testing.assert_close(model.forward_head(model.forward_features(image)), out)
    torch.testing.assert_close(model(image[:1]), out[:1], rtol=1e-3, atol=1e-4)  # no image knows its neighbours in the batch
    model.set_grad_checkpointing(True)
    try:
        torch.testing.assert_close(model(image), out, rtol=1e-4, atol=1e-5)
    finally:
        model.set_grad_checkpointing(False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(name, checkpointing):
    model = create(name, num_classes=42).train()
    model.set_grad_checkpointing(checkpointing)
    out = model(images(2))
    out = out if isinstance(out, Tensor) else torch.cat(as_tuple(out))
    assert out.shape[-1] == (42 if model.num_classes else model.num_features) and out.isfinite().all()
    (out * torch.randn(out.shape)).mean().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_intermediates_end_in_forward_features(name, model):
    needs_maps(model)
    image = images()
    info = model.feature_info
    final, maps = model.forward_intermediates(image)
    torch.testing.assert_close(final, model.forward_features(image))
    assert [m.shape[1] for m in maps] == [entry["num_chs"] for entry in info] and all(m.isfinite().all() for m in maps)
    choices = [2, [0, len(info) - 1], [-1], [0]]
    if type(model).forward_intermediates is not timm.models.VisionTransformer.forward_intermediates:  # it forgets the order
        choices.append([len(info) - 1, 0])
    for indices in choices:
        chosen = [range(len(info))[i] for i in (indices if isinstance(indices, list) else range(-indices, 0))]
        for stop_early in (False, True):
            only = model.forward_intermediates(image, indices=indices, stop_early=stop_early, intermediates_only=True)
            assert len(only) == len(chosen)
            for got, i in zip(only, chosen):
                torch.testing.assert_close(got, maps[i])
    with pytest.raises((ValueError, AssertionError)):
        model.forward_intermediates(image, indices=[len(info) + 3])
    normed = model.forward_intermediates(image, norm=True, intermediates_only=True)
    assert [m.shape for m in normed] == [m.shape for m in maps]


@torch.no_grad()
def test_prefix_tokens_come_beside_the_maps(name, model):
    needs_maps(model)
    image = images(2)
    pairs = model.forward_intermediates(image, return_prefix_tokens=True, intermediates_only=True)
    maps = model.forward_intermediates(image, intermediates_only=True)
    for (got, prefix), expected, entry in zip(pairs, maps, model.feature_info, strict=True):
        assert torch.equal(got, expected)
        assert prefix.shape == (2, entry.get("prefix_tokens", model.num_prefix_tokens), entry["num_chs"])
    assert prefix.shape[1] == model.num_prefix_tokens
    ((_, normed),) = model.forward_intermediates(image, [-1], return_prefix_tokens=True, norm=True, intermediates_only=True)
    if model.num_prefix_tokens:  # the class tokens are those that the head reads
        torch.testing.assert_close(normed, model.forward_features(image)[:, : model.num_prefix_tokens])


@torch.no_grad()
def test_features_only_gives_the_intermediates(name, model):
    needs_maps(model)
    wrapped = create(name, features_only=True)
    weights.load_checkpoint(wrapped, model.state_dict())
    image = images(1, 96, 64)
    maps = model.forward_intermediates(image, indices=list(wrapped.out_indices), intermediates_only=True)
    for got, expected in zip(wrapped(image), maps, strict=True):
        torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_pruning_keeps_what_the_map_needs(name, model):
    needs_maps(model)
    image = images()
    expected = model.forward_intermediates(image, indices=[1], intermediates_only=True)[0]
    pruned = copy.deepcopy(model)
    assert list(pruned.prune_intermediate_layers([1], prune_norm=True, prune_head=True)) == [1]
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(pruned.forward_intermediates(image, indices=[1], intermediates_only=True)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [(75, 110), (64, 33), (101, 134)], ids=str)
def test_any_size_gives_maps_and_logits(name, model, size):
    image = images(2, *size)
    assert model(image).shape[0] == 2 and model(image).isfinite().all()
    needs_maps(model)
    info = model.feature_info
    maps = model.forward_intermediates(image, intermediates_only=True)
    for m, entry in zip(maps, info, strict=True):
        assert m.shape[:2] == (2, entry["num_chs"]) and m.isfinite().all()
        assert all(abs(side - n / entry["reduction"]) <= 2 for side, n in zip(m.shape[2:], size))


@torch.no_grad()
def test_the_smallest_image_runs_and_a_smaller_one_is_named(name, model):
    least = model.min_size
    assert model(images(1, least, least)).isfinite().all()
    if least > 1:
        with pytest.raises(ValueError, match=rf"{least - 1}x{least}.*at least {least} pixels"):
            model(images(1, least - 1, least))
        with pytest.raises(ValueError, match=rf"{least - 1}.*at least {least} pixels"):
            create(name, img_size=least - 1)


def test_set_input_size_moves_the_native_size(name, model):
    if not hasattr(model, "set_input_size"):
        assert "img_size" not in inspect.signature(type(model).__init__).parameters, "a built-in size must be movable"
        return
    moved = copy.deepcopy(model)
    moved.set_input_size(img_size=(96, 128))
    with torch.no_grad():
        assert moved(images(1, 96, 128)).isfinite().all() and moved(images(1, 75, 110)).isfinite().all()
    built = create(name, img_size=(96, 128)).state_dict()
    assert built.keys() == moved.state_dict().keys()
    for key, value in moved.state_dict().items():
        if ".mask_predictor." not in key:  # moved, they keep the rank they were trained with; built, it follows the size
            assert value.shape == built[key].shape, key


def test_state_dict_makes_the_round_trip_to_the_authors_and_back(name, tmp_path):
    """Through a file that says what the authors' do, as a user loads it: pretrained=True and pretrained_cfg_overlay."""
    source = noisy(create(name))
    convert = weights.convert.converter(source)
    official = convert.to_official(source.state_dict(), source)
    assert convert.source_format(official) == "official"
    torch.save({"model": {f"module.{key}": value for key, value in official.items()}}, tmp_path / "file.pth")
    classes = source.num_classes
    overlay = {"file": str(tmp_path / "file.pth"), "num_classes": classes}
    maps = () if getattr(source, "no_maps", None) else ({"features_only": True},)
    for kwargs in ({}, {"num_classes": 5}, {"num_classes": 0}, {"in_chans": 1}, *maps):
        loaded = weights.convert.backbone(create(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs))
        expected = source.state_dict()
        first = {f"{conv}.weight" for conv in as_tuple(source.default_cfg["first_conv"])} if "in_chans" in kwargs else set()
        heads = () if kwargs in ({}, {"in_chans": 1}) else weights.load.classifier_names(source)
        for key, value in loaded.state_dict().items():
            if key not in first and not (heads and key.startswith(heads)):
                torch.testing.assert_close(value, expected[key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")
    image = images()
    with torch.no_grad():
        again = create(name)
        weights.load_checkpoint(again, tmp_path / "file.pth")
        assert torch.equal(again(image), source(image))


@torch.no_grad()
def test_checkpoint_path_takes_the_authors_names(name, tmp_path):
    source = noisy(create(name))
    convert = weights.convert.converter(source)
    image = images()
    for i, state in enumerate((convert.to_official(source.state_dict(), source), source.state_dict())):
        torch.save(state, tmp_path / f"{i}.pth")
        loaded = create(name, checkpoint_path=str(tmp_path / f"{i}.pth"))
        assert torch.equal(loaded(image), source(image))
        with pytest.raises(RuntimeError, match="Missing key"):
            loaded.load_state_dict(dict(list(state.items())[2:]))


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHECKED])
def test_the_plain_onnx_export_at_native_size(name, tmp_path):
    """torch.onnx.export as a user calls it, one image, and onnxruntime on the file; nothing but standard operators."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is checked with onnxruntime, which is not installed")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript, which is not installed")
    torch.manual_seed(0)
    model = noisy(create(name))
    image = torch.randn(1, *model.default_cfg["input_size"])
    program = torch.onnx.export(model, (image,), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    operators = {(node.domain, node.op_type) for node in program.model.graph}
    assert {domain for domain, _ in operators} <= {""} and ("", "DeformConv") not in operators
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = model(image)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(torch.from_numpy(out), expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPEN)
def test_the_plain_onnx_export_takes_every_size(name, tmp_path):
    """torch.onnx.export as a user calls it, with free batch, height and width; onnxruntime and OpenVINO at other sizes."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is checked with onnxruntime, which is not installed")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript, which is not installed")
    torch.manual_seed(0)
    model = noisy(create(name, **families.narrow(name)))
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.onnx.export(model, (images(2, 96, 131),), dynamo=True, dynamic_shapes=(free,), verbose=False)
    program.save(tmp_path / "model.onnx")
    operators = {(node.domain, node.op_type) for node in program.model.graph}
    assert {domain for domain, _ in operators} <= {""} and ("", "DeformConv") not in operators
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    runs = [lambda image: session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]]
    if importlib.util.find_spec("openvino") is not None:
        import openvino

        compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        runs.append(lambda image: list(compiled([image.numpy()]).values())[0])
    for batch, *size in ((3, 75, 110), (1, 160, 95), (2, 224, 241)):
        image = images(batch, *size)
        with torch.no_grad():
            expected = model(image)
        scale = max(1.0, expected.abs().max().item())
        for run in runs:
            torch.testing.assert_close(torch.from_numpy(run(image)), expected, atol=1e-4 * scale, rtol=0)


def test_drop_path_is_random_in_training_only(name):
    torch.manual_seed(0)
    model = noisy(create(name, drop_path_rate=0.5))
    image = images(6)
    with torch.no_grad():
        assert torch.equal(model(image), model(image))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        first, second = (out if isinstance(out, Tensor) else torch.cat(as_tuple(out)) for out in (model(image), model(image)))
        assert not torch.equal(first, second)


def test_fx_tracing_gives_the_same_bits(name, model):
    tracer = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    traced = create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=tracer
    ).eval()
    image = images()
    with torch.inference_mode():
        (out,) = traced(image).values()
        assert torch.equal(out, model(image))


def traces_plainly(model: nn.Module) -> None:
    """torch.fx and torchvision, told nothing of us, trace the model, at another size too, and leave nothing on it."""
    before = set(vars(model)) | set(dict(model.named_modules()))
    traced = torch.fx.symbolic_trace(model)
    train_nodes, nodes = get_graph_node_names(model)
    ends = [train_nodes[0], train_nodes[-1]], [nodes[0], nodes[-1]]
    extractor = create_feature_extractor(model, train_return_nodes=ends[0], eval_return_nodes=ends[1]).eval()
    assert len(nodes) > 20  # the layers, not one node for all of them
    left = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in {**vars(module), **module._buffers}.items()
        if isinstance(value, torch.fx.Proxy)
    ]
    assert not left  # neither a copy nor a cast of the model would work
    with torch.no_grad():
        for image in (images(), images(2, 96, 64)):
            out = model(image)
            assert torch.equal(traced(image), out) and torch.equal(extractor(image)[nodes[-1]], out)
    assert not [name for name in dir(model) if name.startswith("_tensor_constant")], "a tensor of parameters alone is no leaf's"
    assert set(vars(model)) | set(dict(model.named_modules())) == before
    copy.deepcopy(model)


def test_torchvision_feature_extractor_and_plain_fx(name, model):
    """Case torchvision_feature_extractor."""
    traces_plainly(model)


@pytest.mark.slow
@pytest.mark.parametrize("each", NAMES)
def test_torchvision_feature_extractor_and_plain_fx_of_every_name(each):
    traces_plainly(create(each))


@torch.no_grad()
def test_compile_breaks_no_graph(name, model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    image = images()
    torch.testing.assert_close(compiled(image), model(image))


@torch.no_grad()
def test_export_keeps_the_batch_free_and_the_size_where_it_can(name, model):
    free = (0, 2, 3) if name in families.every("free_size") else (0,)
    model, image = comparable(name, model, images(2, 75, 110))
    program = torch.export.export(model, (image,), dynamic_shapes=(dict.fromkeys(free, torch.export.Dim.DYNAMIC),))
    for batch, size in [(3, (75, 110)), *([(2, (96, 64)), (4, (101, 134))] if 2 in free else [])]:
        other = images(batch, *size).to(image)
        torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-4)


def test_the_table_of_the_documentation_names_the_models_with_free_sizes():
    table = (Path(__file__).resolve().parent.parent / "docs" / "export.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:4]] for row in table.splitlines() if row.startswith("| ")]
    free = {name for names, batch, size in rows if size.startswith("free") for name in names.split(", ")}
    assert all(batch == "free" for names, batch, size in rows if names not in ("models", "---"))
    promised = [
        *families.every("free_size"),
        "nat_mini",
        "dinat_mini",
    ]  # these in tests/backbones/test_nat.py, with few channels
    assert {name.split("_")[0] for name in free} == {name.split("_")[0] for name in promised}
    assert all(any(name.startswith(row) for row in free) for name in promised)


def test_double_precision_is_taken_at_creation(name):
    model = create(name, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} <= {torch.float64}
    with torch.no_grad():
        assert model(images().double()).dtype == torch.float64
