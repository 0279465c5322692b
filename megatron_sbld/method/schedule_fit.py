"""Fits PWEGD's shape, and alternatives, to the loss gap between a run with layers dropped and its baseline.

docs/method.md section 3; SBLD, "Variance-Based Scheduler", Figures 4 and 5. Knows nothing of runs and files.

Parameters are least squares on the smoothed trace, floored at 0, of the shape smoothed alike, because a running mean
flattens a fast rise. RMSE and R^2 are errors of that. AIC is computed from the gap of every single iteration instead:
smoothing makes neighbours alike, and AIC, which counts them as independent, would be too sure of its choice. Where the
gaps themselves drift together, it still is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares
from scipy.special import ndtri, xlogy

from megatron_sbld.checks import check_integer, check_number
from megatron_sbld.method.schedule import amplitude_for_peak, pwegd_density

FloatArray = NDArray[np.float64]

MIN_ITERATIONS = 50
MAX_SHAPE = 30.0
_FALSE_ALARM = 0.01  # probability of taking noise for a gap, over the whole trace
_FALL = 0.2  # share of its height that a trace must have fallen by at its end, or a fit would guess the rest
_EXPONENTIAL_SHAPE = 1.05  # below it the peak is within 2.5 % of b from epsilon: a rise that is not seen
_FITTED_POINTS = 4000  # longer traces are averaged over equal blocks before they are fitted


@dataclass(frozen=True, eq=False)
class Trace:
    """The loss gap, loss_dropped(t) - loss_baseline(t), iteration by iteration, [T]."""

    iterations: FloatArray
    gap: FloatArray
    smoothed: FloatArray
    """Running mean of `window` iterations (of fewer, as many on both sides, at the ends), floored at 0."""
    window: int
    noise: float
    """Standard deviation of a single gap around its trend, from the differences of neighbours."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A shape fitted to a trace."""

    name: str
    parameters: dict[str, float]
    at_limit: tuple[str, ...]
    """Parameters that ended at a limit of what was searched."""
    rmse: float
    r_squared: float
    aic: float

    def values(self, t: ArrayLike) -> FloatArray:
        """The fitted gap at each t."""
        return _SHAPES[self.name].values(np.asarray(t, dtype=np.float64), *self.parameters.values())


