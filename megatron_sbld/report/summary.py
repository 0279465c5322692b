"""The figures of a comparison: loss, throughput, and how much of the gain that the drops allow was realised.

A row is a group of runs that differ in their seeds alone, and gives means over them; a group may be one run.

The ideal gain is that of docs/method.md section 7: FLOPs alone decide how much time a dropped layer saves. Kernels that
do not scale with their FLOPs, communication and pipeline bubbles are not in it; they are what the ratio shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_sbld.config.flops import ideal_speedup, layer_share
from megatron_sbld.config.sections import Config
from megatron_sbld.report.compute import flops_until, kept_flops, total_flops, vocab_size_of
from megatron_sbld.report.evaluation import EvaluationFigure, Series, find_series, group_figures, last_evaluations
from megatron_sbld.report.evaluation import run_figures as evaluation_figures
from megatron_sbld.report.groups import RunGroup
from megatron_sbld.report.notes import (
    EVALUATION_NOTE,
    FLOPS_NOTE,
    FLOPS_TO_LOSS_NOTE,
    NOT_INTERLEAVED_NOTE,
    SEEDS_NOTE,
    TIME_TO_LOSS_NOTE,
    evaluation_notes,
    group_notes,
)
from megatron_sbld.report.runs import FloatArray, RunData
from megatron_sbld.report.seeds import (
    Estimate,
    difference,
    estimate,
    paired_seeds,
    time_to_loss,
)

WARMUP_ITERATIONS = 5
BLOCK_ITERATIONS = 10


@dataclass(frozen=True)
class RunFigures:
    """The figures of one run, of which a row's are means."""

    group: str
    """Label of the row that the run belongs to."""
    label: str
    path: str
    training_seed: int
    drop_seed: int
    iterations: int
    consumed_tokens: int
    valid_loss: float | None
    tokens_per_s: float
    model_tflops_per_gpu: float | None
    mean_keep_prob: float
    kept_fraction: float
    kept_flops: float
    """Share of the layers' FLOPs that ran, over the same iterations: kept_fraction unless tokens are dropped."""
    train_time_s: float
    training_flops: float | None
    """As in RunSummary."""
    time_to_baseline_loss: float | None
    """As in RunSummary; None as well for a seed that is left out of a paired comparison."""
    flops_to_baseline_loss: float | None
    """Likewise."""
    evaluations: list[EvaluationFigure] = field(default_factory=list)
    """Of the run's last evaluated iteration: every metric of every series that some run has."""


@dataclass(frozen=True)
class RunSummary:
    """A row of the comparison: means over seeds. Gains are relative to the baseline: 0.2 is 20 % more tokens/s."""

    label: str
    path: str
    """The run folder; of several runs the folder that they are in."""
    policy: str
    num_seeds: int
    """Runs of the row."""
    iterations: int
    """Of the run that is least far, as consumed_tokens."""
    consumed_tokens: int
    valid_loss: float | None
    """Last validation loss; None without validation."""
    valid_loss_stderr: float | None
    """Standard error over seeds (ddof 1); None for one seed, as the other."""
    valid_loss_change: float | None
    """The same, less the baseline's: the mean of paired differences, or else the difference of the means."""
    valid_loss_change_stderr: float | None
    """Of the paired differences, or else the root of the sum of both groups' squared standard errors."""
    num_paired_seeds: int | None
    """Seeds over which the change is paired; 0 where it is not, None for the baseline and without a change."""
    time_to_baseline_loss: float | None
    """Training time until the validation loss first falls to the baseline's final one, relative to the baseline's time
    at that validation. None unless all seeds reach it."""
    training_flops: float | None
    """Of what ran in all iterations (compute.py); None where some run's are not known."""
    flops_change: float | None
    """Relative to the baseline's: -0.4 is 40 % less compute."""
    flops_to_baseline_loss: float | None
    """As time_to_baseline_loss, in FLOPs."""
    tokens_per_s: float
    model_tflops_per_gpu: float | None
    mean_keep_prob: float
    """Over layers and iterations, the warm-up left out."""
    kept_fraction: float
    """Share of layers, or of their tokens, that really ran, over the same iterations."""
    ideal_gain: float | None
    """None where the run cannot be compared with the baseline."""
    realised_gain: float | None
    gain_ratio: float | None
    """realised_gain / ideal_gain; None where ideal_gain is 0 or unknown."""
    train_time_s: float
    """Of all iterations, without validation and saving."""
    train_time_change: float | None = None
    """Relative to the baseline's: -0.08 is 8 % less. None for another model or other iterations."""
    evaluations: list[EvaluationFigure] = field(default_factory=list)
    """Means of the runs' figures, in one order for all rows."""


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of the groups, their runs, the baseline's label, and footnotes without which they mislead."""

    baseline: str
    rows: list[RunSummary]
    runs: list[RunFigures]
    notes: list[str]


