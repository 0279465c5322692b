#!/usr/bin/env python3
"""Checks `megatron-sbld predict` against this repository's measured runs, and applies it to the paper's and to 175B.

    python benchmarks/predict_check.py --out benchmarks/results/predict.md

Measured: every row of benchmarks/results/realised_gain_*.md that drops layers. Its predictor is calibrated on the
undropped iteration of its layout alone, on the GPU that the file names or on the hardware of CPU below, whose two
bandwidths were measured in other runs; the decisions are those that the run took, drawn again from its seed, and keep
the share of layers that it reports. Nothing is trained.

The paper's: its Tables 1 and 2 give a baseline in TFLOP/s and twelve gains, but neither the microbatch, recomputation
nor what TFLOP/s counts. Each assumption's mean keep probability is the one at which uniform dropping would gain as
much.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common.gain_results import SEED
from benchmarks.common.options import make_parser
from benchmarks.common.predict_measured import check_measured, measured_lines
from benchmarks.common.predict_paper import paper_lines
from benchmarks.common.predict_setup import SENSITIVITY, VOCAB_SIZE, make_setup
from benchmarks.common.report import command_line, commit, publish
from megatron_sbld.config.sections import Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron_sbld.method.config import DropConfig
from megatron_sbld.predict.calibration import mfu_tokens_per_s
from megatron_sbld.predict.gain import Prediction, Predictor
from megatron_sbld.predict.hardware import KNOWN
from megatron_sbld.predict.propose import propose_placement

LARGE = (
    ("LayerDrop 0.7", DropConfig(policy="layerdrop", theta=0.7)),
    ("LayerDrop 0.5", DropConfig(policy="layerdrop", theta=0.5)),
    ("PLD 0.5", DropConfig(policy="pld", theta=0.5)),
    ("SBLD 0.7", DropConfig(policy="sbld", theta=0.7, sensitivity=SENSITIVITY, interpolate=True)),
    ("SBLD 0.5", DropConfig(policy="sbld", theta=0.5, sensitivity=SENSITIVITY, interpolate=True)),
)


def large_predictor(hardware: str, chunks: int | None = None) -> Predictor:
    """175B on 1,024 GPUs, PP 8 x TP 16 x DP 8, at the assumed MFU of 40 %."""
    config = Config(
        model=ModelConfig(num_layers=96, hidden_size=12288, num_attention_heads=96, seq_length=2048),
        parallel=ParallelConfig(
            tensor_model_parallel_size=16,
            pipeline_model_parallel_size=8,
            num_virtual_stages_per_pipeline_rank=chunks,
            sequence_parallel=True,
            use_distributed_optimizer=True,
        ),
        training=TrainingConfig(micro_batch_size=1, global_batch_size=1536, train_iters=95_000),
    )
    setup = make_setup(config, KNOWN[hardware], 1024, VOCAB_SIZE, "flash")
    return Predictor(setup, mfu_tokens_per_s(setup, 0.4))


def large_lines() -> Iterator[str]:
    yield "## 175B on 1,024 GPUs, pipeline 8 x tensor 16 x data 8"
    yield ""
    yield (
        "96 layers of width 12288, sequence parallel, distributed optimizer, 1,536 samples in microbatches of 1, "
        "95,000 iterations (300 billion tokens). The baseline's MFU of 40 % is assumed, not measured. Gains over the "
        "undropped model on equal stages; in brackets the share of the time that an even spread of the same work would "
        "save, part of which is the output layer's. Placed: on the placement that is proposed for that sampler, where "
        "one that fits is faster. SBLD's sensitivity is the quickstart's, interpolated to 96 layers: a guess. The "
        "balanced sampler is worth balanced less bernoulli. Decisions per microbatch are another method, whose loss is "
        "another matter. Balancing chunks instead of ranks (drop.balance_stages) is what interleaved stages need where "
        "a chunk keeps nearly a whole number of its three layers, as at LayerDrop 0.7. At LayerDrop 0.5 chunks keep 1 "
        "and 2 in turn, and with an even number of ranks all chunks of a rank the same, so that little is won; SBLD "
        "0.7 wins nothing."
    )
    for hardware, chunks in (("a100-80gb", None), ("h100", None), ("a100-80gb", 4)):
        predictor = large_predictor(hardware, chunks)
        yield ""
        yield (
            f"### {predictor.setup.hardware.name}"
            + (f", interleaved with {chunks} chunks a stage" if chunks else "")
            + f": {predictor.baseline_s:.1f} s an iteration, {predictor.hours(predictor.baseline_s) / 24:.1f} days"
            + f" undropped, {predictor.baseline_imbalance:.1%} lost to imbalance"
        )
        yield ""
        names = [name for name, _ in variants(LARGE[0][1], predictor)]
        yield "| policy | mean keep_prob | ideal | " + " | ".join(names) + " | GPU hours saved at best |"
        yield "| --- |" + " ---: |" * (len(names) + 3)
        for name, section in LARGE:
            yield large_row(name, section, predictor)


def variants(section: DropConfig, predictor: Predictor) -> list[tuple[str, Prediction]]:
    """The ways to draw and place that there are for a drop section, by name."""
    placement = predictor.setup.placement
    chunks = len(placement.layers_per_chunk)
    balanced = dataclasses.replace(section, sampler="balanced")
    best = dataclasses.replace(balanced, balance_stages=chunks) if placement.is_interleaved else balanced
    found = [("bernoulli", section), ("balanced", balanced)]
    if placement.is_interleaved:
        found.append((f"balanced, balance_stages {chunks}", best))
    found += [
        ("bernoulli, per microbatch", dataclasses.replace(section, decision_scope="microbatch")),
        (f"{found[-1][0]}, per microbatch", dataclasses.replace(best, decision_scope="microbatch")),
    ]
    predictions = [(name, predictor.predict(each)) for name, each in found]
    if not placement.is_interleaved:
        predictions += [(f"{name}, placed", placed(each, predictor)) for name, each in found[:2]]
    return predictions


def placed(section: DropConfig, predictor: Predictor) -> Prediction:
    """On the placement proposed for a drop section, if that gains more and fits; else on the setup's."""
    proposal = propose_placement(predictor, section)
    return predictor.predict(section) if proposal is None or not proposal.fits else proposal.prediction


