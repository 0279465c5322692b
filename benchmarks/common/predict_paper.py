"""The paper's gains beside what `megatron-sbld predict` says, under assumptions on what the paper leaves open."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from benchmarks.common.predict_setup import SENSITIVITY, VOCAB_SIZE, make_setup
from megatron_sbld.config.flops import layer_flops_per_token, logits_flops_per_token
from megatron_sbld.config.sections import Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron_sbld.method.config import DropConfig
from megatron_sbld.predict.gain import Predictor
from megatron_sbld.predict.hardware import KNOWN


@dataclass(frozen=True)
class Assumption:
    """What the paper leaves open."""

    name: str
    inter_bandwidth: float
    recompute: bool


ASSUMPTIONS = (
    Assumption("A: 100 Gbit/s a GPU, no recomputation", 12.5, False),
    Assumption("B: 100 Gbit/s a GPU, full recomputation, counted in TFLOP/s", 12.5, True),
    # Twice the network for fp32 gradients is the network for 16-bit ones.
    Assumption("C: 100 Gbit/s a node, gradients in 16 bits, no recomputation", 2 * 12.5 / 8, False),
)
PAPER = {  # name: (layers, hidden, heads, TP, GPUs, TFLOP/s of the baseline, (theta, PLD's gain, SBLD's gain)...)
    "1.7B": (24, 2304, 24, 1, 32, 127.29, ((0.9, 4.19, 8.36), (0.7, 14.35, 20.74), (0.5, 26.97, 34.69))),
    "3.6B": (30, 3072, 32, 2, 64, 128.63, ((0.9, 3.40, 7.91), (0.7, 12.49, 19.28), (0.5, 21.87, 31.18))),
}


def paper_predictor(name: str, assumption: Assumption) -> Predictor:
    """Calibrated on the paper's baseline, with the whole attention matrix counted and computed, as in its time."""
    layers, hidden, heads, tensor, gpus, tflops, _ = PAPER[name]
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = Config(
        model=ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=heads, seq_length=2048),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor),
        training=TrainingConfig(
            micro_batch_size=4,
            global_batch_size=512,
            train_iters=10_000,
            **(full if assumption.recompute else {}),  # type: ignore[arg-type]
        ),
    )
    hardware = dataclasses.replace(KNOWN["a100-80gb"], inter_bandwidth=assumption.inter_bandwidth)
    setup = make_setup(config, hardware, gpus, VOCAB_SIZE, "unfused")
    passes = 4 if assumption.recompute else 3
    flops = passes * layers * layer_flops_per_token(config.model, causal=False) + 3 * logits_flops_per_token(
        config.model, VOCAB_SIZE
    )
    return Predictor(setup, tflops * 1e12 * gpus / flops)


def needed_keep_prob(predictor: Predictor, gain: float) -> float | None:
    """Mean keep probability at which dropping uniformly gains this much; None where not even dropping all does."""

    def excess(keep_prob: float) -> float:
        shares = np.full((1, 1, predictor.setup.config.model.num_layers), keep_prob)
        return predictor.baseline_s / float(predictor.model.times([shares]).total[0]) - 1 - gain

    return brentq(excess, 1e-6, 1.0) if excess(1e-6) > 0 else None


def paper_lines() -> Iterator[str]:
    yield "## Beside the paper's Tables 1 and 2"
    yield ""
    yield (
        "Which mean keep probability each gain needs by this model on A100-80GB, under three assumptions on what the "
        "paper leaves open (microbatches of 4; reductions after the backward pass; gradients in fp32 but for C), and "
        "what ours has and is predicted to gain (assumption A) at the same theta over 10,000 iterations. Ours: PLD's "
        "keep probabilities follow from theta; SBLD with this repository's defaults and the quickstart's sensitivity, "
        "of another model and for 30 layers interpolated. The paper's S, alpha, beta and schedule are unpublished: a "
        "difference to ours says how much it dropped, not how well."
    )
    yield ""
    yield from (f"- {assumption.name}" for assumption in ASSUMPTIONS)
    yield ""
    yield (
        "| model | policy | theta | paper's gain | needs, A | needs, B | needs, C | ours: mean keep_prob | ours: "
        "predicted gain, A | paper's / ours |"
    )
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    notes = []
    for name, (*_, rows) in PAPER.items():
        predictors = [possible_predictor(name, assumption) for assumption in ASSUMPTIONS]
        for theta, pld, sbld in rows:
            for policy, percent in (("sbld", sbld), ("pld", pld)):
                yield paper_row(name, policy, theta, percent, predictors)
        notes += paper_notes(name, predictors)
    yield ""
    yield from notes


def possible_predictor(name: str, assumption: Assumption) -> Predictor | None:
    """None where the paper's baseline cannot be reached under the assumption."""
    try:
        return paper_predictor(name, assumption)
    except ValueError:
        return None


def paper_row(name: str, policy: str, theta: float, percent: float, predictors: list[Predictor | None]) -> str:
    """One of the paper's gains, in percent, with what it needs under each assumption and what ours has."""
    first = predictors[0]
    assert first is not None, "assumption A allows the paper's baseline"
    section = DropConfig(policy="pld", theta=theta)
    if policy == "sbld":
        interpolate = first.setup.config.model.num_layers != 24
        section = DropConfig(policy="sbld", theta=theta, sensitivity=SENSITIVITY, interpolate=interpolate)
    ours = first.predict(section)
    needed = [None if predictor is None else needed_keep_prob(predictor, percent / 100) for predictor in predictors]
    cells = " | ".join("-" if found is None else f"{found:.3f}" for found in needed)
    return (
        f"| {name} | {policy.upper()} | {theta:g} | {percent:+.2f}% | {cells} | {ours.mean_keep_prob:.3f} "
        f"| {ours.gain:+.1%} | {percent / 100 / ours.gain:.2f} |"
    )


def paper_notes(name: str, predictors: list[Predictor | None]) -> Iterator[str]:
    """Of one of the paper's models."""
    for assumption, predictor in zip(ASSUMPTIONS, predictors, strict=True):
        if predictor is None:
            yield (
                f"- {name}, {assumption.name[0]}: by this model the baseline cannot be reached, not even with "
                "matrix products at the full peak: reducing the gradients takes too long."
            )
    shares = [
        f"{letter}: " + ("-" if predictor is None else f"{_reduction_share(predictor):.1%}")
        for letter, predictor in zip("ABC", predictors, strict=True)
    ]
    yield f"- {name}: gradient reduction as a share of the undropped iteration: {', '.join(shares)}."


def _reduction_share(predictor: Predictor) -> float:
    return float(predictor.baseline.exposed_reduction[0]) / predictor.baseline_s
