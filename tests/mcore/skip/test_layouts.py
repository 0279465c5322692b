"""Dropping on every parallel layout: the same decisions, losses and gradients as in one process.

Gradients are compared parameter by parameter, because the silent corruptions show there first: a parameter that was
used before its gather was finished, a bucket that was not reduced, an activation freed under a pipeline stage, a
recomputation that took another microbatch's decision.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import pytest

from tests.harness import run_distributed, single_process, slow_but
from tests.mcore.skip.runs import (
    BLOCK_RECOMPUTE,
    BOTH_OVERLAPS,
    FULL_RECOMPUTE,
    OVERLAP,
    SHARDED,
    Case,
    Result,
    assert_equal_runs,
    run_cases,
)

# All cases of a module run in one set of processes, inside the first test's fixture.
pytestmark = pytest.mark.timeout(1200)


AskedFor = Callable[..., frozenset[str]]


def _long(cases: dict[str, Case]) -> dict[str, Case]:
    """20 iterations where the paper's own setting is compared."""
    return {
        name: replace(case, iterations=20) if (case.policy, case.scope) == ("half", "iteration") else case
        for name, case in cases.items()
    }


DROPOUT = {"hidden_dropout": 0.2}
ONE_PROCESS = {
    f"{policy} {scope}": Case(policy=policy, scope=scope)
    for policy in ("half", "extreme", "pld")
    for scope in ("iteration", "microbatch")
} | {"half iteration, dropout": Case(model=DROPOUT, residual="fused")}
ONE_PROCESS_VARIANTS = {
    "PLD, fused residual": Case(policy="pld", residual="fused"),
    "fused residual, dropout, full recomputation": Case(model=DROPOUT, residual="fused", config=FULL_RECOMPUTE),
    "full recomputation": Case(config=FULL_RECOMPUTE),
    "full recomputation, microbatch": Case(scope="microbatch", config=FULL_RECOMPUTE),
    "block recomputation, microbatch": Case(scope="microbatch", config=BLOCK_RECOMPUTE),
    "overlapped reduction": Case(ddp=OVERLAP),
    "both overlaps, extreme": Case(policy="extreme", ddp=BOTH_OVERLAPS),
    "both overlaps, microbatch": Case(scope="microbatch", ddp=BOTH_OVERLAPS),
    "PLD, full recomputation, microbatch": Case(policy="pld", scope="microbatch", config=FULL_RECOMPUTE),
}
TWO_PROCESSES = {
    "TP 2": Case(tp=2),
    "TP 2, microbatch": Case(tp=2, scope="microbatch"),
    "TP 2, PLD": Case(tp=2, policy="pld"),
    "TP 2 with sequence parallelism": Case(tp=2, config={"sequence_parallel": True}),
    "TP 2, full recomputation, microbatch": Case(tp=2, scope="microbatch", config=FULL_RECOMPUTE),
    "TP 2, PLD, fused residual": Case(tp=2, policy="pld", residual="fused"),
    "TP 2, fused residual, dropout": Case(tp=2, model=DROPOUT, residual="fused"),
    "PP 2": Case(pp=2),
    "PP 2, extreme": Case(pp=2, policy="extreme"),
    "PP 2, microbatch": Case(pp=2, scope="microbatch"),
    "PP 2, PLD, microbatch": Case(pp=2, policy="pld", scope="microbatch"),
    "PP 2, full recomputation, microbatch": Case(pp=2, scope="microbatch", config=FULL_RECOMPUTE),
    "PP 2, block recomputation, microbatch": Case(pp=2, scope="microbatch", config=BLOCK_RECOMPUTE),
    "PP 2 interleaved": Case(pp=2, vpp=2),
    "PP 2 interleaved, extreme": Case(pp=2, vpp=2, policy="extreme"),
    "PP 2 interleaved, microbatch": Case(pp=2, vpp=2, scope="microbatch"),
    "PP 2 interleaved, full recomputation, microbatch": Case(pp=2, vpp=2, scope="microbatch", config=FULL_RECOMPUTE),
    "PP 2 interleaved, both overlaps, extreme": Case(pp=2, vpp=2, policy="extreme", ddp=BOTH_OVERLAPS),
    "PP 2 interleaved, PLD, full recomputation, fused residual": Case(
        pp=2, vpp=2, policy="pld", config=FULL_RECOMPUTE, residual="fused"
    ),
    "DP 2, both overlaps, PLD, fused residual": Case(policy="pld", ddp=BOTH_OVERLAPS, residual="fused"),
    "DP 2": Case(),
    "DP 2, extreme": Case(policy="extreme"),
    "DP 2, overlapped reduction": Case(ddp=OVERLAP),
    "DP 2, overlapped reduction, extreme": Case(policy="extreme", ddp=OVERLAP),
    "DP 2, overlapped reduction, extreme, bucket of a parameter": Case(
        policy="extreme", ddp={**OVERLAP, "bucket_size": 1}
    ),
    "DP 2, overlapped reduction, extreme, one bucket": Case(
        policy="extreme", ddp={**OVERLAP, "bucket_size": 10**9}, switch_before_wrapping=True
    ),
    "DP 2, distributed optimizer": Case(ddp=SHARDED),
    "DP 2, both overlaps": Case(ddp=BOTH_OVERLAPS, switch_before_wrapping=True),
    "DP 2, both overlaps, extreme": Case(policy="extreme", ddp=BOTH_OVERLAPS),
    "DP 2, both overlaps, extreme, bucket of a parameter": Case(
        policy="extreme", ddp={**BOTH_OVERLAPS, "bucket_size": 1}
    ),
}
# Replicas divide the microbatches, so with decisions per microbatch they are compared among themselves.
TWO_REPLICAS_MICROBATCH = {
    "DP 2, overlapped reduction, microbatch": Case(scope="microbatch", ddp=OVERLAP),
    "DP 2, both overlaps, microbatch": Case(scope="microbatch", ddp=BOTH_OVERLAPS),
    "DP 2, both overlaps, full recomputation, microbatch": Case(
        scope="microbatch", ddp=BOTH_OVERLAPS, config=FULL_RECOMPUTE
    ),
}
EVALUATED = {
    "DP 2": Case(policy="extreme", evaluate=True),
    "DP 2, both overlaps": Case(policy="extreme", ddp=BOTH_OVERLAPS, evaluate=True),
    "DP 2, both overlaps, bucket of a parameter": Case(
        policy="extreme", ddp={**BOTH_OVERLAPS, "bucket_size": 1}, evaluate=True
    ),
}
KEPT_ALL = {
    "TP 2": Case(tp=2, policy="full"),
    "PP 2": Case(pp=2, policy="full"),
    "PP 2 interleaved, full recomputation, microbatch": Case(
        pp=2, vpp=2, policy="full", scope="microbatch", config=FULL_RECOMPUTE
    ),
    "DP 2": Case(policy="full"),
    "DP 2, both overlaps": Case(policy="full", ddp=BOTH_OVERLAPS),
}
# The same sums in the same order: overlapping them with backward may change no bit.
SAME_ARITHMETIC = {
    "DP 2, overlapped reduction": "DP 2",
    "DP 2, overlapped reduction, extreme": "DP 2, extreme",
    "DP 2, both overlaps": "DP 2, distributed optimizer",
}
OTHER_ADDRESSES = ("DP 2, both overlaps",)
# One of each kind of parallelism, with what its silent corruptions come from, for `make test`.
QUICK = (
    "both overlaps, microbatch",
    "TP 2 with sequence parallelism",
    "PP 2 interleaved, full recomputation, microbatch",
    "DP 2, both overlaps, extreme",
)
QUICK_EVALUATED = ("DP 2, both overlaps, bucket of a parameter",)
QUICK_KEPT_ALL = ("DP 2, both overlaps",)
FOUR_PROCESSES = {
    "TP 2 x PP 2": Case(tp=2, pp=2),
    "TP 2 x PP 2, microbatch": Case(tp=2, pp=2, scope="microbatch"),
    "TP 2 x PP 2, extreme": Case(tp=2, pp=2, policy="extreme"),
    "PP 4, extreme": Case(pp=4, policy="extreme"),
    "PP 4, full recomputation, microbatch": Case(pp=4, scope="microbatch", config=FULL_RECOMPUTE),
    "TP 2 x DP 2, both overlaps": Case(tp=2, ddp=BOTH_OVERLAPS),
    "TP 2 x DP 2, sequence parallelism, both overlaps, PLD, fused residual": Case(
        tp=2, policy="pld", ddp=BOTH_OVERLAPS, config={"sequence_parallel": True}, residual="fused"
    ),
    "PP 2 x DP 2 interleaved, both overlaps": Case(pp=2, vpp=2, ddp=BOTH_OVERLAPS),
    "PP 2 x DP 2 interleaved, both overlaps, extreme": Case(pp=2, vpp=2, policy="extreme", ddp=BOTH_OVERLAPS),
}


