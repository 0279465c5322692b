"""Buckets of layers that did not run are not communicated: counted, and with the same bits as when all of them are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, param_and_grad_buffer

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import freeze_dropped_layers, make_switchable
from megatron_sbld.mcore.skip.bucket_groups import bucket_groups
from tests.harness import model_parallel, run_distributed
from tests.mcore.helpers import build_optimizer, tiny_config, tiny_gpt, train_step, wrap_ddp
from tests.mcore.skip.freeze_helpers import Patterns, layer_of
from tests.mcore.skip.runs import BOTH_OVERLAPS, OVERLAP, SHARDED

pytestmark = pytest.mark.slow

LAYERS, ITERATIONS = 4, 9
# Each layer is dropped alone, with neighbours and with all others; the first iteration drops already.
PATTERNS = ("1010", "0111", "1001", "0000", "1111", "0011", "1100")
ONE_LAYER = 2000
"""Parameters that close a bucket in every layer or two of the tiny model."""


@dataclass(frozen=True)
class Case:
    """One run on two data-parallel ranks."""

    ddp: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    freeze: bool = False
    scope: str = "iteration"

    @property
    def shards(self) -> bool:
        return self.ddp.get("use_distributed_optimizer", False)


CASES = {
    "no overlap": Case(),
    "overlap": Case(OVERLAP),
    "overlap, hooks alone": Case({**OVERLAP, "align": False}),
    "distributed optimizer": Case(SHARDED),
    "both overlaps": Case(BOTH_OVERLAPS),
    "both overlaps, hooks alone": Case({**BOTH_OVERLAPS, "align": False}),
    "both overlaps, a bucket a parameter": Case({**BOTH_OVERLAPS, "bucket_size": 1}),
    "both overlaps, one bucket": Case({**BOTH_OVERLAPS, "bucket_size": 10**9}),
    "both overlaps, per microbatch": Case(BOTH_OVERLAPS, scope="microbatch"),
    "both overlaps, bf16": Case(BOTH_OVERLAPS, {"params_dtype": torch.bfloat16, "bf16": True}),
    "distributed optimizer, freeze": Case(SHARDED, freeze=True),
    "both overlaps, freeze": Case(BOTH_OVERLAPS, freeze=True),
    "both overlaps, freeze, hooks alone": Case({**BOTH_OVERLAPS, "align": False}, freeze=True),
    "both overlaps, freeze, a bucket a parameter": Case({**BOTH_OVERLAPS, "bucket_size": 1}, freeze=True),
    "both overlaps, freeze, bf16": Case(BOTH_OVERLAPS, {"params_dtype": torch.bfloat16, "bf16": True}, freeze=True),
    "overlap, freeze": Case(OVERLAP, freeze=True),
}


@dataclass
class Outcome:
    """What one rank saw."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    reduced: list[int] = field(default_factory=list)
    """Bucket groups reduced, by iteration."""
    gathered: list[int] = field(default_factory=list)
    """Bucket groups gathered, by iteration: before its backward pass or after its step, as Megatron does it."""
    groups: list[list[int | None]] = field(default_factory=list)
    """Layers (1-based) that each group has parameters of; None is the rest of the model."""
    ran: list[list[int]] = field(default_factory=list)
    """Layers that any microbatch ran, by iteration."""


def run_case(case: Case, skipping: bool) -> Outcome:
    # Without it, layers and controller are the same and every bucket is communicated.
    switch = nullcontext() if skipping else mock.patch("megatron_sbld.mcore.skip.switchable.make_skippable")
    with model_parallel(), switch:
        controller = DropController(Patterns(*PATTERNS), scope=case.scope)
        config = tiny_config(num_layers=LAYERS, **case.config)
        (model,) = wrap_ddp(tiny_gpt(config), **{"bucket_size": ONE_LAYER, **case.ddp})
        make_switchable(model, controller)
        optimizer = build_optimizer([model], weight_decay=0.1, lr=1e-2)
        if case.freeze:
            freeze_dropped_layers(model, optimizer)
        names = {param: name for name, param in model.module.named_parameters()}
        outcome = Outcome(
            groups=[list({layer_of(names[param]) for param in group.params}) for group in bucket_groups(model)]
        )
        for iteration in range(1, ITERATIONS + 1):
            with counted(model) as counts:
                step = train_step([model], optimizer, iteration, controller.begin_iteration)
            outcome.losses.append(step.loss)
            outcome.norms.append(step.grad_norm)
            outcome.reduced.append(counts["reduced"])
            outcome.gathered.append(counts["gathered"])
            outcome.ran.append([layer for layer in range(1, LAYERS + 1) if not controller.dropped_throughout(layer)])
        if model.use_forward_hook:
            model.disable_forward_pre_hook()  # finishes the gathers
        outcome.weights = [param.detach().clone() for param in model.module.parameters()]
        return outcome


