"""kMaX-DeepLab against the authors' port."""

import golden
import pytest
import torch

from heads.kmax import AxialAttention2D, KMeansDecoder, KMeansLayer, PixelDecoder, auxiliary

MODULES = [
    c for c in golden.cases("kmax_") if not isinstance(c, str) or not any(w in c for w in ("criterion", "inference", "model"))
]


def close(actual, expected, info):
    torch.testing.assert_close(actual, expected, **golden.tolerance(info))


def load(module, tensors):
    module.load_state_dict(golden.state(tensors))
    return module.eval()


def decoder(kwargs):
    aux = kwargs["aux_in_channels"]
    channels = (aux["res2"], aux["res3"], 1, aux["res5"])
    kind = "aspp" if kwargs["use_aux_semantic_decoder"] else "plain"
    classes = kwargs["num_classes_without_void"]
    return KMeansDecoder(
        kwargs["in_channels"],
        classes,
        queries=kwargs["num_queries"],
        layers=kwargs["dec_layers"],
        base=kwargs["base_filters"],
        ffn=kwargs["ffn"],
        heads=kwargs["num_heads"],
        head_width=kwargs["head_channels"],
        embedding=kwargs["embedding"],
        drop_path=0.2,
        aux=auxiliary(kind, channels, classes, kwargs["aspp"], (kwargs["project_os8"], kwargs["project_os4"])),
    )


@pytest.mark.parametrize("case", MODULES)
def test_matches_the_authors_code(case):
    info, tensors = golden.load(case)
    kwargs = info["kwargs"]
    inputs = {name.removeprefix("input/"): value for name, value in tensors.items() if name.startswith("input/")}
    match info["official_class"].split()[0]:
        case "AxialAttention2D":
            model = load(AxialAttention2D(kwargs["in_planes"], kwargs["filters"]), tensors)
            close(model(tensors["input"]), tensors["output"], info)
        case "kMaXTransformerLayer":
            names = ("in_channel_pixel", "num_classes_without_void", "base_filters", "query_channels", "ffn", "num_heads")
            model = KMeansLayer(*(kwargs[n] for n in names), kwargs["head_channels"], kwargs["embedding"], 0.2)
            load(model, tensors)
            pixels, queries = inputs["pixels"].requires_grad_(), inputs["queries"].requires_grad_()
            output, prediction = model(pixels, queries)
            close(output, tensors["output"], info)
            for name, value in prediction.items():
                close(value, tensors[f"stage/{name}"], info)
            (output * inputs["weight"]).sum().backward()
            close(pixels.grad, tensors["grad/pixels"], info)
            close(queries.grad, tensors["grad/queries"], info)
        case "kMaXPixelDecoder":
            widths, blocks = kwargs["dec_channels"], kwargs["dec_layers"]
            axial = kwargs["layer_types"].count("axial")
            model = load(PixelDecoder(kwargs["in_channels_coarse_to_fine"], widths, blocks, axial), tensors)
            stages = model([inputs[name] for name in kwargs["in_features_coarse_to_fine"]])
            for i, stage in enumerate(stages):
                close(stage, tensors[f"stage/stage_{i}"], info)
            close(stages[-1], tensors["output"], info)
        case "kMaXTransformerDecoder":
            model = load(decoder(kwargs), tensors)
            pixels = [inputs[f"pixels_{i}"] for i in range(3)] + [inputs["panoptic"]]
            res2, res3, res5 = (inputs[f"semantic_{name}"] for name in ("res2", "res3", "res5"))
            output = model(pixels, [])
            assert "semantic" not in output
            close(model._auxiliary_semantic_predictor([res2, res3, res5, res5]), tensors["output/aux_semantic"], info)
            for name, value in tensors.items():
                parts = name.split("/")
                if parts[0] == "output" and parts[1] != "aux_semantic":
                    found = output["aux"][int(parts[1].removeprefix("aux_"))] if parts[1].startswith("aux_") else output
                    close(found[parts[-1]], value, info)
        case other:
            pytest.fail(f"no reading of {other}")
