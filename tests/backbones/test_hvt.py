"""HVT against the authors' code, and what it says where it has no maps."""

from functools import partial

import golden
import parity
import pytest
import timm
import torch
from torch import Tensor, nn

from backbones.hvt import HVT, PoolBlock
from heads import DensePredictor
from weights.convert import hvt as convert

# Training only, or the authors' global settings that their code ignores (pool_stride) or that say what it does anyway.
IGNORED = ("drop_rate", "attn_drop_rate", "drop_path_rate", "norm_eps", "pool_stride")


def from_official(kwargs: dict) -> HVT:
    """The model that the authors' constructor arguments, and their global settings beside them, describe."""
    names = {"pool_block_width": "pool_every", "pool_kernel_size": "pool_kernel"}
    args = {names.get(key, key): value for key, value in kwargs.items() if key not in IGNORED}
    assert kwargs.get("norm_eps", 1e-6) == 1e-6 and args.pop("qk_scale", None) is None, "no published model has another"
    return HVT(**args)


def tensors_of(model: HVT, image: Tensor) -> dict[str, Tensor]:
    final, tokens = model.forward_intermediates(image)
    return {f"extra/block/{i}": x for i, x in enumerate(tokens)} | {"extra/final_norm": final, "output": model(image)}


@pytest.mark.parametrize("case", golden.cases("hvt", exclude="hvt_op"))
def test_every_stored_tensor_is_reproduced(case):
    parity.check_model(from_official(golden.load(case)[0]["kwargs"]), case, tensors_of)


@pytest.mark.parametrize(("fixture", "case"), parity.cases_of("hvt_op"))
def test_a_pooling_block_and_its_gradients(fixture, case):
    info, tensors = golden.load(fixture)
    kwargs = info["cases"][case]["kwargs"]
    block = PoolBlock(
        tensors[f"{case}/input"].shape[1],
        kwargs["dim"],
        kwargs["num_heads"],
        kwargs.get("pool_kernel_size", 3),
        mlp_ratio=kwargs["mlp_ratio"],
        qkv_bias=kwargs["qkv_bias"],
        norm_layer=partial(nn.LayerNorm, eps=kwargs.get("norm_eps", 1e-6)),
    )
    parity.check_part(block, fixture, case, lambda state: parity.native_names(state, convert, "", ""))


@pytest.mark.parametrize("variant", golden.keys("hvt"))
def test_a_published_model(variant):
    parity.check_published("hvt", variant, {"scale_hvt_ti_4": "hvt_s_4"}.get(variant, variant))


def test_the_model_without_pooling_has_the_papers_size():
    model = timm.create_model("hvt_s_0", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 22.05
    assert not any(isinstance(block, PoolBlock) for block in model.blocks)


@pytest.mark.parametrize(
    ("name", "left"), [("hvt_s_0", 196), ("hvt_s_1", 97), ("hvt_s_2", 48), ("hvt_s_3", 23), ("hvt_s_4", 11)]
)
def test_tokens_left_at_224(name, left):
    model = timm.create_model(name, device="meta").eval()
    assert model.forward_features(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, left, 384)


def test_it_says_that_it_has_no_maps():
    with pytest.raises(ValueError, match="hvt_s_1 gives no feature maps: .*classifies only"):
        timm.create_model("hvt_s_1", features_only=True)
    with pytest.raises(ValueError, match="hvt_s_1 gives no feature maps: .*classifies only"):
        DensePredictor("hvt_s_1", "fpn", 3)
    model = HVT(img_size=64, embed_dim=16, depth=2, num_heads=2)
    with pytest.raises(ValueError, match="no feature maps .NCHW.*output_fmt='NLC'"):
        model.forward_intermediates(torch.zeros(1, 3, 64, 64), output_fmt="NCHW")
    with pytest.raises(ValueError, match="no class token"):
        HVT(global_pool="token")


def test_resized_positions_run_like_a_model_built_for_the_size():
    torch.manual_seed(0)
    kwargs = {"embed_dim": 16, "depth": 4, "num_heads": 2, "pool_every": 2, "num_classes": 3}
    moved = HVT(img_size=96, **kwargs).eval()
    image = torch.randn(1, 3, 64, 144)
    before = moved(image)
    moved.set_input_size((64, 144))
    assert moved.blocks[2].pos_embed.shape == (1, 8, 16)
    torch.testing.assert_close(moved(image), before, atol=1e-5, rtol=1e-5)
