"""Speed, measured so that a busy machine does not lie: `zoo bench ops`, `zoo bench heads`, `zoo bench MODEL`.

On a CPU: one thread, process CPU time (user + system, without the waiting for other programs), the variants interleaved
A B C A B C in one process, median and minimum of the rounds. On CUDA: events around each run, interleaved too. Attention is
also given as a share of the speed of a matrix product, measured in the same rounds. Quote ratios, not milliseconds.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import backbones  # noqa: F401  (registers the zoo's models with timm)
from backbones.ops import neighborhood
from train.checks import hint

# batch, map side, heads, dilation; kernel 7 and head dim 32 as in every released NAT
OPS = ((1, 56, 2, 1), (1, 28, 4, 1), (1, 14, 8, 1), (1, 7, 16, 1), (8, 56, 2, 1), (1, 128, 2, 1), (1, 56, 2, 4), (1, 56, 2, 8))
OPS_CUDA = ((64, 56, 2, 1), (64, 28, 4, 1), (64, 14, 8, 1), (64, 7, 16, 1))
PEER = "swin_tiny_patch4_window7_224"
NATTEN = "natten, no bias"  # from 0.20 on it has none


def run(
    what: str,
    size: tuple[int, int] | None = None,
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    device: str | None = None,
    training: bool = True,
    memory: bool = True,
) -> None:
    """Measures `what` ("ops", "heads" or the name of a model) and prints a table.

    size: (H, W) of the images or, for ops, of the only map; batches: for models; device: "cpu" or "cuda", by default the GPU
    where there is one; training: also forward + backward (ops, heads) or a training step (models); memory: for ops and heads,
    also the peak (on CUDA and on Linux).
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has room for a whole row
    if what == "ops":
        cases = OPS_CUDA if device == "cuda" else OPS
        if size is not None:
            cases = ((1, size, 2, 1),)
        console.print(machine(device))
        console.print(table(bench_ops(cases, rounds, device, training), "neighbourhood attention, kernel 7, head dim 32"))
        if memory and (device == "cuda" or sys.platform == "linux"):
            console.print(table(bench_memory(256, device), "peak memory beyond the inputs, 256x256, 2 heads, in sizes of q"))
    elif what == "heads":
        from train.bench_heads import bench_heads

        console.print(machine(device))
        rows = bench_heads(size or (512, 512), min(rounds, 3), device, training, memory)  # a round takes minutes of one core
        console.print(table(rows, "dense heads: time, peak memory in MB, share of the model's forward time"))
    elif timm.is_model(what):
        console.print(machine(device))
        rows = bench_model(what, size or (224, 224), batches, rounds, device, training)
        console.print(table(rows, f"{what}, and {PEER} for comparison"))
    else:
        names = ["ops", "heads", *timm.list_models()]
        raise ValueError(f"nothing to measure is called {what!r}: 'ops', 'heads' or a model; {hint(what, names)}")


def machine(device: str) -> str:
    """One line that says what the numbers were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()} ({torch.backends.cpu.get_cpu_capability()})"
    how = "CUDA events" if device == "cuda" else "one thread, process CPU time"
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    return f"{datetime.date.today()}: {name}, {how}, {versions}"


def processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """A rich table of rows that share their keys."""
    found = Table(title=title)
    for key in rows[0] if rows else ():
        found.add_column(key)
    for row in rows:
        found.add_row(*(str(value) for value in row.values()))
    return found


# Time


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Thread barriers wait for threads that the system has put aside, which no clock can take out again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(variants: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """(median, minimum) milliseconds of each variant over `rounds` interleaved rounds, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    with one_thread():
        for counts in (False, *[True] * rounds):
            for name, variant in variants.items():
                spent = once(variant, device)
                if counts:
                    times[name].append(spent)
    return {name: (statistics.median(spent), min(spent)) for name, spent in times.items()}


def once(variant: Callable[[], Any], device: str) -> float:
    """Milliseconds of one run. On a CPU a short run is repeated for 20 ms, which is long against the clock.

    The first of them does not count: it pays for what the variant before did to caches and heap.
    """
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        variant()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begun = time.process_time()
    variant()
    spent, runs = time.process_time() - begun, 1
    if spent < 0.02:
        begun, runs = time.process_time(), 0
        while (spent := time.process_time() - begun) < 0.02 and runs < 100:
            variant()
            runs += 1
    return spent * 1e3 / runs


def shown(times: tuple[float, float]) -> str:
    return f"{times[0]:.2f} ({times[1]:.2f})"


# Neighbourhood attention