def reference_of(case: Case) -> str:
    """Name of the run in one process that computes the same; without dropout the fused add is the stock one."""
    return f"{case.policy} {case.scope}" + (", dropout" if case.model else "")


def of(cases: dict[str, Case], names: Collection[str], label: str = "") -> dict[str, Case]:
    return {label + name: case for name, case in cases.items() if name in names}


@pytest.fixture(scope="module")
def one_process(asked_for: AskedFor) -> dict[str, Result]:
    variants = of(ONE_PROCESS_VARIANTS, asked_for(test_recomputation_and_overlap_change_nothing_in_one_process))
    others = of(
        {**TWO_PROCESSES, **FOUR_PROCESSES}, asked_for(test_two_processes_equal_one, test_four_processes_equal_one)
    )
    references = {reference_of(case) for case in [*variants.values(), *others.values()]}
    with single_process():
        return run_cases(_long({**of(ONE_PROCESS, references), **variants}))


@pytest.fixture(scope="module")
def two_processes(asked_for: AskedFor) -> list[dict[str, Result]]:
    same = asked_for(test_overlaps_change_no_bit)
    replicas = of(TWO_REPLICAS_MICROBATCH, asked_for(test_overlaps_change_nothing_when_each_microbatch_decides))
    kept_all = of(KEPT_ALL, asked_for(test_nothing_dropped_is_stock_bit_for_bit_on_two_processes))
    evaluated = asked_for(test_evaluation_between_iterations_sees_the_newest_parameters)
    cases = {
        **of(
            TWO_PROCESSES, asked_for(test_two_processes_equal_one).union(same, (SAME_ARITHMETIC[name] for name in same))
        ),
        **({"DP 2, microbatch": Case(scope="microbatch"), **replicas} if replicas else {}),
        **(of(EVALUATED, {"DP 2", *evaluated}, "evaluated ") if evaluated else {}),
        **{f"kept all, {name}": case for name, case in kept_all.items()},
        **{f"stock, {name}": replace(case, switchable=False) for name, case in kept_all.items()},
    }
    return run_distributed(run_cases, 2, _long(cases), timeout=900)


