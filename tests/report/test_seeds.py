"""Runs of one experiment with several seeds: which belong together, their names, means, errors, tables and plots."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from megatron_sbld.cli import main as cli
from megatron_sbld.config.sections import DataConfig, LoggingConfig, OptimizerConfig, TrainingConfig
from megatron_sbld.method.config import DropConfig
from megatron_sbld.report.compare import compare
from megatron_sbld.report.groups import group_runs
from megatron_sbld.report.plots import group_style
from megatron_sbld.report.runs import read_runs
from megatron_sbld.report.seeds import estimate, paired_difference, paired_seeds, time_to_loss, unpaired_difference
from megatron_sbld.report.summary import choose_baseline, summarise
from megatron_sbld.report.tradeoff import plot_tradeoff
from tests.report.report_helpers import row, valid_row, write_run

ITERATIONS = 20


def seed_run(folder, seed, losses=(3.0, 2.0), policy="none", step_time_s=0.5, iterations=ITERATIONS, drop=None, **more):
    """A run validated at equal distances, whose losses are given; losses None: without validation."""
    keep_prob = 1.0 if policy == "none" else 0.5
    rows = [row(i, step_time_s, keep_prob) for i in range(1, iterations + 1)]
    for number, loss in enumerate(losses or (), start=1):
        iteration = iterations * number // len(losses)
        rows.append(valid_row(iteration, loss, train_time_s=step_time_s * iteration))
    drop = DropConfig(policy=policy, seed=seed + 100, **(drop or {}))
    return write_run(folder, rows, drop=drop, **{"training": TrainingConfig(seed=seed), **more})


def grouped(*folders, group=True):
    return group_runs(read_runs(folders), group)


def members(groups):
    return [[run.path.name for run in group.runs] for group in groups]


def compared(*folders):
    groups = grouped(*folders)
    return summarise(groups, choose_baseline(groups))


def noted(comparison, text):
    return any(text in note for note in comparison.notes)


# Which runs belong together


def test_runs_that_differ_in_seeds_logging_and_cache_are_one_group(tmp_path):
    folders = [
        seed_run(
            tmp_path / f"pld-seed{seed}",
            seed,
            policy="pld",
            data=DataConfig(data_cache_path=f"cache/{seed}"),
            logging=LoggingConfig(run_dir=f"runs/{seed}", wandb_name=f"run {seed}", log_interval=seed),
        )
        for seed in (1, 2)
    ]
    assert members(grouped(*folders)) == [["pld-seed1", "pld-seed2"]]


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": OptimizerConfig(lr=1e-4)},
        {"training": TrainingConfig(seed=2, global_batch_size=16)},
        {"data": DataConfig(tokenizer="other.json")},
        {"drop": {"theta": 0.7}},
        {"policy": "layerdrop"},
    ],
)
def test_runs_that_differ_in_anything_else_are_groups_of_their_own(tmp_path, change):
    first = seed_run(tmp_path / "a", 1, policy="pld")
    second = seed_run(tmp_path / "b", 2, **{"policy": "pld", **change})
    assert members(grouped(first, second)) == [["a"], ["b"]]


def test_without_grouping_every_run_is_a_row(tmp_path):
    folders = [seed_run(tmp_path / f"pld-{seed}", seed, policy="pld") for seed in (1, 2)]
    groups = grouped(*folders, group=False)
    assert [group.label for group in groups] == ["pld-1", "pld-2"]


def sbld_run(folder, seed, sensitivity):
    return seed_run(folder, seed, policy="sbld", drop={"sensitivity": sensitivity})


def test_a_sensitivity_file_measured_for_each_seed_does_not_split_a_group_and_is_noted(tmp_path):
    folders = [sbld_run(tmp_path / f"sbld-{seed}", seed, f"sens-{seed}.json") for seed in (1, 2, 3)]
    comparison = compared(*folders)
    assert [row.num_seeds for row in comparison.rows] == [3]
    assert noted(comparison, "sbld: every seed has a sensitivity file of its own")


@pytest.mark.parametrize("seeds_of_b", [(1, 2), (3,)])
def test_sensitivity_files_that_are_themselves_compared_make_a_group_each(tmp_path, seeds_of_b):
    """File a with seeds 1 and 2; b with the same, or with one other, where neither belongs to a single seed."""
    first = [sbld_run(tmp_path / f"a-{seed}", seed, "a.json") for seed in (1, 2)]
    second = [sbld_run(tmp_path / f"b-{seed}", seed, "b.json") for seed in seeds_of_b]
    groups = grouped(*first, *second)
    assert [len(group.runs) for group in groups] == [2, len(seeds_of_b)]


def test_groups_stand_in_the_order_of_their_first_runs(tmp_path):
    order = [("sbld", "a", 1), ("pld", None, 1), ("sbld", "b", 1), ("pld", None, 2), ("sbld", "a", 2)]
    folders = [
        seed_run(tmp_path / f"{policy}{file}-{seed}", seed, policy=policy, drop={"sensitivity": file})
        for policy, file, seed in order
    ]
    assert members(grouped(*folders)) == [["sblda-1", "sblda-2"], ["pldNone-1", "pldNone-2"], ["sbldb-1"]]


# Names


def labels_of(tmp_path, *groups):
    """Labels of groups given by their folders' names; each group has another theta."""
    thetas = itertools.count(50)
    folders = []
    for names in groups:
        theta = next(thetas) / 100
        folders += [
            seed_run(tmp_path / name, seed, policy="pld", drop={"theta": theta}) for seed, name in enumerate(names, 1)
        ]
    return [group.label for group in grouped(*folders)]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["out/pld-seed1", "out/pld-seed2"], "pld"),
        (["out/pld/seed-1", "out/pld/seed-2"], "pld"),
        (["out/pld/1", "out/pld/2"], "pld"),
        (["out/seed1/pld", "out/seed2/pld"], "pld"),
        (["out/pld_theta_0.7_seed_9", "out/pld_theta_0.7_seed_10"], "pld_theta_0.7"),
        (["out/s1-pld", "out/s2-pld"], "pld"),
        (["out/pld1", "out/pld2"], "pld"),
        (["out/pld", "out/pld-seed2"], "pld"),
        (["out/seed=1,pld", "out/seed=2,pld"], "pld"),
        (["out/monday", "out/tuesday"], "monday and 1 more"),
    ],
)
def test_a_group_is_called_what_its_paths_have_in_common(tmp_path, names, label):
    assert labels_of(tmp_path, names, ["out/full"]) == [label, "full"]


