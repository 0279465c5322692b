"""`optimizer.lr_schedule_by: layer_tokens` in the trainer: the count, the rate that it drives, and runs that go on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sbld.checkpoint.files import find_checkpoint, read_train_state
from megatron_sbld.config.sections import Config
from megatron_sbld.method.decisions import draw_plan
from tests.training.trainer_helpers import (
    FULL_DEPTH,
    HALF,
    ITERATIONS,
    LAYERS,
    NO_DROPOUT,
    SEQUENCE,
    change,
    in_folder,
    rows,
    run_here,
    sbld,
    stop_and_resume,
    tiny_run,
    train_rows,
)

BATCH, WARMUP = 8, 2 * 8
BY_LAYER_TOKENS = {"lr_schedule_by": "layer_tokens"}
LR, MIN_LR = 1e-2, 1e-3


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Config:
    return tiny_run(tmp_path / "run", corpus, drop=HALF, optimizer=BY_LAYER_TOKENS)


def rates(config: Config) -> list[float]:
    """The learning rate after each iteration."""
    return [row["lr"] for row in train_rows(config.logging.run_dir)]


def cosine(steps: float, horizon: float, warmup: float = WARMUP) -> float:
    """The rate after so many undropped samples' worth of layer-tokens."""
    if steps <= warmup:
        return LR * steps / warmup
    done = min(1.0, (steps - warmup) / (horizon - warmup))
    return MIN_LR + (LR - MIN_LR) * 0.5 * (math.cos(math.pi * done) + 1.0)


def test_the_rate_is_that_of_the_layer_tokens_of_the_draws(config: Config) -> None:
    assert run_here(config) == 0
    plans = [
        draw_plan([0.5] * LAYERS, config.drop.seed, iteration, num_microbatches=1)[0]
        for iteration in range(1, ITERATIONS + 1)
    ]
    ran = np.cumsum([int(plan.sum()) for plan in plans])
    assert ran.tolist() != [2 * iteration for iteration in range(1, ITERATIONS + 1)], "not just the expectation"
    counted = [row["consumed_layer_tokens"] for row in train_rows(config.logging.run_dir)]
    assert counted == (ran * BATCH * SEQUENCE).tolist()
    horizon = 0.5 * BATCH * ITERATIONS
    assert rates(config) == pytest.approx([cosine(BATCH * layers / LAYERS, horizon) for layers in ran.tolist()])


COSINE = {"lr_decay_style": "cosine"}
WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "lr_decay_iters": 7}
ROOT = {"lr_decay_style": "inverse-square-root", "lr_decay_iters": 12}
WEIGHT_DECAY = {"start_weight_decay": 0.1, "end_weight_decay": 0.3, "weight_decay_incr_style": "linear"}


@pytest.mark.parametrize(
    ("optimizer", "length"),
    [
        (COSINE, "iterations"),
        (WSD, "ramp"),
        pytest.param(COSINE, "ramp", marks=pytest.mark.slow),
        pytest.param(WSD, "samples", marks=pytest.mark.slow),
        pytest.param(ROOT, "iterations", marks=pytest.mark.slow),
        pytest.param(WEIGHT_DECAY, "samples", marks=pytest.mark.slow),
    ],
)
def test_an_undropped_run_has_the_rate_of_its_iterations(
    config: Config, tmp_path: Path, optimizer: dict[str, Any], length: str
) -> None:
    training: dict[str, dict[str, Any]] = {
        "iterations": {},
        "samples": {"train_iters": None, "train_samples": 70},
        "ramp": {"train_iters": 12, "rampup_batch_size": [2, 2, 12]},
    }
    own = dict(optimizer)
    if length == "samples":
        own |= {"lr_warmup_iters": 0, "lr_warmup_samples": 13}
        if "lr_decay_iters" in own:
            own["lr_decay_samples"] = 8 * own.pop("lr_decay_iters")
    run = change(config, drop=FULL_DEPTH, training=training[length], optimizer=own)
    found = []
    for by in ("iterations", "layer_tokens"):
        case = change(in_folder(run, tmp_path / by), optimizer={"lr_schedule_by": by})
        assert run_here(case) == 0
        done = train_rows(case.logging.run_dir)
        assert [row["consumed_layer_tokens"] for row in done] == [LAYERS * row["consumed_tokens"] for row in done]
        found.append([(row["lr"], row["loss"], row["grad_norm"]) for row in done])
    assert found[0] == found[1]


