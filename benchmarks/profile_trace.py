#!/usr/bin/env python3
"""Traces one training iteration with stock layers, with switchable ones that drop nothing, and with dropped ones.

    python benchmarks/profile_trace.py
    python benchmarks/profile_trace.py --keep-prob 0.7 --out benchmarks/results/profile_trace_cpu.md

Shows that layer dropping puts nothing new on the hot path: each operator, kernel and wait for the device that the
trainer's iteration runs is counted from torch.profiler's trace, and with switchable layers at keep_prob 1 every count
must be that of stock Megatron layers; the program fails where one is not. The traces are written as JSON for
chrome://tracing or https://ui.perfetto.dev. Times in a trace include the profiler's own work: realised_gain.py measures
times. The learning rate is next to nothing and the batch always the same, so that undropped iterations have the same
gradients, and clipping, which is skipped where the norm is small, does not tell them apart.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common.layouts import Layout, make_config
from benchmarks.common.model import SwitchedModel, random_batches
from benchmarks.common.operations import device_operations, difference, host_operations, record, synchronisations
from benchmarks.common.options import (
    SHOWN,
    add_model_options,
    add_run_options,
    check_at_least,
    check_one_process,
    make_parser,
)
from benchmarks.common.processes import check_config, megatron_run
from benchmarks.common.report import ROOT, model_text, publish, run_lines
from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController
from megatron_sbld.method.policy import LayerDropPolicy
from megatron_sbld.training.model import build_optimizer
from megatron_sbld.training.step import train_step

WARMUP = 3  # the optimizer makes its state, and the controller checks its window


@dataclass(frozen=True)
class Traced:
    """What one iteration ran."""

    name: str
    kept_layers: int
    host: Counter[str]
    device: Counter[str]
    file: Path


class Iteration:
    """The trainer's iteration on random tokens, with stock or switchable layers."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self.theta = 1.0
        self._config = config
        self._number = 0
        self._controller = DropController(LayerDropPolicy(lambda t: self.theta, args.num_layers), seed=args.seed)
        self._model = SwitchedModel(config, args.vocab_size, self._controller)
        self._optimizer = build_optimizer(config, self._model.chunks)
        self._batches = itertools.cycle(random_batches(args, get_num_microbatches(), args.seed))
        for chunk in self._model.chunks:
            chunk.train()

    def stock(self) -> None:
        self._model.switch(False)
        self._train()

    def switchable(self) -> None:
        self._model.switch(True)
        self._number += 1
        self._controller.begin_iteration(self._number, get_num_microbatches())
        self._train()

    @property
    def kept_layers(self) -> int:
        """Of the last iteration with switchable layers."""
        return int(self._controller.plan[0].sum())

    def _train(self) -> None:
        batches = itertools.islice(self._batches, get_num_microbatches())
        train_step(self._config, self._model.chunks, self._optimizer, [batches], stop_requested=False)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    config = make_config(args, Layout(1))
    config = replace(config, optimizer=replace(config.optimizer, lr=1e-12, min_lr=0.0))
    check_config(config)
    with megatron_run(config):
        traced = trace_all(args, Iteration(args, config))
        num_microbatches = get_num_microbatches()
    publish(report(args, traced, num_microbatches), args.out)
    print(f"traces in {args.traces}", file=sys.stderr)
    stock, nothing_dropped, _ = traced
    if nothing_dropped.host != stock.host or nothing_dropped.device != stock.device:
        sys.exit("switchable layers that drop nothing run other operations than stock ones")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_model_options(parser)
    add("--keep-prob", type=float, default=0.5, help="of the iteration that drops layers" + SHOWN)
    add_run_options(parser, "profile_trace", seed_of="weights, tokens and decisions")
    add("--traces", type=Path, default=ROOT / "runs" / "traces", help="folder of the traces; default: runs/traces")
    args = parser.parse_args()
    if not 0 < args.keep_prob < 1:
        parser.error(f"--keep-prob {args.keep_prob} is not allowed: must be in (0, 1)")
    check_at_least(parser, args, threads=1, vocab_size=1)
    check_one_process(parser)
    return args


def trace_all(args: argparse.Namespace, iteration: Iteration) -> list[Traced]:
    """Stock layers, switchable ones that drop nothing, and dropped ones, each after iterations of the same kind."""
    args.traces.mkdir(parents=True, exist_ok=True)
    traced = []
    kinds: list[tuple[str, Callable[[], None], float]] = [
        ("stock", iteration.stock, 1.0),
        ("keep_prob 1", iteration.switchable, 1.0),
        (f"keep_prob {args.keep_prob:g}", iteration.switchable, args.keep_prob),
    ]
    for name, run, theta in kinds:
        iteration.theta = theta
        for _ in range(WARMUP):
            run()
        trace = record(run)
        file = args.traces / f"{name.replace(' ', '_')}.json"
        trace.export_chrome_trace(str(file))
        kept = args.num_layers if name == "stock" else iteration.kept_layers
        traced.append(Traced(name, kept, host_operations(trace), device_operations(trace), file))
    return traced


def report(args: argparse.Namespace, traced: Sequence[Traced], num_microbatches: int) -> list[str]:
    """Markdown: what was traced with what, totals, and every count that differs from the stock iteration's."""
    stock, nothing_dropped, dropped = traced
    return [
        "# What a training iteration runs, with and without layer dropping",
        "",
        "Operators and autograd nodes, kernels, and waits of the host for the device in one iteration (forward, "
        "backward, optimizer step, loss), counted from torch.profiler's traces. A wait is an item() or a CUDA "
        "synchronisation. The method: docstring of `benchmarks/profile_trace.py`.",
        "",
        *run_lines(args.seed),
        f"- Model: {model_text(args)}; {num_microbatches} microbatch(es)",
        "",
        "| iteration | layers kept | host operations | kernels | waits | trace |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        *(
            f"| {one.name} | {one.kept_layers} | {one.host.total():,} | {one.device.total():,} "
            f"| {synchronisations(one.host)} | `{one.file.name}` |"
            for one in traced
        ),
        "",
        "Switchable layers that drop nothing against stock ones, every count that differs:",
        "",
        *difference_lines(nothing_dropped, stock),
        "",
        f"With {args.num_layers - dropped.kept_layers} of {args.num_layers} layers dropped, every operation that there "
        "are more of than in the stock iteration:",
        "",
        *difference_lines(dropped, stock, only_more=True),
    ]


def difference_lines(one: Traced, stock: Traced, only_more: bool = False) -> list[str]:
    changes = {**difference(one.host, stock.host), **difference(one.device, stock.device)}
    lines = [f"- {name}: {count:+d}" for name, count in changes.items() if count > 0 or not only_more]
    return lines or ["- none"]


if __name__ == "__main__":
    main()
