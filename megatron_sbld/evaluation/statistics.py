"""Standard errors of perplexities, and of ratios over clusters of tokens."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def exp_with_stderr(mean: float, stderr: float | None) -> tuple[float, float | None]:
    """exp(mean), and its standard error by the delta method: exp(mean) * stderr. Infinite rather than an overflow."""
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    return value, None if stderr is None else value * stderr


def ratio_with_stderr(totals: FloatArray, sizes: FloatArray) -> tuple[float, float | None]:
    """sum(totals) / sum(sizes), and its standard error over clusters; None for a single one.

    The linearised variance of a ratio estimator (Cochran, Sampling Techniques, 6.4): with r the ratio and n clusters,
    n / (n - 1) * sum((total - r * size)^2) / sum(sizes)^2.

    Args:
        totals: one of each cluster, [n].
        sizes: the same, [n].
    """
    n = len(totals)
    ratio = float(totals.sum() / sizes.sum())
    if n < 2:
        return ratio, None
    residuals = totals - ratio * sizes
    return ratio, float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / sizes.sum())
