"""Plots of runs as PNG files: loss against iterations and against time, and keep_prob by layer and iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from megatron_sbld.report.groups import RunGroup
from megatron_sbld.report.runs import FloatArray, RunData
from megatron_sbld.report.seeds import estimate

DPI = 150
_MAX_COLUMNS = 2000  # of a heat map: more iterations than this are averaged, a PNG cannot show them
_SMOOTHING = 0.02  # share of a run's iterations over which its training loss is averaged
_SKIPPED = 0.25  # share of a run whose losses, far above the rest, may leave the frame
_TIME_UNITS = (("s", 1.0, 600.0), ("min", 60.0, 36000.0), ("h", 3600.0, float("inf")))  # name, seconds, up to seconds
_LEGEND_INSIDE = 6  # groups; a legend of more would hide the curves
_LEGEND_ROWS = 22
_HIGH_PANELS = 4  # heat maps; more are drawn less high


def group_style(number: int) -> dict[str, Any]:
    """Colour and line of the `number`-th group, from 0: ten strong colours, ten pale ones, then the same dashed."""
    colors = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]  # in pairs of strong and pale
    return {"color": colors[2 * (number % 10) + number // 10 % 2], "linestyle": "-" if number < 20 else "--"}


def time_unit(seconds: float) -> tuple[str, float]:
    """Name and seconds of the unit for times up to `seconds`."""
    return next((name, unit_s) for name, unit_s, limit in _TIME_UNITS if seconds <= limit)


def outside_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], title: str | None = None) -> None:
    """A legend at the right of the panels."""
    figure.legend(
        handles,
        labels,
        title=title,
        alignment="left",
        loc="outside right upper",
        ncols=-(-len(labels) // _LEGEND_ROWS),
        fontsize="small",
    )


def plot_losses(groups: Sequence[RunGroup], file: Path) -> None:
    """Draws the losses of all groups against iterations (left) and training time (right), one colour a group.

    A group of several runs is a thin line a run and their mean; its validation losses are means with standard errors.
    """
    outside = len(groups) > _LEGEND_INSIDE
    figure = Figure(figsize=(15 if outside else 12, 4.8), layout="constrained")
    by_iteration, by_time = figure.subplots(1, 2, sharey=True)
    runs = [run for group in groups for run in group.runs]
    unit, unit_s = time_unit(max(run.elapsed_s(run.column("iteration"))[-1] for run in runs))
    for number, group in enumerate(groups):
        _draw_group(by_iteration, group, number, None)
        _draw_group(by_time, group, number, unit_s)
    by_iteration.set(xlabel="iteration", ylabel="loss (nats per token)", xlim=(0, None), ylim=_loss_limits(runs))
    by_time.set(xlabel=f"training time without validation and saving ({unit})", xlim=(0, None))
    for axes in (by_iteration, by_time):
        axes.grid(alpha=0.3)
    title = "lines: training, running mean\ndots: validation"
    if len(runs) > len(groups):
        title = "lines: training, running mean;\nbold: mean over seeds\ndots: validation, mean ± s.e."
    handles, labels = by_time.get_legend_handles_labels()
    if outside:
        outside_legend(figure, handles, labels, title)
    else:
        by_time.legend(handles, labels, title=title, alignment="left")
    figure.savefig(file, dpi=DPI)


def plot_keep_probs(groups: Sequence[RunGroup], file: Path) -> None:
    """Draws a heat map of keep_prob, layer by iteration, for each of `groups`, on one scale from 0 to 1.

    Of several runs it is the mean, over the iterations that all of them have.
    """
    height = 3.2 if len(groups) <= _HIGH_PANELS else 1.8
    figure = Figure(figsize=(10, 1 + height * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        iterations = _common([run.column("iteration") for run in group.runs])
        if not len(iterations):
            raise ValueError(f"{group.label}: its runs have no iteration in common; compare them with --group false")
        keep_probs = np.mean(
            [run.layers_column("keep_probs")[_positions(run.column("iteration"), iterations)] for run in group.runs],
            axis=0,
        )
        image = draw_keep_probs(axes, keep_probs, int(iterations[0]), int(iterations[-1]))
        axes.set_title(f"{group.label}: mean keep_prob {keep_probs.mean():.3f}", loc="left")
    panels[-1].set_xlabel("iteration")
    figure.colorbar(image, ax=list(panels), label="keep_prob (1: always kept)", fraction=0.04, pad=0.01)
    figure.savefig(file, dpi=DPI)


def draw_keep_probs(axes: Axes, keep_probs: FloatArray, first: int, last: int) -> AxesImage:
    """Draws a heat map of keep_probs, [T, L], at equal distances from iteration `first` to `last`."""
    image = axes.imshow(
        _column_means(keep_probs).T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(first - 0.5, last + 0.5, 0.5, keep_probs.shape[1] + 0.5),
        vmin=0,
        vmax=1,
        cmap="viridis",
    )
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return image


def _draw_group(axes: Axes, group: RunGroup, number: int, unit_s: float | None) -> None:
    """Draws a group against iterations, or against time in units of `unit_s` seconds."""
    style = group_style(number)
    several = len(group.runs) > 1

    def abscissa(run: RunData, iterations: FloatArray) -> FloatArray:
        return iterations if unit_s is None else run.elapsed_s(iterations) / unit_s

    smoothed = [_smooth(run.column("loss"), max(1, round(_SMOOTHING * len(run.train)))) for run in group.runs]
    for run, losses in zip(group.runs, smoothed, strict=True):
        x = abscissa(run, run.column("iteration"))
        if several:
            axes.plot(x, losses, alpha=0.35, linewidth=0.6, **style)
        else:
            axes.plot(x, run.column("loss"), alpha=0.15, linewidth=0.8, **style)
    common = _common([run.column("iteration") for run in group.runs])
    mean_x = np.mean([abscissa(run, common) for run in group.runs], axis=0)
    rows = [_positions(run.column("iteration"), common) for run in group.runs]
    mean = np.mean([losses[row] for losses, row in zip(smoothed, rows, strict=True)], axis=0)
    axes.plot(mean_x, mean, linewidth=1.6 if several else 1.3, label=group.label, **style)
    _draw_validation(axes, group, style["color"], abscissa)


def _draw_validation(
    axes: Axes, group: RunGroup, color: Any, abscissa: Callable[[RunData, FloatArray], FloatArray]
) -> None:
    """Draws mean validation losses, with standard errors, where all validated runs have one."""
    runs = group.validated
    if not runs:
        return
    common = _common([run.valid_column("iteration") for run in runs])
    losses = np.array(
        [run.valid_column("valid_loss")[_positions(run.valid_column("iteration"), common)] for run in runs]
    )
    means = [estimate(column) for column in losses.T.tolist()]
    axes.errorbar(
        np.mean([abscissa(run, common) for run in runs], axis=0),
        [mean.mean for mean in means],
        yerr=[mean.stderr or 0.0 for mean in means] if len(runs) > 1 else None,
        fmt="o",
        color=color,
        markeredgecolor="white",
        markersize=6,
        capsize=3,
    )


def _common(iterations: Sequence[FloatArray]) -> FloatArray:
    """Iterations that all have, in order."""
    return reduce(np.intersect1d, iterations)


def _positions(iterations: FloatArray, wanted: FloatArray) -> npt.NDArray[np.intp]:
    """Where `wanted`, all of which occur, are in the sorted `iterations`."""
    return np.searchsorted(iterations, wanted)


def _smooth(values: FloatArray, window: int) -> FloatArray:
    """Running mean of the last `window` values, of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _loss_limits(runs: Sequence[RunData]) -> tuple[float, float] | None:
    """A frame in which the runs' ends can be told apart: the first losses may lie above it. None if all diverged."""
    losses = []
    for run in runs:
        start = int(_SKIPPED * len(run.train))
        first = run.train[start]["iteration"]
        losses.append(run.column("loss")[start:])
        losses.append(run.valid_column("valid_loss")[run.valid_column("iteration") >= first])
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
