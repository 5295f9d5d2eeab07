"""MultiLevelNeck against mmsegmentation's, and under a head."""

import golden
import pytest
import torch

from heads import DensePredictor
from heads.multilevel import MultiLevelNeck


@pytest.mark.parametrize("case", golden.cases("multilevel_neck"))
def test_matches_the_authors_code(case):
    info, tensors = golden.load(case)
    kwargs = info["kwargs"]
    neck = MultiLevelNeck(
        kwargs["in_channels"],
        kwargs["out_channels"],
        kwargs["scales"],
        norm=kwargs["norm_cfg"] is not None,
        act=kwargs["act_cfg"] is not None,
    )
    neck.load_state_dict(golden.state(tensors))
    maps = [tensors[f"input/features_{i}"] for i in range(len(kwargs["in_channels"]))]
    with torch.no_grad():
        found = neck.eval()(maps)
    assert [m.shape[1] for m in found] == neck.channels
    for i, value in enumerate(found):
        torch.testing.assert_close(value, tensors[f"output/{i}"], **golden.tolerance(info))


def test_a_plain_vit_takes_it_in_the_place_of_the_pyramid():
    args = {"embed_dim": 24, "depth": 4, "num_heads": 2}
    model = DensePredictor("vit_tiny_patch16_224", "upernet", 5, {"width": 8}, backbone_args=args, neck="multilevel").eval()
    assert isinstance(model.neck, MultiLevelNeck) and model.neck.channels == [24] * 4
    with torch.no_grad():
        assert model(torch.randn(1, 3, 48, 80)).shape == (1, 5, 48, 80)
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5, 16, 16)
    with pytest.raises(ValueError, match="neck is 'fpn'; use 'pyramid' or 'multilevel'"):
        DensePredictor("vit_tiny_patch16_224", "upernet", 5, backbone_args=args, neck="fpn")
    with pytest.raises(ValueError, match="2 maps for 4 scales"):
        MultiLevelNeck([8, 8])
