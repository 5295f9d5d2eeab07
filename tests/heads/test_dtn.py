"""The layers of Dense Transformer Networks against the authors' TensorFlow code."""

import golden
import pytest
import torch

from heads.dtn import SplineTransform


@pytest.mark.parametrize("case", golden.cases("dtn_"))
def test_matches_the_authors_code(case):
    info, tensors = golden.load(case)
    kwargs, grad = info["kwargs"], info["grad_tolerance"]
    features, decoder = tensors["input/features"].requires_grad_(), tensors["input/decoder_features"].requires_grad_()
    layer = SplineTransform(features.shape[1], kwargs["height"], kwargs["width"], kwargs["control_points_ratio"])
    layer.load_state_dict(golden.state(tensors))
    spline = layer(features)
    torch.testing.assert_close(spline, tensors["stage/T"], **golden.tolerance(info))
    outputs = {"encoder": layer.sample(features, spline), "decoder": layer.restore(decoder, spline)}
    for name, output in outputs.items():
        torch.testing.assert_close(output, tensors[f"output/{name}"], **golden.tolerance(info))
        own = features if name == "encoder" else decoder
        inputs = {f"{name}/{key}": value for key, value in layer.named_parameters()}
        inputs["encoder/features" if name == "encoder" else "decoder/decoder_features"] = own
        found = torch.autograd.grad((output * tensors["input/weight"]).sum(), list(inputs.values()), retain_graph=True)
        for key, value in zip(inputs, found, strict=True):
            if f"grad/{key}" in tensors:
                torch.testing.assert_close(value, tensors[f"grad/{key}"], **grad)


def test_starts():
    """Ours starts at the identity but for the last row and column; the authors' start leaves most of the map empty."""
    x = torch.rand(1, 2, 16, 16) + 1
    identity, authors = (SplineTransform(2, 16, 16, 4, start) for start in ("identity", "authors"))
    places = (identity(x) @ identity.basis.T)[0]
    torch.testing.assert_close(places.T, identity.basis[:, 1:3], atol=2e-3, rtol=0)
    assert (authors.sample(x, authors(x)) == 0).float().mean() > 0.7


def test_another_size_and_too_few_points_are_refused():
    with pytest.raises(ValueError, match="was made for 2 channels of 8x8"):
        SplineTransform(2, 8, 8, 4)(torch.rand(1, 2, 8, 9))
    with pytest.raises(ValueError, match="needs 2x2"):
        SplineTransform(2, 8, 8, 8)
    with pytest.raises(ValueError, match="'identity' or 'authors'"):
        SplineTransform(2, 8, 8, 4, start="zero")
