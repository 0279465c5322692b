"""The footnotes of a comparison: how its figures are made, and where they do not compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from megatron_sbld.report.evaluation import evaluated_iterations
from megatron_sbld.report.groups import RunGroup
from megatron_sbld.report.runs import RunData

_COMPARED_SECTIONS = ("model", "parallel", "data", "optimizer", "training")
_EQUAL_FLOPS = 0.05  # relative difference up to which two runs took as much compute
_NOT_COMPARED = ("training.seed", "data.data_cache_path")  # seeds have footnotes of their own

SEEDS_NOTE = (
    "Rows are means over seeds; s.e.: standard error of the mean (sample standard deviation over the root of the "
    "number of seeds). The change is the mean of the differences from the baseline's run of the same seed, its s.e. "
    "that of these differences; where seeds differ, a footnote says so."
)
NOT_INTERLEAVED_NOTE = (
    "Realised gain and times compare runs that ran at different times: they include whatever else the machine did. "
    "benchmarks/realised_gain.py measures the gain within one run, undropped and dropped iterations in turn."
)
TIME_TO_LOSS_NOTE = (
    "Time to baseline loss: training time until a run's validation loss first falls to the final one of the baseline, "
    "as a share of the baseline's training time until then (of the same seed where paired); interpolated linearly "
    "between validations, - where it is not reached."
)
FLOPS_NOTE = (
    "Training FLOPs: of the layers that ran, forward and backward, with embeddings and logits, without recomputation, "
    "optimizer and validation; beside them the change from the baseline's."
)
FLOPS_TO_LOSS_NOTE = (
    "FLOPs to baseline loss: those until a run's validation loss first falls to the baseline's final one, as a share "
    "of the baseline's. A learning rate that is still high hides what a run has learned: compare runs that end at "
    "equal FLOPs, each with its own decay."
)

EVALUATION_NOTE = (
    "Evaluations are of the last iteration at which a run was evaluated. Their s.e. is over the passages or windows of "
    "the data for a row of one seed, and over seeds for a row of several."
)


def group_notes(
    group: RunGroup, baseline: RunGroup, paired: Sequence[int] | None, flops_change: float | None
) -> list[str]:
    """Footnotes on one row.

    Args:
        paired: seeds over which the change is paired; None where it is not.
        flops_change: how much more the group has computed than the baseline, relative to it; None if it is not known.
    """
    notes = [] if group is baseline else _difference_notes(group, baseline)
    for run in group.runs:
        notes += changes_notes(run, _is_compared)
    notes += _progress_notes(group, baseline, flops_change)
    missing = [run.label for run in group.runs if not run.valid]
    if missing and group.validated:
        notes.append(f"{group.label}: not in the mean validation loss, because they have none: {_and(missing)}.")
    if group is not baseline and group.validated and baseline.validated:
        notes += _pairing_notes(group, baseline, paired)
    seeds = _seeds(group)
    if len(set(seeds)) < len(seeds):
        notes.append(
            f"{group.label}: a seed occurs more than once ({_and(seeds)}); the s.e. takes its runs for independent."
        )
    if len({run.config.drop.sensitivity for run in group.runs}) > 1:
        notes.append(f"{group.label}: every seed has a sensitivity file of its own.")
    return notes


def evaluation_notes(group: RunGroup, baseline: RunGroup, flops_change: float | None = None) -> list[str]:
    """Footnotes on a row's evaluations: where they are of different iterations, or some runs have none.

    Different iterations compare where they are the last ones of runs of equal FLOPs.
    """
    ours, theirs = evaluated_iterations(group), evaluated_iterations(baseline)
    if not ours:
        return []
    notes = []
    missing = [run.label for run in group.runs if not run.evaluations]
    if missing:
        notes.append(f"{group.label}: not in the means of evaluations, because they have none: {_and(missing)}.")
    if len(ours) > 1:
        notes.append(
            f"{group.label}: its runs were last evaluated at iterations {_and(sorted(ours))}: their means "
            "cannot be compared."
        )
    ends = [{run.last_iteration for run in runs.runs} for runs in (group, baseline)]
    at_equal_compute = [ours, theirs] == ends and flops_change is not None and abs(flops_change) <= _EQUAL_FLOPS
    if theirs and ours != theirs and not at_equal_compute:
        notes.append(
            f"{group.label} was last evaluated at iteration {_and(sorted(ours))}, {baseline.label} at "
            f"{_and(sorted(theirs))}: their evaluations cannot be compared."
        )
    elif len(ours) == 1 and any(run.last_iteration not in ours for run in group.runs if run.evaluations):
        notes.append(f"{group.label}: evaluated at iteration {_and(ours)}, before its end.")
    return notes


def changes_notes(run: RunData, concerns: Callable[[str], bool]) -> list[str]:
    """On a run that was resumed with other settings: one line, as far as `concerns` holds for a field."""
    changes = [change.text for change in run.changes if concerns(change.field)]
    if not changes:
        return []
    return [f"{run.label} was resumed with other settings; the last ones are used: {'; '.join(changes)}."]


def _is_compared(field: str) -> bool:
    return field.partition(".")[0] in (*_COMPARED_SECTIONS, "drop") and field != "data.data_cache_path"


def _difference_notes(group: RunGroup, baseline: RunGroup) -> list[str]:
    """On whatever beside dropping and seeds tells a group from the baseline."""
    notes = []
    if group.config.model != baseline.config.model:
        notes.append(f"{group.label} is another model than {baseline.label}: no gains are given.")
    ours, theirs = dataclasses.asdict(group.config), dataclasses.asdict(baseline.config)
    differing = [
        f"{section}.{key}"
        for section in _COMPARED_SECTIONS
        for key, value in ours[section].items()
        if value != theirs[section][key] and f"{section}.{key}" not in _NOT_COMPARED
    ]
    if differing:
        notes.append(f"{group.label} differs from {baseline.label} beside dropping, in {', '.join(differing)}.")
    return notes


def _progress_notes(group: RunGroup, baseline: RunGroup, flops_change: float | None) -> list[str]:
    """On runs that stand at different iterations, or were last validated at different ones.

    That makes losses incomparable, unless both have ended, validated, at equal FLOPs.
    """
    ours, theirs = ({run.last_iteration for run in runs.runs} for runs in (group, baseline))
    validated, others_validated = ({run.valid[-1]["iteration"] for run in runs.validated} for runs in (group, baseline))
    within = between = ""
    if len(ours) > 1:
        within = f"stand at iterations {_and(sorted(ours))}"
    elif len(validated) > 1:
        within = f"were last validated at iterations {_and(sorted(validated))}"
    if ours != theirs:
        between = f"{group.label} stands at iteration {_and(sorted(ours))}, {baseline.label} at {_and(sorted(theirs))}"
    elif validated and others_validated and validated != others_validated:
        between = (
            f"{group.label} was last validated at iteration {_and(sorted(validated))}, {baseline.label} at "
            f"{_and(sorted(others_validated))}"
        )
    notes = [f"{group.label}: its runs {within}: their mean loss cannot be compared."] if within else []
    if not between:
        return notes
    at_end = validated == ours and others_validated == theirs
    if at_end and flops_change is not None and abs(flops_change) <= _EQUAL_FLOPS:
        return [*notes, f"{between}, with {1 + flops_change:.2f} of its FLOPs: they are compared at equal compute."]
    return [*notes, f"{between}: their losses cannot be compared."]


def _pairing_notes(group: RunGroup, baseline: RunGroup, paired: Sequence[int] | None) -> list[str]:
    """On a change that is not paired, or not over all seeds."""
    ours, theirs = (sorted(run.seed for run in runs.validated) for runs in (group, baseline))
    seeds = f"its seeds are {_and(ours)}, those of {baseline.label} {_and(theirs)}"
    if paired is None:
        return [f"{group.label}: the change is not paired but the difference of the means: {seeds}."]
    if list(paired) != ours or ours != theirs:
        return [f"{group.label}: the change is over the common seeds alone ({_and(paired)}): {seeds}."]
    return []


def _seeds(group: RunGroup) -> list[int]:
    return sorted(run.seed for run in group.runs)


def _and(values: Iterable[object]) -> str:
    """1, 2 and 3."""
    *others, last = map(str, values)
    return f"{', '.join(others)} and {last}" if others else last
