"""What a drop section gains over the undropped baseline in a run.

A run's iterations are sampled at equal distances, of a run with stages (method/stages.py) those of each
stage, with the very decisions that it will take, in every replica. Their mean time, corrected for how many layers the
sampled decisions happen to keep more or less than expected (a control variate), gives gain, hours and GPU hours. Every
iteration counts as one of a full global batch, also during a batch-size ramp; with sensitivity_update dynamic the
sensitivity counts as what the file says throughout.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sbld.config.flops import attention_share, ideal_speedup, layer_share
from megatron_sbld.config.stages import placement_of
from megatron_sbld.config.tokens import tokens_of
from megatron_sbld.config.validate import train_iterations
from megatron_sbld.forecast.drops import spread_iterations
from megatron_sbld.forecast.stages import drawn_shares
from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.layout.placement import Placement, even_placement
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.config import DropConfig, fields_of
from megatron_sbld.method.in_force import dropped_update, drops, drops_tokens, uses_theta
from megatron_sbld.method.policy import Policy
from megatron_sbld.method.work import Work
from megatron_sbld.predict.calibration import calibrate
from megatron_sbld.predict.iteration import IterationModel, IterationTimes, Setup
from megatron_sbld.predict.memory import most_memory

ASSUMED_MFU = 0.4
"""Where no throughput is given; what well-tuned Megatron runs of these sizes report (arXiv 2104.04473, 2205.05198)."""

LOWEST_THETA = 0.4
"""The paper's recommended range of theta is [0.4, 1] (docs/method.md section 1)."""

_SAMPLED = 500  # iterations of a run that are simulated
_SAMPLED_ROWS = 2**16  # microbatches whose decisions are drawn, where each has its own
_SAMPLED_REPLICAS = 8  # with more that decide for themselves, fewer iterations are sampled
_FEWEST_SAMPLED = 32
_NO_SPREAD = 1e-24  # mean square of shares of layers: rounding alone


@dataclass(frozen=True, kw_only=True)
class StagePrediction:
    """A part of a run in which the same layers have begun: iterations `first` to `last`, both included."""

    first: int
    last: int
    begun_layers: int
    mean_keep_prob: float
    ideal_gain: float
    gain: float
    gain_stderr: float
    lost_to_imbalance: float
    waiting: float
    """Share of the time of passes in which a pipeline rank waits: the bubble, other ranks, transfers, parameters."""
    iteration_s: float
    hours: float
    memory_gb: list[float]
    """Of each pipeline rank at most, every layer that has begun being kept."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a drop section does to a run. Gains are throughput over the undropped model's, less 1."""

    policy: str
    theta: float | None
    """None where the section's theta has no effect."""
    sampler: str | None
    """With the number of stages that it balances, where that is set; None for policy staged, which draws nothing."""
    layout: str
    """Which layers the stages hold, in Megatron's notation."""
    mean_keep_prob: float
    kept_fraction: float
    """Of the sampled iterations' layers; where tokens are dropped, of their FLOPs."""
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
    stages: list[StagePrediction]
    """Empty for a run without stages."""


