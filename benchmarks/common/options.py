"""Command-line options and checks that benchmarks have in common."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.common.layouts import model_defaults
from benchmarks.common.report import ROOT

SHOWN = "; default here: %(default)s"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """With a benchmark's docstring as its help."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model_options(parser: argparse._ActionsContainer, *, one_microbatch: bool = False, **defaults: object) -> None:
    """The model and its batch, as layouts.make_config takes them.

    one_microbatch: the benchmark itself sets global_batch_size.
    defaults: of these options, where a benchmark has others.
    """
    parser.set_defaults(**{"num_layers": 24, "recompute_granularity": None, **model_defaults(), **defaults})
    add = parser.add_argument
    add("--num-layers", type=int, help="transformer layers" + SHOWN)
    add("--hidden-size", type=int, help="width" + SHOWN)
    add("--num-attention-heads", type=int, help="attention heads" + SHOWN)
    add("--seq-length", type=int, help="tokens of a sample" + SHOWN)
    add("--vocab-size", type=int, help="vocabulary, padded already" + SHOWN)
    add("--micro-batch-size", type=int, help="samples of a microbatch" + SHOWN)
    if not one_microbatch:
        add("--global-batch-size", type=int, help="samples of an iteration" + SHOWN)
    add("--precision", choices=("fp32", "bf16"), help="default here: %(default)s")


def add_recompute_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--recompute-granularity",
        choices=("full", "selective"),
        help="recompute activations; default: no recomputation",
    )


def add_block_options(parser: argparse._ActionsContainer, *, rounds: int, rounds_of: str, warmup: int) -> None:
    """Of measuring in rounds of blocks."""
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help=rounds_of + SHOWN)
    add("--block-iterations", type=int, default=3, help="iterations of a block" + SHOWN)
    add("--warmup", type=int, default=warmup, help="iterations of each kind before the first block" + SHOWN)


def add_time_option(parser: argparse._ActionsContainer) -> None:
    """For machines that are lent for a while."""
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="of measuring, of each layout: no round begins later, but two are done; default: no limit",
    )


def add_run_options(parser: argparse._ActionsContainer, name: str, seed_of: str) -> None:
    """What every run of a model has: seed, threads, and where the report of the benchmark with this name goes."""
    add, out = parser.add_argument, Path("runs") / f"{name}.md"
    add("--seed", type=int, default=1234, help=f"of {seed_of}" + SHOWN)
    add("--threads", type=int, default=1, help="torch's CPU threads of a process" + SHOWN)
    add("--out", type=Path, default=ROOT / out, help=f"report; default: {out}")


def check_at_least(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    for name, value in least.items():
        if not getattr(args, name) >= value:  # nan neither
            parser.error(f"{_option(name)} {getattr(args, name)} is not allowed: at least {value}")


def check_named_once(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Of options with a list of values, or None."""
    for name in names:
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            parser.error(f"{_option(name)} {values}: each may be named once")


def check_one_process(parser: argparse.ArgumentParser) -> None:
    if "RANK" in os.environ:
        parser.error("runs in one process: leave out torchrun")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
