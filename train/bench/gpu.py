"""`zoo bench gpu` (or `python -m train.bench.gpu`): everything a GPU has to show, in one go of a few minutes.

Parts, each of which starts only while there is time: `check` (the Triton kernels beside the definition: shapes, types,
gradients, memory full of NaN around the table), `ops` (the attention beside compiled flex_attention and the NATTEN there is),
`models` (images/s and peak memory in inference and training, bfloat16, ours and timm's, compiled and not), `syncs` (a training
step waits for the GPU nowhere) and `cifar` (a small NAT trained on CIFAR-10). One JSON file and one table hold it all.

--rehearse runs the same code on a CPU in Triton's interpreter with tiny shapes: its numbers mean nothing, the code is tested.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = ("check", "ops", "models", "syncs", "cifar")


@dataclass
class Plan:
    """What is run: on a GPU, or in rehearsal.

    checks: shape, kernel, dilation; ops: batch, map side, heads, dilation; models: subjects of `zoo bench`, the first beside
    the others of its row.
    """

    device: str
    dtypes: tuple[str, ...]
    checks: tuple[tuple[tuple[int, ...], Any, Any], ...]
    ops: tuple[tuple[int, int, int, int], ...]
    models: tuple[tuple[str, ...], ...]
    size: tuple[int, int] | None
    batch: int
    rounds: int
    dtype: str
    kernel: int = 7
    flex: bool = True
    cifar: tuple[str, ...] = ()


SWIN, POOL, PIT = "swin_tiny_patch4_window7_224", "poolformer_s12", "pit_s_224"
GPU = Plan(
    device="cuda",
    dtypes=("float32", "float16", "bfloat16"),
    checks=(
        ((2, 56, 56, 2, 32), 7, 1),
        ((2, 56, 56, 2, 32), 7, 8),
        ((2, 28, 28, 4, 32), 7, 1),
        ((2, 14, 14, 8, 32), 7, 2),
        ((2, 7, 7, 16, 32), 7, 1),
        ((1, 29, 41, 3, 24), (5, 13), (3, 1)),
        ((1, 16, 20, 1, 128), 11, 1),
    ),
    ops=((64, 56, 2, 1), (64, 28, 4, 1), (64, 14, 8, 1), (64, 7, 16, 1), (64, 56, 2, 8)),
    models=(
        ("nat_tiny", SWIN, f"{SWIN}@compile", "nat_tiny@compile"),
        ("swin_t", SWIN, f"{SWIN}@compile", "swin_t@compile"),
        ("litv2_s", SWIN),
        ("cvt_13", "vit_small_patch16_224", "vit_small_patch16_224@compile"),
        ("poolformer_s12_gn@channels_last", POOL, f"{POOL}@compile"),
        ("pit_s", PIT, "vit_small_patch16_224"),
    ),
    size=None,
    batch=64,
    rounds=10,
    dtype="bfloat16",
)
REHEARSAL = Plan(
    device="cpu",
    dtypes=("float32",),
    checks=(((1, 5, 6, 1, 16), 3, 1), ((1, 6, 7, 1, 16), (5, 3), (1, 2))),
    ops=((1, 6, 1, 1),),
    models=(("test_vit", "test_resnet"),),
    size=(160, 160),
    batch=1,
    rounds=1,
    dtype="float32",
    kernel=3,
    flex=False,
    cifar=("--optim.epochs=2", "--optim.global_batch=20", "--run.eval_every=1", "--data.size=[32, 32]", "--data.workers=0"),
)


@dataclass
class Clock:
    """How much of the minutes is left, and what was left out for it."""

    minutes: float
    began: float = field(default_factory=time.monotonic)
    left_out: dict[str, str] = field(default_factory=dict)

    def allows(self, what: str, share: float) -> bool:
        """Whether less than this share of the time is over; else `what` is noted as left out."""
        spent = time.monotonic() - self.began
        if spent <= share * self.minutes * 60:
            return True
        self.left_out[what] = f"out of time after {spent:.0f} s"
        return False


def run(minutes: float, out: str, cifar: str | None, rehearse: bool, parts: tuple[str, ...] = PARTS) -> dict[str, Any]:
    """Runs the parts and writes `out`.json after each of them, so that a machine taken away leaves what was done.

    Raises ValueError without a GPU, unless rehearsing, and FileExistsError if the file is there.

    Args:
        minutes: for all of it.
        out: path of the result without its suffix.
        cifar: the data set's folder; None: that part is left out.
        rehearse: without a GPU, small.
        parts: names of PARTS.
    """
    import torch

    from train.bench.clock import machine_facts

    if rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("--rehearse runs Triton's interpreter: set TRITON_INTERPRET=1 before the program starts")
    if not rehearse and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; rehearse with TRITON_INTERPRET=1 and --rehearse")
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}; there are {', '.join(PARTS)}")
    path = Path(out).with_suffix(".json")
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another --out or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    plan, clock = REHEARSAL if rehearse else GPU, Clock(minutes)
    found: dict[str, Any] = {"machine": machine_facts(plan.device), "rehearsal": rehearse, "left_out": clock.left_out}
    functions: dict[str, Callable[[], Any]] = {
        "check": lambda: check(plan, clock),
        "ops": lambda: ops(plan, clock),
        "models": lambda: models(plan, clock),
        "syncs": lambda: syncs(plan),
        "cifar": lambda: train_cifar(plan, cifar),
    }
    for part, share in zip(PARTS, (1.0, 0.35, 0.5, 0.85, 0.8)):
        if part not in parts or (part == "cifar" and cifar is None):
            clock.left_out[part] = "not asked for" if part not in parts else "needs --cifar FOLDER"
        elif clock.allows(part, share):
            began = time.monotonic()
            try:
                found[part] = functions[part]()
            except Exception as error:  # one part that fails must not take the others' minutes with it
                found[part] = {"failed": f"{type(error).__name__}: {str(error).strip()[:500]}"}
            found.setdefault("seconds", {})[part] = round(time.monotonic() - began, 1)
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def check(plan: Plan, clock: Clock) -> list[dict[str, Any]]:
    """Largest error of the Triton kernels, forward and every gradient, relative to the definition's largest value, in float64.

    The bias lies between runs of NaN, and the memory that outputs will take was filled with NaN before.
    """
    import torch

    from backbones.ops.neighborhood import neighborhood_attention

    rows = []
    for shape, kernel, dilation in plan.checks:
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        for name in plan.dtypes:
            if not clock.allows(f"check {shape} {name}", 0.3):
                continue
            dtype = getattr(torch, name)
            torch.manual_seed(0)
            qkv = torch.randn(*shape[:3], 3, *shape[3:], device=plan.device).to(dtype)
            guarded = torch.full((3, shape[3], 2 * height - 1, 2 * width - 1), float("nan"), device=plan.device)
            guarded[1].normal_()
            grad = torch.randn(shape, device=plan.device).to(dtype)
            results = []
            for backend, at in (("reference", torch.float64), ("triton", dtype)):
                torch.full(
                    (8, *qkv.shape), float("nan"), dtype=at, device=plan.device
                )  # freed at once: the next tensors lie there
                x, table = qkv.to(at).requires_grad_(), guarded[1].detach().requires_grad_()
                q, k, v = x.unbind(3)
                out = neighborhood_attention(q, k, v, kernel, dilation, table, backend=backend)
                out.backward(grad.to(at))
                results.append([out.detach(), x.grad, table.grad])
            errors = [
                float((seen.double() - wanted.double()).abs().max() / wanted.abs().max())
                for wanted, seen in zip(*results, strict=True)
            ]
            limit = 1e-4 if name == "float32" else 2e-2
            agrees = all(error <= limit for error in errors)  # False for NaN
            rows.append(
                {
                    "shape": list(shape),
                    "kernel": kernel,
                    "dilation": dilation,
                    "dtype": name,
                    "forward": errors[0],
                    "gradient of qkv": errors[1],
                    "gradient of bias": errors[2],
                    "agrees": agrees,
                }
            )
    return rows


def ops(plan: Plan, clock: Clock) -> list[dict[str, Any]]:
    """`zoo bench ops` for the plan's maps: on a GPU in bfloat16, with compiled flex_attention and NATTEN beside Triton."""
    from train.bench.ops import bench_ops

    backends = None if plan.flex else ["triton", "tiled"]
    rows: list[dict[str, Any]] = []
    for case in plan.ops:
        if clock.allows(f"ops {case}", 0.5):
            rows += bench_ops([case], plan.rounds, plan.device, True, backends, plan.kernel, 32 if plan.flex else 16)
    return rows


