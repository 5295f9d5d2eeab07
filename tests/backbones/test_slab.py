"""SLAB against the authors' code, in all its hosts."""

import golden
import parity
import pytest
import torch
from torch import Tensor, nn

import backbones
import weights
from backbones.flatten import ReducedLinearAttention, StripeLinearAttention, WindowLinearAttention
from backbones.prepbn import Affine, PRepBN, RepBN
from backbones.slab import MapLinearAttention, SlabCSwin, SlabDeiT, SlabPVT, SlabSwin, merge

IGNORED = ("drop_rate", "attn_drop_rate", "drop_path_rate", "qk_scale", "norm_eps", "use_checkpoint", "norm", "focusing_factor")
REBUILT = ("relative_position_index", "attn_mask")
HOSTS = [name for name in golden.cases("slab") if not isinstance(name, str) or not name.startswith("slab_op")]


def from_official(info: dict) -> nn.Module:
    """The model that the authors' constructor arguments describe."""
    names = {"embed_dims": "dims", "depth": "depths"}
    args = {names.get(key, key): value for key, value in info["kwargs"].items() if key not in IGNORED}
    source = info["source"]["file"]
    if "deit" in source:
        args["depths"] = (args["depths"], 0, 0, 0)
        bare = info["kwargs"].get("norm") == "RepBN"
        return SlabDeiT(linear="slab_deit" in source, norm="repbn" if bare else "prepbn", **args)
    if "detection" in source:
        args.pop("window_size")  # of the softmax blocks, always 7
        return SlabSwin(feature_norms=True, num_classes=0, **args)
    if "cswin" in source:
        args["la_split_size"] = [int(side) for side in args["la_split_size"].split("-")]
        return SlabCSwin(split_at=args["img_size"], **args)
    if "pvt" in source:
        args["la_sr_ratios"] = [int(ratio) for ratio in args["la_sr_ratios"]]
        return SlabPVT(**args)
    softmax = {} if "attn_type" in args else {"attn_type": "S" * len(args["depths"]), "norm": "repbn"}
    if softmax:
        args.pop("window_size")
    return SlabSwin(**args, **softmax)


def tensors_of(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    final, maps = model.forward_intermediates(image)
    found = {f"stage/{i}": x for i, x in enumerate(maps)} | {f"output/{i}": x for i, x in enumerate(maps)}
    found |= {"extra/final_norm": final, "output": model(image)}
    if isinstance(model, SlabDeiT):
        found |= {"stage/0": maps[-1], "extra/final_norm": final if final.ndim == 3 else final.flatten(2).mT}
    elif model.norm_kind == "repbn":
        found["extra/output_merged_corrected"] = merge(model)(image)
        found["extra/output_merged_by_authors"] = merge(model, authors=True)(image)
    return found


@pytest.mark.parametrize("case", HOSTS)
def test_every_stored_tensor_is_reproduced(case):
    info, _ = golden.load(case)
    model = from_official(info)
    if model.feature_norms is not None:
        model.norm = nn.Identity()  # the detection code has none
    parity.check_model(model, case, tensors_of, ignored=(*REBUILT, ".scale"))


@pytest.mark.parametrize(("fixture", "case"), parity.cases_of("slab_op_prepbn"))
def test_the_norms_their_gradients_and_counters(fixture, case):
    info, tensors = golden.load(fixture)
    kwargs = info["cases"][case]["kwargs"]
    if kwargs["cls"] == "RepBN":
        norm = RepBN(kwargs["channels"])
    else:
        norm = PRepBN(nn.LayerNorm(kwargs["dim"], eps=kwargs["ln_eps"]), kwargs["step"], kwargs.get("warm", 0))
    parity.check_part(norm, fixture, case, lambda state: state)
    for key, value in golden.state(tensors, f"{case}/after/").items():
        torch.testing.assert_close(norm.state_dict()[key], value, atol=1e-6, rtol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("fixture", "case"), parity.cases_of("slab_op_attention"))
def test_attentions_and_their_gradients(fixture, case):
    info, tensors = golden.load(fixture)
    kwargs = info["cases"][case]["kwargs"]
    dim, heads = kwargs["dim"], kwargs["num_heads"]
    linear = {"kernel_size": kwargs.get("kernel_size", 5), "focusing": None}
    host = kwargs["cls"].split(".")[0]
    if host == "slab_cswin":
        side = kwargs["resolution"]
        module = StripeLinearAttention(dim, heads, (None, kwargs["split_size"]), (side, kwargs["split_size"]), **linear)
    elif host == "slab_pvt":
        grid = side = (kwargs["H"], kwargs["W"])
        norm = lambda dim, eps: PRepBN(nn.LayerNorm(dim, eps=1e-6), 1000)  # noqa: E731
        module = ReducedLinearAttention(dim, heads, grid, kwargs["qkv_bias"], kwargs["sr_ratio"], norm, **linear)
    elif host == "slab_deit":
        side = 14
        module = MapLinearAttention(dim, heads, (side, side), kwargs["qkv_bias"])
    else:
        side = kwargs["window_size"][0]
        module = WindowLinearAttention(dim, heads, side, False, None, kwargs["qkv_bias"], **linear)

    def run(x: Tensor) -> Tensor:
        size = side if isinstance(side, tuple) else (side, side)
        return module(*x.unflatten(2, size)).flatten(1, 2) if x.ndim == 4 else module(x.unflatten(1, size)).flatten(1, 2)

    def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if key != "scale"}  # CSwin's holds one and does not use it

    parity.check_part(module, fixture, case, translate, run)


