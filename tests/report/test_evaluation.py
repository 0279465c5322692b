"""compare shows evaluations beside loss, time and gain, as means over seeds; the table and the plot over iterations."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import struct

import pytest
from matplotlib.figure import Figure

from megatron_sbld.config.sections import TrainingConfig
from megatron_sbld.evaluation.lambada import LambadaResult
from megatron_sbld.evaluation.perplexity import PerplexityResult
from megatron_sbld.evaluation.results import Data, evaluation, save_evaluations
from megatron_sbld.report.compare import compare
from megatron_sbld.report.evaluation import Curve, find_series, iteration_table, points
from megatron_sbld.report.evaluation_plots import plot_evaluations
from tests.report.report_helpers import steady_run

LAMBADA = Data("lambada_development_plain_text.txt", "ab" * 32)
WIKI = Data("wiki.valid.raw", "cd" * 32)
LAST = 40  # iteration of a steady_run


def lambada_row(accuracy, iteration=LAST, perplexity=20.0, train_time_s=None, consumed_tokens=None, **fields):
    return evaluation(
        iteration=iteration,
        result=LambadaResult(accuracy, 0.007, perplexity, 0.5, 4869, 0, 38),
        train_time_s=train_time_s,
        consumed_tokens=consumed_tokens,
        **{"task": "lambada", "precision": "bf16", "data": LAMBADA, "options": {"detokenise": True}} | fields,
    )


def wiki_row(word_perplexity, iteration=LAST, num_bytes=40, **fields):
    bits = None if word_perplexity is None else 1.25
    result = PerplexityResult(3.0, 0.01, 20.0, 0.2, word_perplexity, 0.4, bits, 0.01, 9, 7, num_bytes, 60, 9)
    return evaluation(
        iteration=iteration,
        result=result,
        train_time_s=None,
        consumed_tokens=None,
        **{"task": "perplexity", "precision": "bf16", "data": WIKI, "options": {"format": "wikitext"}} | fields,
    )


def evaluated_run(folder, rows, policy="none", seed=1, step_time_s=0.5):
    path = steady_run(
        folder, step_time_s, 1.0 if policy == "none" else 0.5, policy, 2.0, training=TrainingConfig(seed=seed)
    )
    if rows:
        save_evaluations(rows, folder / "evaluations.jsonl")
    return path


@pytest.fixture
def single(tmp_path):
    return [
        evaluated_run(tmp_path / "full", [lambada_row(0.4809), wiki_row(30.0)]),
        evaluated_run(tmp_path / "sbld", [lambada_row(0.5075, perplexity=18.5)], "sbld", step_time_s=0.45),
    ]


def cells(file, label):
    lines = [line.strip("| ").split(" | ") for line in file.read_text().splitlines() if line.startswith("|")]
    return list(zip(lines[0], next(line for line in lines if line[0] == label), strict=True))


def test_the_table_has_the_papers_columns_and_whatever_else_some_run_was_evaluated_on(single, tmp_path):
    compare(single, out=str(tmp_path / "out"))
    assert cells(tmp_path / "out" / "comparison.md", "sbld")[3:9] == [
        ("LAMBADA accuracy (%)", "50.75"),
        ("s.e.", "0.70"),
        ("change", "+2.66"),
        ("LAMBADA last-word perplexity", "18.50"),
        ("wiki.valid.raw word perplexity", "-"),
        ("wiki.valid.raw bits per byte", "-"),
    ]
    assert cells(tmp_path / "out" / "comparison.md", "sbld")[-2:] == [("train time", "0m18s"), ("change", "-10.0%")]
    assert cells(tmp_path / "out" / "comparison.md", "full")[7:9] == [
        ("wiki.valid.raw word perplexity", "30.00"),
        ("wiki.valid.raw bits per byte", "1.2500"),
    ]


def test_without_evaluations_the_table_and_the_files_are_as_before(tmp_path):
    comparison = compare([evaluated_run(tmp_path / "full", [])], out=str(tmp_path / "out"))
    assert comparison.rows[0].evaluations == []
    header = (tmp_path / "out" / "comparison.md").read_text().splitlines()[0]
    assert header.startswith(
        "| run | valid. loss | change | training FLOPs | change | FLOPs to baseline loss | tokens/s |"
    )
    assert header.endswith("| train time |")
    assert not list((tmp_path / "out").glob("evaluations.*"))
    assert not any("valuat" in note for note in comparison.notes)


def test_csv_and_json_hold_every_figure_unrounded(single, tmp_path):
    comparison = compare(single, out=str(tmp_path / "out"))
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert float(rows[1]["LAMBADA accuracy_change"]) == pytest.approx(0.0266)
    assert (rows[1]["wiki.valid.raw token_perplexity"], rows[0]["wiki.valid.raw token_perplexity"]) == ("", "20.0")
    runs = list(csv.DictReader((tmp_path / "out" / "comparison_runs.csv").open()))
    assert (runs[0]["LAMBADA accuracy"], runs[0]["LAMBADA accuracy_stderr"]) == ("0.4809", "0.007")
    assert "LAMBADA accuracy_change" not in runs[0]
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["rows"] == [dataclasses.asdict(row) for row in comparison.rows]


def test_runs_that_differ_in_seeds_give_means_with_errors_over_seeds_and_a_paired_change(tmp_path):
    """full 0.40 and 0.44, pld 0.41 and 0.47: differences 0.01 and 0.03, so 2 +- 1 %; errors of the means 2 and 3 %."""
    folders = [
        *(evaluated_run(tmp_path / f"full-{seed}", [lambada_row(0.36 + 0.04 * seed)], "none", seed) for seed in (1, 2)),
        *(evaluated_run(tmp_path / f"pld-{seed}", [lambada_row(0.35 + 0.06 * seed)], "pld", seed) for seed in (1, 2)),
    ]
    comparison = compare(folders, out=str(tmp_path / "out"))
    found = comparison.rows[1].evaluations[0]
    assert (found.series, found.metric) == ("LAMBADA", "accuracy")
    assert found.value == pytest.approx(0.44)
    assert found.stderr == pytest.approx(0.03)
    assert found.change == pytest.approx(0.02)
    assert found.change_stderr == pytest.approx(0.01)
    assert comparison.runs[3].evaluations[0].stderr == 0.007
    shown = cells(tmp_path / "out" / "comparison.md", "pld")
    assert shown[6:12] == [
        ("LAMBADA accuracy (%)", "44.00"),
        ("s.e.", "3.00"),
        ("change", "+2.00"),
        ("s.e.", "1.00"),
        ("LAMBADA last-word perplexity", "20.00"),
        ("s.e.", "0.000"),
    ]


def test_the_last_evaluated_iteration_counts_and_another_than_the_baselines_is_noted(tmp_path):
    folders = [
        evaluated_run(tmp_path / "full", [lambada_row(0.1, 20), lambada_row(0.4, LAST)]),
        evaluated_run(tmp_path / "pld", [lambada_row(0.3, 30), wiki_row(30.0, 20)], "pld"),
    ]
    comparison = compare(folders)
    assert [row.evaluations[0].value for row in comparison.rows] == [0.4, 0.3]
    assert {figure.series for figure in comparison.rows[1].evaluations} == {"LAMBADA"}  # not what is older
    assert any("pld was last evaluated at iteration 30, full at 40" in note for note in comparison.notes)


def test_an_evaluation_before_the_end_and_a_seed_without_one_are_noted(tmp_path):
    folders = [
        evaluated_run(tmp_path / "full-1", [lambada_row(0.4, 30)], seed=1),
        evaluated_run(tmp_path / "full-2", [], seed=2),
    ]
    comparison = compare(folders)
    assert any(
        "full: not in the means of evaluations, because they have none: full-2." in note for note in comparison.notes
    )
    assert any("full: evaluated at iteration 30, before its end." in note for note in comparison.notes)
    assert comparison.rows[0].evaluations[0].value == 0.4


def test_evaluations_beyond_where_a_resumed_run_stands_do_not_count(tmp_path):
    comparison = compare([evaluated_run(tmp_path / "full", [lambada_row(0.4, 30), lambada_row(0.9, LAST + 10)])])
    assert comparison.rows[0].evaluations[0].value == 0.4


def test_a_damaged_file_of_evaluations_is_refused_by_name(tmp_path):
    folder = evaluated_run(tmp_path / "full", [lambada_row(0.4)])
    with (tmp_path / "full" / "evaluations.jsonl").open("a") as stream:
        stream.write('{"task": "lam')
    with pytest.raises(ValueError, match=r"evaluations\.jsonl, line 2 is cut off"):
        compare([folder])


def test_series_of_one_name_are_told_apart_by_what_differs():
    rows = [
        wiki_row(30.0),
        lambada_row(0.4),
        lambada_row(0.4, options={"detokenise": False}),
        lambada_row(0.4, precision="fp32"),
        lambada_row(0.3, iteration=7),
    ]
    assert [series.label for series in find_series(rows)] == [
        "LAMBADA (detokenise true, precision bf16)",
        "LAMBADA (detokenise false, precision bf16)",
        "LAMBADA (detokenise true, precision fp32)",
        "wiki.valid.raw",
    ]
    changed = Data(LAMBADA.name, "12345678" + "0" * 56)
    labels = [series.label for series in find_series([lambada_row(0.4), lambada_row(0.4, data=changed)])]
    assert labels == ["LAMBADA (sha256 abababab)", "LAMBADA (sha256 12345678)"]


def test_perplexity_of_tokens_is_shown_where_no_run_has_that_of_words(tmp_path):
    compare([evaluated_run(tmp_path / "full", [wiki_row(None)])], out=str(tmp_path / "out"))
    shown = dict(cells(tmp_path / "out" / "comparison.md", "full"))
    assert shown["wiki.valid.raw token perplexity"] == "20.00"
    assert "wiki.valid.raw word perplexity" not in shown


# Over iterations


def test_a_model_of_bytes_is_judged_by_byte_and_not_by_word(tmp_path):
    run = evaluated_run(tmp_path / "full", [wiki_row(3.9e10, num_bytes=9)])
    compare([run], out=str(tmp_path / "out"))
    for name in ("comparison.md", "evaluations.md"):
        text = (tmp_path / "out" / name).read_text()
        assert ("word perplexity" in text, "bits per byte" in text) == (False, True), name
    assert "3.9e10" not in (tmp_path / "out" / "comparison.json").read_text()


def test_the_table_over_iterations_has_a_line_for_each_and_a_column_for_each_curve():
    curves = [
        Curve("B/L", [[lambada_row(0.3243, 100_000), lambada_row(0.4077, 300_000)]]),
        Curve("SBLD", [[lambada_row(0.3955, 300_000)], [lambada_row(0.3755, 300_000), lambada_row(0.5, 500_000)]]),
    ]
    series = find_series([row for curve in curves for run in curve.runs for row in run])[0]
    assert iteration_table(curves, series, "accuracy") == [
        ["iteration", "B/L", "SBLD"],
        ["100,000", "32.43 ± 0.70", "-"],
        ["300,000", "40.77 ± 0.70", "38.55 ± 1.00"],
    ]


def test_points_are_means_over_the_runs_that_have_the_series():
    curve = Curve(
        "a",
        [
            [lambada_row(0.2, 10, train_time_s=1.0, consumed_tokens=5)],
            [lambada_row(0.4, 10, train_time_s=2.0)],
            [wiki_row(30.0, 10)],
        ],
    )
    (point,) = points(curve, find_series(curve.runs[0])[0], "accuracy")
    assert (point.value.mean, point.train_time_s, point.consumed_tokens) == (pytest.approx(0.3), 1.5, None)
    assert point.value.stderr == pytest.approx(0.1)


def drawn(curves, tmp_path, monkeypatch):
    figures = []
    original = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: (figures.append(figure), original(figure, *args, **kw))
    )
    plot_evaluations(curves, tmp_path / "plot.png")
    return figures[0]


def test_the_plot_has_a_row_for_every_metric_and_bars_where_there_are_errors(tmp_path, monkeypatch):
    curves = [
        Curve("full", [[lambada_row(0.01 * i, i, 900.0 / i, float(i)), wiki_row(30.0, i)] for i in (10,)]),
        Curve("pld", [[lambada_row(0.01 * i, i, 20.0, 2.0 * i) for i in (10, 20, 30)]]),
    ]
    figure = drawn(curves, tmp_path, monkeypatch)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == [
        "LAMBADA\naccuracy (%)",
        "LAMBADA\nlast-word perplexity",
        "wiki.valid.raw\nword perplexity",
        "wiki.valid.raw\nbits per byte",
    ]
    pld = figure.axes[0].containers[1]
    assert pld.lines[0].get_ydata().tolist() == pytest.approx([10.0, 20.0, 30.0])
    bar = pld.lines[2][0].get_segments()[0]
    assert bar[:, 1] == pytest.approx([10.0 - 0.7, 10.0 + 0.7])


@pytest.mark.parametrize(
    ("tokens_of", "time_of", "expected"),
    [
        (lambda i: 1000 * i, lambda i: 0.5 * i, ["iteration", "training time without validation and saving (s)"]),
        (lambda i: 10**6 * i**2, lambda i: None, ["iteration", "tokens (millions)"]),
        (lambda i: None, lambda i: None, ["iteration"]),
    ],
)
def test_it_is_drawn_against_whatever_is_known_and_says_something_else(
    tmp_path, monkeypatch, tokens_of, time_of, expected
):
    rows = [lambada_row(0.1, i, train_time_s=time_of(i), consumed_tokens=tokens_of(i)) for i in (10, 20)]
    figure = drawn([Curve("full", [rows])], tmp_path, monkeypatch)
    assert [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()] == expected


def test_a_plot_of_many_curves_and_of_a_diverged_model_is_a_png(tmp_path):
    curves = [
        Curve(f"run {i}", [[lambada_row(0.0, 10, math.inf), lambada_row(0.01, 20, 9.0 * i + 1)]]) for i in range(9)
    ]
    plot_evaluations(curves, tmp_path / "plot.png")
    header = (tmp_path / "plot.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:24])[0] == 9 * 150


def test_nothing_to_plot_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no evaluation to plot"):
        plot_evaluations([Curve("full", [[]])], tmp_path / "plot.png")
