"""A method's saving at a loss: 1 - C_method / C_undropped(loss), C_undropped from the frontier of undropped runs.

The frontier is monotone: log FLOPs over loss, by a monotone cubic (PCHIP) through runs of several lengths. Intervals
are 95 %, from a parametric bootstrap: each point's loss is drawn anew with the standard error of its mean, of which
the standard deviation between seeds is pooled over all points that have several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from benchmarks.study.rows import Point

DRAWS = 2000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """low, high: 95 %, None without seeds. is_bound: beyond the frontier, so `value` is a bound."""

    value: float
    low: float | None = None
    high: float | None = None
    is_bound: bool = False


def seed_deviation(points: Sequence[Point]) -> float | None:
    """Standard deviation of a loss between seeds, pooled; None as long as no point has two."""
    several = [np.array(point.losses) for point in points if len(point.losses) > 1]
    if not several:
        return None
    squares = sum(float(((losses - losses.mean()) ** 2).sum()) for losses in several)
    return math.sqrt(squares / sum(len(losses) - 1 for losses in several))


def flops_at(flops: Sequence[float], losses: Sequence[float] | Floats, loss: float) -> float:
    """FLOPs with which the frontier reaches a loss: 0 above all of it, infinity below.

    A point that is no better than a cheaper one is left out.
    """
    order = np.argsort(flops)
    log_flops, sorted_losses = np.log(np.asarray(flops, dtype=float)[order]), np.asarray(losses, dtype=float)[order]
    lowest = np.minimum.accumulate(sorted_losses)
    better = np.concatenate(([True], sorted_losses[1:] < lowest[:-1]))
    x, y = sorted_losses[better][::-1], log_flops[better][::-1]
    if loss > x[-1]:
        return 0.0
    if loss < x[0]:
        return math.inf
    return float(np.exp(y[0] if len(x) == 1 else PchipInterpolator(x, y)(loss)))


def saving(point: Point, frontier: Sequence[Point], deviation: float | None) -> Estimate | None:
    """Saving of a method's point; None where it is worse than every undropped run.

    Where it is better than all of them, the saving against the longest one is a bound; so are the ends of an interval.
    """
    flops = [one.flops for one in frontier]
    losses = [one.loss for one in frontier]
    if flops_at(flops, losses, point.loss) == 0.0:
        return None

    def value(frontier_losses: Floats, loss: float) -> float:
        return 1.0 - point.flops / _within(flops, flops_at(flops, frontier_losses, loss))

    return _estimate(value, frontier, point, deviation, is_bound=point.loss < min(losses))


def share_needed(method: Sequence[Point], undropped: Point, deviation: float | None) -> Estimate | None:
    """Share of an undropped run's FLOPs with which a method, by its own frontier, reaches that run's loss.

    None where no run of the method does. Where its cheapest one does already, that one's share is a bound.
    """
    flops = [point.flops for point in method]
    reached = flops_at(flops, [point.loss for point in method], undropped.loss) if method else math.inf
    if math.isinf(reached):
        return None

    def value(losses: Floats, loss: float) -> float:
        return _within(flops, flops_at(flops, losses, loss)) / undropped.flops

    return _estimate(value, method, undropped, deviation, is_bound=reached == 0.0)


def _within(flops: Sequence[float], value: float) -> float:
    return min(max(value, min(flops)), max(flops))


def _estimate(
    value: Callable[[Floats, float], float],
    frontier: Sequence[Point],
    single: Point,
    deviation: float | None,
    *,
    is_bound: bool,
) -> Estimate:
    """`value` of the losses of a frontier and of a single point, with its interval over seeds."""
    losses = np.array([one.loss for one in frontier])
    centre = value(losses, single.loss)
    if deviation is None:
        return Estimate(centre, is_bound=is_bound)
    rng = np.random.default_rng(0)
    errors = deviation / np.sqrt([len(one.losses) for one in frontier])
    own = deviation / math.sqrt(len(single.losses))
    drawn = [value(rng.normal(losses, errors), float(rng.normal(single.loss, own))) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(centre, float(low), float(high), is_bound)
