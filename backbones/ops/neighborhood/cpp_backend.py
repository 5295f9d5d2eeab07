"""Neighbourhood attention on the CPU in C++ (kernels.cpp and its headers), compiled at first use and kept for later processes.

Asked for by name, or by `unavailable`, the first call waits for the compiler. Without a name another process compiles, which
takes half a minute or more, and the tiled path serves until it is done.

Forward and recomputing backward with the bias gradient, float32 and bfloat16 (float32 inside), any strides, no attention map:
extra memory is two numbers per query, some rows of the map per thread and, for the backward, what the gradients need. The
library goes to torch's extension folder (TORCH_EXTENSIONS_DIR, by default in the user's cache) under a name that holds a digest
of sources, flags and torch version. Two processes may ask for it at once: one compiles, the other waits, and the finished file
appears in one rename.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weights.read import digest

if TYPE_CHECKING:
    from . import Call

_logger = logging.getLogger(__name__)

MAIN = Path(__file__).with_name("kernels.cpp")  # includes the others
SOURCES = sorted(path for path in MAIN.parent.iterdir() if path.suffix in (".cpp", ".h"))
# No -march=native: the file is cached where another machine may find it; kernels.cpp dispatches at run time. -fopenmp makes
# at::parallel_for parallel; Apple's compiler has none.
FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", *(["-fopenmp"] if sys.platform == "linux" else [])]


def refuses(call: Call) -> str | None:
    """Why this call cannot run here, or None. The first call that could run compiles the library."""
    return refuses_kind(call) or unavailable()


def refuses_now(call: Call) -> str | None:
    """As `refuses`, but it does not wait for the compiler: while another process compiles, that is the reason.

    A call that is being compiled into a graph does wait, as the graph would keep the other path.
    """
    if (reason := refuses_kind(call)) is not None:
        return reason
    return unavailable() if torch.compiler.is_compiling() else unavailable_now()


def refuses_kind(call: Call) -> str | None:
    """Why no such call runs here, or None."""
    if call.q.device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {call.q.device}"
    if call.q.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes float32 and bfloat16, not {call.q.dtype}"
    if max(call.kernel) > 15:
        return f"it is tested for kernels up to 15, not {call.kernel}"
    return None


def run(call: Call) -> Tensor:  # B H W heads dim -> B H W heads dim
    """Map and table strides are free, only the numbers of one token must be contiguous."""
    q, k, v = (_token_contiguous(t) for t in (call.q, call.k, call.v))
    bias = None if call.bias is None else call.bias.float().contiguous()
    return torch.ops.backbones.neighborhood_cpu(q, k, v, bias, list(call.kernel), list(call.dilation), call.scale)[0]


@torch.compiler.assume_constant_result
def unavailable() -> str | None:
    """Loads the library, compiling it if need be. None, or the sentence that says why there is none (logged once)."""
    return _load()


_builder: subprocess.Popen | None = None
_loading = threading.Lock()


def unavailable_now() -> str | None:
    """As `unavailable`, but a library that is not there yet is compiled by another process, and that is the sentence."""
    global _builder
    if _load.cache_info().currsize or not sys.executable:
        return _load()
    if _builder is None:
        with _loading:
            if _intact(_path()):
                return _load()
            if _builder is None:
                _logger.info("compiling the neighbourhood attention kernel in the background; the tiled path serves until then")
                root = str(Path(__file__).resolve().parents[3])
                call = f"import sys; sys.path.insert(0, {root!r}); from {__name__} import library; library()"
                quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
                # a session of its own: it finishes for the next process if this one ends first
                _builder = subprocess.Popen([sys.executable, "-c", call], start_new_session=True, **quiet)
    if _builder.poll() is None:
        return "its C++ library is being compiled in the background"
    return _load()  # after a failure this meets the same one, and says it


@functools.cache
def _load() -> str | None:
    try:
        path = library()
        try:
            torch.ops.load_library(path)
        except OSError:  # no library, whatever its mark says: once more from the sources
            path.unlink()
            torch.ops.load_library(library())
    except Exception as error:
        reason = f"its C++ library could not be built or loaded ({_first_line(error)})"
        _logger.warning("neighbourhood attention runs without its C++ kernel: %s", reason)
        return reason
    _register()
    return None


def _path() -> Path:
    """Where the library is, or will be."""
    version = hashlib.sha256(repr([*FLAGS, torch.__version__, platform.machine()]).encode())
    for source in SOURCES:
        version.update(source.read_bytes())
    # torch's own default; its function for it lives in a module that looks for CUDA, and warns, when it is imported
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache)
    return root / f"backbones_neighborhood_{version.hexdigest()[:16]}.so"


def library() -> Path:
    """Path of the compiled library, compiled if no process has done so yet. Raises what the compiler or linker raises."""
    path = _path()
    if not _intact(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            if not _intact(path):
                _compile(path)
                _mark(path).write_text(digest(path), encoding="utf-8")
    return path


def _intact(path: Path) -> bool:
    """Whether the library is there as it was compiled: loading a damaged one can kill the process."""
    if not path.is_file():
        return False
    mark = _mark(path)
    return not mark.is_file() or mark.read_text(encoding="utf-8") == digest(path)


def _mark(path: Path) -> Path:
    """The file with the library's SHA-256."""
    return path.with_suffix(".sha256")


def _compile(path: Path) -> None:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns of missing CUDA, which C++ does not need
    from torch.utils import cpp_extension

    _logger.info("compiling the neighbourhood attention kernel, once for this machine (about half a minute)")
    start = time.monotonic()
    search = os.environ.get("PATH", "")
    folder = tempfile.mkdtemp(prefix=f"{path.stem}_", dir=path.parent)
    try:
        # an environment that is used but not activated has its ninja beside its python
        os.environ["PATH"] = os.pathsep.join([search, str(Path(sys.executable).parent)])
        cpp_extension.load(
            name="neighborhood",
            sources=[str(MAIN)],
            extra_cflags=FLAGS,
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder) / "neighborhood.so", path)
    finally:
        os.environ["PATH"] = search
        shutil.rmtree(folder, ignore_errors=True)
    _logger.info("compiled in %.0f s: %s", time.monotonic() - start, path)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time, released when it dies. Without fcntl both may compile, which only costs time."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _token_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _register() -> None:
    """Shapes and gradients of the operators that the library has brought."""

    @torch.library.register_fake("backbones::neighborhood_cpu")
    def _(q, k, v, bias, kernel, dilation, scale):
        batch, height, width, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((batch, height, 2, heads * width), dtype=torch.float32)

    @torch.library.register_fake("backbones::neighborhood_cpu_backward")
    def _(dout, q, k, v, bias, stats, kernel, dilation, scale):
        table = (0,) if bias is None else bias.shape
        return *(q.new_empty(q.shape) for _ in range(3)), q.new_empty(table, dtype=torch.float32)

    def setup_context(ctx, inputs, output):
        q, k, v, bias, *ctx.arguments = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros for the statistics, which have no gradient
        ctx.save_for_backward(q, k, v, bias, output[1])

    def backward(ctx, grad, _):
        if torch.is_grad_enabled():  # create_graph=True: a second derivative would silently be zero
            raise RuntimeError("the C++ neighbourhood attention has no second derivative: use backend='reference'")
        q, k, v, bias, stats = ctx.saved_tensors
        grads = torch.ops.backbones.neighborhood_cpu_backward(_token_contiguous(grad), q, k, v, bias, stats, *ctx.arguments)
        return *grads[:3], None if bias is None else grads[3], None, None, None

    torch.library.register_autograd("backbones::neighborhood_cpu", backward, setup_context=setup_context)