@contextmanager
def counted(model: DistributedDataParallel) -> Iterator[dict[str, int]]:
    """Count the collectives on whole buckets; each group of these models is one bucket."""
    buckets = [bucket for group in bucket_groups(model) for bucket in group.buckets]
    assert len(buckets) == len(bucket_groups(model))
    gradients = {(bucket.grad_data.data_ptr(), bucket.grad_data.numel()) for bucket in buckets}
    counts = {"reduced": 0, "gathered": 0}
    all_reduce, scatter = torch.distributed.all_reduce, param_and_grad_buffer.dist_reduce_scatter_func
    gather = param_and_grad_buffer.dist_all_gather_func

    def counting_all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts["reduced"] += (tensor.data_ptr(), tensor.numel()) in gradients
        return all_reduce(tensor, *args, **kwargs)

    def counting_scatter(*args: Any, **kwargs: Any) -> Any:
        counts["reduced"] += 1
        return scatter(*args, **kwargs)

    def counting_gather(*args: Any, **kwargs: Any) -> Any:
        counts["gathered"] += 1
        return gather(*args, **kwargs)

    with (
        mock.patch("torch.distributed.all_reduce", counting_all_reduce),
        mock.patch.object(param_and_grad_buffer, "dist_reduce_scatter_func", counting_scatter),
        mock.patch.object(param_and_grad_buffer, "dist_all_gather_func", counting_gather),
    ):
        yield counts


def run_cases() -> dict[str, tuple[Outcome, Outcome]]:
    return {name: (run_case(case, True), run_case(case, False)) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, tuple[Outcome, Outcome]]]:
    return run_distributed(run_cases, 2)


@pytest.mark.parametrize("name", CASES)
def test_leaving_a_bucket_out_changes_no_bit(ranks: list[dict[str, tuple[Outcome, Outcome]]], name: str) -> None:
    for rank in ranks:
        skipping, stock = rank[name]
        assert skipping.ran == stock.ran
        assert skipping.losses == stock.losses
        assert skipping.norms == stock.norms
        assert all(map(torch.equal, skipping.weights, stock.weights))


@pytest.mark.parametrize("name", CASES)
def test_only_buckets_with_layers_that_ran_are_reduced(
    ranks: list[dict[str, tuple[Outcome, Outcome]]], name: str
) -> None:
    for rank in ranks:
        skipping, stock = rank[name]
        groups = len(skipping.groups)
        assert stock.reduced == [groups] * ITERATIONS
        expected = [changed(skipping.groups, ran) for ran in skipping.ran]
        if not CASES[name].freeze:
            # The model learns of its wrapper when it first skips a layer, and then does not know what ran before.
            expected[0] = groups
        assert skipping.reduced == expected
        overlaps = CASES[name].ddp.get("overlap_grad_reduce")  # Megatron has one bucket otherwise
        assert (groups > 1) == bool(overlaps and CASES[name].ddp.get("bucket_size") != 10**9)
        assert (min(skipping.reduced) < groups) == (groups > 1)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.shards])
def test_only_buckets_that_a_step_changed_are_gathered(
    ranks: list[dict[str, tuple[Outcome, Outcome]]], name: str
) -> None:
    case = CASES[name]
    for rank in ranks:
        skipping, stock = rank[name]
        groups = len(skipping.groups)
        assert stock.gathered == [groups] * ITERATIONS
        expected = [groups] * ITERATIONS
        if case.freeze:
            expected = [groups, *(changed(skipping.groups, ran) for ran in skipping.ran[1:])]
            if case.ddp.get("overlap_param_gather"):  # in the next iteration's forward pass
                expected = [groups, *expected[:-1]]
        assert skipping.gathered == expected


def changed(groups: list[list[int | None]], ran: list[int]) -> int:
    """How many groups have parameters of layers that ran, or outside of layers."""
    return sum(any(layer is None or layer in ran for layer in group) for group in groups)
