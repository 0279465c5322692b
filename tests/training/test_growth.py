"""Runs whose layers begin in stages: resumed around the growth, evaluated and exported before it, grown from another.

Single iterations and layouts are mcore/skip/test_growth.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sbld.config.flops import layer_flops_per_token
from megatron_sbld.config.sections import Config
from tests.training.trainer_helpers import (
    change,
    decisions,
    in_folder,
    losses,
    prepare_corpus,
    rows,
    run_here,
    sbld,
    stop_and_resume,
    tiny_run,
    train_rows,
    trained,
    write_sensitivity,
)

pytestmark = pytest.mark.slow  # mcore/skip/test_growth.py has a fast part
STAGES = [[0.5, 1], [0.75, 2], [1.0, 4]]  # grows after iterations 4 and 6 of 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


def staged_run(folder: Path, corpus: Path, drop: dict[str, Any] | None = None, **sections: Any) -> Config:
    return tiny_run(folder, corpus, drop={"policy": "staged", "stages": STAGES, **(drop or {})}, **sections)


@pytest.mark.parametrize(
    ("init", "training", "drop"),
    [
        ("random", {}, {}),
        ("zero", {}, {"policy": "layerdrop", "theta": 0.6}),
        ("copy", {}, {"stage_copy_moments": True}),
        ("copy", {"precision": "fp16", "initial_loss_scale": 2.0**40}, {}),
    ],
    ids=["random", "zero, inside LayerDrop", "copy with moments", "copy, fp16 that searches its loss scale"],
)
def test_resumed_around_the_growth_bit_for_bit(
    tmp_path: Path, corpus: Path, init: str, training: dict[str, Any], drop: dict[str, Any]
) -> None:
    config = staged_run(tmp_path / "run", corpus, {"stage_init": init, **drop}, training=training)
    whole = trained(config, tmp_path / "whole")
    assert len({tuple(kept) for kept in decisions(tmp_path / "whole")}) >= 3
    for iterations in (3, 4, 5, 6):
        resumed = in_folder(config, tmp_path / f"stopped_after_{iterations}")
        assert [run_here(part) for part in stop_and_resume(resumed, iterations)] == [75, 0]
        assert losses(resumed.logging.run_dir) == whole


def test_rows_and_console_tell_how_many_layers_have_begun_and_what_ran(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drop = {"stage_layers": [3, 1], "stage_init": "copy"}
    config = staged_run(tmp_path / "run", corpus, drop, logging={"progress": "lines", "tensorboard": True})
    assert run_here(config) == 0
    printed = capfd.readouterr().err.splitlines()
    first = printed.index("until iteration 4 1 layer (3) runs")
    assert printed[first + 1 : first + 3] == [
        "until iteration 6 2 layers (1, 3) run",
        "from iteration 7 on all 4 layers run",
    ]
    assert [line for line in printed if "begin" in line] == [
        "iteration 5: 1 layer (1) begins, as a copy of 3",
        "iteration 7: 2 layers (2, 4) begin, as copies of 1, 3",
    ]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("begun_layers")] == [1] * 4 + [2] * 2 + [4] * 2
    found = train_rows(tmp_path / "run")
    assert [row["begun_layers"] for row in found] == [1] * 4 + [2] * 2 + [4] * 2
    assert found[0]["kept"] == [0.0, 0.0, 1.0, 0.0]
    layer = 3 * layer_flops_per_token(config.model) * 8 * config.model.seq_length
    assert found[-1]["executed_flops"] - found[0]["executed_flops"] == pytest.approx(3 * layer)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run that was stopped while two of its layers had begun."""
    folder = tmp_path_factory.mktemp("growing")
    config = staged_run(folder, corpus, {"stage_layers": [4, 2]})
    assert run_here(change(config, training={"exit_after_iterations": 5})) == 75
    return folder


def test_a_growing_checkpoint_is_the_shallower_model(growing: Path, tmp_path: Path) -> None:
    from megatron_sbld.evaluation.model import read_trained_model
    from megatron_sbld.hf.export_model import export_hf

    trained_model = read_trained_model(growing)
    assert trained_model.model.num_layers == 2
    assert trained_model.layers is not None
    assert trained_model.layers.places == {1: 2, 2: 4}
    exported = export_hf(str(growing), str(tmp_path / "hf"))
    assert any("2 of its 4 layers had begun (2, 4)" in note for note in exported.notes)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.n_layer == 2


