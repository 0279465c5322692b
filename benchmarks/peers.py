#!/usr/bin/env python3
"""Measures this project beside other programs that drop layers: the same GPT, decisions and machine, in one run.

    python benchmarks/peers.py --out benchmarks/results/peers_cpu.md
    python benchmarks/peers.py --peers fused megatron plain --keep-probs 0.5

Peers: this project on megatron-core, with Megatron's residual adds and with `drop.residual: fused`, each with its own
layers and with `training.torch_compile`; Hugging Face transformers' OPT with its built-in LayerDrop (`pip install
'.[bench]'`); a plain PyTorch loop that leaves dropped layers out, eager and with compiled layers. What they share and
where they differ is in common/peer_models.py. All run in one process, one after the other, on the same random tokens.

What is measured. Rounds; in each round, for each keep_prob and each peer, one block of undropped and one of dropped
iterations, then one undropped iteration whose layers are timed by hooks (common/layer_times.py). The order of the peers
rotates with the rounds, and the order of a pair alternates, so that a slower moment of the machine meets all alike.
Every peer takes the same decisions, one draw an iteration from (seed, iteration): this project draws them itself, the
loop is given them, and OPT's own random numbers are replaced by ones that give them, after it has drawn its own.

Ideal gain = T / (T - time of the dropped layers), realised gain = undropped over dropped time, ratio = (realised - 1) /
(ideal - 1): as in realised_gain.py, for each peer from its own layers' times. Intervals are 95 %, by bootstrap over the
rounds; of two peers' times the rounds are drawn together.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common.gain import Pairs, PassTimes, measure_gain, time_ratio
from benchmarks.common.layer_times import ModuleTimer
from benchmarks.common.layouts import Layout, make_config
from benchmarks.common.model import DISTINCT_BATCHES, random_batches
from benchmarks.common.options import (
    SHOWN,
    add_block_options,
    add_model_options,
    add_run_options,
    add_time_option,
    check_at_least,
    check_named_once,
    check_one_process,
    make_parser,
)
from benchmarks.common.peer_models import (
    AFTER_ALL,
    TRANSFORMERS_HINT,
    CompiledTorch,
    FusedMegatronSbld,
    HuggingFaceOPT,
    MegatronSbld,
    Peer,
    PlainTorch,
    deepspeed_note,
)
from benchmarks.common.processes import check_config, megatron_run, warn_of_load
from benchmarks.common.report import gain_text, model_text, number_text, publish, run_lines
from benchmarks.common.rounds import Deadline, progress_bar
from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController
from megatron_sbld.data.batches import Batch
from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.method.decisions import draw_plan
from megatron_sbld.method.policy import LayerDropPolicy

OWN = ("megatron", "fused", "megatron-compiled", "fused-compiled")
PEERS = (*OWN, "opt", "plain", "plain-compiled")


class Decisions:
    """Which layers each dropped iteration keeps: the same for every peer, known before anything is timed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.theta: dict[int, float] = {}  # iteration -> keep_prob
        first = 1
        for _, keep_prob in itertools.product(range(args.rounds), args.keep_probs):
            self.theta.update(dict.fromkeys(range(first, first + args.block_iterations), keep_prob))
            first += args.block_iterations

    def policy(self) -> LayerDropPolicy:
        return LayerDropPolicy(lambda t: self.theta.get(t, 1.0), self._args.num_layers)

    def iterations(self, round_: int, keep_prob: float) -> range:
        """Numbers of the iterations of one dropped block; from 1."""
        block = round_ * len(self._args.keep_probs) + self._args.keep_probs.index(keep_prob)
        return range(block * self._args.block_iterations + 1, (block + 1) * self._args.block_iterations + 1)

    def kept(self, iteration: int) -> list[bool]:
        """The layers of an iteration, [L]."""
        keep_probs = self.policy().keep_probs(iteration)
        return draw_plan(keep_probs, self._args.seed, iteration, num_microbatches=1)[0].tolist()


