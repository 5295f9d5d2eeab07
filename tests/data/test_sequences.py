"""Frames of video: generated, in folders and of KITTI's raw drives; their geometry, and what is refused before training."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as vision

from train import geometry, photometric
from train.data import DATASETS, check
from train.data.kitti_raw import KittiRaw
from train.data.sequences import SceneSequences, read_intrinsics
from train.data.video import Video
from train.sample import KINDS, Look, check_motion
from train.schema import AugmentConfig
from train.tasks.selfsup_depth import SelfSupDepth
from train.transforms import build_transform

TARGETS = ("frames", "intrinsics", "pose")
SIZE = (48, 64)


@pytest.fixture(scope="module")
def sequences() -> SceneSequences:
    return SceneSequences("train", (*TARGETS, "depth"), count=4, size=SIZE, speed=0.3)


def difference(sample: dict) -> float:
    """Mean photometric difference of the image and its first frame, warped by the sample's own entries, where both are seen."""
    image, frame = sample["image"][None].float() / 255, sample["frames"][:1].float() / 255
    depth, camera, pose = sample["depth"][None], sample["intrinsics"][None], sample["pose"][:1]
    places = geometry.grid(geometry.points(depth, camera), camera, pose, depth.shape[-2:])
    inside = (places.abs() < 0.98).all(-1)[:, None] & (depth > 0)
    warped = geometry.warp(frame, depth, camera, pose)
    return float((warped - image).abs().mean(1, keepdim=True)[inside].mean())


WRONG = {
    "far": lambda sample: {"depth": sample["depth"] * 1.5},
    "near": lambda sample: {"depth": sample["depth"] / 1.5},
    "still": lambda sample: {"pose": torch.eye(4).expand(2, 4, 4)},
    "backwards": lambda sample: {"pose": sample["pose"].inverse()},
    "another lens": lambda sample: {"intrinsics": sample["intrinsics"] * torch.tensor([1.4, 1.4, 1.0])[:, None]},
}


def test_true_depth_and_motion_make_the_generated_frames(sequences):
    samples = [sequences[index] for index in range(len(sequences))]
    true = np.array([difference(sample) for sample in samples])
    assert true.max() < 0.04
    for name, change in WRONG.items():
        worse = np.array([difference({**sample, **change(sample)}) for sample in samples])
        assert worse.mean() > 1.25 * true.mean() and (worse > true).mean() > 0.9, name


LOOK = Look([0, 0, 0], 255, vision.InterpolationMode.BILINEAR)
CHANGES = {
    "resize": lambda kind, value: kind.resize(value, SIZE, (96, 80), LOOK),
    "crop": lambda kind, value: kind.crop(value, 7, 11, (40, 50)),
    "pad": lambda kind, value: kind.pad(value, (20, 12, 0, 2), LOOK),
    "mirror": lambda kind, value: kind.flip(value, -1, SIZE),
    "upside down": lambda kind, value: kind.flip(value, -2, SIZE),
    "turn": lambda kind, value: kind.rotate(value, 20.0, SIZE, LOOK),
}


@pytest.mark.parametrize("name", CHANGES)
def test_camera_and_motion_follow_what_happens_to_the_pixels(sequences, name):
    """Changed together, the entries still fit each other; with the camera or the motion left as it was they do not."""
    kept = {"mirror": "pose", "upside down": "pose", "turn": "pose"}.get(name, "intrinsics")
    fits, left = [], []
    for index in range(0, len(sequences), 2):
        sample = sequences[index]
        entries = {key: value for key, value in sample.items() if key in KINDS}
        changed = {key: CHANGES[name](KINDS[key], value) for key, value in entries.items()}
        fits.append(difference(changed))
        left.append(difference({**changed, kept: entries[kept]}))
        for pose in changed["pose"]:
            check_motion(pose)
    assert np.mean(fits) < 0.025 and np.mean(left) > 1.1 * np.mean(fits)


