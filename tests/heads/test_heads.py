"""Heads by themselves: any number of levels, what an argument changes, definitions written out as loops."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay

import backbones  # noqa: F401  (registers our models with timm)
import weights
from heads import HEADS, DensePredictor, Head, MultiPredictor, matrix
from heads.base import tensors
from heads.blocks import BatchNorm2d, Pyramid, conv_over, fuse, resize
from heads.depth import DepthRule
from heads.sdt import DySample

ARGS = matrix.NARROW


def maps(levels: int, batch: int = 2) -> list[torch.Tensor]:
    """Sizes that no stride explains: 13, 6, 3, 1, ... by 15, 7, 3, ..."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 8 * (i + 1), max(1, 13 >> i), max(1, 15 >> i), generator=generator) for i in range(levels)]


@pytest.mark.parametrize("levels", range(1, 7))
@pytest.mark.parametrize("name", HEADS)
def test_any_number_of_levels_of_any_size(name, levels):
    if name == "glpn" and levels == 1:
        with pytest.raises(ValueError, match="at least 2"):
            HEADS[name]([8], 3)
        return
    torch.manual_seed(0)
    index = {"index": -1} if name == "fcn" else {}
    channels = HEADS[name].only_channels or 3
    head = HEADS[name]([8 * (i + 1) for i in range(levels)], channels, **ARGS.get(name, {"width": 8}), **index)
    output = head(maps(levels))
    out = head.scores(output)
    assert out.shape[:2] == (2, channels) and out.isfinite().all()
    sum(part.square().mean() for part in [out, *tensors(output)]).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None] == []
    classifiers = head.get_classifier()
    layers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    assert set(layers) <= set(head.modules())


@pytest.mark.parametrize("name", HEADS)
def test_one_image_trains(name):
    """A pooled 1 x 1 map of one image has one value per channel, where batch norm raises by itself."""
    head = HEADS[name]([8, 16, 24], HEADS[name].only_channels or 2, **ARGS.get(name, {"width": 8}))
    assert head.scores(head(maps(3, batch=1))).shape[0] == 1


def test_batch_norm_of_a_single_value_uses_its_running_statistics():
    norm = BatchNorm2d(4).train()
    norm.running_mean += 1
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(norm(x), (x - 1) / (1 + norm.eps) ** 0.5)
    assert norm.num_batches_tracked == 0
    torch.testing.assert_close(norm(x.expand(2, -1, -1, -1)), F.batch_norm(x.expand(2, -1, -1, -1), None, None, training=True))


def test_pyramid_quadruples_doubles_keeps_and_halves():
    pyramid = Pyramid([24, 24, 24, 24])
    out = pyramid([torch.randn(1, 24, 3, 5)] * 4)
    assert [tuple(m.shape[-2:]) for m in out] == [(12, 20), (6, 10), (3, 5), (2, 3)]
    assert [m.shape[1] for m in out] == pyramid.channels
    assert pyramid([torch.randn(1, 24, 1, 1)])[3].shape[-2:] == (1, 1)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_conv_over_maps_is_the_convolution_of_the_resized_maps(kernel, align_corners):
    """Outputs and gradients; also of a map as large as the first, of a larger one, and of one of a single pixel."""
    torch.manual_seed(0)
    sizes = [(5, 13, 15), (7, 6, 7), (3, 13, 15), (4, 3, 4), (2, 1, 1), (3, 14, 17)]
    inputs = [torch.randn(2, *size, requires_grad=True) for size in sizes]
    conv = torch.nn.Conv2d(24, 6, kernel, padding=kernel // 2)
    leaves = [*inputs, *conv.parameters()]
    got, want = conv_over(conv, inputs, align_corners), conv(fuse(inputs, align_corners))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # 1e-6 seen
    grad = torch.randn_like(want)
    for ours, theirs in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad)):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-5)  # 4e-5 seen, on sums of 390 products


