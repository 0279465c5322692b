"""Evaluations of runs beside each other: what belongs together, figures over seeds, and accuracy by iteration.

A series is what compares: one task on one data set with the same options and precision. Figures of a comparison are
those of the last iteration at which a run was evaluated (Table 3 of the paper); the table and the plot over iterations
(Table 4, Figure 9) take all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sbld.data.tokenizer import is_of_bytes
from megatron_sbld.evaluation.results import Evaluation
from megatron_sbld.report.groups import RunGroup
from megatron_sbld.report.runs import RunData
from megatron_sbld.report.seeds import Estimate, difference, estimate, paired_seeds

METRICS = {
    "lambada": ("accuracy", "perplexity"),
    "perplexity": ("token_perplexity", "word_perplexity", "bits_per_byte"),
}
"""Of each task, what is compared; each has its standard error under its name and _stderr."""

METRIC_NAMES = {
    "accuracy": "accuracy (%)",
    "perplexity": "last-word perplexity",
    "token_perplexity": "token perplexity",
    "word_perplexity": "word perplexity",
    "bits_per_byte": "bits per byte",
}


@dataclass(frozen=True)
class Series:
    """Evaluations that compare over runs and iterations."""

    key: str
    """Evaluation.series of its members."""
    task: str
    label: str
    """LAMBADA or the name of the data, and what tells it from another series of that name."""


@dataclass(frozen=True)
class EvaluationFigure:
    """A metric of a run, or its mean over the runs of a row. An accuracy is a fraction."""

    series: str
    """Label of the series."""
    metric: str
    value: float | None
    """None where the run was not evaluated so."""
    stderr: float | None
    """Over seeds; of a single run over passages or windows."""
    change: float | None = None
    """Less the baseline's, as valid_loss_change; None for a run."""
    change_stderr: float | None = None


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run, or of runs that differ in their seeds alone."""

    label: str
    runs: Sequence[Sequence[Evaluation]]


def find_series(evaluations: Sequence[Evaluation]) -> list[Series]:
    """The series among evaluations, LAMBADA first, then in the order in which they occur."""
    first: dict[str, Evaluation] = {}
    for row in sorted(evaluations, key=lambda row: list(METRICS).index(row.task)):
        first.setdefault(row.series, row)
    by_name: dict[str, list[Evaluation]] = {}
    for row in first.values():
        by_name.setdefault(_name(row), []).append(row)
    labels = {row.series: label for rows in by_name.values() for row, label in zip(rows, _labels(rows), strict=True)}
    return [Series(key, row.task, labels[key]) for key, row in first.items()]


def last_evaluations(run: RunData) -> list[Evaluation]:
    """Those of the last iteration at which the run was evaluated."""
    last = max((row.iteration for row in run.evaluations), default=None)
    return [row for row in run.evaluations if row.iteration == last]


def run_figures(run: RunData, series: Sequence[Series]) -> list[EvaluationFigure]:
    """All metrics of all series, with None for what the run lacks."""
    figures = []
    for one in series:
        for metric in METRICS[one.task]:
            found = _metric(run, one, metric)
            figures.append(
                EvaluationFigure(one.label, metric, *((found.mean, found.stderr) if found else (None, None)))
            )
    return figures


def group_figures(group: RunGroup, baseline: RunGroup, series: Sequence[Series]) -> list[EvaluationFigure]:
    """The same as means over the runs that have them, with changes against the baseline."""
    figures = []
    for one in series:
        for metric in METRICS[one.task]:
            ours, theirs = (
                [(run.seed, found) for run in runs.runs if (found := _metric(run, one, metric))]
                for runs in (group, baseline)
            )
            mean = _mean([found for _, found in ours])
            change = None
            if ours and theirs:
                change = Estimate(0.0, None) if group is baseline else _change(ours, theirs)
            figures.append(
                EvaluationFigure(
                    series=one.label,
                    metric=metric,
                    value=mean.mean if mean else None,
                    stderr=mean.stderr if mean else None,
                    change=change.mean if change else None,
                    change_stderr=change.stderr if change else None,
                )
            )
    return figures


def evaluated_iterations(group: RunGroup) -> set[int]:
    """The iterations whose evaluations its figures are of."""
    return {rows[0].iteration for run in group.runs if (rows := last_evaluations(run))}


def iteration_table(curves: Sequence[Curve], series: Series, metric: str) -> list[list[str]]:
    """Header and rows of a table as the paper's Table 4: a line an iteration, a column a curve, mean and error."""
    values = [{point.iteration: point for point in points(curve, series, metric)} for curve in curves]
    iterations = sorted({iteration for column in values for iteration in column})
    table = [["iteration", *(curve.label for curve in curves)]]
    for iteration in iterations:
        cells = [_cell(column[iteration].value, metric) if iteration in column else "-" for column in values]
        table.append([f"{iteration:,}", *cells])
    return table


