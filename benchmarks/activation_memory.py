#!/usr/bin/env python3
"""Measures the peak memory of activations when layers are dropped, and says what the bernoulli sampler leaves of it.

    python benchmarks/activation_memory.py
    python benchmarks/activation_memory.py --kept 0 12 24 --out benchmarks/results/activation_memory_cpu.md

What is measured. The trainer's model and training step run one microbatch an iteration with a chosen number of layers
kept, spread over the depth. Peak: the most memory that an iteration's forward and backward pass and optimizer step have
allocated at one time above what was allocated before (weights, gradient buffers and optimizer state have been there for
iterations by then). On a GPU it is torch's own count (max_memory_allocated), on a CPU it is counted from the
allocations and releases in torch.profiler's trace. Saved: the storages that autograd keeps between the passes, each
once, without parameters.

Peak = fixed share + share of a layer x kept layers, fitted by least squares, with the largest deviation from it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common.layouts import Layout, make_config
from benchmarks.common.memory import depth_of_run, fit_line, measure_peak, spread
from benchmarks.common.model import random_batches
from benchmarks.common.options import (
    add_model_options,
    add_recompute_option,
    add_run_options,
    check_at_least,
    make_parser,
)
from benchmarks.common.processes import check_config, megatron_run
from benchmarks.common.report import model_text, publish, recomputation_text, run_lines
from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController
from megatron_sbld.mcore import make_switchable
from megatron_sbld.method.policy import Policy
from megatron_sbld.method.schedule import Constant
from megatron_sbld.training.model import build_model, build_optimizer
from megatron_sbld.training.step import train_step

WARMUP = 2  # iterations at full depth: gradients and the optimizer's state exist afterwards
KEEP_PROBS = (0.5, 0.7, 0.9)  # of the table of depths
RUN_ITERATIONS = 100_000  # of a run in that table


class ChosenLayers(Policy):
    """Keeps a number of layers, evenly spread over the depth, with certainty."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(Constant(1.0), num_layers)
        self.num_kept = num_layers

    def _keep_probs(self, theta: float) -> np.ndarray:
        return spread(self.num_kept, self.num_layers).astype(np.float64)


@dataclass(frozen=True)
class Memory:
    """Bytes of one iteration."""

    kept_layers: int
    peak: int
    saved: int


class Iteration:
    """The trainer's iteration of one microbatch."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self._config = config
        self._number = 0
        self._policy = ChosenLayers(args.num_layers)
        self._controller = DropController(self._policy, seed=args.seed, window=1)
        self._chunks = build_model(config, args.vocab_size)
        make_switchable(self._chunks, self._controller)
        self._optimizer = build_optimizer(config, self._chunks)
        self._batches = itertools.cycle(random_batches(args, 1, args.seed))
        self._param_storages = {
            param.untyped_storage().data_ptr() for chunk in self._chunks for param in chunk.parameters()
        }
        for chunk in self._chunks:
            chunk.train()
        for _ in range(WARMUP):
            self._run(args.num_layers)

    def measure(self, num_kept: int) -> Memory:
        """Peak and saved bytes, of two iterations, because counting what is saved allocates as well."""
        peak = measure_peak(lambda: self._run(num_kept))
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._param_storages:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._run(num_kept)
        return Memory(num_kept, peak, sum(saved.values()))

    def _run(self, num_kept: int) -> None:
        self._policy.num_kept = num_kept
        self._number += 1
        self._controller.begin_iteration(self._number, num_microbatches=1)
        assert self._controller.plan.sum() == num_kept, "the policy decides with certainty"
        batches = itertools.islice(self._batches, 1)
        train_step(self._config, self._chunks, self._optimizer, [batches], stop_requested=False)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    config = make_config(args, Layout(1))
    check_config(config)
    with megatron_run(config):
        iteration = Iteration(args, config)
        measured = [iteration.measure(kept) for kept in args.kept]
    publish(report(args, measured), args.out)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_model_options(parser, one_microbatch=True)
    add_recompute_option(parser)
    parser.add_argument(
        "--kept", type=int, nargs="+", help="numbers of kept layers; default: none, 1/4, 1/2, 3/4 and all"
    )
    add_run_options(parser, "activation_memory", seed_of="weights and tokens")
    args = parser.parse_args()
    args.global_batch_size = args.micro_batch_size
    check_at_least(parser, args, num_layers=1, vocab_size=1, threads=1)
    if args.kept is None:
        args.kept = sorted({args.num_layers * quarter // 4 for quarter in range(5)})
    if len(set(args.kept)) < 2 or not all(0 <= kept <= args.num_layers for kept in args.kept):
        parser.error(f"--kept {args.kept}: must be two or more different numbers from 0 to {args.num_layers}")
    return args


def report(args: argparse.Namespace, measured: Sequence[Memory]) -> list[str]:
    """Markdown: the measured table, the line through it, and what samplers make of it."""
    fixed, layer, deviation = fit_line([one.kept_layers for one in measured], [one.peak for one in measured])
    lines = [
        "# Memory of activations with dropped layers",
        "",
        "Peak: the most bytes that a training iteration of one microbatch allocates above weights, gradient buffers "
        "and optimizer state. Saved: what autograd keeps between forward and backward pass. The method: docstring of "
        "`benchmarks/activation_memory.py`.",
        "",
        *run_lines(args.seed),
        f"- Model: {model_text(args)}, micro batch {args.micro_batch_size}, no dropout, {recomputation_text(args)}",
        "",
        "| layers kept | peak | saved for backward | peak / peak of full depth |",
        "| ---: | ---: | ---: | ---: |",
    ]
    deepest = max(measured, key=lambda one: one.kept_layers)
    lines += [
        f"| {one.kept_layers} | {_mib(one.peak)} | {_mib(one.saved)} | {one.peak / deepest.peak:.1%} |"
        for one in measured
    ]
    lines += [
        "",
        f"Peak = {_mib(fixed)} + {_mib(layer)} x kept layers; largest deviation {_mib(deviation)}.",
        "",
        "The bernoulli sampler draws each layer by itself, so some iteration may keep every layer: its worst case "
        "stays the full depth, and memory has to be there for it. The balanced sampler keeps as many layers on each "
        "stage as its keep probabilities sum to, give or take less than one, in every microbatch.",
        "",
        f"| keep_prob of all {args.num_layers} layers | P(an iteration keeps all) | P(one of {RUN_ITERATIONS:,} does) "
        f"| median of the deepest of {RUN_ITERATIONS:,}, bernoulli | its peak | deepest, balanced | its peak |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for keep_prob in KEEP_PROBS:
        full, any_full, bernoulli = depth_of_run(keep_prob, args.num_layers, RUN_ITERATIONS)
        balanced = int(np.ceil(round(keep_prob * args.num_layers, 9)))
        peaks = [_mib(fixed + layer * depth) for depth in (bernoulli, balanced)]
        lines.append(
            f"| {keep_prob:g} | {full:.2g} | {any_full:.2g} | {bernoulli} | {peaks[0]} | {balanced} | {peaks[1]} |"
        )
    return lines


def _mib(size: float) -> str:
    return f"{size / 2**20:,.2f} MiB"


if __name__ == "__main__":
    main()