def test_groups_of_one_name_are_told_apart_by_their_parents(tmp_path):
    names = [[f"{parent}/pld-seed{seed}" for seed in (1, 2)] for parent in ("a", "b")]
    assert labels_of(tmp_path, *names) == ["a/pld", "b/pld"]


def test_groups_whose_paths_are_no_different_are_called_after_their_first_runs(tmp_path):
    names = [["out/pld-1", "out/pld-2"], ["out/pld-3", "out/pld-4"], ["out/full-1", "out/full-2"]]
    assert labels_of(tmp_path, *names) == ["pld-1 and 1 more", "pld-3 and 1 more", "full"]


def test_beside_groups_a_single_run_is_named_without_its_seed(tmp_path):
    assert labels_of(tmp_path, ["full/seed-1", "full/seed-2"], ["pld/seed-1"], ["sbld-seed1"]) == [
        "full",
        "pld",
        "sbld",
    ]


# Statistics


def test_the_standard_error_is_that_of_the_sample():
    """Deviations -1, 0, 1: s = 1, standard error 1 / sqrt(3)."""
    assert estimate([2.0, 3.0, 4.0]).mean == 3.0
    assert estimate([2.0, 3.0, 4.0]).stderr == pytest.approx(1 / math.sqrt(3))
    assert estimate([2.0]).stderr is None


