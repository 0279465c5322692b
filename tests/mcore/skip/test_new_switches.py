"""Switches that megatron-core has had since 0.17, each on the versions that have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.package_info import __version__ as installed
from megatron.core.transformer import TransformerConfig

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import freeze_dropped_layers, make_switchable
from megatron_sbld.mcore.skip.switchable import decoder_layers
from tests.harness import model_parallel, run_distributed, single_process
from tests.mcore.helpers import Step, build_optimizer, tiny_config, tiny_gpt, train, wrap_ddp
from tests.mcore.skip.freeze_helpers import Patterns, states, step
from tests.mcore.skip.runs import BOTH_OVERLAPS, Result, assert_equals_reference, run_cases
from tests.mcore.skip.test_switches import BF16, case

FIELDS = {
    field.name
    for config in (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
    for field in dataclasses.fields(config)
}
DROPS = Patterns("1010", "0110", "0000", "1111")

TWO_PROCESSES = {
    "DP 2, a number of buckets, both overlaps, extreme": case(
        policy="extreme", ddp={**BOTH_OVERLAPS, "bucket_size": None, "num_buckets": 3}
    ),
    "DP 2, gradients added up in fp32, bf16, both overlaps, extreme": case(
        BF16,
        policy="extreme",
        ddp={
            **BOTH_OVERLAPS,
            "grad_reduce_in_fp32": False,
            "param_name_patterns_for_fp32_local_accumulation": ("all",),
        },
        relative=2e-2,
    ),
}
NEEDS = {name: set(run.ddp) - {"bucket_size"} for name, run in TWO_PROCESSES.items()}


def needs(*fields: str) -> None:
    missing = sorted(set(fields) - FIELDS)
    if missing:
        pytest.skip(f"megatron-core {installed} has no {', '.join(missing)}")


def run_what_there_is() -> dict[str, Result]:
    return run_cases({name: run for name, run in TWO_PROCESSES.items() if NEEDS[name] <= FIELDS})


@pytest.fixture(scope="module")
def two_processes() -> list[dict[str, Result]]:
    return run_distributed(run_what_there_is, 2, timeout=300)


@pytest.fixture
def one_process() -> Iterator[None]:
    with single_process(), model_parallel():
        yield


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_equal_one(request: pytest.FixtureRequest, name: str) -> None:
    needs(*NEEDS[name])
    assert_equals_reference(request.getfixturevalue("two_processes"), name, TWO_PROCESSES[name])


def train_with_drops(change: Any = None, **config: Any) -> list[Step]:
    (chunk,) = tiny_gpt(tiny_config(**config))
    if change is not None:
        change(chunk)
    controller = DropController(DROPS)
    make_switchable(chunk, controller)
    return train([chunk], 4, controller.begin_iteration)


def assert_equal_steps(found: list[Step], expected: list[Step]) -> None:
    assert [step.loss for step in found] == pytest.approx([step.loss for step in expected], rel=1e-5)
    assert [step.grad_norm for step in found] == pytest.approx([step.grad_norm for step in expected], rel=1e-4)


@pytest.mark.usefixtures("one_process")
def test_an_mlp_in_chunks_is_the_same_mlp() -> None:
    needs("mlp_chunks_for_training")
    assert_equal_steps(train_with_drops(mlp_chunks_for_training=2), train_with_drops())


class HandsOnResidual(torch.nn.Module):
    """A norm that gives the residual beside its output, as Transformer Engine's does with fused_residual_rmsnorm."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [s, b, h] -> normed and as they were."""
        return self.norm(hidden_states), hidden_states


def let_norms_hand_on(chunk: torch.nn.Module) -> None:
    for layer in decoder_layers(chunk):
        layer.input_layernorm = HandsOnResidual(layer.input_layernorm)
        layer.pre_mlp_layernorm = HandsOnResidual(layer.pre_mlp_layernorm)


@pytest.mark.usefixtures("one_process")
def test_norms_that_hand_the_residual_on_change_nothing() -> None:
    needs("fused_residual_rmsnorm")
    assert_equal_steps(train_with_drops(let_norms_hand_on), train_with_drops())


@pytest.mark.usefixtures("one_process")
def test_a_step_left_out_for_its_norm_leaves_every_layer_as_it_was() -> None:
    needs("grad_norm_skip_threshold")
    (chunk,) = tiny_gpt(tiny_config())
    controller = DropController(DROPS)
    make_switchable(chunk, controller)
    models = wrap_ddp([chunk])
    optimizer = build_optimizer(models)
    freeze_dropped_layers(models, optimizer)
    assert step(models, optimizer, 1, controller)[0]
    before = states(models, optimizer)
    for part in optimizer.chained_optimizers:
        part.config.grad_norm_skip_threshold = 1e-9
    assert not step(models, optimizer, 2, controller)[0]
    after = states(models, optimizer)
    assert all(torch.equal(after[name][key], value) for name, state in before.items() for key, value in state.items())
    for part in optimizer.chained_optimizers:
        part.config.grad_norm_skip_threshold = float("inf")
    assert step(models, optimizer, 3, controller)[0]
