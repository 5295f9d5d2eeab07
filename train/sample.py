"""Kinds of sample entries: what each is made of, and what geometry does to it.

A sample is a dict of named entries. Readers check every entry with its kind, and the transforms move all of them together by
calling the same operation of each kind, so a new kind of target is one class and one row in KINDS.
"""

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

Size = tuple[int, int]  # height, width
SEGMENTS = 1000  # a panoptic map holds class * SEGMENTS + number
VOID = -1  # of a panoptic map


@dataclass(frozen=True)
class Look:
    """What a transform decides once for all samples.

    Attributes:
        colour: of image pixels that no file holds, one value of 0..255 per channel.
        ignore_index: of mask pixels that no file holds.
        interpolation: of images.
    """

    colour: Sequence[int]
    ignore_index: int
    interpolation: vision.InterpolationMode


class Kind(abc.ABC):
    """One kind of entry. All operations return a new value; sizes and positions are those of the image, in pixels.

    A kind that has no pixels of its own (a camera matrix, boxes) follows from the same calls: each says what the image's size
    was, and what was done to it.

    Attributes:
        target: what a task learns or measures; False for what the network sees, which evaluation resizes.
        picture: has colours, which jitter, policies and normalisation change.
    """

    target = True
    picture = False

    @abc.abstractmethod
    def tensor(self, value: Any) -> Tensor:
        """The value of a file as the tensor that a sample holds. Raises ValueError, without the file's name, for another."""

    def size(self, value: Tensor) -> Size | None:
        """Height and width, which must be those of the image; None for a kind without pixels."""
        return int(value.shape[-2]), int(value.shape[-1])

    @abc.abstractmethod
    def resize(self, value: Tensor, old: Size, new: Size, look: Look) -> Tensor:
        """The entry of an image that is resized.

        Args:
            value: of the entry.
            old, new: (H, W) of the image before and after.
            look: what the transform sets for all entries.
        """

    @abc.abstractmethod
    def crop(self, value: Tensor, top: int, left: int, size: Size) -> Tensor:
        """The entry of a part of an image.

        Args:
            value: of the entry.
            top, left: where the part starts.
            size: (H, W) of the part.
        """

    @abc.abstractmethod
    def pad(self, value: Tensor, border: Sequence[int], look: Look) -> Tensor:
        """The entry of an image with (left, top, right, bottom) more pixels."""

    @abc.abstractmethod
    def flip(self, value: Tensor, axis: int, size: Size) -> Tensor:
        """The entry of a mirrored image: axis -1 swaps left and right, -2 top and bottom."""

    @abc.abstractmethod
    def rotate(self, value: Tensor, degrees: float, size: Size, look: Look) -> Tensor:
        """The entry of an image that is turned.

        Args:
            value: of the entry.
            degrees: counter-clockwise, about the centre.
            size: (H, W) of the image, which stays.
            look: what the transform sets for all entries.
        """

    def zoom(self, value: Tensor, factor: float) -> Tensor:
        """The entry where enlarging by `factor` means that the camera came nearer (augment.zoom_depth)."""
        return value


class Pixels(Kind):
    """A value per pixel, ... H W, picked by nearest neighbour and never mixed."""

    def fill(self, look: Look) -> Any:
        """What says "nothing here": 0."""
        return 0

    def resize(self, value: Tensor, old: Size, new: Size, look: Look) -> Tensor:
        return value if tuple(value.shape[-2:]) == tuple(new) else pick_nearest(value, new)

    def crop(self, value: Tensor, top: int, left: int, size: Size) -> Tensor:
        return value[..., top : top + size[0], left : left + size[1]]

    def pad(self, value: Tensor, border: Sequence[int], look: Look) -> Tensor:
        flat = value[None] if value.ndim == 2 else value
        return vision.pad(flat, list(border), fill=self.fill(look)).reshape(
            *value.shape[:-2], value.shape[-2] + border[1] + border[3], value.shape[-1] + border[0] + border[2]
        )

    def flip(self, value: Tensor, axis: int, size: Size) -> Tensor:
        return value.flip(axis)

    def rotate(self, value: Tensor, degrees: float, size: Size, look: Look) -> Tensor:
        return self.turned(value, degrees, vision.InterpolationMode.NEAREST, look)

    def turned(self, value: Tensor, degrees: float, interpolation: vision.InterpolationMode, look: Look) -> Tensor:
        """The map turned about its centre, as it is.

        Args:
            value: ... H W.
            degrees: counter-clockwise, about the centre.
            interpolation: of the values.
            look: what the transform sets for all entries.
        """
        flat = value[None] if value.ndim == 2 else value
        return vision.rotate(flat, degrees, interpolation=interpolation, fill=self.fill(look)).reshape(value.shape)