def test_the_paired_error_is_that_of_the_differences():
    """Differences 0.1, 0.2, 0.3: mean 0.2, s = 0.1, whatever the seeds themselves do."""
    ours, theirs = [2.1, 3.2, 4.3], [2.0, 3.0, 4.0]
    paired = paired_difference(ours, theirs)
    assert paired.mean == pytest.approx(0.2)
    assert paired.stderr == pytest.approx(0.1 / math.sqrt(3))
    unpaired = unpaired_difference(ours, theirs)  # s = 1.1 and 1
    assert unpaired.mean == pytest.approx(0.2)
    assert unpaired.stderr == pytest.approx(math.sqrt((1.21 + 1.0) / 3))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([2, 1], [1, 2], [1, 2]),
        ([1, 2, 3], [2, 3, 4], [2, 3]),
        ([1], [1, 2], [1]),
        ([1, 2], [1], None),  # one difference would leave a seed of ours out and have no error
        ([1, 2], [2, 3], None),
        ([1, 1, 2], [1, 2], None),
        ([1, 2], [3, 4], None),
        ([], [1], None),
    ],
)
def test_seeds_are_paired_where_both_groups_have_them_once(ours, theirs, expected):
    assert paired_seeds(ours, theirs) == expected


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ([4.0, 3.0, 2.0], 2.5, 25.0),
        ([4.0, 3.0, 2.0], 2.0, 30.0),
        ([4.0, 3.0, 2.0], 1.9, None),
        ([4.0, 3.0, 2.0], 5.0, 10.0),
        ([4.0, 2.0, 3.0], 3.0, 15.0),
        ([math.nan, 3.0, 2.0], 3.0, 20.0),
        ([], 3.0, None),
    ],
)
def test_the_time_to_a_loss_is_interpolated_to_where_it_first_falls_to_it(losses, target, expected):
    times = np.array([10.0, 20.0, 30.0])[: len(losses)]
    assert time_to_loss(times, np.array(losses), target) == expected


# Rows


def test_a_row_gives_means_over_seeds_and_the_paired_change(tmp_path):
    """Baseline 2.0 and 2.4, pld 2.1 and 2.6: differences 0.1 and 0.2, so 0.15 +- 0.05; the means' s.e. 0.2, 0.25."""
    comparison = compared(
        seed_run(tmp_path / "full-1", 1, (3.0, 2.0), step_time_s=0.4),
        seed_run(tmp_path / "full-2", 2, (3.0, 2.4), step_time_s=0.6),
        seed_run(tmp_path / "pld-2", 2, (3.0, 2.6), "pld", step_time_s=0.2),
        seed_run(tmp_path / "pld-1", 1, (3.0, 2.1), "pld", step_time_s=0.4),
    )
    full, pld = comparison.rows
    assert (full.label, full.num_seeds, full.valid_loss_change, full.num_paired_seeds) == ("full", 2, 0.0, None)
    assert full.valid_loss_stderr == pytest.approx(0.2)
    assert full.valid_loss_change_stderr is None
    assert pld.valid_loss == pytest.approx(2.35)
    assert pld.valid_loss_stderr == pytest.approx(0.25)
    assert pld.valid_loss_change == pytest.approx(0.15)
    assert pld.valid_loss_change_stderr == pytest.approx(0.05)
    assert pld.num_paired_seeds == 2
    assert pld.train_time_s == pytest.approx(ITERATIONS * 0.3)
    assert pld.tokens_per_s == pytest.approx((2048 / 0.2 + 2048 / 0.4) / 2)
    assert pld.realised_gain == pytest.approx((1 / 0.2 + 1 / 0.4) / (1 / 0.4 + 1 / 0.6) - 1)
    assert pld.kept_fraction == pytest.approx(0.5)
    assert pld.path == str(tmp_path)
    assert noted(comparison, "standard error of the mean")
    assert not noted(comparison, "not paired")
    assert not noted(comparison, "training.seed")


def test_groups_with_other_seeds_are_compared_unpaired_and_say_so(tmp_path):
    comparison = compared(
        *(seed_run(tmp_path / f"full-{seed}", seed, (3.0, loss)) for seed, loss in ((1, 2.0), (2, 2.4))),
        *(seed_run(tmp_path / f"pld-{seed}", seed, (3.0, loss), "pld") for seed, loss in ((3, 2.1), (4, 2.6))),
    )
    pld = comparison.rows[1]
    assert pld.num_paired_seeds == 0
    assert pld.valid_loss_change == pytest.approx(0.15)
    assert pld.valid_loss_change_stderr == pytest.approx(math.hypot(0.2, 0.25))
    assert noted(comparison, "pld: the change is not paired but the difference of the means: its seeds are 3 and 4")


