"""What `megatron-sbld compare` does: reads runs, prints their table, and saves it with the plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_sbld.report.plots import plot_keep_probs, plot_losses
from megatron_sbld.report.runs import RunData, read_runs
from megatron_sbld.report.summary import Comparison, choose_baseline, summarise
from megatron_sbld.report.table import print_table, write_csv, write_json, write_markdown


def compare(runs: Sequence[str], baseline: str | None = None, out: str | None = None) -> Comparison:
    """Prints a table of runs: validation loss, tokens/s, keep_prob, ideal and realised gain.

    Args:
        runs: run folders, in the order of the rows.
        baseline: the run folder that the others are compared with; added in front if it is not among `runs`. None takes
            the first that drops nothing, or the first.
        out: folder for comparison.md, .csv, .json, loss.png and, where a run drops layers, keep_prob.png. None writes
            nothing.

    Raises:
        ValueError: a run folder is missing, empty, malformed, or given twice.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run folder")
    paths = list(runs)
    resolved = [Path(path).resolve() for path in paths]
    if baseline is not None and Path(baseline).resolve() not in resolved:
        paths.insert(0, baseline)
    data = read_runs(paths)
    reference = choose_baseline(data) if baseline is None else _find(data, Path(baseline))
    comparison = summarise(data, reference)
    console = Console()
    print_table(comparison, console)
    if out is not None:
        for file in _save(comparison, data, Path(out)):
            console.print(f"saved {file}", highlight=False)
    return comparison


def _find(runs: Sequence[RunData], path: Path) -> RunData:
    return next(run for run in runs if run.path == path.resolve())


def _save(comparison: Comparison, runs: Sequence[RunData], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"comparison.{suffix}" for suffix in ("md", "csv", "json")]
    for write, file in zip((write_markdown, write_csv, write_json), files, strict=True):
        write(comparison, file)
    plot_losses(runs, folder / "loss.png")
    files.append(folder / "loss.png")
    dropping = [run for run in runs if run.policy != "none"]
    if dropping:
        plot_keep_probs(dropping, folder / "keep_prob.png")
        files.append(folder / "keep_prob.png")
    return files
