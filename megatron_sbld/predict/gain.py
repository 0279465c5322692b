"""Calibration on the undropped baseline, and what a drop section gains over it in a run.

One number is calibrated, the share of the peak that matrix products reach, so that the undropped model has the given
throughput. A run's iterations are sampled at equal distances, with the very decisions that it will take, in every
replica. Their mean time, corrected for how many layers the sampled decisions happen to keep more or less than expected
(a control variate), gives gain, hours and GPU hours. Every iteration counts as one of a full global batch, also during
a batch-size ramp; with sensitivity_update dynamic the sensitivity counts as what the file says throughout.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from megatron_sbld.checks import check_number
from megatron_sbld.config.flops import ideal_speedup, layer_share, model_flops_per_token
from megatron_sbld.config.stages import placement_of
from megatron_sbld.config.validate import train_iterations
from megatron_sbld.forecast.drops import spread_iterations
from megatron_sbld.forecast.stages import drawn_shares
from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.layout.placement import Placement, even_placement
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.in_force import dropped_update
from megatron_sbld.method.policy import Policy, SBLDPolicy
from megatron_sbld.predict.iteration import IterationModel, IterationTimes, Setup

ASSUMED_MFU = 0.4
"""Where no throughput is given; what well-tuned Megatron runs of these sizes report (arXiv 2104.04473, 2205.05198)."""

LOWEST_THETA = 0.4
"""The paper's recommended range of theta is [0.4, 1] (docs/method.md section 1)."""

_SAMPLED = 500  # iterations of a run that are simulated
_SAMPLED_ROWS = 2**16  # microbatches whose decisions are drawn, where each has its own
_SAMPLED_REPLICAS = 8  # with more that decide for themselves, fewer iterations are sampled
_FEWEST_SAMPLED = 32
_LOWEST_EFFICIENCY = 1e-6


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a drop section does to a run. Gains are throughput over the undropped model's, less 1."""

    policy: str
    theta: float
    sampler: str
    """With the number of stages that it balances, where that is set."""
    layout: str
    """Which layers the stages hold, in Megatron's notation."""
    mean_keep_prob: float
    kept_fraction: float
    """Of the sampled iterations' layers."""
    ideal_gain: float
    """If a dropped layer cost nothing and the rest stayed as it is by FLOPs (docs/method.md section 7)."""
    gain: float
    gain_stderr: float
    """Of sampling iterations; says nothing about the model's own error."""
    lost_to_imbalance: float
    """Share of the iterations' time that the same work, spread evenly over the stages, would save. Part of it is the
    output layer's, which makes the last stage busier with nothing dropped as well."""
    iteration_s: float
    tokens_per_s: float
    hours: float
    gpu_hours: float


