"""When a layer's run may end early: its rank is settled, and it is one that no list depends on. Pure functions.

The losses of a layer's run are compared with those of finished runs over the same iterations, so the baseline drops
out and the difference is as exact as it can be. What this saves is paid for with the assumption that layers keep, to
the end of the runs, the order that they have at this point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sbld.sensitivity.stats import Estimate, mean_of_series

FIRST_LOOK = 0.25
"""Share of a run's iterations before which no run ends: warm-up tells little of the end."""
LOOKS = 20
"""Looks in a whole run: often enough to save most of what can be saved, seldom enough to be no search for a fluke."""
SETTLED_STDERRS = 3.0
"""A difference of this many standard errors counts as an order, if the window is long; `critical_stderrs` says how many
in a short one. More than the 2 of the lists, because each run is looked at several times and compared with every other.
"""


def critical_stderrs(window: int) -> float:
    """Standard errors that are as rare, when they come from `window` values themselves, as SETTLED_STDERRS of known
    ones are: Student's t.

    >>> round(critical_stderrs(4), 1), round(critical_stderrs(100), 1)
    (9.2, 3.1)
    """
    from scipy import stats  # takes a second to import, which everything else here can do without

    return float(stats.t.isf(stats.norm.sf(SETTLED_STDERRS), window - 1))


class Neighbours(NamedTuple):
    """Finished layers, 1-based, whose gaps are the next lower and the next higher."""

    lower: int
    higher: int


def is_look(iterations_done: int, iterations: int, window: int) -> bool:
    """Whether the rank is looked at after this many of a run's iterations."""
    interval = max(1, iterations // LOOKS)
    earliest = max(window, FIRST_LOOK * iterations)
    return iterations_done < iterations and iterations_done >= earliest and iterations_done % interval == 0


def settled_neighbours(
    losses: ArrayLike, finished: Mapping[int, ArrayLike], window: int, *, num_allow: int, num_block: int
) -> Neighbours | None:
    """The neighbours of a layer whose rank is settled and interior, or None.

    losses: of the layer's run so far, [t].  finished: of complete runs by layer, [N] each.
    window: iterations that a difference is averaged over.
    num_allow, num_block: layers that the lists may take. Interior is a rank with at least as many finished layers below
        and above: whatever the layers that are still to come, this one is in no list.
    """
    present = np.asarray(losses, dtype=np.float64)
    differences: dict[int, Estimate] = {
        layer: mean_of_series(_last(present, len(present), window) - _last(theirs, len(present), window))
        for layer, theirs in finished.items()
    }
    critical = critical_stderrs(window)
    if any(abs(found.mean) <= critical * found.stderr for found in differences.values()):
        return None
    lower = {layer: found.mean for layer, found in differences.items() if found.mean > 0}
    higher = {layer: found.mean for layer, found in differences.items() if found.mean < 0}
    if len(lower) < max(num_allow, 1) or len(higher) < max(num_block, 1):
        return None
    return Neighbours(min(lower, key=lambda layer: lower[layer]), max(higher, key=lambda layer: higher[layer]))


def interpolated_gap(
    losses: ArrayLike, baseline: ArrayLike, lower: ArrayLike, higher: ArrayLike, window: int
) -> Estimate:
    """The final gap of a run that ended early: where it was between its neighbours, between their final gaps.

    losses: of the run, [t].  baseline, lower, higher: of complete runs, [N]; lower and higher of its neighbours.
    window: iterations at the end, and before t, that gaps are averaged over.
    The standard error is the largest of the neighbours' own and the run's own, scaled likewise.
    """
    present, base = np.asarray(losses, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    then = len(present)
    own = mean_of_series(_last(present, then, window) - _last(base, then, window))
    low_then, high_then = (
        float(np.mean(_last(run, then, window) - _last(base, then, window))) for run in (lower, higher)
    )
    low, high = (
        mean_of_series(_last(run, len(base), window) - _last(base, len(base), window)) for run in (lower, higher)
    )
    scale = (high.mean - low.mean) / (high_then - low_then)
    gap = low.mean + scale * (own.mean - low_then)
    return Estimate(gap, max(low.stderr, high.stderr, abs(scale) * own.stderr))


def spread_order(layers: Sequence[int]) -> list[int]:
    """The first, the last, the middle, the quarters, ...: so that early runs span the ranks of the later ones.

    >>> spread_order([1, 2, 3, 4, 5, 6, 7, 8])
    [1, 8, 4, 2, 6, 3, 5, 7]
    """
    order, gaps = list(dict.fromkeys([*layers[:1], *layers[-1:]])), [(0, len(layers) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if high - low > 1:
            order.append(layers[middle])
            gaps += [(low, middle), (middle, high)]
    return order


def _last(losses: ArrayLike, end: int, window: int) -> NDArray[np.float64]:
    return np.asarray(losses, dtype=np.float64)[end - window : end]
