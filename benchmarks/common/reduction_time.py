"""bucket_model.py's measured points: what reducing gradients takes here, and what leaving out zeros saves.

Two copies of the trainer's model, one with overlap_grad_reduce, train in turns on the same random tokens. Exposed is
the time that Megatron waits for the reduction after the last backward pass (finalize_model_grads; nothing else happens
in it without tensor and pipeline stages); alone is an all-reduce of as many bytes while nothing else runs.

What skipping saves: iterations that drop layers with keep_prob 0.5, each run twice with the same decisions and tokens,
once with bucket groups that leave reductions out and once with Megatron's own, in alternating order.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_model_config

from benchmarks.common.layouts import Layout, bucket_size, make_config, model_defaults
from benchmarks.common.model import random_batches
from benchmarks.common.processes import megatron_run, start_processes
from benchmarks.common.report import environment_lines
from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController
from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.mcore import make_switchable
from megatron_sbld.mcore.skip.bucket_groups import SkippableBucketGroup, bucket_groups
from megatron_sbld.method.policy import LayerDropPolicy
from megatron_sbld.method.schedule import Constant
from megatron_sbld.ranks import this_device
from megatron_sbld.training.model import build_model, build_optimizer
from megatron_sbld.training.step import train_step

PROCESSES = 2
NUM_LAYERS, ROUNDS, WARMUP = 12, 10, 2
SKIPPING_PROCESSES, SKIPPING_KEEP_PROB, SKIPPING_ROUNDS = (2, 4), 0.5, 40
BUCKET_LAYERS = {"GPT-3 350M": 3.2, "GPT-3 3.6B": 0.5}
"""Layers that Megatron's default bucket holds at that size, roughly."""


