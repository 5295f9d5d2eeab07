"""PoolFormer against the authors' code."""

import golden
import pytest
import torch

import weights
from backbones.poolformer import PoolFormer


def from_official(kwargs: dict) -> PoolFormer:
    """The model that the authors' constructor arguments describe."""
    return PoolFormer(
        depths=kwargs["layers"],
        dims=kwargs["embed_dims"],
        mlp_ratios=kwargs["mlp_ratios"],
        pool_size=kwargs.get("pool_size", 3),
        layer_scale=kwargs.get("layer_scale_init_value", 1e-5) if kwargs.get("use_layer_scale", True) else None,
        num_classes=0 if kwargs.get("fork_feat") else kwargs.get("num_classes", 1000),
        feature_norms=kwargs.get("fork_feat", False),
    )


@pytest.mark.parametrize("case", golden.cases("poolformer"))
def test_every_stored_tensor_is_reproduced(case):
    info, tensors = golden.load(case)
    model, dense = from_official(info["kwargs"]).eval(), info["kwargs"].get("fork_feat", False)
    if dense:
        model.norm = torch.nn.Identity()  # the dense code has no final norm
    model.load_state_dict(weights.convert_state_dict(golden.state(tensors), model), strict=True)
    got = {}
    with torch.no_grad():
        final, maps = model.forward_intermediates(tensors["input"])
        got |= {f"stage/{i}": x for i, x in enumerate(maps)}
        if dense:
            got["output"] = torch.cat([x.mean((2, 3)) for x in maps], 1)
        else:
            got |= {"stem": model.patch_embed(tensors["input"]), "normed": final, "output": model(tensors["input"])}
    stored = {key: value for key, value in tensors.items() if key != "input" and not key.startswith("state/")}
    assert stored.keys() <= got.keys()
    for key, value in stored.items():
        torch.testing.assert_close(got[key], value, **golden.tolerance(info), msg=lambda m, key=key: f"{key}: {m}")
