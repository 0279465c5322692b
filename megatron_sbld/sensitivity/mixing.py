"""How estimated gaps (dynamic.py) change the base sensitivity, which stays their prior (docs/method.md 3).

The base gap is what training without the layer costs, the estimated gap what leaving it out costs now: two quantities,
of which only the order and the proportions can be compared. So estimates are shifted and scaled to the base list's mean
and spread, and no estimate acts before it is significant.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sbld.sensitivity.dynamic import GapEstimate
from megatron_sbld.sensitivity.lists import SIGNIFICANT_STDERRS

Floats = NDArray[np.float64]

_SPREAD_STDS = 3.0
"""Standard deviations by which Cochran's Q must exceed its mean: by chance it does once in 160 updates (24 layers)."""


def mixed_sensitivity(
    base: ArrayLike, estimate: GapEstimate, significant_stderrs: float = SIGNIFICANT_STDERRS
) -> Floats:
    """S in force, in [0, 1], [L]: base, moved where the estimate differs from it by more than its noise.

    base: the base sensitivity, in [0, 1], [L].  significant_stderrs: standard errors that a difference must exceed.

    Among the observed layers, with mean and spread of the estimates freed of their noise (random-effects model, by
    DerSimonian and Laird 1986): target = mean S + (gap - mean gap) spread of S / spread of the gaps. A layer moves
    towards its target by what the difference has beyond significant_stderrs. Nothing moves if the estimates do not
    differ from one another (Cochran's Q is not beyond its mean by 3 of its standard deviations), if they are of fewer
    than three layers, or if the base list has no spread over these layers.
    """
    result = np.array(base, dtype=np.float64)
    layers = np.flatnonzero(estimate.observed)
    if len(layers) < 3:  # of two, mean and spread leave nothing but the order
        return result
    gap, variance = estimate.gap[layers], _variance_about_the_mean(estimate.covariance[np.ix_(layers, layers)])
    precision = 1.0 / variance
    freedom = len(layers) - 1
    q = float(precision @ (gap - np.average(gap, weights=precision)) ** 2)
    if q <= freedom + _SPREAD_STDS * np.sqrt(2.0 * freedom):
        return result
    spread2 = (q - freedom) / (precision.sum() - (precision @ precision) / precision.sum())
    weights = 1.0 / (variance + spread2)
    mean_base = np.average(result[layers], weights=weights)
    scale = np.sqrt(np.average((result[layers] - mean_base) ** 2, weights=weights) / spread2)
    target = mean_base + scale * (gap - np.average(gap, weights=weights))
    difference = target - result[layers]
    beyond = np.maximum(np.abs(difference) - significant_stderrs * scale * np.sqrt(variance), 0.0)
    result[layers] = np.clip(result[layers] + np.sign(difference) * beyond, 0.0, 1.0)
    return result


def released_layers(base: ArrayLike, mixed: ArrayLike, block_layers: Iterable[int]) -> tuple[int, ...]:
    """Block layers (1-based) that have become less sensitive than some layer outside of the list.

    base: the base sensitivity, [L].  mixed: that of `mixed_sensitivity`, [L]: a Block layer must have moved down.
    """
    before, now, block = np.asarray(base), np.asarray(mixed), sorted(block_layers)
    highest_outside = np.delete(now, np.array(block, dtype=int) - 1).max()
    return tuple(layer for layer in block if now[layer - 1] < min(before[layer - 1], highest_outside))


def _variance_about_the_mean(covariance: Floats) -> Floats:
    """Variances of the gaps' errors less their mean, [n]: what all gaps have in common (the balanced sampler hardly
    observes it) moves no layer."""
    centred = covariance - covariance.mean(axis=0)
    return np.maximum(np.diag(centred - centred.mean(axis=1, keepdims=True)), np.finfo(np.float64).tiny)
