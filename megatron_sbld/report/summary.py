"""The figures of a comparison: loss, throughput, and how much of the gain that the drops allow was realised.

The ideal gain is that of equations.md section 7: FLOPs alone decide how much time a dropped layer saves. Kernels that
do not scale with their FLOPs, communication and pipeline bubbles are not in it; they are what the ratio shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_sbld.report.runs import RunData
from megatron_sbld.training.flops import ideal_speedup, layer_share, padded_vocab_size
from megatron_sbld.training.tokenizer import load_tokenizer

WARMUP_ITERATIONS = 5
BLOCK_ITERATIONS = 10
_COMPARED_SECTIONS = ("model", "parallel", "data", "optimizer", "training")

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RunSummary:
    """A row of the comparison. Gains are relative to the baseline: 0.2 is 20 % more tokens/s."""

    label: str
    path: str
    policy: str
    iterations: int
    consumed_tokens: int
    valid_loss: float | None
    """Last validation loss; None without validation."""
    valid_loss_change: float | None
    """The same, less the baseline's."""
    tokens_per_s: float
    model_tflops_per_gpu: float | None
    mean_keep_prob: float
    """Over layers and iterations, the warm-up left out."""
    kept_fraction: float
    """Share of layers that really ran, over the same iterations."""
    ideal_gain: float | None
    """None where the run cannot be compared with the baseline."""
    realised_gain: float | None
    gain_ratio: float | None
    """realised_gain / ideal_gain; None where ideal_gain is 0 or unknown."""
    train_time_s: float
    """Of all iterations, without validation and saving."""


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of the runs, the baseline's label, and the footnotes without which the figures mislead."""

    baseline: str
    rows: list[RunSummary]
    notes: list[str]


def summarise(runs: Sequence[RunData], baseline: RunData) -> Comparison:
    """Compares `runs` with `baseline`, which is one of them."""
    phi = _layers_share(baseline)
    if phi is None:
        ideal = f"not known, since the tokenizer {baseline.config.data.tokenizer!r} is not found here"
    else:
        ideal = f"from the share of layers that ran, by FLOPs (the layers are {phi:.1%} of an iteration's)"
    notes = [
        f"Gains are against {baseline.label}. Ideal gain: {ideal}; realised gain: from tokens/s.",
        f"Tokens/s: the first {WARMUP_ITERATIONS} iterations are left out, and every {BLOCK_ITERATIONS} iterations "
        "count with their median, so that a hiccup of the machine does not.",
    ]
    if baseline.policy != "none":
        notes.append(f"The baseline {baseline.label} drops layers itself ({baseline.policy}): gains are over that.")
    notes += [note for run in runs if run is not baseline for note in _differences(run, baseline)]
    return Comparison(baseline=baseline.label, rows=[_summarise_run(run, baseline) for run in runs], notes=notes)


def choose_baseline(runs: Sequence[RunData]) -> RunData:
    """The first run that drops nothing, else the first."""
    return next((run for run in runs if run.policy == "none"), runs[0])


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


def _summarise_run(run: RunData, baseline: RunData) -> RunSummary:
    ideal, realised = _gains(run, baseline)
    valid_loss, baseline_loss = _last_valid_loss(run), _last_valid_loss(baseline)
    has_tflops = all("model_tflops_per_gpu" in row for row in run.train)
    return RunSummary(
        label=run.label,
        path=str(run.path),
        policy=run.policy,
        iterations=int(run.train[-1]["iteration"]),
        consumed_tokens=int(run.column("consumed_tokens")[-1]),
        valid_loss=valid_loss,
        valid_loss_change=None if valid_loss is None or baseline_loss is None else valid_loss - baseline_loss,
        tokens_per_s=tokens_per_s(run),
        model_tflops_per_gpu=float(np.median(steady(run.column("model_tflops_per_gpu")))) if has_tflops else None,
        mean_keep_prob=float(steady(run.column("mean_keep_prob")).mean()),
        kept_fraction=_kept_fraction(run),
        ideal_gain=ideal,
        realised_gain=realised,
        gain_ratio=realised / ideal if ideal and realised is not None else None,
        train_time_s=float(run.column("step_time_s").sum()),
    )


def _gains(run: RunData, baseline: RunData) -> tuple[float | None, float | None]:
    """Ideal and realised gain of `run` over `baseline`; None for another model, whose tokens cost something else."""
    if run.config.model != baseline.config.model:
        return None, None
    realised = tokens_per_s(run) / tokens_per_s(baseline) - 1
    phi, baseline_phi = _layers_share(run), _layers_share(baseline)
    if phi is None or baseline_phi is None:
        return None, realised
    ideal = ideal_speedup(phi, _kept_fraction(run)) / ideal_speedup(baseline_phi, _kept_fraction(baseline)) - 1
    return ideal, realised


def _layers_share(run: RunData) -> float | None:
    """phi of equations.md section 7; None where the run's tokenizer, which gives the vocabulary, is not found."""
    try:
        vocab_size = load_tokenizer(run.config.data.tokenizer).vocab_size
    except ValueError:
        return None
    recompute = run.config.training.recompute_granularity == "full"
    return layer_share(run.config.model, padded_vocab_size(vocab_size, run.config), recompute=recompute)


def _kept_fraction(run: RunData) -> float:
    return float(steady(run.column("kept_fraction")).mean())


def _last_valid_loss(run: RunData) -> float | None:
    return float(run.valid_column("valid_loss")[-1]) if run.valid else None


def _differences(run: RunData, baseline: RunData) -> list[str]:
    """Footnotes on whatever beside dropping tells a run from the baseline."""
    notes = []
    if run.config.model != baseline.config.model:
        notes.append(f"{run.label} is another model than {baseline.label}: no gains are given.")
    ours, theirs = dataclasses.asdict(run.config), dataclasses.asdict(baseline.config)
    differing = [
        f"{section}.{key}"
        for section in _COMPARED_SECTIONS
        for key, value in ours[section].items()
        if value != theirs[section][key]
    ]
    if differing:
        notes.append(f"{run.label} differs from {baseline.label} beside dropping, in {', '.join(differing)}.")
    if run.train[-1]["iteration"] != baseline.train[-1]["iteration"]:
        last, other = run.train[-1]["iteration"], baseline.train[-1]["iteration"]
        notes.append(
            f"{run.label} stands at iteration {last}, {baseline.label} at {other}: their losses do not compare."
        )
    return notes
