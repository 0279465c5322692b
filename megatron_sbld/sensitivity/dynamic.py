"""What leaving out a layer costs at the present weights, estimated from training's own losses (docs/method.md 3).

Training draws which layers run, so its losses carry every layer's effect at no extra cost. The estimator regresses them
on the decisions, with forgetting. With d_l = 1 where layer l was dropped and q_l its drop probability, both known,

    loss = trend + sum over l of gap_l (d_l - q_l) + noise,

and gap_l is the mean loss without the layer minus the mean loss with it, over the other layers' decisions as they are
drawn: interactions between layers average out, if decisions are independent (Bernoulli).

d_l - q_l has mean zero whatever happened before. Hence any trend that is predicted from earlier iterations alone may be
subtracted without a bias, also a poor one: it only adds noise. Here it is a local line with a short memory, which
follows the steep fall of the loss at the start of training. And the products (d_l - q_l) noise are uncorrelated from
one observation to the next, so the sums of their squares are honest variances without a model of the noise. A layer
that is never or always dropped has d_l = q_l: it is not observed, and keeps its prior.

NumPy only; what acts on the estimates is in mixing.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sbld.checks import check_integer, check_number

Floats = NDArray[np.float64]

_TREND_MEMORY = 20.0
"""Iterations of the local line. Its prediction adds 1.25 / 20 = 6 % to the noise's variance."""
_TREND_WEIGHT = 3.0
"""Least weight of the iterations behind a prediction: reached after four."""
_REFRESH = 10
"""Iterations between solutions of the regression for the residuals' sake: amortised, it costs next to nothing."""
_MIN_OBSERVATIONS = 20
"""Observations before which the noise is not known well enough for any estimate but the prior."""
_MIN_INFORMATION = 1.0
"""Sum of w (d - q)^2 from which a layer counts as observed: about one recent drop, or four iterations at q = 0.5."""
_MIN_VARIANCE = 1e-18
"""Of the noise, in nats^2: keeps the regression solvable for losses without any."""


@dataclass(frozen=True)
class GapEstimate:
    """Gaps in nats at one moment."""

    gap: Floats
    """Mean loss without the layer minus with it, [L]."""
    covariance: Floats
    """Of the gaps' errors, in nats^2, [L, L]."""
    observed: NDArray[np.bool_]
    """Layers whose gap rests on observations, [L]; of the others the prior is all there is."""

    @property
    def stderr(self) -> Floats:
        """Standard errors of the gaps, [L]."""
        return np.sqrt(np.diag(self.covariance))


