#!/usr/bin/env python3
"""Measures Megatron's optimizer step as the trainer has it, beside stock megatron-core's and a plain PyTorch loop's.

    python benchmarks/optimizer_step.py
    python benchmarks/optimizer_step.py --hidden-size 1024 --out benchmarks/results/optimizer_step_gpu.md

An iteration ends with it, no dropped layer shortens it, and no kernel hides what the host does in it: before it can go
on, the host has read the gradients' norm. So the smaller the batch of a GPU and the more layers are dropped, the more
it weighs. By default the model is so small that what is timed is the host's work for as many parameters as GPT-3 350M,
1.7B and 3.6B have, not the arithmetic.

Timed is the step and zeroing the gradients, on one process, with clipping at 1 of gradients whose norm is above it,
from an idle device to an idle device. The programs take turns, in an order that changes. "Plain PyTorch" clips with
clip_grad_norm_ and steps with AdamW, both in one operation for all parameters, on fp32 weights; in bf16 Megatron keeps
a second copy of the weights, which its step has to write as well. Neither Transformer Engine nor Apex may be installed:
they have kernels of their own for parts of it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from megatron.core.optimizer import clip_grads

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common.options import check_at_least, check_one_process, make_parser
from benchmarks.common.report import publish, run_lines
from megatron_sbld.config.sections import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_sbld.training import model as trainer
from megatron_sbld.training.processes import distributed_run

VOCAB_SIZE = 512
WARMUP = 3
PATCHED = ("fuse_adam", "clip_in_groups", "copy_in_groups")
"""What build_optimizer of the trainer calls, in the order in which the table adds them."""
PROGRAMS = ("stock megatron-core", "with Adam in one pass", "and clipping in groups", "and copies in groups")
CLIPPING = ("l2_norm_impl", "multi_tensor_scale_impl", "to_local_if_dtensor")
STOCK_CLIPPING = {name: getattr(clip_grads, name) for name in CLIPPING}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    with distributed_run(Config(training=TrainingConfig(seed=args.seed))):
        lines = report(args)
    publish(lines, args.out)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--num-layers", type=int, default=24, help="transformer layers; default: %(default)s")
    add("--hidden-size", type=int, default=32, help="width; default: %(default)s")
    add("--rounds", type=int, default=60, help="steps of each program; default: %(default)s")
    add("--precisions", nargs="+", choices=("fp32", "bf16"), default=["bf16"], help="default: %(default)s")
    add("--seed", type=int, default=1234, help="of weights and gradients; default: %(default)s")
    add("--out", type=Path, help="markdown file to write")
    args = parser.parse_args()
    check_at_least(parser, args, num_layers=1, hidden_size=16, rounds=3)
    if args.hidden_size % 16:
        parser.error(f"--hidden-size {args.hidden_size} is not allowed: a multiple of 16, the width of a head")
    check_one_process(parser)
    if not clip_grads.l2_norm_impl.__name__.startswith("local"):
        parser.error("Transformer Engine or Apex is installed: megatron-core does not use what is compared here")
    return args


def report(args: argparse.Namespace) -> list[str]:
    """Markdown: what was measured with what, and a table."""
    rows = []
    for precision, distributed in itertools.product(args.precisions, (False, True)):
        rows += measure(args, precision, distributed)
    return [
        "# Megatron's optimizer step",
        "",
        *run_lines(args.seed),
        f"- Model: GPT, {args.num_layers} layers, hidden {args.hidden_size}, vocabulary {VOCAB_SIZE}; one process",
        f"- {args.rounds} steps of each program, in turns",
        "",
        "| precision | optimizer | program | median ms | least ms |",
        "| --- | --- | --- | ---: | ---: |",
        *rows,
    ]


def measure(args: argparse.Namespace, precision: str, distributed: bool) -> list[str]:
    """Rows of the table: every program with one precision and one optimizer."""
    config = Config(
        model=ModelConfig(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.hidden_size // 16,
            seq_length=16,
        ),
        training=TrainingConfig(precision=precision),
        optimizer=OptimizerConfig(clip_grad=1.0),
        parallel=ParallelConfig(use_distributed_optimizer=distributed),
    )
    steps = {name: megatron_step(config, PATCHED[:number]) for number, name in enumerate(PROGRAMS)}
    steps["plain PyTorch"] = plain_step(config)
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARMUP + args.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = steps[name]()
            if number >= WARMUP:
                times[name].append(1e3 * seconds)
    kind = "distributed" if distributed else "plain"
    return [
        f"| {precision} | {kind} | {name} | {np.median(values):.2f} | {min(values):.2f} |"
        for name, values in times.items()
    ]


def megatron_step(config: Config, patches: tuple[str, ...]) -> Callable[[], float]:
    """A function that makes a step with some of the trainer's changes and returns its seconds."""
    chunks = trainer.build_model(config, VOCAB_SIZE)
    set_clipping(STOCK_CLIPPING)
    changes = {name: getattr(trainer, name) if name in patches else _change_nothing for name in PATCHED}
    with mock.patch.multiple(trainer, **changes):
        optimizer = trainer.build_optimizer(config, chunks)
    clipping = {name: getattr(clip_grads, name) for name in CLIPPING}

    def step() -> float:
        set_clipping(clipping)
        for chunk in chunks:
            for buffer in chunk.buffers:
                buffer.grad_data.normal_()
        return seconds_of(optimizer.step, optimizer.zero_grad, *(chunk.zero_grad_buffer for chunk in chunks))

    return step


def plain_step(config: Config) -> Callable[[], float]:
    """The same for as many fp32 parameters in a plain loop."""
    params = [
        torch.nn.Parameter(param.detach().float().clone())
        for chunk in trainer.build_chunks(config, VOCAB_SIZE)
        for param in chunk.parameters()
    ]
    for param in params:
        param.grad = torch.empty_like(param)
    adam = torch.optim.AdamW(params, fused=True)

    def step() -> float:
        for param in params:
            param.grad.normal_()
        return seconds_of(
            lambda: torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True),
            adam.step,
            lambda: adam.zero_grad(set_to_none=False),
        )

    return step


def _change_nothing(*args: object) -> None: ...


def set_clipping(functions: dict[str, Callable]) -> None:
    for name, function in functions.items():
        setattr(clip_grads, name, function)


def seconds_of(*calls: Callable[[], object]) -> float:
    """From an idle device to an idle device."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
