"""What `megatron-sbld schedule fit` does: PWEGD's parameters from the loss gap of two runs (docs/method.md 3)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_sbld.checks import check_number
from megatron_sbld.files.outputs import refuse_inputs
from megatron_sbld.method.schedule_fit import Fit, Trace, build_trace, fit_trace, is_exponential, schedule_fields
from megatron_sbld.report.notes import changes_notes
from megatron_sbld.report.runs import RunData, read_runs, run_files
from megatron_sbld.report.schedule_plots import plot_fits

# What makes the losses of two runs differ beside dropping, so that their gap would say nothing.
_SAME = {
    "data": ("train_data_path", "tokenizer", "eod_mask_loss", "reset_position_ids", "reset_attention_mask"),
    "training": ("global_batch_size", "rampup_batch_size", "seed"),
}
_SAME_SECTIONS = ("model", "optimizer")
_MAY_DIFFER = {"model.transformer_impl", "optimizer.log_num_zeros_in_grad"}
# These change the learning rate, the order of the data or the weights of tokens, or round differently; a note says so.
_NOTED = ("train_iters", "train_samples", "calculate_per_token_loss", "precision")
_POOR = 0.5


@dataclass(frozen=True)
class ScheduleFit:
    """Fits to a trace, and the PWEGD that follows from them."""

    baseline: str
    """Run folder of the baseline."""
    dropped: str
    iterations: tuple[int, int]
    """First and last of those compared."""
    window: int
    """Iterations of the running mean."""
    noise: float
    fits: list[Fit]
    theta: float
    peak_theta: float
    schedule: dict[str, float]
    """a, b, c, epsilon, eta."""
    notes: list[str]


def fit_schedule(
    baseline_run: str,
    dropped_run: str,
    peak_theta: float,
    theta: float | None = None,
    window: int | None = None,
    out: str | None = None,
) -> ScheduleFit:
    """Prints how well PWEGD and alternatives fit the loss gap of two runs, and a drop section with what was fitted.

    Args:
        baseline_run: run folder that drops nothing.
        dropped_run: run folder of the same model, data and settings that drops layers.
        peak_theta: highest theta of the schedule, in [theta, 1]; losses cannot tell it.
        theta: limit of the schedule; None is the dropped run's.
        window: iterations of the running mean; None is 2 % of the trace.
        out: folder for schedule.yaml, fit.json and fit.png. None writes nothing.

    Raises:
        ValueError: the runs do not compare, or their gap has no peak; with the reason.
    """
    check_number("peak_theta", peak_theta, "(0, 1]")
    if theta is not None:
        check_number("theta", theta, "(0, 1]")
    baseline, dropped = read_runs([baseline_run, dropped_run])
    _check_pair(baseline, dropped)
    theta = dropped.config.drop.theta if theta is None else theta
    check_number("peak_theta", peak_theta, f"[{theta!r}, 1]")
    trace = _trace(baseline, dropped, window)
    fits = fit_trace(trace)
    result = ScheduleFit(
        baseline=str(baseline.path),
        dropped=str(dropped.path),
        iterations=(int(trace.iterations[0]), int(trace.iterations[-1])),
        window=trace.window,
        noise=trace.noise,
        fits=fits,
        theta=theta,
        peak_theta=peak_theta,
        schedule=schedule_fields(fits[0], theta, peak_theta),
        notes=[*_run_notes(baseline, dropped, trace), *_fit_notes(fits)],
    )
    print(fits_text(result), schedule_yaml(result), sep="\n\n", end="")
    if out is not None:
        for file in _save(result, trace, (baseline, dropped), Path(out)):
            print(f"saved {file}")
    return result


def fits_text(result: ScheduleFit) -> str:
    """The fits as a plain table, with its notes."""
    lowest = min(fit.aic for fit in result.fits)
    first, last = result.iterations
    lines = [
        f"loss gap of iterations {first} to {last}, running mean of {result.window}",
        "",
        f"{'fit':<12}{'RMSE':>9}{'R^2':>8}{'AIC - lowest':>14}  parameters",
    ]
    for fit in result.fits:
        parameters = ", ".join(f"{name} {value:.5g}" for name, value in fit.parameters.items())
        lines.append(f"{fit.name:<12}{fit.rmse:>9.4g}{fit.r_squared:>8.3f}{fit.aic - lowest:>14.1f}  {parameters}")
    return "\n".join([*lines, "", *(f"- {note}" for note in result.notes)])


def schedule_yaml(result: ScheduleFit) -> str:
    """The drop section's fields that make the fitted schedule, to paste into a config."""
    first, last = result.iterations
    lines = [
        f"# PWEGD fitted to the loss gap of {result.dropped}",
        f"# over {result.baseline}, iterations {first} to {last}.",
        f"# eta makes the highest theta(t) {result.peak_theta:g}. Only a + c enters the formula, so c is set to 1.",
        "# b, epsilon and eta are in iterations of these runs.",
        "drop:",
        "  schedule: pwegd",
        f"  theta: {result.theta!r}",
        *(f"  {name}: {value!r}" for name, value in result.schedule.items()),
    ]
    return "\n".join(lines) + "\n"