@dataclass(frozen=True)
class _Part:
    """Some simulated iterations of a run that stand for all from `first` to `last`."""

    first: int
    last: int
    mean: float
    """Expected seconds of an iteration."""
    stderr: float
    even: float
    """Mean seconds if the same work were spread evenly; `drawn` without that."""
    drawn: float
    """Mean seconds as drawn."""
    mean_keep_prob: float
    mean_flops: float
    """Expected share of the layers' FLOPs: mean_keep_prob unless tokens are dropped."""
    kept_fraction: float
    waiting: float

    @property
    def length(self) -> int:
        return self.last - self.first + 1


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

    def policy(self, drop: DropConfig, placement: Placement | None = None) -> Policy:
        """The policy of a drop section in this run; stages share out their layers on a placement, or the config's."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the config's own are shown once, when it is read
            config = self.setup.config
            ranks = (placement or placement_of(config)).stages
            return build_policy(drop, config.model.num_layers, self.train_iters, ranks=ranks)

    def work(self, drop: DropConfig, policy: Policy) -> Work:
        """What a drop section's policy and tokens leave the layers to do in this run."""
        config = self.setup.config
        return Work(policy, tokens_of(config, self.train_iters, drop), attention_share(config.model))

    def predict(self, drop: DropConfig, placement: Placement | None = None) -> Prediction:
        """What a drop section gains over the undropped model on the setup's placement.

        placement: that the layers are dropped on; None is the setup's.
        """
        model = self.model if placement is None else self.on(placement)
        policy = self.policy(drop, model.setup.placement)
        parts = [self._part(model, drop, policy, *span) for span in self._spans(drop, policy)]
        weights = [part.length / self.train_iters for part in parts]

        def over_run(values: Iterable[float]) -> float:
            return math.fsum(weight * value for weight, value in zip(weights, values, strict=True))

        mean = over_run(part.mean for part in parts)
        stderr = math.hypot(*(weight * part.stderr for weight, part in zip(weights, parts, strict=True)))
        gain = self.baseline_s / mean - 1.0
        mean_keep_prob = min(over_run(part.mean_keep_prob for part in parts), 1.0)
        mean_flops = min(over_run(part.mean_flops for part in parts), 1.0)
        sampler = drop.sampler + (f" {drop.balance_stages}" if drop.balance_stages else "")
        return Prediction(
            policy="tokens" if drop.policy == "none" and drops_tokens(drop) else drop.policy,
            theta=drop.theta if uses_theta(drop) else None,
            sampler=None if drop.policy in ("none", "staged") and drops(drop) else sampler,
            layout=model.setup.placement.layout,
            mean_keep_prob=mean_keep_prob,
            kept_fraction=over_run(part.kept_fraction for part in parts),
            ideal_gain=ideal_speedup(self.phi, mean_flops) - 1.0,
            gain=gain,
            gain_stderr=(1.0 + gain) * stderr / mean,
            lost_to_imbalance=1.0 - over_run(part.even for part in parts) / over_run(part.drawn for part in parts),
            iteration_s=mean,
            tokens_per_s=self.setup.tokens / mean,
            hours=self.hours(mean),
            gpu_hours=self.hours(mean) * self.setup.gpus,
            stages=[] if policy.stages is None else [self._stage(model, policy, part) for part in parts],
        )

    def _spans(self, drop: DropConfig, policy: Policy) -> list[tuple[int, int, list[int]]]:
        """First, last and simulated iterations of each part of the run in which the same layers have begun."""
        sampled = self.sampled(drop)
        if policy.stages is None:
            return [(1, self.train_iters, sampled)]
        found = []
        for first, last in spans(policy, self.train_iters):
            share = (last - first + 1) / self.train_iters
            draws = drop.policy != "staged" or drops_tokens(drop)
            count = 1 if not draws else max(_FEWEST_SAMPLED, round(share * len(sampled)))
            found.append((first, last, spread_iterations(first, last, count).tolist()))
        return found

    def _part(
        self, model: IterationModel, drop: DropConfig, policy: Policy, first: int, last: int, iterations: list[int]
    ) -> _Part:
        replicas = self.shares(drop, policy, iterations, model.setup.placement)
        freezes, waiting = dropped_update(drop) == "freeze", _waiting(policy, iterations)
        found = model.times(replicas, freezes=freezes, waiting=waiting)
        times = even = found.total
        if model.num_ranks > 1:
            even = model.times(replicas, evenly=True, freezes=freezes, waiting=waiting).total
        work, kept = self.work(drop, policy), _kept(replicas)
        means = [policy.keep_probs(iteration) for iteration in iterations]
        flops = [work.flops(iteration) for iteration in iterations]
        mean, stderr = _expected(times, kept - np.mean(flops, axis=1))
        busy = found.run.busy.sum(axis=-1) / model.num_ranks
        return _Part(
            first=first,
            last=last,
            mean=mean,
            stderr=stderr,
            even=float(even.mean()),
            drawn=float(times.mean()),
            mean_keep_prob=float(np.mean(means)),
            mean_flops=float(np.mean(flops)),
            kept_fraction=float(kept.mean()),
            waiting=float((1.0 - busy / found.run.end).mean()),
        )

    def _stage(self, model: IterationModel, policy: Policy, part: _Part) -> StagePrediction:
        begun = policy.begun_layers(part.last)
        gain = self.baseline_s / part.mean - 1.0
        return StagePrediction(
            first=part.first,
            last=part.last,
            begun_layers=len(begun),
            mean_keep_prob=part.mean_keep_prob,
            ideal_gain=ideal_speedup(self.phi, min(part.mean_flops, 1.0)) - 1.0,
            gain=gain,
            gain_stderr=(1.0 + gain) * part.stderr / part.mean,
            lost_to_imbalance=1.0 - part.even / part.drawn,
            waiting=part.waiting,
            iteration_s=part.mean,
            hours=part.length * part.mean / 3600,
            memory_gb=most_memory(model, begun),
        )

    def iteration_s(self, drop: DropConfig, placement: Placement, iterations: list[int]) -> float:
        """Mean seconds of some iterations of the run on a placement."""
        model, policy = self.on(placement), self.policy(drop, placement)
        replicas = self.shares(drop, policy, iterations, placement)
        work = self.work(drop, policy)
        means = [work.flops(iteration) for iteration in iterations]
        freezes = dropped_update(drop) == "freeze"
        times = model.times(replicas, freezes=freezes, waiting=_waiting(policy, iterations)).total
        return _expected(times, _kept(replicas) - np.mean(means, axis=1))[0]

    def hours(self, iteration_s: float) -> float:
        """Of the run."""
        return self.train_iters * iteration_s / 3600

    def on(self, placement: Placement) -> IterationModel:
        """The same hardware with other stages."""
        return IterationModel(dataclasses.replace(self.setup, placement=placement), self.efficiency)

    def shares(
        self, drop: DropConfig, policy: Policy, iterations: list[int], placement: Placement, *, held: bool = False
    ) -> list[Floats]:
        """What share of each microbatch the layers run, [n, m or 1, L] for each replica that decides for itself.

        Where tokens are dropped it is their share of the layer's FLOPs, or of what the layer holds (`held`).
        """
        config, work = self.setup.config, self.work(drop, policy)
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
                    * (work.token_shares(iteration) if held else work.flops_of(work.token_shares(iteration)))
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


