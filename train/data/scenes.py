"""Generated scenes: solid bodies on a floor before a wall, with the true class, body, depth and normal of every pixel.

Nothing is downloaded and nothing is approximate: every pixel is a ray that meets spheres, boxes, cylinders and cones
analytically. Colours, textures, light, camera and places are drawn at random and independently of the class, so a class can be
told only by its outline and shading, and depth only by perspective: where a body touches the floor, and how large it looks.
`python -m train.data.scenes FOLDER` writes a few as photographs.

World axes: x right, y up, z forward; metres. The camera stands at the origin, `height` above the floor.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from train.data.base import ImageDataset, Transform
from train.depth import DepthSpec
from train.output import make_folder
from train.sample import SEGMENTS

CLASSES = ["wall", "floor", "sphere", "box", "cylinder", "cone"]
PALETTE = [(148, 163, 184), (101, 82, 66), (239, 68, 68), (59, 130, 246), (250, 204, 21), (34, 197, 94)]
BODIES = CLASSES[2:]
FOCAL = 0.9  # in image heights: a vertical field of view of 58 degrees
FAR = np.float32(np.inf)

Vector = tuple[float, float, float]


class Solid(Protocol):
    """What every solid answers."""

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """The smallest positive t with origin + t * ray on the surface, or infinity; origin 3 or P 3, rays P 3 or 1 3 -> P."""

    def normal(self, points: np.ndarray) -> np.ndarray:
        """Outward unit normals of surface points P 3."""


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes:
        image: uint8 3 H W.
        mask: class ids, uint8 H W.
        panoptic: class * 1000 + number of the body within its class, int32 H W.
        depth: along the optical axis, metres, float32 1 H W.
        normal: unit surface normals as the camera sees them (x right, y down, z into the image), float32 3 H W.
    """

    image: np.ndarray
    mask: np.ndarray
    panoptic: np.ndarray
    depth: np.ndarray
    normal: np.ndarray


class Scenes(ImageDataset):
    """Scenes of shaded bodies, rendered when first asked for and kept in memory.

    The same seed gives the same scenes on every machine; training and validation never share one.
    Raises ValueError for counts or sizes below 1 and 16.

    Args:
        split: "train" or "val".
        targets: which of mask and depth to give.
        transform: called with every sample.
        count: training scenes.
        val_count: validation scenes.
        size: (H, W).
        seed: of all scenes.
    """

    provides = ("mask", "panoptic", "depth", "normal")
    in_memory = True
    any_channels = False
    classes = CLASSES
    palette = PALETTE
    things = tuple(range(CLASSES.index(BODIES[0]), len(CLASSES)))
    depth: DepthSpec = DepthSpec(min_depth=0.5, max_depth=10.0)

    def __init__(
        self,
        split: str,
        targets: tuple[str, ...],
        transform: Transform | None = None,
        count: int = 800,
        val_count: int = 100,
        size: tuple[int, int] = (96, 128),
        seed: int = 0,
    ):
        super().__init__(split, targets, transform)
        if count < 1 or val_count < 1:
            raise ValueError(f"need at least one scene of each split, got count={count}, val_count={val_count}")
        if min(size) < 16:
            raise ValueError(f"scenes need at least 16x16 pixels, got {size[0]}x{size[1]}")
        self.count = count if split == "train" else val_count
        self.size, self.seed = tuple(size), seed
        self.rendered: dict[int, dict[str, np.ndarray]] = {}  # what is asked for only: thousands of scenes stay in memory

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> dict[str, Any]:
        if index not in self.rendered:
            stream = (self.seed, 0 if self.split == "train" else 1, index)
            scene = vars(render(np.random.default_rng(stream), *self.size))
            self.rendered[index] = {name: scene[name] for name in ("image", *self.targets)}
        entries = {name: torch.from_numpy(array).clone() for name, array in self.rendered[index].items()}
        return {**entries, "path": f"scene-{self.split}-{index:05d}"}


