"""Controllers of several ranks: agreement costs one collective, disagreement is named on every rank within seconds."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from megatron_sbld import agreement
from megatron_sbld.agreement import DropDisagreementError
from megatron_sbld.controller import DropController
from megatron_sbld.mcore import grow_in_stages, make_switchable
from megatron_sbld.method.policy import LayerDropPolicy, StagedPolicy
from megatron_sbld.method.schedule import Constant
from tests.harness import model_parallel, run_distributed
from tests.mcore.helpers import build_optimizer, tiny_config, tiny_gpt, wrap_ddp

ODD_ONES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 99},
    "keep_prob": {"theta": 0.7},
    "layers": {"num_layers": 5},
    "scope": {"scope": "microbatch"},
    "microbatches": {"num_microbatches": 3},
    "iteration": {"iteration": 2},
}


def build(num_layers: int = 6, theta: float = 0.5, **options: Any) -> DropController:
    return DropController(LayerDropPolicy(Constant(theta), num_layers), **{"seed": 1, **options})


def one_rank_is_odd(odd_rank: int) -> dict[str, tuple[str, float]]:
    """For each kind of difference: the error that this rank sees, and after how many seconds."""
    errors = {}
    for name, odd in ODD_ONES.items():
        options = dict(odd) if dist.get_rank() == odd_rank else {}
        iteration = options.pop("iteration", 1)
        num_microbatches = options.pop("num_microbatches", 2)
        controller = build(**options)
        began = time.monotonic()
        try:
            controller.begin_iteration(iteration, num_microbatches)
            errors[name] = ("no error", 0.0)
        except DropDisagreementError as error:
            errors[name] = (str(error), time.monotonic() - began)
    return errors


def ranks_agree() -> tuple[list, int]:
    """(decisions of 100 iterations, collectives that they took)."""
    controller = build(window=20)
    compare, count = agreement.check_agreement, [0]

    def counted(*args: Any) -> None:
        count[0] += 1
        compare(*args)

    agreement.check_agreement = counted
    plans = []
    try:
        for iteration in range(1, 101):
            controller.begin_iteration(iteration, 2)
            plans.append(controller.plan.tolist())
    finally:
        agreement.check_agreement = compare
    return plans, count[0]


def one_rank_replaces_its_policy(odd_rank: int) -> str:
    """The error that this rank sees at the next iteration, in the middle of a window that was verified."""
    controller = build(window=20)
    controller.begin_iteration(1, 2)
    for theta in (0.6, 0.7 if dist.get_rank() == odd_rank else 0.8):
        controller.replace_policy(LayerDropPolicy(Constant(theta), 6))
        try:
            controller.begin_iteration(2, 2)
        except DropDisagreementError as error:
            return f"theta {theta}: {error}"
    return "no error"


def one_rank_begins_layers_otherwise(odd_rank: int) -> str:
    """The error that this rank sees before a growth in which others would wait for it."""
    with model_parallel():
        controller = DropController(StagedPolicy([[0.0, 1], [1.0, 4]], 4, train_iters=10))
        models = wrap_ddp(tiny_gpt(tiny_config()))
        make_switchable(models, controller)
        init = "random" if dist.get_rank() == odd_rank else "copy"
        grow_in_stages(models, build_optimizer(models), controller, init)
        try:
            controller.begin_iteration(1, 2)
        except DropDisagreementError as error:
            return str(error)
        return "no error"


def replicas_with_numbers(*numbers: int) -> str:
    """The error that a rank sees whose distinct replicas have these numbers."""
    with model_parallel():
        controller = build(4, sampler="balanced", replicas="distinct", replica=numbers[dist.get_rank()])
        make_switchable(tiny_gpt(tiny_config()), controller)
        try:
            controller.begin_iteration(1, 2)
        except ValueError as error:
            return str(error)
        return "no error"


def all_cases(odd_rank: int) -> tuple[tuple[list, int], dict[str, tuple[str, float]], list[str], list[str]]:
    numbers = range(dist.get_world_size())
    replicas = [replicas_with_numbers(*numbers), replicas_with_numbers(*(0 for _ in numbers))]
    changed = [one_rank_replaces_its_policy(odd_rank), one_rank_begins_layers_otherwise(odd_rank)]
    return ranks_agree(), one_rank_is_odd(odd_rank), changed, replicas


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_agree_and_a_rank_that_differs_is_named_on_all(world_size: int) -> None:
    odd_rank = world_size - 1
    results = run_distributed(all_cases, world_size, odd_rank)
    for (plans, collectives), errors, (replaced, growth), replicas in results:
        assert plans == results[0][0][0]
        assert collectives == 5
        for name, (message, seconds) in errors.items():
            assert f"rank {odd_rank}: " in message, name
            assert seconds < 10, name
            assert [f"rank {rank}: " in message for rank in range(odd_rank)] == [False] * odd_rank, name
        assert "seed 99 instead of 1" in errors["seed"][0]
        assert f"rank {odd_rank}: mean keep probability 0.7" in replaced
        assert f"rank {odd_rank}: " in growth
        assert "num_layers 5 instead of 6" in errors["layers"][0]
        assert "num_microbatches 3 instead of 2" in errors["microbatches"][0]
        assert replicas[0] == "no error"
        assert "replica = 0 is not allowed: the data-parallel replicas have the numbers [0, 0" in replicas[1]
