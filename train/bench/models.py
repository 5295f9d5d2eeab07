"""`zoo bench A B ...`: models beside each other, each in the way it is asked for, and how far they are from the limits.

A subject is a model name, a run folder or an exported file, with ways after an "@": `swin_t@fuse`, `nat_tiny@compile+tiled`,
`swin_tiny_patch4_window7_224@openvino`. Models by name have random weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import backbones
from backbones.ops import neighborhood
from train.bench.clock import AddedPeak, in_own_process, interleaved, one_thread, ratio
from train.checks import nearest
from train.plugins import is_model

WHOLE = ("ops", "heads", "linear", "claims", "edits", "gpu", "train")  # benchmarks by a name of their own

PEER = "swin_tiny_patch4_window7_224"
ENGINES = ("eager", "compile", "onnxruntime", "openvino")
WAYS = (*ENGINES, "fuse", "int8", "channels_last", *neighborhood.BACKENDS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILES = (".onnx", ".pt2")


@dataclass(frozen=True)
class Settings:
    """How every subject is measured, unless its ways say otherwise.

    size: (H, W), the first subject's own by default; threads: of a CPU; dtype: of weights and images in inference, of autocast
    in training; engine: one of ENGINES; fuse: `backbones.fuse`, which is for inference alone.
    """

    size: tuple[int, int] | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    engine: str = "eager"
    fuse: bool = False
    channels_last: bool = False


@dataclass(frozen=True)
class Subject:
    """What is measured: a model name, run folder or file, and how."""

    label: str
    source: str
    engine: str
    fuse: bool
    channels_last: bool
    backend: str | None
    int8: bool = False

    @property
    def is_file(self) -> bool:
        return Path(self.source).suffix in FILES

    @property
    def trains(self) -> bool:
        return self.engine in ("eager", "compile") and not self.fuse and not self.int8 and not self.is_file


def parse(text: str, settings: Settings) -> Subject:
    """A subject as it is written. Raises ValueError for an unknown source or way, or for ways that contradict each other."""
    source, _, rest = text.partition("@")
    ways = [way for way in rest.split("+") if way]
    for way in ways:
        if way not in WAYS:
            raise ValueError(f"{text!r}: unknown way {way!r}; {nearest(way, WAYS)}")
    engines = [way for way in ways if way in ENGINES]
    backends = [way for way in ways if way in neighborhood.BACKENDS]
    if len(engines) > 1 or len(backends) > 1:
        raise ValueError(f"{text!r} names {' and '.join(engines if len(engines) > 1 else backends)}: give one")
    path = Path(source)
    if path.suffix in FILES:
        if not path.is_file():
            raise FileNotFoundError(f"{source} is not a file")
        if ways and (set(ways) - {"onnxruntime", "openvino"} or path.suffix != ".onnx"):
            raise ValueError(f"{text!r}: a file is run as it is; an .onnx file takes @onnxruntime or @openvino")
        engine = engines[0] if engines else settings.engine if settings.engine in ("onnxruntime", "openvino") else "onnxruntime"
        return Subject(text, source, engine if path.suffix == ".onnx" else "eager", False, False, None)
    if not path.is_dir() and not is_model(source):
        raise ValueError(
            f"nothing to measure is called {source!r}: a model, a run folder, an .onnx or .pt2 file, or one of "
            f"{', '.join(WHOLE)}; {nearest(source, [*WHOLE, *timm.list_models()])}"
        )
    found = Subject(
        text,
        source,
        engines[0] if engines else settings.engine,
        settings.fuse or "fuse" in ways,
        settings.channels_last or "channels_last" in ways,
        backends[0] if backends else None,
        "int8" in ways,
    )
    if found.int8 and (found.engine != "eager" or found.fuse or settings.device != "cpu" or settings.dtype != "float32"):
        raise ValueError(f"{text!r}: int8 is for eager models on the CPU in float32, and not folded")
    return found


def bench_models(
    texts: Sequence[str],
    settings: Settings,
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    training: bool = True,
    memory: bool = True,
) -> dict[str, Any]:
    """Inference and training step (forward, backward, AdamW) of the subjects, interleaved; all are in memory at once.

    Returns {"settings", "ceilings", "rows"}. A row has: subject, pass, batch, ms (median), ms_min, images_per_s, ratio (the
    first subject's time over this one's, median of the rounds) with its quartiles, gmacs of one image, gflops per second, their
    share of the matrix product's, and memory_mb, what a pass adds to the peak beyond the weights.
    Raises ValueError for a subject that is not known, or cannot take the first one's size.

    Args:
        texts: subjects, the first of which the others are compared with; one alone is compared with PEER.
        settings: what all of them share.
        batches: batch sizes.
        rounds: interleaved.
        training: training steps too.
        memory: also the peak, on CUDA and Linux.
    """
    subjects = [parse(text, settings) for text in texts]
    if len({subject.label for subject in subjects}) < len(subjects):
        raise ValueError(f"a subject is named twice: {', '.join(texts)}")
    size = settings.size or own_size(subjects[0])
    settings = dataclasses.replace(settings, size=size)
    if len(subjects) == 1 and not subjects[0].is_file and subjects[0].source != PEER and takes(PEER, size):
        subjects.append(parse(PEER, settings))
    with tempfile.TemporaryDirectory() as folder:
        built = {subject.label: Runner(subject, settings, folder) for subject in subjects}
        limits = ceilings(settings)
        rows = [
            row
            for batch in batches
            for train in ((False, True) if training else (False,))
            for row in bench_pass(built, settings, batch, rounds, train, memory, limits["matmul_gflops"])
        ]
    return {"settings": dataclasses.asdict(settings), "ceilings": limits, "rows": rows}


def bench_pass(
    built: dict[str, Runner], settings: Settings, batch: int, rounds: int, train: bool, memory: bool, matmul: float
) -> list[dict[str, Any]]:
    """The rows of one pass at one batch size.

    Args:
        built: name -> the subject, ready to run.
        settings: what all of them share.
        batch: images at once.
        rounds: interleaved.
        train: training steps instead of inference.
        memory: also the peak.
        matmul: the matrix product's speed, of which each row states its share.
    """
    able = {label: runner for label, runner in built.items() if not train or runner.subject.trains}
    calls = {label: (runner.step if train else runner.inference)(batch) for label, runner in able.items()}
    times = interleaved(calls, rounds, settings.device, settings.threads) if calls else {}
    first = next(iter(built))
    rows = []
    for label, runner in able.items():
        spent = times[label]
        middle = statistics.median(spent)
        against = ratio(times[first], spent) if first in times and label != first else None
        # a training step's products: forward, and those for the gradients of inputs and of weights
        flops = None if runner.gmacs is None else 2 * runner.gmacs * batch * (3 if train else 1) / middle * 1e3
        rows.append(
            {
                "subject": label,
                "pass": "training" if train else "inference",
                "batch": batch,
                "ms": middle,
                "ms_min": min(spent),
                "images_per_s": batch / middle * 1e3,
                "ratio": against and against[0],
                "ratio_quartiles": against and against[1:],
                "gmacs": runner.gmacs,
                "gflops": flops,
                "of_matmul": None if flops is None else flops / matmul,
                "error": None if train else runner.error(),
                "memory_mb": memory_of(runner, settings, batch, train) if memory else None,
            }
        )
    return rows


class Runner:
    """A subject, built, with functions that run one batch. folder: for files that an engine needs."""

    def __init__(self, subject: Subject, settings: Settings, folder: str):
        self.subject, self.settings, self.folder = subject, settings, folder
        self.channels = 3
        self.model: Any = None
        self.gmacs: float | None = None
        assert settings.size is not None
        if subject.is_file and subject.source.endswith(".pt2"):
            self.model = torch.export.load(subject.source).module()
        elif not subject.is_file:
            self.model, self.channels = build(subject.source, settings.size)
            neighborhood.settle(self.model)
            self.gmacs = multiply_adds(self.model, self.channels, settings.size)
        self.fast = self._fast()

    def _fast(self) -> Callable[[Tensor], Any]:
        """What runs inference."""
        subject, settings = self.subject, self.settings
        if subject.engine in ("onnxruntime", "openvino"):
            if settings.device != "cpu" or settings.dtype != "float32":
                raise ValueError(f"{subject.label}: {subject.engine} is measured on the CPU in float32")
            path = subject.source if subject.is_file else self._exported()
            return session(path, subject.engine, settings.threads)
        if subject.is_file:
            if settings.device != "cpu" or settings.dtype != "float32":
                raise ValueError(f"{subject.label}: a .pt2 file runs as it was exported, on the CPU in float32")
            return self.model
        dtype = DTYPES[settings.dtype]
        if subject.int8:
            return quantised(self.model)
        if subject.fuse or dtype != torch.float32:  # the training step keeps the weights in float32
            model = (backbones.fuse(self.model) if subject.fuse else build(subject.source, settings.size)[0]).to(dtype)
        else:
            model = self.model
        model = model.to(settings.device).eval()
        if subject.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return torch.compile(model) if subject.engine == "compile" else model

    def _exported(self) -> str:
        from train.export import export

        assert self.settings.size is not None
        model = backbones.fuse(self.model) if self.subject.fuse else self.model
        path = Path(self.folder) / f"{self.subject.label.replace('/', '_')}.onnx"
        export(model, path, self.settings.size, self.channels)
        return str(path)

    def error(self) -> float | None:
        """Largest difference of the output to the plain model's in float32, over the largest output; None for the plain one."""
        subject, settings = self.subject, self.settings
        changed = subject.fuse or subject.int8 or subject.channels_last or subject.backend or subject.engine != "eager"
        if self.model is None or subject.is_file or not (changed or settings.dtype != "float32"):
            return None
        with torch.inference_mode():
            images = self.images(1, torch.float32)
            wanted = first_tensor(self.model.to(settings.device).eval()(images)).float()
            with attention_by(subject.backend):
                found = first_tensor(self.fast(images.to(DTYPES[settings.dtype]))).float()
        return float((found - wanted).abs().max() / wanted.abs().max())

    def images(self, batch: int, dtype: torch.dtype) -> Tensor:
        assert self.settings.size is not None
        images = torch.randn(batch, self.channels, *self.settings.size, device=self.settings.device, dtype=dtype)
        return images.contiguous(memory_format=torch.channels_last) if self.subject.channels_last else images

    def inference(self, batch: int) -> Callable[[], Any]:
        """A function that runs a batch without gradients."""
        images = self.images(batch, DTYPES[self.settings.dtype])
        if self.subject.trains:
            self.model.eval()  # a training step may have left it in training mode

        def call() -> Any:
            with torch.inference_mode(), attention_by(self.subject.backend):
                return self.fast(images)

        return call

    def step(self, batch: int) -> Callable[[], None]:
        """A function that runs a training step of a batch: forward, backward, AdamW. A half type is that of autocast."""
        settings = self.settings
        model = self.model.to(settings.device).train()
        if self.subject.channels_last:
            model = model.to(memory_format=torch.channels_last)
        run = torch.compile(model) if self.subject.engine == "compile" else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        images = self.images(batch, torch.float32)
        half = settings.dtype != "float32"

        def step() -> None:
            with attention_by(self.subject.backend):
                with torch.autocast(settings.device, DTYPES[settings.dtype]) if half else contextlib.nullcontext():
                    loss = any_loss(run(images))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step


