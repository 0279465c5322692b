"""One rank's part of realised_gain.py: the trainer's model and step in alternating blocks, timed."""

from __future__ import annotations

import argparse
import functools
import itertools
import time
import unittest.mock
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches

from benchmarks.common.gain_plan import Case, Pair, all_cases, count_iterations, plan_rounds
from benchmarks.common.gain_report import Overhead
from benchmarks.common.layer_times import ModuleTimer
from benchmarks.common.layouts import FIRST_STAGE, TOKENS
from benchmarks.common.model import DISTINCT_BATCHES, SwitchedModel, random_batches
from benchmarks.common.rounds import Deadline, progress_bar
from megatron_sbld.config.flops import attention_share
from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController
from megatron_sbld.mcore import make_switchable
from megatron_sbld.method.policy import FullDepthPolicy, LayerDropPolicy, Policy
from megatron_sbld.method.stages import Stages
from megatron_sbld.method.tokens import TokenDrop
from megatron_sbld.training.model import build_optimizer, build_param_scheduler
from megatron_sbld.training.step import train_step

TOKEN_STEP = 16
OVERHEAD_ITERATIONS = 256  # a multiple of the controller's window, so that its share of exchanges is counted


def run_length(args: argparse.Namespace, samplers: Sequence[str]) -> int:
    """Iterations of a run."""
    cases = all_cases(args.keep_probs, samplers)
    return count_iterations(cases, args.rounds, block_iterations=args.block_iterations, warmup=args.warmup)


@dataclass
class RankMeasurement:
    """What one rank measured; in seconds."""

    stage: int
    rounds: int = 0
    undropped: dict[Case, list[float]] = field(default_factory=dict)  # block times, [rounds]
    dropped: dict[Case, list[float]] = field(default_factory=dict)
    kept: dict[Case, list[list[list[float]]]] = field(default_factory=dict)  # [rounds, iterations, L]
    timed_iterations: list[float] = field(default_factory=list)
    # [rounds * pairs, layers on this stage + 1, 2]: layers and then the whole stage; forward and backward
    pass_times: list[list[tuple[float, float]]] = field(default_factory=list)
    overhead: Overhead = field(default_factory=lambda: Overhead(0.0, 0.0, 0))


@dataclass(frozen=True, kw_only=True)
class GivenTokens(TokenDrop):
    """As many tokens as is listed for an iteration, and all of them in the others."""

    counts: tuple[tuple[int, int], ...]

    def tokens(self, iteration: int) -> int:
        """r(t)"""
        return dict(self.counts).get(iteration, self.seq_length)


class FirstStage(Policy):
    """The same layers run whenever theta(t) is the same: theta(t) of them, spread evenly; nothing freezes the others.

    So the optimizer steps them, as in undropped blocks: a staged run, which freezes them, saves that as well.
    """

    def _keep_probs(self, theta: float) -> np.ndarray:
        return _first_stage(max(round(theta * self.num_layers), 1), self.num_layers)


@functools.cache
def _first_stage(count: int, num_layers: int) -> np.ndarray:
    return Stages.resolve([[0.0, count], [1.0, num_layers]], num_layers, 1).gate(0)


