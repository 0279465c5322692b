"""random-LTD in the trainer: what a run reports, that it can be resumed, and that its layout does not change a draw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_sbld.checkpoint.files import Layout
from megatron_sbld.checkpoint.resume import SavedRun, check_resume, find_changes
from megatron_sbld.config.flops import executed_flops, padded_vocab_size
from megatron_sbld.config.sections import Config
from megatron_sbld.config.tokens import tokens_of
from megatron_sbld.config.validate import validate
from megatron_sbld.report.compute import kept_flops
from megatron_sbld.report.runs import read_run
from megatron_sbld.report.schedule import show_schedule
from tests.training.trainer_helpers import (
    HALF,
    ITERATIONS,
    LAYERS,
    NO_DROPOUT,
    SEQUENCE,
    change,
    losses,
    run_here,
    stop_and_resume,
    tiny_run,
    train_rows,
    trained,
)

TOKENS: dict[str, Any] = {"granularity": "token", "min_tokens": 8, "token_step": 4, "token_iterations": 6}


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Config:
    return tiny_run(tmp_path / "run", corpus, drop=TOKENS, model={**NO_DROPOUT, "position_embedding_type": "rope"})


def test_a_run_reports_its_tokens_and_the_flops_that_ran(config: Config, tmp_path: Path) -> None:
    both = change(config, drop={**HALF, "recovery_fraction": 0.25})
    trained(both, tmp_path / "both")
    rows = train_rows(tmp_path / "both")
    assert [row["kept_tokens"] for row in rows] == [12, 16, 20, 24, 28, 32, 32, 32]
    vocab_size = padded_vocab_size(259, config)
    for row in rows:
        share = row["kept_tokens"] / SEQUENCE
        assert set(row["kept"][1:-1]) <= {0.0, share}
        assert {row["kept"][0], row["kept"][-1]} <= {0.0, 1.0}
        assert row["kept_fraction"] == pytest.approx(sum(row["kept"]) / LAYERS, abs=1e-6)
        attended = row["kept"][0] + row["kept"][-1] + share * sum(row["kept"][1:-1])
        assert row["executed_flops"] == pytest.approx(
            executed_flops(config.model, vocab_size, 8, sum(row["kept"]), attended), rel=1e-6
        )
    assert any(0.0 in row["kept"] for row in rows[:6])
    run = read_run(tmp_path / "both", "both")
    assert run.policy == "layerdrop, tokens"
    saved = run.column("kept_fraction") - kept_flops(run)
    assert saved.min() > -1e-6  # `kept` is rounded
    assert saved.max() > 0.01


def test_a_run_is_resumed_bit_for_bit_and_does_not_depend_on_the_size_of_a_microbatch(
    config: Config, tmp_path: Path
) -> None:
    expected = trained(config, tmp_path / "whole")
    stopped, resumed = stop_and_resume(config, 3)
    assert run_here(stopped) == 75
    assert run_here(resumed) == 0
    assert losses(config.logging.run_dir) == expected
    larger = trained(change(config, training={"micro_batch_size": 4}), tmp_path / "larger")
    assert larger == pytest.approx(expected, rel=1e-4)
    other = trained(change(config, drop={"seed": 5}), tmp_path / "seed")
    assert other != pytest.approx(expected, rel=1e-4)


def test_with_all_tokens_a_run_is_the_undropped_one_bit_for_bit(config: Config, tmp_path: Path) -> None:
    every = {"min_tokens": SEQUENCE, "token_step": SEQUENCE}
    with_tokens = trained(change(config, drop=every), tmp_path / "tokens")
    assert with_tokens == trained(change(config, drop={"granularity": "layer"}), tmp_path / "undropped")


@pytest.mark.parametrize(
    ("saved", "own", "parallel", "message"),
    [
        (1, None, {}, None),
        (4, None, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, None),
        (1, 4, {"context_parallel_size": 2}, None),
        (1, None, {"context_parallel_size": 2}, r"token_strata = None .* from 1 strata, and this layout needs .* 4"),
    ],
)
def test_strata_of_a_checkpoint_are_drawn_on_another_layout_or_refused(
    config: Config, saved: int, own: int | None, parallel: dict[str, Any], message: str | None
) -> None:
    sections = {name: vars(section) for name, section in vars(config).items()}
    drop = {"token_strata": saved, "growth": None}
    train_state = {"config": sections, "consumed_samples": 8, "drop": drop}
    sizes = dict.fromkeys([field.name for field in dataclasses.fields(Layout)], 1)
    layout = Layout(**{**sizes, "optimizer_format": "not_distributed", "optimizer_buckets": []})
    run = SavedRun(1, layout, train_state)
    present = change(config, drop={"token_strata": own}, parallel=parallel)
    if message is None:
        check_resume(run, present, [])
    else:
        with pytest.raises(ValueError, match=message):
            check_resume(run, present, [])


def test_the_layout_says_how_many_strata_there_are(config: Config) -> None:
    tokens = tokens_of(change(config, parallel={"context_parallel_size": 2}), ITERATIONS)
    assert tokens is not None
    assert tokens.strata == 4
    assert tokens_of(change(config, drop={"granularity": "layer"}), ITERATIONS) is None


def test_switching_tokens_on_is_a_change(config: Config) -> None:
    undropped = change(config, drop={"granularity": "layer", "min_tokens": None, "token_step": 16})
    sections = {name: vars(section) for name, section in vars(undropped).items()}
    assert {change.field for change in find_changes(sections, config)} == {
        *("drop.granularity", "drop.min_tokens", "drop.token_step"),
        *([] if undropped.drop.token_iterations == config.drop.token_iterations else ["drop.token_iterations"]),
    }
    assert find_changes(sections, undropped) == []


def test_compiled_layers_are_refused(config: Config) -> None:
    message = r"drop\.granularity = 'token' does not work with training\.torch_compile = True"
    with pytest.raises(ValueError, match=message):
        validate(change(config, training={"torch_compile": True}), 1)


def test_the_schedule_shows_tokens_before_training(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    longer = change(config, training={"train_iters": 600}, drop={"token_iterations": None})
    outlook = show_schedule(longer)
    assert outlook.phases[0].tokens == (8, 12)
    assert outlook.total.tokens == (8, SEQUENCE)
    assert outlook.total.mean_keep_prob == 1.0
    assert 0.5 < outlook.total.mean_flops < 1.0
    assert outlook.total.ideal_gain is not None
    assert outlook.total.ideal_gain > 0.1
    text = capsys.readouterr().out
    assert "policy none, 4 layers, 600 iterations" in text
    assert "of layers 2-3; the others run all" in text
    assert "if a dropped token cost nothing at all" in text
