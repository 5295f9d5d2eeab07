"""Mask2Former against the authors' code."""

import golden
import pytest
import torch

from heads.mask2former import DeformableAttention, Mask2Former, PixelDecoder, QueryDecoder

CASES = golden.cases("mask2former_", exclude="mask2former_criterion")


def close(actual, expected, info):
    torch.testing.assert_close(actual, expected, **golden.tolerance(info))


def check_outputs(output, tensors, info):
    for name, value in tensors.items():
        if not name.startswith("output/") or name == "output/semantic":
            continue
        parts = name.split("/")[1:]
        found = output["aux"][int(parts[0].removeprefix("aux_"))] if parts[0].startswith("aux_") else output
        close(found[parts[-1]], value, info)


@pytest.mark.parametrize("case", [c for c in CASES if not isinstance(c, str) or "inference" not in c])
def test_matches_the_authors_code(case):
    info, tensors = golden.load(case)
    kwargs, state = info["kwargs"], golden.state(tensors)
    inputs = {name.removeprefix("input/"): value for name, value in tensors.items() if name.startswith("input/")}
    maps = [inputs[f"res{i}"] for i in range(2, 6) if f"res{i}" in inputs]
    match info["official_class"].split()[0]:
        case "MSDeformAttn":
            model = DeformableAttention(kwargs["dim"], kwargs["heads"], kwargs["levels"], kwargs["points"])
            model.load_state_dict(state)
            query, value = inputs["query"].requires_grad_(), inputs["value"].requires_grad_()
            output = model(query, value, inputs["reference"], [tuple(shape) for shape in kwargs["shapes"]])
            close(output, tensors["output"], info)
            (output * inputs["weight"]).sum().backward()
            close(query.grad, tensors["grad/query"], info)
            close(value.grad, tensors["grad/value"], info)
        case "MSDeformAttnPixelDecoder":
            sizes = (kwargs[key] for key in ("in_channels", "conv_dim", "mask_dim", "heads", "ffn", "enc_layers", "points"))
            model = PixelDecoder(*sizes)
            model.load_state_dict(state)
            features, levels = model(maps)
            close(features, tensors["output/mask_features"], info)
            for i, level in enumerate(levels):
                close(level, tensors[f"output/level_{i}"], info)
        case "MultiScaleMaskedTransformerDecoder":
            names = (
                "in_channels",
                "num_classes_without_void",
                "hidden_dim",
                "mask_dim",
                "num_queries",
                "heads",
                "ffn",
                "layers",
            )
            model = QueryDecoder(*(kwargs[key] for key in names), 3, kwargs["input_project"])
            model.load_state_dict(state)
            check_outputs(model(inputs["mask_features"], [inputs[f"level_{i}"] for i in range(3)]), tensors, info)
        case "MaskFormerHead":
            model = Mask2Former(
                kwargs["in_channels"],
                kwargs["num_classes_without_void"],
                width=kwargs["conv_dim"],
                mask_width=kwargs["mask_dim"],
                queries=kwargs["num_queries"],
                heads=kwargs["heads"],
                encoder_layers=kwargs["enc_layers"],
                encoder_ffn=kwargs["ffn"],
                decoder_layers=kwargs["layers"],
                decoder_ffn=kwargs["decoder_ffn"],
            )
            model.load_state_dict(state)
            output = model(maps)
            check_outputs(output, tensors, info)
            close(model.scores(output | {"size": kwargs["image_size"]}), tensors["output/semantic"], info)
        case other:
            pytest.fail(f"no reading of {other}")