def test_iterations_are_the_default_and_keep_no_plan(config: Config) -> None:
    assert Config().optimizer.lr_schedule_by == "iterations"
    usual = change(config, optimizer={"lr_schedule_by": "iterations"}, checkpoint={"save_at_end": True})
    assert run_here(usual) == 0
    assert rates(usual) == [cosine(BATCH * t, BATCH * ITERATIONS) for t in range(1, ITERATIONS + 1)]
    state = read_train_state(find_checkpoint(Path(usual.logging.run_dir)).path)
    assert "lr_plan" not in state
    assert state["consumed_layer_tokens"] == train_rows(usual.logging.run_dir)[-1]["consumed_layer_tokens"]


@pytest.mark.parametrize("case", ["layers", "samples", "stages", "microbatches", "dynamic"])
def test_a_run_that_goes_on_has_the_same_rate_bit_for_bit(config: Config, tmp_path: Path, case: str) -> None:
    drop: dict[str, Any] = {
        "layers": {"sampler": "balanced"},
        "samples": {"granularity": "sample"},
        "stages": {"stages": [[0.5, 2], [1.0, 4]], "stage_warmup": 0.25},
        "microbatches": {"decision_scope": "microbatch"},
        "dynamic": {**sbld(tmp_path), "sensitivity_update": "dynamic", "update_interval": 2, "update_memory": 10},
    }[case]
    config = change(config, drop=drop, training={"micro_batch_size": 2})
    whole = in_folder(config, tmp_path / "whole")
    assert run_here(whole) == 0
    first, second = stop_and_resume(config, 3)
    assert run_here(first) == 75
    assert run_here(second) == 0
    for name in ("lr", "loss", "consumed_layer_tokens"):
        expected, found = ([row[name] for row in train_rows(run.logging.run_dir)] for run in (whole, config))
        assert found == expected, name


def test_iterations_that_are_repeated_are_counted_once(config: Config, tmp_path: Path) -> None:
    """A run that was killed behind its last checkpoint does iterations again."""
    saving = change(config, checkpoint={"save_interval": 3})
    assert run_here(saving) == 0
    expected = train_rows(saving.logging.run_dir)
    assert len(list((Path(saving.logging.run_dir) / "checkpoints").glob("iter_*"))) == 2
    assert run_here(saving) == 0  # from iteration 6
    again = train_rows(saving.logging.run_dir)
    for name in ("lr", "consumed_layer_tokens"):
        assert [row[name] for row in again] == [row[name] for row in expected]


def test_samples_count_as_the_share_of_a_microbatch(config: Config) -> None:
    drop = {"granularity": "sample", "theta": 0.75}
    config = change(config, drop=drop, training={"micro_batch_size": 2})
    assert run_here(config) == 0
    done = train_rows(config.logging.run_dir)
    kept = np.cumsum([sum(row["kept"]) for row in done])
    assert [row["consumed_layer_tokens"] for row in done] == pytest.approx(kept * BATCH * SEQUENCE)
    horizon = 0.75 * BATCH * ITERATIONS
    assert rates(config) == pytest.approx([cosine(BATCH * layers / LAYERS, horizon) for layers in kept.tolist()])


def test_stages_are_forecast_exactly_and_their_warm_up_multiplies(config: Config) -> None:
    """Two of four layers for half of the run: nothing is left to chance."""
    drop = {"policy": "staged", "theta": 0.9, "stages": [[0.5, 2], [1.0, 4]], "stage_warmup": 0.25}
    config = change(config, drop=drop, model=NO_DROPOUT)
    assert run_here(config) == 0
    steps = np.cumsum([0.5 * BATCH] * 4 + [BATCH] * 4).tolist()
    expected = [cosine(value, horizon=steps[-1]) for value in steps]
    # A row has the rate of the next iteration: the 5th and 6th are the first two since layers began.
    expected[3] *= 1 / 2
    assert rates(config) == pytest.approx(expected)
    assert rates(config)[-1] == pytest.approx(MIN_LR), "the decay ends with the run"


