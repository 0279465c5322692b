"""Layers that run some tokens of each sample: the same losses and gradients on every layout as in one process.

tests/mcore/skip/test_tokens.py compares one process with a stock layer that has plain indexing around it.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import run_distributed
from tests.mcore.skip.runs import (
    BLOCK_RECOMPUTE,
    BOTH_OVERLAPS,
    FULL_RECOMPUTE,
    SELECTIVE_RECOMPUTE,
    Case,
    Result,
    assert_equals_reference,
    reference_result,
    run_cases,
    tokens_of,
)
from tests.mcore.skip.test_moe import MOE, SEQUENCE_PARALLEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROPE = {"position_embedding_type": "rope"}


def case(**settings: Any) -> Case:
    """random-LTD alone, whose iterations run 4 to 12 of 16 tokens."""
    return Case(**{"granularity": "token", "policy": "full", "layers": 4, "iterations": 4, "build": ROPE, **settings})


TWO_PROCESSES = {
    "TP 2 with sequence parallelism": case(tp=2, config=SEQUENCE_PARALLEL),
    "TP 2": case(tp=2),
    "CP 2": case(cp=2),
    "CP 2, with layers dropped by microbatch": case(cp=2, policy="pld", scope="microbatch"),
    "PP 2": case(pp=2),
    "PP 2, full recomputation": case(pp=2, config={**FULL_RECOMPUTE, "recompute_num_layers": 1}),
    "PP 2, block recomputation": case(pp=2, config=BLOCK_RECOMPUTE),
    "PP 2, selective recomputation, given up": case(pp=2, config=SELECTIVE_RECOMPUTE, given_up=True),
    "PP 2 interleaved, both overlaps": case(pp=2, vpp=2, ddp=BOTH_OVERLAPS, config=BLOCK_RECOMPUTE),
    "PP 2 interleaved, full recomputation": case(pp=2, vpp=2, config={**FULL_RECOMPUTE, "recompute_num_layers": 1}),
    "DP 2, both overlaps": case(ddp=BOTH_OVERLAPS),
    "DP 2, both overlaps, with layers dropped": case(policy="half", ddp={**BOTH_OVERLAPS, "bucket_size": 1}),
    "TP 2, full recomputation, distributed activations": case(
        tp=2, config={**FULL_RECOMPUTE, "recompute_num_layers": 1, "distribute_saved_activations": True}
    ),
    "EP 2, both overlaps": case(ep=2, model=MOE, ddp=BOTH_OVERLAPS),
    "TP 2 x EP 2, sequence parallelism": case(tp=2, ep=2, model=MOE, config=SEQUENCE_PARALLEL),
    "fused residual, TP 2 with sequence parallelism": case(tp=2, residual="fused", config=SEQUENCE_PARALLEL),
}
FOUR_PROCESSES = {
    "TP 2 with sequence parallelism x CP 2": case(tp=2, cp=2, config=SEQUENCE_PARALLEL),
    "TP 2 with sequence parallelism x PP 2, recomputed": case(
        tp=2, pp=2, config={**SEQUENCE_PARALLEL, **FULL_RECOMPUTE, "recompute_num_layers": 1}
    ),
    "CP 2 x DP 2, both overlaps": case(cp=2, ddp=BOTH_OVERLAPS),
}


@pytest.fixture(scope="module")
def two_processes() -> list[dict[str, Result]]:
    return run_distributed(run_cases, 2, TWO_PROCESSES, timeout=400)


@pytest.fixture(scope="module")
def four_processes() -> list[dict[str, Result]]:
    return run_distributed(run_cases, 4, FOUR_PROCESSES, timeout=400)


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_equal_one(two_processes: list[dict[str, Result]], name: str) -> None:
    assert_equals_reference(two_processes, name, TWO_PROCESSES[name])


@pytest.mark.parametrize("name", FOUR_PROCESSES)
def test_four_processes_equal_one(four_processes: list[dict[str, Result]], name: str) -> None:
    assert_equals_reference(four_processes, name, FOUR_PROCESSES[name])


def test_the_cases_run_few_and_many_tokens_and_differ_from_a_run_of_all() -> None:
    assert [tokens_of(4).tokens(iteration) for iteration in (1, 2, 3, 4)] == [4, 8, 8, 12]
    assert reference_result(case()).losses != reference_result(case(granularity="layer")).losses
