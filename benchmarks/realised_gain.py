#!/usr/bin/env python3
"""Measures how much of the time of dropped layers is really saved: realised over ideal gain, in one run.

    python benchmarks/realised_gain.py --all-layouts --out benchmarks/results/realised_gain_cpu.md
    python benchmarks/realised_gain.py
    torchrun --nproc-per-node 2 benchmarks/realised_gain.py --tensor-model-parallel-size 2

What is measured. The trainer's own model, optimizer and training step run on random tokens, in rounds. A round has, for
each keep_prob, one block of undropped iterations and one of dropped ones (LayerDrop with that constant keep_prob), in
alternating order, so that slow drifts of the machine cancel. Undropped blocks run stock Megatron layers and no
controller: the pair at keep_prob 1 therefore shows what switchable layers cost when they drop nothing. A more precise
figure for that comes from timing the added calls in a loop.

Ideal gain = T / (T - time of the dropped layers). A layer's time is that of its forward and backward passes,
recomputation included, read by hooks around it (_layer_times.py) in one undropped iteration after each pair of blocks,
and T is the time of these iterations, so that a slower moment of the machine enlarges both alike. Hooks time each layer
in its place and under the load it has in training; a layer run by itself would find other caches, and a regression of
times on decisions would take the realised gain for the ideal one. The optimizer step and the gradient reduction of a
dropped layer are not saved and not counted. Counted is what the actual decisions of the dropped blocks save on the
critical path: on the slowest rank of each stage and, with pipeline stages, in the 1F1B schedule with its bubbles,
computed from every stage's durations with free transfers (_gain.py).

Ratio = (realised - 1) / (ideal - 1), from sums over all rounds, with a bootstrap over the rounds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from _gain import Pairs, PassTimes, measure_gain, saved_time
from _gain_report import LayoutResult, report
from _measure import RankMeasurement, Run, count_iterations
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_sbld.pipeline import Floats, schedule_time
from megatron_sbld.training.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron_sbld.training.processes import distributed_run, world_size_from_environment
from megatron_sbld.training.validate import data_parallel_size, validate

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1)]  # processes, tensor, pipeline; the rest is data-parallel
CPU_DEFAULTS = {  # an iteration of about half a second on one core
    "hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 256,
    "vocab_size": 512,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "precision": "fp32",
}
GPU_DEFAULTS = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "seq_length": 2048,
    "vocab_size": 50304,
    "micro_batch_size": 4,
    "global_batch_size": 16,
    "precision": "bf16",
}


def main() -> None:
    args = parse_args()
    layouts = LAYOUTS if args.all_layouts else [(world_size_from_environment(), *parallel_sizes(args))]
    possible = [layout for layout in layouts if not torch.cuda.is_available() or layout[0] <= torch.cuda.device_count()]
    try:
        check_layouts(args, possible)
    except ValueError as error:
        sys.exit(f"realised_gain.py: error: {error}")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if int(os.environ.get("RANK", "0")) == 0:
        warn_of_load()
    if args.all_layouts:
        results = [launch(args, layout) for layout in possible]
    else:
        results = [run_layout(args, possible[0])]
    if int(os.environ.get("RANK", "0")) == 0:
        write_report(args, results)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(**(GPU_DEFAULTS if torch.cuda.is_available() else CPU_DEFAULTS))
    shown = "; default here: %(default)s"

    layout = parser.add_argument_group("layout (under torchrun; what these leave of the processes is data-parallel)")
    layout.add_argument("--tensor-model-parallel-size", type=int, default=1, help="default: 1")
    layout.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="default: 1")
    layout.add_argument(
        "--all-layouts", action="store_true", help="start 1 process, then TP 2, PP 2 and DP 2, into one report"
    )

    model = parser.add_argument_group("model and batch")
    model.add_argument("--num-layers", type=int, default=24, help="transformer layers" + shown)
    model.add_argument("--hidden-size", type=int, help="width" + shown)
    model.add_argument("--num-attention-heads", type=int, help="attention heads" + shown)
    model.add_argument("--seq-length", type=int, help="tokens of a sample" + shown)
    model.add_argument("--vocab-size", type=int, help="vocabulary, padded already" + shown)
    model.add_argument("--micro-batch-size", type=int, help="samples of a microbatch" + shown)
    model.add_argument("--global-batch-size", type=int, help="samples of an iteration" + shown)
    model.add_argument("--precision", choices=("fp32", "bf16"), help="default here: %(default)s")
    model.add_argument(
        "--recompute-granularity",
        choices=("full", "selective"),
        help="recompute activations; default: no recomputation",
    )

    measurement = parser.add_argument_group("measurement")
    measurement.add_argument(
        "--keep-probs", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.5], help="besides 1" + shown
    )
    measurement.add_argument("--rounds", type=int, default=12, help="pairs of blocks for each keep_prob" + shown)
    measurement.add_argument("--block-iterations", type=int, default=3, help="iterations of a block" + shown)
    measurement.add_argument("--warmup", type=int, default=6, help="iterations before the first block" + shown)
    measurement.add_argument("--seed", type=int, default=1234, help="of weights, tokens and decisions" + shown)
    measurement.add_argument("--threads", type=int, default=1, help="torch's CPU threads of a process" + shown)
    measurement.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "realised_gain.md", help="report; default: runs/realised_gain.md"
    )
    args = parser.parse_args()
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what the trainer's own checks do not know of."""
    for name, least in (("rounds", 2), ("block_iterations", 1), ("warmup", 0), ("threads", 1), ("vocab_size", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not allowed: at least {least}")
    if not all(0 < keep_prob < 1 for keep_prob in args.keep_probs):
        parser.error(f"--keep-probs {args.keep_probs}: each must be in (0, 1); 1 is always measured as well")
    if args.all_layouts and ("RANK" in os.environ or parallel_sizes(args) != (1, 1)):
        parser.error("--all-layouts starts its own processes: leave out torchrun and the parallel sizes")


def parallel_sizes(args: argparse.Namespace) -> tuple[int, int]:
    return args.tensor_model_parallel_size, args.pipeline_model_parallel_size


def check_layouts(args: argparse.Namespace, layouts: list[tuple[int, int, int]]) -> None:
    """The trainer's own checks, for every layout that is going to run."""
    if not layouts:
        raise ValueError(f"more processes than the {torch.cuda.device_count()} GPU(s) of this machine")
    for layout in layouts:
        validate(make_config(args, layout), layout[0])
        if args.vocab_size % layout[1]:
            raise ValueError(
                f"--vocab-size {args.vocab_size}: must be divisible by the tensor-parallel size {layout[1]}"
            )


def make_config(args: argparse.Namespace, layout: tuple[int, int, int]) -> Config:
    """The trainer's config of this measurement; what is not an option of it has the trainer's default, but dropout."""
    _, tensor, pipeline = layout
    full = args.recompute_granularity == "full"
    return Config(
        model=ModelConfig(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            seq_length=args.seq_length,
            hidden_dropout=0.0,
            attention_dropout=0.0,  # torch has no fused attention with dropout on CPUs
        ),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline),
        data=DataConfig(train_data_path=["random tokens"]),
        training=TrainingConfig(
            micro_batch_size=args.micro_batch_size,
            global_batch_size=args.global_batch_size,
            train_iters=count_iterations(args),
            seed=args.seed,
            precision=args.precision,
            recompute_granularity=args.recompute_granularity,
            recompute_method="uniform" if full else None,
            recompute_num_layers=1 if full else None,
        ),
    )


def warn_of_load() -> None:
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: load average {load:.1f}: other programs are running, times will be noisy", file=sys.stderr)


def launch(args: argparse.Namespace, layout: tuple[int, int, int]) -> LayoutResult:
    """Measure a layout in processes of its own, started as torchrun starts them."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=layout[0],
        run_id="realised_gain",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    return elastic_launch(config, run_layout)(args, layout)[0]


def run_layout(args: argparse.Namespace, layout: tuple[int, int, int]) -> LayoutResult:
    """Measure one layout; called on each of its ranks, and the same result on each."""
    torch.set_num_threads(args.threads)
    config = make_config(args, layout)
    load_before = os.getloadavg()[0]
    with distributed_run(config):
        replicas = data_parallel_size(config, dist.get_world_size())
        name = f"{layout[0]} process" if layout == (1, 1, 1) else f"TP {layout[1]} x PP {layout[2]} x DP {replicas}"
        training = config.training
        init_num_microbatches_calculator(
            dist.get_rank(), None, training.global_batch_size, training.micro_batch_size, replicas
        )
        try:
            run = Run(args, config)
            own = run.measure(name)
            everyone: list[RankMeasurement] = [own] * dist.get_world_size()
            dist.all_gather_object(everyone, own)
            return evaluate(args, name, everyone, run.num_microbatches, load_before)
        finally:
            destroy_num_microbatches_calculator()


def evaluate(
    args: argparse.Namespace, name: str, everyone: list[RankMeasurement], num_microbatches: int, load_before: float
) -> LayoutResult:
    """From all ranks' measurements to the figures of the layout."""
    times = pass_times(args, everyone, num_microbatches)
    mean = times.mean_over(np.arange(args.rounds))
    gains = {}
    for keep_prob in everyone[0].kept:
        # Ranks leave a barrier and end an iteration together, but for some microseconds: the last one counts.
        pairs = Pairs(
            undropped=np.max([rank.undropped[keep_prob] for rank in everyone], axis=0),
            dropped=np.max([rank.dropped[keep_prob] for rank in everyone], axis=0),
            kept=np.array(everyone[0].kept[keep_prob]),
        )
        gains[keep_prob] = measure_gain(pairs, times, num_microbatches, seed=args.seed)
    return LayoutResult(
        layout=name,
        gains=gains,
        iteration=float(np.mean(list(everyone[0].undropped.values())) / args.block_iterations),
        timed_iteration=float(np.mean(everyone[0].timed_iterations)),
        layer_forward=float(mean.layer_forward.mean()),
        layer_backward=float(mean.layer_backward.mean()),
        passes=float(schedule_time(mean.stage_forward, mean.stage_backward, num_microbatches)),
        layers=float(saved_time(mean, np.zeros(args.num_layers, dtype=bool), num_microbatches)),
        num_microbatches=num_microbatches,
        overhead=max((rank.overhead for rank in everyone), key=lambda overhead: overhead.total),
        rounds=args.rounds,
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
        by_round: Floats = slowest.reshape(args.rounds, -1, *slowest.shape[1:]).mean(axis=1)
        layers.append(by_round[:, :-1])
        stages.append(by_round[:, -1:])
    layer_times, stage_times = np.concatenate(layers, axis=1), np.concatenate(stages, axis=1)
    iterations = np.max([rank.timed_iterations for rank in everyone], axis=0).reshape(args.rounds, -1)
    return PassTimes(
        layer_forward=layer_times[..., 0],
        layer_backward=layer_times[..., 1],
        stage_forward=stage_times[..., 0],
        stage_backward=stage_times[..., 1],
        iteration=iterations.mean(axis=1, keepdims=True),
    )


def write_report(args: argparse.Namespace, results: list[LayoutResult]) -> None:
    torch.set_num_threads(args.threads)  # the report names it, and the processes of --all-layouts are others
    launcher = ["torchrun", "--nproc-per-node", os.environ["WORLD_SIZE"]] if "RANK" in os.environ else ["python"]
    text = report(results, list(config_lines(args)), shlex.join([*launcher, *program()]), args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {args.out}", file=sys.stderr)


def program() -> list[str]:
    return ["benchmarks/realised_gain.py", *sys.argv[1:]]


def config_lines(args: argparse.Namespace) -> Iterator[str]:
    """The configuration, for the report."""
    yield (
        f"Model: GPT, {args.num_layers} layers, hidden {args.hidden_size}, {args.num_attention_heads} heads, sequence "
        f"{args.seq_length}, vocabulary {args.vocab_size}, {args.precision}, no dropout, "
        + (f"{args.recompute_granularity} recomputation" if args.recompute_granularity else "no recomputation")
    )
    yield f"Batch: {args.global_batch_size} samples in microbatches of {args.micro_batch_size}; Adam, clipping at 1"
    yield "Dropping: LayerDrop, one decision an iteration, bernoulli sampler"
    if args.all_layouts and torch.cuda.is_available() and torch.cuda.device_count() < 2:
        yield "Not run, for want of a second GPU: TP 2, PP 2, DP 2"


if __name__ == "__main__":
    main()