def test_conv_over_maps_in_half_precision_is_as_close_as_the_convolution_itself():
    torch.manual_seed(0)
    inputs, conv = [torch.randn(1, 8, 12, 16), torch.randn(1, 8, 6, 8)], torch.nn.Conv2d(16, 4, 3, padding=1)
    want = conv(fuse(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = conv_over(conv, inputs), conv(fuse(inputs))
    assert got.dtype == plain.dtype == torch.bfloat16
    assert (got - want).abs().max() < 2 * (plain - want).abs().max()


def test_fcn_concatenates_its_input_under_the_published_name():
    head = HEADS["fcn"]([8, 16], 3, width=4, depth=2, index=0, concat_input=True).eval()
    assert {"conv_cat.conv.weight", "conv_cat.bn.weight"} <= head.state_dict().keys()
    x = torch.randn(1, 8, 5, 6)
    want = head.conv_seg(head.conv_cat(torch.cat([x, head.convs(x)], dim=1)))
    torch.testing.assert_close(head([x, None]), want)


def test_fpn_without_smoothing_convolutions_has_only_laterals_in_its_pyramid():
    head = HEADS["fpn"]([8, 16], 3, width=8, head_width=8, smooth=False).eval()
    assert not [name for name in head.state_dict() if name.startswith("fpn_convs")]
    assert head(maps(2)).shape == (2, 3, 13, 15)


def test_fcn_refuses_a_map_that_is_not_there():
    with pytest.raises(ValueError, match="index is 5; with 2 maps use -2 to 1"):
        HEADS["fcn"]([8, 8], 2, index=5)


# DPT


@pytest.mark.parametrize(
    "wrong", [{"readout": "cls"}, {"fusion": "x2"}, {"predictor": "depths"}, {"factors": (1,)}, {"reassemble": (8,)}]
)
def test_dpt_refuses_wrong_arguments_in_words(wrong):
    with pytest.raises(ValueError, match=f"dpt: {next(iter(wrong))}"):
        HEADS["dpt"]([8, 8, 8, 8], 1, one_scale=True, **wrong)


def test_dpt_readout_without_prefix_tokens_says_so():
    with pytest.raises(ValueError, match="needs prefix tokens"):
        HEADS["dpt"]([8, 8], 1, width=8, one_scale=True, readout="project")([torch.randn(1, 8, 4, 4)] * 2)
    with pytest.raises(ValueError, match="no prefix tokens"):
        DensePredictor("test_resnet", "dpt", 1, {"one_scale": True, "readout": "add"})


@pytest.mark.parametrize("readout", ["project", "add"])
@pytest.mark.parametrize("name, read", [("pit_ti", 3), ("pit_ti_distilled", 3), ("cvt_13", 1), ("lit_ti", 1)])
def test_dpt_reads_the_class_tokens_of_staged_backbones(name, read, readout):
    """PiT has them in every stage; CvT and LIT-Ti in the last, so their other maps are used as they are."""
    depths = {"depths": (1, 1, 1, 1) if name == "lit_ti" else (1, 1, 1)}
    torch.manual_seed(0)
    model = DensePredictor(name, "dpt", 2, {"width": 8, "readout": readout}, backbone_args=depths).eval()
    counts = model.backbone.prefix_counts
    assert [count > 0 for count in counts] == [False] * (len(counts) - read) + [True] * read
    assert [unit.how for unit in model.head.reassembles] == [readout if count else "ignore" for count in counts]
    image = torch.randn(1, 3, 64, 96)
    out = model(image)
    assert out.shape == (1, 2, 64, 96)
    token = model.backbone.model.get_parameter("cls_token" if name.startswith("pit") else f"stages.{len(counts) - 1}.cls_token")
    with torch.no_grad():
        token.add_(1)
    blind = DensePredictor(name, "dpt", 2, {"width": 8}, backbone_args=depths).eval()
    assert not torch.allclose(model(image), out) and blind(image).shape == out.shape  # the default reads no token
    grad = torch.autograd.grad(model(image).square().mean(), list(model.parameters()), allow_unused=True)
    assert not [key for (key, _), g in zip(model.named_parameters(), grad, strict=True) if g is None]


def test_dpt_reads_the_class_token_of_a_vit():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 32, 48)
    for readout in ("add", "project"):
        model = DensePredictor("test_vit", "dpt", 1, {"width": 8, "readout": readout}).eval()
        before = model(images)
        with torch.no_grad():
            model.backbone.model.cls_token += 1
        assert not torch.equal(model(images), before)
    assert model.backbone.prefix_tokens


def test_dpt_sizes():
    images = [torch.randn(1, 8, 3, 5)] * 4
    shape = HEADS["dpt"]([8] * 4, 1, width=8, one_scale=True)(images).shape
    assert shape == (1, 1, 48, 80), "16 pixels a token"
    shape = HEADS["dpt"]([8] * 4, 1, width=8, one_scale=True, patch_size=14)(images).shape
    assert shape == (1, 1, 42, 70)
    shape = HEADS["dpt"]([8] * 4, 5, width=8, one_scale=True, predictor="linear", fusion="double")(images).shape
    assert shape == (1, 5, 32, 48), "exact doubling of the halved map, whose size was rounded up"


# SDT


def test_dysample_starts_as_bilinear_doubling():
    x = torch.randn(2, 8, 5, 7)
    model = DySample(8, groups=2)
    torch.nn.init.zeros_(model.offset.weight)
    torch.testing.assert_close(model(x), F.interpolate(x, scale_factor=2, mode="bilinear"), rtol=1e-5, atol=1e-5)


def test_dysample_places_samples_exactly_in_half_precision():
    model = DySample(8, groups=2)
    torch.nn.init.zeros_(model.offset.weight)
    x = torch.arange(300.0).repeat(1, 8, 2, 1) / 300
    want = F.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), want, rtol=0, atol=2**-8)  # half a bfloat16 step of 1


