"""What a run's layer dropping will amount to, before it trains: theta, mean keep_prob and ideal gain, phase by phase.

theta is not the mean keep probability: sensitivities, lists and depth come between (docs/method.md sections 2 and 4).
Gains are docs/method.md section 7's: what a dropped layer would save if it cost nothing. What is realised is less.

Phases are equal fifths of the iterations before the recovery, and the recovery; of a run with stages they are its
stages (method/stages.py). A phase of up to 1,000 iterations is computed in full, a longer one from 1,000 of its
iterations at equal distances. Every iteration counts alike: with
training.rampup_batch_size the early ones, whose batches are smaller, cost less than that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sbld.config.flops import ideal_speedup
from megatron_sbld.method.policy import Policy
from megatron_sbld.method.schedule import PWEGD
from megatron_sbld.method.work import Work

PARTS = 5
MAX_SAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Iterations `first` to `last` of a run, both included."""

    name: str
    first: int
    last: int
    theta_low: float | None
    """Lowest theta(t); None in the recovery, which ignores theta, and for policies without it."""
    theta_high: float | None
    begun_layers: int | None
    """How many layers have begun by its end; None without stages."""
    mean_keep_prob: float
    """Over layers and iterations."""
    tokens: tuple[int, int] | None
    """How many tokens of a sample the layers that drop tokens run, fewest and most; None unless some do."""
    mean_flops: float
    """Share of the layers' FLOPs, over layers and iterations: mean_keep_prob unless tokens are dropped."""
    ideal_gain: float | None
    """Ideal speed-up over the undropped model, less 1; None where the layers' share of an iteration is not known."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Phases in order, which make up the run; the one iteration of PWEGD's peak beside them; and the whole run."""

    phases: list[Phase]
    peak: Phase | None
    """None unless theta has a peak before the recovery."""
    total: Phase
    time_saved: float | None
    """Ideal share of the undropped run's time that is saved."""


def forecast(policy: Policy, train_iters: int, phi: float | None, work: Work | None = None) -> Forecast:
    """The forecast for a run of T = train_iters iterations.

    phi: the layers' share of an iteration (flops.layer_share), or None if it is not known.
    work: of the policy, where tokens are dropped too.
    """
    work = work or Work(policy)
    last_dropping = int(min(policy.first_recovery_iteration - 1, train_iters))
    phases = [_phase(work, name, first, last, phi) for name, first, last in _parts(policy, last_dropping)]
    if last_dropping < train_iters:
        phases.append(_recovery(work, last_dropping + 1, train_iters, phi))
    peak_iteration = _peak_iteration(policy, last_dropping)
    peak = None if peak_iteration is None else _phase(work, "peak", peak_iteration, peak_iteration, phi)
    parts = [*phases, *([] if peak is None else [peak])]
    lows = [part.theta_low for part in parts if part.theta_low is not None]
    highs = [part.theta_high for part in parts if part.theta_high is not None]
    mean = math.fsum(phase.mean_keep_prob * (phase.last - phase.first + 1) for phase in phases) / train_iters
    flops = math.fsum(phase.mean_flops * (phase.last - phase.first + 1) for phase in phases) / train_iters
    total = Phase(
        name="whole run",
        first=1,
        last=train_iters,
        theta_low=min(lows, default=None),
        theta_high=max(highs, default=None),
        begun_layers=_begun(policy, train_iters),
        mean_keep_prob=mean,
        tokens=_tokens(work, [1, last_dropping, train_iters]),
        mean_flops=flops,
        ideal_gain=_ideal_gain(phi, flops),
    )
    time_saved = None if phi is None else phi * (1.0 - flops)
    return Forecast(phases=phases, peak=peak, total=total, time_saved=time_saved)


def spread_iterations(first: int, last: int, count: int) -> NDArray[np.int64]:
    """All iterations from `first` to `last`, or of more than `count` the middles of `count` equal stretches."""
    length = last - first + 1
    if length <= count:
        return np.arange(first, last + 1)
    return first + ((np.arange(count) + 0.5) * length / count).astype(np.int64)


def forecast_text(outlook: Forecast) -> str:
    """The forecast as a plain table of at most 80 columns."""
    rows = list(outlook.phases)
    if outlook.peak is not None:
        peak = outlook.peak.first
        rows.insert(sum(phase.first <= peak for phase in outlook.phases), outlook.peak)
    staged, has_theta = outlook.total.begun_layers is not None, outlook.total.theta_low is not None
    lines = [
        f"{'phase':<10}{'iterations':>19}"
        + (f"{'layers':>8}" if staged else "")
        + (f"{'theta':>{_theta_width(staged)}}" if has_theta else "")
        + (f"{'tokens':>14}" if outlook.total.tokens is not None else "")
        + f"{'mean keep_prob':>{16 if staged else 17}}{'ideal gain':>{12 if staged else 13}}"
    ]
    lines += [_text_row(row, has_theta) for row in [*rows, outlook.total]]
    if outlook.time_saved is not None:
        lines.append(
            f"time saved: {outlook.time_saved:.1%} of the undropped run's, if a dropped "
            + ("layer" if outlook.total.tokens is None else "token")
            + " cost nothing at all"
        )
    return "\n".join(lines)


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} - {high}"