def measured_lines(seed: int) -> list[str]:
    """Start the processes and measure; markdown."""
    if torch.cuda.is_available() and torch.cuda.device_count() < PROCESSES:
        return ["## Measured", "", f"Not run: {torch.cuda.device_count()} GPU(s) for {PROCESSES} processes."]
    args = argparse.Namespace(
        **model_defaults(),
        **{"num_layers": NUM_LAYERS, "seed": seed, "recompute_granularity": None, "bucket_size": None},
    )
    times = start_processes(measure, PROCESSES, args)[0]
    size = bucket_size(args, layout_with(overlap=True))
    lines = [
        "## Measured",
        "",
        *(f"- {line}" for line in environment_lines()),
        f"- GPT, {args.num_layers} layers, hidden {args.hidden_size}, sequence {args.seq_length}, {args.precision}, "
        f"{args.global_batch_size} samples in microbatches of {args.micro_batch_size}; data-parallel size {PROCESSES}; "
        f"buckets with overlap: {'default' if size is None else f'{size:,} values'}; medians of {ROUNDS} iterations",
        "",
        "| overlap_grad_reduce | iteration | exposed reduction | share |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, overlap in (("no", False), ("yes", True)):
        iteration, exposed = times[f"iteration, {overlap}"], times[f"exposed, {overlap}"]
        lines.append(f"| {name} | {iteration * 1e3:.1f} ms | {exposed * 1e3:.2f} ms | {exposed / iteration:.2%} |")
    return [
        *lines,
        "",
        f"The same bytes reduced alone: {times['alone'] * 1e3:.2f} ms ({times['bytes'] / 2**20:.1f} MiB).",
        "",
        *skipping_lines(args),
    ]


def skipping_lines(args: argparse.Namespace) -> list[str]:
    """What leaving reductions out saves of iterations that drop half of the layers; markdown."""
    lines = [
        f"Iterations that drop layers with keep_prob {SKIPPING_KEEP_PROB}, with Megatron's bucket groups and with ones "
        f"that leave reductions of zeros out: means of {SKIPPING_ROUNDS} pairs with equal decisions, the saved share "
        "with its standard error.",
        "",
        "| DP | layers in a bucket, as in | values in a bucket | all reduced | zeros left out | saved |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for processes in SKIPPING_PROCESSES:
        if torch.cuda.is_available() and torch.cuda.device_count() < processes:
            return [*lines, "", f"DP {processes} not run: {torch.cuda.device_count()} GPU(s)."]
        for name, layers in BUCKET_LAYERS.items():
            size = round(layers * 12 * args.hidden_size**2)
            sized = argparse.Namespace(**{**vars(args), "bucket_size": size, "global_batch_size": 2 * processes})
            stock, skipping = start_processes(measure_skipping, processes, sized, processes)[0]
            saved = 1 - skipping / stock
            error = saved.std(ddof=1) / len(saved) ** 0.5
            lines.append(
                f"| {processes} | {layers:g}, {name} | {size:,} | {stock.mean() * 1e3:.1f} ms "
                f"| {skipping.mean() * 1e3:.1f} ms | {saved.mean():+.1%} +- {error:.1%} |"
            )
    return lines


def layout_with(overlap: bool) -> Layout:
    return Layout(PROCESSES, overlap=overlap)


class _Copy:
    """One copy of the model, and the seconds that finalize_model_grads takes."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self.config = config
        self.exposed: list[float] = []
        self.iterations: list[float] = []
        self.chunks = build_model(config, args.vocab_size)
        self.optimizer = build_optimizer(config, self.chunks)
        model_config = get_model_config(self.chunks[0])
        finalize = model_config.finalize_model_grads_func

        def timed(*args: Any, **kwargs: Any) -> None:
            began = _synchronised_now()
            finalize(*args, **kwargs)
            self.exposed.append(_synchronised_now() - began)

        model_config.finalize_model_grads_func = timed

    def train(self, batches: list[Any]) -> None:
        dist.barrier()
        began = _synchronised_now()
        train_step(self.config, self.chunks, self.optimizer, [iter(batches)], stop_requested=False)
        self.iterations.append(_synchronised_now() - began)


def measure_skipping(args: argparse.Namespace, processes: int) -> tuple[Floats, Floats]:
    """Seconds of iterations with all buckets reduced and with zeros left out, [rounds] each; on each rank the same."""
    torch.set_num_threads(1)
    config = make_config(args, Layout(processes, overlap=True))
    with megatron_run(config):
        copy = _Copy(args, config)
        policy = LayerDropPolicy(Constant(SKIPPING_KEEP_PROB), args.num_layers)
        controller = DropController(policy, seed=args.seed)
        make_switchable(copy.chunks, controller)
        batches = random_batches(args, get_num_microbatches(), args.seed + dist.get_rank())
        for iteration in range(1, WARMUP + 2 * SKIPPING_ROUNDS + 1):
            if iteration == WARMUP + 1:  # a layer has been skipped, so the groups have their class
                groups = bucket_groups(copy.chunks[0])
                skippable = [group for group in groups if isinstance(group, SkippableBucketGroup)]
                copy.iterations.clear()
            in_pair = iteration - WARMUP - 1
            if in_pair >= 0:
                for group in skippable:
                    group.__class__ = SkippableBucketGroup if _skips(in_pair) else _ParamAndGradBucketGroup
            controller.begin_iteration(WARMUP + 1 + in_pair // 2, get_num_microbatches())
            copy.train(batches)
        everyone: list[list[float]] = [[]] * processes
        dist.all_gather_object(everyone, copy.iterations)
        slowest = np.max(everyone, axis=0)
        skips = np.array([_skips(index) for index in range(2 * SKIPPING_ROUNDS)])
        return slowest[~skips], slowest[skips]


def _skips(index: int) -> bool:
    """Whether an iteration leaves reductions out: the second of a pair and then the first, by turns."""
    return index % 4 in (1, 2)


def _synchronised_now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Medians in seconds over iterations, of the slower rank; called on each of two ranks, the same result on each."""
    torch.set_num_threads(1)
    configs = {overlap: make_config(args, layout_with(overlap)) for overlap in (False, True)}
    with megatron_run(configs[False]):
        copies = {overlap: _Copy(args, config) for overlap, config in configs.items()}
        batches = random_batches(args, get_num_microbatches(), args.seed + dist.get_rank())
        for number, copy in itertools.product(range(WARMUP + ROUNDS), copies.values()):
            copy.train(batches)
            if number < WARMUP:
                copy.exposed.clear()
                copy.iterations.clear()
        gradients = copies[False].chunks[0].buffers[0].grad_data
        alone = [_all_reduce_time(gradients.numel(), gradients.dtype) for _ in range(ROUNDS)]
        times = {"alone": float(np.median(alone)), "bytes": float(gradients.numel() * gradients.element_size())}
        for overlap, copy in copies.items():
            times[f"iteration, {overlap}"] = float(np.median(copy.iterations))
            times[f"exposed, {overlap}"] = float(np.median(copy.exposed))
        everyone: list[dict[str, float]] = [times] * PROCESSES
        dist.all_gather_object(everyone, times)
        return {name: max(rank[name] for rank in everyone) for name in times}


def _all_reduce_time(numel: int, dtype: torch.dtype) -> float:
    values = torch.zeros(numel, dtype=dtype, device=this_device())
    dist.barrier()
    began = _synchronised_now()
    dist.all_reduce(values)
    return _synchronised_now() - began