class GapEstimator:
    """Online estimator of every layer's gap: least squares with exponential forgetting and a Gaussian prior.

    num_layers: L.
    memory: iterations after which an observation's weight has fallen to 1/e.
    prior_std: of a gap in nats, around 0, before anything is observed.

    Raises ValueError for an argument out of range.
    """

    def __init__(self, num_layers: int, memory: float = 1000.0, prior_std: float = 1.0) -> None:
        self.num_layers = check_integer("num_layers", num_layers, 1)
        self.memory = check_number("memory", memory, "[2, inf)")
        self.prior_std = check_number("prior_std", prior_std, "(0, inf)")
        self._iterations = 0
        self._observations = 0
        self._trend = [0.0] * 5  # sums of v, v age, v age^2, v u, v u age: u the loss, v its weight in the trend
        self._weight = 0.0  # sum of w
        self._noise = 0.0  # sum of w residual^2
        self._moment = np.zeros(num_layers)  # sum of w x y: x = d - q, y the loss over its trend
        # Sums of w x x^T, w^2 x x^T and w^2 residual^2 x x^T, [3, L, L]: one array, because this runs every iteration.
        self._products = np.zeros((3, num_layers, num_layers))
        self._reference = np.zeros(num_layers)  # the gaps that residuals are taken with

    def observe(self, losses: ArrayLike, kept: ArrayLike, keep_probs: ArrayLike) -> None:
        """Take in one iteration; losses that are not finite are left out.

        losses: mean loss of each observation, [n]: of the iteration, or of each of its microbatches.
        kept: whether each layer ran in it, [n, L].  keep_probs: with which the decisions were drawn, [L].
        """
        loss, ran = np.asarray(losses, dtype=np.float64), np.asarray(kept, dtype=bool)
        if loss.ndim != 1 or ran.shape != (len(loss), self.num_layers):
            raise ValueError(f"losses {loss.shape} and kept {ran.shape} must be [n] and [n, {self.num_layers}]")
        finite = np.isfinite(loss)
        if not finite.all():
            loss, ran = loss[finite], ran[finite]
        x = np.asarray(keep_probs, dtype=np.float64) - ran  # d - q = (1 - kept) - (1 - keep_prob)
        self._age()
        if len(loss) and self._trend[0] >= _TREND_WEIGHT:
            self._add(x, loss - self._predicted_loss())
        if len(loss):
            # Without the decisions' known part, which would be noise of the trend.
            level = float((loss - x @ self._reference).sum()) / len(loss)
            self._trend[0] += 1.0
            self._trend[3] += level
        if self._iterations % _REFRESH == 0 and self._observations >= _MIN_OBSERVATIONS:
            self._reference = self._solve()[0]

    def estimate(self) -> GapEstimate:
        """The gaps as they are now. Unobserved layers have gap 0 and a standard error of prior_std.

        The covariance is the sandwich of the ridge regression, prior included: K (V + r^2 prior_std^2) K for
        K = (A + r)^-1 and r = noise variance / prior_std^2. V once takes one noise variance for all observations, once
        the squared scores, which hold also where the noise depends on the decisions (interactions, or gaps that differ
        from batch to batch). The latter are unreliable after few drops, so each layer has the larger standard error.
        """
        num_layers, prior_variance = self.num_layers, self.prior_std**2
        if self._observations < _MIN_OBSERVATIONS:
            return GapEstimate(
                np.zeros(num_layers), prior_variance * np.eye(num_layers), np.zeros(num_layers, dtype=bool)
            )
        gap, inverse, ridge = self._solve()
        prior = ridge**2 * prior_variance * np.eye(num_layers)
        information, squared_weights, squared_scores = self._products
        covariance = inverse @ (self._noise_variance() * squared_weights + prior) @ inverse
        robust = np.diag(inverse @ (squared_scores + prior) @ inverse)
        larger = np.sqrt(np.maximum(robust / np.diag(covariance), 1.0))
        observed = np.diag(information) >= _MIN_INFORMATION
        return GapEstimate(gap, covariance * np.outer(larger, larger), observed)

    def state_dict(self) -> dict[str, Any]:
        """Everything observed so far, as numbers and lists: with it another estimator goes on bit for bit."""
        return {
            "num_layers": self.num_layers,
            **{name: np.asarray(getattr(self, f"_{name}")).tolist() for name in _STATE},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, with this estimator's own memory and prior.

        Raises ValueError for a state of another number of layers, or one that is damaged.
        """
        if state.get("num_layers") != self.num_layers:
            raise ValueError(f"the estimate is of {state.get('num_layers')} layers, the model has {self.num_layers}")
        for name in _STATE:
            present = getattr(self, f"_{name}")
            value = np.asarray(state.get(name), dtype=np.asarray(present).dtype)
            if value.shape != np.shape(present) or not np.isfinite(value).all():
                raise ValueError(f"the saved estimate's {name} is damaged")
            setattr(self, f"_{name}", value if isinstance(present, np.ndarray) else value.tolist())

    def _age(self) -> None:
        """All that was observed becomes one iteration older."""
        fade, trend_fade = 1.0 - 1.0 / self.memory, 1.0 - 1.0 / _TREND_MEMORY
        v, v_age, v_age2, vu, vu_age = self._trend
        self._trend = [trend_fade * sum_ for sum_ in (v, v_age + v, v_age2 + 2 * v_age + v, vu, vu_age + vu)]
        self._weight *= fade
        self._noise *= fade
        self._moment *= fade
        self._products *= np.array([fade, fade**2, fade**2])[:, None, None]
        self._iterations += 1

    def _predicted_loss(self) -> float:
        """The local line through the earlier iterations, at age 0."""
        v, v_age, v_age2, vu, vu_age = self._trend
        return (v_age2 * vu - v_age * vu_age) / (v * v_age2 - v_age**2)

    def _add(self, x: Floats, y: Floats) -> None:
        residual = y - x @ self._reference
        self._observations += len(y)
        self._weight += len(y)
        self._noise += float(residual @ residual)
        self._moment += y @ x
        scores = x * residual[:, None]
        self._products[:2] += x.T @ x
        self._products[2] += scores.T @ scores

    def _noise_variance(self) -> float:
        """Of one observation. Residuals are taken with earlier gaps: they are a little large, never overfitted."""
        return max(self._noise / self._weight, _MIN_VARIANCE)

    def _solve(self) -> tuple[Floats, Floats, float]:
        """Gaps, the inverse of information plus ridge, and the ridge that the prior amounts to."""
        ridge = self._noise_variance() / self.prior_std**2
        inverse: Floats = np.linalg.inv(self._products[0] + ridge * np.eye(self.num_layers)).astype(np.float64)
        return inverse @ self._moment, inverse, ridge


_STATE = (
    "iterations",
    "observations",
    "trend",
    "weight",
    "noise",
    "moment",
    "products",
    "reference",
)
