"""Plots of runs as PNG files: loss against iterations and against time, and keep_prob by layer and iteration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_sbld.report.runs import FloatArray, RunData

_DPI = 150
_MAX_COLUMNS = 2000  # of a heat map: more iterations than this are averaged, a PNG cannot show them
_SMOOTHING = 0.02  # share of a run's iterations over which its training loss is averaged
_SKIPPED = 0.1  # share of a run whose losses, far above the rest, may leave the frame
_TIME_UNITS = (("s", 1.0, 600.0), ("min", 60.0, 36000.0), ("h", 3600.0, float("inf")))  # name, seconds, up to seconds


def plot_losses(runs: Sequence[RunData], file: Path) -> None:
    """Draws the losses of all runs against iterations (left) and training time (right)."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    by_iteration, by_time = figure.subplots(1, 2, sharey=True)
    total_s = max(run.elapsed_s(run.column("iteration"))[-1] for run in runs)
    unit, unit_s = next((name, seconds) for name, seconds, limit in _TIME_UNITS if total_s <= limit)
    for number, run in enumerate(runs):
        iterations = run.column("iteration")
        valid_iterations = run.valid_column("iteration")
        color = f"C{number % 10}"
        _draw_run(by_iteration, run, iterations, valid_iterations, color)
        _draw_run(by_time, run, run.elapsed_s(iterations) / unit_s, run.elapsed_s(valid_iterations) / unit_s, color)
    by_iteration.set(xlabel="iteration", ylabel="loss (nats per token)", xlim=(0, None), ylim=_loss_limits(runs))
    by_time.set(xlabel=f"training time without validation and saving ({unit})", xlim=(0, None))
    for axes in (by_iteration, by_time):
        axes.grid(alpha=0.3)
    by_time.legend(title="lines: training, running mean\ndots: validation", alignment="left")
    figure.savefig(file, dpi=_DPI)


def plot_keep_probs(runs: Sequence[RunData], file: Path) -> None:
    """Draws a heat map of keep_prob, layer by iteration, for each of `runs`, on one scale from 0 to 1."""
    figure = Figure(figsize=(10, 1 + 3.2 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for axes, run in zip(panels, runs, strict=True):
        keep_probs = run.layers_column("keep_probs")
        num_layers = keep_probs.shape[1]
        first, last = run.train[0]["iteration"], run.train[-1]["iteration"]
        image = axes.imshow(
            _column_means(keep_probs).T,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(first - 0.5, last + 0.5, 0.5, num_layers + 0.5),
            vmin=0,
            vmax=1,
            cmap="viridis",
        )
        axes.set_title(f"{run.label}: mean keep_prob {keep_probs.mean():.3f}", loc="left")
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[-1].set_xlabel("iteration")
    figure.colorbar(image, ax=list(panels), label="keep_prob (1: always kept)", fraction=0.04, pad=0.01)
    figure.savefig(file, dpi=_DPI)


def _draw_run(axes: Axes, run: RunData, x: FloatArray, valid_x: FloatArray, color: str) -> None:
    losses = run.column("loss")
    window = max(1, round(_SMOOTHING * len(losses)))
    axes.plot(x, losses, color=color, alpha=0.15, linewidth=0.8)
    axes.plot(x, _smooth(losses, window), color=color, linewidth=1.3, label=run.label)
    axes.plot(valid_x, run.valid_column("valid_loss"), "o", color=color, markeredgecolor="white", markersize=6)


def _smooth(values: FloatArray, window: int) -> FloatArray:
    """Running mean of the last `window` values, of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _loss_limits(runs: Sequence[RunData]) -> tuple[float, float] | None:
    """A frame in which the runs' ends can be told apart: the first losses may lie above it. None if all diverged."""
    losses = [run.column("loss")[int(_SKIPPED * len(run.train)) :] for run in runs]
    losses += [run.valid_column("valid_loss") for run in runs]
    finite = np.concatenate(losses)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return None
    margin = 0.05 * (finite.max() - finite.min()) or 0.1
    return float(finite.min() - margin), float(finite.max() + margin)


def _column_means(values: FloatArray) -> FloatArray:
    """[T, L] averaged over equal stretches of iterations to at most _MAX_COLUMNS rows."""
    edges = np.unique(np.linspace(0, len(values), _MAX_COLUMNS + 1, dtype=int)[:-1])
    return np.add.reduceat(values, edges, axis=0) / np.diff(np.append(edges, len(values)))[:, None]