def render(rng: np.random.Generator, height: int, width: int) -> Scene:
    """One scene of height x width pixels."""
    pitch, solids = place_solids(rng)
    rays = camera_rays(height, width, pitch)  # P 3, of unit length along the optical axis
    origin = np.zeros(3, np.float32)
    ids = [0, 1] + [CLASSES.index(type(body).__name__.lower()) for body in solids[2:]]

    nearest, depth = first_hit(solids, origin, rays)
    points = rays * depth[:, None]
    normals, colours = np.empty_like(rays), np.empty_like(rays)
    for i, solid in enumerate(solids):
        seen = nearest == i
        if seen.any():
            normals[seen] = solid.normal(points[seen])
            colours[seen] = paint(rng, points[seen], plain=i < 2)
    image = shade(rng, rays, points, normals, colours, solids[2:])
    image = (image + rng.normal(0, 0.012, image.shape).astype(np.float32)).clip(0, 1)
    image = (image.reshape(height, width, 3).transpose(2, 0, 1) * 255).round().astype(np.uint8)
    mask = np.array(ids, np.uint8)[nearest].reshape(height, width)
    numbers = [0, 0] + [ids[2 : i + 1].count(ids[i]) for i in range(2, len(ids))]
    panoptic = np.array([kind * SEGMENTS + number for kind, number in zip(ids, numbers, strict=True)], np.int32)[nearest]
    seen_normals = (normals @ camera_axes(pitch).T).T.reshape(3, height, width).astype(np.float32)
    return Scene(image, mask, panoptic.reshape(height, width), depth.reshape(1, height, width).astype(np.float32), seen_normals)


def camera_axes(pitch: float) -> np.ndarray:
    """The camera's own axes in the world, one a row: right, down, and forward, which looks `pitch` radians down."""
    cos, sin = math.cos(pitch), math.sin(pitch)
    return np.array([[1, 0, 0], [0, -cos, -sin], [0, -sin, cos]])


