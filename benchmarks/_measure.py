"""One rank's part of realised_gain.py: the trainer's model and step in alternating blocks, timed.

A layer that was made switchable becomes a stock one again by having its own class back, so undropped and dropped blocks
share one model, one optimizer state and one set of processes.
"""

from __future__ import annotations

import argparse
import itertools
import time
import unittest.mock
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from _gain_report import Case, Overhead
from _layer_times import ModuleTimer
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController
from megatron_sbld.data.batches import Batch
from megatron_sbld.mcore import make_switchable
from megatron_sbld.mcore.skip.switchable import decoder_layers
from megatron_sbld.method.policy import LayerDropPolicy
from megatron_sbld.training.model import build_model, build_optimizer, build_param_scheduler
from megatron_sbld.training.step import train_step

DISTINCT_BATCHES = 16  # iterations after which the random tokens repeat
OVERHEAD_ITERATIONS = 256  # a multiple of the controller's window, so that its share of exchanges is counted


def cases(args: argparse.Namespace, samplers: Sequence[str]) -> list[Case]:
    """What has a pair of blocks in each round; without a drop there is nothing to sample."""
    return [Case(1.0, samplers[0])] + [Case(p, sampler) for p in args.keep_probs for sampler in samplers]


def count_iterations(args: argparse.Namespace, samplers: Sequence[str]) -> int:
    """Iterations of the whole run: warm-up, and in each round a pair of blocks and a timed iteration a case."""
    pairs = args.rounds * len(cases(args, samplers))
    return args.warmup + pairs * (2 * args.block_iterations + 1)


def random_batches(args: argparse.Namespace, num_batches: int, seed: int) -> list[Batch]:
    """Microbatches of random tokens; the seed alone decides which."""
    rng = torch.Generator().manual_seed(seed)
    size, length = args.micro_batch_size, args.seq_length
    batches = []
    for _ in range(num_batches):
        text = torch.randint(args.vocab_size, (size, length + 1), generator=rng)
        batches.append(
            {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "loss_mask": torch.ones(size, length),
                "position_ids": torch.arange(length).expand(size, -1).contiguous(),
            }
        )
    return batches


def switch_layers(layers: Sequence[torch.nn.Module], classes: Sequence[type]) -> None:
    """Give each layer a class: its stock one, or the switchable one that it had been given."""
    for layer, cls in zip(layers, classes, strict=True):
        layer.__class__ = cls


class Deadline:
    """`--minutes`, counted from when this is made. Collective: rank 0's clock decides for all ranks.

    rounds: done so far.
    """

    def __init__(self, minutes: float) -> None:
        self.rounds = 0
        self._end = time.monotonic() + 60 * minutes

    def round_done(self) -> bool:
        """Whether that was the last one; two are always made, of which a bootstrap can be drawn."""
        self.rounds += 1
        passed = [self.rounds >= 2 and time.monotonic() >= self._end]
        dist.broadcast_object_list(passed)
        return passed[0]