def _check_pair(baseline: RunData, dropped: RunData) -> None:
    """Refuse runs whose loss gap is not the effect of dropping."""
    if baseline.policy == dropped.policy:
        raise ValueError(
            f"both runs have drop.policy {baseline.policy}: the baseline must have none, and the other must drop layers"
        )
    if baseline.policy != "none":
        swapped = "; the runs seem to be swapped" if dropped.policy == "none" else ""
        raise ValueError(f"{baseline.label} has drop.policy {baseline.policy}: the baseline must have none{swapped}")
    differing = [path for path in _compared_fields(baseline) if _value(baseline, path) != _value(dropped, path)]
    if differing:
        ours = ", ".join(f"{path} ({_value(dropped, path)}, not {_value(baseline, path)})" for path in differing)
        raise ValueError(
            f"{dropped.label} differs from {baseline.label} beside dropping, in {ours}: so would the losses"
        )


def _compared_fields(run: RunData) -> list[str]:
    whole = {
        section: [field.name for field in dataclasses.fields(getattr(run.config, section))]
        for section in _SAME_SECTIONS
    }
    paths = [f"{section}.{name}" for section, names in {**whole, **_SAME}.items() for name in names]
    return [path for path in paths if path not in _MAY_DIFFER]


def _value(run: RunData, path: str) -> object:
    section, name = path.split(".")
    return getattr(getattr(run.config, section), name)


def _trace(baseline: RunData, dropped: RunData, window: int | None) -> Trace:
    """The gap at the iterations that both runs have, to the last in which layers could be dropped."""
    dropping = np.flatnonzero(dropped.column("mean_keep_prob") < 1.0)
    if not len(dropping):
        raise ValueError(f"{dropped.label} kept every layer with certainty: there is no gap to fit")
    last = int(dropping[-1]) + 1
    iterations, ours, theirs = np.intersect1d(
        baseline.column("iteration"), dropped.column("iteration")[:last], return_indices=True
    )
    if not len(iterations):
        spans = [
            f"{run.label} has {run.train[0]['iteration']} to {run.train[-1]['iteration']}"
            for run in (baseline, dropped)
        ]
        raise ValueError(f"the runs have no iteration in common: {', '.join(spans)}")
    return build_trace(iterations, baseline.column("loss")[ours], dropped.column("loss")[theirs], window)


def _run_notes(baseline: RunData, dropped: RunData, trace: Trace) -> list[str]:
    notes = [
        "RMSE and R^2 are of the running mean. AIC is of the single iterations, which it takes for independent: where "
        "gaps drift together for another reason than the shape, it is too sure.",
    ]
    compared = {*_compared_fields(baseline), *(f"training.{name}" for name in _NOTED)}
    for run in (baseline, dropped):
        notes += changes_notes(run, lambda field: field in compared or field.startswith("drop."))
    for name in _NOTED:
        ours, theirs = getattr(dropped.config.training, name), getattr(baseline.config.training, name)
        if ours != theirs:
            notes.append(
                f"training.{name} differs ({ours}, not {theirs}): part of the gap may be due to that (learning rate, "
                "order of the data, weights of tokens, rounding)."
            )
    last = int(trace.iterations[-1])
    if last < dropped.train[-1]["iteration"] and dropped.config.drop.recovery_fraction:
        notes.append(f"The dropped run's recovery at full depth, after iteration {last}, is left out.")
    return notes


def _fit_notes(fits: Sequence[Fit]) -> list[str]:
    pwegd, notes = fits[0], []
    best = min(fits, key=lambda fit: fit.aic)
    if is_exponential(pwegd):
        notes.append(
            f"The best k is 1 ({pwegd.parameters['k']:.4g}): an exponential decay from epsilon on, so a is set to 0."
        )
    if best is not pwegd:
        follow = (
            "; drop.schedule exponential follows it" if best.name == "exponential" else ", which is no drop.schedule"
        )
        notes.append(f"The lowest AIC is that of {best.name}{follow}.")
    if pwegd.r_squared < _POOR:
        notes.append(f"PWEGD fits poorly (R^2 {pwegd.r_squared:.2f}): look at the plot before using it.")
    limits = [name for name in pwegd.at_limit if name in ("k", "b") and not is_exponential(pwegd)]
    if limits:
        notes.append(f"PWEGD's {' and '.join(limits)} ended at a limit of the search: the trace does not determine it.")
    return notes


def _save(result: ScheduleFit, trace: Trace, runs: Sequence[RunData], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("schedule.yaml", "fit.json", "fit.png")]
    refuse_inputs("--out", files, run_files(runs))
    files[0].write_text(schedule_yaml(result), encoding="utf-8")
    files[1].write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")
    plot_fits(trace, result.fits, f"{runs[1].label} over {runs[0].label}", files[2])
    return files