def _theta_width(staged: bool) -> int:
    return 15 if staged else 16


def _text_row(phase: Phase, has_theta: bool) -> str:
    iterations = str(phase.first) if phase.first == phase.last else f"{phase.first} - {phase.last}"
    if phase.theta_low is None or phase.theta_high is None:
        theta = "-"
    else:
        low, high = f"{phase.theta_low:.3f}", f"{phase.theta_high:.3f}"
        theta = low if low == high else f"{low} - {high}"
    gain = "-" if phase.ideal_gain is None else f"{phase.ideal_gain:+.1%}"
    staged = phase.begun_layers is not None
    return (
        f"{phase.name:<10}{iterations:>19}"
        + (f"{phase.begun_layers:>8}" if staged else "")
        + (f"{theta:>{_theta_width(staged)}}" if has_theta else "")
        + ("" if phase.tokens is None else f"{_span(*phase.tokens):>14}")
        + f"{phase.mean_keep_prob:>{16 if staged else 17}.3f}{gain:>{12 if staged else 13}}"
    )


def _parts(policy: Policy, last_dropping: int) -> list[tuple[str, int, int]]:
    """Name, first and last iteration of each phase before the recovery."""
    stages = policy.stages
    if stages is None:
        equal = _equal_parts(last_dropping)
        return [(f"{number}/{len(equal)}", *part) for number, part in enumerate(equal, start=1)]
    ends = [*(min(end, last_dropping) for end in stages.ends[:-1]), last_dropping]
    parts = zip([1, *(end + 1 for end in ends)], ends, enumerate(stages.sets, start=1), strict=False)
    return [(f"stage {number}", first, last) for first, last, (number, _) in parts if first <= last]


def _equal_parts(length: int) -> list[tuple[int, int]]:
    """First and last iteration of PARTS parts of 1..length; of fewer where there are fewer iterations."""
    edges = np.unique(np.linspace(0, length, PARTS + 1).round().astype(int))
    return [(int(start) + 1, int(end)) for start, end in itertools.pairwise(edges)]


def _phase(work: Work, name: str, first: int, last: int, phi: float | None) -> Phase:
    policy = work.policy
    sampled = spread_iterations(first, last, MAX_SAMPLES).tolist()
    thetas = [policy.theta(iteration) for iteration in {first, *sampled, last}]
    mean = math.fsum(float(policy.keep_probs(iteration).mean()) for iteration in sampled) / len(sampled)
    flops = math.fsum(float(work.flops(iteration).mean()) for iteration in sampled) / len(sampled)
    return Phase(
        name=name,
        first=first,
        last=last,
        theta_low=min(thetas) if policy.uses_theta else None,
        theta_high=max(thetas) if policy.uses_theta else None,
        begun_layers=_begun(policy, last),
        mean_keep_prob=mean,
        tokens=_tokens(work, [first, *sampled, last]),
        mean_flops=flops,
        ideal_gain=_ideal_gain(phi, flops),
    )


def _tokens(work: Work, iterations: Iterable[int]) -> tuple[int, int] | None:
    counts = [count for iteration in iterations if (count := work.num_tokens(iteration)) is not None]
    return (min(counts), max(counts)) if counts else None


def _begun(policy: Policy, iteration: int) -> int | None:
    return None if policy.stages is None else len(policy.begun_layers(iteration))


def _recovery(work: Work, first: int, last: int, phi: float | None) -> Phase:
    return Phase(
        name="recovery",
        first=first,
        last=last,
        theta_low=None,
        theta_high=None,
        begun_layers=_begun(work.policy, last),
        mean_keep_prob=1.0,
        tokens=_tokens(work, [first, last]),
        mean_flops=1.0,
        ideal_gain=_ideal_gain(phi, 1.0),
    )


def _peak_iteration(policy: Policy, last_dropping: int) -> int | None:
    """The iteration of PWEGD's peak, if it has one within the part of the run that drops layers."""
    schedule = policy.schedule
    if not isinstance(schedule, PWEGD) or schedule.shape == 1.0 or schedule.eta == 0.0:
        return None
    peak = round(schedule.peak_iteration)
    return peak if 1 <= peak <= last_dropping else None


def _ideal_gain(phi: float | None, mean_keep_prob: float) -> float | None:
    # Rounding may take the mean of many probabilities of 1 above it.
    return None if phi is None else ideal_speedup(phi, min(mean_keep_prob, 1.0)) - 1.0