def first_hit(solids: Sequence[Solid], origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(which solid, at how many ray lengths) each of the rays P 3 from `origin` meets first."""
    hits = np.stack([solid.hit(origin, rays) for solid in solids])  # S P
    return hits.argmin(0), hits.min(0)


def place_solids(rng: np.random.Generator) -> tuple[float, list[Solid]]:
    """(how far down the camera looks, radians; wall, floor and bodies) of a scene."""
    camera_height, pitch = rng.uniform(1.35, 1.65), rng.uniform(0.20, 0.28)
    floor = Plane((0, 1, 0), -camera_height)
    yaw = rng.uniform(-0.3, 0.3)
    wall = Plane((math.sin(yaw), 0, -math.cos(yaw)), -math.cos(yaw) * rng.uniform(5.5, 8.0))
    return pitch, [wall, floor, *place_bodies(rng, -camera_height)]


def camera_rays(height: int, width: int, pitch: float) -> np.ndarray:
    """Directions through the pixel centres, P 3, scaled to 1 along the optical axis, which looks `pitch` radians down."""
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    x, y = (u - width / 2) / (FOCAL * height), (height / 2 - v) / (FOCAL * height)
    cos, sin = math.cos(pitch), math.sin(pitch)
    return np.stack([x, y * cos - sin, y * sin + cos], -1).reshape(-1, 3).astype(np.float32)


def place_bodies(rng: np.random.Generator, ground: float) -> list[Solid]:
    """Three to seven bodies that stand on the floor inside the view and do not intersect."""
    bodies: list[Solid] = []
    taken: list[tuple[float, float, float]] = []
    for _ in range(rng.integers(3, 8)):
        kind = BODIES[rng.integers(len(BODIES))]
        radius = rng.uniform(0.36, 0.66)
        for _attempt in range(20):
            z = rng.uniform(1.9, 4.6)
            x = rng.uniform(-0.62, 0.62) * z
            if all((x - a) ** 2 + (z - b) ** 2 > (radius + r) ** 2 for a, b, r in taken):
                break
        else:
            continue  # no room left: one body fewer
        taken.append((x, z, radius))
        tall = radius * rng.uniform(1.3, 2.6)
        if kind == "sphere":
            bodies.append(Sphere((x, ground + radius, z), radius))
        elif kind == "box":
            side = radius / math.sqrt(2)  # the corners stay inside the circle of `radius`
            half = (side * rng.uniform(0.8, 1.0), tall / 2, side * rng.uniform(0.8, 1.0))
            bodies.append(Box((x, ground + tall / 2, z), half, rng.uniform(0, math.pi / 2)))
        elif kind == "cylinder":
            bodies.append(Cylinder((x, ground, z), radius * 0.8, tall))
        else:
            bodies.append(Cone((x, ground, z), radius, tall))
    return bodies


def paint(rng: np.random.Generator, points: np.ndarray, plain: bool) -> np.ndarray:
    """Colours in 0..1 at surface points P 3: one hue, or two in checks, stripes or blotches."""
    low, high = (0.3, 0.85) if plain else (0.2, 1.0)
    first = rng.uniform(low, high, 3)
    second = first * rng.uniform(0.55, 0.9) if rng.random() < 0.6 else rng.uniform(low, high, 3)
    pattern, scale = rng.integers(4), rng.uniform(2, 6)
    p = points * np.float32(scale) + rng.uniform(0, 10, 3).astype(np.float32)
    if pattern == 0:
        mix = np.zeros(len(p))
    elif pattern == 1:
        mix = dot(np.floor(p), np.ones(3, np.float32)) % 2
    elif pattern == 2:
        mix = 0.5 + 0.5 * np.sign(np.sin(dot(p, rng.normal(0, 1, 3))))
    else:
        mix = 0.5 + 0.5 * np.sin(p[:, 0] + 2 * np.sin(p[:, 1])) * np.sin(p[:, 2] + 2 * np.sin(p[:, 0]))
    mix = 0.6 * mix[:, None]
    return (first * (1 - mix) + second * mix).astype(np.float32)


def shade(
    rng: np.random.Generator,
    rays: np.ndarray,
    points: np.ndarray,
    normals: np.ndarray,
    colours: np.ndarray,
    bodies: Sequence[Solid],
) -> np.ndarray:
    """Diffuse light from one lamp with cast shadows, a highlight, and sky light from above; P 3 in 0..1.

    Args:
        rng: chooses the lamp.
        rays: P 3, directions from the camera.
        points: P 3, where they end.
        normals: P 3, there.
        colours: P 3, there.
        bodies: that cast shadows.
    """
    light = np.array([rng.uniform(-0.9, 0.9), 1.0, rng.uniform(-1.0, -0.1)], np.float32)
    light /= np.linalg.norm(light)
    lit = np.clip(dot(normals, light), 0, None)
    towards = np.flatnonzero(lit)  # what looks away from the lamp needs no shadow
    start = points[towards] + normals[towards] * np.float32(2e-3)  # off the surface, or it would shadow itself
    for body in bodies:
        lit[towards[np.isfinite(body.hit(start, light[None]))]] *= 0.25
    view = -rays / length(rays)
    half = view + light
    half /= length(half)
    gloss = rng.uniform(0, 0.35) * np.clip(dot(normals, half), 0, 1) ** 24 * (lit > 0)
    ambient = rng.uniform(0.25, 0.4) * (0.75 + 0.25 * normals[:, 1])
    tint = rng.uniform(0.9, 1.0, 3).astype(np.float32)
    strength = rng.uniform(0.6, 0.85)
    return (colours * (ambient + strength * lit)[:, None] * tint + gloss[:, None]).astype(np.float32)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products of vectors in the last axis.

    Columns one by one: numpy sums an axis of three far slower, and a matrix product rounds otherwise on another machine.
    """
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def length(vectors: np.ndarray) -> np.ndarray:
    """Of vectors P 3, P 1."""
    return np.sqrt(dot(vectors, vectors))[:, None]


def smallest_root(a: np.ndarray, b: np.ndarray, c: np.ndarray, accept: Callable | None = None) -> np.ndarray:
    """Smallest positive t with a t^2 + 2 b t + c = 0 for which accept(t, place) holds (infinity if none).

    Args:
        a, b, c: of the equation.
        accept: says which roots count, of the equations at `place`; None: all.
    """
    a, b, c = np.broadcast_arrays(a, b, c)
    disc = b * b - a * c
    real = np.flatnonzero(disc >= 0)  # a body covers little of the image
    a, b, root = a[real], b[real], np.sqrt(disc[real])
    nearest = np.full(len(real), FAR)
    with np.errstate(divide="ignore", invalid="ignore"):
        for t in ((-b - root) / a, (-b + root) / a):
            good = (t > 1e-4) & (t < nearest)
            if accept is not None:
                good &= accept(t, real)
            nearest = np.where(good, t, nearest)
    best = np.full(disc.shape, FAR)
    best[real] = nearest
    return best


def at(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Some of an axis, or the one value that stands for all of it."""
    return values[place] if values.size > 1 else values


class Plane:
    """normal . p = offset."""

    def __init__(self, normal: Vector, offset: float):
        self.n, self.offset = np.array(normal, np.float32), np.float32(offset)

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (self.offset - dot(origin, self.n)) / dot(rays, self.n)
        return np.where(t > 1e-4, t, FAR)

    def normal(self, points: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.n, points.shape)


class Sphere:
    def __init__(self, centre: Vector, radius: float):
        self.centre, self.radius = np.array(centre, np.float32), np.float32(radius)

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        o = origin - self.centre
        return smallest_root(dot(rays, rays), dot(rays, o), dot(o, o) - self.radius**2)

    def normal(self, points: np.ndarray) -> np.ndarray:
        return (points - self.centre) / self.radius


class Box:
    """Half sizes along its own axes, turned by `angle` about the vertical."""

    def __init__(self, centre: Vector, half: Vector, angle: float):
        self.centre, self.half = np.array(centre, np.float32), np.array(half, np.float32)
        cos, sin = math.cos(angle), math.sin(angle)
        self.axes = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], np.float32)  # rows: the box's axes in the world

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        enter, leave = np.float32(-np.inf), FAR
        with np.errstate(divide="ignore", invalid="ignore"):
            for axis, half in zip(self.axes, self.half, strict=True):
                o, d = dot(origin - self.centre, axis), dot(rays, axis)
                one, two = (-half - o) / d, (half - o) / d
                enter, leave = np.maximum(enter, np.minimum(one, two)), np.minimum(leave, np.maximum(one, two))
        return np.where((enter <= leave) & (enter > 1e-4), enter, FAR)

    def normal(self, points: np.ndarray) -> np.ndarray:
        local = (points - self.centre) @ self.axes.T / self.half
        face = np.abs(local).argmax(-1)
        sign = np.sign(np.take_along_axis(local, face[:, None], -1))
        return sign * self.axes[face]


class Cylinder:
    """Upright, closed on top; `base` is the centre of its bottom."""

    def __init__(self, base: Vector, radius: float, height: float):
        self.base, self.radius, self.height = np.array(base, np.float32), np.float32(radius), np.float32(height)

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        o = origin - self.base
        ox, oz, dx, dz = o[..., 0], o[..., 2], rays[..., 0], rays[..., 2]

        def on_side(t: np.ndarray, place: np.ndarray) -> np.ndarray:
            y = at(o[..., 1], place) + t * at(rays[..., 1], place)
            return (y >= 0) & (y <= self.height)

        side = smallest_root(dx * dx + dz * dz, dx * ox + dz * oz, ox * ox + oz * oz - self.radius**2, on_side)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (self.height - o[..., 1]) / rays[..., 1]
            on_top = (t > 1e-4) & ((ox + t * dx) ** 2 + (oz + t * dz) ** 2 <= self.radius**2)
        return np.minimum(side, np.where(on_top, t, FAR))

    def normal(self, points: np.ndarray) -> np.ndarray:
        local = points - self.base
        out = local * np.array([1, 0, 1], np.float32) / self.radius
        out[local[:, 1] > self.height * 0.9999] = (0, 1, 0)
        return out / length(out)


class Cone:
    """Upright, apex on top; `base` is the centre of its bottom."""

    def __init__(self, base: Vector, radius: float, height: float):
        self.base, self.radius, self.height = np.array(base, np.float32), np.float32(radius), np.float32(height)
        self.slope = self.radius / self.height

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        o = origin - self.base
        ox, oz, dx, dz = o[..., 0], o[..., 2], rays[..., 0], rays[..., 2]
        k = self.slope**2
        down, dy = self.height - o[..., 1], rays[..., 1]  # x^2 + z^2 = k (height - y)^2

        def below_apex(t: np.ndarray, place: np.ndarray) -> np.ndarray:
            y = at(o[..., 1], place) + t * at(dy, place)
            return (y >= 0) & (y <= self.height)

        return smallest_root(
            dx * dx + dz * dz - k * dy * dy, dx * ox + dz * oz + k * down * dy, ox * ox + oz * oz - k * down * down, below_apex
        )

    def normal(self, points: np.ndarray) -> np.ndarray:
        local = points - self.base
        out = np.stack([local[:, 0], self.slope**2 * (self.height - local[:, 1]), local[:, 2]], -1)
        return out / np.maximum(length(out), 1e-12)


def main(arguments: Sequence[str]) -> int:
    """Writes three scenes that no training sees, 192 x 256, into the folder that the only argument names."""
    if len(arguments) != 1:
        print("usage: python -m train.data.scenes FOLDER", file=sys.stderr)
        return 2
    try:
        folder = make_folder(arguments[0], "folder")
    except ValueError as error:
        print(f"train.data.scenes: {error}", file=sys.stderr)
        return 2
    for i in range(3):
        image = Scenes("val", (), size=(192, 256)).read(i)["image"]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"scene{i}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
