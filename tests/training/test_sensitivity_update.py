"""`drop.sensitivity_update: dynamic` in the trainer: against the truth, updated, resumed, switched on and off."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sbld.checkpoint.files import latest_complete, read_train_state
from megatron_sbld.checkpoint.manager import load_weights
from megatron_sbld.config.flops import padded_vocab_size
from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController
from megatron_sbld.data.batches import TrainingData
from megatron_sbld.data.blend import find_data
from megatron_sbld.data.tokenizer import load_tokenizer
from megatron_sbld.mcore import make_switchable
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.policy import Policy
from megatron_sbld.method.schedule import Constant
from megatron_sbld.sensitivity.file import SensitivityFile
from megatron_sbld.training.model import build_model
from megatron_sbld.training.processes import distributed_run
from tests.training.trainer_helpers import (
    LAYERS,
    LAYERS_THAT_MATTER,
    NO_DROPOUT,
    change,
    decisions,
    dynamic,
    in_folder,
    losses,
    run_here,
    stop_and_resume,
    tiny_run,
    train_rows,
    updates,
    write_sensitivity,
)

BASE = [0.0, 1 / 3, 2 / 3, 1.0]
"""The sensitivity of `sbld`'s file."""


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Config:
    """40 iterations of 8 microbatches; an update every 10."""
    return change(tiny_run(tmp_path / "run", corpus, drop=dynamic(tmp_path)), **LAYERS_THAT_MATTER)


def trained(config: Config, folder: Path) -> list[dict[str, Any]]:
    """The updates of a run from beginning to end in a folder of its own."""
    assert run_here(in_folder(config, folder)) == 0
    return updates(folder)


def test_updates_change_the_sensitivity_and_with_it_the_keep_probabilities(config: Config, tmp_path: Path) -> None:
    config = change(config, logging={"tensorboard": True})
    found = trained(config, tmp_path / "run")
    assert [row["iteration"] for row in found] == [10, 20, 30, 40]
    in_force = [BASE] * 10 + list(itertools.chain(*([row["sensitivity"]] * 10 for row in found[:3])))
    policy = build_policy(config.drop, LAYERS, 40)
    for t, (row, sensitivity) in enumerate(zip(train_rows(tmp_path / "run"), in_force, strict=True), start=1):
        expected = policy.with_sensitivity(sensitivity, policy.block_layers).keep_probs(t)
        assert row["keep_probs"] == pytest.approx(expected, abs=1e-6)
    assert found[-1]["sensitivity"] != pytest.approx(BASE)
    assert found[-1]["block_layers"] == []
    assert np.all(np.array(found[-1]["gap_stderr"]) < 0.3)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("gap", "gap_stderr", "sensitivity"):
        for layer in range(LAYERS):
            values = [event.value for event in events.Scalars(f"{name}/layer_{layer + 1:02d}")]
            assert values == pytest.approx([row[name][layer] for row in found], rel=1e-6)


@pytest.mark.slow
def test_without_updates_the_losses_are_those_of_the_base_list(config: Config, tmp_path: Path) -> None:
    """Observing takes nothing from a run and adds nothing to it."""
    never = change(config, drop={"update_interval": 1000, "exploration": 0.0})
    assert trained(never, tmp_path / "dynamic") == []
    fixed = change(config, drop={"sensitivity_update": "none"})
    assert trained(fixed, tmp_path / "fixed") == []
    assert losses(tmp_path / "dynamic") == losses(tmp_path / "fixed")


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["iteration", "microbatch"])
def test_a_resumed_run_has_the_estimates_and_losses_of_the_uninterrupted_one(
    config: Config, tmp_path: Path, scope: str
) -> None:
    config = change(config, drop={"decision_scope": scope})
    expected = trained(config, tmp_path / "whole")
    first, second = stop_and_resume(config, 33)
    assert run_here(first) == 75
    assert run_here(second) == 0
    assert updates(config.logging.run_dir) == expected
    assert losses(config.logging.run_dir) == losses(tmp_path / "whole")
    assert decisions(config.logging.run_dir) == decisions(tmp_path / "whole")


