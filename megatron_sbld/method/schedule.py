"""theta(t), the limit of the keep probability over training: PWEGD, Exponential, Linear, Polynomial, Constant, ...

docs/method.md sections 1 and 4; SBLD, Eq. 1-3; PLD. Iterations are counted t = 1..T; t = 0 is the
state before the first one. A schedule maps a number to a float and an array to a float64 array of the same shape.

Values are not clamped: a large eta takes PWEGD's theta(t) above 1. What a theta(t) means for a layer, and the clamping
to a probability, is the policy's part (policy.py).
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, xlogy

from megatron_sbld.checks import check_number

RECOMMENDED_THETA_MIN = 0.4
"""Below this theta the paper finds models hard to train (SBLD, "Overall Workflow")."""

# Far beyond any run, and such that no quotient of two of them overflows.
_ITERATIONS = "[-1e18, 1e18]"
_SCALES = "[1e-9, 1e18]"
_LARGEST_SHAPE = 1e6


class Schedule(ABC):
    """theta(t): call it with an iteration or an array of iterations."""

    @overload
    def __call__(self, iteration: float) -> float: ...

    @overload
    def __call__(self, iteration: NDArray | Sequence[float]) -> NDArray[np.float64]: ...

    def __call__(self, iteration: ArrayLike) -> float | NDArray[np.float64]:
        t = np.asarray(iteration, dtype=np.float64)
        values = self._values(t)
        return float(values) if t.ndim == 0 else values

    @abstractmethod
    def _values(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """theta at every t, of any shape."""


@dataclass(frozen=True, kw_only=True)
class PWEGD(Schedule):
    """SBLD's schedule: theta(t) = eta / theta^2 * sch(t) + theta, sch a gamma density (docs/method.md 1; SBLD, Eq 3).

    theta: the value before epsilon and in the limit, in (0, 1]; below 0.4 warns.
    a, c: shape and polynomial of the weighting function; only their sum k = a + c in [1, 1e6] enters.
    b: scale in iterations, > 0.  epsilon: threshold in iterations; theta(t) = theta before it.
    eta: amplitude, >= 0, in iterations, hence large: choose it by `from_peak`.

    >>> round(PWEGD(theta=0.9, a=2, b=2000, c=1, epsilon=0, eta=50.0)(2000), 6)
    0.916708
    >>> PWEGD(theta=0.9, a=2, b=2000, c=1, epsilon=100, eta=50.0)([0, 100]).tolist()
    [0.9, 0.9]
    """

    theta: float
    a: float = 2.0
    b: float
    c: float = 1.0
    epsilon: float = 0.0
    eta: float

    def __post_init__(self) -> None:
        _check_theta("theta", self.theta, "(0, 1]")
        check_number("a", self.a, "(-inf, inf)")
        check_number("c", self.c, "(-inf, inf)")
        check_number("b", self.b, _SCALES)
        check_number("epsilon", self.epsilon, _ITERATIONS)
        check_number("eta", self.eta, "[0, inf)")
        _check_shape("a + c", self.shape)
        with np.errstate(over="ignore"):
            peak_is_finite = math.isfinite(self(self.peak_iteration))
        if not peak_is_finite:
            raise ValueError(f"b = {self.b!r} and eta = {self.eta!r} are not allowed: theta(t) overflows at its peak")

    @classmethod
    def from_peak(
        cls, *, theta: float, peak_iteration: float, peak_theta: float, shape: float = 3.0, epsilon: float = 0.0
    ) -> PWEGD:
        """The PWEGD of shape k > 1 whose highest value is `peak_theta` in [theta, 1], reached at `peak_iteration`.

        >>> schedule = PWEGD.from_peak(theta=0.9, peak_iteration=1000, peak_theta=0.95, shape=3.0, epsilon=0)
        >>> schedule.b, round(schedule(1000), 6), round(schedule(5000), 6)
        (1000.0, 0.95, 0.900419)
        """
        b = scale_for_peak(peak_iteration, shape, epsilon)
        eta = amplitude_for_peak(peak_theta, theta, shape, b)
        return cls(theta=theta, a=shape - 1.0, b=b, c=1.0, epsilon=epsilon, eta=eta)

    @property
    def shape(self) -> float:
        """k = a + c, the shape of the gamma density."""
        return self.a + self.c

    @property
    def peak_iteration(self) -> float:
        """Where theta(t) is highest: epsilon + (k - 1) b / 2."""
        return self.epsilon + (self.shape - 1.0) * self.b / 2.0

    def _values(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        # Divided twice, because the square of a small theta underflows to 0.
        return self.eta / self.theta / self.theta * pwegd_density(t, self.shape, self.b, self.epsilon) + self.theta


@dataclass(frozen=True)
class Exponential(Schedule):
    """PLD's schedule: theta(t) = (1 - theta) exp(-gamma t) + theta (docs/method.md 4; PLD).

    theta: the limit, in [0, 1]; below 0.4 warns. 0, which the other schedules refuse, is there because PLD's public
    implementation has it and the formula does not divide by theta.
    gamma: decay per iteration, > 0; PLD takes 100 / T.

    >>> round(Exponential(theta=0.5, gamma=0.001)(1000), 6)
    0.68394
    """

    theta: float
    gamma: float

    def __post_init__(self) -> None:
        _check_theta("theta", self.theta, "[0, 1]")
        check_number("gamma", self.gamma, "(0, inf)")

    def _values(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        return (1.0 - self.theta) * np.exp(-self.gamma * t) + self.theta


@dataclass(frozen=True)
class Polynomial(Schedule):
    """theta(t) = start + (end - start) min(t / duration, 1)^power (docs/method.md 4).

    start: theta(0), in (0, 1].  end: theta from t = duration on, in (0, 1].  Either below 0.4 warns.
    duration: iterations, > 0.  power: exponent, > 0.

    >>> Polynomial(start=1.0, end=0.5, duration=1000, power=2.0)([0, 500, 1000, 2000]).tolist()
    [1.0, 0.875, 0.5, 0.5]
    """

    start: float
    end: float
    duration: float
    power: float

    def __post_init__(self) -> None:
        _check_theta("start", self.start, "(0, 1]")
        _check_theta("end", self.end, "(0, 1]")
        check_number("duration", self.duration, "(0, inf)")
        check_number("power", self.power, "(0, inf)")

    def _values(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        # Weighted so that both ends are exact: start + (end - start) need not be end in floating point.
        elapsed = np.clip(t / self.duration, 0.0, 1.0) ** self.power
        return (1.0 - elapsed) * self.start + elapsed * self.end


@dataclass(frozen=True)
class Linear(Schedule):
    """theta(t) = start + (end - start) min(t / duration, 1): Polynomial with power 1 (docs/method.md 4).

    >>> Linear(start=1.0, end=0.5, duration=1000)([0, 500, 1000, 2000]).tolist()
    [1.0, 0.75, 0.5, 0.5]
    """

    start: float
    end: float
    duration: float

    def __post_init__(self) -> None:
        _check_theta("start", self.start, "(0, 1]")
        _check_theta("end", self.end, "(0, 1]")
        check_number("duration", self.duration, "(0, inf)")

    def _values(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        elapsed = np.clip(t / self.duration, 0.0, 1.0)
        return (1.0 - elapsed) * self.start + elapsed * self.end


@dataclass(frozen=True)
class Constant(Schedule):
    """theta(t) = theta, in (0, 1]; below 0.4 warns.

    >>> Constant(theta=0.8)(1)
    0.8
    """

    theta: float

    def __post_init__(self) -> None:
        _check_theta("theta", self.theta, "(0, 1]")

    def _values(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.full(t.shape, self.theta, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Plateau(Schedule):
    """theta until t1, then linear to 1 at t2, and 1 from there on: DDD's (docs/method.md 8).

    theta: the value at first, in (0, 1]; below 0.4 warns.
    hold_until, decay_until: t1 and t2 in iterations, 0 <= t1 <= t2.

    >>> Plateau(theta=0.8, hold_until=400, decay_until=500)([0, 400, 450, 500, 1000]).round(6).tolist()
    [0.8, 0.8, 0.9, 1.0, 1.0]
    """

    theta: float
    hold_until: float
    decay_until: float

    def __post_init__(self) -> None:
        _check_theta("theta", self.theta, "(0, 1]")
        check_number("hold_until", self.hold_until, "[0, inf)")
        check_number("decay_until", self.decay_until, f"[{self.hold_until!r}, inf)")

    def _values(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        length = self.decay_until - self.hold_until
        after = t - self.hold_until
        elapsed = np.clip(after / length, 0.0, 1.0) if length else np.where(after > 0.0, 1.0, 0.0)
        return (1.0 - elapsed) * self.theta + elapsed


@dataclass(frozen=True)
class Steps(Schedule):
    """theta_i in the i-th step: a schedule of constants (docs/method.md 8; RaPTr, arXiv 2402.05913).

    steps: [last iteration of the step, theta_i], ascending; theta_i in (0, 1], below 0.4 warns. Beyond the last one its
        theta holds.

    >>> Steps([[100, 0.5], [200, 0.75], [300, 1.0]])([0, 100, 101, 300, 301]).tolist()
    [0.5, 0.5, 0.75, 1.0, 1.0]
    >>> Steps.of_shares([[0.5, 0.6], [1.0, 1.0]], train_iters=3)([1, 2, 3]).tolist()
    [0.6, 1.0, 1.0]
    """

    steps: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        _check_steps(self.steps, "last iteration of the step", "[0, inf)")
        for _, theta in self.steps:
            _check_theta("steps theta", theta, "(0, 1]")

    @classmethod
    def of_shares(cls, steps: Sequence[Sequence[float]], train_iters: int) -> Steps:
        """Steps given by the share of the T iterations at which each ends; the last ends at 1."""
        _check_steps(steps, "share of the iterations", "[0, 1]")
        if steps[-1][0] != 1.0:
            raise ValueError(f"steps = {steps!r} is not allowed: the last step must end at share 1.0")
        return cls([[math.floor(round(share * train_iters, 6)), theta] for share, theta in steps])

    def _values(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        ends, thetas = (np.array(column, dtype=np.float64) for column in zip(*self.steps, strict=True))
        return thetas[np.minimum(np.searchsorted(ends, t), len(ends) - 1)]


def pwegd_density(t: ArrayLike, shape: float, b: float, epsilon: float = 0.0) -> NDArray[np.float64]:
    """sch(t) of docs/method.md 1 (SBLD, Eq. 1-2), in 1/iteration: the gamma density of shape k at 2 (t - eps) / b.

    0 before epsilon; at epsilon 2 / b for k = 1, else 0, as in scipy.stats.gamma. In log space, because the terms of
    the direct form overflow for the b of real runs.
    """
    x = 2.0 * (np.asarray(t, dtype=np.float64) - epsilon) / b
    log_density = xlogy(shape - 1.0, np.maximum(x, 0.0)) - x - gammaln(shape)
    return np.where(x >= 0.0, np.exp(np.where(x >= 0.0, log_density, 0.0)), 0.0) * (2.0 / b)


def scale_for_peak(peak_iteration: float, shape: float, epsilon: float = 0.0) -> float:
    """The b whose PWEGD of shape k > 1 peaks at `peak_iteration` > epsilon: 2 (t* - eps) / (k - 1)."""
    check_number("peak_iteration", peak_iteration, _ITERATIONS)
    check_number("epsilon", epsilon, _ITERATIONS)
    _check_shape("shape", shape)
    if shape == 1.0:
        raise ValueError("shape = 1 has its peak at epsilon for every b: give b, or a shape above 1")
    if peak_iteration <= epsilon:
        raise ValueError(f"peak_iteration = {peak_iteration!r} is not allowed: it must be above epsilon = {epsilon!r}")
    return 2.0 * (peak_iteration - epsilon) / (shape - 1.0)


def amplitude_for_peak(peak_theta: float, theta: float, shape: float, b: float) -> float:
    """The eta whose PWEGD reaches `peak_theta` in [theta, 1] at its peak."""
    check_number("theta", theta, "(0, 1]")
    check_number("peak_theta", peak_theta, f"[{theta!r}, 1]")
    peak_density = float(pwegd_density((shape - 1.0) * b / 2.0, shape, b))
    return theta * theta * (peak_theta - theta) / peak_density


def _check_theta(name: str, value: float, allowed: str) -> None:
    check_number(name, value, allowed)
    if value < RECOMMENDED_THETA_MIN:
        # Level 4 is the line that builds the schedule: above this function, __post_init__ and __init__.
        warnings.warn(
            f"{name} = {value!r} is below {RECOMMENDED_THETA_MIN}, the lowest that the SBLD paper recommends: "
            "the model may become too difficult to train",
            stacklevel=4,
        )


def _check_steps(steps: Any, end: str, allowed: str) -> None:
    pairs = isinstance(steps, Sequence) and not isinstance(steps, str) and len(steps) > 0
    if not pairs or not all(isinstance(step, Sequence) and len(step) == 2 for step in steps):
        raise ValueError(f"steps = {steps!r} is not allowed: it must be a list of [{end}, theta]")
    ends = [check_number(f"steps {end}", step[0], allowed) for step in steps]
    if ends != sorted(ends):
        raise ValueError(f"steps = {steps!r} is not allowed: the ends of the steps must ascend")


def _check_shape(name: str, shape: float) -> None:
    check_number(name, shape, "(-inf, inf)")
    if shape < 1.0:
        raise ValueError(f"{name} = {shape!r} is not allowed: below 1 the schedule is infinite at epsilon")
    if shape > _LARGEST_SHAPE:
        raise ValueError(f"{name} = {shape!r} is not allowed: above {_LARGEST_SHAPE:g} the density is lost to rounding")