def test_a_change_over_some_of_the_seeds_says_over_which(tmp_path):
    comparison = compared(
        *(seed_run(tmp_path / f"full-{seed}", seed, (3.0, loss)) for seed, loss in ((1, 2.0), (2, 2.4), (3, 9.0))),
        *(seed_run(tmp_path / f"pld-{seed}", seed, (3.0, loss), "pld") for seed, loss in ((1, 2.1), (2, 2.6))),
    )
    pld = comparison.rows[1]
    assert (pld.num_paired_seeds, pld.valid_loss_change) == (2, pytest.approx(0.15))
    assert noted(comparison, "pld: the change is over the common seeds alone (1 and 2)")


def test_single_runs_of_one_seed_have_a_change_without_an_error(tmp_path):
    comparison = compared(seed_run(tmp_path / "full", 1), seed_run(tmp_path / "pld", 1, (3.0, 2.1), "pld"))
    pld = comparison.rows[1]
    assert pld.valid_loss_change == pytest.approx(0.1)
    assert (pld.num_seeds, pld.valid_loss_stderr, pld.valid_loss_change_stderr) == (1, None, None)
    assert not noted(comparison, "standard error")


def test_a_seed_that_occurs_twice_in_a_group_is_noted_and_not_paired(tmp_path):
    comparison = compared(
        *(seed_run(tmp_path / f"full-{seed}", seed) for seed in (1, 2)),
        *(seed_run(tmp_path / f"pld-{number}", 1, policy="pld") for number in (1, 2)),
    )
    assert comparison.rows[1].num_paired_seeds == 0
    assert noted(comparison, "pld: a seed occurs more than once (1 and 1)")


def test_a_run_without_validation_is_left_out_of_the_mean_loss_and_named(tmp_path):
    comparison = compared(
        *(seed_run(tmp_path / f"full-{seed}", seed, (3.0, loss)) for seed, loss in ((1, 2.0), (2, 2.4), (3, 9.0))),
        *(seed_run(tmp_path / f"pld-{seed}", seed, (3.0, loss), "pld") for seed, loss in ((1, 2.1), (2, 2.6))),
        seed_run(tmp_path / "pld-3", 3, None, "pld"),
    )
    pld = comparison.rows[1]
    assert (pld.num_seeds, pld.valid_loss, pld.valid_loss_change) == (3, pytest.approx(2.35), pytest.approx(0.15))
    assert noted(comparison, "pld: not in the mean validation loss, because they have none: pld-3.")
    assert noted(comparison, "pld: the change is over the common seeds alone (1 and 2)")


def test_groups_without_any_validation_have_no_losses_and_no_footnotes_on_them(tmp_path):
    comparison = compared(
        *(seed_run(tmp_path / f"full-{seed}", seed, None) for seed in (1, 2)),
        *(seed_run(tmp_path / f"pld-{seed}", seed, None, "pld") for seed in (1, 2)),
    )
    pld = comparison.rows[1]
    assert (pld.valid_loss, pld.valid_loss_change, pld.num_paired_seeds, pld.time_to_baseline_loss) == (None,) * 4
    assert pld.realised_gain == pytest.approx(0.0)
    assert not any(noted(comparison, text) for text in ("baseline loss", "the change is", "want of"))


def test_runs_of_a_group_that_stand_at_different_iterations_are_noted(tmp_path):
    comparison = compared(
        seed_run(tmp_path / "full-1", 1),
        seed_run(tmp_path / "full-2", 2),
        seed_run(tmp_path / "pld-1", 1, policy="pld"),
        seed_run(tmp_path / "pld-2", 2, policy="pld", iterations=10),
    )
    assert comparison.rows[1].iterations == 10
    assert noted(comparison, "pld: its runs stand at iterations 10 and 20: their mean loss cannot be compared")
    assert noted(comparison, "pld stands at iteration 10 and 20, full at 20: their losses cannot be compared")