def spans(policy: Policy, train_iters: int) -> list[tuple[int, int]]:
    """First and last iteration of each stage; the whole run without stages."""
    if policy.stages is None:
        return [(1, train_iters)]
    starts = [1, *(end + 1 for end in policy.stages.ends[:-1])]
    return [(first, last) for first, last in zip(starts, policy.stages.ends, strict=True) if first <= last]


def _waiting(policy: Policy, iterations: list[int]) -> NDArray[np.bool_] | None:
    """Layers that have not begun, [n, L]; None without stages."""
    if policy.stages is None:
        return None
    return np.array([policy.stages.gate(iteration) == 0 for iteration in iterations])


def _kept(replicas: list[Floats]) -> Floats:
    """Share of the layers that run, [n]: shares of the microbatches [n, m or 1, L] of each replica."""
    return np.asarray(np.mean([shares.mean(axis=(-1, -2)) for shares in replicas], axis=0))


def _expected(times: Floats, surplus: Floats) -> tuple[float, float]:
    """Mean time at a surplus of 0 and its standard error: where a line through the pairs (surplus, time) is there.

    times: [n].  surplus: by how much more than expected an iteration keeps; its expectation is 0, [n].
    """
    spread = float(np.sum((surplus - surplus.mean()) ** 2))
    slope = 0.0 if spread < _NO_SPREAD * len(times) else float(np.sum((surplus - surplus.mean()) * times)) / spread
    corrected = times - slope * surplus
    apart = corrected - corrected[0]  # so that equal times have exactly their mean
    return float(corrected[0] + apart.mean()), float(apart.std()) / math.sqrt(len(times))


def compared_sections(drop: DropConfig, thetas: tuple[float, ...] = (0.9, 0.7, 0.5)) -> list[DropConfig]:
    """Drop sections of every policy at some thetas: the config's own as it is, the others with their defaults.

    SBLD is among them where the config names a sensitivity file. The config's stages are its own section's alone; that
    is there once where theta has no effect on it.
    """
    names = ["sampler", "decision_scope", "granularity", "dropped_update", "recovery_fraction", "seed"]
    if drop.sampler == "balanced":  # else it shares out the layers of stages, which the others have not
        names.append("balance_stages")
    if drops_tokens(drop):
        names += sorted(fields_of("token"))
    common = {name: getattr(drop, name) for name in names}
    sections = [drop] if drops(drop) and not uses_theta(drop) else []
    for policy in ("sbld", "pld", "layerdrop", "stochastic_depth"):
        if policy == drop.policy:
            if not uses_theta(drop):
                continue
            base = drop
        elif policy == "sbld":
            if drop.sensitivity is None:
                continue
            base = DropConfig(policy="sbld", sensitivity=drop.sensitivity, interpolate=drop.interpolate, **common)
        else:
            base = DropConfig(policy=policy, **common)  # type: ignore[arg-type]
        sections += [dataclasses.replace(base, theta=theta) for theta in thetas if theta <= (base.peak_theta or 1.0)]
    return sections
