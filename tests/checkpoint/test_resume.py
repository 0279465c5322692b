"""When a run goes on, each field of the config is in force, or is refused or told by name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from megatron_sbld.checkpoint import files
from megatron_sbld.checkpoint.files import Layout
from megatron_sbld.checkpoint.manager import check_compatible
from megatron_sbld.checkpoint.resume import (
    FIELDS_OF_THE_PROCESS,
    FIELDS_WITHOUT_EFFECT,
    PLANNED_FIELDS,
    SavedRun,
    check_resume,
    find_changes,
    run_length,
    warnings_of_decisions,
)
from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config
from megatron_sbld.data.prepare import PrepareConfig, prepare
from megatron_sbld.evaluation.model import read_trained_model
from megatron_sbld.method.config import DropConfig
from megatron_sbld.training.changes import read_changes
from megatron_sbld.training.processes import distributed_run
from megatron_sbld.training.run import microbatch_calculator
from tests.training.trainer_helpers import (
    HALF,
    NO_DROPOUT,
    change,
    full_depth_run,
    in_folder,
    losses,
    prepare_corpus,
    run_here,
    sbld,
    stop_and_resume,
    tiny_run,
    train_rows,
    trained,
)

DATA = [[1000, 77, 1.0]]
REFUSED_AS_ANOTHER_MODEL = {
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.ffn_hidden_size",
    "model.num_query_groups",
    "model.kv_channels",
    "model.max_position_embeddings",
    "model.position_embedding_type",
    "model.normalization",
    "model.activation_func",
    "model.swiglu",
    "model.add_bias_linear",
    "model.untie_embeddings_and_output_weights",
}
ROTARY = {"model.rotary_base", "model.rotary_percent"}
"""Part of the model where it has rotary positions, without effect where it has none."""


def fields() -> Iterator[tuple[str, Any]]:
    """Each field of the config and another value than its default."""
    for section in dataclasses.fields(Config):
        values = getattr(Config(), section.name)
        hints = get_type_hints(type(values))
        for field in dataclasses.fields(values):
            yield f"{section.name}.{field.name}", another(hints[field.name], getattr(values, field.name))


def another(hint: Any, value: Any) -> Any:
    """A value of the hint's type that is not `value`."""
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return ["other"]
    if isinstance(value, str):
        return f"{value}2"
    kind = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(kind) is Literal:
        return get_args(kind)[-1]
    return {int: 30, float: 0.5, str: "other", bool: True}.get(kind, [1])


def with_field(config: Config, path: str, value: Any) -> Config:
    section, name = path.split(".")
    return change(config, **{section: {name: value}})


def saved_run(config: Config, iteration: int = 4, *, data: Any = DATA, replicas: int = 1, **state: Any) -> SavedRun:
    layout = Layout(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        num_virtual_stages_per_pipeline_rank=1,
        context_parallel_size=1,
        data_parallel_size=replicas,
        optimizer_format="not_distributed",
        optimizer_buckets=[],
        precision="fp32",
    )
    counts = {"consumed_samples": 32, "consumed_layer_tokens": 32 * 2048 * 12}
    train_state = {"config": dataclasses.asdict(config), "train_data": data, **counts, **state}
    return SavedRun(iteration, layout, files.encode_train_state(train_state))


UPDATE = {"dropped_update": "apply"}  # null is no change from what it stands for, and stages change that
SAVED = change(Config(), model={"max_position_embeddings": 4096}, training={"train_iters": 10}, drop={**HALF, **UPDATE})