def test_a_mirrored_camera_still_has_a_positive_focal_length(sequences):
    camera = sequences[0]["intrinsics"] + torch.tensor([[0, 0, 3.0], [0, 0, 0], [0, 0, 0]])
    mirrored = KINDS["intrinsics"].flip(camera, -1, SIZE)
    assert mirrored[0, 0] == camera[0, 0] and mirrored[0, 2] == SIZE[1] - 1 - camera[0, 2]
    turned = KINDS["intrinsics"].rotate(camera, 90.0, SIZE, LOOK)
    torch.testing.assert_close(turned[:2, :2], camera[:2, :2], atol=1e-4, rtol=0)


def test_all_frames_change_their_colours_alike_and_the_views_stay(sequences):
    augment = AugmentConfig(hflip=1.0, color_jitter=0.5, color_jitter_prob=1.0)
    transform = build_transform(True, TARGETS, SIZE, [0.5] * 3, [0.5] * 3, augment)
    sample = {**sequences[0]}
    sample["frames"] = sample["image"][None].expand(2, -1, -1, -1).clone()
    torch.manual_seed(3)
    out = transform(sample)
    assert torch.equal(out["views"], sample["image"].flip(-1)[None].expand(3, -1, -1, -1))
    assert torch.equal(out["frames"][0], out["image"]) and torch.equal(out["frames"][1], out["image"])
    assert ((out["image"] * 0.5 + 0.5) * 255 - out["views"][0]).abs().mean() > 3


def test_generated_sequences_are_the_same_again_and_refuse_what_holds_no_sample():
    one, two = (SceneSequences("val", ("depth",), val_count=1, length=3, size=(16, 16)) for _ in range(2))
    assert len(one) == 1 and torch.equal(one[0]["image"], two[0]["image"]) and "frames" not in one[0]
    with pytest.raises(ValueError, match=r"holds no frame with neighbours at \[-1, 1\]: raise length"):
        SceneSequences("train", TARGETS, length=2)
    with pytest.raises(ValueError, match=r"each once and none 0.*got \[-1, 0\]"):
        SceneSequences("train", TARGETS, frames=[-1, 0])
    with pytest.raises(ValueError, match="speed must lie in"):
        SceneSequences("train", TARGETS, speed=0)


def write_video(root: Path, split: str = "train", start: int = 1, count: int = 4) -> Path:
    """Frames of one generated sequence as files: images, depth in millimetres, poses."""
    data = SceneSequences("train", ("depth",), count=1, length=count, frames=[1], size=SIZE)
    folder = root / split / "street"
    folder.mkdir(parents=True)
    for i, (image, depth, place) in enumerate(data.views(0)):
        name = f"frame_{start + i:04d}"
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{name}.png")
        for kind, write in (
            ("depth", lambda path, depth=depth: Image.fromarray((depth[0] * 1000).astype(np.uint16)).save(path)),
            ("pose", lambda path, place=place: np.savetxt(path, place @ np.diag([1, 1, 1, 1]))),
        ):
            path = root / f"{split}_{kind}" / "street" / f"{name}.{'png' if kind == 'depth' else 'txt'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
    np.savetxt(root / "intrinsics.txt", data.camera)
    return folder


def mirror(place: np.ndarray) -> np.ndarray:
    """A place in the scenes' world, whose axes are left-handed, in a right-handed one."""
    return np.diag([1, -1, 1, 1]) @ place


@pytest.fixture
def video(tmp_path) -> Path:
    for split in ("train", "val"):
        write_video(tmp_path, split)
        for file in (tmp_path / f"{split}_pose").rglob("*.txt"):
            np.savetxt(file, mirror(np.loadtxt(file)))
    return tmp_path


def test_a_folder_of_frames_is_a_sequence_whose_ends_are_left_out(video):
    data = Video(video, "train", TARGETS, poses="{split}_pose")
    assert len(data) == 2 and data.known_poses and data.offsets == (-1, 1)
    sample = data[0]
    assert sample["path"].endswith("frame_0002.png") and sample["frames"].shape == (2, 3, *SIZE)
    depth = torch.from_numpy(data.true_depth(0))[None].float()
    assert difference({**sample, "depth": depth}) < 0.03
    assert len(Video(video, "val", ("depth",))) == 4
    unknown = Video(video, "train", TARGETS)
    assert unknown[0]["pose"].isnan().all() and not unknown.known_poses


