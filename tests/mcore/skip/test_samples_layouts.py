"""Layers that run some samples of a microbatch: the same losses and gradients on every layout as in one process.

tests/mcore/skip/test_samples.py compares one process with samples that are run one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.harness import run_distributed, single_process
from tests.mcore.skip.runs import (
    BLOCK_RECOMPUTE,
    BOTH_OVERLAPS,
    FULL_RECOMPUTE,
    Case,
    Result,
    assert_equal_decisions,
    assert_equal_runs,
    assert_equals_reference,
    reference_result,
    run_case,
    run_cases,
)
from tests.mcore.skip.test_moe import MOE, SEQUENCE_PARALLEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def case(**settings: Any) -> Case:
    """PLD's keep probabilities fall from 1 to 0.55 with depth, so that layers run 2 samples of 2, or 1."""
    return Case(**{"granularity": "sample", "policy": "pld", "layers": 4, "iterations": 6, **settings})


TWO_PROCESSES = {
    "DP 2, both overlaps": case(ddp=BOTH_OVERLAPS),
    "DP 2, both overlaps, low, bucket of a parameter": case(policy="low", ddp={**BOTH_OVERLAPS, "bucket_size": 1}),
    "TP 2 with sequence parallelism, microbatch": case(tp=2, scope="microbatch", config=SEQUENCE_PARALLEL),
    "PP 2, full recomputation, microbatch": case(
        pp=2, scope="microbatch", config={**FULL_RECOMPUTE, "recompute_num_layers": 1}
    ),
    "PP 2, low": case(pp=2, policy="low"),
    "CP 2, microbatch": case(cp=2, scope="microbatch"),
    "EP 2, both overlaps": case(ep=2, model=MOE, ddp=BOTH_OVERLAPS),
    "PP 2 interleaved, both overlaps, microbatch": case(pp=2, vpp=2, scope="microbatch", ddp=BOTH_OVERLAPS),
    "PP 2, block recomputation, microbatch": case(pp=2, scope="microbatch", config=BLOCK_RECOMPUTE),
    "TP 2, distributed activations, microbatch": case(
        tp=2,
        scope="microbatch",
        config={**FULL_RECOMPUTE, "recompute_num_layers": 1, "distribute_saved_activations": True},
    ),
    "TP 2 x EP 2": case(tp=2, ep=2, model=MOE, config=SEQUENCE_PARALLEL),
}
# Replicas run different samples of their own microbatches, which one process does not have: compared among themselves.
DISTINCT = {
    "DP 2, distinct": case(replicas="distinct"),
    "DP 2, distinct, both overlaps": case(replicas="distinct", ddp=BOTH_OVERLAPS),
    "EP 2, distinct, both overlaps": case(replicas="distinct", ep=2, model=MOE, ddp=BOTH_OVERLAPS),
}


@pytest.fixture(scope="module")
def two_processes() -> list[dict[str, Result]]:
    return run_distributed(run_cases, 2, {**TWO_PROCESSES, **DISTINCT}, timeout=400)


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_equal_one(two_processes: list[dict[str, Result]], name: str) -> None:
    assert_equals_reference(two_processes, name, TWO_PROCESSES[name])


def test_the_cases_run_all_samples_some_and_none() -> None:
    for policy, expected in (("pld", {1, 2}), ("low", {0, 1})):
        plan = np.array(reference_result(case(policy=policy)).decisions)  # [iterations, microbatches, L, 2]
        assert set(plan.sum(axis=-1).flat) == expected
    dropped_stage = ~np.array(reference_result(case(policy="low")).decisions)[:, :, 2:].any(axis=(1, 2, 3))
    assert dropped_stage.any(), "an iteration that leaves a whole pipeline stage out"


def test_distinct_replicas_leave_out_other_samples_and_overlap_like_shared_ones(
    two_processes: list[dict[str, Result]],
) -> None:
    plain = [rank["DP 2, distinct"] for rank in two_processes]
    for rank, expected in zip(two_processes, plain, strict=True):
        assert_equal_decisions(rank["DP 2, distinct, both overlaps"], expected)
        assert_equal_runs(rank["DP 2, distinct, both overlaps"], expected)
    for name in DISTINCT:
        first, second = (np.array(rank[name].decisions) for rank in two_processes)
        np.testing.assert_array_equal(first.sum(axis=-1), second.sum(axis=-1))
        assert (first != second).any()


@pytest.mark.parametrize("recompute", [FULL_RECOMPUTE, BLOCK_RECOMPUTE])
def test_recomputation_takes_the_same_samples_bit_for_bit(recompute: dict[str, Any]) -> None:
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    with single_process():
        plain, recomputed = (
            run_case(case(scope="microbatch", model=dropout, iterations=3, config=config)) for config in ({}, recompute)
        )
    assert recomputed.losses == plain.losses
    assert recomputed.gradients == plain.gradients