@pytest.mark.parametrize(("path", "value"), list(fields()), ids=[path for path, _ in fields()])
def test_every_field_takes_effect_and_is_told_or_is_refused_by_name(path: str, value: Any) -> None:
    config = with_field(SAVED, path, value)
    saved = saved_run(SAVED)
    if path in REFUSED_AS_ANOTHER_MODEL:
        with pytest.raises(ValueError, match=f"{path} is "):
            check_compatible(saved.config, config)
        return
    check_compatible(saved.config, config)
    if path in PLANNED_FIELDS:
        with pytest.raises(ValueError, match=f"{path} is .* checkpoint.replan true"):
            check_resume(saved, config, DATA)
        config = change(config, checkpoint={"replan": True})
    texts = [found.text for found in check_resume(saved, config, DATA)]
    if {path, path.split(".")[0]} & set(FIELDS_OF_THE_PROCESS):
        assert texts == []
        return
    (text,) = texts
    assert text.startswith(f"{path} is ")
    begun = {"drop.stages"}  # every layer of SAVED has
    assert ("this has no effect" in text) == (path in FIELDS_WITHOUT_EFFECT.keys() | begun)


@pytest.mark.parametrize("path", sorted(ROTARY))
def test_rotary_positions_are_part_of_the_model(path: str) -> None:
    rope = change(SAVED, model={"position_embedding_type": "rope"})
    with pytest.raises(ValueError, match=f"{path} is "):
        check_compatible(saved_run(rope).config, with_field(rope, path, 0.25))


def test_an_unchanged_config_has_nothing_to_tell() -> None:
    assert check_resume(saved_run(SAVED), SAVED, DATA) == []
    full = change(SAVED, drop={"policy": "none"})
    assert find_changes(saved_run(full).config, change(full, drop={"theta": 0.4})) == [], "nothing of it is looked at"


def test_fields_that_an_older_checkpoint_does_not_know_are_not_compared() -> None:
    saved = saved_run(SAVED, data=None)
    del saved.train_state["config"]["optimizer"]["lr"]
    del saved.train_state["config"]["checkpoint"]
    assert check_resume(saved, change(SAVED, optimizer={"lr": 1.0}), DATA) == []


def test_other_training_data_are_refused_and_moved_ones_are_not() -> None:
    saved = saved_run(SAVED)
    moved = change(SAVED, data={"train_data_path": ["moved_train"]})
    assert [found.field for found in check_resume(saved, moved, DATA)] == ["data.train_data_path"]
    with pytest.raises(ValueError, match=r"data.train_data_path holds other data .* checkpoint.replan"):
        check_resume(saved, moved, [[1000, 78, 1.0]])
    replanned = change(SAVED, checkpoint={"replan": True})
    (found,) = check_resume(saved, replanned, [[1000, 78, 1.0]])
    assert found.text == "data.train_data_path holds other data than when the checkpoint was saved"
    assert found.field in PLANNED_FIELDS, "so that it is told that the rest is planned anew"


@pytest.mark.parametrize(
    ("training", "length"),
    [({"train_iters": 3}, 3), ({"train_iters": None, "train_samples": 24}, 3)],
    ids=["iterations", "samples"],
)
def test_a_length_below_what_is_done_is_refused_whatever_replan_says(training: dict[str, Any], length: int) -> None:
    config = change(SAVED, training=training, checkpoint={"replan": True})
    with pytest.raises(ValueError, match=f"makes a run of {length} iterations, but the checkpoint has done 4; must be"):
        check_resume(saved_run(SAVED), config, DATA)


def test_another_batch_size_holds_from_where_it_was_planned() -> None:
    saved, larger = saved_run(SAVED), change(SAVED, training={"global_batch_size": 16})
    length = run_length(saved, larger)
    assert [length.samples_after(done) for done in (0, 2, 4, 5, 10)] == [0, 16, 32, 48, 128]
    assert length.train_samples == 128
    later = saved_run(larger, 6, planned_from=[4, 32], consumed_samples=64)
    assert run_length(later, larger) == length, "once planned, it stays"
    smaller = run_length(saved, change(SAVED, training={"global_batch_size": 4}))
    assert (smaller.train_samples, smaller.samples_to_read) == (56, 56)
    by_samples = change(SAVED, training={"train_iters": None, "train_samples": 80})
    half = change(by_samples, training={"global_batch_size": 4})
    assert run_length(saved_run(by_samples), half).train_iters == 4 + 48 // 4