class Image(Pixels):
    """uint8 C H W, resized smoothly; what no file holds has the mean colour."""

    target = False
    picture = True

    def tensor(self, value: Any) -> Tensor:
        image = torch.as_tensor(value)
        if image.ndim != 3 or image.dtype != torch.uint8:
            raise ValueError(f"an image must be uint8 C H W, got {kind_of(image)}")
        return image

    def fill(self, look: Look) -> list[int]:
        return list(look.colour)

    def resize(self, value: Tensor, old: Size, new: Size, look: Look) -> Tensor:
        if tuple(value.shape[-2:]) == tuple(new):
            return value
        return vision.resize(value, list(new), interpolation=look.interpolation, antialias=True)

    def rotate(self, value: Tensor, degrees: float, size: Size, look: Look) -> Tensor:
        return self.turned(value, degrees, vision.InterpolationMode.BILINEAR, look)


class Mask(Pixels):
    """Class ids, int64 H W; what no file holds is void."""

    def tensor(self, value: Any) -> Tensor:
        mask = torch.as_tensor(value)
        if mask.ndim != 2 or mask.is_floating_point() or mask.is_complex():
            raise ValueError(f"a mask must be whole numbers H W, got {kind_of(mask)}")
        return mask.long()

    def fill(self, look: Look) -> int:
        return look.ignore_index


class Panoptic(Pixels):
    """Segments, int64 H W: class * 1000 + number, -1 where there is none.

    Things are numbered from 1 within their class. Number 0 is stuff, or a crowd of things that nobody told apart.
    """

    def tensor(self, value: Any) -> Tensor:
        segments = torch.as_tensor(value)
        if segments.ndim != 2 or segments.is_floating_point() or segments.is_complex():
            raise ValueError(f"a panoptic map must be whole numbers H W, got {kind_of(segments)}")
        return segments.long()

    def fill(self, look: Look) -> int:
        return VOID


class Depth(Pixels):
    """Metres, float32 1 H W, 0 where there is no reading."""

    def tensor(self, value: Any) -> Tensor:
        depth = torch.as_tensor(value).float()
        depth = depth[None] if depth.ndim == 2 else depth
        if depth.ndim != 3 or len(depth) != 1:
            raise ValueError(f"a depth map must be 1 H W, got {kind_of(depth)}")
        return depth

    def zoom(self, value: Tensor, factor: float) -> Tensor:
        return value / factor


class Normal(Pixels):
    """Unit surface normals, float32 3 H W (x right, y down, z into the image), 0 where there is none.

    A mirrored image mirrors its vectors too, and a turned one turns them in its plane.
    """

    def tensor(self, value: Any) -> Tensor:
        normal = torch.as_tensor(value).float()
        if normal.ndim != 3 or len(normal) != 3:
            raise ValueError(f"normals must be 3 H W, got {kind_of(normal)}")
        return normal

    def flip(self, value: Tensor, axis: int, size: Size) -> Tensor:
        sign = torch.ones(3, 1, 1)
        sign[0 if axis == -1 else 1] = -1
        return value.flip(axis) * sign

    def rotate(self, value: Tensor, degrees: float, size: Size, look: Look) -> Tensor:
        x, y, z = super().rotate(value, degrees, size, look)
        angle = torch.deg2rad(torch.tensor(float(degrees)))  # counter-clockwise as seen, and y points down
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos * x + sin * y, cos * y - sin * x, z])


class Frames(Image):
    """Further frames of the image's video, uint8 n C H W, changed as the image is."""

    def tensor(self, value: Any) -> Tensor:
        frames = torch.as_tensor(value)
        if frames.ndim != 4 or frames.dtype != torch.uint8:
            raise ValueError(f"frames must be uint8 n C H W, got {kind_of(frames)}")
        return frames