def write_iteration_tables(curves: Sequence[Curve], file: Path) -> None:
    """Writes a table of every series and metric as markdown."""
    blocks = []
    for series in find_series([row for curve in curves for run in curve.runs for row in run]):
        for metric in METRICS[series.task]:
            header, *rows = iteration_table(curves, series, metric)
            if not rows:
                continue
            lines = [header, ["---:"] * len(header), *rows]
            table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            blocks.append(f"{series.label}: {METRIC_NAMES[metric]}\n\n{table}\n")
    file.write_text("\n".join(blocks))


@dataclass(frozen=True)
class Point:
    """A metric of a curve at one iteration: its mean over the curve's runs, all of which have it."""

    iteration: int
    consumed_tokens: float | None
    train_time_s: float | None
    """Means over the runs; None unless all of them say, as consumed_tokens."""
    value: Estimate


def points(curve: Curve, series: Series, metric: str) -> list[Point]:
    """The iterations at which all runs of a curve have a metric, in order. Runs without the series are left out."""
    runs = [
        {row.iteration: row for row in run if row.series == series.key and _is_known(row, metric)} for run in curve.runs
    ]
    runs = [run for run in runs if run]
    if not runs:
        return []
    common = sorted(set.intersection(*(set(run) for run in runs)))
    found = []
    for iteration in common:
        rows = [run[iteration] for run in runs]
        value = _mean([_estimate(row, metric) for row in rows])
        assert value is not None, "a point has a run"
        found.append(
            Point(
                iteration,
                _mean_if_all([row.consumed_tokens for row in rows]),
                _mean_if_all([row.train_time_s for row in rows]),
                value,
            )
        )
    return found


def _name(row: Evaluation) -> str:
    return "LAMBADA" if row.task == "lambada" else row.data.name


def _labels(rows: Sequence[Evaluation]) -> list[str]:
    """Labels of series of one name: with as many of their properties as tell them apart."""
    properties = [
        {"data": row.data.name, **row.options, "precision": row.precision, "sha256": row.data.sha256[:8]}
        for row in rows
    ]
    names = list(dict.fromkeys(name for of_row in properties for name in of_row))
    labels, parts = [_name(row) for row in rows], [[] for _ in rows]  # type: list[str], list[list[str]]
    for name in names:
        if len(set(labels)) == len(labels):
            break
        values = [_shown(of_row.get(name)) for of_row in properties]
        if len(set(values)) > 1:
            parts = [[*part, f"{name} {value}"] for part, value in zip(parts, values, strict=True)]
            labels = [f"{_name(row)} ({', '.join(part)})" for row, part in zip(rows, parts, strict=True)]
    return labels


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _metric(run: RunData, series: Series, metric: str) -> Estimate | None:
    rows = [row for row in last_evaluations(run) if row.series == series.key]
    return _estimate(rows[-1], metric) if rows and _is_known(rows[-1], metric) else None


def _is_known(row: Evaluation, metric: str) -> bool:
    """Whether an evaluation has a metric that says something."""
    counts = [row.metrics.get(name) for name in ("tokens", "bytes")]
    tokens, num_bytes = (None if count is None else int(count) for count in counts)
    silly = metric == "word_perplexity" and is_of_bytes(tokens, num_bytes)
    return row.metrics.get(metric) is not None and not silly


def _estimate(row: Evaluation, metric: str) -> Estimate:
    value = row.metrics[metric]
    assert value is not None, f"{metric} is known"
    return Estimate(float(value), row.metrics.get(f"{metric}_stderr"))


def _mean(values: Sequence[Estimate]) -> Estimate | None:
    """Over seeds; a single run keeps its own error, over passages or windows."""
    return values[0] if len(values) == 1 else estimate([value.mean for value in values]) if values else None


def _change(ours: Sequence[tuple[int, Estimate]], theirs: Sequence[tuple[int, Estimate]]) -> Estimate:
    our_seeds, their_seeds = ([seed for seed, _ in runs] for runs in (ours, theirs))
    return difference(
        our_seeds,
        [value.mean for _, value in ours],
        their_seeds,
        [value.mean for _, value in theirs],
        paired_seeds(our_seeds, their_seeds),
    )


def _mean_if_all(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _cell(value: Estimate, metric: str) -> str:
    scale, form = (100.0, ".2f") if metric == "accuracy" else (1.0, ".4g" if metric != "bits_per_byte" else ".4f")
    error = "" if value.stderr is None else f" ± {scale * value.stderr:{'.2g' if form == '.4g' else form}}"
    return f"{scale * value.mean:{form}}{error}"