class Run:
    """The parts of the trainer that run here, and the iteration that it is at."""

    def __init__(self, args: argparse.Namespace, config: Config, samplers: Sequence[str]) -> None:
        self.args = args
        self.config = config
        self.num_iterations = run_length(args, samplers)
        self.num_microbatches = get_num_microbatches()
        self.iteration = 0
        self.rounds = plan_rounds(
            all_cases(args.keep_probs, samplers),
            args.rounds,
            block_iterations=args.block_iterations,
            warmup=args.warmup,
            seed=args.seed,
        )
        # All ranks know the keep_prob of every iteration beforehand, as the controller's check of a window requires.
        self.theta = {t: pair.case.keep_prob for pairs in self.rounds for pair in pairs for t in pair.dropped}
        self.controllers = {sampler: self.build_controller(sampler) for sampler in samplers}
        self.controller = self.controllers[samplers[0]]
        self.model = SwitchedModel(config, args.vocab_size, self.controller)
        self.optimizer = build_optimizer(config, self.model.chunks)
        self.scheduler = build_param_scheduler(config, self.optimizer, RunLength(config.training))
        seed = args.seed + parallel_state.get_data_parallel_rank()
        self.batches = itertools.cycle(random_batches(args, DISTINCT_BATCHES * self.num_microbatches, seed))

    def build_controller(self, sampler: str) -> DropController:
        """The keep probabilities are the same for all samplers; the balanced one balances the pipeline's stages."""
        if sampler == TOKENS:
            return self.build_token_controller()
        kind = FirstStage if sampler == FIRST_STAGE else LayerDropPolicy
        policy = kind(lambda t: self.theta.get(t, 1.0), self.config.model.num_layers)
        stages = self.config.parallel.pipeline_model_parallel_size if sampler == "balanced" else None
        drawn = "bernoulli" if sampler == FIRST_STAGE else sampler
        return DropController(policy, seed=self.args.seed, sampler=drawn, stages=stages)

    def build_token_controller(self) -> DropController:
        """keep_prob is the share of each sample's tokens that all layers but the first and the last run."""
        num_layers, length = self.config.model.num_layers, self.config.model.seq_length
        counts = {t: round(share * length / TOKEN_STEP) * TOKEN_STEP for t, share in self.theta.items()}
        tokens = GivenTokens(
            seq_length=length,
            layers=tuple(range(2, num_layers)),
            min_tokens=TOKEN_STEP,
            step=TOKEN_STEP,
            iterations=1,
            counts=tuple(sorted(counts.items())),
        )
        policy = FullDepthPolicy(num_layers)
        return DropController(policy, seed=self.args.seed, granularity="token", tokens=tokens)

    def kept(self) -> list[float]:
        """Share of its time that each layer should take in the present iteration, by FLOPs."""
        if self.controller.tokens is None:
            return [float(kept) for kept in self.controller.plan[0]]
        share = attention_share(self.config.model)
        kept, attended = (shares[0] for shares in (self.controller.kept_shares, self.controller.attended_shares))
        return [float(value) for value in (1.0 - share) * kept + share * attended]

    def measure(self, name: str) -> RankMeasurement:
        """Warm up, run all rounds, and time the calls that switchable layers add."""
        result = RankMeasurement(stage=parallel_state.get_pipeline_model_parallel_rank())
        for chunk in self.model.chunks:
            chunk.train()
        with progress_bar() as progress:
            task = progress.add_task(name, total=self.num_iterations)
            self.block(self.args.warmup - 1, switchable=False)
            self.block(1, switchable=True)  # compiled layers have a graph for each of their classes
            deadline = Deadline(self.args.minutes)
            for pairs in self.rounds:
                for pair in pairs:
                    self.measure_pair(pair, result)
                    progress.update(task, completed=self.iteration)
                if deadline.round_done():
                    break
        result.rounds = deadline.rounds
        result.overhead = self.time_added_calls()
        return result

    def measure_pair(self, pair: Pair, result: RankMeasurement) -> None:
        """An undropped and a dropped block, and an iteration whose layers are timed."""
        self.use_sampler(pair.case.sampler)
        for switchable in (False, True) if pair.undropped_first else (True, False):
            seconds, kept = self.block(self.args.block_iterations, switchable)
            (result.dropped if switchable else result.undropped).setdefault(pair.case, []).append(seconds)
            if switchable:
                result.kept.setdefault(pair.case, []).append(kept)
        self.timed_iteration(result)

    def use_sampler(self, sampler: str) -> None:
        """Give the layers to the sampler's controller."""
        if self.controller is not self.controllers[sampler]:
            self.controller = self.controllers[sampler]
            make_switchable(self.model.chunks, self.controller)

    def block(self, iterations: int, switchable: bool) -> tuple[float, list[list[float]]]:
        """Seconds of a block, and the decisions of its iterations: none if its layers are stock ones."""
        self.model.switch(switchable)
        kept = []
        dist.barrier()
        began = time.perf_counter()
        for _ in range(iterations):
            self.iteration += 1
            if switchable:
                self.controller.begin_iteration(self.iteration, self.num_microbatches)
                kept.append(self.kept())
            batches = itertools.islice(self.batches, self.num_microbatches)
            # It ends with the losses on the CPU, so a GPU has then done everything.
            outcome = train_step(self.config, self.model.chunks, self.optimizer, [batches], stop_requested=False)
            assert outcome.update_successful, "an update is only skipped in fp16"
            self.scheduler.step(increment=self.args.global_batch_size)
        return time.perf_counter() - began, kept

    def timed_iteration(self, result: RankMeasurement) -> None:
        """One undropped iteration in which each layer's passes are timed, and the whole stage's."""
        with ExitStack() as stack:
            timers = [stack.enter_context(ModuleTimer(layer, is_layer=True)) for layer in self.model.layers]
            timers += [stack.enter_context(ModuleTimer(chunk, is_layer=False)) for chunk in self.model.chunks]
            seconds, _ = self.block(1, switchable=False)
        result.timed_iterations.append(seconds)
        parallel, num_layers = self.config.parallel, len(self.model.layers)
        layer_times = [
            timer.times(gathers=parallel.overlap_param_gather, reduces=parallel.overlap_grad_reduce)
            for timer in timers[:num_layers]
        ]
        result.pass_times.append(layer_times + [timer.times() for timer in timers[num_layers:]])

    def time_added_calls(self) -> Overhead:
        """Time begin_iteration, and the layers' decisions with nothing for them to decide about, at keep_prob 1."""
        first = self.num_iterations + 1
        for iteration in range(first, first + OVERHEAD_ITERATIONS):  # the first calls import and fill caches
            self.controller.begin_iteration(iteration, self.num_microbatches)
        began = time.perf_counter()
        for iteration in range(first + OVERHEAD_ITERATIONS, first + 2 * OVERHEAD_ITERATIONS):
            self.controller.begin_iteration(iteration, self.num_microbatches)
        begin_iteration = (time.perf_counter() - began) / OVERHEAD_ITERATIONS
        passes = self.num_microbatches * (2 if self.args.recompute_granularity == "full" else 1)
        decisions = passes * (self.time_empty_layers(switchable=True) - self.time_empty_layers(switchable=False))
        return Overhead(begin_iteration, decisions, calls=passes * len(self.model.layers))

    def time_empty_layers(self, switchable: bool) -> float:
        """Seconds that one sweep over this rank's layers takes when a stock layer's forward does nothing."""
        hidden_states, sweeps = torch.zeros(self.config.model.seq_length, 1, 1), 2000
        with ExitStack() as stack:
            for cls in self.model.stock_classes:
                stack.enter_context(unittest.mock.patch.object(cls, "forward", _do_nothing))
            self.model.switch(switchable)
            began = time.perf_counter()
            for _ in range(sweeps):
                for layer in self.model.layers:
                    layer.forward(hidden_states=hidden_states)
            return (time.perf_counter() - began) / sweeps


def _do_nothing(layer: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
    return hidden_states, None