def test_dysample_survives_nan():
    """grid_sample's backward ends the process on a NaN position; a diverged run should end with a NaN loss instead."""
    x = torch.full((1, 8, 4, 4), torch.nan, requires_grad=True)
    DySample(8)(x).sum().backward()
    assert x.grad.shape == x.shape


def test_sdt_weighs_its_layers():
    head = HEADS["sdt"]([8, 8], 1, width=8).eval()
    x, y = torch.randn(1, 8, 3, 4), torch.randn(1, 8, 3, 4)
    with torch.no_grad():
        head.weighted_fusion.layer_weights.copy_(torch.tensor([50.0, -50.0]))  # softmax: the first alone
    torch.testing.assert_close(head([x, y]), head([x, torch.zeros_like(y)]))


# Depth


def test_depth_rules():
    x = torch.tensor([[-2.0, 3.0]])[..., None, None].transpose(0, 1)  # 2 1 1 1
    assert DepthRule("relu", min_depth=0.001)(x).flatten().tolist() == pytest.approx([0.001, 3.001])
    assert DepthRule("relu", signed=True)(x).flatten().tolist() == [-2.0, 3.0]
    torch.testing.assert_close(DepthRule("sigmoid", max_depth=80.0)(x), 80 * x.sigmoid())
    torch.testing.assert_close(DepthRule("softplus", min_depth=0.5)(x), 0.5 + F.softplus(x))
    assert DepthRule("invert", scale=0.5, shift=0.1)(x).flatten().tolist() == pytest.approx([10.0, 1 / 1.6])
    assert DepthRule("invert")(x).flatten()[0].item() == pytest.approx(1e8), "floored, not infinite"