def progress_bar() -> Progress:
    """On rank 0's stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=dist.get_rank() != 0)


@dataclass
class RankMeasurement:
    """What one rank measured; in seconds."""

    stage: int
    rounds: int = 0
    undropped: dict[Case, list[float]] = field(default_factory=dict)  # block times, [rounds]
    dropped: dict[Case, list[float]] = field(default_factory=dict)
    kept: dict[Case, list[list[list[bool]]]] = field(default_factory=dict)  # [rounds, iterations, L]
    timed_iterations: list[float] = field(default_factory=list)
    # [rounds * pairs, layers on this stage + 1, 2]: layers and then the whole stage; forward and backward
    pass_times: list[list[tuple[float, float]]] = field(default_factory=list)
    overhead: Overhead = field(default_factory=lambda: Overhead(0.0, 0.0, 0))


class Run:
    """The parts of the trainer that run here, and the iteration that it is at."""

    def __init__(self, args: argparse.Namespace, config: Config, samplers: Sequence[str]) -> None:
        self.args = args
        self.config = config
        self.samplers = samplers
        self.num_iterations = count_iterations(args, samplers)
        self.num_microbatches = get_num_microbatches()
        self.iteration = 0
        self.theta: dict[int, float] = {}  # iteration -> keep_prob
        self.rounds = self.plan_rounds()
        self.controllers = {sampler: self.build_controller(sampler) for sampler in samplers}
        self.controller = self.controllers[samplers[0]]
        self.chunks = build_model(config, args.vocab_size)
        self.layers = [layer for chunk in self.chunks for layer in decoder_layers(chunk)]
        self.stock_classes = [type(layer) for layer in self.layers]
        make_switchable(self.chunks, self.controller)
        self.switchable_classes = [type(layer) for layer in self.layers]
        self.optimizer = build_optimizer(config, self.chunks)
        self.scheduler = build_param_scheduler(config, self.optimizer, RunLength(config.training))
        seed = args.seed + parallel_state.get_data_parallel_rank()
        self.batches = itertools.cycle(random_batches(args, DISTINCT_BATCHES * self.num_microbatches, seed))

    def build_controller(self, sampler: str) -> DropController:
        """The keep probabilities are the same for all samplers; the balanced one balances the pipeline's stages."""
        policy = LayerDropPolicy(lambda t: self.theta.get(t, 1.0), self.config.model.num_layers)
        stages = self.config.parallel.pipeline_model_parallel_size if sampler == "balanced" else None
        return DropController(policy, seed=self.args.seed, sampler=sampler, stages=stages)

    def plan_rounds(self) -> list[list[tuple[Case, bool]]]:
        """Order of the pairs of each round: (case, whether the undropped block comes first); notes the thetas.

        All ranks know the keep_prob of every iteration beforehand, as the controller's check of a window requires.
        """
        rng = np.random.default_rng(self.args.seed)
        all_cases = cases(self.args, self.samplers)
        length, iteration = self.args.block_iterations, self.args.warmup
        rounds = []
        for number in range(self.args.rounds):
            order = [(all_cases[i], number % 2 == 0) for i in rng.permutation(len(all_cases))]
            for case, undropped_first in order:
                start = iteration + 1 + (length if undropped_first else 0)
                self.theta.update(dict.fromkeys(range(start, start + length), case.keep_prob))
                iteration += 2 * length + 1
            rounds.append(order)
        return rounds

    def measure(self, name: str) -> RankMeasurement:
        """Warm up, run all rounds, and time the calls that switchable layers add."""
        result = RankMeasurement(stage=parallel_state.get_pipeline_model_parallel_rank())
        for chunk in self.chunks:
            chunk.train()
        with progress_bar() as progress:
            task = progress.add_task(name, total=self.num_iterations)
            self.block(self.args.warmup - 1, switchable=False)
            self.block(1, switchable=True)  # compiled layers have a graph for each of their classes
            deadline = Deadline(self.args.minutes)
            for order in self.rounds:
                for case, undropped_first in order:
                    self.use_sampler(case.sampler)
                    for switchable in (False, True) if undropped_first else (True, False):
                        seconds, kept = self.block(self.args.block_iterations, switchable)
                        (result.dropped if switchable else result.undropped).setdefault(case, []).append(seconds)
                        if switchable:
                            result.kept.setdefault(case, []).append(kept)
                    self.timed_iteration(result)
                    progress.update(task, completed=self.iteration)
                if deadline.round_done():
                    break
        result.rounds = deadline.rounds
        result.overhead = self.time_added_calls()
        return result

    def use_sampler(self, sampler: str) -> None:
        """Give the layers to the sampler's controller."""
        if self.controller is not self.controllers[sampler]:
            self.controller = self.controllers[sampler]
            make_switchable(self.chunks, self.controller)

    def block(self, iterations: int, switchable: bool) -> tuple[float, list[list[bool]]]:
        """Seconds of a block, and the decisions of its iterations: none if its layers are stock ones."""
        switch_layers(self.layers, self.switchable_classes if switchable else self.stock_classes)
        kept = []
        dist.barrier()
        began = time.perf_counter()
        for _ in range(iterations):
            self.iteration += 1
            if switchable:
                self.controller.begin_iteration(self.iteration, self.num_microbatches)
                kept.append(self.controller.plan[0].tolist())
            batches = itertools.islice(self.batches, self.num_microbatches)
            # It ends with the losses on the CPU, so a GPU has then done everything.
            outcome = train_step(self.config, self.chunks, self.optimizer, [batches], stop_requested=False)
            assert outcome.update_successful, "an update is only skipped in fp16"
            self.scheduler.step(increment=self.args.global_batch_size)
        return time.perf_counter() - began, kept

    def timed_iteration(self, result: RankMeasurement) -> None:
        """One undropped iteration in which each layer's passes are timed, and the whole stage's."""
        with ExitStack() as stack:
            timers = [stack.enter_context(ModuleTimer(layer, is_layer=True)) for layer in self.layers]
            timers += [stack.enter_context(ModuleTimer(chunk, is_layer=False)) for chunk in self.chunks]
            seconds, _ = self.block(1, switchable=False)
        result.timed_iterations.append(seconds)
        parallel, num_layers = self.config.parallel, len(self.layers)
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
        decisions = passes * (
            self.time_empty_layers(self.switchable_classes) - self.time_empty_layers(self.stock_classes)
        )
        return Overhead(begin_iteration, decisions, calls=passes * len(self.layers))

    def time_empty_layers(self, classes: list[type]) -> float:
        """Seconds that one sweep over this rank's layers takes when a stock layer's forward does nothing."""
        hidden_states, sweeps = torch.zeros(1), 2000
        with ExitStack() as stack:
            for cls in set(self.stock_classes):
                stack.enter_context(unittest.mock.patch.object(cls, "forward", _do_nothing))
            switch_layers(self.layers, classes)
            began = time.perf_counter()
            for _ in range(sweeps):
                for layer in self.layers:
                    layer.forward(hidden_states=hidden_states)
            return (time.perf_counter() - began) / sweeps


def _do_nothing(layer: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
    return hidden_states, None
