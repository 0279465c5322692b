#!/usr/bin/env python3
"""Measures the residual add: what share of a clone's memory bandwidth it reaches, beside other implementations.

    python benchmarks/residual.py --out benchmarks/results/residual_gpu.md
    python benchmarks/residual.py --parts add --hidden-sizes 1024 --rows all tokens-50

Each case is a shape [s, b, hidden] of the residual stream, the rows that x has, dropout, and the residual's dtype; x is
bf16. In each round a clone of the residual and each implementation's forward and backward pass are timed once, in an
order that rotates, with cold caches (common/residual_timing.py). Share of clone's bandwidth = needed bytes / time, by
the clone's bytes / time, where "needed" is what the function cannot do without (common/residual_cases.py). An
implementation that needs several passes over memory has a low share even if each pass is as fast as memory. Predicted
times are the bytes that the implementation has to move by the model in common/residual_cases.py, at the clone's
bandwidth.

Then the step time of a GPT with `drop.residual: stock` and `fused`, in alternating blocks of one run.

Aim on a GPU: at least 95 % of clone's bandwidth forward and 90 % backward, ahead of every peer. Intervals are 95 %, by
bootstrap over the rounds.
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
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common.gain import Interval, time_ratio
from benchmarks.common.options import (
    SHOWN,
    add_block_options,
    add_model_options,
    add_run_options,
    check_at_least,
    check_named_once,
    check_one_process,
    make_parser,
)
from benchmarks.common.processes import check_config, stop, warn_of_load
from benchmarks.common.report import model_text, number_text, publish, run_lines
from benchmarks.common.residual_cases import ROWS, Case, Implementation, implementations, versions
from benchmarks.common.residual_step import measure_step, step_config
from benchmarks.common.residual_timing import Measurement, Timer
from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.ranks import this_device
from megatron_sbld.residual import describe_choice

PARTS = ("add", "step")
AIM = {"forward": 0.95, "backward": 0.90}  # of clone's bandwidth
FORECAST_HIDDEN_SIZES = [1024, 2304, 3072, 8192]
FORECAST_SHAPE = (2048, 4)  # tokens, samples
FORECAST_BANDWIDTH = 3.0e12  # of a clone on an H100 SXM: 90 % of its 3.35 TB/s
ON_CPU = {"num_layers": 2, "hidden_size": 64, "seq_length": 64, "micro_batch_size": 4}


@dataclass(frozen=True)
class StepTimes:
    """Seconds of blocks of iterations, [rounds] each."""

    dropout_prob: float
    stock: Floats
    fused: Floats


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    configs = [step_config(args, prob) for prob in args.dropout_probs] if "step" in args.parts else []
    for config in configs:
        check_config(config)
    try:
        choice = describe_choice(this_device())
    except (ValueError, RuntimeError) as error:
        stop(error)
    warn_of_load()
    measurements, timer, missing = [], Timer(this_device()), []
    if "add" in args.parts:
        chosen, missing = implementations()
        chosen = [one for one in chosen if not args.without or one.name not in args.without]
        for case in track(cases(args), "residual adds", console=Console(stderr=True)):
            measurement = Measurement(case, chosen, timer, args.seed)
            measurement.run(args.rounds)
            measurements.append(measurement)
    steps = [
        StepTimes(prob, *measure_step(args, config)) for prob, config in zip(args.dropout_probs, configs, strict=False)
    ]
    publish(report(args, choice, measurements, missing, timer, steps), args.out)


def cases(args: argparse.Namespace) -> list[Case]:
    """All rows with a residual of either dtype; part of the rows with a bf16 one."""
    found = []
    for hidden, rows, prob in itertools.product(args.hidden_sizes, args.rows, args.dropout_probs):
        for wide in (False, True) if rows == "all" else (False,):
            found.append(Case(args.seq_length, args.micro_batch_size, hidden, rows, wide, prob))
    return found


def parse_args() -> argparse.Namespace:
    parser, on_gpu = make_parser(__doc__), torch.cuda.is_available()
    add, shown = parser.add_argument, SHOWN
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the add by itself, a model's step" + shown)
    sizes = FORECAST_HIDDEN_SIZES if on_gpu else [256]
    add("--hidden-sizes", type=int, nargs="+", default=sizes, help="of the add" + shown)
    add("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="that x has" + shown)
    add("--dropout-probs", type=float, nargs="+", default=[0.0, 0.1], help="of the add and the step" + shown)
    add("--without", nargs="+", metavar="NAME", help="implementations to leave out, as the report names them")
    model = parser.add_argument_group("the step's model; --seq-length and --micro-batch-size are the add's as well")
    add_model_options(model, **({} if on_gpu else ON_CPU))
    add_block_options(parser, rounds=20, rounds_of="of each case, and pairs of blocks of steps", warmup=4)
    add_run_options(parser, "residual", seed_of="tensors, weights and tokens")
    args = parser.parse_args()
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_at_least(parser, args, rounds=2, block_iterations=1, warmup=1, threads=1, micro_batch_size=2)
    check_at_least(parser, args, seq_length=2, vocab_size=2)
    if min(args.hidden_sizes) < 1:
        parser.error(f"--hidden-sizes {args.hidden_sizes}: each must be at least 1")
    if not all(0 <= prob < 1 for prob in args.dropout_probs):
        parser.error(f"--dropout-probs {args.dropout_probs}: each must be in [0, 1)")
    check_named_once(parser, args, "parts", "hidden_sizes", "rows", "dropout_probs", "without")
    names = [one.name for one in implementations()[0]]
    for name in args.without or []:
        if name not in names[1:]:  # the first is what this is about
            parser.error(f"--without {name!r}: can leave out {', '.join(names[1:])}")
    check_one_process(parser)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def report(
    args: argparse.Namespace,
    choice: str,
    measurements: Sequence[Measurement],
    missing: Sequence[str],
    timer: Timer,
    steps: Sequence[StepTimes],
) -> list[str]:
    on_gpu = torch.cuda.is_available()
    lines = [
        "# The residual add: memory bandwidth and step time",
        "",
        *(verdict(choice, measurements) if on_gpu else not_a_gpu()),
        "",
        f"Aim on a GPU: at least {AIM['forward']:.0%} of clone's bandwidth forward and {AIM['backward']:.0%} backward, "
        "ahead of every peer. Share of clone's bandwidth = needed bytes / time, by the clone's bytes / time, needed "
        "being what the function cannot do without. In brackets: 95 % confidence intervals by bootstrap over rounds. "
        "The method: docstring of `benchmarks/residual.py`; the model of bytes: `benchmarks/common/residual_cases.py`.",
        "",
        *run_lines(args.seed, ["torch", "megatron-core", *versions()]),
        f"- {args.rounds} rounds",
        f'- Measured as "fused": {choice}',
        *(f"- {line}" for line in missing),
    ]
    if args.without:
        lines.append(f"- Left out on request: {', '.join(args.without)}")
    if timer.late:
        lines.append(
            f"- {timer.late} of {timer.calls} calls took the host too long to queue: those times are the host's"
        )
    for hidden in args.hidden_sizes if measurements else []:
        lines += add_table(args, hidden, [one for one in measurements if one.case.hidden == hidden])
    if steps:
        lines += step_table(args, steps)
    return lines if on_gpu else lines + forecast()


def not_a_gpu() -> list[str]:
    return [
        "**These are not GPU figures.** They show that the program runs from end to end, at toy sizes and on one CPU "
        "core, where the library is plain loops that were not made for speed; nothing about the aim follows from them. "
        "On a machine with a GPU, "
        "`python benchmarks/residual.py --out benchmarks/results/residual_gpu.md` measures what counts. What the model "
        "of bytes predicts for it is the last table.",
    ]


def verdict(choice: str, measurements: Sequence[Measurement]) -> list[str]:
    """Whether the aim is met, and where not."""
    if "the library" not in choice:
        return [f"**The kernel was not measured**: {choice}."]
    failed = []
    for one in measurements:
        fused = one.implementations[0]
        where = case_text(one.case) + f", hidden {one.case.hidden}"
        for pass_, aim in AIM.items():
            share = one.share_of_clone(fused, pass_, seed=0)
            if share is not None and share.value < aim:
                failed.append(f"{pass_} of {where}: {share.value:.1%} of clone's bandwidth")
            own = np.mean(getattr(one.times[fused.name], pass_))
            peers = [p.name for p in one.implementations if not p.own]
            failed += [
                f"{pass_} of {where}: behind {name}" for name in peers if np.mean(getattr(one.times[name], pass_)) < own
            ]
    if not measurements:
        return ["The add by itself was not measured in this run."]
    if not failed:
        return [f"**The aim is met in all {len(measurements)} cases.**"]
    return [f"**The aim is not met everywhere** ({len(measurements)} cases):", "", *(f"- {line}" for line in failed)]


def other_result(case: Case, one: Implementation) -> str:
    """A remark on a peer that does not compute the same."""
    return " (which makes the stream bf16)" if case.wide and one.narrows else ""


def case_text(case: Case) -> str:
    return f"{case.rows}, {'fp32' if case.wide else 'bf16'} residual, dropout {case.dropout_prob:g}"


def add_table(args: argparse.Namespace, hidden: int, measurements: Sequence[Measurement]) -> list[str]:
    """Of one hidden size: each implementation's bytes, times and share of clone's bandwidth."""
    clones = [f"{one.bandwidth() / 1e9:,.1f}" for one in measurements]
    lines = [
        "",
        f"## [{args.seq_length}, {args.micro_batch_size}, {hidden}]",
        "",
        f"Clone: {min(clones, key=_number)} to {max(clones, key=_number)} GB/s. Bytes are per element of the residual, "
        "times in us; predicted = bytes at the clone's bandwidth of the case. Peak: MiB allocated at one time in both "
        "passes, for which the residual that is overwritten in place was there before. "
        "Without dropout some implementations return d_y itself as d_x; Megatron's y is bf16 even if the residual is "
        "fp32; flash-attention's has no bias and includes the layer norm that follows.",
        "",
        "| rows of x | residual | dropout | implementation | forward: bytes | predicted | measured | of clone "
        "| backward: bytes | predicted | measured | of clone | peak |",
        "| --- | --- | ---: | --- |" + " ---: |" * 9,
    ]
    for one in measurements:
        lines += [add_row(args, one, implementation) for implementation in one.implementations]
    return lines


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def add_row(args: argparse.Namespace, one: Measurement, implementation: Implementation) -> str:
    case, times, traffic = one.case, one.times[implementation.name], implementation.traffic(one.case)
    cells = [case.rows, "fp32" if case.wide else "bf16", f"{case.dropout_prob:g}", implementation.name]
    for pass_ in ("forward", "backward"):
        size = getattr(traffic, pass_)
        predicted = size * case.elements / one.bandwidth()
        cells += [f"{size:.1f}", f"{1e6 * predicted:,.1f}", f"{1e6 * np.mean(getattr(times, pass_)):,.1f}"]
        share = one.share_of_clone(implementation, pass_, args.seed)
        cells.append("-" if share is None else percent(share))
    return "| " + " | ".join([*cells, f"{times.peak / 2**20:,.2f}"]) + " |"


def percent(share: Interval) -> str:
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"


def step_table(args: argparse.Namespace, steps: Sequence[StepTimes]) -> list[str]:
    tokens = args.block_iterations * args.global_batch_size * args.seq_length
    lines = [
        "",
        "## Step time, `drop.residual: stock` and `fused`",
        "",
        f"{model_text(args)}; {args.global_batch_size} samples in microbatches of {args.micro_batch_size}; nothing "
        f"dropped; {args.rounds} pairs of blocks of {args.block_iterations} steps. Ratio: fused over stock, above 1 "
        "fused is the faster one.",
        "",
        "| hidden_dropout | stock, ms | fused, ms | tokens/s stock | tokens/s fused | their ratio |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in steps:
        per_step = [1e3 * times.mean() / args.block_iterations for times in (one.stock, one.fused)]
        speeds = [tokens / times.mean() for times in (one.stock, one.fused)]
        lines.append(
            f"| {one.dropout_prob:g} | {per_step[0]:,.1f} | {per_step[1]:,.1f} | {speeds[0]:,.0f} | {speeds[1]:,.0f} "
            f"| {number_text(time_ratio(one.stock, one.fused, seed=args.seed))} |"
        )
    return lines


def forecast() -> list[str]:
    """What the model of bytes predicts for a GPU, to be there before anything is measured."""
    s, b = FORECAST_SHAPE
    chosen, _ = implementations()
    lines = [
        "",
        "## Predicted for an H100, before any measurement",
        "",
        f"[{s}, {b}, hidden], bf16 residual: the bytes that each has to move, at {FORECAST_BANDWIDTH / 1e12:g} TB/s "
        "for a clone (assumed: 90 % of the peak). Share: needed bytes by moved ones, for any hidden size. us: hidden "
        + ", ".join(map(str, FORECAST_HIDDEN_SIZES))
        + ". No launch, no index and no reading of the bias is counted.",
        "",
        "| rows of x | dropout | implementation | forward: bytes | share | us | backward: bytes | share | us |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rows, prob in itertools.product(("all", "none", "samples-50", "tokens-50"), (0.0, 0.1)):
        for one in chosen:
            if rows in one.rows:
                lines.append(forecast_row(Case(s, b, FORECAST_HIDDEN_SIZES[0], rows, False, prob), one))
    return [*lines, "", "Behind a peer by this model:", "", *(predicted_behind(chosen) or ["- nowhere"])]


def predicted_behind(chosen: Sequence[Implementation]) -> list[str]:
    """Where a peer has fewer bytes to move than the fused add: there the aim cannot be met."""
    lines = []
    for rows, wide, prob in itertools.product(ROWS, (False, True), (0.0, 0.1)):
        case = Case(*FORECAST_SHAPE, FORECAST_HIDDEN_SIZES[0], rows, wide, prob)
        for one, pass_ in itertools.product(chosen, AIM):
            own, other = getattr(chosen[0].traffic(case), pass_), getattr(one.traffic(case), pass_)
            if not one.own and rows in one.rows and other < own and (rows == "all" or not wide):
                moved = f"{one.name}{other_result(case, one)} moves {other:g} bytes, the fused add {own:g}"
                lines.append(f"- {pass_} of {case_text(case)}: {moved}")
    return lines


def forecast_row(case: Case, one: Implementation) -> str:
    traffic, necessary = one.traffic(case), one.needed(case)
    cells = [case.rows, f"{case.dropout_prob:g}", one.name]
    for pass_ in ("forward", "backward"):
        size, least = getattr(traffic, pass_), getattr(necessary, pass_)
        seconds = [size * case.s * case.b * hidden / FORECAST_BANDWIDTH for hidden in FORECAST_HIDDEN_SIZES]
        share = f"{least / size:.0%}" if size else "-"
        cells += [f"{size:.1f}", share, " / ".join(f"{1e6 * value:.0f}" for value in seconds)]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
