"""Copies around the optimizer step: Megatron's bits, in a number of operations that does not grow with parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.optimizer import ChainedOptimizer

from megatron_sbld.config.sections import Config
from megatron_sbld.training import model
from megatron_sbld.training.processes import distributed_run, seed_everything
from tests.mcore.optimizer.operators import Count
from tests.training.trainer_helpers import call_on_ranks, change, tiny_run

STEPS = 3
PRECISIONS = ("fp32", "bf16", "fp16")
VOCAB_SIZE = 64


def run_of(folder: Path, precision: str, **parallel: Any) -> Config:
    config = tiny_run(folder, folder / "no corpus", parallel=parallel)
    return change(config, training={"precision": precision}, optimizer={"log_num_zeros_in_grad": True})


def stepped_both_ways(config: Config) -> dict[bool, dict[str, Any]]:
    """What an optimizer has done after some steps with Megatron's copying methods, and with ours."""
    with distributed_run(config):
        return {in_groups: _stepped(config, in_groups) for in_groups in (False, True)}


def _stepped(config: Config, in_groups: bool) -> dict[str, Any]:
    seed_everything(config.training.seed)
    chunks = model.build_model(config, VOCAB_SIZE)
    with mock.patch.object(model, "copy_in_groups", model.copy_in_groups if in_groups else lambda optimizer: None):
        optimizer = model.build_optimizer(config, chunks)
    results: list[Any] = []
    operators = 0
    rng = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for chunk in chunks:
            for buffer in chunk.buffers:  # the same on all ranks, as a reduction leaves them
                buffer.grad_data.copy_(torch.randn(buffer.grad_data.shape, generator=rng))
        with Count() as count:
            results.append(optimizer.step())
        operators = count.operators["aten.copy_.default"] + count.operators["aten.slice.Tensor"]
    assert isinstance(optimizer, ChainedOptimizer)
    (part,) = optimizer.chained_optimizers
    return {
        "results": results,
        "params": [param.detach().clone() for chunk in chunks for param in chunk.parameters()],
        "main": [param.detach().clone() for group in part.optimizer.param_groups for param in group["params"]],
        "moments": [state["exp_avg_sq"] for state in part.optimizer.state.values()],
        "operators": operators,
    }


def assert_equal(ours: dict[str, Any], megatrons: dict[str, Any]) -> None:
    assert ours["results"] == megatrons["results"], "success, gradient norm and zeros"
    for name in ("params", "main", "moments"):
        assert len(ours[name]) == len(megatrons[name]) > 0
        assert all(torch.equal(a, b) for a, b in zip(ours[name], megatrons[name], strict=True)), name


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_has_megatrons_bits_in_fewer_operations(tmp_path: Path, precision: str, distributed: bool) -> None:
    both = stepped_both_ways(run_of(tmp_path, precision, use_distributed_optimizer=distributed))
    assert_equal(both[True], both[False])
    num_params = len(both[True]["params"])
    assert both[True]["operators"] < num_params
    if distributed or precision != "fp32":  # else there is nothing to copy
        assert both[False]["operators"] >= num_params


@pytest.mark.slow
def test_shards_on_two_ranks_have_megatrons_bits(tmp_path: Path) -> None:
    """With small buckets most parameters are cut in two by the ranks' border."""
    configs = [
        run_of(tmp_path, precision, use_distributed_optimizer=True, ddp_bucket_size=size)
        for precision in PRECISIONS
        for size in (None, 1000)
    ]
    for config, by_rank in zip(configs, call_on_ranks(2, stepped_both_ways, configs), strict=True):
        for both in by_rank:
            assert_equal(both[True], both[False])
        ranks = [both[True] for both in by_rank]
        assert all(torch.equal(a, b) for a, b in zip(ranks[0]["params"], ranks[1]["params"], strict=True))
        assert any(a.shape != b.shape for a, b in zip(ranks[0]["main"], ranks[1]["main"], strict=False)), config
