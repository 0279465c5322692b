"""keep_probs(t): the probability with which each layer runs at iteration t = 1..T, by policy.

docs/method.md section 2 (SBLD; SBLD, Algorithms 1 and 2) and section 4 (PLD, LayerDrop, stochastic depth).
A policy turns theta(t) of a schedule into one keep probability for each of the L layers. It draws nothing, as
decisions.py does, and knows nothing of models. Policies are immutable.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sbld.checks import check_choice, check_flag, check_integer, check_layers, check_number
from megatron_sbld.method.choices import Depth, ResidualScale
from megatron_sbld.method.layer_values import check_layer_values
from megatron_sbld.method.schedule import Constant
from megatron_sbld.method.stages import StageLayers, Stages


class Policy(ABC):
    """What every policy is: a schedule, a number of layers, layers that always run, stages, a last part at full depth.

    schedule: theta(t), a function of the iteration.
    num_layers: L.
    residual_scale: how a kept layer's branches are scaled; None takes the policy's default_residual_scale.
    recovery_fraction: share of the run's `train_iters` = T iterations, at its end, in which every keep probability is
        1: the last R = ceil(recovery_fraction * T), so the first of them is T - R + 1. Needs train_iters if above 0.
    keep_layers: layers (1-based) whose keep probability is 1 throughout, once they have begun.
    stages: which layers have begun; the keep probability of the others is 0. None: all of them.

    Raises ValueError for an argument out of range, or layers that are left to begin in the recovery.
    """

    default_residual_scale: ClassVar[ResidualScale] = "none"
    uses_theta: ClassVar[bool] = True
    """Whether theta(t) is in the policy's formula."""

    def __init__(
        self,
        schedule: Callable[[int], float],
        num_layers: int,
        *,
        residual_scale: ResidualScale | None = None,
        recovery_fraction: float = 0.0,
        train_iters: int | None = None,
        keep_layers: Iterable[int] = (),
        stages: Stages | None = None,
    ) -> None:
        check_choice("residual_scale", residual_scale, (*get_args(ResidualScale), None))
        if not callable(schedule):
            raise ValueError(f"schedule = {schedule!r} is not allowed: it must be a function of t, as Constant(0.5) is")
        self.schedule = schedule
        self.num_layers = check_integer("num_layers", num_layers, 1)
        self.residual_scale: ResidualScale = residual_scale or self.default_residual_scale
        self.first_recovery_iteration = _first_recovery_iteration(recovery_fraction, train_iters)
        """First iteration of the run's last part at full depth; infinity without one."""
        self.keep_layers = check_layers("keep_layers", keep_layers, self.num_layers)
        self.stages = None if stages is None else self._checked_stages(stages)

    def with_stages(self, stages: Stages) -> Policy:
        """The same policy with other stages, of as many layers. Raises ValueError as the constructor does."""
        changed = copy.copy(self)
        changed.stages = self._checked_stages(stages)
        return changed

    def begun_layers(self, iteration: int) -> frozenset[int]:
        """Layers (1-based) that have begun at iteration t: all of them without stages."""
        return frozenset(range(1, self.num_layers + 1)) if self.stages is None else self.stages.begun(iteration)

    def theta(self, iteration: int) -> float:
        """theta(t) of the schedule, as it enters the policy's formula; also during the recovery, which ignores it.

        A probability in all policies but SBLD, which clamps only after weighting it (Algorithm 1, line 4): there a
        large eta shows as a theta above 1.
        """
        return min(max(float(self.schedule(check_integer("iteration", iteration, 0))), 0.0), 1.0)

    def keep_probs(self, iteration: int) -> NDArray[np.float64]:
        """Keep probability of each layer at iteration t, float64 [L]; t = 0 is the state before the first iteration."""
        theta = self.theta(iteration)
        if iteration >= self.first_recovery_iteration:
            return np.ones(self.num_layers)
        keep_probs = np.asarray(self._keep_probs(theta), dtype=np.float64)
        if keep_probs.shape != (self.num_layers,):
            raise ValueError(
                f"{type(self).__name__} gives keep probabilities of shape {keep_probs.shape}: it must give one for "
                f"each of num_layers = {self.num_layers} layers"
            )
        if self.keep_layers:
            keep_probs = keep_probs.copy()
            keep_probs[np.array(self.keep_layers) - 1] = 1.0
        return keep_probs if self.stages is None else keep_probs * self.stages.gate(iteration)

    def _checked_stages(self, stages: Stages) -> Stages:
        if stages.num_layers != self.num_layers:
            raise ValueError(f"stages are of {stages.num_layers} layers, the policy of {self.num_layers}")
        if self.first_recovery_iteration < stages.last_growth:
            raise ValueError(
                f"stages leave layers to begin at iteration {stages.last_growth}, but in the recovery, from iteration "
                f"{self.first_recovery_iteration:.0f} on, every layer runs: use a smaller recovery_fraction, or let "
                "the last stage begin earlier"
            )
        return stages

    @abstractmethod
    def _keep_probs(self, theta: float) -> NDArray[np.float64]:
        """Keep probability of each layer, float64 [L], before the recovery."""


