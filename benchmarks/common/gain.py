"""Realised over ideal gain, from block times and layer times: arithmetic alone, without torch or Megatron.

Ideal gain = T / (T - time of the dropped layers) (docs/method.md section 7 states it by FLOPs; here it is by measured
times, both of the same iterations: a machine that was slower while layers were timed than while blocks ran changes
neither side's share). What a dropped layer saves is counted on the critical path: the time of the forward and backward
passes is that of the 1F1B schedule with every stage's measured durations, and a drop saves the difference that it makes
to it. With one stage that is the dropped layers' time itself, times the microbatches. Transfers between stages count as
free, and what follows the last backward pass (gradient reduction, optimizer step) is saved by nobody.

With several stages there are two ideals. That of the actual decisions is what they save on the critical path: a stage
that happens to keep more layers than the others sets the pace, and an implementation can do nothing about it. That of
an even spread is what dropping the same share of the layers' time on every stage would save: what the decisions could
have saved at best, and so what a sampler is judged by.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from megatron_sbld.layout.pipeline import Floats, schedule_time

REALISED, IDEAL, EVEN = range(3)


@dataclass(frozen=True)
class PassTimes:
    """Seconds of one microbatch's passes in the undropped model, L layers on p stages.

    Each array may have leading dimensions (rounds, bootstrap samples), the same for all.
    """

    layer_forward: Floats  # [..., L]
    layer_backward: Floats  # [..., L], recomputation included
    stage_forward: Floats  # [..., p], the layers of the stage included
    stage_backward: Floats  # [..., p]
    iteration: Floats  # [..., 1], all of the iteration in which the passes were timed

    def mean_over(self, rounds: NDArray[np.int64]) -> PassTimes:
        """The mean over rounds [..., n] of times that have one leading dimension, the rounds'."""
        return PassTimes(*(getattr(self, field.name)[rounds].mean(axis=-2) for field in fields(self)))


@dataclass(frozen=True)
class Pairs:
    """Blocks of the same number of iterations, one undropped and one dropped in each of R rounds."""

    undropped: Floats  # [R] seconds of a block
    dropped: Floats  # [R]
    kept: NDArray[np.bool_] | Floats  # [R, iterations, L], the decisions in the dropped blocks, or shares of layers


@dataclass(frozen=True)
class Interval:
    """An estimate and the limits of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gain:
    """What dropping gave at one keep probability. Gains are ratios of times: 1.25 is 25 % more iterations an hour."""

    kept_fraction: float
    ideal: float
    """Of the actual decisions, on the critical path."""
    realised: Interval
    ratio: Interval | None
    """(realised - 1) / (ideal - 1); None where nothing was dropped."""
    even_ideal: float
    """If every stage had dropped the same share of its layers' time; with one stage the same as `ideal`."""
    even_ratio: Interval | None
    """(realised - 1) / (even_ideal - 1)."""
    even_share: Interval | None
    """(ideal - 1) / (even_ideal - 1): what of the evenly spread gain the decisions leave on the critical path."""


def saved_time(times: PassTimes, kept: NDArray[np.bool_] | Floats, num_microbatches: int) -> Floats:
    """Seconds by which the schedule shortens when the layers that are not kept take no time.

    times: of the undropped model. kept: [..., L], the same in all microbatches; its leading dimensions and those of
    `times` broadcast. Layers are spread evenly over the stages, in order. Returns [...].
    """
    num_stages = times.stage_forward.shape[-1]
    left_out = 1.0 - np.asarray(kept, dtype=np.float64)
    forward = by_stage(left_out * times.layer_forward, num_stages)
    backward = by_stage(left_out * times.layer_backward, num_stages)
    return _shortening(times, forward, backward, num_microbatches)


def evenly_saved_time(times: PassTimes, kept: NDArray[np.bool_] | Floats, num_microbatches: int) -> Floats:
    """The same if every stage dropped that share of its layers' time which `kept` drops of the whole model's."""
    num_stages = times.stage_forward.shape[-1]
    dropped = []
    for layer_times in (times.layer_forward, times.layer_backward):
        left_out = 1.0 - np.asarray(kept, dtype=np.float64)
        share = (left_out * layer_times).sum(axis=-1) / layer_times.sum(axis=-1)
        dropped.append(share[..., None] * by_stage(layer_times, num_stages))
    return _shortening(times, *dropped, num_microbatches)


def by_stage(layer_times: Floats, num_stages: int) -> Floats:
    """Times of layers summed over each stage's, [..., L] -> [..., p]."""
    return layer_times.reshape(*layer_times.shape[:-1], num_stages, -1).sum(axis=-1)


def _shortening(times: PassTimes, forward: Floats, backward: Floats, num_microbatches: int) -> Floats:
    """Seconds by which the schedule shortens when each stage's passes do by these, [..., p] each."""
    undropped = schedule_time(times.stage_forward, times.stage_backward, num_microbatches)
    return undropped - schedule_time(times.stage_forward - forward, times.stage_backward - backward, num_microbatches)