@pytest.mark.slow
def test_the_recovery_is_not_observed(config: Config, tmp_path: Path) -> None:
    config = change(config, drop={"recovery_fraction": 0.5}, checkpoint={"save_interval": 20, "save_at_end": True})
    found = trained(config, tmp_path / "run")
    assert [row["iteration"] for row in found] == [10, 20]
    states = [
        read_train_state(tmp_path / "run" / "checkpoints" / f"iter_{iteration:07d}")["sensitivity"]
        for iteration in (20, 40)
    ]
    assert states[0] == states[1]
    assert decisions(tmp_path / "run")[20:] == [[1.0] * LAYERS] * 20


@pytest.mark.slow
def test_it_is_switched_on_and_off_within_a_run(config: Config) -> None:
    off = change(config, drop={"sensitivity_update": "none"})
    stop = {"exit_after_iterations": 3}
    policy = build_policy(off.drop, LAYERS, 40)
    with pytest.warns(UserWarning, match=r"no effect with .*drop\.sensitivity_update none"):
        assert run_here(change(off, training=stop)) == 75
    assert run_here(change(config, training={"exit_after_iterations": 30})) == 75
    with pytest.warns(UserWarning, match=r"no effect with .*drop\.sensitivity_update none"):
        assert run_here(off) == 0
    found = updates(config.logging.run_dir)
    assert [row["iteration"] for row in found] == [10, 20, 30]
    assert found[-1]["sensitivity"] != pytest.approx(BASE)
    train = train_rows(config.logging.run_dir)
    for row in train[:3] + train[33:]:
        assert row["keep_probs"] == pytest.approx(policy.keep_probs(row["iteration"]), abs=1e-6)