@pytest.mark.parametrize(("name", "middle"), [("bins", 5.5), ("log_bins", 10**0.5)])
def test_bins_are_an_expectation_inside_the_range(name, middle):
    rule = DepthRule(name, min_depth=1.0, max_depth=10.0, bins=3)
    assert rule.channels == 3 and rule.centres(torch.zeros(1)).flatten().tolist() == pytest.approx([1.0, middle, 10.0])
    one_hot = torch.tensor([-1.0, 1e6, -1.0])[None, :, None, None]
    assert rule(one_hot).item() == pytest.approx(middle, rel=1e-4)
    uniform = rule(torch.zeros(1, 3, 1, 1)).item()
    assert uniform == pytest.approx((1.0 + middle + 10.0) / 3)
    with pytest.raises(ValueError, match="reads 3 channels, the head gives 1"):
        rule(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("wrong", [{"name": "log"}, {"min_depth": 5.0, "max_depth": 5.0}, {"name": "log_bins"}])
def test_senseless_depth_rules_are_refused(wrong):
    with pytest.raises(ValueError):
        DepthRule(**wrong)


# Predictors


def test_the_auxiliary_output_is_for_training_only():
    torch.manual_seed(0)
    model = DensePredictor("test_resnet", "fpn", 4, {"width": 8}, aux_head="fcn", aux_args={"width": 8})
    images = torch.randn(2, 3, 64, 96)
    out = model.train()(images)
    assert {name: tuple(value.shape) for name, value in out.items()} == dict.fromkeys(["main", "aux"], (2, 4, 64, 96))
    assert torch.equal(model.eval()(images), model.outputs(images)["main"])
    assert list(DensePredictor("test_resnet", "linear", 4)(images)) == ["main"]
    with pytest.raises(TypeError, match="without an aux_head"):
        DensePredictor("test_resnet", "linear", 4, aux_args={"width": 8})


class Queries(Head):
    """A throw-away head of named outputs: each query has a mask and class logits, after every layer."""

    pyramid = True
    returns_names = True

    def __init__(self, channels, out_channels, queries=3, layers=2):
        super().__init__()
        self.masks = torch.nn.ModuleList(torch.nn.Conv2d(channels[0], queries, 1) for _ in range(layers))
        self.classes = torch.nn.Parameter(torch.randn(layers, queries, out_channels))

    def get_classifier(self):
        return self.masks[-1], self.masks[0]

    def forward(self, maps):
        layers = [{"masks": mask(maps[0]), "classes": c} for mask, c in zip(self.masks, self.classes, strict=True)]
        return layers[-1] | {"layers": layers[:-1]}

    def scores(self, output):
        return torch.einsum("bnhw,nk->bkhw", output["masks"], output["classes"])


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_a_head_of_named_outputs_keeps_them_in_training_and_scores_in_evaluation(backbone):
    torch.manual_seed(0)
    model = DensePredictor(backbone, Queries, 4, aux_head="fcn", aux_args={"width": 8})
    images = torch.randn(2, 3, 40, 72)
    out = model(images)
    assert set(out) == {"main", "aux"} and out["aux"].shape == (2, 4, 40, 72)
    assert out["main"]["size"] == model.backbone.padded_size(40, 72)
    assert out["main"]["masks"].shape[1] == 3 and out["main"]["masks"].shape[-1] < 72, "at the head's own size"
    sum(tensor.square().mean() for tensor in tensors(out)).backward()
    assert [name for name, p in model.head.named_parameters() if p.grad is None] == []
    model.eval()
    main = model.outputs(images)["main"]
    whole = resize(torch.einsum("bnhw,nk->bkhw", main["masks"], main["classes"]), like=main["size"])
    assert torch.equal(model(images), whole[..., :40, :72]) and len(model.get_classifier()) == 2


def test_the_matrix_and_several_heads_take_a_head_of_named_outputs(monkeypatch):
    monkeypatch.setitem(HEADS, "queries", Queries)
    monkeypatch.setitem(matrix.NARROW, "queries", {"layers": 3})
    assert matrix.row("test_resnet", heads=["queries", "linear"]) == {"queries": "ok", "linear": "ok"}
    model = MultiPredictor("test_resnet", {"parts": ("queries", 4, {}), "depth": ("linear", 1, {})})
    images = torch.randn(2, 3, 64, 96)
    assert set(model(images)["parts"]) == {"main"} and set(model(images)["depth"]) == {"main"}
    assert {name: tuple(x.shape) for name, x in model.eval()(images).items()} == {
        "parts": (2, 4, 64, 96),
        "depth": (2, 1, 64, 96),
    }


def test_a_head_without_its_protocol_says_what_is_missing():
    class Silent(Queries):
        scores = Head.scores
        get_classifier = Head.get_classifier

    model = DensePredictor("test_resnet", Silent, 4).eval()
    with pytest.raises(
        NotImplementedError, match="Silent returns masks, classes, layers, size: scores\\(\\) must make B K h w"
    ):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(NotImplementedError, match="Silent does not say which layer"):
        model.get_classifier()
    with pytest.raises(TypeError, match="derives from heads.Head"):
        DensePredictor("test_resnet", torch.nn.Identity, 4)


def test_several_heads_share_one_backbone():
    model = MultiPredictor(
        "test_vit", {"mask": ("upernet", 5, {"width": 8}), "depth": ("dpt", 1, {"width": 8, "readout": "project"})}
    )
    images = torch.randn(2, 3, 40, 56)
    out = {name: value["main"] for name, value in model(images).items()}
    assert {name: tuple(value.shape) for name, value in out.items()} == {"mask": (2, 5, 40, 56), "depth": (2, 1, 40, 56)}
    sum(value.mean() for value in out.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert {name: value.shape for name, value in model.eval()(images).items()} == {name: x.shape for name, x in out.items()}
    with pytest.raises(ValueError, match="needs a head"):
        MultiPredictor("test_vit", {})


def test_layer_decay_groups_the_backbone_by_depth_and_the_head_last():
    model = DensePredictor("test_vit", "linear", 2)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    blocks = [scale[id(names[f"backbone.model.blocks.{i}.mlp.fc1.weight"])] for i in (0, 3)]
    assert scale[id(names["backbone.model.patch_embed.proj.weight"])] < blocks[0] < blocks[1] < 1.0
    assert scale[id(names["head.predict.weight"])] == 1.0
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(names["backbone.model.pos_embed"])] == 0.0


def test_checkpointing_changes_no_number():
    torch.manual_seed(0)
    model = DensePredictor("test_vit", "linear", 2).train()
    images = torch.randn(1, 3, 32, 32)
    plain = model(images)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images), plain)  # named outputs, compared one by one


