"""Plots of schedules as PNG files: keep probabilities over a run, and fits to a trace (SBLD, Figures 6 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_sbld.forecast.drops import spread_iterations
from megatron_sbld.method.policy import Policy
from megatron_sbld.method.schedule_fit import Fit, Trace
from megatron_sbld.report.plots import DPI, draw_keep_probs
from megatron_sbld.report.runs import FloatArray

IntArray = NDArray[np.int64]

_MAX_POINTS = 2000  # of a curve or columns of a heat map: a PNG cannot show more


def plot_schedule(policy: Policy, train_iters: int, title: str, file: Path) -> None:
    """Draws keep_prob of every layer over the run as a heat map (above) and as curves, with theta and the mean.

    Of a policy without theta, whose layers run or do not, the mean alone is a curve.
    """
    iterations = spread_iterations(1, train_iters, _MAX_POINTS)
    keep_probs = np.array([policy.keep_probs(iteration) for iteration in iterations.tolist()])
    figure = Figure(figsize=(10, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    image = draw_keep_probs(above, keep_probs, 1, train_iters)
    above.set_title(title, loc="left")
    figure.colorbar(image, ax=above, label="keep_prob (1: always kept)", fraction=0.04, pad=0.01)
    dropping = iterations < policy.first_recovery_iteration
    thetas = np.array([policy.theta(iteration) for iteration in iterations[dropping].tolist()])
    if policy.uses_theta:
        _draw_curves(below, iterations, keep_probs, iterations[dropping], thetas)
    _draw_mean(below, iterations, keep_probs, "default" if policy.uses_theta else "steps-post")
    below.set(xlabel="iteration", ylabel="keep_prob", ylim=(0, max(1.05, 1.05 * thetas.max(initial=0.0))))
    figure.savefig(file, dpi=DPI)


def plot_fits(trace: Trace, fits: Sequence[Fit], title: str, file: Path) -> None:
    """Draws the loss gap, raw and smoothed, and every fit to it."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(trace.iterations, trace.gap, color="0.8", linewidth=0.6, label="loss gap of each iteration")
    label = f"running mean of {trace.window} iterations, floored at 0"
    axes.plot(trace.iterations, trace.smoothed, color="0.35", linewidth=1.5, label=label)
    grid = np.linspace(trace.iterations[0], trace.iterations[-1], _MAX_POINTS)
    for number, fit in enumerate(fits):
        style = "-" if fit.name == "pwegd" else "--"
        axes.plot(grid, fit.values(grid), style, color=f"C{number}", label=f"{fit.name}: RMSE {fit.rmse:.4g}")
    axes.axhline(0.0, color="black", linewidth=0.6)
    axes.set_title(title, loc="left")
    axes.set(xlabel="iteration", ylabel="loss gap (nats per token)", ylim=_gap_limits(trace))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=DPI)


def _draw_curves(
    axes: Axes, iterations: IntArray, keep_probs: FloatArray, theta_iterations: IntArray, thetas: FloatArray
) -> None:
    num_layers = keep_probs.shape[1]
    colors = colormaps["plasma"](np.linspace(0.0, 0.9, num_layers))
    for layer in range(num_layers):
        name = f"layer {layer + 1}" if layer in (0, num_layers - 1) else None
        axes.plot(iterations, keep_probs[:, layer], color=colors[layer], linewidth=0.9, alpha=0.8, label=name)
    axes.plot(theta_iterations, thetas, "--", color="tab:red", linewidth=2, label="theta")


def _draw_mean(axes: Axes, iterations: IntArray, keep_probs: FloatArray, drawstyle: str) -> None:
    mean = keep_probs.mean(axis=1)
    axes.plot(iterations, mean, drawstyle=drawstyle, color="black", linewidth=2, label="mean keep_prob")
    axes.grid(alpha=0.3)
    axes.legend(ncols=4, loc="lower right")


def _gap_limits(trace: Trace) -> tuple[float, float]:
    """A frame for the smoothed trace; single iterations may leave it."""
    height = float(trace.smoothed.max())
    low, high = np.quantile(trace.gap, [0.01, 0.99])
    return min(-0.1 * height, max(low, -height)), 1.05 * max(height, min(high, 3 * height))