def large_row(name: str, section: DropConfig, predictor: Predictor) -> str:
    predictions = [prediction for _, prediction in variants(section, predictor)]
    cells = [f"{prediction.gain:+.1%} ({prediction.lost_to_imbalance:.1%})" for prediction in predictions]
    undropped = predictor.hours(predictor.baseline_s) * predictor.setup.gpus
    saved = undropped - min(prediction.gpu_hours for prediction in predictions)
    first = predictions[0]
    return (
        f"| {name} | {first.mean_keep_prob:.3f} | {first.ideal_gain:+.1%} | "
        + " | ".join(cells)
        + f" | {saved / 1e3:,.0f} of {undropped / 1e3:,.0f} thousand |"
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, help="markdown file to write")
    args = parser.parse_args()
    lines = [
        "# What `megatron-sbld predict` says, beside measurements, the paper and for 175B",
        "",
        "A model, not a measurement; the method: docstrings of `benchmarks/predict_check.py` and "
        "`megatron_sbld/predict/`.",
        "",
        f"- Command: `{command_line()}`",
        f"- Commit: {commit('megatron_sbld', 'benchmarks/*.py')}; date: {time.strftime('%Y-%m-%d')}; seed: {SEED}",
        "",
        *measured_lines(check_measured()),
        "",
        *paper_lines(),
        "",
        *large_lines(),
    ]
    publish(lines, args.out)


if __name__ == "__main__":
    main()