class SBLDPolicy(Policy):
    """clamp(alpha theta(t) + beta S[l], theta_min, theta_max), but for the lists (docs/method.md 2; SBLD, Alg. 1, 2).

    schedule: theta(t), usually a PWEGD.
    sensitivity: S, [L], in [0, 1]; 1 is the layer that hurts most when it is left out.
    alpha, beta: weights of theta(t) and of S, >= 0.  theta_min, theta_max: limits in [0, 1].
    block_layers: layers (1-based) that are never dropped; not all of them.
    allow_layers: layers (1-based) that are kept with allow_keep_prob throughout; none of block_layers.
    exploration: least probability, in [0, 0.5), with which every layer outside of block_layers is kept, and dropped, so
        that its effect stays observable (sensitivity/dynamic.py); the Allow list's included. The recovery is exempt.
    explore_block: block_layers are dropped with probability `exploration` instead of never.
    The others: as in Policy.

    >>> policy = SBLDPolicy(Constant(0.5), [0.0, 0.4, 0.8, 1.0], block_layers=(4,), allow_layers=(1,))
    >>> policy.keep_probs(1).tolist()
    [0.4, 0.7, 0.9, 1.0]
    """

    def __init__(
        self,
        schedule: Callable[[int], float],
        sensitivity: ArrayLike,
        alpha: float = 1.0,
        beta: float = 0.5,
        theta_min: float = 0.4,
        theta_max: float = 1.0,
        block_layers: Iterable[int] = (),
        allow_layers: Iterable[int] = (),
        allow_keep_prob: float = 0.4,
        *,
        exploration: float = 0.0,
        explore_block: bool = False,
        **common: Any,
    ) -> None:
        self.sensitivity = _checked_sensitivity(sensitivity)
        super().__init__(schedule, len(self.sensitivity), **common)
        self.alpha = check_number("alpha", alpha, "[0, inf)")
        self.beta = check_number("beta", beta, "[0, inf)")
        self.theta_max = check_number("theta_max", theta_max, "[0, 1]")
        self.theta_min = check_number("theta_min", theta_min, f"[0, {self.theta_max}]")
        self.allow_keep_prob = check_number("allow_keep_prob", allow_keep_prob, "[0, 1]")
        self.exploration = check_number("exploration", exploration, "[0, 0.5)")
        self.explore_block = check_flag("explore_block", explore_block)
        self.block_layers = check_layers("block_layers", block_layers, self.num_layers)
        self.allow_layers = check_layers("allow_layers", allow_layers, self.num_layers)
        for name in ("block_layers", "keep_layers"):
            in_both = sorted(set(getattr(self, name)) & set(self.allow_layers))
            if in_both:
                raise ValueError(f"{name} and allow_layers both have {in_both}: a layer may be in one list only")
        if len(self.block_layers) == self.num_layers:
            raise ValueError(
                f"block_layers has all {self.num_layers} layers: nothing would be dropped; use policy none"
            )

    def with_sensitivity(self, sensitivity: ArrayLike, block_layers: Iterable[int]) -> SBLDPolicy:
        """The same policy with another S, in [0, 1], [L], and a Block list that is this one's or a part of it."""
        changed = copy.copy(self)
        changed.sensitivity = _checked_sensitivity(sensitivity)
        changed.block_layers = check_layers("block_layers", block_layers, self.num_layers)
        if len(changed.sensitivity) != self.num_layers or not set(changed.block_layers) <= set(self.block_layers):
            raise ValueError(
                f"sensitivity of {len(changed.sensitivity)} layers and block_layers {list(changed.block_layers)} "
                f"do not fit {self.num_layers} layers with block_layers {list(self.block_layers)}"
            )
        return changed

    def theta(self, iteration: int) -> float:
        """theta(t) of the schedule, not clamped."""
        return float(self.schedule(check_integer("iteration", iteration, 0)))

    def _keep_probs(self, theta: float) -> NDArray[np.float64]:
        keep_probs = np.clip(self.alpha * theta + self.beta * self.sensitivity, self.theta_min, self.theta_max)
        block = np.array(self.block_layers, dtype=int) - 1
        keep_probs[block] = 1.0
        keep_probs[np.array(self.allow_layers, dtype=int) - 1] = self.allow_keep_prob
        if self.exploration > 0.0:
            keep_probs = np.clip(keep_probs, self.exploration, 1.0 - self.exploration)
            if not self.explore_block:
                keep_probs[block] = 1.0
        return keep_probs


class PLDPolicy(Policy):
    """Progressive layer dropping: 1 - ((l - 1) / L) (1 - theta(t)) (docs/method.md 4; PLD).

    The first layer is never dropped. Kept branches are scaled by 1 / keep_prob unless residual_scale says otherwise.

    >>> PLDPolicy(Constant(0.5), num_layers=4).keep_probs(1).tolist()
    [1.0, 0.875, 0.75, 0.625]
    """

    default_residual_scale = "inverse_keep_prob"

    def _keep_probs(self, theta: float) -> NDArray[np.float64]:
        return 1.0 - np.arange(self.num_layers) / self.num_layers * (1.0 - theta)


