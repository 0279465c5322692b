"""HybridModel: attention, MLP, experts and Mamba are layers of their own, dropped by themselves or by blocks."""

from __future__ import annotations

import pytest

from tests.harness import single_process
from tests.mcore.skip.runs import Case, Result, assert_equal_runs, run_cases

BLOCKS = "*-" * 8
ONE = {
    "blocks": Case(pattern=BLOCKS, unit="block"),
    "blocks, microbatch": Case(pattern=BLOCKS, unit="block", scope="microbatch"),
    "blocks, PLD": Case(pattern=BLOCKS, unit="block", policy="pld"),
    "blocks, extreme": Case(pattern=BLOCKS, unit="block", policy="extreme"),
    "blocks, full": Case(pattern=BLOCKS, unit="block", policy="full"),
    "layers, full": Case(pattern=BLOCKS, layers=16, policy="full"),
    "stock": Case(pattern=BLOCKS, unit="block", policy="full", switchable=False),
    "layers": Case(pattern=BLOCKS, layers=16),
}


@pytest.fixture(scope="module")
def one() -> dict[str, Result]:
    with single_process():
        return run_cases(
            {**ONE, **{"gpt " + name: case.reference for name, case in ONE.items() if case.unit == "block"}}
        )


@pytest.mark.parametrize("name", [name for name in ONE if "blocks" in name])
def test_equal(one, name):
    a, b = one[name], one["gpt " + name]
    assert a.decisions == b.decisions
    print(name, a.losses == b.losses, a.gradients == b.gradients, a.losses)
    assert_equal_runs(a, b, 1e-6)


def test_stock(one):
    for name in ("blocks, full", "layers, full"):
        assert one[name].losses == one["stock"].losses
        assert one[name].gradients == one["stock"].gradients
