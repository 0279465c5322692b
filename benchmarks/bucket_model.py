#!/usr/bin/env python3
"""Models what it saves not to reduce the gradients of buckets whose every parameter belongs to dropped layers.

    python benchmarks/bucket_model.py
    python benchmarks/bucket_model.py --measure --out benchmarks/results/bucket_model.md

A layer that is dropped for a whole iteration has a zero gradient on every replica, so a bucket that holds dropped
layers alone need not be reduced, and is not (mcore/skip/bucket_groups.py, built because of this model). How often that
happens depends on Megatron's buckets: with overlap_grad_reduce it closes a bucket at max(40M, 1M x
data-parallel size) parameters, counted from the last layer to the first, without overlap it has one bucket
(megatron-core 0.16.1, distributed_data_parallel.py:65, param_and_grad_buffer.py:705), which can never be skipped.

Bytes: the expected share of a reduction's bytes is exact, P(bucket) = product of its layers' drop probabilities, and 0
for a bucket with anything that is no layer's (embedding, final norm).

Time: with overlap, buckets are reduced one after the other while the last microbatch's backward pass goes on, each when
its first layer's backward pass has ended; exposed is what ends after that pass. Passes take FLOPs / achieved FLOP/s, a
dropped layer none; a reduction takes 2 (n - 1)/n x bytes / bandwidth without latency, or with --reduce-scatter half of
it, as the distributed optimizer does. Saved is the exposed time with all buckets reduced less that with the skippable
ones left out, as a share of the mean iteration, over draws of the decisions. The optimizer's step counts as free, so
shares are upper bounds. NumPy alone; --measure adds what a reduction takes here, on two processes, and what leaving
some out saves, on two and four (common/reduction_time.py).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common.report import command_line, publish
from megatron_sbld.config.flops import layer_flops_per_token, logits_flops_per_token
from megatron_sbld.config.sections import ModelConfig
from megatron_sbld.method.decisions import draw_plan
from megatron_sbld.method.policy import LayerDropPolicy, PLDPolicy, Policy
from megatron_sbld.method.schedule import Constant
from megatron_sbld.predict.parameters import Bucket, default_bucket_size, layer_parameters, make_buckets

WORTH = 0.02  # of an iteration: what would justify building it
VOCAB_SIZE = 51200
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """A GPT of the paper's series, and over how many tensor-parallel ranks it is spread."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    tensor_parallel: int = 1
    seq_length: int = 2048

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_heads,
            seq_length=self.seq_length,
        )


SHAPES = (
    Shape("GPT-3 350M", 24, 1024, 16),
    Shape("GPT-3 1.7B", 24, 2304, 24),
    Shape("GPT-3 3.6B, TP 2", 30, 3072, 32, tensor_parallel=2),
)


