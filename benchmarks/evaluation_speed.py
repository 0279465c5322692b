#!/usr/bin/env python3
"""Measures how fast LAMBADA and perplexity are scored, against the forward pass of training.

    python benchmarks/evaluation_speed.py --checkpoint RUN --lambada passages.txt --text text.txt

One run alternates, in each round: training's forward pass on full sequences of the same tokens, with dropout and loss,
recording what a backward pass would need (model, token budget of a microbatch and precision are the same); `evaluate
lambada`; `evaluate perplexity` with windows that overlap by half. Tokens/s of an evaluation are of its requests without
their padding; of overlapping windows all tokens count, since all are computed. Aim: at least half of training's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common.options import check_at_least, make_parser
from benchmarks.common.report import publish, run_lines
from megatron_sbld.config.sections import ParallelConfig
from megatron_sbld.evaluation.model import TrainedModel, evaluation_config, load_chunks, read_trained_model
from megatron_sbld.evaluation.requests import Request
from megatron_sbld.evaluation.scoring import score
from megatron_sbld.evaluation.tasks import LambadaTask, PerplexityTask
from megatron_sbld.training.processes import distributed_run

SEED = 1234


def main() -> None:
    args = parse_args()
    trained = read_trained_model(args.checkpoint)
    config = evaluation_config(trained, ParallelConfig(), world_size=1)
    torch.manual_seed(SEED)
    with distributed_run(config):
        (model,) = load_chunks(trained, config)
        seconds, tokens = measure(args, trained, model)
    publish(report(args, trained, config.training.precision, seconds, tokens), args.out)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint or run folder")
    parser.add_argument("--lambada", required=True, help="passages, as for `evaluate lambada`")
    parser.add_argument("--text", required=True, help="text, as for `evaluate perplexity`")
    parser.add_argument("--limit", type=int, default=400, help="passages, and windows of text; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, help="most tokens of a microbatch; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, required=True, help="markdown file to write")
    args = parser.parse_args()
    check_at_least(parser, args, limit=1, rounds=1, batch_tokens=1)
    return args


def measure(
    args: argparse.Namespace, trained: TrainedModel, model: torch.nn.Module
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Seconds of each round, [rounds], and the tokens of one, by what was run."""
    context = trained.model.context
    requests: dict[str, Sequence[Request]] = {
        "lambada": LambadaTask(args.lambada, limit=args.limit).ask(trained.tokenizer, context).requests,
        "perplexity": PerplexityTask(args.text).ask(trained.tokenizer, context).requests[: args.limit],
    }
    inputs = {name: sum(len(request.tokens) - 1 for request in asked) for name, asked in requests.items()}
    text = [token for request in requests["perplexity"] for token in request.tokens]
    rows = max(1, args.batch_tokens // context)
    microbatches = max(1, inputs["lambada"] // (rows * context))
    needed = microbatches * rows * context + 1
    text = (text * (needed // len(text) + 1))[:needed]
    tokens = torch.tensor(text[:-1]).view(microbatches, rows, context).to(next(model.parameters()).device)
    labels = torch.tensor(text[1:]).view(microbatches, rows, context).to(tokens.device)
    positions = torch.arange(context, device=tokens.device).expand(rows, context)

    def forward() -> None:
        model.train()
        for batch, targets in zip(tokens, labels, strict=True):
            model(batch, positions, None, labels=targets).float().mean()

    def evaluate(name: str) -> Callable[[], None]:
        def run() -> None:
            model.eval()
            score(
                ParallelConfig(),
                [model],
                requests[name],
                vocab_size=trained.tokenizer.vocab_size,
                batch_tokens=args.batch_tokens,
            )

        return run

    programs = {"forward": forward, **{name: evaluate(name) for name in requests}}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in track(range(args.rounds + 1), "rounds"):
        for name, program in programs.items():
            began = time.perf_counter()
            program()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    of_round = {"forward": tokens.numel(), **inputs}
    return {name: np.array(values) for name, values in seconds.items()}, of_round


def report(
    args: argparse.Namespace,
    trained: TrainedModel,
    precision: str,
    seconds: dict[str, np.ndarray],
    tokens: dict[str, int],
) -> list[str]:
    model = trained.model
    speeds = {name: tokens[name] / values for name, values in seconds.items()}
    titles = {"forward": "training's forward pass", "lambada": "evaluate lambada", "perplexity": "evaluate perplexity"}
    lines = [
        "# How fast evaluation is",
        "",
        "Tokens a second of evaluations, without padding, against the forward pass of training, in one run in "
        "interleaved rounds; medians over the rounds, and in brackets the smallest and the largest. Aim: at least 0.5. "
        "The method: docstring of `benchmarks/evaluation_speed.py`.",
        "",
        *run_lines(SEED),
        f"- Model: GPT, {model.num_layers} layers, hidden {model.hidden_size}, context {model.context}, vocabulary "
        f"{trained.tokenizer.vocab_size:,}, {precision}; microbatches of at most {args.batch_tokens:,} tokens",
        f"- {args.rounds} rounds",
        "",
        "| program | tokens of a round | tokens/s | over training's forward pass |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, title in titles.items():
        ratios = speeds[name] / speeds["forward"]
        ratio = "1" if name == "forward" else f"{np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"
        lines.append(f"| {title} | {tokens[name]:,} | {np.median(speeds[name]):,.0f} | {ratio} |")
    return lines


if __name__ == "__main__":
    main()
