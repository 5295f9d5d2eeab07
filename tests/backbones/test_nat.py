"""NAT, DiNAT, DiNAT_s and the isotropic models against the authors' code."""

import golden
import pytest
import torch

import weights
from backbones.nat import NAT


def from_official(info: dict) -> torch.nn.Module:
    """The model that the authors' constructor arguments describe."""
    kwargs = dict(info["kwargs"])
    kwargs.pop("drop_path_rate", None)  # no effect in a fixture, which is made in eval mode
    dense = kwargs.pop("out_indices", None) is not None
    model = NAT(overlap="dinats" not in info["official_class"], feature_norms=dense, **kwargs)
    if dense:
        model.prune_intermediate_layers(len(model.stages), prune_norm=True)  # the dense code has no final norm
    return model


@pytest.mark.parametrize("case", golden.cases("nat", exclude="nat_isotropic"))
def test_every_stored_tensor_is_reproduced(case):
    info, tensors = golden.load(case)
    if "kernel_size" in info["kwargs"] and info["kwargs"]["kernel_size"] is None:
        return
    model = from_official(info).eval()
    model.load_state_dict(weights.convert_state_dict(golden.state(tensors), model), strict=True)
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