def models(plan: Plan, clock: Clock) -> list[dict[str, Any]]:
    """`zoo bench A B ...` for every row of models, with peak memory; a row that fails is a row that says so."""
    from train.bench.models import Settings, bench_models

    settings = Settings(size=plan.size, dtype=plan.dtype, device=plan.device)
    rows: list[dict[str, Any]] = []
    for group in plan.models:
        if not clock.allows(f"models {' '.join(group)}", 0.75):
            continue
        try:
            rows += bench_models(group, settings, [plan.batch], plan.rounds, True, memory=plan.device == "cuda")["rows"]
        except Exception as error:
            rows.append({"subject": " ".join(group), "failed": f"{type(error).__name__}: {str(error).strip()[:300]}"})
    return rows


def syncs(plan: Plan) -> dict[str, Any]:
    """Places where a training step of the first model waits for the GPU; none is wanted. On a CPU there is nothing to wait."""
    import torch

    from train.bench.models import Runner, Settings, parse

    settings = Settings(size=plan.size or (224, 224), dtype=plan.dtype, device=plan.device)
    name = plan.models[0][0]
    with tempfile.TemporaryDirectory() as folder:
        step = Runner(parse(name, settings), settings, folder).step(plan.batch)
        step()
        if plan.device != "cuda":
            return {"subject": name, "synchronisations": []}
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"subject": name, "synchronisations": [f"{w.filename}:{w.lineno}" for w in caught if "synchron" in str(w.message)]}


