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
    with pytest.raises(ValueError, match="neck is 'fpn'; use 'pyramid', 'multilevel' or None"):
        DensePredictor("vit_tiny_patch16_224", "upernet", 5, backbone_args=args, neck="fpn")
    with pytest.raises(ValueError, match="maps of one size, and these have strides 4, 8, 16, 32"):
        DensePredictor("test_resnet", "upernet", 5, neck="multilevel")
    with pytest.raises(ValueError, match="which DPT does not read"):
        DensePredictor("vit_tiny_patch16_224", "dpt", 5, backbone_args=args, neck="multilevel")
    with pytest.raises(ValueError, match="2 maps for 4 scales"):
        MultiLevelNeck([8, 8])


def test_the_auxiliary_head_reads_the_necks_maps():
    args = {"embed_dim": 24, "depth": 4, "num_heads": 2}
    options = {"aux_head": "fcn", "aux_args": {"width": 8, "index": 0}, "backbone_args": args, "neck": "multilevel"}
    model = DensePredictor("vit_tiny_patch16_224", "upernet", 5, {"width": 8}, **options).eval()
    images, seen = torch.randn(1, 3, 32, 48), []
    model.aux_head.register_forward_hook(lambda _, given, out: seen.append(given[0][0].shape))
    with torch.no_grad():
        found = model.outputs(images)
        torch.testing.assert_close(found["main"], model(images))
    assert seen == [(1, 24, 8, 12)] and found["aux"].shape == (1, 5, 32, 48)  # stride 4, not the ViT's 16
    assert not any(name.startswith("aux_neck.") for name in model.state_dict())


def test_without_a_neck_the_head_reads_the_maps_as_they_are():
    args = {"embed_dim": 24, "depth": 4, "num_heads": 2}
    model = DensePredictor("vit_tiny_patch16_224", "upernet", 5, {"width": 8}, backbone_args=args, neck=None)
    assert model.neck is None and model.head.lateral_convs[0].conv.in_channels == 24
    assert model.eval()(torch.randn(1, 3, 32, 48)).shape == (1, 5, 32, 48)
