"""Reading run folders as killed and resumed trainers leave them, and the figures, tables and plots made from them."""

from __future__ import annotations

import csv
import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_sbld.config.flops import ideal_speedup, layer_share
from megatron_sbld.config.sections import DataConfig, TrainingConfig
from megatron_sbld.report.compare import compare
from megatron_sbld.report.groups import group_runs
from megatron_sbld.report.runs import read_run, read_runs
from megatron_sbld.report.summary import choose_baseline, summarise, tokens_per_s
from tests.report.report_helpers import MODEL, TOKENS, row, steady_run, valid_row, write_run

PHI = layer_share(MODEL, 384)  # 259 byte-level tokens, padded to a multiple of 128


def png_size(file):
    header = Path(file).read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


# Reading


def test_rows_come_back_by_iteration_with_training_and_validation_apart(tmp_path):
    folder = write_run(tmp_path / "run", [row(1), row(2), valid_row(2, 3.0), row(3)])
    run = read_run(Path(folder), "run")
    assert run.column("iteration").tolist() == [1, 2, 3]
    assert run.valid_column("valid_loss").tolist() == [3.0]
    assert run.config.model == MODEL
    assert run.policy == "none"


def test_a_torn_last_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", [row(1), row(2)], tail='{"iteration": 3, "lo')
    assert read_run(Path(folder), "run").column("iteration").tolist() == [1, 2]


def test_a_torn_line_anywhere_else_is_refused_by_its_number(tmp_path):
    folder = write_run(tmp_path / "run", [row(1)], tail='{"iteration": 2, "lo\n' + json.dumps(row(3)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_run(Path(folder), "run")


def test_updates_of_the_sensitivity_are_no_training_rows(tmp_path):
    update = {"iteration": 2, "gap": [0.1] * 4, "gap_stderr": [0.01] * 4, "sensitivity": [0.5] * 4, "block_layers": []}
    run = read_runs([write_run(tmp_path / "run", [row(1), row(2), update, valid_row(2, 4.0), row(3)])])[0]
    assert run.column("loss").tolist() == [5.0, 2.5, 5.0 / 3]
    assert run.valid_column("valid_loss").tolist() == [4.0]


def test_a_resumed_run_counts_the_last_row_of_an_iteration(tmp_path):
    rows = [row(1), row(2, loss=9.0), valid_row(2, 9.0), row(3, loss=9.0), row(2, loss=4.0), row(3, loss=3.0)]
    run = read_run(Path(write_run(tmp_path / "run", rows)), "run")
    assert run.column("iteration").tolist() == [1, 2, 3]
    assert run.column("loss").tolist() == [5.0, 4.0, 3.0]
    assert run.valid == []


def test_rows_beyond_the_point_of_resumption_are_void_until_repeated(tmp_path):
    rows = [row(1), row(2), row(3), row(4), valid_row(4, 9.0), row(2, loss=4.0)]
    run = read_run(Path(write_run(tmp_path / "run", rows)), "run")
    assert run.column("iteration").tolist() == [1, 2]
    assert run.valid == []


def test_elapsed_time_at_a_validation_is_the_sum_of_the_steps_before_it(tmp_path):
    run = read_run(Path(write_run(tmp_path / "run", [row(1, 0.5), row(2, 1.0), row(3, 2.0)])), "run")
    assert run.elapsed_s(np.array([0.0, 2.0, 3.0])).tolist() == [0.0, 1.5, 3.5]


def test_layer_values_of_another_depth_are_refused(tmp_path):
    run = read_run(Path(write_run(tmp_path / "run", [row(1), row(2, num_layers=3)])), "run")
    with pytest.raises(ValueError, match="iteration 2 has 3 keep_probs; a run of 4 layers"):
        run.layers_column("keep_probs")


def test_a_row_without_the_value_is_named(tmp_path):
    run = read_run(Path(write_run(tmp_path / "run", [row(1), {"iteration": 2}])), "run")
    with pytest.raises(ValueError, match="iteration 2 has no number loss"):
        run.column("loss")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "not a run folder: it has no config.yaml"),
        (lambda run: (run / "metrics.jsonl").unlink(), "not a run folder: it has no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "has no training row"),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "line 1 has no iteration"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\x00\n"), "line 1 is not JSON"),
        (lambda run: (run / "config.yaml").write_text("model: {"), "is not YAML"),
        (lambda run: (run / "config.yaml").write_text("just text"), "not the config of a run"),
        (lambda run: (run / "config.yaml").write_text("model: {depth: 4}"), "config of a run: .*depth"),
        (lambda run: (run / "config.yaml").write_text("extra: {a: 4}"), "config of a run: .*extra"),
    ],
)
def test_what_is_missing_or_malformed_in_a_run_folder_is_named(tmp_path, spoil, message):
    folder = Path(write_run(tmp_path / "run", [row(1)]))
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        read_run(folder, "run")