def train_cifar(plan: Plan, root: str | None) -> dict[str, Any]:
    """Final scores and seconds of `zoo train cifar10/nat` on the data in `root`."""
    from train import config, engine

    with tempfile.TemporaryDirectory() as folder:
        changes = [f"--data.root={root}", f"--run.dir={folder}/run", f"--run.device={plan.device}", *plan.cifar]
        began = time.monotonic()
        engine.fit(config.load("cifar10/nat", changes))
        spent = time.monotonic() - began
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))
    return {"configuration": "cifar10/nat", "seconds": spent, "summary": summary}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The results as Markdown: what goes into docs/benchmarks."""
    facts = found["machine"]
    yield f"{facts['date']}: {facts['processor']} ({facts['instructions']}), torch {facts['versions']['torch']}"
    for part in PARTS:
        rows = found.get(part)
        if rows is None:
            yield f"\n{part}: not run ({found['left_out'].get(part, 'stopped before it')})"
        elif isinstance(rows, dict):
            yield f"\n{part}: {json.dumps(rows)}"
        else:
            for row in rows:
                if "failed" in row:
                    yield f"\n{part}: {row['subject']} failed: {row['failed']}"
            rows = [row for row in rows if "failed" not in row]
            if rows:
                yield f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}"
            for row in rows:
                yield f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else str(v) for v in row.values())} |"


def add_to(parser: argparse.ArgumentParser) -> None:
    """The options of this program."""
    parser.add_argument("--minutes", type=float, default=8.0, help="no part starts beyond its share of them")
    parser.add_argument("--out", default="gpu", help="name of the JSON file")
    parser.add_argument("--cifar", help="folder of CIFAR-10, for the training")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU, in Triton's interpreter")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help=" ".join(PARTS))


def main(words: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="zoo bench gpu", description=__doc__.partition("\n")[0] if __doc__ else None)
    add_to(parser)
    try:
        return report(parser.parse_args(words))
    except (ValueError, OSError) as error:
        print(f"zoo bench gpu: {error}", file=sys.stderr)
        return 2


def report(args: argparse.Namespace) -> int:
    """Runs what the options ask for and prints it; 1 if a kernel disagrees with the definition or a part failed."""
    found = run(args.minutes, args.out, args.cifar, args.rehearse, tuple(args.parts))
    print("\n".join(lines(found)))
    failed = any("failed" in row for part in PARTS for row in rows_of(found, part))
    return int(failed or not all(row["agrees"] for row in rows_of(found, "check") if "failed" not in row))


def rows_of(found: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The rows of a part; one that is a single mapping, or failed, is a row."""
    rows = found.get(part, [])
    return [rows] if isinstance(rows, dict) else rows


if __name__ == "__main__":
    sys.exit(main())
