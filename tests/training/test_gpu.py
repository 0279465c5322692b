"""`pretrain` on a GPU: what its optimizer, its loss and its residual adds do there that they do not do elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import optimizer as megatron_optimizer

from megatron_sbld.config.sections import Config
from tests.training.trainer_helpers import (
    ITERATIONS,
    NO_DROPOUT,
    change,
    losses,
    run_here,
    sbld,
    stop_and_resume,
    tiny_run,
    train_rows,
    trained,
)

pytestmark = pytest.mark.gpu

OPTIMIZERS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "distributed": {"parallel": {"use_distributed_optimizer": True}},
    "frozen": {"drop": {"dropped_update": "freeze"}},
    "fp32": {"training": {"precision": "fp32"}},
    "fused residual": {"drop": {"residual": "fused"}},
    "compiled": {"training": {"torch_compile": True}},
}


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Config:
    """A run in bf16 with SBLD; heads as small as fused attention takes them."""
    model = {**NO_DROPOUT, "hidden_size": 64}
    return tiny_run(tmp_path / "run", corpus, drop=sbld(tmp_path), model=model, training={"precision": "bf16"})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(config: Config, tmp_path: Path, name: str) -> None:
    """Adam's state comes back to where a fused step reads it: its count of steps is on the GPU."""
    config = change(config, **OPTIMIZERS[name])
    expected = trained(config, tmp_path / "whole")
    first, second = stop_and_resume(config, 3)
    assert run_here(first) == 75
    assert run_here(second) == 0
    found = losses(config.logging.run_dir)
    assert found[3] == pytest.approx(expected[3], rel=1e-6), "the first loss after the weights are back"
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    for field in ("kept", "lr", "consumed_samples"):
        whole = [row[field] for row in train_rows(tmp_path / "whole")]
        assert [row[field] for row in train_rows(config.logging.run_dir)] == whole


@pytest.mark.parametrize("distributed", [False, True])
def test_the_count_of_steps_is_where_a_fused_step_reads_it(
    config: Config, monkeypatch: pytest.MonkeyPatch, distributed: bool
) -> None:
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        pytest.skip("Megatron takes the Adam of Transformer Engine or Apex here")
    config = change(config, parallel={"use_distributed_optimizer": distributed})
    seen: list[tuple[set[float], bool, bool]] = []
    step = torch.optim.AdamW.step

    def observed(adam: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        result = step(adam, *args, **kwargs)
        counts = [(state["step"], param) for param, state in adam.state.items()]
        placed = all(count.device == param.device for count, param in counts)
        seen.append(({float(count) for count, _ in counts}, placed, all(group["fused"] for group in adam.param_groups)))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", observed)
    for part in stop_and_resume(config, 3):
        run_here(part)
    assert seen == [({float(iteration)}, True, True) for iteration in range(1, ITERATIONS + 1)]


def test_the_fused_loss_is_megatrons(config: Config, tmp_path: Path) -> None:
    fused = trained(change(config, training={"cross_entropy_loss_fusion": True}), tmp_path / "fused")
    stock = trained(change(config, training={"cross_entropy_loss_fusion": False}), tmp_path / "stock")
    chosen = trained(config, tmp_path / "chosen")
    np.testing.assert_allclose(fused, stock, rtol=2e-3)
    np.testing.assert_allclose(chosen, fused, rtol=1e-3)


def test_a_fused_residual_learns_like_megatrons(config: Config, tmp_path: Path) -> None:
    fused = trained(change(config, drop={"residual": "fused"}), tmp_path / "fused")
    np.testing.assert_allclose(fused, trained(config, tmp_path / "stock"), rtol=1e-2)
