"""Figures of analyses: curves over depth, maps of layers, colours for norms and relevance."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from backbones.analysis import activations, attention, dimension, heads, local, similarity, spectrum


def short(name: str) -> str:
    """A model's name as a picture has room for it."""
    return name if len(name) <= 26 else f"{name[:12]}..{name[-12:]}"


def heat(values: Tensor, low: float | None = None, high: float | None = None) -> np.ndarray:
    """A map H W in colours, uint8 H W 3, between low and high (default: its own)."""
    from matplotlib import colormaps

    found = values.detach().cpu().float().numpy()
    low, high = found.min() if low is None else low, found.max() if high is None else high
    return (colormaps["viridis"](np.clip((found - low) / max(high - low, 1e-12), 0, 1))[..., :3] * 255).round().astype(np.uint8)


def sheet(columns: int, rows: int = 1, side: float = 3.4) -> tuple[Any, Any]:
    """(figure, axes rows x columns) on a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * side * 1.2, rows * side), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def label(axis: Any, title: str, x: str, y: str, legend: bool = True) -> None:
    """Titles of an axis, whole numbers of blocks and heads, and a legend where several lines need one.

    Args:
        axis: of matplotlib.
        title: of the axis.
        x, y: what its directions are.
        legend: with the legend.
    """
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(which="both", labelsize=8)
    if x in ("block", "head"):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend:
        axis.legend(fontsize=7, frameon=False)


def logarithmic(axis: Any) -> None:
    """A logarithmic y axis with plain numbers: 5 and 7, not 5 x 10^0; a few in each decade, as many as there is room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decades = np.log10(high / low)
    axis.yaxis.set_major_locator(
        LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,))
    )
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def draw_attention(found: dict[str, attention.AttentionStatistics | local.LocalAttention]) -> Any:
    flat = any(isinstance(one, attention.AttentionStatistics) for one in found.values())
    figure, axes = sheet(3 if flat else 2)
    distances, entropies = axes[0][0], axes[0][-1]
    for i, (model, one) in enumerate(found.items()):
        blocks = one.layers if isinstance(one, attention.AttentionStatistics) else range(len(one.layers))
        drawn: list[tuple[Any, Any]] = [(distances, one.distance), (entropies, one.entropy)]
        if isinstance(one, attention.AttentionStatistics):  # parts of a map share no distribution over all patches
            drawn.append((axes[0][1], one.nmi))
        for axis, values in drawn:
            if len(values):
                axis.plot(blocks, [heads.mean() for heads in values], color=f"C{i}", label=short(model))
                points = [(block, head) for block, heads in zip(blocks, values, strict=True) for head in heads.tolist()]
                axis.scatter(*zip(*points, strict=True), s=8, color=f"C{i}", alpha=0.5, linewidths=0)
        for axis, level in ((distances, one.uniform_distance), (entropies, one.uniform_entropy)):
            levels = np.broadcast_to(level, len(blocks))
            axis.plot(blocks, levels, color=f"C{i}", linestyle=":", linewidth=1)
    label(distances, "distance (dotted: uniform)", "block", "pixels")
    label(entropies, "entropy (dotted: uniform)", "block", "nats", legend=False)
    if flat:
        label(axes[0][1], "normalised mutual information", "block", "", legend=False)
    return figure


def draw_spectrum(found: dict[str, spectrum.Spectrum]) -> Any:
    from matplotlib import colormaps

    figure, axes = sheet(len(found) + 2)
    for i, (model, one) in enumerate(found.items()):
        rows = [j for j, place in enumerate(one.places) if not place.startswith("attention")]
        for j, row in enumerate(rows):
            color = colormaps["viridis"](j / max(len(rows) - 1, 1))
            named = {"label": one.places[row]} if j in (0, len(rows) - 1) else {}
            axes[0][i].plot(one.frequencies, one.log_amplitude[row], color=color, linewidth=1, **named)
        label(axes[0][i], short(model), "share of the highest frequency", "log amplitude, lowest = 0")
        axes[0][-2].plot([r / 2 for r in range(len(one.places))], one.log_amplitude[:, -1], color=f"C{i}", label=short(model))
        axes[0][-1].plot([r / 2 for r in range(len(one.places))], one.variance, color=f"C{i}", label=short(model))
    label(axes[0][-2], "highest frequency", "blocks passed", "log amplitude, lowest = 0")
    label(axes[0][-1], "variance over the map", "blocks passed", "", legend=False)
    return figure


def draw_similarity(found: dict[str, similarity.Similarity]) -> Any:
    figure, axes = sheet(len(found), 2)
    for i, (model, one) in enumerate(found.items()):
        for row, (values, title) in enumerate(((one.cka, "CKA, unbiased"), (one.cosine, "1 - cosine, with phases"))):
            axis = axes[row][i]
            image = axis.imshow(values, origin="lower", cmap="magma", **({"vmin": 0, "vmax": 1} if row == 0 else {}))
            figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=8)
            label(axis, f"{short(model)}\n{title}", "block", "block", legend=False)
        for phase in similarity.phases(one.cosine):
            start = min(phase)
            if start:
                axes[1][i].axvline(start - 0.5, color="white", linewidth=1)
                axes[1][i].axhline(start - 0.5, color="white", linewidth=1)
    return figure


def draw_dimension(found: dict[str, dimension.EffectiveDimension]) -> Any:
    figure, axes = sheet(1)
    for i, (model, one) in enumerate(found.items()):
        axes[0][0].plot(one.layers, one.centred, color=f"C{i}", label=f"{short(model)}, of {one.channels}")
        axes[0][0].plot(one.layers, one.uncentred, color=f"C{i}", linestyle="--", linewidth=1)
    logarithmic(axes[0][0])
    label(axes[0][0], "effective dimension (dashed: uncentred)", "block", "dimensions")
    return figure


def draw_activations(found: dict[str, activations.Activations]) -> Any:
    figure, axes = sheet(2)
    for i, (model, one) in enumerate(found.items()):
        for (threshold, share), style in zip(one.active.items(), ("-", "--", ":", "-."), strict=False):
            sign = "> 0" if threshold == 0 else f"|a| > {threshold:g}"
            axes[0][0].plot(one.layers, share, style, color=f"C{i}", label=f"{short(model)}, {sign}")
        axes[0][1].plot(one.layers, one.largest[:, 0], color=f"C{i}", label=f"{short(model)}, largest")
        axes[0][1].plot(one.layers, one.median, "--", color=f"C{i}", label="median")
    axes[0][0].set_ylim(0, 1)
    logarithmic(axes[0][1])
    label(axes[0][0], "active hidden units", "block", "share")
    label(axes[0][1], "magnitudes of the block's output", "block", "")
    return figure


def draw_heads(found: dict[str, heads.HeadImportance]) -> Any:
    figure, axes = sheet(len(found))
    for axis, (model, one) in zip(axes[0], found.items(), strict=True):
        image = axis.imshow(one.importance, origin="lower", cmap="viridis", aspect="auto")
        figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=8)
        label(axis, f"{short(model)}\n|d loss / d gate|", "head", "block", legend=False)
    return figure


DRAW: dict[str, Callable[[dict[str, Any]], Any]] = {
    "attention": draw_attention,
    "spectrum": draw_spectrum,
    "similarity": draw_similarity,
    "dimension": draw_dimension,
    "activations": draw_activations,
    "heads": draw_heads,
}
