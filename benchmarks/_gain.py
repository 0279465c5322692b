"""Realised over ideal gain, from block times and layer times: arithmetic alone, without torch or Megatron.

Ideal gain = T / (T - time of the dropped layers) (equations.md section 7 states it by FLOPs; here it is by measured
times, both of the same iterations: a machine that was slower while layers were timed than while blocks ran changes
neither side's share). What a dropped layer saves is counted on the critical path: the time of the forward and backward
passes is that of the 1F1B schedule with every stage's measured durations, and a drop saves the difference that it makes
to it. With one stage that is the dropped layers' time itself, times the microbatches. Transfers between stages count as
free, and what follows the last backward pass (gradient reduction, optimizer step) is saved by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from megatron_sbld.pipeline import Floats, schedule_time


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
    kept: NDArray[np.bool_]  # [R, iterations, L], the decisions in the dropped blocks


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
    realised: Interval
    ratio: Interval | None
    """(realised - 1) / (ideal - 1); None where nothing was dropped."""


def saved_time(times: PassTimes, kept: NDArray[np.bool_], num_microbatches: int) -> Floats:
    """Seconds by which the schedule shortens when the layers that are not kept take no time.

    times: of the undropped model. kept: [..., L], the same in all microbatches; its leading dimensions and those of
    `times` broadcast. Layers are spread evenly over the stages, in order. Returns [...].
    """
    forward = times.stage_forward - _dropped_time(times.layer_forward, kept, times.stage_forward.shape[-1])
    backward = times.stage_backward - _dropped_time(times.layer_backward, kept, times.stage_backward.shape[-1])
    undropped = schedule_time(times.stage_forward, times.stage_backward, num_microbatches)
    return undropped - schedule_time(forward, backward, num_microbatches)


def _dropped_time(layer_times: Floats, kept: NDArray[np.bool_], num_stages: int) -> Floats:
    """Summed times of each stage's dropped layers, [..., p]."""
    dropped = np.where(kept, 0.0, layer_times)
    return dropped.reshape(*dropped.shape[:-1], num_stages, -1).sum(axis=-1)


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
    rounds = len(pairs.undropped)
    resampled = np.random.default_rng(seed).integers(rounds, size=(samples, rounds))
    realised, ideal = _gains(pairs, times, num_microbatches, np.arange(rounds)[None])
    realised_samples, ideal_samples = _gains(pairs, times, num_microbatches, resampled)
    ratio = None
    if not pairs.kept.all():
        informative = ideal_samples != 1  # rounds drawn in which nothing was dropped say nothing about the ratio
        samples_of_ratio = (realised_samples[informative] - 1) / (ideal_samples[informative] - 1)
        ratio = _interval(float((realised[0] - 1) / (ideal[0] - 1)), samples_of_ratio)
    return Gain(
        kept_fraction=float(pairs.kept.mean()),
        ideal=float(ideal[0]),
        realised=_interval(float(realised[0]), realised_samples),
        ratio=ratio,
    )


def _gains(pairs: Pairs, times: PassTimes, num_microbatches: int, rounds: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Realised and ideal gain over each sample of rounds, [samples, R] -> two of [samples]."""
    undropped = pairs.undropped[rounds].sum(axis=-1)
    mean = times.mean_over(rounds)
    each = PassTimes(*(getattr(mean, field.name)[:, None, None] for field in fields(mean)))  # for [samples, R, n, L]
    saved = saved_time(each, pairs.kept[rounds], num_microbatches).mean(axis=(-1, -2))  # of an iteration
    iteration = mean.iteration[:, 0]
    return undropped / pairs.dropped[rounds].sum(axis=-1), iteration / (iteration - saved)


def _interval(value: float, samples: Floats) -> Interval:
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(value, float(low), float(high))
