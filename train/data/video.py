"""Folders of video frames, one sequence a folder, with one file of camera intrinsics."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data.base import FileDataset
from train.data.files import CONTENT, IMAGE_SUFFIXES
from train.data.finding import by_name, fill_in, need
from train.data.sequences import check_frames, motions, read_intrinsics, read_pose
from train.depth import DepthSpec


class Video(FileDataset):
    """Frames below the folder `images`; the files of one sub-folder, in the order of the numbers that end their names, are a
    sequence.

    A training sample is a frame that has all its neighbours, so the ends of a sequence are left out. A validation sample is a
    frame with a depth map.
    Raises FileNotFoundError and ValueError, naming the file, for a sequence with a gap or without a sample, for intrinsics of
    another size, for a missing depth map or pose, and for a pose that is no rotation.
    """

    provides = ("frames", "intrinsics", "pose", "depth")
    depth: DepthSpec

    def find(
        self,
        images: str = "{split}",
        depths: str = "{split}_depth",
        poses: str | None = None,
        intrinsics: str = "intrinsics.txt",
        frames: list[int] | None = None,
        image_suffix: str = "",
        depth_suffix: str = "",
        pose_suffix: str = "",
        depth_divisor: float = 1000.0,
        depth_invalid: Sequence[float] = (0,),
        min_depth: float = 1e-3,
        max_depth: float = 80.0,
    ) -> None:
        """Find the frames and what belongs to them.

        Args:
            images, depths: folders; {split} is the split's name.
            poses: folder of the poses, likewise; null where none are known.
            intrinsics: file with a 3x3 matrix or "fx fy cx cy", in pixels, and if need be a row with width and height.
            frames: offsets of the frames that go with an image; null = [-1, 1].
            image_suffix, depth_suffix, pose_suffix: what follows the name that a frame, its depth map and its pose share.
            depth_divisor: file units per metre.
            depth_invalid: file values without a reading.
            min_depth, max_depth: of valid depth, metres.
        """
        offsets: list[int] = [-1, 1] if frames is None else frames
        self.offsets = check_frames(offsets)
        self.depth = DepthSpec(divisor=depth_divisor, min_depth=min_depth, max_depth=max_depth)
        self.depth_invalid = tuple(depth_invalid)
        folder = self.root / fill_in(images, self.split, "images")
        found = by_name(folder, image_suffix, IMAGE_SUFFIXES, "video frames", "Video")
        depth_folder = self.root / fill_in(depths, self.split, "depths")
        needs_depth = "depth" in self.targets
        self.depth_files: dict[str, Path] = {}
        if needs_depth or depth_folder.is_dir():
            self.depth_files = by_name(depth_folder, depth_suffix, tuple(CONTENT), "depth maps", "Video")
        if needs_depth and (lost := [name for name in found if name not in self.depth_files]):
            raise FileNotFoundError(f"Video: {found[lost[0]]} has no depth map {lost[0]}{depth_suffix} in {depth_folder}")
        self.known_poses = poses is not None
        pose_files: dict[str, Path] = {}
        if poses is not None and "pose" in self.targets:
            pose_folder = self.root / fill_in(poses, self.split, "poses")
            pose_files = by_name(pose_folder, pose_suffix, (".txt",), "poses", "Video")
            if lost := [name for name in found if name not in pose_files]:
                raise FileNotFoundError(f"Video: {found[lost[0]]} has no pose {lost[0]}{pose_suffix}.txt in {pose_folder}")
        self.places = {name: read_pose(pose_files[name]) for name in found if name in pose_files}
        self.files = found
        self.samples: list[tuple[str, list[str]]] = []  # a name, and those of its neighbours
        if "frames" not in self.targets:
            self.samples = [(name, []) for name in found]
            return
        camera = need(self.root / intrinsics, "the camera's intrinsics", "Video")
        for _, group in itertools.groupby(
            sorted(found, key=lambda name: (str(Path(name).parent), name)), lambda n: Path(n).parent
        ):
            names = in_order([*group], found)
            height, width = self.image(found[names[0]]).shape[-2:]
            self.camera = read_intrinsics(camera, (height, width))
            for i, name in enumerate(names):
                if all(0 <= i + offset < len(names) for offset in offsets):
                    self.samples.append((name, [names[i + offset] for offset in offsets]))
        if not self.samples:
            raise ValueError(f"Video: no frame in {folder} has neighbours at {list(self.offsets)}: the sequences are too short")

    def image_files(self) -> list[Path]:
        return [self.files[name] for name, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def true_depth(self, index: int) -> np.ndarray | None:
        file = self.depth_files.get(self.samples[index][0])
        return None if file is None else self.metres(file, self.depth.divisor, self.depth_invalid)

    def read(self, index: int) -> dict[str, Any]:
        name, others = self.samples[index]
        path = self.files[name]
        sample: dict[str, Any] = {"image": self.image(path), "path": path}
        if "frames" in self.targets:
            sample["frames"] = self.frames_of(sample, [self.files[other] for other in others])
            sample["intrinsics"] = self.camera
        if "pose" in self.targets:
            unknown = np.full((len(others), 4, 4), np.nan, np.float32)
            sample["pose"] = motions(self.places[name], [self.places[n] for n in others]) if self.known_poses else unknown
        if "depth" in self.targets:
            file = self.depth_files[name]
            sample |= {"depth": self.metres(file, self.depth.divisor, self.depth_invalid), "depth_path": file}
        return sample


def in_order(names: list[str], files: dict[str, Path]) -> list[str]:
    """The frames of a sequence by the number that ends their names, by name where one has none.

    Raises ValueError, naming the file before it, for a gap: its neighbours would be no neighbours.
    """
    numbers = {name: int(match[1]) for name in names if (match := re.search(r"(\d+)$", name))}
    if len(numbers) < len(names):
        return names
    names = sorted(names, key=lambda name: numbers[name])
    steps = [numbers[b] - numbers[a] for a, b in itertools.pairwise(names)]
    for name, step in zip(names, steps, strict=False):
        if step != min(steps):
            raise ValueError(
                f"Video: {files[name]} is followed by frame {numbers[name] + step}, and frame {numbers[name] + min(steps)} is "
                f"missing: frames are {min(steps)} apart elsewhere. Put what follows into a folder of its own"
            )
    return names
