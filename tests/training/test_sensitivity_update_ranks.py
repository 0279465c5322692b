"""The sensitivity in force is rank 0's on every rank, bit for bit, whatever the other ranks' arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from megatron_sbld.controller import DropController
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.policy import SBLDPolicy
from megatron_sbld.method.schedule import Constant
from megatron_sbld.training.sensitivity_update import SensitivityUpdate
from tests.harness import run_distributed

pytestmark = pytest.mark.slow

LAYERS, ITERATIONS, INTERVAL = 6, 90, 30
BASE = np.linspace(0.0, 1.0, LAYERS)
GAP = 0.1 * BASE[::-1]


def observe_with_losses_of_ones_own() -> tuple[list[list[float]], list[list[bool]], list[int]]:
    """(sensitivity after each iteration, decisions, iterations with a row); losses are rank 0's, and others'."""
    controller = DropController(SBLDPolicy(Constant(0.3), BASE, exploration=0.02), seed=1)
    update = SensitivityUpdate(DropConfig(update_interval=INTERVAL, update_memory=200), controller)
    rng = np.random.default_rng(dist.get_rank())
    sensitivity, plans, iterations = [], [], []
    for iteration in range(1, ITERATIONS + 1):
        controller.begin_iteration(iteration, 2)
        loss = 4.0 + float(~controller.plan[0] @ GAP) + 0.01 * rng.normal()
        update.observe(loss)
        row = update.update_if_due()
        if row is not None:
            iterations.append(row["iteration"])
        sensitivity.append(controller.policy.sensitivity.tolist())
        plans.append(controller.plan[0].tolist())
    return sensitivity, plans, iterations


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_have_the_first_ranks_sensitivity(world_size: int) -> None:
    results = run_distributed(observe_with_losses_of_ones_own, world_size)
    for rank, (sensitivity, plans, iterations) in enumerate(results):
        assert (sensitivity, plans) == results[0][:2]
        assert iterations == ([30, 60, 90] if rank == 0 else [])
    sensitivity = results[0][0]
    assert sensitivity[: INTERVAL - 1] == [BASE.tolist()] * (INTERVAL - 1)
    changes = [t + 1 for t in range(1, ITERATIONS) if sensitivity[t] != sensitivity[t - 1]]
    assert changes
    assert set(changes) <= {30, 60, 90}
