"""What runs have computed, and their losses compared at equal compute."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_sbld.config.flops import executed_flops
from megatron_sbld.config.sections import Config, DataConfig, TrainingConfig
from megatron_sbld.method.config import DropConfig
from megatron_sbld.report import plots
from megatron_sbld.report.compare import compare
from megatron_sbld.report.compute import flops_until, total_flops, vocab_size_of
from megatron_sbld.report.groups import group_runs
from megatron_sbld.report.runs import read_runs
from tests.report.report_helpers import MODEL, TOKENS, row, valid_row, write_run

STAGED = DropConfig(policy="staged", stages=[[0.6, 1], [1.0, 4]])
UNDROPPED = DropConfig()


def flops(keep_prob):
    return executed_flops(MODEL, vocab_size_of(Config(model=MODEL)), TOKENS // MODEL.seq_length, 4 * keep_prob)


def grown_run(folder, iterations, drop=STAGED, losses=(3.0, 2.0), tells=True, **sections):
    """A run of one layer until 60 % of the iterations, where it is staged, that validates at equal distances."""
    rows = []
    for t in range(1, iterations + 1):
        keep_prob = 0.25 if drop is STAGED and t <= 0.6 * iterations else 1.0
        rows.append(row(t, 0.5 * keep_prob, keep_prob) | ({"executed_flops": flops(keep_prob)} if tells else {}))
    rows += [valid_row((i + 1) * iterations // len(losses), loss, 1.0 + i) for i, loss in enumerate(losses)]
    training = TrainingConfig(train_iters=iterations)
    return write_run(folder, rows, drop=drop, training=training, **sections)


def test_rows_without_flops_have_those_of_the_layers_that_ran(tmp_path):
    folders = [grown_run(tmp_path / name, 20, tells=name == "new") for name in ("new", "old")]
    new, old = read_runs(folders)
    assert total_flops(new) == pytest.approx(12 * flops(0.25) + 8 * flops(1.0))
    assert total_flops(old) == pytest.approx(total_flops(new))
    known = flops_until(old, np.array([0.0, 12.0, 20.0]))
    np.testing.assert_allclose(known, [0.0, 12 * flops(0.25), total_flops(new)])


def test_rows_of_which_some_have_flops_are_counted_together(tmp_path):
    rows = [row(1) | {"executed_flops": 1.0}, row(2, keep_prob=0.5)]
    (run,) = read_runs([write_run(tmp_path / "run", rows)])
    assert total_flops(run) == pytest.approx(1.0 + flops(0.5))


def test_without_flops_and_tokenizer_they_are_not_known(tmp_path, capsys):
    data = DataConfig(tokenizer="gone.json")
    runs = [grown_run(tmp_path / name, 20, tells=False, data=data) for name in ("a", "b")]
    comparison = compare(runs, out=str(tmp_path / "out"), group=False)
    first = comparison.rows[0]
    assert (first.training_flops, first.flops_change, first.flops_to_baseline_loss) == (None, None, None)
    assert not (tmp_path / "out" / "loss_compute.png").exists()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("a "))
    assert line.split()[:4] == ["a", "2.0000", "+0.0000", "-"]


def test_the_table_has_each_runs_flops_and_those_to_the_baselines_loss(tmp_path, capsys):
    undropped = grown_run(tmp_path / "full", 20, UNDROPPED)
    staged = grown_run(tmp_path / "staged", 20, losses=(4.0, 1.0))
    full, grown = compare([undropped, staged], realised=False).rows
    share = (12 * flops(0.25) + 8 * flops(1.0)) / (20 * flops(1.0))
    assert grown.training_flops == pytest.approx(share * full.training_flops)
    assert (full.flops_change, grown.flops_change) == (0.0, pytest.approx(share - 1))
    # 2.0 lies at two thirds of the way from the validation at iteration 10 to that at the end.
    half = 10 * flops(0.25) / (20 * flops(1.0))
    assert grown.flops_to_baseline_loss == pytest.approx(half + 2 / 3 * (share - half))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("staged "))
    assert line.split()[3:6] == [
        f"{grown.training_flops:.3g}",
        f"{grown.flops_change:+.1%}",
        f"{grown.flops_to_baseline_loss:.1%}",
    ]


def test_runs_of_other_lengths_compare_where_they_end_at_equal_compute(tmp_path):
    undropped = grown_run(tmp_path / "full", 20, UNDROPPED)
    saved = 1 - total_flops(read_runs([grown_run(tmp_path / "short", 20)])[0]) / (20 * flops(1.0))
    equal = grown_run(tmp_path / "equal", round(20 / (1 - saved)))
    notes = compare([undropped, equal, str(tmp_path / "short")]).notes
    assert (
        [note for note in notes if note.startswith("equal stands at")]
        == [note for note in notes if "of its FLOPs: they are compared at equal compute" in note]
        != []
    )
    other = compare([undropped, grown_run(tmp_path / "longer", 60)]).notes
    assert [note for note in other if "longer stands" in note and note.endswith("their losses cannot be compared.")]


@pytest.mark.parametrize(("lengths", "scale"), [((20, 40), "linear"), ((20, 80), "log")])
def test_the_plot_of_compute_is_logarithmic_where_lengths_are_far_apart(tmp_path, monkeypatch, lengths, scale):
    figures = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    folders = [grown_run(tmp_path / f"full{length}", length, UNDROPPED) for length in lengths]
    folders += [grown_run(tmp_path / "staged", 30), grown_run(tmp_path / "diverged", 30, losses=(math.nan,))]
    groups = group_runs(read_runs(folders), group=False)
    assert plots.plot_loss_compute(groups, groups[0], tmp_path / "plot.png")
    (axes,) = figures[0].axes
    assert axes.get_xscale() == scale
    labels = axes.get_legend_handles_labels()[1]
    assert labels == [*(group.label for group in groups), "full20, at its end", "undropped, at their ends"]
    ends = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_markersize() == 10]
    assert ends == [[total_flops(run), 2.0] for group in groups[:3] for run in group.runs]


def test_the_plot_is_written_beside_the_others(tmp_path):
    compare(
        [grown_run(tmp_path / "full", 20, UNDROPPED), grown_run(tmp_path / "staged", 40)], out=str(tmp_path / "out")
    )
    assert (tmp_path / "out" / "loss_compute.png").read_bytes().startswith(b"\x89PNG")
