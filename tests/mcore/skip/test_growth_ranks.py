"""Stages on several ranks: losses and gradient norms as in one process, with every way for a layer to begin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import grow_in_stages, make_switchable
from megatron_sbld.method.policy import LayerDropPolicy, Policy, StagedPolicy
from megatron_sbld.method.schedule import Constant
from tests.harness import model_parallel, run_distributed, single_process
from tests.mcore.helpers import (
    build_optimizer,
    tiny_config,
    tiny_gpt,
    wrap_ddp,
)
from tests.mcore.skip.freeze_helpers import finish_gathers, iterate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LAYERS, ITERATIONS = 4, 8
RANKS = [[1, 2], [3, 4]]  # each runs a layer from the start, on every layout
INTERLEAVED = [[1, 3], [2, 4]]
OVERLAP = {"overlap_grad_reduce": True}
SHARDED = {"use_distributed_optimizer": True}
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """One run of megatron-core's own loop: layout and DDP options."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ddp: dict[str, Any] = field(default_factory=dict)


CASES = {
    "DP 2": Case(),
    "DP 2, distributed optimizer": Case(ddp=SHARDED),
    "DP 2, both overlaps": Case(ddp={**OVERLAP, **SHARDED, "overlap_param_gather": True}),
    "DP 2, both overlaps, small buckets": Case(
        ddp={**OVERLAP, **SHARDED, "overlap_param_gather": True, "bucket_size": 5000}
    ),
    "TP 2": Case(tp=2),
    "PP 2": Case(pp=2),
    "PP 2, distributed optimizer": Case(pp=2, ddp=SHARDED),
    "PP 2 interleaved": Case(pp=2, vpp=2),
}
POLICIES = ["staged", "LayerDrop inside the gate"]
INITS = ["random", "zero", "copy"]


def policy_of(name: str, ranks: list[list[int]]) -> Policy:
    staged = StagedPolicy([[0.5, 1], [0.75, 3], [1.0, 4]], LAYERS, train_iters=ITERATIONS, ranks=ranks)
    return staged if name == "staged" else LayerDropPolicy(Constant(0.6), LAYERS, stages=staged.stages)


def run_case(case: Case, policy_name: str, init: Any, ranks: list[list[int]]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms by iteration."""
    with model_parallel(tp=case.tp, pp=case.pp, vpp=case.vpp):
        controller = DropController(policy_of(policy_name, ranks))
        models = wrap_ddp(tiny_gpt(tiny_config(num_layers=LAYERS)), **case.ddp)
        make_switchable(models, controller)
        optimizer = build_optimizer(models, weight_decay=0.1, lr=1e-2)
        grow_in_stages(models, optimizer, controller, init, copy_moments=init == "copy")
        found: tuple[list[float], list[float]] = ([], [])
        for iteration in range(1, ITERATIONS + 1):
            loss, grad_norm = iterate(models, optimizer, controller, iteration)
            found[0].append(loss)
            found[1].append(grad_norm)
        finish_gathers(models)
        return found


def run_cases(cases: dict[str, Case]) -> dict[tuple[str, str, str], tuple[list[float], list[float]]]:
    return {
        (name, policy, init): run_case(case, policy, init, INTERLEAVED if case.vpp else RANKS)
        for name, case in cases.items()
        for policy in POLICIES
        for init in INITS
    }


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[tuple[str, str, str], tuple[list[float], list[float]]]]:
    return run_distributed(run_cases, 2, CASES)


@pytest.fixture(scope="module")
def in_one_process() -> dict[tuple[str, str, bool], tuple[list[float], list[float]]]:
    with single_process():
        return {
            (policy, init, interleaved): run_case(Case(), policy, init, INTERLEAVED if interleaved else RANKS)
            for policy in POLICIES
            for init in INITS
            for interleaved in (False, True)
        }


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_one_process(
    on_two_ranks: Any, in_one_process: Any, name: str, policy: str, init: str
) -> None:
    expected = in_one_process[policy, init, CASES[name].vpp is not None]
    last = on_two_ranks[-1][name, policy, init]
    assert last[0] == pytest.approx(expected[0], rel=LOSS_TOLERANCE)
    for rank in on_two_ranks:
        assert rank[name, policy, init][1] == pytest.approx(expected[1], rel=1e-3)


def test_each_way_to_begin_makes_a_difference(in_one_process: Any) -> None:
    """So that the comparisons above could fail."""
    losses = [in_one_process["staged", init, False][0] for init in INITS]
    assert losses[0][:4] == losses[1][:4] == losses[2][:4]
    assert len({run[-1] for run in losses}) == 3