class Measurement:
    """One peer's times: seconds of blocks by keep_prob, [rounds], and the passes of its layers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.undropped: dict[float, list[float]] = {}
        self.dropped: dict[float, list[float]] = {}
        self.kept: dict[float, list[list[list[bool]]]] = {}  # [rounds, iterations, L]
        self.timed_iterations: list[float] = []  # [rounds * keep_probs]
        self.passes: list[list[tuple[float, float]]] = []  # [rounds * keep_probs, L + 1, 2]: layers, then the model

    def pass_times(self, rounds: int, num_microbatches: int) -> PassTimes:
        """Of a microbatch, by round."""
        measured = np.array(self.passes) / num_microbatches
        by_round: Floats = measured.reshape(rounds, -1, *measured.shape[1:]).mean(axis=1)
        iteration = np.array(self.timed_iterations).reshape(rounds, -1).mean(axis=1, keepdims=True)
        layers, model = by_round[:, :-1], by_round[:, -1:]
        return PassTimes(layers[..., 0], layers[..., 1], model[..., 0], model[..., 1], iteration)


class Comparison:
    """The peers, and the batches and decisions that they share."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self.args = args
        self.decisions = Decisions(args)
        policy = self.decisions.policy()
        builders: dict[str, Callable[[], Peer]] = {
            "opt": lambda: HuggingFaceOPT(config, args.vocab_size),
            "plain": lambda: PlainTorch(config, args.vocab_size),
            "plain-compiled": lambda: CompiledTorch(config, args.vocab_size),
        }
        compiled = replace(config, training=replace(config.training, torch_compile=True))
        for name in OWN:
            builders[name] = partial(
                FusedMegatronSbld if name.startswith("fused") else MegatronSbld,
                compiled if name.endswith("compiled") else config,
                args.vocab_size,
                DropController(policy, seed=args.seed),
                args.dropped_update,
            )
        self.peers = [builders[name]() for name in args.peers]
        self.results = [Measurement(peer.name) for peer in self.peers]
        self.num_microbatches = get_num_microbatches()
        self.rounds = 0
        batches = random_batches(args, DISTINCT_BATCHES * self.num_microbatches, args.seed)
        self.batches = itertools.cycle(batches)

    def measure(self) -> list[Measurement]:
        for peer in self.peers:
            peer.model.train()
            peer.prepare(dropping=False)
            self.block(peer, [None] * self.args.warmup)
            peer.prepare(dropping=True)
            self.block(peer, [AFTER_ALL])  # a compiled peer has a graph for each class of its layers
        with progress_bar() as progress:
            task = progress.add_task("rounds", total=self.args.rounds)
            deadline = Deadline(self.args.minutes)
            for round_ in range(self.args.rounds):
                for keep_prob in self.args.keep_probs:
                    for turn in range(len(self.peers)):
                        self.pair((round_ + turn) % len(self.peers), round_, keep_prob)
                progress.advance(task)
                if deadline.round_done():
                    break
        self.rounds = deadline.rounds
        return self.results

    def pair(self, index: int, round_: int, keep_prob: float) -> None:
        """An undropped and a dropped block of a peer, and an iteration whose layers are timed."""
        peer, result = self.peers[index], self.results[index]
        numbers = self.decisions.iterations(round_, keep_prob)
        for dropping in (False, True) if round_ % 2 == 0 else (True, False):
            peer.prepare(dropping)
            seconds = self.block(peer, list(numbers) if dropping else [None] * self.args.block_iterations)
            (result.dropped if dropping else result.undropped).setdefault(keep_prob, []).append(seconds)
        result.kept.setdefault(keep_prob, []).append([self.decisions.kept(number) for number in numbers])
        peer.prepare(dropping=False)
        with ExitStack() as stack:
            timers = [stack.enter_context(ModuleTimer(layer, is_layer=True)) for layer in peer.layers]
            timers.append(stack.enter_context(ModuleTimer(peer.model, is_layer=False)))
            result.timed_iterations.append(self.block(peer, [None]))
        result.passes.append([timer.times() for timer in timers])

    def block(self, peer: Peer, numbers: Sequence[int | None]) -> float:
        """Seconds of iterations with these numbers; None is an undropped one."""
        everything = [True] * self.args.num_layers
        plans = [everything if number is None else self.decisions.kept(number) for number in numbers]
        data: list[list[Batch]] = [list(itertools.islice(self.batches, self.num_microbatches)) for _ in numbers]
        began = time.perf_counter()
        for number, kept, batches in zip(numbers, plans, data, strict=True):
            loss = peer.iteration(batches, number, kept)  # ends with the loss on the CPU, so a GPU has done everything
        seconds = time.perf_counter() - began
        if numbers and not np.isfinite(loss):
            raise RuntimeError(f"{peer.name}: the loss is {loss}: its times would be those of another computation")
        return seconds