def test_a_missing_run_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"run folder .*nowhere does not exist"):
        read_runs([str(tmp_path / "nowhere")])


def test_a_run_given_twice_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", [row(1)])
    with pytest.raises(ValueError, match="given twice"):
        read_runs([folder, folder + "/."])


def test_runs_of_one_name_are_labelled_by_their_parents(tmp_path):
    folders = [write_run(tmp_path / parent / "pld", [row(1)]) for parent in ("a", "b")]
    assert [run.label for run in read_runs(folders)] == ["a/pld", "b/pld"]


# Figures


def test_throughput_ignores_the_warm_up_and_a_hiccup_in_a_block(tmp_path):
    times = [9.0] * 5 + [0.5] * 20
    times[10] = 30.0
    run = read_run(Path(write_run(tmp_path / "run", [row(i, t) for i, t in enumerate(times, start=1)])), "run")
    assert tokens_per_s(run) == pytest.approx(TOKENS / 0.5)


def test_throughput_counts_a_slower_part_of_the_run_that_a_median_would_miss(tmp_path):
    """recovery_fraction ends a run at full depth; its 20 iterations in 80 must show."""
    times = [9.0] * 5 + [0.5] * 60 + [1.0] * 20
    run = read_run(Path(write_run(tmp_path / "run", [row(i, t) for i, t in enumerate(times, start=1)])), "run")
    assert tokens_per_s(run) == pytest.approx(80 * TOKENS / (60 * 0.5 + 20 * 1.0))


def test_gains_are_relative_to_the_undropped_run(tmp_path):
    """Half of the layers run: the ideal gain follows from phi; 0.5 s against 0.4 s is a realised gain of 25 %."""
    folders = [
        steady_run(tmp_path / "pld", 0.4, 0.5, "pld", 2.1),
        steady_run(tmp_path / "full", 0.5, 1.0, "none", 2.0),
    ]
    groups = group_runs(read_runs(folders))
    comparison = summarise(groups, choose_baseline(groups))
    dropped, full = comparison.rows
    assert comparison.baseline == "full"
    assert dropped.ideal_gain == pytest.approx(1 / (1 - PHI * 0.5) - 1)
    assert dropped.realised_gain == pytest.approx(0.25)
    assert dropped.gain_ratio == pytest.approx(0.25 / (1 / (1 - PHI * 0.5) - 1))
    assert dropped.valid_loss_change == pytest.approx(0.1)
    assert dropped.train_time_s == pytest.approx(16.0)
    assert (full.ideal_gain, full.realised_gain, full.gain_ratio) == (0.0, 0.0, None)
    assert any(f"{PHI:.1%}" in note and "FLOPs" in note for note in comparison.notes)


def test_full_recomputation_raises_the_layers_share(tmp_path):
    training = TrainingConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    folders = [
        steady_run(tmp_path / "full", 0.5, 1.0, "none", 2.0, training=training),
        steady_run(tmp_path / "pld", 0.4, 0.5, "pld", 2.1, training=training),
    ]
    groups = group_runs(read_runs(folders))
    expected = ideal_speedup(layer_share(MODEL, 384, recompute=True), 0.5) - 1
    assert summarise(groups, groups[0]).rows[1].ideal_gain == pytest.approx(expected)