@pytest.mark.parametrize("training", [{"micro_batch_size": 2}, {"train_iters": 12}, {"seed": 5}], ids=str)
def test_a_ramp_stays_counted_as_it_was_read_unless_the_batch_size_is_planned_anew(training: dict[str, Any]) -> None:
    ramped = change(SAVED, training={"global_batch_size": 24, "rampup_batch_size": [8, 8, 64]})
    length = run_length(saved_run(ramped, 7, consumed_samples=88), change(ramped, training=training))
    assert [length.samples_after(done) for done in range(8)] == [0, 8, 16, 24, 32, 48, 64, 88]


def test_decisions_that_meet_other_samples_are_told() -> None:
    by_microbatch = change(SAVED, drop={"decision_scope": "microbatch"})
    (line,) = warnings_of_decisions(saved_run(by_microbatch), by_microbatch, 2)
    assert "one holds 2 samples of all replicas together now, 1 when saved" in line
    assert warnings_of_decisions(saved_run(by_microbatch), by_microbatch, 1) == []
    assert warnings_of_decisions(saved_run(SAVED), SAVED, 2) == [], "one draw for all microbatches"
    assert warnings_of_decisions(saved_run(by_microbatch), change(by_microbatch, drop={"policy": "none"}), 2) == []
    larger = change(by_microbatch, training={"micro_batch_size": 4})
    assert len(warnings_of_decisions(saved_run(by_microbatch, replicas=4), larger, 1)) == 0, "the same samples"
    distinct = change(SAVED, drop={"replicas": "distinct", "sampler": "balanced"})
    (line,) = warnings_of_decisions(saved_run(distinct), distinct, 2)
    assert "each of the 2 replicas has its own decisions; there were 1 when saved" in line


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("ramp", [None, [4, 4, 32]])
def test_the_iterations_of_a_run_are_counted_in_its_samples(ramp: list[int] | None, start: int) -> None:
    training = change(SAVED, training={"global_batch_size": 16, "rampup_batch_size": ramp, "train_iters": 20}).training
    length = RunLength(training)
    sizes = [4, 4, 4, 8, 8, 12] if ramp else []
    expected = [sum(sizes[:done]) + 16 * max(0, done - len(sizes)) for done in range(21)]
    assert [length.samples_after(done) for done in range(21)] == expected
    by_samples = dataclasses.replace(training, train_iters=None, train_samples=length.train_samples)
    assert RunLength(by_samples).train_iters == 20
    later = RunLength(training, start, expected[start])
    assert [later.samples_after(done) for done in range(start, 21)] == expected[start:]


STAGED = change(SAVED, model={"num_layers": 4}, drop={"policy": "staged", "stages": [[0.5, 1], [1.0, 4]]})


@pytest.mark.parametrize(
    ("begun", "drop", "reason"),
    [
        ([1], {"stages": [[0.7, 1], [1.0, 4]]}, None),
        ([1], {"stage_init": "zero"}, None),
        ([1], {"balance_stages": 2}, "the stages keep the checkpoint's layers"),
        ([1], {"balance_stages": 2, "stage_layers": "last"}, None),
        ([1, 2, 3, 4], {"stages": [[0.7, 1], [1.0, 4]]}, "every layer had begun"),
        ([1, 2, 3, 4], {"stage_init": "copy"}, "every layer had begun"),
        (None, {"stages": [[0.7, 1], [1.0, 4]]}, "every layer had begun"),
        (None, {"stages": None, "policy": "layerdrop"}, "every layer had begun"),
    ],
)
def test_stages_are_told_to_have_an_effect_where_layers_are_left_to_begin(
    begun: list[int] | None, drop: dict[str, Any], reason: str | None
) -> None:
    growth = None if begun is None else {"begun": begun}
    saved = saved_run(STAGED, drop={"growth": growth})
    found = {change.field.partition(".")[2]: change for change in check_resume(saved, change(STAGED, drop=drop), DATA)}
    assert found.keys() == drop.keys()
    found.pop("policy", None)
    assert {change.without_effect for change in found.values()} == {reason}
    assert not reason or all(reason in change.text for change in found.values())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Config:
    return tiny_run(tmp_path / "run", corpus, drop=sbld(tmp_path))