def test_a_last_validation_at_another_iteration_than_the_baselines_is_noted(tmp_path):
    rows = [row(i) for i in range(1, ITERATIONS + 1)]
    comparison = compared(
        write_run(tmp_path / "full", [*rows, valid_row(20, 2.0)]),
        write_run(tmp_path / "pld", [*rows, valid_row(15, 2.0)], "pld"),
    )
    assert noted(comparison, "pld was last validated at iteration 15, full at 20: their losses cannot be compared")


# Time to the baseline's loss


def test_the_time_to_the_baselines_loss_is_averaged_over_pairs_of_seeds(tmp_path):
    """Baselines end at 2.0 and 1.0 after 10 s. Seed 1 falls from 3 to 1 between 4 and 8 s: 2.0 at 6 s; seed 2 from 2 to
    1 there: 1.0 at 8 s."""
    comparison = compared(
        seed_run(tmp_path / "full-1", 1, (3.0, 2.0)),
        seed_run(tmp_path / "full-2", 2, (3.0, 1.0)),
        seed_run(tmp_path / "pld-1", 1, (3.0, 1.0), "pld", step_time_s=0.4),
        seed_run(tmp_path / "pld-2", 2, (2.0, 1.0), "pld", step_time_s=0.4),
    )
    assert [row.time_to_baseline_loss for row in comparison.rows] == [1.0, pytest.approx(0.7)]
    assert [run.time_to_baseline_loss for run in comparison.runs] == [1.0, 1.0, pytest.approx(0.6), pytest.approx(0.8)]
    assert noted(comparison, "Time to baseline loss")


def test_unpaired_the_time_is_to_the_baselines_mean_loss(tmp_path):
    """Mean baseline: loss 1.5 after 15 s. pld falls from 3 to 1 between 4 and 8 s: 1.5 at 7 s."""
    comparison = compared(
        seed_run(tmp_path / "full-1", 1, (3.0, 2.0), step_time_s=0.5),
        seed_run(tmp_path / "full-2", 2, (3.0, 1.0), step_time_s=1.0),
        seed_run(tmp_path / "pld-3", 3, (3.0, 1.0), "pld", step_time_s=0.4),
    )
    assert comparison.rows[1].time_to_baseline_loss == pytest.approx(7 / 15)


def test_where_not_every_seed_reaches_the_loss_no_mean_is_given_and_it_is_noted(tmp_path):
    comparison = compared(
        *(seed_run(tmp_path / f"full-{seed}", seed, (3.0, 2.0)) for seed in (1, 2)),
        seed_run(tmp_path / "pld-1", 1, (3.0, 1.0), "pld"),
        seed_run(tmp_path / "pld-2", 2, (3.0, 2.1), "pld"),
    )
    assert comparison.rows[1].time_to_baseline_loss is None
    assert [run.time_to_baseline_loss for run in comparison.runs][2:] == [pytest.approx(0.75), None]
    assert noted(comparison, "pld: 1 of 2 seeds reach the baseline's final loss")


def test_a_baseline_that_rises_again_reaches_its_final_loss_before_its_end(tmp_path):
    comparison = compared(seed_run(tmp_path / "full", 1, (4.0, 2.0, 3.0, 3.0)))
    assert comparison.rows[0].time_to_baseline_loss == pytest.approx(1.5 / 4)


# The command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of three groups, of which one is a single run, and what `compare` saved about them."""
    folder = tmp_path_factory.mktemp("runs")
    folders = [
        *(seed_run(folder / f"full-{seed}", seed, (3.0, 2.0 + seed / 10)) for seed in (1, 2)),
        *(seed_run(folder / f"pld-{seed}", seed, (2.5, 2.0 + seed / 5), "pld", 0.4) for seed in (1, 2)),
        seed_run(folder / "sbld-seed1", 1, (3.0, 2.05), "sbld", 0.4),
    ]
    out = folder / "out"
    return folders, out, compare(folders, out=str(out))