def test_against_a_dropping_baseline_the_ideal_gain_is_what_the_other_adds(tmp_path):
    folders = [
        steady_run(tmp_path / "pld", 0.4, 0.8, "pld", 2.1),
        steady_run(tmp_path / "sbld", 0.3, 0.5, "sbld", 2.0),
    ]
    groups = group_runs(read_runs(folders))
    comparison = summarise(groups, choose_baseline(groups))
    assert comparison.rows[1].ideal_gain == pytest.approx((1 - PHI * 0.2) / (1 - PHI * 0.5) - 1)
    assert any("drops layers itself (pld)" in note for note in comparison.notes)


def test_a_run_of_another_depth_gets_no_gains_and_a_note(tmp_path):
    deeper = dataclasses.replace(MODEL, num_layers=8)
    folders = [
        steady_run(tmp_path / "full", 0.5, 1.0, "none", 2.0),
        steady_run(tmp_path / "deep", 0.9, 0.5, "pld", 2.1, model=deeper),
    ]
    groups = group_runs(read_runs(folders))
    comparison = summarise(groups, groups[0])
    assert (comparison.rows[1].ideal_gain, comparison.rows[1].realised_gain) == (None, None)
    assert any("deep is another model" in note for note in comparison.notes)
    assert any("model.num_layers" in note for note in comparison.notes)


def test_without_its_tokenizer_a_run_has_no_ideal_gain_and_says_why(tmp_path):
    data = DataConfig(tokenizer="gone/tokenizer.json")
    folders = [
        steady_run(tmp_path / "full", 0.5, 1.0, "none", 2.0, data=data),
        steady_run(tmp_path / "pld", 0.4, 0.5, "pld", 2.1, data=data),
    ]
    groups = group_runs(read_runs(folders))
    comparison = summarise(groups, groups[0])
    assert comparison.rows[1].ideal_gain is None
    assert comparison.rows[1].realised_gain == pytest.approx(0.25)
    assert any("gone/tokenizer.json" in note for note in comparison.notes)


def test_runs_that_stand_at_different_iterations_are_noted(tmp_path):
    folders = [
        write_run(tmp_path / name, [row(i) for i in range(1, last + 1)], policy)
        for name, policy, last in (("a", "none", 20), ("b", "pld", 10))
    ]
    groups = group_runs(read_runs(folders))
    comparison = summarise(groups, groups[0])
    assert any("b stands at iteration 10, a at 20" in note for note in comparison.notes)


def test_a_run_that_was_resumed_with_other_settings_is_noted_by_name(tmp_path):
    changes = [
        {"iteration": 11, "field": "optimizer.lr", "before": 0.002, "after": 0.001},
        {"iteration": 11, "field": "data.data_cache_path", "before": None, "after": "cache"},
        {"iteration": 41, "field": "drop.theta", "before": 0.5, "after": 0.6},
    ]
    folders = [
        steady_run(tmp_path / "full", 0.5, 1.0, "none", 2.0),
        steady_run(tmp_path / "pld", 0.4, 0.5, "pld", 2.1),
    ]
    (tmp_path / "pld" / "changes.jsonl").write_text("".join(json.dumps(change) + "\n" for change in changes))
    groups = group_runs(read_runs(folders))
    found = [note for note in summarise(groups, groups[0]).notes if "resumed" in note]
    assert found == [
        "pld was resumed with other settings; the last ones are used: optimizer.lr was 0.002 up to iteration 10, "
        "then 0.001."
    ], "the cache changes nothing, and at iteration 41 the run is not yet"


# The command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of two runs, and what `compare` saved about them."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        steady_run(folder / "full", 0.5, 1.0, "none", 2.0),
        steady_run(folder / "pld", 0.4, 0.5, "pld", 2.1),
        steady_run(folder / "sbld", 0.4, 0.5, "sbld", 2.05),
    ]
    out = folder / "out" / "report"
    return runs, out, compare(runs, out=str(out))


def test_a_run_is_not_overwritten_through_a_link(saved, tmp_path):
    metrics = Path(saved[0][0]) / "metrics.jsonl"
    (tmp_path / "comparison.csv").symlink_to(metrics)
    before = metrics.read_bytes()
    with pytest.raises(ValueError, match="is an input"):
        compare(saved[0], out=str(tmp_path))
    assert metrics.read_bytes() == before