def main() -> None:
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    config = make_config(args, Layout(1))
    check_config(config)
    warn_of_load()
    with megatron_run(config):
        comparison = Comparison(args, config)
        results = comparison.measure()
        lines = report(args, comparison, results)
    publish(lines, args.out)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="what is measured" + SHOWN)
    add_model_options(parser)
    add("--keep-probs", type=float, nargs="+", default=[0.7, 0.5], help="of every layer" + SHOWN)
    add(
        "--dropped-update",
        choices=("freeze", "apply"),
        default="freeze",
        help="of this project: freeze passes over dropped layers as the other programs do, apply steps them" + SHOWN,
    )
    add_block_options(parser, rounds=12, rounds_of="pairs of blocks for each peer and keep_prob", warmup=4)
    add_time_option(parser)
    add_run_options(parser, "peers", seed_of="weights, tokens and decisions")
    args = parser.parse_args()
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_at_least(parser, args, rounds=2, block_iterations=1, warmup=1, threads=1, vocab_size=2, minutes=0)
    if not all(0 < keep_prob < 1 for keep_prob in args.keep_probs):
        parser.error(f"--keep-probs {args.keep_probs}: each must be in (0, 1)")
    check_named_once(parser, args, "keep_probs", "peers")
    check_one_process(parser)
    if "opt" in args.peers and find_spec("transformers") is None:
        parser.error(f"--peers opt: {TRANSFORMERS_HINT}; or leave out opt")


def report(args: argparse.Namespace, comparison: Comparison, results: Sequence[Measurement]) -> list[str]:
    """Markdown: what was measured with what, a table of speeds and gains, and one of the first peer against others."""
    packages = ["torch", "megatron-core", *(["transformers"] if "opt" in args.peers else [])]
    tokens = comparison.rounds * args.block_iterations * args.global_batch_size * args.seq_length
    lines = [
        "# Dropping layers in several programs",
        "",
        "The same GPT in one run, in interleaved blocks, with the same tokens and the same decisions. Realised gain = "
        "undropped over dropped time; ideal gain = T / (T - time of the dropped layers), from each program's own "
        "layers; ratio = (realised - 1) / (ideal - 1). In brackets: 95 % confidence intervals by bootstrap over the "
        "rounds. The method: docstring of `benchmarks/peers.py`.",
        "",
        *run_lines(args.seed, packages),
        f"- Model: {model_text(args)}, no dropout; one process",
        "- Parameters: "
        + ", ".join(f"{peer.name} {sum(p.numel() for p in peer.model.parameters()):,}" for peer in comparison.peers),
        f"- Batch: {args.global_batch_size} samples in microbatches of {args.micro_batch_size}; AdamW, clipping at 1; "
        f"dropped_update of {MegatronSbld.name}: {args.dropped_update}; the others' AdamW passes over dropped layers",
        f"- {comparison.rounds} rounds of pairs of blocks of {args.block_iterations} iterations",
        f"- {deepspeed_note()}",
        "",
        "| program | keep_prob | layers kept | tokens/s undropped | dropped | ideal gain | realised gain | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        lines += [gain_row(args, result, keep_prob, tokens, comparison) for keep_prob in args.keep_probs]
    return lines + speed_table(args, results)


def gain_row(
    args: argparse.Namespace, result: Measurement, keep_prob: float, tokens: int, comparison: Comparison
) -> str:
    undropped, dropped = np.array(result.undropped[keep_prob]), np.array(result.dropped[keep_prob])
    pairs = Pairs(undropped, dropped, np.array(result.kept[keep_prob]))
    num_microbatches = comparison.num_microbatches
    gain = measure_gain(pairs, result.pass_times(comparison.rounds, num_microbatches), num_microbatches, seed=args.seed)
    return (
        f"| {result.name} | {keep_prob:g} | {gain.kept_fraction:.1%} | {tokens / undropped.sum():,.0f} "
        f"| {tokens / dropped.sum():,.0f} | {gain.ideal - 1:+.2%} | {gain_text(gain.realised)} "
        f"| {'-' if gain.ratio is None else number_text(gain.ratio)} |"
    )


def speed_table(args: argparse.Namespace, results: Sequence[Measurement]) -> list[str]:
    """The first program's speed over each other's, undropped and dropped; empty with one program."""
    first, *others = results
    if not others:
        return []
    lines = [
        "",
        f"Tokens/s of {first.name} over those of the others; above 1 it is the faster one:",
        "",
        "| against | "
        + " | ".join(["undropped", *(f"keep_prob {keep_prob:g}" for keep_prob in args.keep_probs)])
        + " |",
        "| --- |" + " ---: |" * (len(args.keep_probs) + 1),
    ]
    for other in others:
        undropped = [sum(np.array(result.undropped[p]) for p in args.keep_probs) for result in (other, first)]
        ratios = [time_ratio(*undropped, seed=args.seed)]
        ratios += [
            time_ratio(np.array(other.dropped[p]), np.array(first.dropped[p]), seed=args.seed) for p in args.keep_probs
        ]
        lines.append(f"| {other.name} | " + " | ".join(number_text(ratio) for ratio in ratios) + " |")
    return lines


if __name__ == "__main__":
    main()
