"""The plot of loss against training FLOPs: a panel for each width, the undropped frontier and all methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    LogFormatterSciNotation,
    LogLocator,
    NullFormatter,
    NullLocator,
)

from benchmarks.study.methods import METHODS
from benchmarks.study.rows import Point, Results
from benchmarks.study.saving import seed_deviation
from benchmarks.study.settings import parameters

_MARKERS = "osD^v<>phX*Pd8H"
_LONG = 64
"""Characters of what a method is that still fit the legend."""


def draw(results: Results, widths: Sequence[int], file: Path) -> None:
    """Write it as an SVG; equal rows give an equal file."""
    with mpl.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(1, len(widths), figsize=(3.3 + 5.2 * len(widths), 4.6), squeeze=False)
        for axis, width in zip(axes[0], widths, strict=True):
            _panel(axis, results, width)
        handles = {}
        for axis in axes[0]:
            found, labels = axis.get_legend_handles_labels()
            handles |= dict(zip(labels, found, strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", title="which layers run in training")
        figure.set_layout_engine("constrained")
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def draw_curves(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Write the validation losses of runs against their FLOPs, a line for each, as an SVG."""
    with mpl.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 9}):
        figure, axis = plt.subplots(figsize=(8, 4.5))
        methods = list(dict.fromkeys(row["method"] for row in rows))
        for row in rows:
            colour = "black" if row["method"] == "undropped" else plt.get_cmap("tab10")(methods.index(row["method"]))
            equal = "" if row["method"] == "undropped" else f", equal {row['equal']}, by {row['lr_by']}"
            style = {"iterations": "--", "layer_tokens": "-"}[row["lr_by"]] if equal else "-"
            x, y = zip(*row["curve"], strict=True)
            width = 0.8 if row["equal"] == "flops" else 1.6
            label = f"{row['method']}{equal}, seed {row['seed']}"
            axis.plot(x, y, label=label, color=colour, linestyle=style, linewidth=width)
        axis.set_xlabel("training FLOPs of what ran")
        axis.set_ylabel("validation loss at full depth, nats a token")
        axis.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=7)
        figure.set_layout_engine("constrained")
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def _panel(axis: plt.Axes, results: Results, width: int) -> None:
    """Points are means over seeds with 95 % intervals; the line joins undropped runs of several lengths."""
    points = {name: results.points(width, name) for name in METHODS}
    deviation = seed_deviation([point for found in points.values() for point in found]) or 0.0
    for number, (name, found) in enumerate(points.items()):
        if not found:
            continue
        x, y = [point.flops for point in found], [point.loss for point in found]
        errors = [1.96 * deviation / math.sqrt(len(point.losses)) for point in found]
        undropped = name == "undropped"
        axis.errorbar(
            x,
            y,
            yerr=errors,
            label=f"{name}: {METHODS[name].says}" if len(METHODS[name].says) < _LONG else name,
            color="black" if undropped else plt.get_cmap("tab10")((number - 1) % 10),
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle="-" if undropped else ":",
            linewidth=1.4 if undropped else 1.0,
            markersize=5,
            capsize=2,
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # labels at all minor ticks would overlap
    axis.xaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("training compute, FLOPs of what ran (less is better)")
    axis.set_ylabel("validation loss at full depth, nats a token (lower is better)")
    axis.set_title(f"12 layers, hidden size {width}, {parameters(width) / 1e6:.2g} M parameters\n", fontsize=9)
    axis.grid(alpha=0.3)
    _mark_budgets(axis, points["undropped"])


def _mark_budgets(axis: plt.Axes, undropped: Sequence[Point]) -> None:
    """Tokens a parameter of the undropped runs, above the panel: what readers compare with other work."""
    above = axis.secondary_xaxis("top")
    above.xaxis.set_major_locator(FixedLocator([point.flops for point in undropped]))
    above.xaxis.set_major_formatter(FixedFormatter([f"{point.budget:g}" for point in undropped]))
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xlabel("tokens a parameter, undropped", fontsize=8)
