"""What a run writes down: every field of a row, TensorBoard, and progress that a user can follow."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sbld.config.flops import layer_share, padded_vocab_size
from megatron_sbld.config.sections import Config, LoggingConfig
from megatron_sbld.forecast.drops import forecast, forecast_text
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.decisions import draw_plan
from megatron_sbld.training.metrics import MetricsWriter, check_logging, drop_rows_from, set_aside
from tests.training.trainer_helpers import (
    FULL_DEPTH,
    HALF,
    ITERATIONS,
    LAYERS,
    SEQUENCE,
    change,
    in_folder,
    losses,
    prepare_corpus,
    rows,
    run_here,
    sbld,
    stop_and_resume,
    tiny_run,
    train_rows,
    valid_losses,
)

HIDDEN = 32  # of the tiny run
PARAMETERS_OF_A_LAYER = 12 * HIDDEN**2 + 13 * HIDDEN
ROW = {
    "loss": 5.5,
    "tokens_per_s": 12345.6,
    "kept_fraction": 0.5,
    "keep_probs": [1.0, 0.25],
    "kept": [1.0, 0.0],
    "grad_norm": None,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str]:
    """A finished run with everything switched on, and what it printed."""
    folder = tmp_path_factory.mktemp("metrics")
    config = tiny_run(
        folder / "run",
        (corpus := prepare_corpus(folder)),
        drop=sbld(folder),
        data={"valid_data_path": [f"{corpus}_valid"]},
        training={"eval_interval": 4},
        optimizer={"log_num_zeros_in_grad": True},
        logging={"tensorboard": True, "progress": "lines", "log_interval": 3},
    )
    with pytest.MonkeyPatch.context() as patch, (folder / "stderr").open("w") as stream:
        patch.setattr(sys, "stderr", stream)
        assert run_here(config) == 0
    return config, (folder / "stderr").read_text()


def test_a_row_has_every_field_of_the_design(run: tuple[Config, str]) -> None:
    config, _ = run
    found = train_rows(config.logging.run_dir)
    assert len(found) == ITERATIONS
    policy = build_policy(config.drop, LAYERS, ITERATIONS)
    for t, row in enumerate(found, start=1):
        keep_probs = policy.keep_probs(t)
        plan = draw_plan(keep_probs, seed=1234, iteration=t, num_microbatches=8)
        assert row["theta"] == policy.theta(t)
        assert row["mean_keep_prob"] == keep_probs.mean()
        assert row["keep_probs"] == pytest.approx(keep_probs, abs=1e-6)
        assert row["kept"] == plan.mean(axis=0).tolist()
        assert row["kept_fraction"] == plan.mean()
        assert (row["global_batch_size"], row["consumed_samples"]) == (8, 8 * t)
        assert row["consumed_tokens"] == 8 * t * SEQUENCE
        assert row["tokens_per_s"] == pytest.approx(8 * SEQUENCE / row["step_time_s"])
        assert row["grad_norm"] > 0
        # All gradients of a dropped layer are zero; of the others one or another may be by chance.
        assert row["num_zeros"] // PARAMETERS_OF_A_LAYER == round(LAYERS * (1 - row["kept_fraction"]))
        assert row["update_skipped"] is False
    lrs = [row["lr"] for row in found]
    assert lrs[:2] == pytest.approx([0.005, 0.01])
    assert np.all(np.diff(lrs[1:]) < 0)
    assert lrs[-1] == pytest.approx(1e-3)


def test_a_validation_row_says_how_far_the_run_was(run: tuple[Config, str]) -> None:
    config, _ = run
    found = [row for row in rows(config.logging.run_dir) if "valid_loss" in row]
    assert [row["iteration"] for row in found] == [4, 8]
    steps = [row["step_time_s"] for row in train_rows(config.logging.run_dir)]
    for row in found:
        assert row["consumed_tokens"] == 8 * row["iteration"] * SEQUENCE
        assert row["train_time_s"] == pytest.approx(sum(steps[: row["iteration"]]))


def test_tensorboard_has_the_scalars_and_each_layers_keep_probability(run: tuple[Config, str]) -> None:
    config, _ = run
    events = EventAccumulator(str(Path(config.logging.run_dir) / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss", "lr", "grad_norm", "theta", "mean_keep_prob", "valid_loss", "tokens_per_s"} <= tags
    assert "executed_flops" in tags
    assert {f"keep_prob/layer_{number:02d}" for number in range(1, LAYERS + 1)} <= tags
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx({row["iteration"]: row["loss"] for row in train_rows(config.logging.run_dir)})


def test_progress_lines_tell_loss_speed_kept_layers_and_time_left(run: tuple[Config, str]) -> None:
    config, printed = run
    row = train_rows(config.logging.run_dir)[2]
    lines = [line for line in printed.splitlines() if line.startswith("iteration") and "left" in line]
    assert [line.split()[1] for line in lines] == ["3/8", "6/8", "8/8"]
    assert f"loss {row['loss']:.4f}" in lines[0]
    assert f"{row['tokens_per_s']:,.0f} tokens/s" in lines[0]
    assert f"kept {row['kept_fraction']:.0%} of layers" in lines[0]
    assert lines[-1].endswith("left 0:00:00")
    assert "iteration 4: validation loss" in printed
    assert "complete: 8 iterations" in printed
    assert f"`megatron-sbld compare {config.logging.run_dir}` shows them" in printed


def test_the_forecast_is_printed_before_the_first_iteration(run: tuple[Config, str]) -> None:
    config, printed = run
    policy = build_policy(config.drop, LAYERS, ITERATIONS)
    phi = layer_share(config.model, padded_vocab_size(259, config))
    table = forecast_text(forecast(policy, ITERATIONS, phi))
    assert "time saved" in table
    assert table in printed[: printed.index("iteration 3/8")]


@pytest.mark.parametrize(
    ("drop", "progress", "expected"), [(HALF, "lines", True), (FULL_DEPTH, "lines", False), (HALF, "none", False)]
)
def test_there_is_no_forecast_without_drops_or_progress(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], drop: dict[str, Any], progress: str, expected: bool
) -> None:
    corpus = prepare_corpus(tmp_path)
    capfd.readouterr()
    config = tiny_run(tmp_path / "run", corpus, drop=drop, training={"train_iters": 3}, logging={"progress": progress})
    assert run_here(config) == 0
    assert ("mean keep_prob" in "".join(capfd.readouterr())) is expected


def writer(folder: Path, first_iteration: int = 1, **logging: Any) -> MetricsWriter:
    config = LoggingConfig(run_dir=str(folder), **{"tensorboard": False, "progress": "none", **logging})
    return MetricsWriter(config, first_iteration, 4, {})


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    open_writer = writer(tmp_path)
    open_writer.train_row({"iteration": 1, **ROW})
    assert rows(tmp_path) == [{"iteration": 1, **ROW}]
    open_writer.close()


def test_a_resumed_run_drops_what_it_repeats_and_a_torn_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"iteration": t, "loss": 1.0} for t in (1, 2, 3)] + [{"iteration": 2, "valid_loss": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 4, "l')
    writer(tmp_path, first_iteration=3).close()
    assert rows(tmp_path) == [lines[0], lines[1], lines[3]]
    assert "left out an incomplete line of 19 bytes" in caplog.text


def test_rows_that_are_on_other_storage_stay_there(tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    there, path = tmp_path / "storage" / "rows", tmp_path / "metrics.jsonl"
    there.write_text('{"iteration": 1}\n{"iteration": 2}\n')
    path.symlink_to(there)
    drop_rows_from(path, 2)
    assert path.is_symlink()
    assert there.read_text() == '{"iteration": 1}\n'


def test_rows_of_a_run_that_starts_anew_are_kept_beside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    for text in ("", "first", "second"):
        path.write_text(text)
        set_aside(path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir() if file != path} == {
        "metrics.jsonl.1": "first",
        "metrics.jsonl.2": "second",
    }
    assert path.read_text() == ""
    assert f"the rows in {path} are kept as {path}.2" in caplog.text


def test_dropping_rows_of_a_run_that_has_none_is_nothing(tmp_path: Path) -> None:
    drop_rows_from(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"[1, 2]\n", b"7\n", b'{"loss": 1.0}\n', b"\x00\x00\x00\n", b"\xff\xfe\n"])
def test_damaged_lines_are_left_out(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n' + damage + b'{"iteration": 2}\n')
    drop_rows_from(path, 3)
    assert rows(tmp_path) == [{"iteration": 1}, {"iteration": 2}]


def test_the_bar_of_a_terminal_tells_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_writer = writer(tmp_path, progress="bar")
    open_writer.train_row({"iteration": 1, **ROW})
    open_writer.note("a note")
    open_writer.train_row({"iteration": 4, **ROW})
    open_writer.close()
    printed = capsys.readouterr().err
    assert "4/4" in printed
    assert "a note" in printed


def test_wandb_that_is_not_installed_is_refused_on_every_rank_before_the_start(
    monkeypatch: pytest.MonkeyPatch, run: tuple[Config, str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"logging.wandb_project = 'mine': needs wandb \(pip install"):
        check_logging(LoggingConfig(wandb_project="mine"))
    check_logging(LoggingConfig())
    config, _ = run
    monkeypatch.setattr("megatron_sbld.training.loop.distributed_run", None)  # it must not come so far
    assert "needs wandb" in str(run_here(change(config, logging={"wandb_project": "mine"})))


def wandb_records(run_dir: Path) -> list[Any]:
    """What W&B wrote for a later upload, in order: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        data, position, record = file.read_bytes(), 7, b""
        while position < len(data):
            left = 2**15 - position % 2**15  # of the block; headers are never split
            if left < 7:
                position += left
                continue
            length, kind = struct.unpack("<HB", data[position + 4 : position + 7])  # after a checksum
            record += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or the last part
                records.append(wandb_internal_pb2.Record.FromString(record))
                record = b""
    return records


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_gets_every_row_in_one_run_that_a_resumed_process_continues(
    run: tuple[Config, str], tmp_path: Path
) -> None:
    logging = {"wandb_project": "mine", "wandb_name": "first", "tensorboard": False}
    config = change(in_folder(run[0], tmp_path / "run"), logging=logging)
    for part in stop_and_resume(config, 3):
        run_here(part)
    records = wandb_records(tmp_path / "run")
    started = [record.run for record in records if record.HasField("run")]
    assert {(started_run.project, started_run.display_name) for started_run in started} == {("mine", "first")}
    assert {started_run.run_id for started_run in started} == {(tmp_path / "run" / "wandb_id").read_text()}
    logged: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.HasField("history"):
            items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            row = {name: json.loads(value) for name, value in items.items()}
            logged.setdefault(row["_step"], {}).update(row)
    assert [logged[step]["loss"] for step in sorted(logged)] == losses(tmp_path / "run")
    assert logged[4]["valid_loss"] == valid_losses(tmp_path / "run")[4]
    assert logged[1]["keep_prob/layer_01"] == train_rows(tmp_path / "run")[0]["keep_probs"][0]
    assert "kept" not in logged[1]


@pytest.mark.usefixtures("wandb_offline")
def test_a_run_from_the_beginning_is_another_one_for_wandb(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        writer(tmp_path, wandb_project="mine").close()
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] != ids[1]
