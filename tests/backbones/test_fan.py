"""FAN and TAP-FAN against the authors' code."""

import golden
import parity
import pytest
import timm
import torch
from torch import Tensor, nn

import weights
from backbones.fan import FAN, Block, ChannelProcessing, ClassBlock, TokenMixing, UnbiasedNorm2d
from train.attention_diversity import attention_diversification, reading_attention

# Training only; sr_ratio is 1 everywhere and its layers do not exist; eta is the initial layer scale, 1; class attention norms
# all tokens in every published model.
IGNORED = ("img_size", "drop_rate", "attn_drop_rate", "drop_path_rate", "sr_ratio", "eta", "out_idx", "depth")
IGNORED += ("hybrid_backbone", "tokens_norm")


def from_official(info: dict) -> FAN:
    """The model that the authors' constructor arguments describe; a dense model is one with an out_idx."""
    kwargs = info["kwargs"]
    assert kwargs.get("tokens_norm", True) and set(kwargs.get("sr_ratio", [1])) == {1} and kwargs.get("eta", 1) == 1
    args = {"cls_attn_layers": "class_depth", "num_scales": "scales"}
    args = {args.get(key, key): value for key, value in kwargs.items() if key not in IGNORED}
    depth, dense = kwargs["depth"], "out_idx" in kwargs
    first = kwargs["out_idx"] + 1 if dense else depth
    if hybrid := kwargs.get("hybrid_backbone"):
        args |= {"conv_dims": tuple(hybrid["dims"][:2]), "depths": (*hybrid["depths"], first, depth - first)}
        args.pop("patch_size", None)  # 16 in all: 4 and 2 by the ConvNeXt stages, 2 by the projection
    else:
        args["depths"] = (depth, 0, 0, 0) if depth < 12 else (5, 3, 4, depth - 12)  # the dense code's taps: 4, 7, 11
    return FAN(dense_positions=dense, **args | ({"num_classes": 0} if dense else {}))


def tensors_of(model: FAN, image: Tensor) -> dict[str, Tensor]:
    first = model.stages[2 if model.hybrid else 0].downsample
    reached: dict[str, Tensor] = {}
    hooks = [
        model.stages[-1].class_blocks.register_forward_pre_hook(lambda module, args: reached.update(joined=args[0])),
        first.proj.register_forward_hook(lambda module, args, out: reached.update(embedded=out)),
    ]
    final, maps = model.forward_intermediates(image)
    for hook in hooks:
        hook.remove()
    found = {f"output/{i}": x for i, x in enumerate(maps)} | {"output": model(image), "extra/final_norm_tokens": final}
    found["stage/0"] = reached["joined"][:, 1:].mT.unflatten(2, maps[-1].shape[-2:])
    found["extra/patch_embed"] = reached["embedded"].flatten(2).mT
    found["extra/pos"] = first.positions(reached["embedded"]).expand(len(image), -1, -1, -1)
    with reading_attention(model) as attentions:
        torch.testing.assert_close(model(image), found["output"], atol=1e-5, rtol=1e-5)
    found |= {f"extra/attn/{i}": x for i, x in enumerate(attentions)}
    return found | {"extra/adl_loss_th2": attention_diversification(attentions)[None]}


@pytest.mark.parametrize("case", golden.cases("fan", exclude="fan_op"))
def test_every_stored_tensor_is_reproduced(case):
    info, _ = golden.load(case)
    model = from_official(info)
    if model.num_classes == 0:
        model.norm = nn.Identity()  # the dense code has none
    parity.check_model(model, case, tensors_of)


def part(kwargs: dict) -> nn.Module:
    dim, heads, bias = kwargs["dim"], kwargs["num_heads"], kwargs.get("qkv_bias", False)
    if kwargs["cls"] == "ChannelProcessing":
        return ChannelProcessing(dim, heads, kwargs["mlp_hidden_dim"], bias)
    if kwargs["cls"] == "TokenMixing":
        return TokenMixing(dim, heads, bias, 0.0)
    if kwargs["cls"] == "ClassAttentionBlock":
        return ClassBlock(dim, heads, kwargs["mlp_ratio"], bias)
    return Block(dim, heads, kwargs["mlp_ratio"], bias, kwargs.get("num_scales", 1), 0.0, 0.0)


@pytest.mark.parametrize(("fixture", "case"), parity.cases_of("fan_op"))
def test_parts_and_their_gradients(fixture, case):
    info = golden.load(fixture)[0]["cases"][case]
    module = part(info["kwargs"])

    def run(x: Tensor) -> Tensor:
        out = module(x.unflatten(1, (info["H"], info["W"])))
        return out.permute(0, 3, 1, 2) if info["kwargs"]["cls"] == "TAPFANBlock" else out.flatten(1, 2)

    parity.check_part(module, fixture, case, lambda state: state, run if "H" in info else None)


@pytest.mark.parametrize("variant", golden.keys("fan"))
def test_a_published_model(variant):
    parity.check_published("fan", variant, variant.lower())


TINY = {"embed_dim": 16, "depths": (1, 1, 1, 0), "num_heads": 2, "conv_dims": (8, 12), "num_classes": 3}


def test_early_names_and_a_joint_qkv_load():
    torch.manual_seed(0)
    model = FAN(**TINY)
    official = weights.convert.fan.to_official(model.state_dict(), model)
    old = {key.replace("pos_embed.", "pos_embeder."): value for key, value in official.items()}
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [old.pop(f"cls_attn_blocks.{i}.attn.{letter}.{kind}") for letter in "qkv"]
            old[f"cls_attn_blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    other = FAN(**TINY)
    assert not weights.load_checkpoint(other, old).missing
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_both_norms_of_the_hybrid_stem():
    """The authors' two paths: the variance divided by C, and by C - 1."""
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    norm = UnbiasedNorm2d(5, eps=1e-6).double()
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected)
    torch.manual_seed(0)
    biased, unbiased = FAN(**TINY).eval(), FAN(**TINY, unbiased_stem_norm=True).eval()
    unbiased.load_state_dict(biased.state_dict())
    image = torch.randn(1, 3, 64, 64)
    difference = (biased.patch_embed(image) / unbiased.patch_embed(image)).median().item()
    assert difference == pytest.approx((8 / 7) ** 0.5, rel=1e-3)


def test_the_xlarge_model_halves_its_map_once():
    model = timm.create_model("fan_xlarge_16_p4_hybrid", features_only=True, device="meta").eval()
    maps = model(torch.empty(1, 3, 96, 160, device="meta"))
    assert [tuple(m.shape[1:]) for m in maps] == [(128, 24, 40), (256, 12, 20), (528, 6, 10), (768, 3, 5)]
