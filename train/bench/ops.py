"""`zoo bench ops`: the neighbourhood attention's backends beside each other and beside peers.

Attention is also given as a share of the speed of a matrix product, measured in the same rounds. Quote ratios, not
milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backbones.ops import neighborhood
from train.bench.clock import in_own_process, measure, one_thread, peak_resident, shown, training_step
from train.inference import pair

OpCase = tuple[int, int | tuple[int, int], int, int]
# batch, map side, heads, dilation; kernel 7 and head dim 32 as in every released NAT
OPS: tuple[OpCase, ...] = (
    (1, 56, 2, 1),
    (1, 28, 4, 1),
    (1, 14, 8, 1),
    (1, 7, 16, 1),
    (8, 56, 2, 1),
    (1, 128, 2, 1),
    (1, 56, 2, 4),
    (1, 56, 2, 8),
)
OPS_CUDA: tuple[OpCase, ...] = ((64, 56, 2, 1), (64, 28, 4, 1), (64, 14, 8, 1), (64, 7, 16, 1))
NATTEN = "natten, no bias"  # from 0.20 on it has none


def bench_ops(
    cases: Sequence[OpCase] = OPS,
    rounds: int = 7,
    device: str = "cpu",
    training: bool = True,
    backends: Sequence[str] | None = None,
    kernel: int = 7,
    dim: int = 32,
) -> list[dict[str, str]]:
    """A row per case and backend: forward, forward + backward (gradients of q, k, v, bias), share of the matmul speed, error.

    With a bias throughout, except where the row says so; bfloat16 on CUDA and float32 on a CPU. q, k, v lie in one tensor, as
    behind a model's linear layer; joining their gradients is not counted. The error is the largest absolute difference of the
    output to the definition in float32.

    Args:
        cases: (batch, map side or (H, W), heads, dilation).
        rounds: interleaved.
        device: "cpu" or "cuda".
        training: time forward and backward too.
        backends: names; None: all that can run the call.
        kernel: side of the neighbourhood.
        dim: of a head.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left = torch.randn(1024, 1024, device=device, dtype=dtype)
    rows = []
    for batch, side, heads, dilation in cases:
        height, width = pair(side)
        packed = torch.randn(batch, height, width, 3, heads, dim, device=device, dtype=dtype)
        qkv = [part.requires_grad_() for part in packed.unbind(3)]
        bias = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, device=device, requires_grad=True)
        grad = torch.randn(batch, height, width, heads, dim, device=device, dtype=dtype)
        q, k, v = qkv
        calls = attentions(q, k, v, bias, kernel, dilation, backends)
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
            q, k, v = (part[:1].float() for part in qkv)
            definition = neighborhood.neighborhood_attention(q, k, v, kernel, dilation, bias, backend="reference")
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
    """The backends that can run this call (but for the definition, which is no contender), and peers where there are any.

    Args:
        q, k, v: B H W h d.
        bias: h 2k-1 2k-1.
        kernel: side of the neighbourhood.
        dilation: of the neighbourhood.
        backends: names; None: all.
    """

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
    """Whether a contender has a backward pass on this device."""
    return not (name == NATTEN and device == "cpu")  # NATTEN >= 0.20 has no backward there


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernel: int, dilation: int, compiled: bool
) -> Callable[[], Tensor]:
    """The same attention through torch's flex_attention: raster order, block mask, the bias as a score_mod (a peer).

    Args:
        q, k, v: B H W h d.
        bias: h 2k-1 2k-1.
        kernel: side of the neighbourhood.
        dilation: of the neighbourhood.
        compiled: with torch.compile.
    """
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
        query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return function(query, key, value, score_mod=score, block_mask=block).transpose(1, 2).unflatten(1, (height, width))

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
            call = f"print(peak_memory({name!r}, {side}, {device!r}, {backward}))"
            printed = in_own_process("train.bench.ops", call, f"measuring the memory of {name!r}")
            row["with backward" if backward else "forward"] = f"{json.loads(printed):.1f}"
        rows.append(row)
    return rows


def peak_memory(backend: str, side: int, device: str, backward: bool) -> float:
    """What one call adds to the peak of this process, in sizes of q.

    Args:
        backend: its name.
        side: of the map.
        device: "cuda" or "cpu".
        backward: with the gradients.
    """
    q, k, v = (torch.randn(1, side, side, 2, 32, device=device).requires_grad_(backward) for _ in range(3))
    small = [torch.randn(1, 14, 14, 2, 32, device=device).requires_grad_(backward) for _ in range(3)]
    bias = torch.randn(2, 13, 13, device=device).requires_grad_(backward)

    def call(tensors: Sequence[Tensor]) -> None:
        q, k, v = tensors
        out = neighborhood.neighborhood_attention(q, k, v, 7, 1, bias, backend=backend)
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