@pytest.fixture(scope="module")
def four_processes() -> list[dict[str, Result]]:
    return run_distributed(run_cases, 4, _long(FOUR_PROCESSES), timeout=900)


@pytest.mark.parametrize("name", slow_but(QUICK, ONE_PROCESS_VARIANTS))
def test_recomputation_and_overlap_change_nothing_in_one_process(one_process: dict[str, Result], name: str) -> None:
    case = ONE_PROCESS_VARIANTS[name]
    reference = one_process[reference_of(case)]
    assert one_process[name].decisions == reference.decisions
    if case.config:  # recomputation repeats the same arithmetic
        assert one_process[name].losses == reference.losses
        assert one_process[name].gradients == reference.gradients
    assert_equal_runs(one_process[name], reference, relative=1e-6)


@pytest.mark.parametrize("name", slow_but(QUICK, TWO_PROCESSES))
def test_two_processes_equal_one(
    one_process: dict[str, Result], two_processes: list[dict[str, Result]], name: str
) -> None:
    case = TWO_PROCESSES[name]
    reference = one_process[reference_of(case)]
    for rank in two_processes:
        assert [rows[0] for rows in rank[name].decisions] == [rows[0] for rows in reference.decisions]
        assert_equal_runs(rank[name], reference)


@pytest.mark.parametrize("name", slow_but(QUICK, SAME_ARITHMETIC))
def test_overlaps_change_no_bit(two_processes: list[dict[str, Result]], name: str) -> None:
    for rank in two_processes:
        found, expected = rank[name], rank[SAME_ARITHMETIC[name]]
        if name in OTHER_ADDRESSES:
            # Buckets place the parameters otherwise, and on CPUs with AVX-512 the last bit of MKL's products follows.
            assert found.losses == pytest.approx(expected.losses, rel=5e-7)
            assert_equal_runs(found, expected)
            continue
        assert found.losses == expected.losses
        assert found.gradients == expected.gradients


@pytest.mark.parametrize("name", slow_but(QUICK_KEPT_ALL, KEPT_ALL))
def test_nothing_dropped_is_stock_bit_for_bit_on_two_processes(
    two_processes: list[dict[str, Result]], name: str
) -> None:
    for rank in two_processes:
        kept_all, stock = rank[f"kept all, {name}"], rank[f"stock, {name}"]
        assert kept_all.losses == stock.losses
        assert kept_all.grad_norms == stock.grad_norms
        assert kept_all.gradients == stock.gradients


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_REPLICAS_MICROBATCH)
def test_overlaps_change_nothing_when_each_microbatch_decides(
    two_processes: list[dict[str, Result]], name: str
) -> None:
    for rank in two_processes:
        assert rank[name].decisions == rank["DP 2, microbatch"].decisions
        assert_equal_runs(rank[name], rank["DP 2, microbatch"])


@pytest.mark.parametrize("name", slow_but(QUICK_EVALUATED, [name for name in EVALUATED if name != "DP 2"]))
def test_evaluation_between_iterations_sees_the_newest_parameters(
    two_processes: list[dict[str, Result]], name: str
) -> None:
    for rank in two_processes:
        assert_equal_runs(rank[f"evaluated {name}"], rank["evaluated DP 2"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_PROCESSES)
def test_four_processes_equal_one(
    one_process: dict[str, Result], four_processes: list[dict[str, Result]], name: str
) -> None:
    case = FOUR_PROCESSES[name]
    reference = one_process[reference_of(case)]
    for rank in four_processes:
        assert [rows[0] for rows in rank[name].decisions] == [rows[0] for rows in reference.decisions]
        assert_equal_runs(rank[name], reference)