def test_csv_and_json_hold_the_unrounded_figures(saved):
    _, out, comparison = saved
    lines = list(csv.DictReader((out / "comparison.csv").open()))
    assert [line["label"] for line in lines] == ["full", "pld", "sbld"]
    assert float(lines[1]["realised_gain"]) == comparison.rows[1].realised_gain
    assert lines[0]["gain_ratio"] == ""
    content = json.loads((out / "comparison.json").read_text())
    assert content["rows"][1] == dataclasses.asdict(comparison.rows[1])
    assert content["runs"][1]["path"] == comparison.rows[1].path
    assert content["notes"] == comparison.notes


def test_markdown_has_a_line_for_every_run_and_the_footnotes(saved):
    _, out, comparison = saved
    text = (out / "comparison.md").read_text()
    assert "| pld | 2.1000 | +0.1000 | 7.65e+10 | -45.7% | - | 5,120 | 0.500 | 50.0% |" in text
    assert all(f"- {note}" in text for note in comparison.notes)


def test_plots_are_png_files_of_the_expected_size(saved):
    _, out, _ = saved
    assert png_size(out / "loss.png") == (1800, 720)
    assert png_size(out / "loss_compute.png") == (1200, 780)
    assert png_size(out / "keep_prob.png") == (1500, 1110)
    assert png_size(out / "tradeoff.png") == (1800, 780)
    assert min((out / name).stat().st_size for name in ("loss.png", "keep_prob.png", "tradeoff.png")) > 10_000


def test_the_console_shows_every_figure_even_when_it_is_narrow(saved, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    runs, _, _ = saved
    compare(runs)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("pld"))
    assert line.split()[:3] == ["pld", "2.1000", "+0.1000"]
    assert line.split()[6:9] == ["5,120", "0.500", "50.0%"]
    assert line.split()[-1] == "0m16s"


def test_what_compares_the_times_of_runs_can_be_left_out_and_its_weakness_is_told(saved, tmp_path, capsys):
    runs, out, comparison = saved
    assert any("ran at different times" in note for note in comparison.notes)
    assert all(word in (out / "comparison.md").read_text() for word in ("realised gain", "time to baseline loss"))
    capsys.readouterr()
    compare(runs, out=str(tmp_path / "out"), realised=False)
    for text in (capsys.readouterr().out, (tmp_path / "out" / "comparison.md").read_text()):
        assert not [word for word in ("realised", "real./", "ime to baseline", "interleaved") if word in text]
        assert "Ideal gain" in text


def test_a_path_is_printed_in_one_piece_on_a_narrow_console(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = tmp_path / "[bold]brackets and a very long name that no console of forty columns has room for"
    compare(saved[0], out=str(out))
    lines = capsys.readouterr().out.splitlines()
    assert {line for line in lines if line.startswith("saved ")} == {f"saved {file}" for file in out.iterdir()}


def test_a_baseline_outside_of_the_list_is_put_in_front(saved):
    runs, _, _ = saved
    comparison = compare(runs[1:], baseline=runs[0])
    assert [row.label for row in comparison.rows] == ["full", "pld", "sbld"]


def test_runs_without_validation_or_drops_are_compared_without_a_heat_map(tmp_path):
    folder = write_run(tmp_path / "run", [row(1), row(2)])
    comparison = compare([folder], out=str(tmp_path / "out"))
    assert comparison.rows[0].valid_loss is None
    assert (tmp_path / "out" / "loss.png").exists()
    assert not (tmp_path / "out" / "keep_prob.png").exists()
    assert not (tmp_path / "out" / "tradeoff.png").exists()


def test_a_diverged_run_is_still_plotted(tmp_path):
    folder = write_run(tmp_path / "run", [row(1), *(row(i, loss=float("nan")) for i in range(2, 21))])
    compare([folder], out=str(tmp_path / "out"))
    assert png_size(tmp_path / "out" / "loss.png") == (1800, 720)


def test_comparing_nothing_is_refused():
    with pytest.raises(ValueError, match="runs is empty"):
        compare([])