def test_what_is_wrong_with_a_video_is_said_with_its_file(video):
    frame = video / "train" / "street" / "frame_0002.png"
    moved = frame.rename(video / "kept.png")
    with pytest.raises(ValueError, match=r"frame_0001.png is followed by frame 3, and frame 2 is missing"):
        Video(video, "train", TARGETS)
    moved.rename(frame)
    with pytest.raises(ValueError, match=r"no frame in .*train has neighbours at \[-4\]"):
        Video(video, "train", TARGETS, frames=[-4])
    (video / "intrinsics.txt").write_text("86.4 86.4 127.5 95.5\n")
    with pytest.raises(ValueError, match=r"intrinsics.txt: the principal point \(127.5, 95.5\) is far .* 64x48"):
        Video(video, "train", TARGETS)
    (video / "intrinsics.txt").write_text("86.4 86.4 31.5 23.5\n128 96\n")
    with pytest.raises(ValueError, match="intrinsics are for images of 128x96 .* these have 64x48"):
        Video(video, "train", TARGETS)
    (video / "intrinsics.txt").write_text("86.4 nan 31.5 23.5 # fy is missing\n")
    with pytest.raises(ValueError, match="intrinsics.txt: intrinsics must be 3x3 finite"):
        Video(video, "train", TARGETS)
    (video / "intrinsics.txt").write_text("86.4 86.4 31.5 23.5 64 48")
    pose = video / "train_pose" / "street" / "frame_0003.txt"
    place = np.loadtxt(pose)
    np.savetxt(pose, np.diag([1, 1, 2, 1]) @ place)
    with pytest.raises(ValueError, match=r"frame_0003.txt: a pose must be a rotation and a translation, got \[\["):
        Video(video, "train", TARGETS, poses="{split}_pose")
    pose.unlink()
    with pytest.raises(FileNotFoundError, match=r"frame_0003.png has no pose street/frame_0003.txt"):
        Video(video, "train", TARGETS, poses="{split}_pose")
    (video / "val_depth" / "street" / "frame_0001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"frame_0001.png has no depth map street/frame_0001"):
        Video(video, "val", ("depth",))
    Image.new("RGB", (32, 48), "red").save(frame)
    with pytest.raises(ValueError, match=r"frame_0002.png: the frame has height x width 48x32 but its image .*frame_0003.png"):
        Video(video, "train", TARGETS)[1]


def test_intrinsics_are_a_matrix_or_four_numbers(tmp_path):
    path = tmp_path / "camera.txt"
    path.write_text("585 0 320\n0, 585, 240\n0 0 1\n")
    assert read_intrinsics(path, (480, 640)).tolist() == [[585, 0, 320], [0, 585, 240], [0, 0, 1]]
    path.write_text("585 600 320 240")
    assert read_intrinsics(path, (480, 640)).tolist() == [[585, 0, 320], [0, 600, 240], [0, 0, 1]]
    path.write_text("585 x 320 240")
    with pytest.raises(ValueError, match=r"camera.txt: could not convert string to float: 'x'"):
        read_intrinsics(path, (480, 640))
    path.write_text("585 600 320")
    with pytest.raises(ValueError, match=r"or fx fy cx cy; got 3 numbers"):
        read_intrinsics(path, (480, 640))


def test_data_check_warps_two_frames_and_sees_poses_that_do_not_fit(video, tmp_path):
    task = SelfSupDepth()
    train = Video(video, "train", TARGETS, poses="{split}_pose")
    report = check.run([train, Video(video, "val", ("depth",))], task, tmp_path / "out")
    assert report.ok and (tmp_path / "out" / "data_check.png").is_file()
    assert not any("warped" in finding.text for finding in report.findings)
    rows = check.frames.panels(train, 0, train.read(0))
    assert len(rows) == 2 and all("warped" in panel.title for panel in rows)
    plain = Video(video, "train", TARGETS)
    assert all("as it is" in panel.title for panel in check.frames.panels(plain, 0, plain.read(0)))
    train.places = {name: np.linalg.inv(place) for name, place in train.places.items()}
    (finding,) = check.frames.findings(train)
    assert finding.level == "warning" and "camera to world?" in finding.text


def write_drive(root: Path) -> None:
    """Three frames of one KITTI drive, both cameras, with a lidar that sees three points."""
    drive = root / "2011_09_26" / "drive_0001_sync"
    for camera in ("02", "03"):
        (drive / f"image_{camera}" / "data").mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 130, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(drive / f"image_{camera}" / "data" / f"{i:010d}.png")
    (drive / "velodyne_points" / "data").mkdir(parents=True)
    points = np.array([[10, 0, 0, 0.5], [20, 0, 0, 0.5], [5, -2, 0.4, 0], [-3, 0, 0, 0]], np.float32)  # x ahead, y left, z up
    points.tofile(drive / "velodyne_points" / "data" / "0000000001.bin")
    day = root / "2011_09_26"
    eye = "1 0 0 0 1 0 0 0 1"
    matrix = "100 0 65 0 0 100 20 0 0 0 1 0"
    (day / "calib_cam_to_cam.txt").write_text(
        f"calib_time: 09-Jan\nR_rect_00: {eye}\nP_rect_02: {matrix}\nP_rect_03: {matrix}\n"
    )
    (day / "calib_velo_to_cam.txt").write_text("R: 0 -1 0 0 0 -1 1 0 0\nT: 0 0 -0.5\n")
    (root / "train_files.txt").write_text("2011_09_26/drive_0001_sync 1 l\n2011_09_26/drive_0001_sync 1 r\n")
    (root / "test_files.txt").write_text("2011_09_26/drive_0001_sync 1 l\n")


def test_kitti_raw_reads_the_authors_lists(tmp_path):
    write_drive(tmp_path)
    data = KittiRaw(tmp_path, "train", TARGETS, frames=[-1, 1, "s"])
    left, right = data[0], data[1]
    assert left["frames"].shape == (3, 3, 40, 130) and torch.equal(left["frames"][2], right["image"])
    assert left["pose"][:2].isnan().all() and not data.known_poses
    assert [float(sample["pose"][2, 0, 3]) for sample in (left, right)] == pytest.approx([-0.54, 0.54])
    assert left["intrinsics"][0, 0] == pytest.approx(0.58 * 130) and left["intrinsics"][0, 2] == 64.5
    own = KittiRaw(tmp_path, "train", TARGETS, frames=["s"], intrinsics="calibration")
    assert own.known_poses and own[0]["intrinsics"][0].tolist() == [100, 0, 65]
    val = KittiRaw(tmp_path, "val", ("depth",))
    depth = val[0]["depth"][0]
    assert depth[19, 64] == 10 and depth.count_nonzero() == 2, "the nearer of two points, one pixel up and left"
    assert depth[round(20 - 100 * 0.4 / 4.5) - 1, round(65 + 100 * 2 / 4.5) - 1] == 5
    assert KittiRaw(tmp_path, "val", ("depth",), forward="camera")[0]["depth"][0, 19, 64] == 9.5


def test_a_split_list_with_a_missing_file_is_refused_with_list_entry_and_file(tmp_path):
    write_drive(tmp_path)
    (tmp_path / "train_files.txt").write_text("2011_09_26/drive_0001_sync 1 l\n2011_09_26/drive_0001_sync 2 l\n")
    with pytest.raises(FileNotFoundError, match=r"train_files.txt, entry 2 .*: its frame 1 .*0000000003.png does not exist"):
        KittiRaw(tmp_path, "train", TARGETS)
    (tmp_path / "test_files.txt").write_text("2011_09_26/drive_0001_sync 2 l\n")
    with pytest.raises(FileNotFoundError, match=r"test_files.txt, entry 1 .*: its lidar file .*0000000002.bin does not exist"):
        KittiRaw(tmp_path, "val", ("depth",))
    (tmp_path / "train_files.txt").write_text("2011_09_26/drive_0001_sync one l\n")
    with pytest.raises(ValueError, match='entry 1 .*one l.*: need "folder index side"'):
        KittiRaw(tmp_path, "train", TARGETS)
    (tmp_path / "2011_09_26" / "calib_velo_to_cam.txt").write_text("R: 0 -1 0 0 0 -1 1 0 0\n")
    (tmp_path / "test_files.txt").write_text("2011_09_26/drive_0001_sync 1 l\n")
    with pytest.raises(ValueError, match="calib_velo_to_cam.txt: has no entry T"):
        KittiRaw(tmp_path, "val", ("depth",))[0]


SEVEN = Path(os.environ.get("ZOO_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "sevenscenes_mini"


@pytest.mark.skipif(not SEVEN.is_dir(), reason=f"no 7-Scenes frames with poses at {SEVEN}")
def test_real_frames_with_poses_fit_when_depth_and_motion_are_true(tmp_path):
    """7-Scenes: 20 frames with Kinect depth; pairs that share at least half of the view."""
    (tmp_path / "data").mkdir()
    for line in (SEVEN / "train.txt").read_text().splitlines():
        stem = Path(line.split()[0]).name.split(".")[0]
        for end in (".color.jpg", ".depth.png", ".pose.txt"):
            (tmp_path / "data" / f"{stem}{end}").symlink_to(SEVEN / "data" / f"{stem}{end}")
    shutil.copy(SEVEN / "camera-intrinsics.txt", tmp_path / "intrinsics.txt")
    places = dict.fromkeys(("images", "depths", "poses"), "data")
    ends = {"image_suffix": ".color", "depth_suffix": ".depth", "pose_suffix": ".pose"}
    data = Video(tmp_path, "train", (*TARGETS, "depth"), **places, **ends, depth_invalid=[0, 65535], max_depth=10.0)
    assert len(data) == 18
    sideways, turned = torch.eye(4)[None].repeat(2, 1, 1)
    sideways[0, 3] = 0.2
    turned = geometry.motion(torch.tensor([[0, 0.1, 0.0]]), torch.zeros(1, 3))[0]
    found: dict[str, list[float]] = {}
    for index in range(len(data)):
        sample = data[index]
        entries = {key: KINDS[key].resize(sample[key], (480, 640), (120, 160), LOOK) for key in (*TARGETS, "image", "depth")}
        sample = {**sample, **entries}  # a quarter: the entries stay true, and it is quick
        image, camera, depth = sample["image"][None].float() / 255, sample["intrinsics"][None], sample["depth"][None]
        for frame, pose in zip(sample["frames"].float() / 255, sample["pose"], strict=True):
            places = geometry.grid(geometry.points(depth, camera), camera, pose[None], depth.shape[-2:])
            inside = (places.abs() < 1).all(-1)[:, None] & (depth > 0.1)
            if inside.float().mean() < 0.5:
                continue
            for name, (metres, motion) in {
                "true": (depth, pose),
                "far": (depth * 2, pose),
                "near": (depth / 2, pose),
                "still": (depth, torch.eye(4)),
                "sideways": (depth, sideways @ pose),
                "turned": (depth, turned @ pose),
            }.items():
                warped = geometry.warp(frame[None], metres, camera, motion[None])
                found.setdefault(name, []).append(float(photometric.photometric(warped, image)[inside].mean()))
    true = np.array(found.pop("true"))
    assert len(true) >= 15
    for name, values in found.items():
        worse = np.array(values)
        assert worse.mean() > 1.1 * true.mean() and (worse > true).mean() > 0.7, name
    assert np.mean(found["still"]) > 1.25 * true.mean()


def test_data_of_video_are_in_the_table():
    assert {"scene_sequences", "video", "kitti_raw"} <= set(DATASETS)
