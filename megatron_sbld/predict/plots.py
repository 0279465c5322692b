"""Plots of predictions as PNG files: a pipeline's iteration in time, and gain against theta."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.method.in_force import drops
from megatron_sbld.predict.gain import LOWEST_THETA, Predictor, spans
from megatron_sbld.predict.simulate import Run
from megatron_sbld.report.plots import DPI

_SHOWN_MICROBATCHES = 32  # of a timeline: more cannot be told apart
_THETAS = 9


def plot_timeline(predictor: Predictor, file: Path) -> None:
    """Draws an undropped iteration and, if layers are dropped, one with the decisions of the middle of the run, or of
    each stage of a run whose layers begin one after the other.
    """
    model = predictor.model
    cases = _timeline_cases(predictor)
    figure = Figure(figsize=(12, 1.5 + len(cases) * (0.8 + 0.35 * model.num_ranks)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(cases), 1, sharex=True))
    limit = 0.0
    for each, (title, shares, waiting) in zip(axes, cases, strict=True):
        run = model.run(shares, record=True, waiting=waiting)
        _draw_run(each, run)
        end, count = float(run.end[0]), predictor.setup.num_microbatches
        shown = min(1.0, (_SHOWN_MICROBATCHES + model.num_ranks) / (count + model.num_ranks))
        limit = max(limit, end * shown)
        busy = float(run.busy.sum()) / (end * model.num_ranks)
        each.set_title(f"{title}; {end:.3g} s, stages busy for {busy:.0%} of the time", loc="left")
    axes[0].set_xlim(0, limit)
    axes[-1].set_xlabel("seconds since the first forward pass; reductions and optimizer follow")
    axes[0].legend(handles=[Patch(color="C0", label="forward"), Patch(color="C1", label="backward")], loc="upper right")
    figure.savefig(file, dpi=DPI)


def _timeline_cases(predictor: Predictor) -> list[tuple[str, Floats, NDArray[np.bool_] | None]]:
    """Title, shares of the microbatches that layers run, and layers that have not begun, of each iteration."""
    drop, num_layers = predictor.setup.config.drop, predictor.setup.config.model.num_layers
    cases: list[tuple[str, Floats, NDArray[np.bool_] | None]]
    cases = [("nothing dropped", np.ones((1, 1, num_layers)), None)]
    if not drops(drop):
        return cases
    policy = predictor.policy(drop)
    for first, last in spans(policy, predictor.train_iters):
        iteration = max(1, (first - 1 + last) // 2)
        begun = policy.begun_layers(iteration)
        if drop.policy == "staged" and len(begun) == num_layers:
            continue  # as with nothing dropped
        shares = predictor.shares(drop, policy, [iteration], predictor.setup.placement)[0]
        sampler = "" if drop.policy in ("none", "staged") else f", sampler {drop.sampler}"
        title = f"{drop.policy}{sampler}, iteration {iteration}: {shares.mean():.0%} of the layers run"
        waiting = None if policy.stages is None else policy.stages.gate(iteration)[None] == 0
        cases.append((title, shares, waiting))
    return cases


def _draw_run(axes: Axes, run: Run) -> None:
    num_ranks = run.busy.shape[-1]
    for event in run.events:
        start, end = float(event.start[0]), float(event.end[0])
        color = "C0" if event.what.is_forward else "C1"
        shade = 1.0 if event.what.chunk < num_ranks else max(0.35, 1.0 - 0.25 * (event.what.chunk // num_ranks))
        axes.broken_barh(
            [(start, end - start)],
            (event.rank - 0.4, 0.8),
            facecolor=color,
            edgecolor="white",
            linewidth=0.3,
            alpha=shade,
        )
    axes.set(ylim=(num_ranks - 0.5, -0.5), yticks=range(num_ranks))
    axes.set_yticklabels([f"stage {rank + 1}" for rank in range(num_ranks)])


def plot_gain(predictor: Predictor, file: Path) -> None:
    """Draws the gain against theta, with both samplers on a pipeline, beside the ideal one."""
    drop = predictor.setup.config.drop
    samplers = [drop.sampler]
    if predictor.setup.placement.num_ranks > 1 and drop.replicas == "shared":
        samplers = ["bernoulli", "balanced"]
    highest = min(1.0, drop.peak_theta or 1.0)
    thetas = np.linspace(min(LOWEST_THETA, highest), highest, _THETAS)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ideal: Floats | None = None
    for sampler in samplers:
        # Stages share out their layers among balance_stages whatever the sampler.
        stages = drop.balance_stages if sampler == "balanced" or drop.stages is not None else None
        section = dataclasses.replace(drop, sampler=sampler, balance_stages=stages)
        found = [predictor.predict(dataclasses.replace(section, theta=float(theta))) for theta in thetas]
        if ideal is None:
            ideal = np.array([100 * entry.ideal_gain for entry in found])
            axes.plot(thetas, ideal, "--", color="0.4", label="ideal: a dropped layer costs nothing")
        gains = np.array([100 * entry.gain for entry in found])
        axes.plot(thetas, gains, marker="o", label=f"predicted, sampler {sampler}")
    axes.axvline(drop.theta, color="0.7", linewidth=0.8, label=f"drop.theta {drop.theta:g}")
    axes.set_title(f"{drop.policy} on {predictor.setup.gpus} x {predictor.setup.hardware.name}", loc="left")
    axes.set(xlabel="theta", ylabel="gain in throughput, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=DPI)