class LayerDropPolicy(Policy):
    """LayerDrop: 1 - (1 - theta(t)) D(l), by default with D = 1: theta(t) for every layer (docs/method.md 4 and 8).

    depth: D(l): `uniform` 1; `linear` (l - 1) / (L - 1); `exponential` exp((l - 1) ln 2 / (L - 1)) - 1, LayerSkip's.
        The last two are 0 at the first layer and 1 at the last; with one layer 0.

    >>> LayerDropPolicy(Constant(0.5), num_layers=4).keep_probs(1).tolist()
    [0.5, 0.5, 0.5, 0.5]
    >>> LayerDropPolicy(Constant(0.4), num_layers=4, depth="linear").keep_probs(1).round(2).tolist()
    [1.0, 0.8, 0.6, 0.4]
    """

    def __init__(
        self, schedule: Callable[[int], float], num_layers: int, *, depth: Depth = "uniform", **common: Any
    ) -> None:
        super().__init__(schedule, num_layers, **common)
        check_choice("depth", depth, get_args(Depth))
        self.depth: Depth = depth

    def _keep_probs(self, theta: float) -> NDArray[np.float64]:
        if self.depth == "uniform":
            return np.full(self.num_layers, theta)
        relative = np.arange(self.num_layers) / max(self.num_layers - 1, 1)
        rate = relative if self.depth == "linear" else np.expm1(relative * math.log(2.0))
        return 1.0 - rate * (1.0 - theta)


class StochasticDepthPolicy(Policy):
    """Stochastic depth: 1 - (l / L) (1 - theta(t)); the last layer is kept with theta(t) (docs/method.md 4; Huang).

    >>> StochasticDepthPolicy(Constant(0.5), num_layers=4).keep_probs(1).tolist()
    [0.875, 0.75, 0.625, 0.5]
    """

    def _keep_probs(self, theta: float) -> NDArray[np.float64]:
        return 1.0 - np.arange(1, self.num_layers + 1) / self.num_layers * (1.0 - theta)


class StagedPolicy(Policy):
    """Staged growth: a few layers run at first, all of them in the end (docs/method.md 8; arXiv 2511.04981).

    stages: [share of the iterations at which it ends, number of layers that run until then], for each stage.
    stage_layers, ranks, sensitivity: as in Stages.resolve.
    train_iters: T.

    >>> policy = StagedPolicy([[0.6, 1], [1.0, 4]], num_layers=4, train_iters=10)
    >>> policy.keep_probs(6).tolist(), policy.keep_probs(7).tolist()
    ([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    """

    uses_theta = False

    def __init__(
        self,
        stages: Sequence[Sequence[float]] | Stages,
        num_layers: int,
        *,
        train_iters: int,
        stage_layers: StageLayers = "spread",
        ranks: Sequence[Sequence[int]] | None = None,
        sensitivity: ArrayLike | None = None,
        **common: Any,
    ) -> None:
        if not isinstance(stages, Stages):
            stages = Stages.resolve(stages, num_layers, train_iters, stage_layers, ranks=ranks, sensitivity=sensitivity)
        super().__init__(Constant(1.0), num_layers, stages=stages, train_iters=train_iters, **common)

    def _keep_probs(self, theta: float) -> NDArray[np.float64]:
        return np.ones(self.num_layers)


class FullDepthPolicy(Policy):
    """Policy none: every layer is kept, always."""

    uses_theta = False

    def __init__(self, num_layers: int, **common: Any) -> None:
        super().__init__(Constant(1.0), num_layers, **common)

    def _keep_probs(self, theta: float) -> NDArray[np.float64]:
        return np.ones(self.num_layers)


def mean_keep_prob(policy: Policy, iterations: Iterable[int]) -> float:
    """Mean keep probability over layers and over the given iterations, e.g. range(1, T + 1)."""
    means = [float(policy.keep_probs(iteration).mean()) for iteration in iterations]
    if not means:
        raise ValueError("iterations is empty: it must have at least one iteration")
    return math.fsum(means) / len(means)


def _first_recovery_iteration(recovery_fraction: float, train_iters: int | None) -> float:
    check_number("recovery_fraction", recovery_fraction, "[0, 1]")
    if recovery_fraction == 0.0:
        return math.inf
    if train_iters is None:
        raise ValueError(f"recovery_fraction = {recovery_fraction!r} needs train_iters, the length of the run")
    check_integer("train_iters", train_iters, 1)
    # Rounded before it is rounded up, because 0.1 * 30 is 3.0000000000000004.
    recovery_iterations = max(1, math.ceil(round(recovery_fraction * train_iters, 6)))
    return train_iters - recovery_iterations + 1


def _checked_sensitivity(sensitivity: ArrayLike) -> NDArray[np.float64]:
    values = check_layer_values("sensitivity", sensitivity)
    values.flags.writeable = False
    return values
