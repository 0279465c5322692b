#!/usr/bin/env python3
"""Measures how much of the time of dropped layers is really saved: realised over ideal gain, in one run.

    python benchmarks/realised_gain.py --all-layouts --out benchmarks/results/realised_gain_cpu.md
    python benchmarks/realised_gain.py
    torchrun --nproc-per-node 2 benchmarks/realised_gain.py --tensor-model-parallel-size 2
    python benchmarks/realised_gain.py --layouts dp2-overlap pp2-samplers pp4-samplers --keep-probs 0.7 0.5

What is measured. The trainer's own model, optimizer and training step run on random tokens, in rounds. A round has, for
each keep_prob, one block of undropped iterations and one of dropped ones (LayerDrop with that constant keep_prob), in
alternating order, so that slow drifts of the machine cancel. Undropped blocks run stock Megatron layers and no
controller: the pair at keep_prob 1 therefore shows what switchable layers cost when they drop nothing. A more precise
figure for that comes from timing the added calls in a loop.

Ideal gain = T / (T - time of the dropped layers). A layer's time is that of its forward and backward passes,
recomputation included, read by hooks around it (common/layer_times.py) in one undropped iteration after each pair of
blocks, and T is the time of these iterations, so that a slower moment of the machine enlarges both alike. Hooks time
each layer in its place and under the load it has in training; a layer run by itself would find other caches, and a
regression of times on decisions would take the realised gain for the ideal one. The optimizer step and the gradient
reduction of a dropped layer are not counted in it, although reductions of buckets without a kept layer are left out.
With --overlap a layer's time is that of the microbatches during which nothing is gathered or reduced. Counted is what
the actual decisions of the dropped blocks save on the critical path: on the slowest rank of each stage and, with
pipeline stages, in the 1F1B schedule with its bubbles, computed from every stage's durations with free transfers
(common/gain.py).

With pipeline stages there is a second ideal, that of an even spread: every stage drops the same share of its layers'
time. It is what a sampler is judged by: realised / even compares samplers, realised / critical path only says whether
the dropped layers' time was saved. Several samplers share one run, their blocks interleaved. Where processes share
cores, wall time says little about a pipeline, because a stage that waits gives its core away: the critical path over
the even spread, computed from layer times alone, stands beside it.

With --sampler tokens layers run some tokens of each sample (drop.granularity token), keep_prob of them rounded to a
multiple of 16. A layer's ideal time is then its time by the share of its FLOPs that is left; attention's scores have
the square of the tokens' share.

With --overlap gradients are reduced while backward runs and, with --distributed-optimizer, parameters gathered while
forward does. Megatron's default bucket holds all of a model as small as the default one on CPUs, which would leave
nothing to overlap: there a bucket has the share of the model that it has in GPT-3 350M, 3.2 layers.

Ratio = (realised - 1) / (ideal - 1), from sums over all rounds, with a bootstrap over the rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common.gain import Pairs, PassTimes, even_ratio_difference, measure_gain, saved_time
from benchmarks.common.gain_plan import Case
from benchmarks.common.gain_report import LayoutResult, report
from benchmarks.common.gain_run import RankMeasurement, Run, run_length
from benchmarks.common.layouts import (
    ALL_LAYOUTS,
    FIRST_STAGE,
    LAYOUTS,
    SAMPLERS,
    TOKENS,
    Layout,
    bucket_size,
    make_config,
)
from benchmarks.common.options import (
    SHOWN,
    add_block_options,
    add_model_options,
    add_recompute_option,
    add_run_options,
    add_time_option,
    check_at_least,
    check_named_once,
    make_parser,
)
from benchmarks.common.processes import check_config, megatron_run, start_processes, stop, warn_of_load
from benchmarks.common.report import model_text, publish, recomputation_text
from megatron_sbld.config.sections import Config
from megatron_sbld.layout.pipeline import Floats, schedule_time
from megatron_sbld.training.processes import world_size_from_environment


def main() -> None:
    args = parse_args()
    layouts = [LAYOUTS[name] for name in args.layouts] if args.layouts else [layout_of_options(args)]
    on_gpu = torch.cuda.is_available()
    possible = [layout for layout in layouts if not on_gpu or layout.processes <= torch.cuda.device_count()]
    check_layouts(args, possible)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if int(os.environ.get("RANK", "0")) == 0:
        warn_of_load()
    results = [launch(args, layout) if args.layouts else run_layout(args, layout) for layout in possible]
    if int(os.environ.get("RANK", "0")) == 0:
        write_report(args, results, [layout for layout in layouts if layout not in possible])


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_layout_options(
        parser.add_argument_group("layout (under torchrun; what these leave of the processes is data-parallel)")
    )
    model = parser.add_argument_group("model and batch")
    add_model_options(model)
    add_recompute_option(model)
    model.add_argument(
        "--torch-compile",
        action="store_true",
        help="with training.torch_compile, undropped blocks too; not on layouts with tensor parallelism",
    )
    measurement = parser.add_argument_group("measurement")
    measurement.add_argument(
        "--keep-probs", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.5], help="besides 1" + SHOWN
    )
    add_block_options(measurement, rounds=12, rounds_of="pairs of blocks for each keep_prob", warmup=6)
    add_time_option(measurement)
    add_run_options(measurement, "realised_gain", seed_of="weights, tokens and decisions")
    args = parser.parse_args()
    check_args(parser, args)
    return args


def add_layout_options(layout: argparse._ArgumentGroup) -> None:
    add = layout.add_argument
    add("--tensor-model-parallel-size", type=int, default=1, help="default: 1")
    add("--pipeline-model-parallel-size", type=int, default=1, help="default: 1")
    add("--overlap", action="store_true", help="reduce gradients while backward runs")
    add(
        "--distributed-optimizer",
        action="store_true",
        help="shard the optimizer's state; with --overlap also gather parameters while forward runs",
    )
    add(
        "--bucket-size",
        type=int,
        help="parameters of a bucket of overlapped gradients; default: Megatron's on a GPU, else 3.2 layers",
    )
    add(
        "--sampler",
        nargs="+",
        choices=(*SAMPLERS, FIRST_STAGE, TOKENS),
        default=["bernoulli"],
        help="one, or several in one run; balanced balances the pipeline's stages; first-stage: always the same "
        "layers; tokens: keep_prob of each sample's tokens, in all layers but the first and the last" + SHOWN,
    )
    add(
        "--layouts",
        nargs="+",
        choices=LAYOUTS,
        help="start the processes of these, one layout after the other, into one report, without torchrun",
    )
    add("--all-layouts", action="store_true", help=f"the same as --layouts {' '.join(ALL_LAYOUTS)}")


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what the trainer's own checks do not know of."""
    check_at_least(parser, args, rounds=2, block_iterations=1, warmup=1, threads=1, vocab_size=1, minutes=0)
    if not all(0 < keep_prob < 1 for keep_prob in args.keep_probs):
        parser.error(f"--keep-probs {args.keep_probs}: each must be in (0, 1); 1 is always measured as well")
    if args.all_layouts and args.layouts:
        parser.error("--all-layouts names layouts itself: leave out --layouts")
    own_layout = layout_of_options(args)
    if args.all_layouts:
        args.layouts = list(ALL_LAYOUTS)
    if args.layouts and ("RANK" in os.environ or own_layout != Layout(1)):
        parser.error("--layouts starts its own processes: leave out torchrun, parallel sizes, overlap and sampler")
    check_named_once(parser, args, "sampler", "layouts", "keep_probs")
    layouts = [LAYOUTS[name] for name in args.layouts] if args.layouts else [own_layout]
    if args.bucket_size is not None and not any(layout.overlap for layout in layouts):
        parser.error(f"--bucket-size {args.bucket_size}: Megatron has one bucket without --overlap; leave it out")


