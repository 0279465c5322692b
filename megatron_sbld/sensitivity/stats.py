"""Standard errors of loss gaps, over the iterations of a run and over seeds, and agreement of rankings.

Pure functions of arrays. Losses of neighbouring iterations share weights and, for a gap, recent drop decisions, so
their differences are autocorrelated: the standard error of independent values would be too small.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sbld.checks import check_integer

WINDOW_FRACTION = 0.2
MIN_WINDOW = 10
_MAX_AUTOCORRELATION = 0.97  # Andrews and Monahan's bound: beyond it the estimate divides by almost nothing


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    stderr: float


def window_length(iterations: int, window: int | None = None) -> int:
    """Iterations at the end of a run that a gap is averaged over: those asked for, or the last fifth, at least 10.

    Never more than there are. Raises ValueError for fewer than 2, which have no standard error.

    >>> window_length(500), window_length(30), window_length(8)
    (100, 10, 8)
    """
    check_integer("iterations", iterations, 2)
    if window is not None:
        return check_integer("window", window, 2, iterations)
    return min(iterations, max(MIN_WINDOW, math.ceil(WINDOW_FRACTION * iterations)))


def mean_of_series(values: ArrayLike) -> Estimate:
    """Mean of a stationary series [n] of consecutive values, with a standard error that allows for autocorrelation.

    The long-run variance is Andrews and Monahan's (Econometrica 1992): the series is prewhitened by an AR(1), the
    residuals' variance estimated by Newey and West's kernel with Andrews's (1991) automatic bandwidth, and coloured
    again. The AR(1) coefficient is corrected for its bias in short series (Kendall 1954) and not taken as negative, so
    the result is never much below the standard error of independent values. At n below about 20 / (1 -
    autocorrelation) it is still too small (tests/sensitivity/test_stats.py has the coverage).

    Raises ValueError for fewer than 2 values, or values that are not finite.
    """
    series = _checked_series(values)
    size = len(series)
    centred = series - series.mean()
    independent = float(centred @ centred) / (size - 1)
    if independent == 0.0:
        return Estimate(float(series.mean()), 0.0)
    raw = _autocorrelation(centred)
    rho = min(max(raw + (1.0 + 3.0 * raw) / size, 0.0), _MAX_AUTOCORRELATION)
    residuals = centred[1:] - rho * centred[:-1]
    long_run = _newey_west(residuals - residuals.mean()) / (1.0 - rho) ** 2 if size > 2 else 0.0
    return Estimate(float(series.mean()), math.sqrt(max(long_run, independent) / size))


def mean_of_batches(values: ArrayLike) -> Estimate:
    """Mean of independent values [n], with its standard error. Raises ValueError as `mean_of_series` does."""
    series = _checked_series(values)
    return Estimate(float(series.mean()), float(series.std(ddof=1)) / math.sqrt(len(series)))


def combine_seeds(estimates: list[Estimate]) -> Estimate:
    """Mean over seeds. Its standard error is the larger of two: that which follows from each run's own, and that of the
    spread over seeds (with 2 or more). The first misses what a seed changes, the second is itself uncertain for few
    seeds and may come out small by chance.
    """
    means = np.array([estimate.mean for estimate in estimates])
    within = math.sqrt(sum(estimate.stderr**2 for estimate in estimates)) / len(estimates)
    spread = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Estimate(float(means.mean()), max(within, spread))


def rank_correlations(reference: ArrayLike, other: ArrayLike) -> tuple[float, float]:
    """Spearman's and Kendall's (tau-b) correlation of two lists of gaps, [L] each; nan where one is constant.

    Raises ValueError unless both have the same length of at least 2.
    """
    first, second = np.asarray(reference, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise ValueError(f"gaps of shapes {first.shape} and {second.shape} cannot be ranked against each other")
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan, math.nan
    from scipy import stats  # takes a second to import, which everything else here can do without

    return float(stats.spearmanr(first, second).statistic), float(stats.kendalltau(first, second).statistic)


def _checked_series(values: ArrayLike) -> NDArray[np.float64]:
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or len(series) < 2:
        raise ValueError(f"a standard error needs at least 2 values, got an array of shape {series.shape}")
    if not np.isfinite(series).all():
        raise ValueError("a series with values that are not finite has no standard error")
    return series


def _autocorrelation(centred: NDArray[np.float64]) -> float:
    """Of neighbouring values, in [-1, 1]; 0 for a constant series."""
    total = float(centred @ centred)
    return float(centred[1:] @ centred[:-1]) / total if total > 0 else 0.0


def _newey_west(centred: NDArray[np.float64]) -> float:
    """Long-run variance with Bartlett's kernel, its bandwidth by Andrews's AR(1) rule (1991, eq. 6.2 and 6.4)."""
    size = len(centred)
    rho = min(max(_autocorrelation(centred), -_MAX_AUTOCORRELATION), _MAX_AUTOCORRELATION)
    alpha = 4.0 * rho**2 / ((1.0 - rho) ** 2 * (1.0 + rho) ** 2)
    bandwidth = 1.1447 * (alpha * size) ** (1.0 / 3.0)
    lags = min(int(bandwidth), size - 1)
    total = float(centred @ centred)
    for lag in range(1, lags + 1):
        total += 2.0 * (1.0 - lag / (bandwidth + 1.0)) * float(centred[lag:] @ centred[:-lag])
    return max(total, 0.0) / max(size - 1, 1)
