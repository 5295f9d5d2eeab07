"""Two views of a scene: depth from disparity, camera motion, and one image seen from the place of another.

Written from the published behaviour of monodepth2 (Godard et al. 2019, https://arxiv.org/abs/1806.01260, section 3) and
Lite-Mono (Zhang et al. 2023, https://arxiv.org/abs/2211.13202).

Pixel coordinates are whole numbers 0..W-1, without a half-pixel offset. A camera matrix is B 3 3 in pixels of the map it is
used with. A motion is B 4 4 and takes points of the target camera to the source camera.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def disparity_to_depth(disparity: Tensor, min_depth: float = 0.1, max_depth: float = 100.0) -> Tensor:
    """A sigmoid's output, 0..1, to depth: 0 is max_depth and 1 is min_depth, linear in inverse depth."""
    return 1 / (1 / max_depth + (1 / min_depth - 1 / max_depth) * disparity)


def motion(axis_angle: Tensor, translation: Tensor, invert: bool = False) -> Tensor:
    """B 3 rotation vectors and B 3 translations -> B 4 4: rotate, then translate; invert: its inverse, for an earlier frame."""
    angle = axis_angle.norm(dim=1, keepdim=True)
    x, y, z = (axis_angle / (angle + 1e-7)).unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).unflatten(1, (3, 3))
    axis = torch.stack([x, y, z], 1)
    c, s = angle[..., None].cos(), angle[..., None].sin()
    rotation = c * torch.eye(3, device=x.device, dtype=x.dtype) + s * cross + (1 - c) * axis[:, :, None] * axis[:, None]
    if invert:
        rotation, translation = rotation.mT, -(rotation.mT @ translation[..., None])[..., 0]
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], device=x.device, dtype=x.dtype).expand(len(x), 1, 4)
    return torch.cat([torch.cat([rotation, translation[..., None]], 2), last], 1)


def scaled_camera(camera: Tensor, size: Sequence[int], new: Sequence[int]) -> Tensor:
    """The camera matrix B 3 3 of images of `size` (H, W) for the same images at size `new`."""
    factor = torch.tensor([new[1] / size[1], new[0] / size[0], 1.0], device=camera.device, dtype=camera.dtype)
    return camera * factor[:, None]


def points(depth: Tensor, camera: Tensor) -> Tensor:
    """Depth B 1 H W -> the points B 3 HW that its pixels show, in the camera's coordinates."""
    height, width = depth.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=depth.device, dtype=depth.dtype),
        torch.arange(width, device=depth.device, dtype=depth.dtype),
        indexing="ij",
    )
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1)
    return (camera.inverse() @ pixels) * depth.flatten(2)


def grid(points: Tensor, camera: Tensor, motion: Tensor, size: Sequence[int]) -> Tensor:
    """Where points B 3 HW lie in the source image: B H W 2 in -1..1, which are the centres of the corner pixels.

    Points behind the camera are not marked, as published.

    Args:
        points: B 3 HW, in the target's camera, metres.
        camera: B 3 3, of the source.
        motion: B 4 4, target to source.
        size: (H, W).
    """
    height, width = size
    seen = camera @ (motion[:, :3, :3] @ points + motion[:, :3, 3:])
    place = seen[:, :2] / (seen[:, 2:] + 1e-7)
    last = torch.tensor([width - 1, height - 1], device=points.device, dtype=points.dtype)[:, None]
    return ((place / last - 0.5) * 2).mT.unflatten(1, (height, width))


def warp(source: Tensor, depth: Tensor, camera: Tensor, motion: Tensor, align_corners: bool = True) -> Tensor:
    """The target view made of the pixels of the source view: B C H W, the border repeated outside.

    Args:
        source: B C H W.
        depth: B 1 H W of the target.
        camera: of both.
        motion: target to source.
        align_corners: True is what the coordinates mean (Lite-Mono); False is what monodepth2's code does on torch 1.3 and
            newer, off by up to half a pixel.
    """
    places = grid(points(depth, camera), camera, motion, depth.shape[-2:])
    return F.grid_sample(source, places, mode="bilinear", padding_mode="border", align_corners=align_corners)
