"""Statistics over seeds: mean and standard error, paired and unpaired differences, and the time to reach a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and its standard error; None where there is only one value."""

    mean: float
    stderr: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, and standard error s / sqrt(n) with the sample standard deviation s (ddof 1). Needs a value."""
    array = np.asarray(values, dtype=np.float64)
    stderr = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else None
    return Estimate(float(array.mean()), stderr)


def paired_seeds(ours: Sequence[int], theirs: Sequence[int]) -> list[int] | None:
    """Seeds over which two groups are compared pair by pair; None where they cannot be.

    Those that both groups have, if they are at least two, or all of ours. None if a seed occurs twice in a group, where
    it is not known what belongs together.
    """
    common = sorted(set(ours) & set(theirs))
    if len(set(ours)) < len(ours) or len(set(theirs)) < len(theirs):
        return None
    return common if common and (len(common) > 1 or len(ours) == 1) else None


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Mean of the differences, and the standard error of the differences."""
    return estimate(np.subtract(ours, theirs).tolist())


def unpaired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Difference of the means, and the root of the sum of their squared standard errors; None if either has none."""
    a, b = estimate(ours), estimate(theirs)
    stderr = None if a.stderr is None or b.stderr is None else math.hypot(a.stderr, b.stderr)
    return Estimate(a.mean - b.mean, stderr)


def difference(
    our_seeds: Sequence[int],
    ours: Sequence[float],
    their_seeds: Sequence[int],
    theirs: Sequence[float],
    paired: Sequence[int] | None,
) -> Estimate:
    """Ours less theirs, pair by pair over the seeds `paired`, or of the means where they are None."""
    if paired is None:
        return unpaired_difference(ours, theirs)
    of_ours, of_theirs = dict(zip(our_seeds, ours, strict=True)), dict(zip(their_seeds, theirs, strict=True))
    return paired_difference([of_ours[seed] for seed in paired], [of_theirs[seed] for seed in paired])


def time_to_loss(times: FloatArray, losses: FloatArray, target: float) -> float | None:
    """When losses, known at `times`, first fall to `target`, interpolated linearly; None if they do not.

    Losses that start below the target give the first time. From a loss that is not finite nothing is interpolated.
    """
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return None
    after = int(reached[0])
    before = after - 1
    if after == 0 or not math.isfinite(losses[before]):
        return float(times[after])
    share = (losses[before] - target) / (losses[before] - losses[after])
    return float(times[before] + share * (times[after] - times[before]))