OPTIMIZER_CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 1e-5, "min_lr": 1e-5},
    "min_lr": {"min_lr": 5e-3},
    "lr_decay_style": {"lr_decay_style": "linear"},
    "lr_decay_iters": {"lr_decay_iters": 6},
    "lr_warmup_iters": {"lr_warmup_iters": 7},
    "lr_warmup_init": {"lr_warmup_init": 5e-3, "lr_warmup_iters": 7},
    "lr_wsd_decay_iters": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 6},
    "lr_wsd_decay_style": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 6, "lr_wsd_decay_style": "linear"},
    "weight_decay": {"weight_decay": 0.5},
    "start_weight_decay": {"start_weight_decay": 0.2, "end_weight_decay": 0.4, "weight_decay_incr_style": "linear"},
    "end_weight_decay": {"start_weight_decay": 0.2, "end_weight_decay": 0.8, "weight_decay_incr_style": "linear"},
    "weight_decay_incr_style": {
        "start_weight_decay": 0.2,
        "end_weight_decay": 0.8,
        "weight_decay_incr_style": "cosine",
    },
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_eps": {"adam_eps": 1e-2},
    "clip_grad": {"clip_grad": 0.25},
    "log_num_zeros_in_grad": {"log_num_zeros_in_grad": True},
}
COUNTED_OTHERWISE = {"lr_decay_samples", "lr_warmup_samples", "lr_schedule_by"}
"""The last: tests/training/test_layer_tokens.py."""


def test_the_optimizer_of_a_resumed_run_is_the_configs(config: Config, tmp_path: Path) -> None:
    """Oracle: an optimizer built from the changed config, at the same sample."""
    every = {field.name for field in dataclasses.fields(config.optimizer)}
    assert set(OPTIMIZER_CHANGES) == every - COUNTED_OTHERWISE, "a field was added: say what it does on resume"
    for use_distributed in (False, True):
        folder = tmp_path / f"distributed {use_distributed}"
        first = change(in_folder(config, folder), parallel={"use_distributed_optimizer": use_distributed})
        assert run_here(stop_and_resume(first, 3)[0]) == 75
        seen = [configured_optimizer(first)]
        names = ("lr", "weight_decay", "adam_beta1") if use_distributed else OPTIMIZER_CHANGES
        for name in names:
            optimizer = OPTIMIZER_CHANGES[name]
            changed = change(first, optimizer=optimizer)
            resumed, fresh = configured_optimizer(changed), configured_optimizer(in_folder(changed, tmp_path / "new"))
            assert resumed == fresh, name
            assert resumed not in seen, f"{name} changes nothing"
            seen.append(resumed)


def configured_optimizer(config: Config) -> list[Any]:
    """What decides an update at the 24th sample, resumed or not: groups, scheduler and the optimizer's config."""
    with distributed_run(config), microbatch_calculator(config):
        run = full_depth_run(config)
        run.scheduler.step(24 - run.scheduler.num_steps)
        groups = [
            {name: value for name, value in group.items() if name not in ("params", "step")}
            for group in run.optimizer.param_groups
        ]
        scheduler = {name: value for name, value in vars(run.scheduler).items() if name != "optimizer"}
        limits = [run.optimizer.config.clip_grad, run.optimizer.config.log_num_zeros_in_grad]
        run.data.close()
        return [groups, scheduler, limits]


