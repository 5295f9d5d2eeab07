"""SReT against the authors' code, and what it does where that is random."""

import golden
import parity
import pytest
import torch
from torch import Tensor, nn

import weights
import weights.convert.sret
from backbones.sret import Block, GroupAttention, NonProjection, SReT, seeded_permutation, slices

# Training only, or read by nothing (the stem has three convolutions of stride 2 whatever patch_size and stride say).
IGNORED = ("patch_size", "stride", "attn_drop_rate", "drop_rate", "drop_path_rate")


def from_official(kwargs: dict) -> SReT:
    """The model that the authors' constructor arguments describe, sliced or (without groups) not."""
    args = {key: value for key, value in kwargs.items() if key not in IGNORED}
    depth, unique = args.pop("depth"), args.pop("recursive_num")
    args |= {"img_size": args.pop("image_size"), "depths": unique, "loops": [d // u for d, u in zip(depth, unique)]}
    whole = [1] * len(depth)
    return SReT(groups=args.pop("groups1", whole), recursive_groups=args.pop("groups2", whole), **args)


def tensors_of(model: SReT, image: Tensor) -> dict[str, Tensor]:
    final, maps = model.forward_intermediates(image)
    found = {f"stage/{i}": x for i, x in enumerate(maps)}
    pre_logits = model.forward_head(final, pre_logits=True)
    return found | {"extra/stem": model.patch_embed(image), "extra/pre_logits": pre_logits, "output": model(image)}


@pytest.mark.parametrize("case", golden.cases("sret", exclude="sret_op"))
def test_every_stored_tensor_is_reproduced(case):
    info, tensors = golden.load(case)
    model = from_official(info["kwargs"])
    stored = sorted((key for key in tensors if key.startswith("perm/")), key=lambda key: int(key.split("/")[1]))
    model.set_permutations([tensors[key] for key in stored])
    parity.check_model(model, case, tensors_of)


def part(kwargs: dict) -> nn.Module:
    if kwargs["cls"] == "Group_Attention":
        return GroupAttention(kwargs["dim"], kwargs["num_heads"], kwargs.get("qkv_bias", False))
    if kwargs["cls"] == "Transformer_Block":
        return Block(kwargs["dim"], kwargs["num_heads"], kwargs["mlp_ratio"], 0.0, kwargs.get("qkv_bias", False))
    if kwargs["cls"] == "Non_proj":
        return NonProjection(kwargs["dim"], kwargs["mlp_ratio"])
    pool = nn.Sequential()
    outputs = next(value for key, value in kwargs.items() if key.startswith("out"))
    inputs = next(value for key, value in kwargs.items() if key.startswith("in"))
    pool.add_module("conv", nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, groups=inputs))
    return pool


@pytest.mark.parametrize(("fixture", "case"), parity.cases_of("sret_op"))
def test_parts_and_their_gradients(fixture, case):
    info, tensors = golden.load(fixture)
    info = info["cases"][case]
    kwargs, module = info["kwargs"], part(info["kwargs"])
    recursive = info.get("recursive_index", False)
    groups = kwargs.get("num_groups2" if recursive else "num_groups1", 1)
    permutation = tensors.get(f"perm/{case}") if recursive and groups > 1 else None
    attends = kwargs["cls"] in ("Group_Attention", "Transformer_Block")
    run = (lambda x: module(x, groups, permutation)) if attends else None
    parity.check_part(module, fixture, case, lambda state: state, run)


@pytest.mark.parametrize("variant", golden.keys("sret"))
def test_a_published_model(variant):
    parity.check_published("sret", variant, variant)


TINY = {"img_size": 64, "base_dims": (4, 4, 4), "depths": (2, 1, 1), "heads": (1, 2, 4), "num_classes": 3}


def tiny(**kwargs) -> SReT:
    torch.manual_seed(0)
    model = SReT(**TINY | kwargs)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_evaluation_is_deterministic_and_follows_the_seed_training_draws():
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first = tiny()(image)
        assert torch.equal(tiny()(image), first)
        assert not torch.equal(tiny(permutation_seed=1)(image), first)
        model = tiny()
        for module in model.recursions():
            module.train()
        assert not torch.equal(model(image), model(image))


def test_permutations_are_permutations_that_differ_and_can_be_given():
    orders = [seeded_permutation(64, seed, number, torch.device("cpu")) for seed in (0, 1) for number in (0, 1)]
    assert all(torch.equal(order.sort().values, torch.arange(64)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    moved = (orders[0] - torch.arange(64)).abs().float().mean()
    assert 12 < moved < 30, "a random order moves a token by a third of the sequence"
    model, image = tiny(), torch.randn(1, 3, 64, 64)
    expected = model(image)
    model.set_permutations([seeded_permutation(64, 0, number, torch.device("cpu")) for number in (0, 1)])
    assert torch.equal(model(image), expected)
    with pytest.raises(ValueError, match="in 2 passes, got 1"):
        model.set_permutations([orders[0]])
    with pytest.raises(ValueError, match="permutation 0 is of 64 tokens, the map here has 48"):
        model(torch.randn(1, 3, 48, 64))


@pytest.mark.parametrize(("count", "groups"), [(7, 3), (5, 8), (9, 4)])
def test_uneven_slices_hold_every_token_once_and_attend_inside_themselves(count, groups):
    index, exists, places = slices(count, groups, torch.device("cpu"))
    assert torch.equal(index.flatten()[places], torch.arange(count))
    assert torch.equal(index[exists], torch.arange(count))
    assert exists.sum(1).max() - exists.sum(1).min() <= 1
    torch.manual_seed(0)
    attn, x = GroupAttention(8, 2).double(), torch.randn(2, count, 8, dtype=torch.float64)
    expected = torch.cat([attn(x[:, i[e]]) for i, e in zip(index, exists)], 1)
    torch.testing.assert_close(attn(x, groups), expected)


def test_a_file_whose_copies_of_a_block_differ_is_refused():
    model = tiny()
    official = weights.convert.sret.to_official(model.state_dict(), model)
    key = "transformers.0.blocks.2.attn.proj.bias"
    official[key] = official[key] + 1
    with pytest.raises(ValueError, match="differs from the same block's weights"):
        weights.load_checkpoint(model, official)