def bench_ops(
    cases: Sequence[tuple[int, int | tuple[int, int], int, int]] = OPS,
    rounds: int = 7,
    device: str = "cpu",
    training: bool = True,
    backends: Sequence[str] | None = None,
    kernel: int = 7,
    dim: int = 32,
) -> list[dict[str, str]]:
    """A row per case and backend: forward, forward + backward (gradients of q, k, v, bias), share of the matmul speed, error.

    cases: (batch, map side or (H, W), heads, dilation). With a bias throughout, except where the row says so; bfloat16 on CUDA
    and float32 on a CPU. q, k, v lie in one tensor, as behind a model's linear layer; joining their gradients is not counted.
    The error is the largest absolute difference of the output to the definition in float32.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left = torch.randn(1024, 1024, device=device, dtype=dtype)
    rows = []
    for batch, side, heads, dilation in cases:
        height, width = (side, side) if isinstance(side, int) else side
        packed = torch.randn(batch, height, width, 3, heads, dim, device=device, dtype=dtype)
        qkv = [part.requires_grad_() for part in packed.unbind(3)]
        bias = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, device=device, requires_grad=True)
        grad = torch.randn(batch, height, width, heads, dim, device=device, dtype=dtype)
        calls = attentions(*qkv, bias, kernel, dilation, backends)
        trained = [name for name in calls if training and can_train(name, device)]
        times = measure(  # both in the same rounds, so that their ratio holds on a busy machine
            {
                "matmul": lambda: left @ left,
                **{name: torch.no_grad()(call) for name, call in calls.items()},
                **{f"{name}, trained": training_step(calls[name], grad, (*qkv, bias)) for name in trained},
            },
            rounds,
            device,
        )
        forward, both = times, {name: times[f"{name}, trained"] for name in trained}
        with torch.no_grad():
            first = (part[:1].float() for part in qkv)
            definition = neighborhood.neighborhood_attention(*first, kernel, dilation, bias, backend="reference")
            errors = {name: (call()[:1].float() - definition).abs().max().item() for name, call in calls.items()}
        speed = 2 * 1024**3 / forward["matmul"][1]
        work = 4 * batch * height * width * heads * dim * kernel**2
        for name in calls:
            rows.append(
                {
                    "map": f"{height}x{width}, {heads} heads, batch {batch}"
                    + (f", dilation {dilation}" if dilation > 1 else ""),
                    "backend": name,
                    "forward ms (min)": shown(forward[name]),
                    "x NATTEN's speed": f"{forward[NATTEN][0] / forward[name][0]:.3g}" if NATTEN in forward else "-",
                    "of matmul speed": f"{100 * work / forward[name][1] / speed:.0f} %",
                    "with backward ms (min)": shown(both[name]) if name in both else "-",
                    "x forward": f"{both[name][0] / forward[name][0]:.1f}" if name in both else "-",
                    "error": f"{errors[name]:.0e}" if "no bias" not in name else "-",
                }
            )
    return rows


def attentions(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernel: int, dilation: int, backends: Sequence[str] | None
) -> dict[str, Callable[[], Tensor]]:
    """The backends that can run this call (but for the definition, which is no contender), and peers where there are any."""

    def attention(name: str, bias: Tensor | None) -> Callable[[], Tensor]:
        return lambda: neighborhood.neighborhood_attention(q, k, v, kernel, dilation, bias, backend=name)

    if backends is not None:
        return {name: attention(name, bias) for name in backends}
    reasons = neighborhood.explain(q, k, v, kernel, dilation, bias)
    calls = {name: attention(name, bias) for name, reason in reasons.items() if reason is None and name != "reference"}
    batch, height, width, heads, _ = q.shape
    with torch.no_grad():
        if (
            "natten" not in calls
            and (q.is_cuda or 4 * batch * heads * (height * width) ** 2 < 1 << 30)  # bytes: on a CPU it holds N x N scores
            and neighborhood.explain(q, k, v, kernel, dilation)["natten"] is None
        ):
            calls[NATTEN] = attention("natten", None)
    if q.is_cuda:
        calls["flex_attention, compiled"] = flex_attention(q, k, v, bias, kernel, dilation, compiled=True)
    return calls


def can_train(name: str, device: str) -> bool:
    return not (name == NATTEN and device == "cpu")  # NATTEN >= 0.20 has no backward there


def training_step(call: Callable[[], Tensor], grad: Tensor, leaves: Sequence[Tensor]) -> Callable[[], None]:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        call().backward(grad)

    return step


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernel: int, dilation: int, compiled: bool
) -> Callable[[], Tensor]:
    """The same attention through torch's flex_attention: raster order, block mask, the bias as a score_mod (a peer)."""
    from torch.nn.attention import flex_attention as flex

    height, width = q.shape[1:3]

    def sees(query: Tensor, key: Tensor, length: int) -> Tensor:
        residue, position, place = query % dilation, query // dilation, key // dilation
        size = (length - residue + dilation - 1) // dilation
        start = torch.minimum((position - kernel // 2).clamp(min=0), size - kernel)
        return (key % dilation == residue) & (place >= start) & (place < start + kernel)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return sees(i // width, j // width, height) & sees(i % width, j % width, width)

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        up = j // width // dilation - i // width // dilation + kernel - 1
        across = j % width // dilation - i % width // dilation + kernel - 1
        return s + bias[h, up.clamp(0, 2 * kernel - 2), across.clamp(0, 2 * kernel - 2)]  # beyond the table nothing is seen

    block = flex.create_block_mask(mask, None, None, height * width, height * width, device=q.device)
    function = torch.compile(flex.flex_attention, dynamic=False) if compiled else flex.flex_attention

    def call() -> Tensor:
        tokens = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return function(*tokens, score_mod=score, block_mask=block).transpose(1, 2).unflatten(1, (height, width))

    return call


def bench_memory(side: int = 256, device: str = "cpu", backends: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Peak memory beyond the inputs of one call without and with backward, in sizes of q (2 heads of 32).

    With backward the output and the three gradients count too. On a CPU each number is the growth of a process of its own.
    """
    if backends is None:
        q, bias = torch.empty(1, side, side, 2, 32, device=device), torch.empty(2, 13, 13, device=device)
        reasons = neighborhood.explain(q, q, q, 7, 1, bias)
        backends = [name for name, why in reasons.items() if why is None and name != "reference"]
    rows = []
    for name in backends:
        row = {"backend": name}
        for backward in (False, True):
            command = f"from train.bench import peak_memory; print(peak_memory({name!r}, {side}, {device!r}, {backward}))"
            done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"measuring the memory of {name!r} failed: {done.stderr.strip().splitlines()[-1]}")
            row["with backward" if backward else "forward"] = f"{json.loads(done.stdout):.1f}"
        rows.append(row)
    return rows


def peak_memory(backend: str, side: int, device: str, backward: bool) -> float:
    """What one call adds to the peak of this process, in sizes of q."""
    q, k, v = (torch.randn(1, side, side, 2, 32, device=device).requires_grad_(backward) for _ in range(3))
    small = [torch.randn(1, 14, 14, 2, 32, device=device).requires_grad_(backward) for _ in range(3)]
    bias = torch.randn(2, 13, 13, device=device).requires_grad_(backward)

    def call(tensors: Sequence[Tensor]) -> None:
        out = neighborhood.neighborhood_attention(*tensors, 7, 1, bias, backend=backend)
        if backward:
            out.backward(torch.ones((), device=device).expand_as(out))

    with one_thread():
        call(small)  # loads libraries
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call((q, k, v))
            after = torch.cuda.max_memory_allocated()
        else:
            before = peak_resident()
            call((q, k, v))
            after = peak_resident()
    return (after - before) / (q.numel() * q.element_size())


def peak_resident() -> int:
    """Bytes that this process has had in memory at most. getrusage would also count the process that started it."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError("this system's /proc/self/status has no VmHWM line, so peak memory cannot be measured")


# Models


def bench_model(
    name: str,
    size: tuple[int, int] = (224, 224),
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    device: str = "cpu",
    training: bool = True,
    peer: str | None = PEER,
) -> list[dict[str, str]]:
    """Forward and training step (forward, backward, AdamW) with random weights, and their ratio to the peer's.

    A model whose attention has several backends is measured with each that can run it. A peer that cannot take the size is left
    out.
    """
    model = timm.create_model(name).to(device)
    variants = {f"{name}, {backend}" if backend else name: (model, backend) for backend in backends_of(model)}
    if peer is not None and peer != name:
        with contextlib.suppress(AssertionError, RuntimeError, ValueError):
            other = timm.create_model(peer).to(device).eval()
            other(torch.zeros(1, 3, *size, device=device))
            variants[peer] = (other, None)
    rows = []
    for batch in batches:
        images = torch.randn(batch, 3, *size, device=device)
        with torch.no_grad():
            forward = measure({key: forward_of(*variant, images) for key, variant in variants.items()}, rounds, device)
        steps = {key: step_of(*variant, images) for key, variant in variants.items()} if training else {}
        step = measure(steps, rounds, device)
        for key in variants:
            rows.append(
                {
                    "model": key,
                    "batch": str(batch),
                    "forward ms (min)": shown(forward[key]),
                    "of the peer": f"{forward[key][0] / forward[peer][0]:.2f}" if peer in forward else "-",
                    "step ms (min)": shown(step[key]) if step else "-",
                    "of the peer's": f"{step[key][0] / step[peer][0]:.2f}" if peer in step else "-",
                }
            )
    return rows


def backends_of(model: nn.Module) -> list[str | None]:
    """Names of the attention backends to measure a model with; [None] where there is nothing to choose."""
    if not any(hasattr(module, "backend") for module in model.modules()):
        return [None]
    device = next(model.parameters()).device
    x, bias = torch.empty(1, 7, 7, 1, 32, device=device), torch.empty(1, 13, 13, device=device)
    able = neighborhood.explain(x, x, x, 7, 1, bias)
    return [name for name in neighborhood.AUTOMATIC.get(device.type, ("tiled",)) if able[name] is None]


def use(model: nn.Module, backend: str | None) -> None:
    for module in model.modules():
        if backend is not None and hasattr(module, "backend"):
            module.backend = backend


def forward_of(model: nn.Module, backend: str | None, images: Tensor) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        use(model, backend)
        return model.eval()(images)

    return forward


def step_of(model: nn.Module, backend: str | None, images: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def step() -> None:
        use(model, backend)
        F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
