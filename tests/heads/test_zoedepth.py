"""ZoeDepth's metric bins against the authors' code."""

import golden
import pytest
import torch

from heads import DensePredictor
from heads.zoedepth import MetricBins, ZoeDepth


@pytest.mark.parametrize("case", golden.cases("zoedepth_head"))
def test_metric_bins_match_the_authors(case):
    info, tensors = golden.load(case)
    kwargs, state = info["kwargs"], golden.state(tensors)
    blocks = [tensors[f"input/block_{i}"] for i in range(4)]
    head = MetricBins(
        tensors["input/bottleneck"].shape[1],
        [block.shape[1] for block in blocks],
        tensors["input/last"].shape[1],
        kwargs["n_bins"],
        kwargs["bin_embedding_dim"],
        kwargs["n_attractors"],
        kwargs["bin_centers_type"],
        kwargs["attractor_type"],
        kwargs["attractor_kind"],
        kwargs["min_temp"],
        kwargs["max_temp"],
        kwargs["min_depth"],
        kwargs["max_depth"],
        kwargs["inverse_midas"],
        hidden=state["projectors.0._net.0.weight"].shape[0],
        seed_hidden=state["seed_bin_regressor._net.0.weight"].shape[0],
    )
    head.load_state_dict(state)
    close = golden.tolerance(info)
    x = head.conv2(tensors["input/bottleneck"])
    low, high = (kwargs["min_depth"], kwargs["max_depth"]) if head.normed_points else (0, 1)  # the fixture holds metres
    torch.testing.assert_close(head.seed(x) * (high - low) + low, tensors["stage/seed_centres"], **close)
    last, relative = tensors["input/last"], tensors["input/relative_depth"][:, None]
    depth, chance, centres = head(last, relative, tensors["input/bottleneck"], blocks)
    for i, value in enumerate(centres):
        torch.testing.assert_close(value, tensors[f"stage/centres_{i}"], **close)
    torch.testing.assert_close(chance[:, :, ::2, ::2], tensors["output/probabilities"], **close)
    torch.testing.assert_close(depth, tensors["output/metric_depth"], **close)


@pytest.mark.parametrize("variant", golden.variants("zoedepth"))
def test_published_names_and_sizes(variant):
    published = golden.official("zoedepth")[variant]
    head = MetricBins(256, [256] * 4, 32, 64, 128, (16, 8, 4, 1))
    assert {name: list(value.shape) for name, value in head.state_dict().items()} == published["keys"]
    assert sum(p.numel() for p in head.parameters()) == published["params"]


def test_metres_on_any_backbone():
    torch.manual_seed(0)
    model = DensePredictor("test_vit", ZoeDepth, 1, {"width": 8, "bins": 8, "embedding": 8, "kind": "normed"}).eval()
    with torch.no_grad():
        metres = model(torch.randn(1, 3, 40, 56))
    assert metres.shape == (1, 1, 40, 56) and 1e-3 <= float(metres.min()) <= float(metres.max()) <= 10


@pytest.mark.parametrize(
    "args, words",
    [
        ({"kind": "log"}, "kind is 'log'"),
        ({"attraction": "square"}, "attraction is 'square'"),
        ({"pull": "max"}, "pull is 'max'"),
        ({"min_depth": 5.0, "max_depth": 1.0}, "min_depth < max_depth"),
    ],
)
def test_unknown_choices_are_refused(args, words):
    with pytest.raises(ValueError, match=words):
        ZoeDepth([8, 8], 1, width=8, **args)
    with pytest.raises(ValueError, match="one channel"):
        ZoeDepth([8, 8], 2)
