"""What data sets of video share: frames beside the image, camera files, motions; and generated sequences.

A pose file holds the camera's place in the world, 4x4: it takes points of the camera (x right, y down, z forward, metres) to
points of the world. The motion from one camera to another is in train/geometry.py's sense.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.data.base import ImageDataset, Transform
from train.data.finding import read_text
from train.data.scenes import FOCAL, Solid, camera_axes, first_hit, paint, place_solids, shade
from train.depth import DepthSpec
from train.sample import KINDS, check_motion


def check_frames(frames: Sequence[int | str], stereo: bool = False) -> tuple[int | str, ...]:
    """The frames that go with an image, as a tuple. ValueError for none, for 0, for one twice and for what is no offset."""
    known = [frame for frame in frames if (isinstance(frame, int) and frame) or (stereo and frame == "s")]
    if not frames or len(set(known)) != len(frames):
        also = ", and s for the stereo partner" if stereo else ""
        raise ValueError(f"frames must be offsets in time, each once and none 0, e.g. [-1, 1]{also}; got {list(frames)}")
    return tuple(frames)


def read_numbers(path: Path) -> list[list[float]]:
    """The rows of numbers of a text file; # starts a comment. ValueError names the file and the word that is none."""
    rows = []
    for line in read_text(path).splitlines():
        words = line.partition("#")[0].replace(",", " ").split()
        try:
            row = [float(word) for word in words]
        except ValueError as error:
            raise ValueError(f"{path}: {error}; the file must hold numbers alone") from error
        rows += [row] if row else []
    return rows