class Camera(Kind):
    """What has no pixels and follows from what happens to them: `moved` is told the change as a plane and as a space.

    A mirrored or turned image is that of a mirrored or turned world, so that what a network sees of the motion between frames
    is the motion that the entries say.
    """

    target = False

    @abc.abstractmethod
    def moved(self, value: Tensor, plane: Tensor, space: Tensor) -> Tensor:
        """The entry once pixels moved by `plane` (3 3, of x, y, 1) and points of the camera by the orthogonal `space` (3 3)."""

    def size(self, value: Tensor) -> Size | None:
        return None

    def resize(self, value: Tensor, old: Size, new: Size, look: Look) -> Tensor:
        y, x = new[0] / old[0], new[1] / old[1]  # pixel i of n covers i..i+1, so its centre i + 0.5 is what is scaled
        return self.moved(value, matrix([x, 0, (x - 1) / 2], [0, y, (y - 1) / 2]), torch.eye(3))

    def crop(self, value: Tensor, top: int, left: int, size: Size) -> Tensor:
        return self.moved(value, matrix([1, 0, -left], [0, 1, -top]), torch.eye(3))

    def pad(self, value: Tensor, border: Sequence[int], look: Look) -> Tensor:
        return self.crop(value, -border[1], -border[0], (0, 0))

    def flip(self, value: Tensor, axis: int, size: Size) -> Tensor:
        if axis == -1:
            return self.moved(value, matrix([-1, 0, size[1] - 1], [0, 1, 0]), torch.diag(torch.tensor([-1.0, 1, 1])))
        return self.moved(value, matrix([1, 0, 0], [0, -1, size[0] - 1]), torch.diag(torch.tensor([1.0, -1, 1])))

    def rotate(self, value: Tensor, degrees: float, size: Size, look: Look) -> Tensor:
        angle = torch.deg2rad(torch.tensor(float(degrees)))  # counter-clockwise as seen, and y points down
        cos, sin = float(angle.cos()), float(angle.sin())
        y, x = (size[0] - 1) / 2, (size[1] - 1) / 2
        turn = matrix([cos, sin, 0], [-sin, cos, 0])
        return self.moved(value, matrix([1, 0, x], [0, 1, y]) @ turn @ matrix([1, 0, -x], [0, 1, -y]), turn)


class Intrinsics(Camera):
    """A camera matrix, float32 3 3, in pixels of the image: pixel indices, 0 at the centre of the first."""

    def tensor(self, value: Any) -> Tensor:
        camera = torch.as_tensor(value).float()
        if camera.shape != (3, 3) or not camera.isfinite().all():
            raise ValueError(f"intrinsics must be 3x3 finite numbers, got {kind_of(camera)}")
        if not (camera[0, 0] > 0 and camera[1, 1] > 0) or camera[2].tolist() != [0, 0, 1]:
            raise ValueError(
                f"intrinsics must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], fx and fy positive, got {rows(camera)}"
            )
        return camera

    def moved(self, value: Tensor, plane: Tensor, space: Tensor) -> Tensor:
        return plane @ value @ space.mT


class Pose(Camera):
    """Motions from the camera of the image to those of its frames, float32 n 4 4, metres; NaN where none is known."""

    def tensor(self, value: Any) -> Tensor:
        pose = torch.as_tensor(value).float()
        if pose.ndim != 3 or pose.shape[1:] != (4, 4):
            raise ValueError(f"poses must be n 4 4, got {kind_of(pose)}")
        for one in pose:
            if not one.isnan().all():
                check_motion(one)
        return pose

    def moved(self, value: Tensor, plane: Tensor, space: Tensor) -> Tensor:
        whole = torch.eye(4)
        whole[:3, :3] = space
        return whole @ value @ whole.mT


def matrix(x: Sequence[float], y: Sequence[float]) -> Tensor:
    """The 3 3 matrix of an affine change of pixels, from its first two rows."""
    return torch.tensor([list(x), list(y), [0.0, 0.0, 1.0]])


def rows(values: Tensor) -> str:
    """A small matrix in words, for errors."""
    return "[" + ", ".join("[" + ", ".join(f"{v:.4g}" for v in row) + "]" for row in values.tolist()) + "]"


def check_motion(pose: Tensor) -> None:
    """Raise ValueError, with the value, unless a 4 4 matrix is a rotation and a translation."""
    turn = pose[:3, :3].double()
    if not pose.isfinite().all() or pose[3].tolist() != [0, 0, 0, 1]:
        raise ValueError(f"a pose must be finite with a last row of 0 0 0 1, got {rows(pose)}")
    error = float((turn @ turn.mT - torch.eye(3, dtype=torch.float64)).abs().max())
    if error > 1e-2 or float(torch.linalg.det(turn)) < 0:
        raise ValueError(
            f"a pose must be a rotation and a translation, got {rows(pose)}, whose rotation is off by {error:.2g} and has "
            f"determinant {float(torch.linalg.det(turn)):.2g}"
        )


KINDS: dict[str, Kind] = {
    "image": Image(),
    "mask": Mask(),
    "panoptic": Panoptic(),
    "depth": Depth(),
    "normal": Normal(),
    "frames": Frames(),
    "intrinsics": Intrinsics(),
    "pose": Pose(),
}


def is_dense(targets: Iterable[str]) -> bool:
    """Whether any of the targets has a value per pixel, so that it must move with the image."""
    return any(name in KINDS for name in targets)


def kind_of(value: Tensor) -> str:
    """Type and shape in words, for errors: "float32 1x4x6"."""
    return f"{str(value.dtype).removeprefix('torch.')} {'x'.join(map(str, value.shape)) or 'number'}"


def pick_nearest(values: Tensor, size: Size) -> Tensor:
    """A map ... H W at another size, each new pixel the old one under its centre: no value that was not there before."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).floor().long().clamp_max(old - 1)
        for new, old in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]
