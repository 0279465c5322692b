"""Runs whose layers begin in stages: resumed around the growth, evaluated and exported before it, grown from another.

Single iterations and layouts are mcore/skip/test_growth.py's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sbld.config.flops import layer_flops_per_token
from megatron_sbld.config.sections import Config
from tests.checkpoint.common_in_shards import move_common_into_shards
from tests.training.trainer_helpers import (
    change,
    decisions,
    in_folder,
    losses,
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


def staged_run(folder: Path, corpus: Path, drop: dict[str, Any] | None = None, **sections: Any) -> Config:
    return tiny_run(folder, corpus, drop={"policy": "staged", "stages": STAGES, **(drop or {})}, **sections)


@pytest.mark.parametrize(
    ("init", "training", "drop"),
    [
        ("random", {}, {}),
        ("zero", {}, {"policy": "layerdrop", "theta": 0.6}),
        ("copy", {}, {"stage_copy_moments": True, "stage_warmup": 0.25}),
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


def test_the_learning_rate_rises_again_after_each_growth(tmp_path: Path, corpus: Path) -> None:
    rates = {}
    for warmup in (0.0, 0.375):
        config = staged_run(tmp_path / str(warmup), corpus, {"stage_warmup": warmup})
        assert run_here(config) == 0
        rates[warmup] = [row["lr"] for row in train_rows(tmp_path / str(warmup))]
    factors = [rate / usual for rate, usual in zip(rates[0.375], rates[0.0], strict=True)]
    assert factors == pytest.approx([1, 1, 1, 1 / 3, 2 / 3, 1 / 3, 2 / 3, 1])  # a row has the next iteration's
    assert losses(tmp_path / "0.375")[:5] == losses(tmp_path / "0.0")[:5]
    assert losses(tmp_path / "0.375")[5:] != losses(tmp_path / "0.0")[5:]


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
    tmp_path: Path, corpus: Path, caplog: pytest.LogCaptureFixture
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
    assert "2 of its 4 layers had begun (2, 4): the model has these alone" in caplog.text


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


@pytest.mark.parametrize("saved_by", ["this trainer", "Megatron-LM", "Megatron-LM of core 0.19"])
def test_the_layers_of_a_growing_checkpoint_that_had_begun_are_its_model(
    growing: Path, corpus: Path, tmp_path: Path, saved_by: str
) -> None:
    """Weights of layers that never trained are taken over by no run, whatever its depth is."""
    found = str(growing) if saved_by == "this trainer" else patched_checkpoint(growing, tmp_path)
    if saved_by == "Megatron-LM of core 0.19":
        move_common_into_shards(Path(found))
    weights = {"load": found, "load_optimizer": False}
    still = {"lr": 1e-12, "min_lr": 0.0, "lr_warmup_iters": 0}
    shallow = tiny_run(tmp_path / "2", corpus, model={"num_layers": 2}, checkpoint=weights, optimizer=still)
    assert run_here(shallow) == 0
    for name, drop in {"same": {"stages": [[0.5, 2], [1.0, 4]]}, "deeper": {"stages": [[0.5, 2], [1.0, 5]]}}.items():
        deep = {"num_layers": drop["stages"][-1][1]}
        config = staged_run(tmp_path / name, corpus, drop, model=deep, checkpoint=weights, optimizer=still)
        assert run_here(config) == 0
        assert losses(tmp_path / name)[:4] == pytest.approx(losses(tmp_path / "2")[:4], rel=1e-2)  # of other dropout
    whole = tiny_run(tmp_path / "4", corpus, checkpoint=weights)
    assert "num_layers is 4, but the checkpoint has 2 that had begun: its run was still growing" in str(run_here(whole))


def patched_checkpoint(run_dir: Path, folder: Path) -> str:
    """The run's newest checkpoint as a patched Megatron-LM would have left it: the drop state in another place."""
    import torch

    from megatron_sbld.checkpoint.files import MANIFEST, find_checkpoint, read_train_state

    source = find_checkpoint(run_dir).path
    stock = Path(shutil.copytree(source, folder / source.name))
    common = torch.load(stock / "common.pt", weights_only=False)
    common["opt_param_scheduler"]["sbld"] = {"drop": read_train_state(source)["drop"], "sensitivity": None}
    torch.save(common, stock / "common.pt")
    (stock / MANIFEST).unlink()
    return str(stock)


def test_what_layers_begin_as_can_be_changed_until_they_begin(tmp_path: Path, corpus: Path) -> None:
    whole = {
        init: trained(staged_run(tmp_path / "run", corpus, {"stage_init": init}), tmp_path / init)
        for init in ("random", "zero")
    }
    assert whole["random"] != whole["zero"]
    for first, then in (("random", "zero"), ("zero", "random")):
        config = staged_run(tmp_path / f"{first}_then_{then}", corpus, {"stage_init": first})
        assert run_here(change(config, training={"exit_after_iterations": 4})) == 75
        assert run_here(change(config, drop={"stage_init": then})) == 0
        assert losses(config.logging.run_dir) == whole[then]


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