@pytest.mark.parametrize("variant", golden.keys("slab"))
def test_a_published_model(variant):
    name = variant if variant.startswith("slab_") else f"slab_{variant}"
    if variant.startswith("slab_deit"):  # they count a class token that their sequence lacks
        return parity.check_published("slab", variant, name, more={"t": 192, "s": 384}[variant[-1]])
    parity.check_published("slab", variant, name, ignored=(*REBUILT, ".scale"), uncounted=(".scale",))


TINY = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "num_classes": 3}


def test_the_schedule_counts_steps_and_goes_on_from_a_state_dict():
    torch.manual_seed(0)
    model = SlabSwin(**TINY, norm_steps=4, norm_warm=1).train()
    norm = model.stages[0].blocks[0].norm1
    seen = []
    for step in range(7):
        if step == 3:
            state = model.state_dict()
            model = SlabSwin(**TINY, norm_steps=4, norm_warm=1).train()
            model.load_state_dict(state)
            norm = model.stages[0].blocks[0].norm1
        model.set_grad_checkpointing(step == 2)
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        seen.append("LayerNorm" if norm.warming else round(float(norm.share), 2))
    assert seen == ["LayerNorm", 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    model.set_norm_schedule(10, step=4)
    assert [int(norm.warm), int(norm.iter), int(norm.total_step)] == [0, 6, 10]
    with pytest.raises(ValueError, match="norm_steps must be at least 1"):
        model.set_norm_schedule(0)
    with pytest.raises(ValueError, match="norm must be 'prepbn' or 'repbn'"):
        SlabSwin(**TINY, norm="bn")


def test_a_step_may_have_many_forwards_and_the_schedule_may_end_with_the_run():
    torch.manual_seed(0)
    model = SlabSwin(**TINY, norm_steps=None, norm_warm=1).train()
    norms, x = model.scheduled(), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="without a number of steps needs the run's"):
        model(x)
    seen = []
    for step in range(5):
        for norm in norms:
            norm.begin_step(step, 5)
        for _ in range(3):
            model(x)
        seen.append({"LayerNorm" if norm.warming else float(norm.share) for norm in norms})
    assert seen == [{"LayerNorm"}, {1.0}, {0.75}, {0.5}, {0.25}]
    with pytest.warns(UserWarning, match="has 9 steps of its schedule left and the run 3"):
        PRepBN(nn.LayerNorm(4), 9).begin_step(0, 3)


@pytest.mark.parametrize("kind", ["prepbn", "repbn"])
def test_merged_and_fused_models_give_the_same(kind):
    torch.manual_seed(0)
    model = SlabSwin(**TINY, norm=kind).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.add_(0.2 * torch.rand_like(tensor))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(merge(model)(image), model(image), atol=2e-6, rtol=1e-5)
        odd = torch.randn(2, 3, 75, 110)
        fused = backbones.fuse(model)
        torch.testing.assert_close(fused(odd), model(odd), atol=1e-5, rtol=1e-5)
    assert any(isinstance(module, Affine) for module in fused.modules())
    assert not any(isinstance(module, (PRepBN, RepBN)) for module in merge(model).modules())
    with pytest.raises(ValueError, match="use backbones.fuse"):
        merge(nn.Linear(2, 2))


def test_both_forms_of_the_norms_load_into_both_models():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 32)
    models = {kind: SlabSwin(**TINY, norm=kind).eval() for kind in ("prepbn", "repbn")}
    for source in models.values():
        official = weights.convert.slab.to_official(source.state_dict(), source)
        for target in models:
            other = SlabSwin(**TINY, norm=target).eval()
            report = weights.load_checkpoint(other, official)
            assert not report.missing
            torch.testing.assert_close(other(image), source(image))