class Predictor:
    """A calibrated setup."""

    def __init__(self, setup: Setup, tokens_per_s: float) -> None:
        """tokens_per_s: the undropped model's throughput on all GPUs. Raises ValueError if no efficiency gives it."""
        self.setup = setup
        self.efficiency = calibrate(setup, tokens_per_s)
        self.model = IterationModel(setup, self.efficiency)
        self.baseline: IterationTimes = self.model.undropped
        config = setup.config
        self.train_iters = train_iterations(config)
        recompute = config.training.recompute_granularity == "full"
        self.phi = layer_share(config.model, setup.vocab_size, recompute=recompute)

    @property
    def baseline_s(self) -> float:
        """Seconds of an undropped iteration."""
        return float(self.baseline.total[0])

    @property
    def baseline_imbalance(self) -> float:
        """`Prediction.lost_to_imbalance` of an undropped iteration."""
        if self.setup.placement.num_ranks == 1:
            return 0.0
        every = np.ones((1, 1, self.setup.config.model.num_layers))
        return 1.0 - float(self.model.times([every], evenly=True).total[0]) / self.baseline_s

    def policy(self, drop: DropConfig) -> Policy:
        """The policy of a drop section in this run."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the config's own are shown once, when it is read
            config = self.setup.config
            return build_policy(drop, config.model.num_layers, self.train_iters, ranks=placement_of(config).stages)

    def predict(self, drop: DropConfig, placement: Placement | None = None) -> Prediction:
        """What a drop section gains over the undropped model on the setup's placement.

        placement: that the layers are dropped on; None is the setup's.
        """
        model = self.model if placement is None else self.on(placement)
        policy, iterations = self.policy(drop), self.sampled(drop)
        replicas = self.shares(drop, policy, iterations, model.setup.placement)
        freezes = dropped_update(drop) == "freeze"
        times = model.times(replicas, freezes=freezes).total
        even = times if model.num_ranks == 1 else model.times(replicas, evenly=True, freezes=freezes).total
        means = [policy.keep_probs(iteration) for iteration in iterations]
        kept = _kept(replicas)
        mean, stderr = _expected(times, kept - np.mean(means, axis=1))
        gain = self.baseline_s / mean - 1.0
        mean_keep_prob = min(float(np.mean(means)), 1.0)
        return Prediction(
            policy=drop.policy,
            theta=drop.theta,
            sampler=drop.sampler + (f" {drop.balance_stages}" if drop.balance_stages else ""),
            layout=model.setup.placement.layout,
            mean_keep_prob=mean_keep_prob,
            kept_fraction=float(kept.mean()),
            ideal_gain=ideal_speedup(self.phi, mean_keep_prob) - 1.0,
            gain=gain,
            gain_stderr=(1.0 + gain) * stderr / mean,
            lost_to_imbalance=1.0 - float(even.mean() / times.mean()),
            iteration_s=mean,
            tokens_per_s=self.setup.tokens / mean,
            hours=self.hours(mean),
            gpu_hours=self.hours(mean) * self.setup.gpus,
        )

    def iteration_s(self, drop: DropConfig, placement: Placement, iterations: list[int]) -> float:
        """Mean seconds of some iterations of the run on a placement."""
        model, policy = self.on(placement), self.policy(drop)
        replicas = self.shares(drop, policy, iterations, placement)
        means = [policy.keep_probs(iteration) for iteration in iterations]
        times = model.times(replicas, freezes=dropped_update(drop) == "freeze").total
        return _expected(times, _kept(replicas) - np.mean(means, axis=1))[0]

    def hours(self, iteration_s: float) -> float:
        """Of the run."""
        return self.train_iters * iteration_s / 3600

    def on(self, placement: Placement) -> IterationModel:
        """The same hardware with other stages."""
        return IterationModel(dataclasses.replace(self.setup, placement=placement), self.efficiency)

    def shares(self, drop: DropConfig, policy: Policy, iterations: list[int], placement: Placement) -> list[Floats]:
        """What share of each microbatch the layers run, [n, m or 1, L] for each replica that decides for itself."""
        config = self.setup.config
        stages = placement.stages
        if drop.balance_stages is not None:
            stages = even_placement(config.model.num_layers, drop.balance_stages).stages
        by_sample = drop.granularity == "sample"
        rows = self.setup.num_microbatches if drop.decision_scope == "microbatch" else 1
        samples = config.training.micro_batch_size if by_sample else 1
        return [
            np.array(
                [
                    drawn_shares(drop, policy.keep_probs(iteration), iteration, rows, stages, samples, replica)
                    for iteration in iterations
                ]
            )
            for replica in range(self.distinct_replicas(drop))
        ]

    def distinct_replicas(self, drop: DropConfig) -> int:
        """How many replicas decide for themselves; all are simulated, since the slowest decides."""
        return self.setup.replicas if drop.replicas == "distinct" and drop.granularity != "sample" else 1

    def sampled(self, drop: DropConfig) -> list[int]:
        """Iterations of the run that are simulated."""
        count = _SAMPLED
        if drop.decision_scope == "microbatch":
            count = min(count, _SAMPLED_ROWS // self.setup.num_microbatches)
        count = min(count, count * _SAMPLED_REPLICAS // self.distinct_replicas(drop))
        count = max(_FEWEST_SAMPLED, count)
        return spread_iterations(1, self.train_iters, count).tolist()


def _kept(replicas: list[Floats]) -> Floats:
    """Share of the layers that run, [n]: shares of the microbatches [n, m or 1, L] of each replica."""
    return np.asarray(np.mean([shares.mean(axis=(-1, -2)) for shares in replicas], axis=0))


def _expected(times: Floats, surplus: Floats) -> tuple[float, float]:
    """Mean time at a surplus of 0 and its standard error: where a line through the pairs (surplus, time) is there.

    times: [n].  surplus: by how much more than expected an iteration keeps; its expectation is 0, [n].
    """
    spread = float(np.sum((surplus - surplus.mean()) ** 2))
    slope = 0.0 if spread == 0.0 else float(np.sum((surplus - surplus.mean()) * times)) / spread
    corrected = times - slope * surplus
    apart = corrected - corrected[0]  # so that equal times have exactly their mean
    return float(corrected[0] + apart.mean()), float(apart.std()) / math.sqrt(len(times))


def calibrate(setup: Setup, tokens_per_s: float) -> float:
    """Share of the peak that matrix products reach for the undropped model to have this throughput, (0, 1].

    Raises ValueError where memory and communication alone, or products at the peak, take longer than that.
    """
    check_number("tokens_per_s", tokens_per_s, "(0, inf)")
    target = setup.tokens / tokens_per_s

    def excess(log_efficiency: float) -> float:
        return math.log(float(IterationModel(setup, math.exp(log_efficiency)).undropped.total[0]) / target)

    at_peak = excess(0.0)
    if at_peak > 0:
        raise ValueError(
            f"baseline of {tokens_per_s:,.0f} tokens/s is not allowed: with matrix products at the full peak of "
            f"{setup.hardware.name} this model allows {tokens_per_s / math.exp(at_peak):,.0f} at most; check the "
            "throughput (of all GPUs together), the bandwidths and the overlaps"
        )
    lowest = math.log(_LOWEST_EFFICIENCY)
    if excess(lowest) < 0:
        raise ValueError(f"baseline of {tokens_per_s:,.6f} tokens/s is not allowed: below a millionth of the peak")
    return math.exp(brentq(excess, lowest, 0.0, xtol=1e-9))


def mfu_tokens_per_s(setup: Setup, mfu: float) -> float:
    """Tokens/s of all GPUs at a model FLOPs utilisation (Megatron-LM's count of FLOPs, without recomputation)."""
    check_number("mfu", mfu, "(0, 1]")
    flops = model_flops_per_token(setup.config.model, setup.vocab_size)
    return mfu * setup.hardware.peak * setup.gpus / flops


@dataclass(frozen=True, kw_only=True)
class Target:
    """What `--target_gain` proposes."""

    target: float
    drop: DropConfig
    """With the theta, and lists, that come closest."""
    prediction: Prediction
    reached: bool
    note: str
    block_layers: list[int]
    allow_layers: list[int]


def find_target(predictor: Predictor, drop: DropConfig, target: float) -> Target:
    """The largest theta at which a drop section gains at least `target`, by bisection over its allowed range.

    Where no theta in [0.4, 1] gains it, SBLD's lists are changed within the paper's 10 to 20 % of the layers: more in
    the Allow list and fewer in the Block list. Where the least that it can gain is more, the Allow list shrinks.

    Raises ValueError for policy none or a target out of range.
    """
    check_number("target_gain", target, "(0, 10)")
    if drop.policy == "none":
        raise ValueError("--target_gain needs drop.policy sbld, pld, layerdrop or stochastic_depth: none drops nothing")
    note = ""
    highest = min(1.0, drop.peak_theta or 1.0)
    lowest = min(LOWEST_THETA, highest)
    most = _at(predictor, drop, lowest)
    if most.gain < target and _lists_are_free(drop):
        wider = dataclasses.replace(drop, block_fraction=0.10, allow_fraction=0.20)
        if (found := _at(predictor, wider, lowest)).gain > most.gain:
            drop, most = wider, found
            note = "with the lists as configured no theta gains it; Block 10 % and Allow 20 % of the layers"
    if most.gain < target:
        note = f"cannot be reached: theta = {lowest} gains {most.gain:+.1%}, and the paper recommends none below"
        return _target(predictor, drop, target, lowest, False, note)
    least = _at(predictor, drop, highest)
    if least.gain >= target and _lists_are_free(drop):
        for fraction in (each for each in (0.10, 0.05, 0.0) if each < drop.allow_fraction):
            narrower = dataclasses.replace(drop, allow_fraction=fraction)
            if (found := _at(predictor, narrower, highest)).gain < target:
                drop, least = narrower, found
                note = f"the Allow list as configured gains more by itself; Allow {fraction:.0%} of the layers"
                break
    if least.gain >= target:
        note = f"theta = {highest:g} already gains {least.gain:+.1%}"
        return _target(predictor, drop, target, highest, True, note)
    low, high = lowest, highest  # gains at low reach the target, at high they do not
    while high - low > 5e-4:
        middle = (low + high) / 2
        if _at(predictor, drop, middle).gain >= target:
            low = middle
        else:
            high = middle
    return _target(predictor, drop, target, low, True, note)


def _at(predictor: Predictor, drop: DropConfig, theta: float) -> Prediction:
    return predictor.predict(dataclasses.replace(drop, theta=theta))


def _lists_are_free(drop: DropConfig) -> bool:
    return drop.policy == "sbld" and drop.block_layers is None and drop.allow_layers is None


def _target(predictor: Predictor, drop: DropConfig, target: float, theta: float, reached: bool, note: str) -> Target:
    chosen = dataclasses.replace(drop, theta=theta)
    policy = predictor.policy(chosen)
    lists = (policy.block_layers, policy.allow_layers) if isinstance(policy, SBLDPolicy) else ((), ())
    return Target(
        target=target,
        drop=chosen,
        prediction=predictor.predict(chosen),
        reached=reached,
        note=note,
        block_layers=list(lists[0]),
        allow_layers=list(lists[1]),
    )


def compared_sections(drop: DropConfig, thetas: tuple[float, ...] = (0.9, 0.7, 0.5)) -> list[DropConfig]:
    """Drop sections of every policy at some thetas: the config's own as it is, the others with their defaults.

    SBLD is among them where the config names a sensitivity file.
    """
    common = {
        name: getattr(drop, name)
        for name in (
            "sampler",
            "balance_stages",
            "decision_scope",
            "granularity",
            "dropped_update",
            "recovery_fraction",
            "seed",
        )
    }
    sections = []
    for policy in ("sbld", "pld", "layerdrop", "stochastic_depth"):
        if policy == drop.policy:
            base = drop
        elif policy == "sbld":
            if drop.sensitivity is None:
                continue
            base = DropConfig(policy="sbld", sensitivity=drop.sensitivity, interpolate=drop.interpolate, **common)
        else:
            base = DropConfig(policy=policy, **common)  # type: ignore[arg-type]
        sections += [dataclasses.replace(base, theta=theta) for theta in thetas if theta <= (base.peak_theta or 1.0)]
    return sections