def measure_gain(pairs: Pairs, times: PassTimes, num_microbatches: int, *, samples: int = 2000, seed: int = 0) -> Gain:
    """Gains over all rounds, with confidence intervals by bootstrap over rounds.

    A round's pair and its layer times are drawn together, so the intervals cover the noise of both. Sums over rounds
    are compared, not means of quotients, which noise would bias.

    Args:
        pairs: R rounds of one keep probability.
        times: of the same rounds, with leading dimension R.
        num_microbatches: of an iteration.
        samples, seed: of the bootstrap.
    """
    value, drawn = _bootstrap(pairs, times, num_microbatches, samples, seed)

    def ratio(numerator: int, denominator: int) -> Interval | None:
        if (pairs.kept == 1).all():
            return None
        informative = drawn[denominator] != 1  # rounds drawn in which nothing was dropped say nothing about the ratio
        values = (drawn[numerator][informative] - 1) / (drawn[denominator][informative] - 1)
        return interval(float((value[numerator] - 1) / (value[denominator] - 1)), values)

    return Gain(
        kept_fraction=float(pairs.kept.mean()),
        ideal=float(value[IDEAL]),
        realised=interval(float(value[REALISED]), drawn[REALISED]),
        ratio=ratio(REALISED, IDEAL),
        even_ideal=float(value[EVEN]),
        even_ratio=ratio(REALISED, EVEN),
        even_share=ratio(IDEAL, EVEN),
    )


def even_ratio_difference(
    pairs: Pairs, others: Pairs, times: PassTimes, num_microbatches: int, *, samples: int = 2000, seed: int = 0
) -> tuple[Interval, Interval]:
    """How much higher realised / even is for `pairs` than for `others` of the same rounds, and critical path / even.

    Rounds are drawn together, so that what slowed both in a round does not widen the interval. Both must drop layers.
    """
    assert not (pairs.kept == 1).all(), "without a drop there is no ratio"
    assert not (others.kept == 1).all(), "without a drop there is no ratio"
    (value, drawn), (other_value, other_drawn) = (
        _bootstrap(measured, times, num_microbatches, samples, seed) for measured in (pairs, others)
    )
    informative = (drawn[EVEN] != 1) & (other_drawn[EVEN] != 1)
    differences = []
    for kind in (REALISED, IDEAL):
        point, spread = (
            (gains[kind] - 1) / (gains[EVEN] - 1) - (other[kind] - 1) / (other[EVEN] - 1)
            for gains, other in ((value, other_value), (drawn[:, informative], other_drawn[:, informative]))
        )
        differences.append(interval(float(point), spread))
    return differences[0], differences[1]


def _bootstrap(pairs: Pairs, times: PassTimes, num_microbatches: int, samples: int, seed: int) -> tuple[Floats, Floats]:
    """Gains (REALISED, IDEAL, EVEN) over all rounds, [3], and over samples of them, [3, samples]."""
    rounds = len(pairs.undropped)
    resampled = np.random.default_rng(seed).integers(rounds, size=(samples, rounds))
    value = _gains(pairs, times, num_microbatches, np.arange(rounds)[None])
    return value[:, 0], _gains(pairs, times, num_microbatches, resampled)


def _gains(pairs: Pairs, times: PassTimes, num_microbatches: int, rounds: NDArray[np.int64]) -> Floats:
    """Realised, ideal and evenly spread ideal gain over each sample of rounds, [samples, R] -> [3, samples]."""
    undropped = pairs.undropped[rounds].sum(axis=-1)
    mean = times.mean_over(rounds)
    each = PassTimes(*(getattr(mean, field.name)[:, None, None] for field in fields(mean)))  # for [samples, R, n, L]
    iteration, kept = mean.iteration[:, 0], pairs.kept[rounds]
    saved = saved_time(each, kept, num_microbatches).mean(axis=(-1, -2))  # of an iteration
    evenly = saved
    if each.stage_forward.shape[-1] > 1:
        evenly = evenly_saved_time(each, kept, num_microbatches).mean(axis=(-1, -2))
    realised = undropped / pairs.dropped[rounds].sum(axis=-1)
    return np.stack([realised, iteration / (iteration - saved), iteration / (iteration - evenly)])


def time_ratio(numerator: Floats, denominator: Floats, *, seed: int, samples: int = 2000) -> Interval:
    """Of the sums of times of the same rounds, [R] each; the rounds are drawn together."""
    rounds = np.random.default_rng(seed).integers(len(numerator), size=(samples, len(numerator)))
    drawn = numerator[rounds].sum(axis=1) / denominator[rounds].sum(axis=1)
    return interval(float(numerator.sum() / denominator.sum()), drawn)


def interval(value: float, samples: Floats) -> Interval:
    """The value, and the 95 % interval of its bootstrap samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(value, float(low), float(high))