def quantised(model: nn.Module) -> nn.Module:
    """A copy whose linear layers multiply in int8: weights rounded once per tensor, inputs at every call (torch's dynamic way).

    Raises ImportError where this torch has it no more.
    """
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None:
        raise ImportError(f"torch {torch.__version__} has no torch.ao.quantization.quantize_dynamic, which int8 needs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return quantize(model.eval(), {nn.Linear}, dtype=torch.qint8)


def first_tensor(output: Any) -> Tensor:
    """The first array of a model's or an engine's output."""
    values = output.values() if hasattr(output, "to_tuple") else output  # openvino's is a mapping that pytree does not know
    leaves = [leaf for leaf in pytree.tree_leaves(values) if hasattr(leaf, "shape")]
    return torch.as_tensor(leaves[0] if leaves else output[0])


def any_loss(output: Any) -> Tensor:
    """A number to learn from, whatever a model returns: cross entropy of logits, else the squares of all maps."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return F.cross_entropy(output, output.new_zeros(len(output), dtype=torch.long))
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.stack([t.float().square().mean() for t in tensors]).sum()


def attention_by(backend: str | None) -> contextlib.AbstractContextManager[None]:
    """Neighbourhood attention by this backend inside; None leaves the choice."""
    return contextlib.nullcontext() if backend is None else neighborhood.using(backend)


def build(source: str, size: tuple[int, int] | None) -> tuple[nn.Module, int]:
    """(model, image channels) of a run folder, or of a name with random weights.

    Models that are built for one size are built for this one. Raises ValueError if the model cannot take it.
    """
    if Path(source).is_dir():
        from train.evaluation import open_run

        config, _, model, _ = open_run(source)
        return model, config.model.in_chans
    channels = default_input(source)[0]
    if size is None or size == default_input(source)[1:]:
        return timm.create_model(source), channels
    error: Exception | None = None
    for args in ({"img_size": size}, {"strict_img_size": False}, {}):
        with contextlib.suppress(TypeError):
            try:
                model = timm.create_model(source, **args)
                with torch.no_grad():
                    model.eval()(torch.zeros(1, channels, *size))
            except (AssertionError, RuntimeError, ValueError) as wrong:
                error = wrong
            else:
                return model, channels
    raise ValueError(f"{source} cannot take images of {size[0]} x {size[1]}: {str(error).strip().splitlines()[0]}")


def default_input(name: str) -> tuple[int, ...]:
    """(channels, H, W) of the images a model is made for."""
    cfg = timm.get_pretrained_cfg(name)
    return tuple(cfg.input_size) if cfg is not None else (3, 224, 224)


def own_size(subject: Subject) -> tuple[int, int]:
    """(H, W) of a subject's own images; files do not say it, so there it is 224 x 224."""
    if subject.is_file:
        return 224, 224
    if Path(subject.source).is_dir():
        from train.evaluation import open_run

        height, width = open_run(subject.source)[0].data.size
        return height, width
    _, height, width = default_input(subject.source)
    return height, width


def takes(name: str, size: tuple[int, int]) -> bool:
    """Whether a model can be built for this image size."""
    with contextlib.suppress(ValueError):
        build(name, size)
        return True
    return False


def multiply_adds(model: nn.Module, channels: int, size: tuple[int, int]) -> float:
    """G multiply-adds of one image: matrix products and convolutions, counted from shapes alone."""
    from heads.features import on_meta

    with torch.no_grad(), neighborhood.using("reference"), FlopCounterMode(display=False) as counter:
        try:
            on_meta(model)(torch.empty(1, channels, *size, device="meta"))
        except (NotImplementedError, RuntimeError):  # it reads values, or has an operator that knows no shapes
            counter.flop_counts.clear()
            model.eval()(torch.zeros(1, channels, *size, device=next(model.parameters()).device))
    return counter.get_total_flops() / 2e9


def session(path: str, engine: str, threads: int) -> Callable[[Tensor], Any]:
    """A function that runs an .onnx file in an inference engine. ImportError names what to install."""
    if engine == "onnxruntime":
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError('this engine needs onnxruntime: pip install "backbone-zoo[export]"') from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        loaded = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = loaded.get_inputs()[0].name
        return lambda images: loaded.run(None, {name: images.numpy()})
    try:
        import openvino
    except ImportError as error:
        raise ImportError("this engine needs openvino: pip install openvino") from error
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", config)
    return lambda images: compiled([images.numpy()])


def ceilings(settings: Settings) -> dict[str, float]:
    """What this machine can do: GFLOP/s of a large square matrix product in the type, GB/s of a large copy (read + write)."""
    on_cuda, dtype = settings.device == "cuda", DTYPES[settings.dtype]
    side = 8192 if on_cuda else 1024
    left = torch.randn(side, side, device=settings.device).to(dtype)
    whole = torch.zeros((1 << 30 if on_cuda else 1 << 26) // 4, device=settings.device)
    out = torch.empty_like(whole)
    with torch.inference_mode():
        times = interleaved(
            {"matmul": lambda: left @ left, "copy": lambda: out.copy_(whole)}, 5, settings.device, settings.threads
        )
    return {
        "matmul_gflops": 2 * side**3 / min(times["matmul"]) / 1e6,
        "copy_gb_per_s": 2 * whole.numel() * 4 / min(times["copy"]) / 1e6,
    }


def memory_of(runner: Runner, settings: Settings, batch: int, train: bool) -> float | None:
    """MB that a pass adds to the peak: on CUDA in this process, whose allocator counts exactly, else in one of its own.

    Args:
        runner: the subject, ready to run.
        settings: of the benchmark.
        batch: images at once.
        train: a training step instead of inference.
    """
    if settings.device != "cuda":
        return added_memory(runner.subject, settings, batch, train)
    call = (runner.step if train else runner.inference)(batch)
    peak = AddedPeak("cuda")
    peak.start()
    for _ in range(2):  # the second step has the optimiser's state
        call()
    return peak.megabytes()


def added_memory(subject: Subject, settings: Settings, batch: int, train: bool) -> float | None:
    """MB that a pass adds to the peak beyond the weights; a training step's gradients and optimiser state count.

    Measured in a process of its own. None where the system does not tell.

    Args:
        subject: that runs.
        settings: of the benchmark.
        batch: images at once.
        train: a training step instead of inference.
    """
    if settings.device != "cuda" and sys.platform != "linux":
        return None
    call = f"print_added({subject.label!r}, {settings!r}, {batch}, {train})"
    return float(in_own_process("train.bench.models", call, f"measuring the memory of {subject.label!r}"))


def print_added(text: str, settings: Settings, batch: int, train: bool) -> None:
    """Prints what added_memory returns.

    Args:
        text: names the subject.
        settings: of the benchmark.
        batch: images at once.
        train: a training step instead of inference.
    """
    with tempfile.TemporaryDirectory() as folder, one_thread(settings.threads):
        runner = Runner(parse(text, settings), settings, folder)
        runner.inference(1)()  # loads libraries, compiles
        peak = AddedPeak(settings.device)
        call = functools.partial((runner.step if train else runner.inference), batch)()
        peak.start()
        for _ in range(2):  # the second step has the optimiser's state
            call()
        print(json.dumps(peak.megabytes()))
