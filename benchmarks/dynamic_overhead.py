#!/usr/bin/env python3
"""Measures what `drop.sensitivity_update: dynamic` adds to a training iteration, as a share of a GPT-3 350M iteration.

    python benchmarks/dynamic_overhead.py
    python benchmarks/dynamic_overhead.py --out benchmarks/results/dynamic_overhead.md

What is measured, on one process, with the trainer's own code: observing an iteration (rank 0 does it, the others wait);
an update of the sensitivity (estimate, broadcast, a new policy), divided by update_interval; with scope microbatch also
what the longer all-reduce of losses takes more. That ranks compare their decisions every 50 iterations instead of every
64 is not counted: they draw the same decisions for it, and exchange 56 bytes once more in 230 iterations.

The iteration that it is a share of is a lower bound, so the share is an upper one: FLOPs of the model on one GPU
(megatron_sbld/config/flops.py), less the dropped layers', at the peak rate of the hardware, without communication.
No real iteration is as fast.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common.options import make_parser
from benchmarks.common.report import publish, run_lines
from megatron_sbld.config.flops import ideal_speedup, layer_share, training_flops
from megatron_sbld.config.sections import Config, ModelConfig
from megatron_sbld.controller import DropController
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.policy import SBLDPolicy
from megatron_sbld.method.schedule import Constant
from megatron_sbld.training.processes import distributed_run
from megatron_sbld.training.sensitivity_update import SensitivityUpdate
from megatron_sbld.training.step import StepResult, _sum_over_ranks

TARGET = 0.002  # of an iteration
VOCAB_SIZE = 50304
MODEL = ModelConfig(num_layers=24, hidden_size=1024, num_attention_heads=16, seq_length=2048)  # GPT-3 350M
SEED = 1234


def main() -> None:
    args = parse_args()
    with distributed_run(Config()):
        lines = report(args)
    publish(lines, args.out)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--iterations", type=int, default=2000, help="observed, in ten blocks of which the median counts; %(default)s")
    add("--micro-batch-size", type=int, default=4, help="samples of a microbatch; default: %(default)s")
    add("--num-microbatches", type=int, nargs="+", default=[1, 8], help="of an iteration, on one GPU; %(default)s")
    add("--peak-tflops", type=float, default=989.0, help="default: H100 SXM, dense bf16, %(default)s")
    add("--out", type=Path, help="markdown file to write")
    args = parser.parse_args()
    if args.iterations < 100 or min(args.micro_batch_size, *args.num_microbatches) < 1 or args.peak_tflops <= 0:
        parser.error("needs --iterations of at least 100, and sizes above 0")
    return args


def report(args: argparse.Namespace) -> list[str]:
    """Markdown: what was measured with what, and a table."""
    rows = [measure(args, scope, number) for scope in ("iteration", "microbatch") for number in args.num_microbatches]
    lines = [
        "# What `drop.sensitivity_update: dynamic` adds to an iteration",
        "",
        *run_lines(SEED),
        f"- Iteration: lower bound for GPT-3 350M ({MODEL.num_layers} layers, hidden {MODEL.hidden_size}, sequence "
        f"{MODEL.seq_length}) on one GPU, micro batch {args.micro_batch_size}: FLOPs of the kept layers and the logits "
        f"at {args.peak_tflops:g} TFLOP/s",
        f"- update_interval {DropConfig().update_interval}, update_memory {DropConfig().update_memory}; "
        f"{args.iterations} iterations in 10 blocks, of which the median counts",
        "",
        "| decision_scope | microbatches | observing | update / interval | all-reduce | sum | iteration | share |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ]
    return [*lines, "", f"Target: a share below {TARGET:.1%}."]


def measure(args: argparse.Namespace, scope: str, num_microbatches: int) -> str:
    """A row of the table."""
    controller = DropController(policy(), seed=SEED, scope=scope)
    update = SensitivityUpdate(DropConfig(update_interval=1), controller)
    rng = np.random.default_rng(SEED)
    gap = rng.uniform(0, 0.1, MODEL.num_layers)
    iterations = args.iterations // 10 * 10
    observing = np.empty(iterations)
    for t in range(1, iterations + 1):
        controller.begin_iteration(t, num_microbatches)
        losses = 3.0 + ~controller.plan @ gap + 0.03 * rng.normal(size=num_microbatches)
        result = StepResult(float(losses.mean()), None, None, True, False, losses.tolist())
        observing[t - 1] = seconds(lambda result=result: update.observe(result.loss, result.microbatch_losses))
    updating = np.median([seconds(lambda: change_and_update(update, controller)) for _ in range(50)])
    share_of_update = updating / DropConfig().update_interval
    reduction = longer_reduction(num_microbatches) if scope == "microbatch" else 0.0
    observation = float(np.median(observing.reshape(10, -1).mean(axis=1)))
    total = observation + share_of_update + reduction
    iteration = shortest_iteration(args, num_microbatches, controller.policy.keep_probs(1).mean())
    verdict = "" if total / iteration < TARGET else " (above the target)"
    microseconds = " | ".join(f"{1e6 * value:.1f} us" for value in (observation, share_of_update, reduction, total))
    share = f"{iteration * 1e3:.1f} ms | {total / iteration:.3%}{verdict}"
    return f"| {scope} | {num_microbatches} | {microseconds} | {share} |"


def policy() -> SBLDPolicy:
    """SBLD at the paper's lowest theta, where the iteration is shortest."""
    sensitivity = np.linspace(0.0, 1.0, MODEL.num_layers)
    return SBLDPolicy(Constant(0.5), sensitivity, block_layers=(24,), allow_layers=(1,), exploration=0.02)


def change_and_update(update: SensitivityUpdate, controller: DropController) -> None:
    """An update that changes the sensitivity: the policy before is another one."""
    controller.replace_policy(policy())
    update.update_if_due()


def longer_reduction(num_microbatches: int) -> float:
    """Seconds that reducing the losses takes more with those of each microbatch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reports = [
        {"loss": torch.tensor(3.0, device=device), "num_tokens": torch.tensor(2048, device=device)}
        for _ in range(num_microbatches)
    ]
    times = [
        (
            seconds(lambda: _sum_over_ranks(reports, False)),
            seconds(lambda: _sum_over_ranks(reports, False, len(reports))),
        )
        for _ in range(500)
    ]
    short, long = np.median(times, axis=0)
    return max(float(long - short), 0.0)


def shortest_iteration(args: argparse.Namespace, num_microbatches: int, mean_keep_prob: float) -> float:
    """Seconds that no iteration on one GPU can go below."""
    full = training_flops(MODEL, VOCAB_SIZE, args.micro_batch_size * num_microbatches)
    return full / ideal_speedup(layer_share(MODEL, VOCAB_SIZE), mean_keep_prob) / (args.peak_tflops * 1e12)


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