def read_intrinsics(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The camera matrix 3 3 of a file for images of `size` (H, W).

    The file holds a 3x3 matrix, or "fx fy cx cy"; in a further row or after these, the width and height of the images that it
    is for. Without these, a principal point outside the middle of the image shows a matrix for another size.
    Raises ValueError with file and values for another form, or another size.
    """
    numbers = read_numbers(path)
    if [len(row) for row in numbers[:3]] == [3, 3, 3]:
        camera, rest = np.array(numbers[:3]), [value for row in numbers[3:] for value in row]
    else:
        flat = [value for row in numbers for value in row]
        if len(flat) not in (4, 6):
            raise ValueError(f"{path}: need a 3x3 camera matrix, or fx fy cx cy; got {len(flat)} numbers")
        fx, fy, cx, cy = flat[:4]
        camera, rest = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), flat[4:]
    try:
        KINDS["intrinsics"].tensor(camera)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    height, width = size
    if rest:
        if [int(value) for value in rest] != [width, height]:
            stated = "x".join(f"{value:g}" for value in rest)
            raise ValueError(
                f"{path}: its intrinsics are for images of {stated} (width x height), and these have {width}x{height}"
            )
    elif not (0.25 < camera[0, 2] / width < 0.75 and 0.25 < camera[1, 2] / height < 0.75):
        raise ValueError(
            f"{path}: the principal point ({camera[0, 2]:g}, {camera[1, 2]:g}) is far from the middle of images of "
            f"{width}x{height} (width x height): intrinsics of another size? If they are right, add a row with width and height"
        )
    return camera.astype(np.float32)


def read_pose(path: Path) -> np.ndarray:
    """A camera's place in the world, 4 4, from a text file. ValueError with file and value if it is no rotation."""
    numbers = read_numbers(path)
    if [len(row) for row in numbers] != [4] * 4:
        raise ValueError(f"{path}: a pose must be 4 rows of 4 numbers, got rows of {[len(row) for row in numbers]}")
    try:
        check_motion(torch.tensor(numbers))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return np.array(numbers)


def motions(own: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """The motions n 4 4 from a camera to others, of their places in the world 4 4 each."""
    return np.stack([np.linalg.inv(other) @ own for other in others]).astype(np.float32)


class SceneSequences(ImageDataset):
    """Generated scenes (train/data/scenes.py) seen by a camera that moves.

    A sample is a frame that has all its neighbours. Motions and depth are exact. Rendered when first asked for, kept in memory;
    the same seed gives the same sequences on every machine; training and validation never share a scene.
    Raises ValueError for counts, lengths and sizes that hold no sample.

    Args:
        split, targets, transform: as of every data set.
        count, val_count: sequences.
        length: frames of a sequence.
        frames: offsets of the frames that go with an image.
        size: (H, W) of the images.
        speed: largest way of the camera from one frame to the next, metres; the smallest is half of it.
        seed: of all that is random.
    """

    provides = ("frames", "intrinsics", "pose", "mask", "depth")
    in_memory = True
    any_channels = False
    known_poses = True
    depth: DepthSpec = DepthSpec(min_depth=0.5, max_depth=10.0)

    def __init__(
        self,
        split: str,
        targets: tuple[str, ...],
        transform: Transform | None = None,
        count: int = 200,
        val_count: int = 34,
        length: int = 5,
        frames: Sequence[int] = (-1, 1),
        size: tuple[int, int] = (96, 128),
        speed: float = 0.2,
        seed: int = 0,
    ):
        super().__init__(split, tuple(target for target in targets if target != "mask"), transform)
        self.offsets = check_frames(frames)
        self.reach = max(0, -min(frames)), max(0, max(frames))
        if count < 1 or val_count < 1:
            raise ValueError(f"need at least one sequence of each split, got count={count}, val_count={val_count}")
        if length <= sum(self.reach):
            raise ValueError(f"a sequence of {length} frames holds no frame with neighbours at {list(frames)}: raise length")
        if min(size) < 16:
            raise ValueError(f"scenes need at least 16x16 pixels, got {size[0]}x{size[1]}")
        if not 0 < speed <= 1:
            raise ValueError(f"speed must lie in (0, 1] metres a frame, got {speed:g}")
        self.sequences = count if split == "train" else val_count
        self.length, self.shape, self.speed, self.seed = length, (size[0], size[1]), speed, seed
        height, width = self.shape
        f = FOCAL * height
        self.camera = np.array([[f, 0, (width - 1) / 2], [0, f, (height - 1) / 2], [0, 0, 1]], np.float32)
        self.rendered: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def __len__(self) -> int:
        return self.sequences * (self.length - sum(self.reach))

    def views(self, sequence: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(image, depth, place in the world) of the frames of a sequence."""
        if sequence not in self.rendered:
            stream = (self.seed, 2 if self.split == "train" else 3, sequence)  # 0 and 1 are those of Scenes
            self.rendered[sequence] = render_sequence(stream, self.length, self.shape, self.speed)
        return self.rendered[sequence]

    def place(self, index: int) -> tuple[int, int]:
        """(sequence, frame) of a sample."""
        sequence, frame = divmod(index, self.length - sum(self.reach))
        return sequence, frame + self.reach[0]

    def true_depth(self, index: int) -> np.ndarray:
        sequence, frame = self.place(index)
        return self.views(sequence)[frame][1][0]

    def read(self, index: int) -> dict[str, Any]:
        sequence, frame = self.place(index)
        views = self.views(sequence)
        image, depth, own = views[frame]
        others = [views[frame + offset] for offset in self.offsets]  # type: ignore[operator]  # whole numbers here
        return {
            "image": torch.from_numpy(image).clone(),
            "frames": np.stack([view[0] for view in others]),
            "intrinsics": self.camera,
            "pose": motions(own, [view[2] for view in others]),
            "depth": torch.from_numpy(depth).clone(),
            "path": f"sequence-{self.split}-{sequence:04d}-{frame:02d}",
        }


def render_sequence(
    stream: Sequence[int], length: int, size: tuple[int, int], speed: float
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(image uint8 3 H W, depth float32 1 H W, place in the world 4 4) of each frame; colours and light stay as they are.

    Args:
        stream: names the sequence; it seeds what is drawn.
        length: frames.
        size: (H, W).
        speed: of the camera, metres a frame at most.
    """
    rng = np.random.default_rng([*stream, 0])
    pitch, solids = place_solids(rng)
    height, width = size
    v, u = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij")
    rays = np.stack([u, v, np.full_like(u, FOCAL * height)], -1).reshape(-1, 3) / (FOCAL * height)
    found = []
    for number, place in enumerate(path(rng, length, pitch, speed)):
        directions = (rays @ place[:3, :3].T).astype(np.float32)
        origin = place[:3, 3].astype(np.float32)
        nearest, depth = first_hit(solids, origin, directions)
        points = origin + directions * depth[:, None]
        image = coloured(stream, solids, nearest, directions, points)
        noise = np.random.default_rng([*stream, 3, number]).normal(0, 0.004, image.shape)
        pixels = ((image + noise).clip(0, 1).reshape(height, width, 3).transpose(2, 0, 1) * 255).round().astype(np.uint8)
        found.append((pixels, depth.reshape(1, height, width).astype(np.float32), place))
    return found


def coloured(
    stream: Sequence[int], solids: Sequence[Solid], nearest: np.ndarray, rays: np.ndarray, points: np.ndarray
) -> np.ndarray:
    """Colours P 3 in 0..1 of surface points; those of a solid, and the light, are the same in every frame of the stream.

    Args:
        stream: names the sequence; it seeds what is drawn.
        solids: of the scene.
        nearest: P, position in `solids` of the one that each ray hits.
        rays: P 3, directions from the camera.
        points: P 3, where they end.
    """
    normals, colours = np.empty_like(rays), np.empty_like(rays)
    for i, solid in enumerate(solids):
        seen = nearest == i
        if seen.any():
            normals[seen] = solid.normal(points[seen])
            own = np.random.default_rng([*stream, 1, i])
            colours[seen] = grained(own, points[seen]) * paint(own, points[seen], plain=i < 2)
    return shade(np.random.default_rng([*stream, 2]), rays, points, normals, colours, solids[2:])


def grained(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """Brightness P 1 of surface points, about 0.75: waves of 0.2 to 1 m in space, so that every surface has a texture."""
    directions = rng.normal(0, 1, (8, 3))
    directions *= (2 * math.pi / np.geomspace(0.2, 1.0, 8) / np.linalg.norm(directions, axis=1))[:, None]
    waves = np.sin(points @ directions.T + rng.uniform(0, 2 * math.pi, 8)).mean(1)
    return (0.75 + 0.5 * waves.clip(-0.5, 0.5))[:, None].astype(np.float32)


def path(rng: np.random.Generator, length: int, pitch: float, speed: float) -> list[np.ndarray]:
    """Places in the world 4 4 of a camera that moves evenly and turns a little; its middle frame is where Scenes stands.

    Args:
        rng: draws heading and turn.
        length: frames.
        pitch: of the camera.
        speed: metres a frame at most.
    """
    heading = rng.uniform(0, 2 * math.pi)
    step = speed * rng.uniform(0.5, 1.0) * np.array([math.cos(heading), 0.3 * rng.uniform(-1, 1), math.sin(heading)])
    turn = rng.uniform(-1, 1, 3) * np.array([0.01, 0.02, 0.01])  # radians a frame about x, y, z of the world
    found = []
    for number in range(length):
        at = number - (length - 1) / 2
        place = np.eye(4)
        place[:3, :3] = rotation(at * turn) @ camera_axes(pitch).T
        place[:3, 3] = at * step
        found.append(place)
    return found


def rotation(angles: np.ndarray) -> np.ndarray:
    """The rotation matrix about x, then y, then z."""
    found = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        one = np.eye(3)
        one[i, i] = one[j, j] = math.cos(angle)
        one[i, j], one[j, i] = -math.sin(angle), math.sin(angle)
        found = one @ found
    return found
