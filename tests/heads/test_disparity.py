"""Decoders of self-supervised depth against the authors' code."""

import golden
import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock
from torch import nn

from heads.disparity import LiteMonoDecoder, Monodepth2, PoseDecoder
from train.geometry import motion


@pytest.mark.parametrize("case", golden.cases("monodepth_v2_decoder"))
def test_monodepth2_decoder_matches_the_authors(case):
    info, tensors = golden.load(case)
    kwargs = info["kwargs"]
    maps = [tensors[f"input/features_{i}"] for i in range(len(kwargs["num_ch_enc"]))]
    head = Monodepth2(kwargs["num_ch_enc"], 1, kwargs["num_ch_dec"], len(kwargs["scales"]))
    head.load_state_dict(golden.state(tensors))
    for i, disparity in enumerate(head(maps)["disparities"]):
        torch.testing.assert_close(disparity, tensors[f"output/disp_{i}"], **golden.tolerance(info))


@pytest.mark.parametrize("case", golden.cases("monodepth_lite_model"))
def test_lite_mono_decoder_matches_the_authors(case):
    info, tensors = golden.load(case)
    head = LiteMonoDecoder(info["kwargs"]["dims"], 1)
    head.load_state_dict(golden.state(tensors, "state/depth."))
    output = head([tensors[f"stage/features_{i}"] for i in range(3)])
    for i, disparity in enumerate(output["disparities"]):
        torch.testing.assert_close(disparity, tensors[f"output/disp_{i}"], **golden.tolerance(info))
    assert head.scores(output) is output["disparities"][0]


class PairEncoder(nn.Module):
    """A ResNet as narrow as the fixture's, under torchvision's names."""

    def __init__(self, blocks, planes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, planes[0], 7, 2, 3, bias=False), nn.BatchNorm2d(planes[0])
        self.fc = nn.Linear(planes[-1], 5)
        width = planes[0]
        for i, (count, plane) in enumerate(zip(blocks, planes, strict=True)):
            stride = 2 if i else 1
            down = nn.Sequential(nn.Conv2d(width, plane, 1, stride, bias=False), nn.BatchNorm2d(plane)) if i else None
            first = BasicBlock(width, plane, stride, down)
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *(BasicBlock(plane, plane) for _ in range(count - 1))))
            width = plane

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


@pytest.mark.parametrize("case", golden.cases("monodepth_pose"))
def test_pose_network_matches_the_authors(case):
    info, tensors = golden.load(case)
    kwargs, close = info["kwargs"], golden.tolerance(info)
    encoder = PairEncoder(kwargs["blocks"], kwargs["planes"]).eval()
    encoder.load_state_dict(golden.state(tensors, "state/pose_encoder.encoder."))
    decoder = PoseDecoder(kwargs["planes"][-1], width=kwargs["pose_width"])
    decoder.load_state_dict(golden.state(tensors, "state/pose."))
    pair = torch.cat([tensors["input/first"], tensors["input/second"]], 1)
    features = encoder((pair - 0.45) / 0.225)
    torch.testing.assert_close(features, tensors["stage/features"], **close)
    axis, shift = decoder(features)
    torch.testing.assert_close(axis[:, :, None], tensors["output/axisangle"], **close)
    torch.testing.assert_close(shift[:, :, None], tensors["output/translation"], **close)
    for name, invert in (("T", False), ("T_inverse", True)):
        torch.testing.assert_close(motion(axis[:, 0], shift[:, 0], invert), tensors[f"output/{name}"], **close)
