"""Videos in and out, by PyAV (the extra `video`)."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from train.data.files import check_regular
from train.output import whole

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")


def require_av() -> Any:
    """PyAV. ImportError with the line that installs it."""
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install 'backbone-zoo[video]'") from error
    return av


class Video:
    """A video file.

    Attributes:
        path: of the file.
        frames: how many the file says it has; 0 where it does not.
        rate: frames per second, on average.
    """

    def __init__(self, path: Path):
        """Open a file. Raises FileNotFoundError, ImportError without PyAV, and ValueError for a file that is no video."""
        av = require_av()
        check_regular(path)
        self.path = path
        try:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise ValueError(f"{path}: not a readable video (it has no pictures)")
                stream = container.streams.video[0]
                self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
                self.frames = int(stream.frames or (float(container.duration or 0) / av.time_base * self.rate))
        except av.FFmpegError as error:
            raise ValueError(f"{path}: not a readable video ({words(error)})") from error

    def __iter__(self) -> Iterator[tuple[np.ndarray, Any, Any]]:
        """(frame upright, uint8 H W 3; its time; the unit of time). ValueError where the file is damaged."""
        av = require_av()
        count = 0
        try:
            with av.open(str(self.path)) as container:
                for frame in container.decode(video=0):
                    pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    yield np.ascontiguousarray(pixels), frame.pts, frame.time_base
                    count += 1
        except av.FFmpegError as error:
            raise ValueError(f"{self.path}: damaged after {count} frames ({words(error)})") from error
        if not count:
            raise ValueError(f"{self.path}: not a readable video (no frame in it)")


def words(error: Exception) -> str:
    """What FFmpeg says, without numbers and paths."""
    return str(getattr(error, "strerror", None) or error).strip()


def rewrite(video: Video, target: Path, change: Callable[[np.ndarray], np.ndarray], steps: Callable[[Any], Any] = iter) -> int:
    """A video as MP4 (H.264) with every frame changed, at the times it had; returns how many there are.

    The file is whole or not there. Sides become even, as the format asks: a last odd row or column is left out.

    Args:
        video: what is read.
        target: .mp4 file to write.
        change: a frame uint8 H W 3 -> another one, all of the same size.
        steps: passes the frames on, e.g. under a progress bar.
    """
    av = require_av()
    count, last = 0, -1
    with whole(target) as hidden, av.open(str(hidden), "w") as container:
        stream: Any = None
        for pixels, time, unit in steps(video):
            drawn = change(pixels)
            drawn = np.ascontiguousarray(drawn[: drawn.shape[0] // 2 * 2, : drawn.shape[1] // 2 * 2])
            if stream is None:
                stream = container.add_stream("libx264", rate=video.rate)
                stream.height, stream.width, stream.pix_fmt = *drawn.shape[:2], "yuv420p"
                stream.codec_context.time_base = Fraction(1, 90000)
            if drawn.shape[:2] != (stream.height, stream.width):
                raise ValueError(f"{video.path}: the frames change their size after {count} of them")
            frame = av.VideoFrame.from_ndarray(drawn, format="rgb24")
            seconds = count / video.rate if time is None else time * Fraction(unit)
            last = max(last + 1, round(seconds * 90000))  # times must rise
            frame.pts, frame.time_base = last, Fraction(1, 90000)
            container.mux(stream.encode(frame))
            count += 1
        container.mux(stream.encode())
    return count