def layout_of_options(args: argparse.Namespace) -> Layout:
    """What the options other than --layouts ask for."""
    return Layout(
        processes=world_size_from_environment(),
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        overlap=args.overlap,
        distributed_optimizer=args.distributed_optimizer,
        samplers=tuple(args.sampler),
    )


def config_of(args: argparse.Namespace, layout: Layout) -> Config:
    config = make_config(args, layout, train_iters=run_length(args, layout.samplers))
    return replace(config, training=replace(config.training, torch_compile=args.torch_compile))


def check_layouts(args: argparse.Namespace, layouts: Sequence[Layout]) -> None:
    """The trainer's own checks, for every layout that is going to run."""
    if not layouts:
        stop(f"more processes than the {torch.cuda.device_count()} GPU(s) of this machine")
    for layout in layouts:
        check_config(config_of(args, layout), layout.processes)
        if args.vocab_size % layout.tensor:
            stop(f"--vocab-size {args.vocab_size}: must be divisible by the tensor-parallel size {layout.tensor}")


def launch(args: argparse.Namespace, layout: Layout) -> LayoutResult:
    """Measure a layout in processes of its own."""
    return start_processes(run_layout, layout.processes, args, layout)[0]


def run_layout(args: argparse.Namespace, layout: Layout) -> LayoutResult:
    """Measure one layout; called on each of its ranks, and the same result on each."""
    torch.set_num_threads(args.threads)
    config = config_of(args, layout)
    load_before = os.getloadavg()[0]
    with megatron_run(config):
        run = Run(args, config, layout.samplers)
        own = run.measure(layout.title)
        everyone: list[RankMeasurement] = [own] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        return evaluate(args, layout, everyone, run.num_microbatches, load_before)


