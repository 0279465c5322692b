"""Command-line options and checks that benchmarks of a model have in common."""

from __future__ import annotations

import argparse
import os

SHOWN = "; default here: %(default)s"


def add_model_options(parser: argparse._ActionsContainer) -> None:
    """The model and its batch, as _layouts.make_config takes them; the parser has their defaults."""
    add = parser.add_argument
    add("--num-layers", type=int, help="transformer layers" + SHOWN)
    add("--hidden-size", type=int, help="width" + SHOWN)
    add("--num-attention-heads", type=int, help="attention heads" + SHOWN)
    add("--seq-length", type=int, help="tokens of a sample" + SHOWN)
    add("--vocab-size", type=int, help="vocabulary, padded already" + SHOWN)
    add("--micro-batch-size", type=int, help="samples of a microbatch" + SHOWN)
    add("--global-batch-size", type=int, help="samples of an iteration" + SHOWN)
    add("--precision", choices=("fp32", "bf16"), help="default here: %(default)s")


def add_time_option(parser: argparse._ActionsContainer) -> None:
    """For machines that are lent for a while."""
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="of measuring, of each layout: no round begins later, but two are done; default: no limit",
    )


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
