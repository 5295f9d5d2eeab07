"""Geometry and losses of depth without labels against the authors' code, and on scenes whose geometry is known."""

import golden
import pytest
import torch
import torch.nn.functional as F

from train import geometry, photometric
from train.photometric import ViewSynthesis, halved


@pytest.mark.parametrize("case", golden.cases("monodepth_geometry"))
def test_geometry_matches_the_authors(case):
    info, tensors = golden.load(case)
    close = {name: golden.tolerance(info)[name] for name in ("rtol", "atol")}
    disparity = tensors["input/disp"].requires_grad_()
    axis, shift = tensors["input/axisangle"].requires_grad_(), tensors["input/translation"].requires_grad_()
    camera, image = tensors["input/K"][:, :3, :3], tensors["input/image"]
    depth = geometry.disparity_to_depth(disparity, info["kwargs"]["min_depth"], info["kwargs"]["max_depth"])
    torch.testing.assert_close(depth, tensors["output/depth"], **close)
    motions = {name: geometry.motion(axis[:, 0], shift[:, 0], name == "T_inverse") for name in ("T", "T_inverse")}
    for name, value in motions.items():
        torch.testing.assert_close(value, tensors[f"output/{name}"], **close)
    points = geometry.points(depth, camera)
    torch.testing.assert_close(points, tensors["output/points"][:, :3], **close)
    places = geometry.grid(points, camera, motions["T"], depth.shape[-2:])
    torch.testing.assert_close(places, tensors["output/grid"], **close)
    warped = geometry.warp(image, depth, camera, motions["T"])
    torch.testing.assert_close(warped, tensors["output/warped"], **close)
    for name, arguments in {
        "warped_align_corners_false": (motions["T"], False),
        "warped_inverse": (motions["T_inverse"], True),
    }.items():
        torch.testing.assert_close(geometry.warp(image, depth, camera, *arguments), tensors[f"output/{name}"], **close)
    (warped * tensors["input/weight"]).sum().backward()
    for name, value in (("disp", disparity), ("axisangle", axis), ("translation", shift)):
        torch.testing.assert_close(value.grad, tensors[f"grad/{name}"], **close)


@pytest.mark.parametrize("case", golden.cases("monodepth_photometric"))
def test_photometric_losses_match_the_authors(case):
    info, tensors = golden.load(case)
    close = golden.tolerance(info)
    prediction, disparity = tensors["input/pred"].requires_grad_(), tensors["input/disp"].requires_grad_()
    target = tensors["input/target"]
    torch.testing.assert_close(photometric.dissimilarity(prediction, target), tensors["output/ssim"], **close)
    loss = photometric.photometric(prediction, target)
    torch.testing.assert_close(loss, tensors["output/photometric"], **close)
    loss.mean().backward()
    torch.testing.assert_close(prediction.grad, tensors["grad/pred"], **close)
    smooth = photometric.smoothness(disparity, target)
    torch.testing.assert_close(smooth, tensors["output/smooth"], **close)
    smooth.backward()
    torch.testing.assert_close(disparity.grad, tensors["grad/disp"], **close)


@pytest.mark.parametrize("case", golden.cases("monodepth_selfsup"))
def test_view_synthesis_matches_the_authors(case):
    info, tensors = golden.load(case)
    kwargs, close = info["kwargs"], golden.tolerance(info)
    losses = ViewSynthesis(
        kwargs["min_depth"],
        kwargs["max_depth"],
        auto_mask=not kwargs["disable_automasking"],
        ssim=not kwargs["no_ssim"],
        average=kwargs["avg_reprojection"],
        own_size=kwargs["v1_multiscale"],
        smooth=kwargs["disparity_smoothness"],
    )
    for value in (v for name, v in tensors.items() if name.startswith(("input/disp", "input/axis", "input/trans"))):
        value.requires_grad_()

    def pyramid(frame):
        return [tensors.get(f"input/color_{frame}_{scale}") for scale in kwargs["scales"]]

    sources = {frame: pyramid(frame) for frame in kwargs["frame_ids"][1:]}
    motions = {}
    for frame in sources:
        if frame == "s":
            motions[frame] = tensors["input/stereo_T"]
        else:
            axis, shift = (tensors[f"input/{name}_{frame}"][:, 0, 0] for name in ("axisangle", "translation"))
            motions[frame] = geometry.motion(axis, shift, invert=frame < 0)
    camera, target = tensors["input/K"][:, :3, :3], pyramid(0)
    disparities = [tensors[f"input/disp_{scale}"] for scale in kwargs["scales"]]
    for index, disparity in enumerate(disparities):
        noise = tensors.get(f"input/noise_{index}")
        first, second = losses.scale(index, disparity, target, sources, motions, camera, noise)
        torch.testing.assert_close(first + second, tensors[f"output/loss_{index}"], **close)
    terms = losses(disparities, target, sources, motions, camera, lambda scale, _: tensors[f"input/noise_{scale}"])
    total = terms["photometric"] + terms["smoothness"]
    torch.testing.assert_close(total, tensors["output/loss"], **close)
    total.backward()
    for name, value in tensors.items():
        if name.startswith("grad/"):
            torch.testing.assert_close(tensors[f"input/{name.removeprefix('grad/')}"].grad, value, **close)


def test_a_motion_and_its_inverse_cancel():
    torch.manual_seed(0)
    axis, shift = torch.randn(4, 3), torch.randn(4, 3)
    both = geometry.motion(axis, shift) @ geometry.motion(axis, shift, invert=True)
    torch.testing.assert_close(both, torch.eye(4).expand(4, -1, -1), atol=1e-5, rtol=0)


def test_true_depth_and_motion_make_the_other_view():
    """A textured wall at 2 m, the camera moved sideways by what 3 pixels are: the inner part is seen again exactly."""
    torch.manual_seed(0)
    image = F.interpolate(torch.rand(1, 3, 6, 9), size=(24, 36), mode="bicubic")
    camera = torch.tensor([[[30.0, 0, 17.5], [0, 30, 11.5], [0, 0, 1]]])
    depth = torch.full((1, 1, 24, 36), 2.0)
    moved = geometry.motion(torch.zeros(1, 3), torch.tensor([[3 * 2 / 30.0, 0, 0]]))
    source = image.roll(3, dims=3)
    seen = geometry.warp(source, depth, camera, moved)
    torch.testing.assert_close(seen[..., :-3], image[..., :-3], atol=1e-4, rtol=0)
    wrong = geometry.warp(source, depth * 1.5, camera, moved)
    assert photometric.photometric(wrong, image).mean() > 3 * photometric.photometric(seen, image).mean()


def test_halved_images():
    sizes = [tuple(image.shape[-2:]) for image in halved(torch.rand(1, 3, 30, 41), 3)]
    assert sizes == [(30, 41), (15, 20), (7, 10), (3, 5)]