def test_the_table_shows_seeds_and_errors_where_a_row_has_several(saved):
    _, out, _ = saved
    lines = (out / "comparison.md").read_text().splitlines()
    assert lines[0].startswith(
        "| run | seeds | valid. loss | s.e. | change | s.e. | training FLOPs | change | FLOPs to baseline loss |"
    )
    assert lines[3].startswith(
        "| pld | 2 | 2.3000 | 0.1000 | +0.1500 | 0.0500 | 3.83e+10 | -45.7% | - | 5,120 | 0.500 |"
    )
    assert lines[4].startswith("| sbld | 1 | 2.0500 | - | -0.0500 | - |")


def test_every_run_is_in_the_files_unrounded(saved):
    folders, out, comparison = saved
    lines = list(csv.DictReader((out / "comparison_runs.csv").open()))
    assert [line["path"] for line in lines] == folders
    assert [line["group"] for line in lines] == ["full", "full", "pld", "pld", "sbld"]
    assert float(lines[3]["valid_loss"]) == comparison.runs[3].valid_loss == 2.4
    assert (lines[3]["training_seed"], lines[3]["drop_seed"]) == ("2", "102")
    content = json.loads((out / "comparison.json").read_text())
    assert content["runs"] == [dataclasses.asdict(run) for run in comparison.runs]


def test_any_run_of_a_group_makes_it_the_baseline(saved):
    folders, _, _ = saved
    comparison = compare(folders, baseline=folders[3])
    assert comparison.baseline == "pld"
    assert comparison.rows[0].valid_loss_change == pytest.approx(-0.15)


@pytest.mark.parametrize(("options", "first"), [([], "full"), (["--group", "false"], "full-1")])
def test_the_command_line_switches_grouping(saved, capsys, options, first):
    folders, _, _ = saved
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["compare", *folders, *options])
    assert exit_info.value.code == 0
    assert re.search(rf"^{first} ", capsys.readouterr().out, re.MULTILINE)


def test_groups_of_uneven_and_unvalidated_runs_are_plotted(tmp_path):
    folders = [
        seed_run(tmp_path / "full-1", 1),
        seed_run(tmp_path / "full-2", 2, iterations=10),
        seed_run(tmp_path / "pld-1", 1, (3.0, 2.5, 2.1), "pld"),
        seed_run(tmp_path / "pld-2", 2, None, "pld", iterations=15),
        seed_run(tmp_path / "layerdrop-1", 1, (math.nan,), "layerdrop"),
    ]
    compare(folders, out=str(tmp_path / "out"))
    plots = {"loss.png", "loss_compute.png", "keep_prob.png", "tradeoff.png"}
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == plots


def drawn_tradeoff(tmp_path, monkeypatch, num_rows):
    """The labels, frames and legend of a plot of runs that lie close to each other."""
    folders = [
        seed_run(tmp_path / f"sbld-number-{i}", 1, (3.0, 2.0 + i / 1000), "sbld", drop={"theta": 0.9 - i / 100})
        for i in range(1, num_rows + 1)
    ]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    assert plot_tradeoff(compared(*folders), tmp_path / "tradeoff.png")
    return figures[0]


@pytest.mark.parametrize(("num_rows", "first"), [(8, "sbld-number-1"), (20, "1")])
def test_labels_of_close_points_cover_neither_each_other_nor_the_frame(tmp_path, monkeypatch, num_rows, first):
    figure = drawn_tradeoff(tmp_path, monkeypatch, num_rows)
    for axes in figure.axes:
        labels = [text for text in axes.texts if isinstance(text, Annotation)]
        assert len(labels) == num_rows
        assert labels[0].get_text() == first
        boxes = [Text.get_window_extent(label) for label in labels]
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        frame = axes.get_window_extent()
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_many_points_are_numbered_as_the_rows_and_named_in_a_legend(tmp_path, monkeypatch):
    figure = drawn_tradeoff(tmp_path, monkeypatch, 12)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [f"{i}  sbld-number-{i}" for i in range(1, 13)]


def test_twenty_groups_have_twenty_colours_and_more_are_dashed():
    styles = [group_style(number) for number in range(40)]
    assert len({style["color"] for style in styles[:20]}) == 20
    assert len({tuple(style.items()) for style in styles}) == 40
