"""What `megatron-sbld compare` does: reads runs, prints their table, and saves it with the plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from megatron_sbld.files.outputs import refuse_inputs
from megatron_sbld.report.evaluation import Curve, write_iteration_tables
from megatron_sbld.report.evaluation_plots import plot_evaluations
from megatron_sbld.report.groups import RunGroup, group_runs
from megatron_sbld.report.page import write_page
from megatron_sbld.report.plots import plot_keep_probs, plot_loss_compute, plot_losses
from megatron_sbld.report.runs import read_runs, run_files
from megatron_sbld.report.summary import Comparison, choose_baseline, summarise
from megatron_sbld.report.table import print_line, print_table, write_csv, write_json, write_markdown, write_runs_csv
from megatron_sbld.report.tradeoff import plot_tradeoff

_FILES = (
    *("comparison.html", "comparison.md", "comparison.csv", "comparison_runs.csv", "comparison.json"),
    *("loss.png", "loss_compute.png", "keep_prob.png", "tradeoff.png", "evaluations.md", "evaluations.png"),
)


def compare(
    runs: Sequence[str],
    baseline: str | None = None,
    out: str | None = None,
    group: bool = True,
    realised: bool = True,
) -> Comparison:
    """Prints a table of runs: validation loss, evaluations, FLOPs, tokens/s, keep_prob, ideal and realised gain, time.

    Args:
        runs: run folders, in the order of the rows.
        baseline: a run folder of the row that the others are compared with; added in front if it is not among `runs`.
            None takes the first row that drops nothing, or the first.
        out: folder for comparison.md, .csv and .json, comparison_runs.csv, loss.png, loss_compute.png and, where a run
            drops layers, keep_prob.png, where one has a validation, tradeoff.png, where one was evaluated,
            evaluations.md and .png; and for comparison.html, which holds table and plots. None writes nothing.
        group: one row for runs that differ in their seeds alone (groups.py says what that means); False makes a row a
            run.
        realised: whether the tables show what compares the times of runs: realised gain, its share of the ideal one,
            time to the baseline's loss. False suits runs of minutes on a machine that others use.

    Raises:
        ValueError: a run folder is missing, empty, malformed, or given twice.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run folder")
    paths = list(runs)
    resolved = [Path(path).resolve() for path in paths]
    if baseline is not None and Path(baseline).resolve() not in resolved:
        paths.insert(0, baseline)
    groups = group_runs(read_runs(paths), group)
    reference = choose_baseline(groups) if baseline is None else _find(groups, Path(baseline))
    comparison = summarise(groups, reference, realised)
    console = Console()
    print_table(comparison, console, realised)
    if out is not None:
        for file in _save(comparison, groups, Path(out), realised):
            print_line(f"saved {file}", console)
    return comparison


def _find(groups: Sequence[RunGroup], path: Path) -> RunGroup:
    return next(group for group in groups if any(run.path == path.resolve() for run in group.runs))


def _save(comparison: Comparison, groups: Sequence[RunGroup], folder: Path, realised: bool) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    refuse_inputs("--out", [folder / name for name in _FILES], run_files(run for group in groups for run in group.runs))
    writers: dict[str, Callable[[Comparison, Path], None]] = {
        "comparison.md": partial(write_markdown, realised=realised),
        "comparison.csv": write_csv,
        "comparison_runs.csv": write_runs_csv,
        "comparison.json": write_json,
    }
    files = [folder / name for name in writers]
    for write, file in zip(writers.values(), files, strict=True):
        write(comparison, file)
    plots = _plot(comparison, groups, folder)
    curves = [Curve(group.label, [run.evaluations for run in group.runs]) for group in groups]
    if any(run.evaluations for group in groups for run in group.runs):
        write_iteration_tables(curves, folder / "evaluations.md")
        files.append(folder / "evaluations.md")
        plot_evaluations(curves, folder / "evaluations.png")
        plots.append(folder / "evaluations.png")
    page = folder / "comparison.html"
    write_page(comparison, groups, plots, page, realised)
    return [*files, *plots, page]


def _plot(comparison: Comparison, groups: Sequence[RunGroup], folder: Path) -> list[Path]:
    """Draws what there is to draw; the files."""
    plot_losses(groups, folder / "loss.png")
    files = [folder / "loss.png"]
    baseline = next(group for group in groups if group.label == comparison.baseline)
    if plot_loss_compute(groups, baseline, folder / "loss_compute.png"):
        files.append(folder / "loss_compute.png")
    dropping = [group for group in groups if group.policy != "none"]
    if dropping:
        plot_keep_probs(dropping, folder / "keep_prob.png")
        files.append(folder / "keep_prob.png")
    if plot_tradeoff(comparison, folder / "tradeoff.png"):
        files.append(folder / "tradeoff.png")
    return files
