"""KITTI's raw drives (Geiger et al. 2013) by the lists of the Eigen split, with depth from the lidar for validation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.data.base import FileDataset
from train.data.finding import need, read_list, read_text
from train.data.sequences import check_frames
from train.depth import DepthSpec

SIDES = {"l": "02", "r": "03", "2": "02", "3": "03"}
FOCAL = 0.58, 1.92  # of the width and of the height: monodepth2's for all drives
FIELDS = 4  # numbers a point in a lidar file


class KittiRaw(FileDataset):
    """Frames named by lists of "folder index side", e.g. "2011_09_26/2011_09_26_drive_0022_sync 473 l", as the authors' are.

    `folder/image_02/data/0000000473.png` (or .jpg; 03 for the right camera) below root is the frame, those of neighbouring
    numbers its neighbours; `folder/velodyne_points/data/0000000473.bin` and the date's calib_*.txt give its depth.
    Raises FileNotFoundError, naming list, line and file, for a frame, a neighbour or a lidar file that is not there.
    """

    provides = ("frames", "intrinsics", "pose", "depth")
    depth: DepthSpec = DepthSpec(min_depth=1e-3, max_depth=80.0)

    def find(
        self,
        train_list: str = "train_files.txt",
        val_list: str = "test_files.txt",
        frames: list[int | Literal["s"]] | None = None,
        intrinsics: Literal["authors", "calibration"] = "authors",
        baseline: float = 0.54,
        forward: Literal["lidar", "camera"] = "lidar",
    ) -> None:
        """Find the files of the listed frames.

        Args:
            train_list, val_list: of the splits, below root.
            frames: offsets of the frames that go with an image, "s" for the other camera of the pair; null = [-1, 1].
            intrinsics: "authors": one matrix for all drives, the principal point in the middle; "calibration": the drive's own.
            baseline: between the cameras, metres. Published code says 0.1 and multiplies depth by 5.4.
            forward: what depth is: the way ahead of the lidar, as monodepth2's export has it, or of the camera.
        """
        self.offsets = check_frames([-1, 1] if frames is None else frames, stereo=True)
        self.calibrated, self.baseline, self.forward = intrinsics == "calibration", baseline, forward
        self.known_poses = set(self.offsets) == {"s"}
        listing = self.root / (train_list if self.split == "train" else val_list)
        self.rows: list[tuple[str, int, str]] = []
        first = True
        for number, row in enumerate(read_list(listing, 3, "KittiRaw"), 1):
            entry = f"{listing}, entry {number} ({' '.join(row[:3])})"
            if row[2] not in SIDES or not row[1].isdecimal():
                raise ValueError(f'{entry}: need "folder index side", the side l or r')
            place = row[0], int(row[1]), SIDES[row[2]]
            if first:
                start = self.root / place[0] / f"image_{place[2]}" / "data"
                need(start, "the first drive of the list", "KittiRaw")
                self.suffix = ".png" if (start / f"{place[1]:010d}.png").exists() else ".jpg"
                first = False
            self.rows.append(place)
            wanted = {"the frame": self.frame_file(*place)}
            if "frames" in self.targets:
                wanted |= {f"its frame {frame}": self.neighbour(place, frame) for frame in self.offsets}
            if "depth" in self.targets:
                wanted["its lidar file"] = self.lidar_file(*place[:2])
            for what, file in wanted.items():
                if not file.exists():
                    raise FileNotFoundError(
                        f"{entry}: {what} {file} does not exist; complete the drive, or take the entry off the list (the first "
                        "and last frames of a drive have no neighbours)"
                    )

    def frame_file(self, folder: str, index: int, camera: str) -> Path:
        return self.root / folder / f"image_{camera}" / "data" / f"{index:010d}{self.suffix}"

    def lidar_file(self, folder: str, index: int) -> Path:
        return self.root / folder / "velodyne_points" / "data" / f"{index:010d}.bin"

    def neighbour(self, place: tuple[str, int, str], frame: int | str) -> Path:
        """The file of another frame, or of the same one in the other camera."""
        folder, index, camera = place
        if isinstance(frame, str):
            return self.frame_file(folder, index, "03" if camera == "02" else "02")
        return self.frame_file(folder, index + frame, camera)

    def image_files(self) -> list[Path]:
        return [self.frame_file(*row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def true_depth(self, index: int) -> np.ndarray | None:
        folder, number, _ = self.rows[index]
        if not self.lidar_file(folder, number).exists():
            return None
        height, width = self.image(self.frame_file(*self.rows[index])).shape[-2:]
        return self.lidar_depth(index, (height, width))

    def read(self, index: int) -> dict[str, Any]:
        place = self.rows[index]
        path = self.frame_file(*place)
        sample: dict[str, Any] = {"image": self.image(path), "path": path}
        height, width = sample["image"].shape[-2:]
        if "frames" in self.targets:
            sample["frames"] = self.frames_of(sample, [self.neighbour(place, frame) for frame in self.offsets])
            sample["intrinsics"] = self.camera(place, (height, width))
        if "pose" in self.targets:
            sample["pose"] = self.stereo_motions(place[2])
        if "depth" in self.targets:
            sample |= {"depth": self.lidar_depth(index, (height, width)), "depth_path": self.lidar_file(*place[:2])}
        return sample

    def stereo_motions(self, camera: str) -> np.ndarray:
        """n 4 4: the other camera of the pair lies `baseline` to the right of a left one; NaN for frames in time."""
        found = np.full((len(self.offsets), 4, 4), np.nan, np.float32)
        if "s" in self.offsets:
            found[self.offsets.index("s")] = np.eye(4)
            found[self.offsets.index("s"), 0, 3] = -self.baseline if camera == "02" else self.baseline
        return found

    def camera(self, place: tuple[str, int, str], size: tuple[int, int]) -> np.ndarray:
        """The camera matrix of an image of `size`."""
        height, width = size
        if not self.calibrated:
            across, down = FOCAL
            return np.array([[across * width, 0, (width - 1) / 2], [0, down * height, (height - 1) / 2], [0, 0, 1]], np.float32)
        calibration = self.calibration(place[0], "calib_cam_to_cam.txt", [f"P_rect_{place[2]}"])
        return calibration[f"P_rect_{place[2]}"].reshape(3, 4)[:, :3].astype(np.float32)

    def calibration(self, folder: str, name: str, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Entries of a calibration file of the drive's date. ValueError names the file and an entry that it lacks."""
        path = need(self.root / Path(folder).parts[0] / name, "the calibration of the day", "KittiRaw")
        found = {}
        for line in read_text(path).splitlines():
            key, _, values = line.partition(":")
            if key in keys:
                found[key] = np.array([float(word) for word in values.split()])
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"{path}: has no entry {missing[0]}")
        return found

    def lidar_depth(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Metres H W where a lidar point falls on a pixel, the nearest of several; 0 elsewhere."""
        folder, number, camera = self.rows[index]
        path = self.lidar_file(folder, number)
        values = np.fromfile(path, np.float32)
        if values.size % FIELDS or not values.size:
            raise ValueError(f"{path}: {values.size} numbers are no lidar points of {FIELDS} (x, y, z, reflectance)")
        points = values.reshape(-1, FIELDS)
        points = points[points[:, 0] >= 0]
        points = np.concatenate([points[:, :3], np.ones((len(points), 1), np.float32)], 1)
        cameras = self.calibration(folder, "calib_cam_to_cam.txt", ["R_rect_00", f"P_rect_{camera}"])
        lidar = self.calibration(folder, "calib_velo_to_cam.txt", ["R", "T"])
        place, upright = np.eye(4), np.eye(4)
        place[:3, :3], place[:3, 3] = lidar["R"].reshape(3, 3), lidar["T"]
        upright[:3, :3] = cameras["R_rect_00"].reshape(3, 3)
        seen = points @ (cameras[f"P_rect_{camera}"].reshape(3, 4) @ upright @ place).T
        metres = points[:, 0] if self.forward == "lidar" else seen[:, 2]
        columns, rows = (np.round(seen[:, axis] / seen[:, 2]).astype(np.int64) - 1 for axis in (0, 1))  # KITTI counts from 1
        height, width = size
        inside = (columns >= 0) & (rows >= 0) & (columns < width) & (rows < height) & (metres > 0)
        depth = np.full(size, np.inf, np.float32)
        np.minimum.at(depth, (rows[inside], columns[inside]), metres[inside].astype(np.float32))
        return np.where(np.isfinite(depth), depth, 0)