def summarise(groups: Sequence[RunGroup], baseline: RunGroup, realised: bool = True) -> Comparison:
    """Compares `groups` with `baseline`, which is one of them; without `realised` no footnote is of their times."""
    series = find_series([row for group in groups for run in group.runs for row in last_evaluations(run)])
    notes = _general_notes(groups, baseline, realised)
    if series:
        notes.append(EVALUATION_NOTE)
    reference = [_run_figures(run, baseline.label, None, None, series) for run in baseline.runs]
    rows, runs = [], []
    for group in groups:
        paired = paired_seeds([run.seed for run in group.validated], [run.seed for run in baseline.validated])
        times = _shares_to_baseline_loss(group, baseline, paired, lambda run: run.valid_column("train_time_s"))
        flops = _shares_to_baseline_loss(
            group, baseline, paired, lambda run: flops_until(run, run.valid_column("iteration"))
        )
        figures = [
            _run_figures(run, group.label, time, compute, series)
            for run, time, compute in zip(group.runs, times, flops, strict=True)
        ]
        row = _summarise_group(group, baseline, figures, reference, paired, series)
        notes += group_notes(group, baseline, paired, row.flops_change) + evaluation_notes(
            group, baseline, row.flops_change
        )
        compared = [run.time_to_baseline_loss for run in _compared(figures, paired)]
        reached = [time for time in compared if time is not None]
        if 0 < len(reached) < len(compared):
            notes.append(
                f"{group.label}: {len(reached)} of {len(compared)} seeds reach the baseline's final loss, so no "
                "mean time or FLOPs to it are given."
            )
        rows.append(row)
        runs += figures
    return Comparison(baseline=baseline.label, rows=rows, runs=runs, notes=notes)


def choose_baseline(groups: Sequence[RunGroup]) -> RunGroup:
    """The first group that drops nothing, else the first."""
    return next((group for group in groups if group.policy == "none"), groups[0])


def tokens_per_s(run: RunData) -> float:
    """Throughput of a run, the warm-up left out: tokens over time, each block's time taken from its median rate.

    A median over the whole run would ignore a minority of iterations that are different by design (theta near its peak,
    the full-depth end of `recovery_fraction`); a mean would count every pause of a shared machine.
    """
    rate = steady(run.column("tokens_per_s"))
    tokens = rate * steady(run.column("step_time_s"))
    starts = range(0, len(rate), BLOCK_ITERATIONS)
    blocks = [slice(start, start + BLOCK_ITERATIONS) for start in starts]
    seconds = sum(tokens[block].sum() / np.median(rate[block]) for block in blocks)
    return float(tokens.sum() / seconds)


