"""`zoo doctor`: what this machine has, and how the zoo's attention runs on it, for a model and an input size."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import partial
from typing import Any

import timm
import torch
from rich.console import Console

import backbones
from backbones.ops import neighborhood
from train.bench.clock import measure, processor, shown, table
from train.halves import bfloat16_instructions, slow_bfloat16
from train.packages import origins
from train.plugins import require_model

OPTIONAL = (
    "accelerate",
    "natten",
    "triton",
    "ninja",
    "onnx",
    "onnxruntime",
    "wandb",
    "h5py",
    "pyarrow",
    "webdataset",
    "mmsegmentation",
)
FIRST_LEVEL = ((1, 56, 56, 2, 32), (7, 7), (1, 1), True)  # of nat_tiny at 224: shape, kernel, dilation, has bias


def run(model: str | None = None, size: tuple[int, int] | None = None) -> None:
    """Prints the machine and, for a model at a size (its own by default), every attention backend with its time and error.

    Without a model the attention of nat_tiny's first level is shown. An unknown name is a ValueError with the nearest one.
    """
    console = Console()
    about = found(model, size)
    console.print(table([{"what": name, "here": value} for name, value in about["system"].items()], "this machine"))
    if not about["attention"]:
        console.print(f"{model} runs on plain torch operators: it has no attention with several backends")
    elif model is not None:
        calls = sum(call["count"] for call in about["attention"])
        console.print(f"{model} calls neighbourhood attention {calls} times, in {len(about['attention'])} shapes")
    for call in about["attention"]:
        title = f"{call['call']} ({call['count']} in the model)" if model else call["call"]
        console.print(table(call["backends"], title))


def found(model: str | None = None, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """What `run` prints, as plain values: "system", and "attention" with a table of backends for each kind of call."""
    if model is not None:
        require_model("", model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls = {FIRST_LEVEL: 1} if model is None else calls_of(model, size, device)
    attention = []
    for (shape, kernel, dilation, has_bias), count in calls.items():
        _, height, width, heads, dim = shape
        title = (
            f"{height}x{width}, {heads} heads of {dim}, kernel {kernel[0]}x{kernel[1]}, dilation {dilation[0]}x{dilation[1]}"
        )
        backends = examine(shape, kernel, dilation, has_bias, device)
        attention.append({"call": title, "count": count, "backends": backends})
    return {"system": system(), "attention": attention}


def system() -> dict[str, str]:
    """What the zoo runs on: name and value."""
    values = {
        "Python": platform.python_version(),
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "backbone-zoo": backbones.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "no device",
    }
    for name in OPTIONAL:
        try:
            values[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            values[name] = "not installed"
    values |= {f"package {name}": place for name, place in origins().items()}
    values["bfloat16 on the CPU"] = slow_bfloat16() or " and ".join(bfloat16_instructions()) or "not known"
    values["C++ attention kernel"] = neighborhood.cpp_backend.unavailable() or "compiled"
    return values


def calls_of(name: str, size: tuple[int, int] | None, device: str) -> dict[tuple, int]:
    """Every neighbourhood attention in one forward of a model: (shape, kernel, dilation, has bias) -> how often."""
    model: Any = timm.create_model(name).eval().to(device)
    channels, *own = model.pretrained_cfg["input_size"]
    with neighborhood.recording() as found, torch.no_grad():
        model(torch.zeros(1, channels, *(size or own), device=device))
    return dict(found)


def examine(
    shape: tuple[int, ...], kernel: tuple[int, int], dilation: tuple[int, int], has_bias: bool, device: str, rounds: int = 5
) -> list[dict[str, str]]:
    """A row per backend: can it run this call in float32, if not why, its forward time and its largest error.

    Args:
        shape: B H W h d of the call.
        kernel, dilation: rows and columns.
        has_bias: with a relative position bias.
        device: "cpu" or "cuda".
        rounds: of the timing.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    bias = torch.randn(shape[3], *(2 * n - 1 for n in kernel), generator=generator).to(device) if has_bias else None

    def attend(backend: str) -> torch.Tensor:
        return neighborhood.neighborhood_attention(q, k, v, kernel, dilation, bias, backend=backend)

    with torch.no_grad():
        reasons = neighborhood.explain(q, k, v, kernel, dilation, bias)
        able = [name for name, reason in reasons.items() if reason is None]
        times = measure({name: partial(attend, name) for name in able}, rounds, device)
        definition = attend("reference")
        errors = {name: (attend(name) - definition).abs().max().item() for name in able}
        chosen = neighborhood.choose(neighborhood.check(q, k, v, kernel, dilation, bias))
    return [
        {
            "backend": f"{name} (automatic)" if name == chosen else name,
            "runs": "yes" if reason is None else reason,
            "ms (min)": shown(times[name]) if name in times else "-",
            "largest error": f"{errors[name]:.0e}" if name in errors else "-",
        }
        for name, reason in reasons.items()
    ]