def test_a_copy_is_independent():
    model = DensePredictor("test_vit", "dpt", 1, {"width": 8}).eval()
    images = torch.randn(1, 3, 32, 48)
    before, other = model(images), copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(model(images), before) and not torch.equal(other(images), before)


def test_resize_leaves_a_tensor_of_the_right_size_alone():
    x = torch.randn(1, 2, 4, 6)
    assert resize(x, like=torch.zeros(1, 9, 4, 6)) is x and resize(x, like=(8, 3)).shape == (1, 2, 8, 3)


def test_export_has_no_data_dependent_control_flow():
    model = DensePredictor("test_vit", "linear", 3).eval()
    images = torch.randn(1, 3, 40, 56)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)


# Files


def published(classes: int = 4) -> tuple[DensePredictor, dict]:
    """A predictor and its weights as mmsegmentation would have written them."""
    torch.manual_seed(0)
    model = DensePredictor("test_resnet", "upernet", classes, {"width": 8}, aux_head="fcn", aux_args={"width": 8})
    state = weights.convert.converter(model).to_official(model.state_dict(), model)
    return model, {"state_dict": {name: value.clone() for name, value in state.items()}, "meta": {}}


def test_a_dense_file_fills_backbone_head_and_auxiliary_head():
    model, file = published()
    other = DensePredictor("test_resnet", "upernet", 4, {"width": 8}, aux_head="fcn", aux_args={"width": 8})
    report = weights.load_checkpoint(other, file)
    assert report.format == "official-dense" and not report.unexpected
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    weights.load_checkpoint(
        DensePredictor("test_resnet", "upernet", 4, {"width": 8}), file
    )  # an auxiliary head may be left out


def test_a_dense_file_with_another_head_is_refused_or_fills_the_backbone():
    _, file = published()
    for head, args in (("segformer", {"width": 8}), ("upernet", {"width": 16})):
        model = DensePredictor("test_resnet", head, 4, args)
        with pytest.raises(ValueError, match="strict=False|other shapes"):
            weights.load_checkpoint(model, file)
    model = DensePredictor("test_resnet", "segformer", 4, {"width": 8})
    report = weights.load_checkpoint(model, file, strict=False)
    assert any(name.startswith("decode_head.") for name in report.unexpected) and report.untouched
    backbone = {f"backbone.{name}": value for name, value in model.backbone.model.state_dict().items()}
    assert all(torch.equal(value, file["state_dict"][name]) for name, value in backbone.items())


def test_a_classifier_of_another_size_is_dropped_when_asked():
    _, file = published(classes=4)
    model = DensePredictor("test_resnet", "upernet", 7, {"width": 8})
    with pytest.raises(ValueError, match="other shapes"):
        weights.load_checkpoint(model, file)
    report = weights.load_checkpoint(model, file, strict=False)
    assert report.dropped["head.conv_seg.weight"] == ((4, 8, 1, 1), (7, 8, 1, 1))
    assert torch.equal(model.head.bottleneck.conv.weight, file["state_dict"]["decode_head.bottleneck.conv.weight"])
