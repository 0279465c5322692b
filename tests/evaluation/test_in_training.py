"""Evaluations that a config asks for: the figures of the checkpoint, and a run that does not notice them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sbld.config.sections import ParallelConfig
from megatron_sbld.evaluation.model import read_trained_model
from megatron_sbld.evaluation.results import Evaluation, read_evaluations
from megatron_sbld.evaluation.run import evaluate_checkpoints
from megatron_sbld.evaluation.tasks import LambadaTask, PerplexityTask, Task
from tests.training.trainer_helpers import (
    BOTH_OVERLAPS,
    change,
    in_folder,
    losses,
    prepare_corpus,
    rows,
    run_here,
    run_trainers,
    sbld,
    tiny_run,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 2, both overlaps": BOTH_OVERLAPS,
    "PP 2, interleaved": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("in_training")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    return prepare_corpus(folder)


def test_figures_are_the_checkpoints_and_training_goes_on(folder: Path, corpus: Path, passages: Path) -> None:
    text = folder / "text.txt"
    text.write_text(Path(__file__).read_text(encoding="utf-8")[:2000], encoding="utf-8")
    data = {"lambada_path": str(passages), "perplexity_path": str(text)}
    runs = {}
    for name, parallel in LAYOUTS.items():
        plain = tiny_run(
            folder / f"{name} plain",
            corpus,
            parallel=parallel,
            drop=sbld(folder),
            model={"hidden_dropout": 0.1},
            checkpoint={"save_interval": 3, "save_at_end": True},
        )
        asked = change(in_folder(plain, folder / name), data=data, training={"task_interval": 3, "micro_batch_size": 1})
        runs[name] = (plain, asked)
    outcomes = run_trainers(2, [config for pair in runs.values() for config in pair])
    assert outcomes == [[0, 0]] * 2 * len(runs)
    for name, (plain, asked) in runs.items():
        assert losses(asked.logging.run_dir) == losses(plain.logging.run_dir), name
        found = read_evaluations(folder / name / "evaluations.jsonl")
        assert [(row.task, row.iteration) for row in found] == [
            (task, iteration) for iteration in (3, 6, 8) for task in ("lambada", "perplexity")
        ]
        assert_figures_of_checkpoint(found, folder / name / "checkpoints" / "iter_0000006", passages, text)
        shown = [row for row in rows(folder / name) if "lambada_accuracy" in row]
        assert [row["iteration"] for row in shown] == [3, 6, 8]
        assert all(row["perplexity_bits_per_byte"] > 1 and row["tasks_time_s"] > 0 for row in shown)


def assert_figures_of_checkpoint(found: list[Evaluation], checkpoint: Path, passages: Path, text: Path) -> None:
    trained = read_trained_model(checkpoint)
    tasks: list[Task] = [LambadaTask(str(passages)), PerplexityTask(str(text))]
    for task in tasks:
        (row,) = [row for row in found if (row.task, row.iteration) == (task.name, 6)]
        (evaluated,) = evaluate_checkpoints(task, [trained], ParallelConfig())
        for metric, value in vars(evaluated.result).items():
            assert row.metrics[metric] == pytest.approx(value, rel=1e-5), metric
        assert row.consumed_tokens == trained.consumed_tokens
        assert row.options == evaluated.asked.options


def test_data_that_cannot_be_asked_are_refused_before_training(folder: Path, corpus: Path, passages: Path) -> None:
    config = tiny_run(folder / "refused", corpus)
    broken = folder / "broken.txt"
    broken.write_text("word\n")
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        f"data.lambada_path = '{broken}'": ({"lambada_path": str(broken)}, {}),
        "data.perplexity_path = 'nowhere'": ({"perplexity_path": "nowhere"}, {}),
        "training.task_interval = 5 does not work with data.lambada_path = None": ({}, {"task_interval": 5}),
        "training.task_interval": ({"lambada_path": str(passages)}, {"task_interval": -1}),
    }
    for message, (data, training) in cases.items():
        outcome = run_here(change(config, data=data, training=training))
        assert str(outcome).startswith("ValueError"), outcome
        assert message in str(outcome)
    assert not (folder / "refused").exists()


def test_figures_are_of_the_weights_that_the_run_has(folder: Path, corpus: Path, passages: Path) -> None:
    """Gone back to a checkpoint, it trains towards others; started anew, it keeps a copy of what a former run left."""
    config = tiny_run(
        folder / "gone back",
        corpus,
        data={"train_data_path": [f"{corpus}_train"], "lambada_path": str(passages)},
        training={"task_interval": 2},
        checkpoint={"save_interval": 4, "save_at_end": True},
    )
    file = folder / "gone back" / "evaluations.jsonl"
    assert run_here(config) == 0
    assert [row.iteration for row in read_evaluations(file)] == [2, 4, 6, 8]
    before = file.read_text()
    shutil.rmtree(folder / "gone back" / "checkpoints" / "iter_0000008")
    changed = change(config, optimizer={"lr": 1e-3}, training={"exit_after_iterations": 1})
    assert run_here(changed) == 75
    assert [row.iteration for row in read_evaluations(file)] == [2, 4]
    assert file.read_text() == "".join(before.splitlines(keepends=True)[:2])
    shutil.rmtree(folder / "gone back" / "checkpoints")
    assert run_here(changed) == 75
    assert [row["iteration"] for row in rows(folder / "gone back")] == [1]
    assert read_evaluations(file) == []
    assert [row.iteration for row in read_evaluations(file.with_name("evaluations.jsonl.1"))] == [2, 4]
    assert len(file.with_name("metrics.jsonl.1").read_text().splitlines()) == 7
    file.write_text('{"task": ')
    assert "evaluations.jsonl, line 1 is cut off" in str(run_here(changed)), "before it trains"
    assert [row["iteration"] for row in rows(folder / "gone back")] == [1]
    assert run_here(change(changed, data={"lambada_path": None}, training={"task_interval": 0})) == 75