def parameters(shape: Shape, vocab_size: int = VOCAB_SIZE) -> list[tuple[int, int]]:
    """(values, owner as in Bucket) of each parameter of a tensor-parallel rank, as Megatron registers them."""
    hidden, tp = shape.hidden_size, shape.tensor_parallel
    layer = layer_parameters(shape.model, tp)
    embedding = [(vocab_size // tp * hidden, 0), (shape.seq_length * hidden, 0)]
    layers = [(size, number) for number in range(1, shape.num_layers + 1) for size in layer]
    return [*embedding, *layers, *[(hidden, shape.num_layers + 1)] * 2]


def cut_at_layers(params: Sequence[tuple[int, int]]) -> list[Bucket]:
    """What Megatron does not do: a bucket of its own for each layer."""
    groups = itertools.groupby(reversed(params), key=lambda param: param[1])
    return [Bucket(sum(count for count, _ in group), frozenset([owner])) for owner, group in groups]


def skip_probabilities(buckets: Sequence[Bucket], keep_probs: Floats) -> Floats:
    """Probability that a bucket holds dropped layers alone, for layers that are drawn by themselves, [buckets]."""
    drop_probs = np.concatenate([[0.0], 1 - keep_probs, [0.0]])  # what is no layer's is never dropped
    return np.array([np.prod(drop_probs[sorted(bucket.owners)]) for bucket in buckets])


def saved_bytes(buckets: Sequence[Bucket], keep_probs: Floats) -> float:
    """Expected share of a reduction's bytes that skipping would save."""
    sizes = np.array([bucket.size for bucket in buckets])
    return float(skip_probabilities(buckets, keep_probs) @ sizes / sizes.sum())


def skipped(buckets: Sequence[Bucket], kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which buckets hold dropped layers alone, [n, L] -> [n, buckets]."""
    needed = np.pad(kept, ((0, 0), (1, 1)), constant_values=True)
    return np.stack([~needed[:, sorted(bucket.owners)].any(axis=1) for bucket in buckets], axis=1)


@dataclass(frozen=True)
class Speeds:
    """Seconds of passes and reductions on one rank."""

    layer_backward: float
    """Of one microbatch; the forward pass takes half of it."""
    logits_backward: float
    second_per_value: float
    """Of reducing one gradient value."""


def speeds(shape: Shape, data_parallel: int, args: argparse.Namespace, bandwidth: float) -> Speeds:
    """From the FLOP/s that a rank achieves and the bandwidth of its reductions, in GB/s."""
    rate = args.tflops * 1e12 / (2 * args.micro_batch_size * shape.seq_length)  # backward: twice the forward FLOPs
    return Speeds(
        layer_backward=layer_flops_per_token(shape.model) / shape.tensor_parallel / rate,
        logits_backward=logits_flops_per_token(shape.model, VOCAB_SIZE) / shape.tensor_parallel / rate,
        second_per_value=(1 if args.reduce_scatter else 2)
        * (1 - 1 / data_parallel)
        * args.bytes_per_value
        / (bandwidth * 1e9),
    )


def exposed_time(
    buckets: Sequence[Bucket], kept: NDArray[np.bool_], speed: Speeds, skip: NDArray[np.bool_] | None = None
) -> Floats:
    """Seconds that reductions go on after the last microbatch's backward pass, of each draw [n, L] -> [n].

    skip: buckets that are not reduced, [n, buckets].
    """
    backward = speed.layer_backward * kept
    # When the backward pass of each owner ends: the final norm's with the logits', the embedding's with layer 1's.
    ends = speed.logits_backward + np.cumsum(backward[:, ::-1], axis=1)[:, ::-1]  # [n, L]
    ends = np.concatenate([ends[:, :1], ends, np.full((len(kept), 1), speed.logits_backward)], axis=1)
    end = np.zeros(len(kept))
    for index, bucket in enumerate(buckets):
        time = np.full(len(kept), speed.second_per_value * bucket.size)
        if skip is not None:
            time[skip[:, index]] = 0.0
        end = np.where(time > 0, np.maximum(end, ends[:, min(bucket.owners)]) + time, end)
    return np.maximum(end - ends[:, 0], 0.0)


def saved_share(
    buckets: Sequence[Bucket], kept: NDArray[np.bool_], speed: Speeds, num_microbatches: int
) -> tuple[float, float]:
    """(exposed share of the mean iteration, share of it that skipping saves), over draws [n, L]."""
    everything = exposed_time(buckets, kept, speed)
    some = exposed_time(buckets, kept, speed, skipped(buckets, kept))
    passes = 1.5 * num_microbatches * (speed.logits_backward + speed.layer_backward * kept.sum(axis=1))
    iteration = float((passes + everything).mean())
    return float(everything.mean()) / iteration, float((everything - some).mean()) / iteration


def policies(num_layers: int) -> dict[str, Policy]:
    """Uniform keep probabilities, and PLD's, which fall with depth from 1 to about theta."""
    return {
        f"{name} {keep_prob:g}": policy(Constant(keep_prob), num_layers)
        for keep_prob in (0.7, 0.5)
        for name, policy in (("uniform", LayerDropPolicy), ("PLD theta", PLDPolicy))
    }


def draws(policy: Policy, args: argparse.Namespace) -> NDArray[np.bool_]:
    """Decisions of as many iterations as asked for, [n, L]."""
    keep_probs = policy.keep_probs(1)
    return np.concatenate([draw_plan(keep_probs, args.seed, t, 1) for t in range(1, args.draws + 1)])


def main() -> None:
    args = parse_args()
    publish(report(args), args.out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-parallel", type=int, nargs="+", default=[2, 4, 8, 64], help="sizes; default: %(default)s")
    add(
        "--bandwidths",
        type=float,
        nargs="+",
        default=[300.0, 50.0, 12.5, 1.25],
        help="GB/s of a rank's reductions; default: NVLink, 400 and 100 Gbit/s a GPU, 10 Gbit Ethernet",
    )
    add("--tflops", type=float, default=400.0, help="TFLOP/s that a GPU achieves; default: %(default)s (H100, bf16)")
    add("--micro-batch-size", type=int, default=4, help="samples of a microbatch; default: %(default)s")
    add("--num-microbatches", type=int, nargs="+", default=[1, 8], help="of an iteration; default: %(default)s")
    add("--bytes-per-value", type=int, default=4, help="of a gradient; default: 4, fp32 as Megatron-LM reduces bf16's")
    add("--reduce-scatter", action="store_true", help="as the distributed optimizer does; default: all-reduce")
    add("--draws", type=int, default=500, help="iterations that are averaged over; default: %(default)s")
    add("--seed", type=int, default=1234, help="of the decisions; default: %(default)s")
    add("--measure", action="store_true", help="time a reduction with and without overlap on two processes here")
    add("--out", type=Path, help="markdown file to write")
    args = parser.parse_args()
    if min(args.data_parallel) < 2:
        parser.error(f"--data-parallel {args.data_parallel}: one replica reduces nothing, each must be at least 2")
    positive = [*args.bandwidths, args.tflops, args.micro_batch_size, *args.num_microbatches, args.bytes_per_value]
    if min(positive) <= 0 or args.draws < 1:
        parser.error("bandwidths, rates, sizes and draws must be above 0")
    return args


def report(args: argparse.Namespace) -> list[str]:
    """Markdown: bytes, exposed time, what skipping saves, where it is worth it, and the measurement if asked for."""
    reduction = "reduce-scatter" if args.reduce_scatter else "all-reduce"
    savings = {at_layers: model_savings(args, at_layers) for at_layers in (False, True)}
    lines = [
        "# What skipping the reduction of dropped layers' buckets is worth",
        "",
        'A model, not a measurement, but for a last section "Measured"; the method: docstring of '
        "`benchmarks/bucket_model.py`.",
        "",
        f"- Command: `{command_line()}`",
        f"- Date: {time.strftime('%Y-%m-%d')}; seed: {args.seed}, {args.draws} draws",
        f"- Gradients of {args.bytes_per_value} bytes, {reduction}; {args.tflops:g} TFLOP/s a GPU; microbatches of "
        f"{args.micro_batch_size} samples of 2048 tokens; vocabulary {VOCAB_SIZE}",
        "",
        *bytes_table(args),
        "",
        *exposed_table(args, savings[False]),
    ]
    for at_layers, title in ((False, "Megatron's default buckets"), (True, "if each layer had a bucket of its own")):
        lines += ["", *saved_table(args, savings[at_layers], title)]
    lines += ["", *verdict(args, savings[False])]
    if args.measure:
        from benchmarks.common.reduction_time import measured_lines  # needs torch and Megatron

        lines += ["", *measured_lines(args.seed)]
    return lines


@dataclass(frozen=True)
class Saving:
    """Shares of an iteration in one setting."""

    shape: Shape
    data_parallel: int
    bandwidth: float
    num_microbatches: int
    drops: str
    exposed: float
    saved: float


def model_savings(args: argparse.Namespace, at_layers: bool) -> list[Saving]:
    """Every setting, with Megatron's default buckets or with ones that are cut at the layers' borders."""
    savings = []
    for shape in SHAPES:
        params = parameters(shape)
        decisions = {name: draws(policy, args) for name, policy in policies(shape.num_layers).items()}
        for data_parallel, bandwidth in itertools.product(args.data_parallel, args.bandwidths):
            size = default_bucket_size(data_parallel)
            buckets = cut_at_layers(params) if at_layers else make_buckets(params, size)
            speed = speeds(shape, data_parallel, args, bandwidth)
            savings += [
                Saving(shape, data_parallel, bandwidth, number, name, *saved_share(buckets, kept, speed, number))
                for number, (name, kept) in itertools.product(args.num_microbatches, decisions.items())
            ]
    return savings


def bytes_table(args: argparse.Namespace) -> list[str]:
    names = list(policies(2))
    lines = [
        "## Bytes, Megatron's default buckets",
        "",
        "| model | DP | bucket size | buckets | layers in a bucket | of layers alone | "
        + " | ".join(f"bytes saved, {name}" for name in names)
        + " |",
        "| --- | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * len(names),
    ]
    for shape, data_parallel in itertools.product(SHAPES, args.data_parallel):
        size = default_bucket_size(data_parallel)
        buckets = make_buckets(parameters(shape), size)
        outside = {0, shape.num_layers + 1}
        layers = [len(bucket.owners - outside) for bucket in buckets]
        shares = [saved_bytes(buckets, policy.keep_probs(1)) for policy in policies(shape.num_layers).values()]
        lines.append(
            f"| {shape.name} | {data_parallel} | {size / 1e6:.0f}M | {len(buckets)} | {min(layers)} to {max(layers)} "
            f"| {sum(not bucket.owners & outside for bucket in buckets)} | "
            + " | ".join(f"{share:.2%}" for share in shares)
            + " |"
        )
    return lines


def exposed_table(args: argparse.Namespace, savings: Sequence[Saving]) -> list[str]:
    """What is exposed, for the drop setting that leaves the least computation to hide it."""
    columns = list(itertools.product(args.num_microbatches, args.bandwidths))
    lines = [
        "## Exposed reduction as a share of an iteration, Megatron's default buckets, uniform 0.5",
        "",
        "| model | DP | " + " | ".join(f"{bandwidth:g} GB/s, M = {number}" for number, bandwidth in columns) + " |",
        "| --- | ---: |" + " ---: |" * len(columns),
    ]
    exposed = {
        (s.shape, s.data_parallel, s.num_microbatches, s.bandwidth): s.exposed
        for s in savings
        if s.drops == "uniform 0.5"
    }
    for shape, data_parallel in itertools.product(SHAPES, args.data_parallel):
        cells = [f"{exposed[shape, data_parallel, number, bandwidth]:.1%}" for number, bandwidth in columns]
        lines.append(f"| {shape.name} | {data_parallel} | " + " | ".join(cells) + " |")
    return [*lines, "", "M: microbatches of an iteration on a replica."]


def saved_table(args: argparse.Namespace, savings: Sequence[Saving], title: str) -> list[str]:
    """What skipping saves, from the data-parallel size at which it is least to that at which it is most."""
    columns = list(itertools.product(args.num_microbatches, args.bandwidths))
    lines = [
        f"## Saved share of an iteration, {title}",
        "",
        "| model | drops | " + " | ".join(f"{bandwidth:g} GB/s, M = {number}" for number, bandwidth in columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for shape, name in itertools.product(SHAPES, policies(2)):
        cells = []
        for column in columns:
            shares = [
                s.saved
                for s in savings
                if (s.shape, s.drops, s.num_microbatches, s.bandwidth) == (shape, name, *column)
            ]
            cells.append(f"{min(shares):.2%} to {max(shares):.2%}")
        lines.append(f"| {shape.name} | {name} | " + " | ".join(cells) + " |")
    return [*lines, "", f"From the least to the most of DP {', '.join(map(str, args.data_parallel))}."]


def verdict(args: argparse.Namespace, savings: Sequence[Saving]) -> list[str]:
    """For each bandwidth, where skipping saves what would justify it."""
    lines = [f"## Settings in which it is worth {WORTH:.0%} of an iteration, Megatron's default buckets", ""]
    for bandwidth in args.bandwidths:
        here = [saving for saving in savings if saving.bandwidth == bandwidth]
        best = max(here, key=lambda saving: saving.saved)
        lines.append(
            f"- {bandwidth:g} GB/s: {sum(saving.saved >= WORTH for saving in here)} of {len(here)}; the most is "
            f"{best.saved:.2%}: {best.shape.name}, DP {best.data_parallel}, M = {best.num_microbatches}, {best.drops}"
        )
    return lines


if __name__ == "__main__":
    main()
