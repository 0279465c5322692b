"""The plot that decides between methods: validation loss against how much was dropped, and against training time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from megatron_sbld.report.plots import DPI, group_style, outside_legend, time_unit
from megatron_sbld.report.summary import Comparison, RunSummary

_DISTANCES = (9, 18, 30, 44, 60, 80)  # points between a point and its label, nearest first
_DIRECTIONS = 16
_NAMED = 8  # points; more are numbered, and a legend has their names


@dataclass(frozen=True)
class _Point:
    row: RunSummary
    label: str
    loss: float
    color: Any
    x: float


def plot_tradeoff(comparison: Comparison, file: Path) -> bool:
    """Draws a point for each row with a finite validation loss; False, and no file, if there is none.

    Left: against the mean keep probability, right: against training time. Bars are standard errors over seeds, the
    dashed line is the baseline's loss. Points have their names beside them; many have their rows' numbers.
    """
    rows = [row for row in comparison.rows if row.valid_loss is not None and math.isfinite(row.valid_loss)]
    if not rows:
        return False
    unit, unit_s = time_unit(max(row.train_time_s for row in rows))
    numbered = len(rows) > _NAMED
    figure = Figure(figsize=(15 if numbered else 12, 5.2), layout="constrained")
    by_keep_prob, by_time = figure.subplots(1, 2, sharey=True)
    panels = [
        (by_keep_prob, _points(comparison, numbered, lambda row: row.mean_keep_prob)),
        (by_time, _points(comparison, numbered, lambda row: row.train_time_s / unit_s)),
    ]
    for axes, points in panels:
        _draw_points(axes, points, comparison.baseline)
    several = any(row.num_seeds > 1 for row in rows)
    by_keep_prob.set(
        xlabel="mean keep_prob",
        ylabel="validation loss (nats per token)" + (", mean ± s.e. over seeds" if several else ""),
    )
    by_time.set(xlabel=f"training time without validation and saving ({unit})")
    if numbered:
        outside_legend(figure, *by_time.get_legend_handles_labels())
    figure.draw_without_rendering()  # only now the layout is final, and with it where the labels may stand
    figure.set_layout_engine("none")
    for axes, points in panels:
        _draw_labels(axes, points)
    figure.savefig(file, dpi=DPI)
    return True


def _points(comparison: Comparison, numbered: bool, abscissa: Callable[[RunSummary], float]) -> list[_Point]:
    """The rows with a finite validation loss, in the colours that the groups have in the other plots."""
    return [
        _Point(
            row, str(number + 1) if numbered else row.label, row.valid_loss, group_style(number)["color"], abscissa(row)
        )
        for number, row in enumerate(comparison.rows)
        if row.valid_loss is not None and math.isfinite(row.valid_loss)
    ]


def _draw_points(axes: Axes, points: Sequence[_Point], baseline: str) -> None:
    for point in points:
        yerr = point.row.valid_loss_stderr
        name = f"{point.label}  {point.row.label}"
        axes.errorbar(point.x, point.loss, yerr, fmt="o", color=point.color, capsize=3, markersize=7, label=name)
        if point.row.label == baseline:
            axes.axhline(point.loss, color=point.color, linestyle="--", linewidth=0.8, alpha=0.6)
    axes.margins(0.12)
    axes.grid(alpha=0.3)


def _draw_labels(axes: Axes, points: Sequence[_Point]) -> None:
    """Writes each label at the nearest place where it covers no point, no error bar and no other label."""
    taken = [_bar_box(axes, point) for point in points]
    for point in points:
        taken.append(_draw_label(axes, point, taken))


def _draw_label(axes: Axes, point: _Point, taken: Sequence[Bbox]) -> Bbox:
    """Writes a label beside its point; the box that it takes. Where no place is free it may cover something."""
    label = axes.annotate(
        point.label,
        (point.x, point.loss),
        xytext=(0, 0),
        textcoords="offset points",
        fontsize="small",
        arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkB": 4},
    )
    label.get_window_extent()  # an annotation finds its place only when it is asked for it or drawn
    frame = axes.get_window_extent()
    places = [(distance, 2 * math.pi * step / _DIRECTIONS) for distance in _DISTANCES for step in range(_DIRECTIONS)]
    within = [place for place in places if _contains(frame, _place(label, *place))]
    free = (place for place in within if not any(_place(label, *place).overlaps(box) for box in taken))
    return _place(label, *next(free, within[0] if within else places[0]))


def _contains(frame: Bbox, box: Bbox) -> bool:
    return bool(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)


def _place(label: Annotation, distance: float, angle: float) -> Bbox:
    """Puts the label's nearest edge or corner at a distance in points from its point; the box of its text."""
    x, y = math.cos(angle), math.sin(angle)
    label.xyann = (distance * x, distance * y)
    label.set_horizontalalignment("left" if x > 0.3 else "right" if x < -0.3 else "center")
    label.set_verticalalignment("bottom" if y > 0.3 else "top" if y < -0.3 else "center")
    return Text.get_window_extent(label)  # without the line to the point


def _bar_box(axes: Axes, point: _Point) -> Bbox:
    """Pixels that a point and its error bar take."""
    stderr = point.row.valid_loss_stderr or 0.0
    ends = [(point.x, point.loss - stderr), (point.x, point.loss + stderr)]
    (left, bottom), (right, top) = axes.transData.transform(ends)
    return Bbox.from_extents(left - 8, bottom - 8, right + 8, top + 8)
