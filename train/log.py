"""What a run says: a progress bar on a terminal, plain lines elsewhere, CSV, TensorBoard, a table and curves at the end.

RUN/log.csv has one row per interval of training; RUN/metrics.csv one per evaluation, nothing in it depends on speed. Every
process has a Log, because averaging a loss over processes needs all of them; only the main process writes.
"""

import csv
import functools
import io
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from train import checkpoint
from train.checks import NonFiniteLoss
from train.show.sheet import lines, wrapped

COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "memory_mb")


class Log:
    """Collects one training step after another and reports them once per interval.

    Args:
        folder: the run folder.
        start, steps: first and last step that this process runs.
        every: steps per report.
        images: total batch.
        epoch_steps: steps per pass.
        main: whether this process writes.
        total: sum of a tensor over processes.
        tracker: called with (values, step) for every report, e.g. Accelerate's trackers.
        scaled: the loss scale of fp16 skips steps, so that a gradient that is not finite is no failure.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        steps: int,
        every: int,
        images: int,
        epoch_steps: float,
        main: bool = True,
        total: Callable[[Tensor], Tensor] = lambda x: x,
        tracker: Callable[[dict[str, float], int], None] | None = None,
        scaled: bool = False,
    ):
        self.folder, self.start, self.steps, self.every, self.images = folder, start, steps, every, images
        self.epoch_steps, self.main, self.total, self.tracker, self.scaled = epoch_steps, main, total, tracker, scaled
        self.pending: list[dict[str, Any]] = []
        self.headers: dict[str, list[str]] = {}
        self.waited, self.clock = 0.0, time.perf_counter()
        self.console = Console(quiet=not main, highlight=False)
        self.bar, self.board = None, None
        if main:
            truncate(folder / "log.csv", start)
            truncate(folder / "metrics.csv", start)
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
            if self.console.is_terminal:
                done, text = TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}")
                columns = (BarColumn(20), done, TimeElapsedColumn(), TimeRemainingColumn(), text)
                self.bar = Progress(*columns, console=self.console, transient=True)
                self.row = self.bar.add_task("starting", total=steps, completed=start)
                self.bar.start()

    def say(self, text: str) -> None:
        """One line, from the main process."""
        if self.main:
            print(text, flush=True) if self.bar is None else self.console.print(text, markup=False)

    def step(
        self,
        step: int,
        terms: Iterable[str],
        parts: Sequence[tuple[Tensor, Sequence[str]]],
        grad_norm: Tensor,
        lr: float,
        waited: float,
    ) -> None:
        """Notes a finished step. Nothing is read back from the device until the interval is full.

        Raises NonFiniteLoss then, ValueError for a term that has the name of another column.

        Args:
            step: counts from 1.
            terms: names of the terms of the loss.
            parts: of each micro-batch of this process its share of the step's loss, by term (1-d), and its files.
            grad_norm: before clipping.
            lr: the largest learning rate.
            waited: seconds spent waiting for data.
        """
        terms = tuple(terms)
        if taken := [name for name in terms if name in COLUMNS]:
            raise ValueError(f"a term of the loss is called {taken[0]!r}, which is another column of log.csv: rename it")
        shares = [torch.cat([part.sum()[None], part]) for part, _ in parts]  # the total, then each term
        loss = functools.reduce(torch.add, shares)
        self.pending.append({"step": step, "terms": terms, "loss": loss, "grad_norm": grad_norm, "lr": lr, "parts": parts})
        self.waited += waited
        if self.bar is not None:
            self.bar.advance(self.row)
        if step % self.every == 0 or step == self.steps:
            self.flush()

    def flush(self) -> None:
        """Reports the steps noted since the last report; on every process at once."""
        if not self.pending:
            return
        table = self.total(torch.stack([note["loss"] for note in self.pending]).float())
        losses = table[:, 0].tolist()
        norms = torch.stack([torch.as_tensor(note["grad_norm"]).float() for note in self.pending]).tolist()
        for note, loss, norm in zip(self.pending, losses, norms, strict=True):
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaled):
                raise NonFiniteLoss(complaint(note, loss, norm))
        seconds = time.perf_counter() - self.clock
        last = self.pending[-1]
        values = {
            "step": last["step"],
            "epoch": round(last["step"] / self.epoch_steps, 4),
            "loss": sum(losses) / len(losses),
            **{name: sum(column) / len(losses) for name, column in zip(last["terms"], table[:, 1:].T.tolist(), strict=True)},
            "lr": last["lr"],
            "grad_norm": norms[-1],
            "images_per_s": len(losses) * self.images / seconds,
            "data_wait": min(1.0, self.waited / seconds),
            "memory_mb": memory_mb(),
        }
        self.pending, self.waited, self.clock = [], 0.0, time.perf_counter()
        self.write("log.csv", values, "train")
        text = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad {values['grad_norm']:.3g}  "
            f"{values['images_per_s']:.1f} images/s  wait {values['data_wait']:.0%}  memory {values['memory_mb']:.0f} MB"
        )
        if self.bar is not None:
            self.bar.update(self.row, description=text)
        else:
            self.say(f"step {values['step']}/{self.steps}  {text}")

    def evaluation(self, step: int, metrics: Mapping[str, float], seconds: float, note: str = "") -> None:
        """Reports an evaluation.

        Args:
            step: of the weights.
            metrics: by name.
            seconds: it took.
            note: what a reader of the line should know.
        """
        self.write("metrics.csv", {"step": step, **metrics}, "val")
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"step {step}/{self.steps}  evaluation: {text}  ({seconds:.1f} s){note}")
        self.clock += seconds

    def write(self, name: str, values: Mapping[str, float], prefix: str) -> None:
        """One row in a CSV file of the run, and the same numbers to TensorBoard and the trackers."""
        if self.board is None:
            return
        path = self.folder / name
        if name not in self.headers:
            self.headers[name] = widen(path, list(values))
        with open(path, "a", newline="", encoding="utf-8") as file:
            row = {key: repr(value) if isinstance(value, float) else value for key, value in values.items()}
            csv.DictWriter(file, self.headers[name]).writerow(row)
        numbers = {f"{prefix}/{key}": value for key, value in values.items() if key != "step"}
        for key, value in numbers.items():
            self.board.add_scalar(key, value, int(values["step"]))
        if self.tracker is not None:
            self.tracker(numbers, int(values["step"]))

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Two columns at the end of a run."""
        table = Table(title=title, show_header=False)
        table.add_column()
        table.add_column(overflow="fold")  # a path must stay whole
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def close(self) -> None:
        """Stops the bar and closes the files; safe to call twice."""
        if self.bar is not None:
            self.bar.stop()
        if self.board is not None:
            self.board.close()


