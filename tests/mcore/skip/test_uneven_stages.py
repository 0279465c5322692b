"""Uneven pipeline stages (pipeline_model_parallel_layout): the decisions, losses and gradients of one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_sbld.controller import DropController
from megatron_sbld.layout.placement import read_layout
from megatron_sbld.mcore import make_switchable
from megatron_sbld.mcore.skip.switchable import decoder_layers
from tests.harness import model_parallel, run_distributed, single_process
from tests.mcore.helpers import (
    GLOBAL_MICROBATCHES,
    build_optimizer,
    forward_backward,
    mean_loss,
    tiny_config,
    tiny_gpt,
    wrap_ddp,
)
from tests.mcore.skip.runs import (
    BLOCK_RECOMPUTE,
    BOTH_OVERLAPS,
    FULL_RECOMPUTE,
    POLICIES,
    Result,
    assert_equal_runs,
    gradient_projections,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LAYERS = 8
ITERATIONS = 9  # each of ExtremePolicy's patterns


@dataclass(frozen=True)
class Case:
    """One run: the layout, which two processes take up and one process only balances, and what is dropped."""

    layout: str
    policy: str = "half"
    scope: str = "iteration"
    sampler: str = "bernoulli"
    vpp: int | None = None
    ddp: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def stages(self) -> list[list[int]]:
        return read_layout(self.layout, LAYERS, 2, self.vpp or 1).stages


PLAIN, INTERLEAVED = "Ettt|tttttL", "Et|ttt|tt|ttL"
CASES = {
    "bernoulli": Case(PLAIN),
    "bernoulli, microbatch": Case(PLAIN, scope="microbatch"),
    "balanced": Case(PLAIN, sampler="balanced"),
    "balanced, microbatch": Case(PLAIN, sampler="balanced", scope="microbatch"),
    "extreme": Case(PLAIN, policy="extreme"),
    "PLD": Case(PLAIN, policy="pld", sampler="balanced"),
    "both overlaps, extreme": Case(PLAIN, policy="extreme", ddp=BOTH_OVERLAPS),
    "uniform recomputation, microbatch": Case("Et*2|t*6L", scope="microbatch", config=FULL_RECOMPUTE),
    "block recomputation, microbatch": Case(PLAIN, scope="microbatch", config=BLOCK_RECOMPUTE),
    "no layers on the last stage": Case("Et*8|L"),
    "no layers on the first stage, extreme": Case("E|t*8L", policy="extreme"),
    "interleaved, bernoulli": Case(INTERLEAVED, vpp=2),
    "interleaved, bernoulli, microbatch": Case(INTERLEAVED, vpp=2, scope="microbatch"),
    "interleaved, balanced": Case(INTERLEAVED, vpp=2, sampler="balanced"),
    "interleaved, balanced, microbatch": Case(INTERLEAVED, vpp=2, sampler="balanced", scope="microbatch"),
    "interleaved, extreme": Case(INTERLEAVED, vpp=2, policy="extreme"),
    "interleaved, both overlaps, extreme": Case(INTERLEAVED, vpp=2, policy="extreme", ddp=BOTH_OVERLAPS),
    "interleaved, an empty chunk": Case("Et*3|t*2||t*3L", vpp=2, sampler="balanced"),
}


@dataclass
class Placed:
    """A run, and the layer numbers of this rank."""

    result: Result
    layers: list[int]


def run_case(case: Case, spread: bool) -> Placed:
    layout = {"pipeline_model_parallel_layout": case.layout, **case.config} if spread else {}
    with model_parallel(pp=2 if spread else 1, vpp=case.vpp if spread else None):
        stages = case.stages if case.sampler == "balanced" else None
        controller = DropController(
            POLICIES[case.policy](LAYERS), seed=7, scope=case.scope, sampler=case.sampler, stages=stages
        )
        models = wrap_ddp(tiny_gpt(tiny_config(num_layers=LAYERS, **layout)), **(case.ddp if spread else {}))
        make_switchable(models, controller)
        optimizer = build_optimizer(models)
        result = Result()
        for iteration in range(1, ITERATIONS + 1):
            for model in models:
                model.train()
                model.zero_grad_buffer()
            optimizer.zero_grad()
            controller.begin_iteration(iteration, GLOBAL_MICROBATCHES)
            result.losses.append(mean_loss(forward_backward(models, iteration, GLOBAL_MICROBATCHES)))
            if iteration == ITERATIONS:
                result.gradients = gradient_projections(models)
            result.grad_norms.append(float(optimizer.step()[1]))
            result.decisions.append(controller.plan.tolist())
        return Placed(result, [layer.layer_number for model in models for layer in decoder_layers(model)])


def run_cases(spread: bool) -> dict[str, Placed]:
    return {name: run_case(case, spread) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def one_process() -> dict[str, Placed]:
    with single_process():
        return run_cases(spread=False)


@pytest.fixture(scope="module")
def two_processes() -> list[dict[str, Placed]]:
    return run_distributed(run_cases, 2, True, timeout=500)


@pytest.mark.parametrize("name", CASES)
def test_uneven_stages_equal_one_process(
    one_process: dict[str, Placed], two_processes: list[dict[str, Placed]], name: str
) -> None:
    for rank in two_processes:
        assert rank[name].result.decisions == one_process[name].result.decisions
        assert_equal_runs(rank[name].result, one_process[name].result)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_the_layers_that_the_layout_gives_it(
    two_processes: list[dict[str, Placed]], name: str
) -> None:
    assert [rank[name].layers for rank in two_processes] == CASES[name].stages