def test_another_base_list_on_resume_holds_until_the_next_update(config: Config, caplog: Any) -> None:
    assert run_here(change(config, training={"exit_after_iterations": 35})) == 75
    other = Path(config.logging.run_dir).parent / "other.json"
    SensitivityFile.from_gaps([0.1, 0.3, 0.0, 0.2], [0.01] * LAYERS, {"command": "made up"}).save(other)
    resumed = change(config, drop={"sensitivity": str(other)})
    assert run_here(resumed) == 0
    assert "drop sensitivity or Block list differ from the saved ones" in caplog.text
    expected = build_policy(resumed.drop, LAYERS, 40).keep_probs(36)
    assert train_rows(config.logging.run_dir)[35]["keep_probs"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_a_block_layer_is_observed_only_if_its_release_is_asked_for(config: Config, tmp_path: Path) -> None:
    blocked = change(config, drop={"block_layers": [4]})
    last = trained(blocked, tmp_path / "blocked")[-1]
    assert (last["gap"][3], last["gap_stderr"][3], last["sensitivity"][3]) == (0.0, pytest.approx(1.0), 1.0)
    assert all(row[3] == 1.0 for row in decisions(tmp_path / "blocked"))
    explored = change(blocked, drop={"release_block": True, "exploration": 0.3})
    last = trained(explored, tmp_path / "explored")[-1]
    assert last["gap_stderr"][3] < 0.3
    assert last["block_layers"] in ([], [4])
    assert any(row[3] < 1.0 for row in decisions(tmp_path / "explored"))


DEEP, TRAINED, OBSERVED = 12, 100, 700


class GivenDecisions(Policy):
    """Iteration t keeps the layers of row t of `rows`, [T, L], and drops the others."""

    def __init__(self, rows: NDArray[np.bool_]) -> None:
        super().__init__(Constant(1.0), rows.shape[1])
        self.rows = rows

    def keep_probs(self, iteration: int) -> NDArray[np.float64]:
        return self.rows[iteration - 1].astype(np.float64)

    def _keep_probs(self, theta: float) -> NDArray[np.float64]:
        raise AssertionError("keep_probs does without")


def marginal_costs(config: Config, keep_probs: NDArray[np.float64], num_batches: int) -> NDArray[np.float64]:
    """Loss without each layer minus with it, the others as drawn, on batches of the training data: [batches, L]."""
    checkpoint = latest_complete(Path(config.logging.run_dir) / "checkpoints")
    assert checkpoint is not None
    rng, layers = np.random.default_rng(1), len(keep_probs)
    drawn = rng.random((num_batches, layers)) < keep_probs
    # For each batch: as drawn, and with each layer in turn decided the other way.
    rows = np.concatenate([drawn[:, None], drawn[:, None] ^ np.eye(layers, dtype=bool)], axis=1)
    with distributed_run(config):
        tokenizer = load_tokenizer(config.data.tokenizer)
        model = build_model(config, padded_vocab_size(tokenizer.vocab_size, config))[0]
        load_weights(checkpoint.path, [model])
        controller = DropController(GivenDecisions(rows.reshape(-1, layers)))
        make_switchable(model, controller)
        model.train()
        length = RunLength(change(config, training={"train_iters": TRAINED + OBSERVED}).training)
        batches = TrainingData(config, tokenizer, find_data(config), length, TRAINED * 16).train_batches(num_batches)
        found = np.empty((num_batches, 1 + layers))
        for number, batch in enumerate(itertools.islice(batches, num_batches)):
            for position in range(1 + layers):
                controller.begin_iteration(number * (1 + layers) + position + 1, 1)
                with torch.no_grad():
                    loss = model(
                        batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"]
                    )
                found[number, position] = (loss * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    return np.where(drawn, 1.0, -1.0) * (found[:, 1:] - found[:, :1])


@pytest.mark.slow
def test_the_estimates_are_the_costs_of_leaving_layers_out(tmp_path: Path, corpus: Path) -> None:
    """A GPT is trained for a while; then its weights stand still, while its losses are observed and its layers left
    out one by one."""
    base = tiny_run(
        tmp_path / "trained",
        corpus,
        model={**NO_DROPOUT, "num_layers": DEEP, "init_method_std": 1.0},  # so that layers matter
        optimizer={"lr": 3e-3, "min_lr": 3e-4},
        training={"micro_batch_size": 16, "global_batch_size": 16, "train_iters": TRAINED},
        checkpoint={"save_at_end": True},
    )
    assert run_here(base) == 0
    assert losses(base.logging.run_dir)[-1] < losses(base.logging.run_dir)[0] - 1.0
    observing = change(
        in_folder(base, tmp_path / "observed"),
        drop={
            "policy": "sbld",
            "sensitivity": write_sensitivity(tmp_path, DEEP),
            "sensitivity_update": "dynamic",
            "schedule": "constant",
            **{"theta": 0.5, "beta": 0.4, "block_layers": [], "allow_layers": []},
            **{"update_interval": OBSERVED, "update_memory": 10 * OBSERVED},
        },
        optimizer={"lr": 1e-12, "min_lr": 1e-12, "weight_decay": 0.0, "lr_warmup_iters": 0},
        training={"train_iters": OBSERVED},
        checkpoint={"load": base.logging.run_dir, "save_at_end": False},
    )
    assert run_here(observing) == 0
    [estimate] = updates(observing.logging.run_dir)
    keep_probs = build_policy(observing.drop, DEEP, OBSERVED).keep_probs(1)
    costs = marginal_costs(base, keep_probs, num_batches=100)
    gap, stderr = np.array(estimate["gap"]), np.array(estimate["gap_stderr"])
    direct, direct_stderr = costs.mean(axis=0), costs.std(axis=0, ddof=1) / np.sqrt(len(costs))
    within = np.abs(gap - direct) <= 2 * np.hypot(stderr, direct_stderr)
    assert within.mean() >= 0.9
    # And precise enough to say something: estimates of nothing but zeros would not pass.
    assert (np.abs(direct) > 4 * np.hypot(stderr, direct_stderr)).sum() >= 3