def evaluate(
    args: argparse.Namespace, layout: Layout, everyone: list[RankMeasurement], num_microbatches: int, load_before: float
) -> LayoutResult:
    """From all ranks' measurements to the figures of the layout."""
    times = pass_times(args, everyone, num_microbatches)
    rounds = everyone[0].rounds
    mean = times.mean_over(np.arange(rounds))
    # Ranks leave a barrier and end an iteration together, but for some microseconds: the last one counts.
    pairs = {
        case: Pairs(
            undropped=np.max([rank.undropped[case] for rank in everyone], axis=0),
            dropped=np.max([rank.dropped[case] for rank in everyone], axis=0),
            kept=np.array(everyone[0].kept[case]),
        )
        for case in everyone[0].kept
    }
    gains = {case: measure_gain(measured, times, num_microbatches, seed=args.seed) for case, measured in pairs.items()}
    differences = {}
    if layout.pipeline > 1 and set(layout.samplers) >= set(SAMPLERS):
        for keep_prob in args.keep_probs:
            balanced, bernoulli = (pairs[Case(keep_prob, sampler)] for sampler in ("balanced", "bernoulli"))
            differences[keep_prob] = even_ratio_difference(balanced, bernoulli, times, num_microbatches, seed=args.seed)
    return LayoutResult(
        layout=layout.title,
        num_stages=layout.pipeline,
        gains=gains,
        sampler_differences=differences,
        iteration=float(np.mean(list(everyone[0].undropped.values())) / args.block_iterations),
        timed_iteration=float(np.mean(everyone[0].timed_iterations)),
        layer_forward=float(mean.layer_forward.mean()),
        layer_backward=float(mean.layer_backward.mean()),
        passes=float(schedule_time(mean.stage_forward, mean.stage_backward, num_microbatches)),
        layers=float(saved_time(mean, np.zeros(args.num_layers, dtype=bool), num_microbatches)),
        num_microbatches=num_microbatches,
        overhead=max((rank.overhead for rank in everyone), key=lambda overhead: overhead.total),
        rounds=rounds,
        block_iterations=args.block_iterations,
        load_average=(load_before, os.getloadavg()[0]),
    )


def pass_times(args: argparse.Namespace, everyone: list[RankMeasurement], num_microbatches: int) -> PassTimes:
    """Times of a microbatch by round, leading dimension [rounds], of the slowest rank of each stage."""
    layers, stages = [], []
    for stage in range(max(rank.stage for rank in everyone) + 1):
        # [rounds, pairs, layers of the stage + 1, 2], of each rank of the stage
        measured = [np.array(rank.pass_times) / num_microbatches for rank in everyone if rank.stage == stage]
        slowest = max(measured, key=lambda times: float(times[:, -1].sum()))
        by_round: Floats = slowest.reshape(everyone[0].rounds, -1, *slowest.shape[1:]).mean(axis=1)
        layers.append(by_round[:, :-1])
        stages.append(by_round[:, -1:])
    layer_times, stage_times = np.concatenate(layers, axis=1), np.concatenate(stages, axis=1)
    iterations = np.max([rank.timed_iterations for rank in everyone], axis=0).reshape(everyone[0].rounds, -1)
    return PassTimes(
        layer_forward=layer_times[..., 0],
        layer_backward=layer_times[..., 1],
        stage_forward=stage_times[..., 0],
        stage_backward=stage_times[..., 1],
        iteration=iterations.mean(axis=1, keepdims=True),
    )


def write_report(args: argparse.Namespace, results: list[LayoutResult], left_out: Sequence[Layout]) -> None:
    torch.set_num_threads(args.threads)  # the report names it, and the processes of --layouts are others
    publish(report(results, list(config_lines(args, left_out)), args.seed), args.out)


def config_lines(args: argparse.Namespace, left_out: Sequence[Layout]) -> Iterator[str]:
    """The configuration, for the report."""
    yield (
        f"Model: {model_text(args)}, no dropout, {recomputation_text(args)}"
        + (", layers compiled by torch" if args.torch_compile else "")
    )
    yield f"Batch: {args.global_batch_size} samples in microbatches of {args.micro_batch_size}; Adam, clipping at 1"
    yield "Dropping: LayerDrop, one decision an iteration"
    if args.overlap or any(LAYOUTS[name].overlap for name in args.layouts or []):
        size = bucket_size(args, Layout(1, overlap=True))
        yield f"Buckets of overlapped gradients: {'Megatron default' if size is None else f'{size:,} parameters'}"
    if left_out:
        yield "Not run, for want of GPUs: " + "; ".join(layout.title for layout in left_out)


if __name__ == "__main__":
    main()