def test_tasks_in_training_and_the_evaluation_of_the_checkpoint_run_the_same_layers(
    tmp_path: Path, corpus: Path
) -> None:
    from megatron_sbld.config.sections import ParallelConfig
    from megatron_sbld.evaluation.model import read_trained_model
    from megatron_sbld.evaluation.run import evaluate_checkpoints
    from megatron_sbld.evaluation.tasks import PerplexityTask

    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 3)
    data = {"train_data_path": [f"{corpus}_train"], "valid_data_path": [], "perplexity_path": str(text)}
    config = staged_run(tmp_path / "run", corpus, {"stage_layers": [4, 2]}, data=data, training={"task_interval": 5})
    assert run_here(change(config, training={"exit_after_iterations": 5})) == 75
    (shown,) = [row for row in rows(tmp_path / "run") if "perplexity_bits_per_byte" in row]
    task = PerplexityTask(str(text), config.data.perplexity_format)
    (evaluated,) = evaluate_checkpoints(task, [read_trained_model(tmp_path / "run")], ParallelConfig())
    assert evaluated.result.bits_per_byte == pytest.approx(shown["perplexity_bits_per_byte"], rel=1e-6)


def test_a_shallower_model_grows_on(tmp_path: Path, corpus: Path) -> None:
    shallow = tiny_run(tmp_path / "shallow", corpus, model={"num_layers": 2}, checkpoint={"save_at_end": True})
    assert run_here(shallow) == 0
    config = staged_run(
        tmp_path / "deep",
        corpus,
        {"stages": [[0.25, 2], [1.0, 4]], "stage_layers": [1, 4], "stage_init": "copy"},
        checkpoint={"load": str(tmp_path / "shallow"), "load_optimizer": False},
        optimizer={"lr_warmup_iters": 0, "lr": 1e-3},
    )
    assert run_here(config) == 0
    assert losses(tmp_path / "deep")[0] < losses(tmp_path / "shallow")[-1] + 0.2
    three = {"stages": [[0.25, 3], [1.0, 4]], "stage_layers": [1, 4, 2]}
    other = change(in_folder(config, tmp_path / "other"), drop=three)
    assert "begin with 3 layers, [1, 2, 4], but the checkpoint has 2" in str(run_here(other))


def test_a_growing_run_goes_back_no_stage_and_loses_none_silently(tmp_path: Path, corpus: Path) -> None:
    config = staged_run(tmp_path / "run", corpus)
    assert run_here(change(config, training={"exit_after_iterations": 5})) == 75
    refused = run_here(change(config, drop={"policy": "layerdrop", "stages": None}))
    assert "is still growing: layers [2, 4] have not begun" in str(refused)
    longer = change(config, training={"train_iters": 40}, checkpoint={"replan": True})
    assert run_here(change(longer, training={"exit_after_iterations": 2})) == 75
    assert train_rows(tmp_path / "run")[-1]["begun_layers"] == 2


def test_sbld_and_dynamic_sensitivity_inside_the_gate(tmp_path: Path, corpus: Path) -> None:
    drop = {**sbld(tmp_path), "stages": [[0.5, 2], [1.0, 4]], "sensitivity_update": "dynamic", "update_interval": 2}
    config = staged_run(tmp_path / "run", corpus, drop, training={"train_iters": 12})
    whole = trained(config, tmp_path / "whole")
    assert all(kept[1] == kept[3] == 0.0 for kept in decisions(tmp_path / "whole")[:6])
    for iterations in (5, 7, 9):
        resumed = in_folder(config, tmp_path / f"stopped_after_{iterations}")
        assert [run_here(part) for part in stop_and_resume(resumed, iterations)] == [75, 0]
        assert losses(resumed.logging.run_dir) == whole


def test_the_most_sensitive_layers_begin_first(tmp_path: Path, corpus: Path) -> None:
    drop = {"stage_layers": "sensitivity", "sensitivity": write_sensitivity(tmp_path)}
    assert run_here(staged_run(tmp_path / "run", corpus, drop)) == 0
    assert [int(kept[3]) for kept in decisions(tmp_path / "run")] == [1] * 8
    assert decisions(tmp_path / "run")[4] == [0.0, 0.0, 1.0, 1.0]
