"""The plot of evaluations over training: accuracy and perplexity of several runs or checkpoints, with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_sbld.report.evaluation import METRIC_NAMES, METRICS, Curve, Point, Series, find_series, points
from megatron_sbld.report.plots import DPI, group_style, outside_legend, time_unit

_PANEL_HEIGHT = 3.4
_LEGEND_INSIDE = 6  # curves; a legend of more would hide them
_TOKEN_UNITS = ((1e9, " (billions)"), (1e6, " (millions)"))
_WIDE_RANGE = 10.0  # largest value over smallest, from which an axis is logarithmic


def plot_evaluations(curves: Sequence[Curve], file: Path) -> None:
    """Draws every series and metric against iterations and, where it is known, against training time or tokens.

    Bars are standard errors: over seeds for a curve of several runs, else over passages or windows. Tokens have panels
    where they are not in proportion to iterations; those of a perplexity that words have as well are left out.

    Raises:
        ValueError: no curve has an evaluation.
    """
    drawn = _panels(curves)
    if not drawn:
        raise ValueError("there is no evaluation to plot")
    every = [point for _, _, of_curves in drawn for found in of_curves for point in found]
    abscissas = _abscissas(every)
    outside = len(curves) > _LEGEND_INSIDE
    width = 6 * len(abscissas) + (3 if outside else 0)
    figure = Figure(figsize=(width, 0.8 + _PANEL_HEIGHT * len(drawn)), layout="constrained")
    rows = figure.subplots(len(drawn), len(abscissas), squeeze=False, sharey="row", sharex="col")
    for axes_of_row, (series, metric, of_curves) in zip(rows, drawn, strict=True):
        for axes, abscissa in zip(axes_of_row, abscissas, strict=True):
            _draw(axes, curves, of_curves, metric, abscissa)
        axes_of_row[0].set_ylabel(f"{series.label}\n{METRIC_NAMES[metric]}")
    for axes, abscissa in zip(rows[-1], abscissas, strict=True):
        axes.set_xlabel(abscissa.label)
    handles, labels = rows[0][0].get_legend_handles_labels()
    if outside:
        outside_legend(figure, handles, labels, "mean ± s.e.")
    else:
        rows[0][0].legend(handles, labels, title="mean ± s.e.", alignment="left")
    figure.savefig(file, dpi=DPI)


class _Abscissa:
    """A field of Point to draw against, and the unit that its values are given in."""

    def __init__(self, field: str, label: str, unit: float) -> None:
        self._field, self.label, self._unit = field, label, unit

    def __call__(self, point: Point) -> float:
        value: float = getattr(point, self._field)
        return value / self._unit


def _panels(curves: Sequence[Curve]) -> list[tuple[Series, str, list[list[Point]]]]:
    """What each row of panels shows: the points of all curves. A metric that no curve has makes no row."""
    panels = []
    for series in find_series([row for curve in curves for run in curve.runs for row in run]):
        found = {metric: [points(curve, series, metric) for curve in curves] for metric in METRICS[series.task]}
        known = [metric for metric, of_curves in found.items() if any(of_curves)]
        if "word_perplexity" in known:
            known.remove("token_perplexity")
        panels += [(series, metric, found[metric]) for metric in known]
    return panels


def _abscissas(every: Sequence[Point]) -> list[_Abscissa]:
    found = [_Abscissa("iteration", "iteration", 1.0)]
    tokens = [point.consumed_tokens for point in every if point.consumed_tokens is not None]
    if len(tokens) == len(every):
        ratios = [
            count / point.iteration if point.iteration else 0.0 for count, point in zip(tokens, every, strict=True)
        ]
        if not np.allclose(ratios, ratios[0], rtol=1e-6):
            unit, name = next((known for known in _TOKEN_UNITS if max(tokens) >= known[0]), (1.0, ""))
            found.append(_Abscissa("consumed_tokens", f"tokens{name}", unit))
    times = [point.train_time_s for point in every if point.train_time_s is not None]
    if len(times) == len(every):
        time_name, unit_s = time_unit(max(times))
        found.append(_Abscissa("train_time_s", f"training time without validation and saving ({time_name})", unit_s))
    return found


def _draw(
    axes: Axes, curves: Sequence[Curve], of_curves: Sequence[Sequence[Point]], metric: str, abscissa: _Abscissa
) -> None:
    scale = 100.0 if metric == "accuracy" else 1.0
    finite: list[float] = []
    for number, (curve, found) in enumerate(zip(curves, of_curves, strict=True)):
        values = [scale * point.value.mean for point in found]
        finite += [value for value in values if np.isfinite(value)]
        errors = [scale * (point.value.stderr or 0.0) for point in found]
        axes.errorbar(
            [abscissa(point) for point in found],
            values,
            yerr=errors if any(point.value.stderr is not None for point in found) else None,
            marker="o",
            markersize=4,
            capsize=3,
            label=curve.label,
            **group_style(number),
        )
    if "perplexity" in metric and finite and min(finite) > 0 and max(finite) / min(finite) > _WIDE_RANGE:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=abscissa.label == "iteration"))
    axes.grid(alpha=0.3, which="both")