def complaint(note: Mapping[str, Any], loss: float, norm: float) -> str:
    """What is said of a step whose loss or gradient is not finite."""
    wrong = [name for i, name in enumerate(note["terms"]) if not all(bool(part[i].isfinite()) for part, _ in note["parts"])]
    files = [path for part, paths in note["parts"] if not bool(part.isfinite().all()) for path in paths]
    named = f" ({', '.join(wrong)})" if wrong else ""
    shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
    return (
        f"step {note['step']}: the loss is {loss}{named}, the gradient norm {norm:.4g}, the "
        f"learning rate {note['lr']:.3g}; "
        f"files of the micro-batch: {shown or 'on another process, or the loss was finite and its gradient not'}. "
        "Lower optim.lr, set optim.clip_norm or run.precision=no, and continue with --resume from the last checkpoint"
    )


def truncate(path: Path, step: int) -> None:
    """Drops the rows of a CSV file after `step`, which a resumed run will write again."""
    if not path.is_file():
        return
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    kept = rows[:1] + [row for row in rows[1:] if row and row[0].isdigit() and len(row) == len(rows[0]) and int(row[0]) <= step]
    text = io.StringIO(newline="")
    csv.writer(text).writerows(kept)
    checkpoint.write(path, lambda temporary: temporary.write_text(text.getvalue(), newline="", encoding="utf-8"))


def widen(path: Path, names: list[str]) -> list[str]:
    """The header of a CSV file of a run, with `names` in it.

    It is written if there is none, and widened if a resumed run has other terms or metrics than its first rows.
    """
    rows = []
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    header = rows[0] if rows else []
    if set(names) <= set(header):
        return header
    wider, text = [*names, *(name for name in header if name not in names)], io.StringIO(newline="")
    writer = csv.DictWriter(text, wider)
    writer.writeheader()
    writer.writerows(dict(zip(header, row, strict=True)) for row in rows[1:])
    checkpoint.write(path, lambda temporary: temporary.write_text(text.getvalue(), newline="", encoding="utf-8"))
    return wider


def read(path: Path) -> dict[str, list[float]]:
    """Columns of a CSV file of a run; empty if there is none."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or "nan") for row in rows] for name in (rows[0] if rows else ())}


def memory_mb() -> float:
    """Largest memory so far: of the GPU if one is used, else of the process; NaN on a system that does not say."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows has no such module
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def curves(folder: Path) -> None:
    """RUN/curves.png: the loss with its terms, the learning rate, and the metrics over the steps, in at most six panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, ScalarFormatter

    training, metrics = read(folder / "log.csv"), read(folder / "metrics.csv")
    names = [name for name in metrics if name != "step"]
    terms = [name for name in training if name not in COLUMNS]
    last = [names[3:]] if len(names) > 3 else []  # the first three have a panel each, the others share one
    groups = [["loss", *(terms if len(terms) > 1 else [])], ["lr"], *([name] for name in names[:3]), *last]
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    title = wrapped(folder.absolute().name, 4 * columns, 12)
    figure = Figure(figsize=(4 * columns, 2.9 * rows + 0.25 * lines(title) + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for place, (axis, group) in enumerate(zip(axes.flat, groups, strict=False)):
        source = training if place < 2 else metrics
        marker = "." if place > 1 or len(training.get("step", [])) < 20 else None  # a line of one point cannot be seen
        for name in group:
            width = 2.0 if name == "loss" else 1.2
            axis.plot(source.get("step", []), source.get(name, []), marker=marker, linewidth=width, label=name)
        name = "learning rate" if group[0] == "lr" else group[0]
        axis.set_title("other metrics" if group in last else name)
        if len(group) > 1:
            axis.legend(fontsize=7)
        shown = [value for name in group for value in source.get(name, []) if math.isfinite(value)]
        if place == 0 and shown and min(shown) > 0 and max(shown) > 10 * min(shown):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        elif place == 1:
            axis.yaxis.set_major_formatter(ScalarFormatter(useMathText=True))
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        if place + columns >= len(groups):  # the lowest of its column
            axis.set_xlabel("step")
            axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    checkpoint.write(folder / "curves.png", lambda temporary: figure.savefig(temporary, format="png", dpi=110))