def test_a_run_that_consumes_more_than_its_forecast_ends_at_the_lowest_rate(config: Config, tmp_path: Path) -> None:
    found = {}
    for seed in range(40):
        counts = [draw_plan([0.5] * LAYERS, seed, t, 1).sum() for t in range(1, ITERATIONS + 1)]
        found.setdefault(np.sign(sum(counts) - 0.5 * LAYERS * ITERATIONS), seed)
    more = change(in_folder(config, tmp_path / "more"), drop={"seed": found[1]})
    less = change(in_folder(config, tmp_path / "less"), drop={"seed": found[-1]})
    assert run_here(more) == run_here(less) == 0
    assert rates(more)[-1] == MIN_LR
    assert MIN_LR < rates(less)[-1] < 0.5 * LR


def test_a_changed_rate_or_length_is_planned_from_where_the_run_is(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = stop_and_resume(config, 4)
    assert run_here(first) == 75
    done = train_rows(config.logging.run_dir)[-1]["consumed_layer_tokens"] / (LAYERS * SEQUENCE)
    cases: dict[str, tuple[dict[str, dict[str, Any]], float]] = {
        "lr_decay_iters": ({"optimizer": {"lr_decay_iters": 6}}, done + 2 * 0.5 * BATCH),
        "theta": ({"drop": {"theta": 0.75}}, done + 4 * 0.75 * BATCH),
        "train_iters": ({"training": {"train_iters": 12}, "checkpoint": {"replan": True}}, done + 8 * 0.5 * BATCH),
    }
    for name, (changed, horizon) in cases.items():
        caplog.clear()
        load = {"load": config.logging.run_dir, "load_optimizer": True}
        run = change(change(in_folder(second, tmp_path / name), **changed), checkpoint=load)
        assert run_here(run) == 0, name
        own = [row for row in rows(run.logging.run_dir) if "lr" in row]
        steps = [row["consumed_layer_tokens"] / (LAYERS * SEQUENCE) for row in own]
        assert [row["lr"] for row in own] == pytest.approx([cosine(value, horizon) for value in steps]), name
        assert "the learning rate by layer-tokens is planned anew from iteration 5 on" in caplog.text
    assert "training.train_iters is 12, the checkpoint was saved with 8" in str(
        run_here(change(second, training={"train_iters": 12}))
    )


def test_a_run_can_go_over_to_layer_tokens_and_back(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usual = change(config, optimizer={"lr_schedule_by": "iterations"})
    assert run_here(stop_and_resume(usual, 3)[0]) == 75
    assert run_here(stop_and_resume(config, 3)[0]) == 75
    assert "optimizer.lr_schedule_by is 'layer_tokens', the checkpoint was saved with 'iterations'" in caplog.text
    assert run_here(usual) == 0
    done = train_rows(config.logging.run_dir)
    steps = [row["consumed_layer_tokens"] / (LAYERS * SEQUENCE) for row in done]
    horizon = steps[2] + 5 * 0.5 * BATCH
    assert rates(config)[3:6] == pytest.approx([cosine(value, horizon) for value in steps[3:6]])
    by_iterations = [cosine(BATCH * t, BATCH * ITERATIONS) for t in range(1, ITERATIONS + 1)]
    assert rates(config)[:3] + rates(config)[6:] == pytest.approx(by_iterations[:3] + by_iterations[6:])


def test_a_checkpoint_without_the_count_is_refused_by_name_where_it_is_needed(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As versions before this one wrote them."""
    for name, drop in {"dropped": HALF, "undropped": FULL_DEPTH}.items():
        usual = change(in_folder(config, tmp_path / name), drop=drop, optimizer={"lr_schedule_by": "iterations"})
        assert run_here(stop_and_resume(usual, 3)[0]) == 75
        forget_the_count(find_checkpoint(tmp_path / name).path)
    dropped = in_folder(config, tmp_path / "dropped")
    assert "optimizer.lr_schedule_by = 'layer_tokens': the checkpoint is of a run that dropped layers" in str(
        run_here(dropped)
    )
    weights = {"load": str(tmp_path / "dropped"), "load_optimizer": False}
    assert run_here(change(in_folder(config, tmp_path / "weights"), checkpoint=weights)) == 0
    assert train_rows(tmp_path / "weights")[0]["consumed_layer_tokens"] <= LAYERS * BATCH * SEQUENCE, "from 0"
    undropped = change(in_folder(config, tmp_path / "undropped"), drop=FULL_DEPTH)
    assert run_here(undropped) == 0
    assert rates(undropped) == [cosine(BATCH * t, BATCH * ITERATIONS) for t in range(1, ITERATIONS + 1)]
    usual = change(dropped, optimizer={"lr_schedule_by": "iterations"}, checkpoint={"save_at_end": True})
    assert run_here(usual) == 0
    counts = [row["consumed_layer_tokens"] for row in train_rows(tmp_path / "dropped")]
    assert counts[3:] == [None] * 5, "nobody knows"


def forget_the_count(checkpoint: Path) -> None:
    """Make a checkpoint one of a version that knew nothing of layer-tokens."""
    from megatron_sbld.checkpoint.files import MANIFEST

    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["train_state"]["consumed_layer_tokens"]
    del manifest["train_state"]["config"]["optimizer"]["lr_schedule_by"]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_a_warm_up_that_outlasts_the_forecast_is_refused(config: Config) -> None:
    long = change(config, optimizer={"lr_warmup_iters": 5})
    text = str(run_here(long))
    assert "optimizer.lr_warmup_iters = 5: with layer_tokens it lasts for" in text
    assert "40 undropped samples, but by the forecast those of 32 are consumed when the decay ends" in text
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "lr_warmup_iters": 2}
    assert "those of 12 are consumed when the last part of WSD begins" in str(run_here(change(config, optimizer=wsd)))


def test_an_iteration_whose_step_is_left_out_is_counted_and_leaves_the_rate_alone(config: Config) -> None:
    """As with iterations: what was read counts, and Megatron's schedule waits."""
    assert run_here(change(config, training={"precision": "fp16", "initial_loss_scale": 2.0**40, "hysteresis": 1})) == 0
    done = train_rows(config.logging.run_dir)
    assert [row["update_skipped"] for row in done[:2]] == [True, True]
    steps = sum(sum(row["kept"]) for row in done if not row["update_skipped"])
    assert done[1]["lr"] == 0.0
    assert done[-1]["lr"] == pytest.approx(cosine(BATCH * steps / LAYERS, 0.5 * BATCH * ITERATIONS))
    assert done[-1]["consumed_layer_tokens"] == BATCH * SEQUENCE * sum(sum(row["kept"]) for row in done)


def test_tensorboard_and_the_console_tell(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_here(change(config, logging={"tensorboard": True, "progress": "lines"})) == 0
    assert (
        "learning rate by layer-tokens: the run is forecast to consume 50.0% of the undropped run's; 50.0% of them are "
        "warm-up"
    ) in capfd.readouterr().err
    events = EventAccumulator(str(Path(config.logging.run_dir) / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("consumed_layer_tokens")]
    assert shown == [row["consumed_layer_tokens"] for row in train_rows(config.logging.run_dir)]


def test_tokens_count_by_what_each_layer_runs(config: Config, tmp_path: Path) -> None:
    """The first and the last of four layers run all 32 tokens, the others 16 and later 24 of them."""
    steps = {"token_schedule": "steps", "token_steps": [[0.5, 16], [0.75, 24], [1.0, 32]], "token_step": 8}
    config = change(config, drop={"policy": "none", "theta": 0.9, "granularity": "token", **steps})
    assert run_here(config) == 0
    shares = [0.75] * 4 + [0.875] * 2 + [1.0] * 2
    counted = [row["consumed_layer_tokens"] for row in train_rows(config.logging.run_dir)]
    assert counted == [round(share) for share in np.cumsum(shares) * LAYERS * BATCH * SEQUENCE]
    consumed = np.cumsum(shares) * BATCH
    assert rates(config) == pytest.approx([cosine(value, consumed[-1]) for value in consumed.tolist()])
    first, second = stop_and_resume(in_folder(config, tmp_path / "resumed"), 3)
    assert run_here(first) == 75
    assert run_here(second) == 0
    assert [row["lr"] for row in train_rows(tmp_path / "resumed")] == rates(config)