def build_trace(
    iterations: ArrayLike, baseline_loss: ArrayLike, dropped_loss: ArrayLike, window: int | None = None
) -> Trace:
    """The trace of two runs' losses at the same iterations, [T] each, in ascending order.

    window: iterations of the running mean, rounded up to an odd number; None is 2 % of them, at least 5.
    Raises ValueError for fewer than MIN_ITERATIONS, losses that are not finite, or a window longer than a third of T.
    """
    t, baseline, dropped = (
        np.asarray(values, dtype=np.float64) for values in (iterations, baseline_loss, dropped_loss)
    )
    if len(t) < MIN_ITERATIONS:
        raise ValueError(f"the trace is too short: {len(t)} iterations, a fit needs at least {MIN_ITERATIONS}")
    gap = dropped - baseline
    if not np.isfinite(gap).all():
        first = t[~np.isfinite(gap)][0]
        raise ValueError(f"the loss gap at iteration {first:.0f} is not finite: one of the runs has diverged")
    half = max(2, round(0.01 * len(t))) if window is None else check_integer("window", window, 1, len(t) // 3) // 2
    noise = float(np.diff(gap).std() / np.sqrt(2.0))
    smoothed = np.maximum(_running_mean(gap, half), 0.0)
    return Trace(iterations=t, gap=gap, smoothed=smoothed, window=2 * half + 1, noise=noise)


def require_peak(trace: Trace) -> None:
    """Refuse a trace that PWEGD cannot follow. Raises ValueError with the reason.

    Compared are means over `window` iterations: the highest, the first, and the last tenth; noise is taken for a
    difference with a probability of 1 %.
    """
    half, length = trace.window // 2, len(trace.gap)
    inner = slice(half, length - half)  # at the ends fewer iterations are averaged
    highest = float(trace.smoothed[inner].max())
    position = half + int(trace.smoothed[inner].argmax())
    significant = -float(ndtri(_FALSE_ALARM * trace.window / length)) * trace.noise
    means = f"(means of {trace.window} iterations, noise of one {trace.noise:.3g})"
    if highest <= significant / np.sqrt(trace.window):
        raise ValueError(
            f"the loss gap is never significantly above 0: at most {highest:.3g} {means}; "
            "average over a longer window, drop more layers, or train longer"
        )
    start = float(trace.gap[: trace.window].mean())
    if highest - start <= significant * np.sqrt(2.0 / trace.window):
        raise ValueError(
            f"the loss gap has no peak: it falls from its start, {start:.3g}, and is {highest:.3g} at most {means}; "
            "if it rises within fewer iterations, choose a shorter window, else an exponential schedule "
            "(drop.schedule exponential), which has that shape"
        )
    tail = max(trace.window, length // 10)
    end = float(trace.gap[-tail:].mean())
    fallen = highest - end > max(significant * np.sqrt(1.0 / trace.window + 1.0 / tail), _FALL * highest)
    if not fallen or position >= length - tail:
        raise ValueError(
            f"the loss gap has no peak: it is still {end:.3g} in the last {tail} iterations, its highest is "
            f"{highest:.3g} at iteration {trace.iterations[position]:.0f} {means}; train both runs for longer"
        )


def fit_trace(trace: Trace) -> list[Fit]:
    """PWEGD and the alternatives, each at its least squares; PWEGD comes first.

    pwegd: height sch(t) / sch(peak), with k in [1, 30], b and epsilon of docs/method.md 1.
    exponential: height exp(-gamma t), the shape of schedule.Exponential.
    weibull and lognormal: those densities from epsilon on, scaled to a height at their peak.
    Raises ValueError for a trace without a peak (require_peak).
    """
    require_peak(trace)
    return [_fit_shape(name, shape, trace) for name, shape in _SHAPES.items()]


def schedule_fields(pwegd: Fit, theta: float, peak_theta: float) -> dict[str, float]:
    """a, b, c, epsilon and eta, in 6 digits, of the fitted PWEGD whose highest theta(t) is `peak_theta` in [theta, 1].

    Only a + c = k enters the schedule: c is 1. A loss gap is no probability, so the fit says nothing about the height.
    """
    check_number("theta", theta, "(0, 1]")
    check_number("peak_theta", peak_theta, f"[{theta!r}, 1]")
    a = 0.0 if is_exponential(pwegd) else _six_digits(pwegd.parameters["k"] - 1.0)
    b = _six_digits(pwegd.parameters["b"])
    eta = amplitude_for_peak(peak_theta, theta, a + 1.0, b)
    return {"a": a, "b": b, "c": 1.0, "epsilon": _six_digits(pwegd.parameters["epsilon"]), "eta": _six_digits(eta)}


def is_exponential(pwegd: Fit) -> bool:
    """Whether the best k is 1 as far as the trace can tell: an exponential decay from epsilon on."""
    return pwegd.parameters["k"] < _EXPONENTIAL_SHAPE


@dataclass(frozen=True)
class _Shape:
    """A function of t and parameters, their limits, and points to start the search from, both given the trace."""

    values: Callable[..., FloatArray]
    names: tuple[str, ...]
    limits: Callable[[Trace], list[tuple[float, float]]]
    starts: Callable[[Trace], Iterable[tuple[float, ...]]]


def _fit_shape(name: str, shape: _Shape, trace: Trace) -> Fit:
    t, gap, half = _in_blocks(trace)
    target = np.maximum(_running_mean(gap, half), 0.0)
    limits = np.array(shape.limits(trace), dtype=np.float64)
    best = None
    for start in shape.starts(trace):
        # Strictly within the limits, as the algorithm demands.
        margin = 1e-6 * (limits[:, 1] - limits[:, 0])
        found = least_squares(
            lambda values: _running_mean(shape.values(t, *values), half) - target,
            np.clip(start, limits[:, 0] + margin, limits[:, 1] - margin),
            bounds=(limits[:, 0], limits[:, 1]),
            x_scale=limits[:, 1] - limits[:, 0],
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None, f"{name} has no starting point"
    near = 1e-4 * (limits[:, 1] - limits[:, 0])
    at_limit = (best.x - limits[:, 0] < near) | (limits[:, 1] - best.x < near)
    fitted = shape.values(trace.iterations, *best.x)
    errors = _running_mean(fitted, trace.window // 2) - trace.smoothed
    raw_errors = fitted - trace.gap
    num_points, num_parameters = len(trace.gap), len(shape.names) + 1  # and the variance of the errors
    return Fit(
        name=name,
        parameters=dict(zip(shape.names, best.x.tolist(), strict=True)),
        at_limit=tuple(itertools.compress(shape.names, at_limit)),
        rmse=float(np.sqrt(np.mean(errors**2))),
        r_squared=float(1.0 - np.sum(errors**2) / np.sum((trace.smoothed - trace.smoothed.mean()) ** 2)),
        aic=float(num_points * np.log(np.mean(raw_errors**2) + np.finfo(float).tiny) + 2 * num_parameters),
    )


def _in_blocks(trace: Trace) -> tuple[FloatArray, FloatArray, int]:
    """Iterations and gaps, averaged over blocks to at most _FITTED_POINTS, and half the window in these points."""
    block = -(-len(trace.gap) // _FITTED_POINTS)
    whole = len(trace.gap) // block * block
    t, gap = (values[:whole].reshape(-1, block).mean(axis=1) for values in (trace.iterations, trace.gap))
    return t, gap, round(trace.window // 2 / block)


def _pwegd(t: FloatArray, height: float, k: float, b: float, epsilon: float) -> FloatArray:
    """sch(t) of docs/method.md 1, scaled to `height` at its peak."""
    return height * pwegd_density(t, k, b, epsilon) / pwegd_density((k - 1.0) * b / 2.0, k, b)


def _exponential(t: FloatArray, height: float, gamma: float) -> FloatArray:
    return height * np.exp(-gamma * t)


def _weibull(t: FloatArray, height: float, shape: float, scale: float, epsilon: float) -> FloatArray:
    x = np.maximum(t - epsilon, 0.0) / scale
    mode = ((shape - 1.0) / shape) ** (1.0 / shape)
    log_values = xlogy(shape - 1.0, x) - x**shape - (xlogy(shape - 1.0, mode) - mode**shape)
    return np.where(t >= epsilon, height * np.exp(log_values), 0.0)


def _lognormal(t: FloatArray, height: float, sigma: float, mode: float, epsilon: float) -> FloatArray:
    """`mode` is the distance of the peak from epsilon: as a function of log x the density is a Gaussian around it."""
    x = np.maximum(t - epsilon, np.finfo(float).tiny)
    return np.where(t > epsilon, height * np.exp(-((np.log(x / mode) / sigma) ** 2) / 2.0), 0.0)


def _peak(trace: Trace) -> tuple[float, float]:
    """Iteration and height of the smoothed trace's highest point."""
    highest = int(trace.smoothed.argmax())
    return float(trace.iterations[highest]), float(trace.smoothed[highest])


def _thresholds(trace: Trace) -> list[float]:
    """Where to look for epsilon: at the start of the run, and nearer and nearer to the peak."""
    return [share * _peak(trace)[0] for share in (0.0, 0.5, 0.9)]


def _limits(trace: Trace, **middle: tuple[float, float]) -> list[tuple[float, float]]:
    """Limits of (height, ..., epsilon): up to three times the peak's height, from the start of the run to its peak."""
    peak, height = _peak(trace)
    return [(0.0, 3.0 * height), *middle.values(), (0.0, peak)]


def _pwegd_limits(trace: Trace) -> list[tuple[float, float]]:
    return _limits(trace, k=(1.0, MAX_SHAPE), b=(1e-3, 10.0 * trace.iterations[-1]))


def _pwegd_starts(trace: Trace) -> Iterable[tuple[float, ...]]:
    peak, height = _peak(trace)
    for k, epsilon in itertools.product((1.05, 1.3, 2.0, 4.0, 10.0), _thresholds(trace)):
        yield height, k, 2.0 * (peak - epsilon) / (k - 1.0), epsilon


def _exponential_limits(trace: Trace) -> list[tuple[float, float]]:
    return [(0.0, 10.0 * _peak(trace)[1]), (0.0, 1.0)]


def _exponential_starts(trace: Trace) -> Iterable[tuple[float, ...]]:
    last, height = trace.iterations[-1], _peak(trace)[1]
    return [(height, decays / last) for decays in (0.3, 1.0, 3.0, 10.0, 30.0)]


def _weibull_limits(trace: Trace) -> list[tuple[float, float]]:
    return _limits(trace, shape=(1.0, MAX_SHAPE), scale=(1e-3, 10.0 * trace.iterations[-1]))


def _weibull_starts(trace: Trace) -> Iterable[tuple[float, ...]]:
    peak, height = _peak(trace)
    for shape, epsilon in itertools.product((1.2, 2.0, 4.0), _thresholds(trace)):
        yield height, shape, (peak - epsilon) / ((shape - 1.0) / shape) ** (1.0 / shape), epsilon


def _lognormal_limits(trace: Trace) -> list[tuple[float, float]]:
    return _limits(trace, sigma=(1e-2, 10.0), mode=(1e-3, 10.0 * trace.iterations[-1]))


def _lognormal_starts(trace: Trace) -> Iterable[tuple[float, ...]]:
    peak, height = _peak(trace)
    for sigma, epsilon in itertools.product((0.3, 1.0, 2.0), _thresholds(trace)):
        yield height, sigma, peak - epsilon, epsilon


_SHAPES = {
    "pwegd": _Shape(_pwegd, ("height", "k", "b", "epsilon"), _pwegd_limits, _pwegd_starts),
    "exponential": _Shape(_exponential, ("height", "gamma"), _exponential_limits, _exponential_starts),
    "weibull": _Shape(_weibull, ("height", "shape", "scale", "epsilon"), _weibull_limits, _weibull_starts),
    "lognormal": _Shape(_lognormal, ("height", "sigma", "mode", "epsilon"), _lognormal_limits, _lognormal_starts),
}


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _running_mean(values: FloatArray, half: int) -> FloatArray:
    """Mean of up to `half` values on both sides and the value itself, as many on one side as on the other."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    reach = np.minimum(half, np.minimum(positions, positions[::-1]))
    return (sums[positions + reach + 1] - sums[positions - reach]) / (2 * reach + 1)