def test_a_run_that_goes_on_with_another_rate_has_it(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    first, second = stop_and_resume(change(config, optimizer={"lr_decay_style": "constant", "lr_warmup_iters": 0}), 3)
    assert run_here(first) == 75
    assert run_here(change(second, optimizer={"lr": 1e-5, "min_lr": 1e-5})) == 0
    rates = [row["lr"] for row in train_rows(config.logging.run_dir)]
    assert rates == [1e-2] * 3 + [1e-5] * 5
    assert "optimizer.lr is 1e-05, the checkpoint was saved with 0.01" in caplog.text
    kept = {
        change.field: (change.iteration, change.before, change.after)
        for change in read_changes(Path(config.logging.run_dir))
    }
    assert kept["optimizer.lr"] == (4, 1e-2, 1e-5)


def test_loading_the_whole_state_of_another_run_is_no_other(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_here(stop_and_resume(config, 3)[0]) == 75
    load = {"load": config.logging.run_dir, "load_optimizer": True, "save_at_end": True}
    other = change(in_folder(config, tmp_path / "other"), checkpoint=load, optimizer={"lr": 2e-2})
    assert "training.seed is 5, the checkpoint was saved with 1234" in str(
        run_here(change(other, training={"seed": 5}))
    )
    assert run_here(other) == 0
    assert "optimizer.lr is 0.02" in caplog.text
    assert "is not loaded" not in caplog.text
    caplog.set_level(logging.INFO)
    assert run_here(change(other, checkpoint={"load_optimizer": False})) == 0, "it is complete"
    own = tmp_path / "other" / "checkpoints"
    assert f"{config.logging.run_dir!r} is not loaded: the run continues from its own newest, {own}" in caplog.text
    weights = change(other, checkpoint={"load_optimizer": False}, training={"seed": 5, "train_iters": 3})
    assert run_here(in_folder(weights, tmp_path / "weights")) == 0, "a run of its own"


@pytest.mark.parametrize("training", [{"seed": 5}, {"train_iters": 12}, {"global_batch_size": 16}])
def test_what_plans_the_run_is_refused_on_resume_until_replan_is_asked_for(
    config: Config, training: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = stop_and_resume(config, 3)
    assert run_here(first) == 75
    changed = change(second, training=training)
    (field,) = training
    assert f"training.{field} is {training[field]}, the checkpoint was saved with" in str(run_here(changed))
    replanned = change(changed, checkpoint={"replan": True})
    assert run_here(change(replanned, training={"exit_after_iterations": 2})) == 75
    assert f"training.{field} is {training[field]}" in caplog.text
    assert f"planned anew from iteration 4 on, for a run of {changed.training.train_iters}" in caplog.text
    caplog.clear()
    assert run_here(changed) == 0, "once it is planned anew, the run goes on as any other"
    assert "is of another" not in caplog.text
    assert f"training.{field}" not in caplog.text
    rows = train_rows(config.logging.run_dir)
    assert len(rows) == changed.training.train_iters
    assert rows[-1]["lr"] == pytest.approx(config.optimizer.min_lr), "the decay ends with the run"


def test_other_data_at_the_same_path_are_told(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text.txt").write_text("One text.\n" * 500)
    prepare(
        PrepareConfig(inputs=[str(tmp_path / "text.txt")], output=str(tmp_path / "own"), valid_fraction=0, workers=1)
    )
    data = {"train_data_path": [str(tmp_path / "own_train")], "valid_data_path": []}
    first, second = stop_and_resume(change(config, data=data), 3)
    assert run_here(first) == 75
    (tmp_path / "text.txt").write_text("Another one.\n" * 500)
    inputs = [str(tmp_path / "text.txt")]
    prepare(PrepareConfig(inputs=inputs, output=str(tmp_path / "own"), valid_fraction=0, workers=1, overwrite=True))
    assert "data.train_data_path holds other data" in str(run_here(second))
    assert run_here(change(second, checkpoint={"replan": True})) == 0
    assert "data.train_data_path holds other data than when the checkpoint was saved" in caplog.text
    assert "planned anew from iteration 4 on" in caplog.text


def test_tokens_of_another_length_count_as_they_were_read(config: Config) -> None:
    first, second = stop_and_resume(change(config, model={"max_position_embeddings": 64}), 3)
    assert run_here(first) == 75
    longer = change(second, model={"seq_length": 64}, checkpoint={"replan": True})
    longer = change(longer, training={"exit_after_iterations": 2})
    assert run_here(longer) == 75
    assert run_here(longer) == 75
    tokens = [row["consumed_tokens"] for row in train_rows(config.logging.run_dir)]
    assert tokens == [256, 512, 768, 1280, 1792, 2304, 2816]
    assert read_trained_model(Path(config.logging.run_dir)).consumed_tokens == 2816


def test_a_replanned_run_draws_its_drops_for_the_new_length(config: Config) -> None:
    config = change(config, model=NO_DROPOUT, drop={**HALF, "recovery_fraction": 0.5, "sensitivity": None})
    config = change(config, drop={"allow_layers": None, "peak_iteration": None, "peak_theta": None})
    first, second = stop_and_resume(config, 3)
    assert run_here(first) == 75
    assert run_here(change(second, training={"train_iters": 16}, checkpoint={"replan": True})) == 0
    assert [row["mean_keep_prob"] for row in train_rows(config.logging.run_dir)] == [0.5] * 8 + [1.0] * 8


def test_the_rate_follows_the_ramp_of_the_batch_size(config: Config) -> None:
    ramp = {"global_batch_size": 16, "rampup_batch_size": [4, 4, 32], "train_iters": 20}
    rate = {
        "lr": 1e-3,
        "min_lr": 1e-4,
        "lr_decay_style": "WSD",
        "lr_wsd_decay_iters": 5,
        "lr_wsd_decay_style": "linear",
    }
    config = change(config, training=ramp, optimizer={**rate, "lr_warmup_iters": 4})
    assert run_here(config) == 0
    rates = [row["lr"] for row in train_rows(config.logging.run_dir)]
    assert rates[3] == pytest.approx(1e-3), "the warm-up ends with its last iteration"
    assert rates[4:15] == [1e-3] * 11
    assert rates[15] < 1e-3
    assert rates[-1] == pytest.approx(1e-4)


def test_a_constant_loss_scale_and_a_dynamic_one_replace_each_other(config: Config) -> None:
    fp16 = change(config, training={"precision": "fp16", "loss_scale": 64.0, "initial_loss_scale": 2.0**10})
    first, _ = stop_and_resume(fp16, 3)
    assert run_here(first) == 75
    assert run_here(change(first, training={"loss_scale": None})) == 75
    assert run_here(fp16) == 0
    scales = [row["loss_scale"] for row in train_rows(config.logging.run_dir)]
    assert scales == [64.0] * 3 + [2.0**10] * 3 + [64.0] * 2


def test_the_balanced_samplers_stages_are_the_configs_where_it_names_them(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config = change(config, drop={"sampler": "balanced", "balance_stages": 2})
    first, _ = stop_and_resume(config, 3)
    assert run_here(first) == 75
    for stages, expected in ((4, 4), (None, 2)):
        changed = change(config, drop={"balance_stages": stages})
        with distributed_run(changed), microbatch_calculator(changed):
            run = full_depth_run(changed)
            run.data.close()
            assert run.controller.state_dict()["stages"] in (expected, [[1, 2], [3, 4]])
    assert "the balanced sampler keeps the checkpoint's stages" in caplog.text


def test_an_unchanged_run_says_nothing_and_goes_on_as_it_was(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = trained(config, tmp_path / "whole")
    caplog.set_level(logging.WARNING)
    for part in stop_and_resume(config, 3):
        run_here(part)
    assert losses(config.logging.run_dir) == expected
    assert "the checkpoint was saved with" not in caplog.text
    assert read_changes(Path(config.logging.run_dir)) == []


def test_dropped_update_null_is_no_change_from_what_it_stands_for() -> None:
    saved = {"drop": {"policy": "pld", "dropped_update": "apply"}}
    assert find_changes(saved, Config(drop=DropConfig(policy="pld"))) == []
    staged = DropConfig(policy="staged", stages=[[0.5, 1], [1.0, 4]])
    assert find_changes({"drop": {"policy": "staged", "dropped_update": "freeze"}}, Config(drop=staged)) == []
    frozen = find_changes(saved, Config(drop=DropConfig(policy="pld", dropped_update="freeze")))
    assert [change.text for change in frozen] == [
        "drop.dropped_update is 'freeze', the checkpoint was saved with 'apply'"
    ]
