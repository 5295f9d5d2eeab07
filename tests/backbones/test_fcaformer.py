"""FcaFormer against the authors' classification and dense code."""

import golden
import parity
import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones.fcaformer import FcaBlock, FcaFormer
from weights.convert import fcaformer as convert

# Training only: the initial values and stochastic depth; head_init_scale scales the classifier's initial weights.
IGNORED = ("drop_path_rate", "layer_scale_init_value", "head_init_scale", "out_indices")


def from_official(kwargs: dict) -> FcaFormer:
    """The model that the arguments of the authors' classification class, or of their dense class, describe."""
    args = {key: value for key, value in kwargs.items() if key not in IGNORED}
    args["heads"] = args.pop("num_heads")
    if "embed_dims" in args:
        return FcaFormer(dims=args.pop("embed_dims"), memory=args.pop("cab_max_d", 12), **args)
    # The dense class has windows of 14 and 7, those of 224, remembers all blocks, and has no classifier.
    return FcaFormer(img_size=224, feature_dims=args.pop("seg_head_dims"), memory=None, **args | {"num_classes": 0})


def tensors_of(model: FcaFormer, image: Tensor) -> dict[str, Tensor]:
    final, maps = model.forward_intermediates(image)
    if model.feature_norms is not None:
        return {f"output/{i}": x for i, x in enumerate(maps)}
    found = {f"stage/{i}": x for i, x in enumerate(maps)}
    pre_logits = model.forward_head(final, pre_logits=True)
    return found | {"extra/stem": model.patch_embed(image), "extra/pre_logits": pre_logits, "output": model(image)}


@pytest.mark.parametrize("case", golden.cases("fcaformer", exclude="fcaformer_op"))
def test_every_stored_tensor_is_reproduced(case):
    model = from_official(golden.load(case)[0]["kwargs"])
    if model.feature_norms is not None:
        model.head.norm = torch.nn.Identity()  # the dense class has none
    parity.check_model(model, case, tensors_of)


@pytest.mark.parametrize(("fixture", "case"), parity.cases_of("fcaformer_op"))
def test_a_block_and_its_gradients(fixture, case):
    info = golden.load(fixture)[0]["cases"][case]
    kwargs = info["kwargs"]
    size = tuple(kwargs["input_resolution"])
    block = FcaBlock(
        kwargs["dim"],
        kwargs["num_heads"],
        size,
        earlier=min(kwargs["inner_depth"], kwargs["cab_max_d"]),
        leaves=kwargs["s_up"],
        mlp_ratio=kwargs["mlp_ratio"],
        layer_scale=1e-6,
        drop_path=0.0,
    )

    def run(x: Tensor) -> Tensor:
        count = info.get("split", x.shape[1])
        out, leaves = block(x[:, :count].mT.unflatten(2, size), x[:, count:] if count < x.shape[1] else None)
        tokens = out.flatten(2).mT
        return tokens if leaves is None else torch.cat([tokens, leaves], 1)

    names = "layer_2.blocks.0.", "stages.2.blocks.0."
    parity.check_part(block, fixture, case, lambda state: parity.native_names(state, convert, *names), run)


@pytest.mark.parametrize("variant", golden.keys("fcaformer"))
def test_a_published_model(variant):
    parity.check_published("fcaformer", variant, variant)


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("fcaformer_l1", 6.2, 1.37), ("fcaformer_l2", 16.3, 3.60), ("fcaformer_l3", 27.9, 6.65), ("fcaformer_l4", 65.6, 14.49)],
)
def test_parameters_and_macs_are_the_papers(name, params, macs):
    model = timm.create_model(name, device="meta").eval()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == params
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=0.02)


TINY = {"dims": (4, 8, 16, 16), "depths": (1, 1, 3, 2), "heads": (0, 0, 2, 2), "num_classes": 3}


def test_windows_move_between_blocks_and_a_whole_map_is_one_window():
    """A map one token longer than the window is padded first in front, then behind: its ends meet different neighbours."""
    torch.manual_seed(0)
    model = FcaFormer(img_size=64, **TINY).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    image = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        before = model.forward_intermediates(image, intermediates_only=True)[2]
        image[:, :, :, -8:] += 1  # reaches the first tokens only if some window holds both ends
        after = model.forward_intermediates(image, intermediates_only=True)[2]
    assert (after - before)[..., 1:4].abs().max() > 0, "tokens left of the border see the window on its right"


def test_another_native_size_keeps_constant_tables_constant():
    model = FcaFormer(img_size=64, **TINY).eval()
    for stage in model.stages[2:]:
        for block in stage.blocks:
            block.attention_biases.data.fill_(0.5)
    model.set_input_size((96, 128))
    assert model.stages[2].size == (6, 8) and model.stages[2].blocks[2].s_scale_factors.shape == (1, 2 * 2 * 2, 1)
    assert all(block.attention_biases.allclose(torch.tensor(0.5)) for block in model.stages[2].blocks)
    built = FcaFormer(img_size=(96, 128), **TINY)
    state = FcaFormer(img_size=64, **TINY).state_dict()
    built.load_state_dict({name: convert.resize(name, value, built) for name, value in state.items()})
