"""What benchmarks/activation_memory.py measures: allocations that are known, and a tiny GPT's."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.activation_memory import Iteration
from benchmarks.common.layouts import Layout, make_config
from benchmarks.common.memory import measure_peak
from benchmarks.common.processes import megatron_run

ARGS = argparse.Namespace(
    **{"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 64, "vocab_size": 64},
    **{"micro_batch_size": 2, "global_batch_size": 2, "precision": "fp32", "recompute_granularity": None},
    seed=1234,
)
MEBIBYTE = 2**18  # values of fp32


def test_the_peak_is_of_tensors_that_are_alive_together_and_leaves_out_those_from_before() -> None:
    before = torch.empty(5 * MEBIBYTE)

    def run() -> None:
        for _ in range(3):
            first = torch.empty(MEBIBYTE)
            second = torch.empty(2 * MEBIBYTE)
            del first, second
        assert before.numel()

    assert measure_peak(run) == pytest.approx(3 * 2**20, abs=1024)


def test_each_kept_layer_adds_the_same_and_dropped_ones_add_nothing() -> None:
    config = make_config(ARGS, Layout(1))
    with megatron_run(config):
        iteration = Iteration(ARGS, config)
        none, half, all_kept = (iteration.measure(kept) for kept in (0, 2, 4))
    hidden_states = ARGS.seq_length * ARGS.micro_batch_size * ARGS.hidden_size * 4  # bytes
    # With no layer kept, the peak is at another moment.
    for kind, tolerance in (("peak", 0.05), ("saved", 1e-6)):
        of_two = getattr(half, kind) - getattr(none, kind)
        assert of_two > 2 * 8 * hidden_states, kind  # norms, query, key, value, attention, the MLP's four widths
        assert getattr(all_kept, kind) - getattr(half, kind) == pytest.approx(of_two, rel=tolerance), kind
    assert none.saved < none.peak