def steady(values: FloatArray) -> FloatArray:
    """Leaves out the first WARMUP_ITERATIONS of a run, of a shorter run its first half."""
    return values[min(WARMUP_ITERATIONS, len(values) // 2) :]


def _general_notes(groups: Sequence[RunGroup], baseline: RunGroup, realised: bool) -> list[str]:
    phi = layers_share(baseline.config)
    if phi is None:
        ideal = f"not known, since the tokenizer {baseline.config.data.tokenizer!r} is not found here"
    else:
        ideal = f"from the share of layers that ran, by FLOPs (the layers are {phi:.1%} of an iteration's)"
    by_speed = "; realised gain: from tokens/s" if realised else ""
    notes = [
        f"Gains are against {baseline.label}. Ideal gain: {ideal}{by_speed}.",
        f"Tokens/s: the first {WARMUP_ITERATIONS} iterations are left out, and every {BLOCK_ITERATIONS} iterations "
        "count with their median, so that a hiccup of the machine does not.",
    ]
    if any(len(group.runs) > 1 for group in groups):
        notes.append(SEEDS_NOTE)
    if realised:
        notes.append(NOT_INTERLEAVED_NOTE)
    if realised and baseline.validated:
        notes.append(TIME_TO_LOSS_NOTE)
    if any(total_flops(run) is not None for group in groups for run in group.runs):
        notes += [FLOPS_NOTE, FLOPS_TO_LOSS_NOTE] if baseline.validated else [FLOPS_NOTE]
    if baseline.policy != "none":
        notes.append(f"The baseline {baseline.label} drops layers itself ({baseline.policy}): gains are over that.")
    return notes


def _run_figures(
    run: RunData,
    group: str,
    time_to_baseline_loss: float | None,
    flops_to_baseline_loss: float | None,
    series: Sequence[Series],
) -> RunFigures:
    has_tflops = all("model_tflops_per_gpu" in row for row in run.train)
    return RunFigures(
        group=group,
        label=run.label,
        path=str(run.path),
        training_seed=run.seed,
        drop_seed=run.config.drop.seed,
        iterations=run.last_iteration,
        consumed_tokens=int(run.column("consumed_tokens")[-1]),
        valid_loss=_last_valid_loss(run) if run.valid else None,
        tokens_per_s=tokens_per_s(run),
        model_tflops_per_gpu=float(np.median(steady(run.column("model_tflops_per_gpu")))) if has_tflops else None,
        mean_keep_prob=float(steady(run.column("mean_keep_prob")).mean()),
        kept_fraction=float(steady(run.column("kept_fraction")).mean()),
        kept_flops=float(steady(kept_flops(run)).mean()),
        train_time_s=float(run.column("step_time_s").sum()),
        training_flops=total_flops(run),
        time_to_baseline_loss=time_to_baseline_loss,
        flops_to_baseline_loss=flops_to_baseline_loss,
        evaluations=evaluation_figures(run, series),
    )


def _summarise_group(
    group: RunGroup,
    baseline: RunGroup,
    figures: Sequence[RunFigures],
    reference: Sequence[RunFigures],
    paired: Sequence[int] | None,
    series: Sequence[Series],
) -> RunSummary:
    """The row of `group` from the figures of its runs and of the baseline's, `reference`."""
    ideal, realised = _gains(group, baseline, figures, reference)
    losses = [run.valid_loss for run in figures if run.valid_loss is not None]
    loss = estimate(losses) if losses else None
    change = _loss_change(group, baseline, paired)
    compared = change is not None and group is not baseline
    flops, their_flops = (_mean_if_all([run.training_flops for run in runs]) for runs in (figures, reference))
    paths = [run.path for run in figures]
    return RunSummary(
        label=group.label,
        path=paths[0] if len(paths) == 1 else os.path.commonpath(paths),
        policy=group.policy,
        num_seeds=len(figures),
        iterations=min(run.iterations for run in figures),
        consumed_tokens=min(run.consumed_tokens for run in figures),
        valid_loss=loss.mean if loss else None,
        valid_loss_stderr=loss.stderr if loss else None,
        valid_loss_change=change.mean if change else None,
        valid_loss_change_stderr=change.stderr if change else None,
        num_paired_seeds=len(paired or ()) if compared else None,
        time_to_baseline_loss=_mean_if_all([run.time_to_baseline_loss for run in _compared(figures, paired)]),
        training_flops=flops,
        flops_change=None if flops is None or their_flops is None else flops / their_flops - 1,
        flops_to_baseline_loss=_mean_if_all([run.flops_to_baseline_loss for run in _compared(figures, paired)]),
        tokens_per_s=_mean([run.tokens_per_s for run in figures]),
        model_tflops_per_gpu=_mean_if_all([run.model_tflops_per_gpu for run in figures]),
        mean_keep_prob=_mean([run.mean_keep_prob for run in figures]),
        kept_fraction=_mean([run.kept_fraction for run in figures]),
        ideal_gain=ideal,
        realised_gain=realised,
        gain_ratio=realised / ideal if ideal and realised is not None else None,
        train_time_s=_mean([run.train_time_s for run in figures]),
        train_time_change=_time_change(group, baseline, figures, reference),
        evaluations=group_figures(group, baseline, series),
    )


def _gains(
    group: RunGroup, baseline: RunGroup, figures: Sequence[RunFigures], reference: Sequence[RunFigures]
) -> tuple[float | None, float | None]:
    """Ideal and realised gain over the baseline; None for another model, whose tokens cost something else."""
    if group.config.model != baseline.config.model:
        return None, None
    rate, baseline_rate = (_mean([run.tokens_per_s for run in runs]) for runs in (figures, reference))
    realised = rate / baseline_rate - 1
    phi, baseline_phi = layers_share(group.config), layers_share(baseline.config)
    if phi is None or baseline_phi is None:
        return None, realised
    kept, baseline_kept = (_mean([run.kept_flops for run in runs]) for runs in (figures, reference))
    return ideal_speedup(phi, kept) / ideal_speedup(baseline_phi, baseline_kept) - 1, realised


def _time_change(
    group: RunGroup, baseline: RunGroup, figures: Sequence[RunFigures], reference: Sequence[RunFigures]
) -> float | None:
    """Training time against the baseline's; None unless all runs are of one model and stand at one iteration."""
    if group.config.model != baseline.config.model or len({run.iterations for run in [*figures, *reference]}) > 1:
        return None
    ours, theirs = (_mean([run.train_time_s for run in runs]) for runs in (figures, reference))
    return ours / theirs - 1


def layers_share(config: Config) -> float | None:
    """phi of docs/method.md section 7; None where the runs' tokenizer, which gives the vocabulary, is not found."""
    vocab_size = vocab_size_of(config)
    recompute = config.training.recompute_granularity == "full"
    return None if vocab_size is None else layer_share(config.model, vocab_size, recompute=recompute)


def _loss_change(group: RunGroup, baseline: RunGroup, paired: Sequence[int] | None) -> Estimate | None:
    """Validation loss less the baseline's, over the seeds `paired`, or of the means where they are None."""
    if not group.validated or not baseline.validated:
        return None
    if group is baseline:
        return Estimate(0.0, None)
    seeds, their_seeds = ([run.seed for run in runs.validated] for runs in (group, baseline))
    losses, their_losses = ([_last_valid_loss(run) for run in runs.validated] for runs in (group, baseline))
    return difference(seeds, losses, their_seeds, their_losses, paired)


def _shares_to_baseline_loss(
    group: RunGroup,
    baseline: RunGroup,
    paired: Sequence[int] | None,
    cost: Callable[[RunData], FloatArray | None],
) -> list[float | None]:
    """For each run the share of the baseline's cost after which it reaches the baseline's final loss; None if never.

    cost: of a run until each of its validations, as time or FLOPs; None where it is not known.
    The baseline is the run of the same seed where seeds are paired, the mean of its runs where they are not. A run of
    the baseline is measured against itself: below 1 it shows how far the validation loss goes up and down.
    """
    shares: list[float | None] = []
    for run in group.runs:
        if group is baseline:
            references = [run] if run.valid else []
        else:
            references = [other for other in baseline.validated if paired is None or run.seed == other.seed in paired]
        costs = cost(run) if run.valid else None
        wholes = [None if found is None else float(found[-1]) for found in map(cost, references)]
        whole = _mean_if_all(wholes)
        if costs is None or whole is None:
            shares.append(None)
            continue
        loss = _mean([_last_valid_loss(other) for other in references])
        reached = time_to_loss(costs, run.valid_column("valid_loss"), loss)
        shares.append(None if reached is None else reached / whole)
    return shares


def _compared(figures: Sequence[RunFigures], paired: Sequence[int] | None) -> list[RunFigures]:
    """The runs whose validation loss is compared with the baseline's."""
    return [run for run in figures if run.valid_loss is not None and (paired is None or run.training_seed in paired)]


def _last_valid_loss(run: RunData) -> float:
    return float(run.valid_column("valid_loss")[-1])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _mean_if_all(values: Sequence[float | None]) -> float | None:
    """Mean of the values; None if one is unknown or there is none."""
    known = [value for value in values if value is not None]
    return _mean(known) if known and len(known) == len(values) else None
