import fcntl
import os
import tempfile
from pathlib import Path

from train import checkpoint

opened, synced = os.open, os.fsync


def open_like_windows(path, flags, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, flags, *rest, **more)


def fsync_like_windows(handle):
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    return synced(handle)


os.open, os.fsync = open_like_windows, fsync_like_windows
target = Path(tempfile.mkdtemp()) / "config.yaml"
checkpoint.write(target, lambda temporary: temporary.write_text("x"))
print("ok" if target.read_text() == "x" else "not written")
