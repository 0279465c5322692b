"""Plots of runs as PNG files: loss against iterations, time and compute, and keep_prob by layer and iteration."""

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

from megatron_sbld.report.compute import flops_until, total_flops
from megatron_sbld.report.groups import RunGroup
from megatron_sbld.report.runs import FloatArray, RunData
from megatron_sbld.report.seeds import estimate

_Abscissa = Callable[[RunData, FloatArray], FloatArray]

DPI = 150
_MAX_COLUMNS = 2000  # of a heat map: more iterations than this are averaged, a PNG cannot show them
_SMOOTHING = 0.02  # share of a run's iterations over which its training loss is averaged
_SKIPPED = 0.25  # share of a run whose losses, far above the rest, may leave the frame
_TIME_UNITS = (("s", 1.0, 600.0), ("min", 60.0, 36000.0), ("h", 3600.0, float("inf")))  # name, seconds, up to seconds
_LEGEND_INSIDE = 6  # groups; a legend of more would hide the curves
_LEGEND_ROWS = 22
_LOG_FROM = 3.0  # times the FLOPs of the shortest run: ends of short runs would be crowded on a linear axis
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
        _draw_group(by_iteration, group, number, lambda run, iterations: iterations)
        _draw_group(by_time, group, number, lambda run, iterations: run.elapsed_s(iterations) / unit_s)
    by_iteration.set(xlabel="iteration", ylabel="loss (nats per token)", xlim=(0, None), ylim=_loss_limits(runs))
    by_time.set(xlabel=f"training time without validation and saving ({unit})", xlim=(0, None))
    for axes in (by_iteration, by_time):
        axes.grid(alpha=0.3)
    _draw_legend(figure, by_time, groups)
    figure.savefig(file, dpi=DPI)


def plot_loss_compute(groups: Sequence[RunGroup], baseline: RunGroup, file: Path) -> bool:
    """Draws losses against the FLOPs of what ran; False, and no file, where no run's are known.

    The last validation of each group has a larger dot; a dashed line is the baseline's last validation loss, a dotted
    one joins the ends of undropped runs of the baseline's model, where they are several: what dropping has to beat. The
    axis is logarithmic where one run takes several times the FLOPs of another.
    """
    known = [(number, group) for number, group in enumerate(groups) if None not in map(total_flops, group.runs)]
    if not known:
        return False
    outside = len(groups) > _LEGEND_INSIDE
    figure = Figure(figsize=(11 if outside else 8, 5.2), layout="constrained")
    axes = figure.subplots()
    for number, group in known:
        _draw_group(axes, group, number, _flops_until)
    _draw_ends(axes, known, baseline)
    runs = [run for _, group in known for run in group.runs]
    totals = [float(_flops_until(run, run.column("iteration"))[-1]) for run in runs]
    is_log = max(totals) > _LOG_FROM * min(totals)
    axes.set(xlabel="training FLOPs of what ran", ylabel="loss (nats per token)", ylim=_loss_limits(runs))
    if is_log:
        axes.set(xscale="log", xlim=(_SKIPPED * min(totals), 1.3 * max(totals)))
    else:
        axes.set(xlim=(0, None))
    axes.grid(alpha=0.3, which="both" if is_log else "major")
    _draw_legend(figure, axes, groups)
    figure.savefig(file, dpi=DPI)
    return True


def _draw_ends(axes: Axes, groups: Sequence[tuple[int, RunGroup]], baseline: RunGroup) -> None:
    """Draws the last validations of numbered groups, and what they are measured by."""
    ends = {number: end for number, group in groups if (end := _end(group)) is not None}
    undropped = []
    for number, group in groups:
        if number not in ends:
            continue
        axes.plot(*ends[number], "o", color=group_style(number)["color"], markersize=10, zorder=5)
        if group is baseline:
            axes.axhline(
                ends[number][1], color="0.5", linestyle="--", linewidth=0.9, label=f"{group.label}, at its end"
            )
        if group.policy == "none" and group.config.model == baseline.config.model:
            undropped.append(ends[number])
    if len(undropped) > 1:
        axes.plot(*np.transpose(sorted(undropped)), ":", color="black", linewidth=1.2, label="undropped, at their ends")


def _flops_until(run: RunData, iterations: FloatArray) -> FloatArray:
    flops = flops_until(run, iterations)
    assert flops is not None, "groups without it are left out"
    return flops


def _end(group: RunGroup) -> tuple[float, float] | None:
    """Mean FLOPs and mean validation loss at the last validations; None where there is none, or one is not finite."""
    if not group.validated:
        return None
    flops = [float(_flops_until(run, run.valid_column("iteration"))[-1]) for run in group.validated]
    losses = [float(run.valid_column("valid_loss")[-1]) for run in group.validated]
    return (float(np.mean(flops)), float(np.mean(losses))) if np.isfinite(losses).all() else None


def _draw_legend(figure: Figure, axes: Axes, groups: Sequence[RunGroup]) -> None:
    title = "lines: training, running mean\ndots: validation"
    if any(len(group.runs) > 1 for group in groups):
        title = "lines: training, running mean;\nbold: mean over seeds\ndots: validation, mean ± s.e."
    handles, labels = axes.get_legend_handles_labels()
    if len(groups) > _LEGEND_INSIDE:
        outside_legend(figure, handles, labels, title)
    else:
        axes.legend(handles, labels, title=title, alignment="left")


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


def _draw_group(axes: Axes, group: RunGroup, number: int, abscissa: _Abscissa) -> None:
    """Draws a group against `abscissa`, which a run has at the end of some iterations."""
    style = group_style(number)
    several = len(group.runs) > 1
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


def _draw_validation(axes: Axes, group: RunGroup, color: Any, abscissa: _Abscissa) -> None:
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
