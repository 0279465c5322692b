"""A sensitivity file as a table and as bars, its lists, joined parts, and how rankings agree."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sbld.files.outputs import refuse_inputs
from megatron_sbld.report.plots import DPI
from megatron_sbld.report.table import print_line, print_wide
from megatron_sbld.sensitivity.file import SensitivityFile
from megatron_sbld.sensitivity.lists import choose_lists
from megatron_sbld.sensitivity.measurement import MeasurementFolder, sensitivity_of
from megatron_sbld.sensitivity.stats import rank_correlations

_COLOURS = {"Block": "tab:green", "Allow": "tab:orange", "": "tab:gray"}  # as in the paper's Figure 3
_UNKNOWN = "-"


def present(file: Path) -> None:
    """Print the table of a new sensitivity file and draw it beside it."""
    measured = SensitivityFile.load(file)
    plot_gaps(measured, file.with_suffix(".png"))
    print_gaps(measured, Console())
    print(f"saved {file} and {file.with_suffix('.png')}")
    print(
        f"train with it: megatron-sbld pretrain --config FILE --drop.policy sbld --drop.sensitivity {quote(str(file))}"
    )


def show(file: str, plot: str | None = None) -> None:
    """Print a sensitivity file; `plot` is a PNG to draw it in. Raises ValueError for a file that cannot be used."""
    measured = SensitivityFile.load(file)
    if plot is not None:
        if Path(plot).suffix != ".png":
            raise ValueError(f"--plot {plot} is not allowed: it must end in .png")
        refuse_inputs("--plot", [plot], [file])
        plot_gaps(measured, Path(plot))
    print_gaps(measured, Console())


def lists(file: str, block: float, allow: float, output: str | None = None) -> SensitivityFile:
    """Choose the lists of a file anew, with other shares of the layers; print and, with `output`, save the result.

    Raises ValueError for a file that cannot be used, or for shares that ask for more layers than there are.
    """
    measured = SensitivityFile.load(file)
    if output is not None:
        refuse_inputs("--output", [output], [file])
    chosen = choose_lists(measured.gap, measured.gap_stderr, block, allow)
    result = dataclasses.replace(measured, block=chosen[0], allow=chosen[1])
    print_gaps(result, Console())
    if output is not None:
        result.save(output)
        print(f"saved {output}")
    return result


def merge(folders: Sequence[str], output: str) -> SensitivityFile:
    """Join the parts of a measurement. Raises ValueError if they do not fit together or lack layers."""
    resolved = [os.path.realpath(folder) for folder in folders]
    repeated = [folder for folder in folders if resolved.count(os.path.realpath(folder)) > 1]
    if repeated:
        raise ValueError(f"{repeated[0]} is named more than once")
    for folder in map(Path, folders):
        refuse_inputs("--output", [output], [folder / "profile.json", *folder.glob("seed-*/*.json")])
    result = sensitivity_of([MeasurementFolder.read(Path(folder)) for folder in folders])
    result.save(output)
    print_gaps(result, Console())
    print(f"saved {output}")
    return result


def rank(reference: str, files: Sequence[str]) -> None:
    """Print how well each file orders the layers as the reference does, and what each cost.

    Raises ValueError for no file to compare, or one of another number of layers.
    """
    if not files:
        raise ValueError(f"{reference} is alone; give at least one file to compare with it")
    expected = SensitivityFile.load(reference)
    table = _table("file", "method", "Spearman", "Kendall", "Block alike", "cost in iterations")
    for name in (reference, *files):
        found = SensitivityFile.load(name)
        if found.num_layers != expected.num_layers:
            raise ValueError(f"{name} is for {found.num_layers} layers, {reference} for {expected.num_layers}")
        spearman, kendall = rank_correlations(expected.gap, found.gap)
        cost = found.measured_with.get("cost_iterations")
        table.add_row(
            Text(name),
            str(found.measured_with.get("method", _UNKNOWN)),
            f"{spearman:+.3f}",
            f"{kendall:+.3f}",
            f"{len(set(expected.block) & set(found.block))} of {len(expected.block)}",
            f"{cost:,.0f}" if isinstance(cost, int | float) else _UNKNOWN,
        )
    print_wide(table, Console())


def print_gaps(measured: SensitivityFile, console: Console) -> None:
    """Print what the file was measured with, and a line for each layer."""
    about = measured.measured_with
    table = _table("layer", "gap", "std. error", "sensitivity", "list")
    for layer in range(1, measured.num_layers + 1):
        table.add_row(
            str(layer),
            f"{measured.gap[layer - 1]:+.4f}",
            f"{measured.gap_stderr[layer - 1]:.4f}",
            f"{measured.sensitivity[layer - 1]:.3f}",
            list_of(measured, layer),
        )
    print_wide(table, console)
    known = {key: about[key] for key in ("method", "iterations", "seeds", "cost_iterations", "date") if key in about}
    print_line("  ".join(f"{key} {value}" for key, value in known.items()), console)
    if "note" in about:
        print_line(str(about["note"]), console, style="dim")


def plot_gaps(measured: SensitivityFile, file: Path) -> None:
    """Draw the unnormalised gaps with their standard errors, Block and Allow coloured (SBLD, Figure 3)."""
    figure = Figure(figsize=(max(6.0, 0.32 * measured.num_layers + 2), 4.2), layout="constrained")
    axes = figure.subplots()
    layers = range(1, measured.num_layers + 1)
    names = [list_of(measured, layer) for layer in layers]
    axes.bar(layers, measured.gap, yerr=measured.gap_stderr, color=[_COLOURS[name] for name in names], capsize=2)
    axes.axhline(0.0, color="black", linewidth=0.8)
    influence = measured.measured_with.get("method") == "block_influence"
    axes.set(xlabel="layer", ylabel="1 - cosine similarity" if influence else "loss without the layer - baseline")
    axes.set_xlim(0.4, measured.num_layers + 0.6)  # there is no layer 0
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(handles=[Patch(color=colour, label=name or "in no list") for name, colour in _COLOURS.items()])
    axes.grid(axis="y", alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI)


def list_of(measured: SensitivityFile, layer: int) -> str:
    """Block, Allow or nothing."""
    return "Block" if layer in measured.block else "Allow" if layer in measured.allow else ""


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for header in headers:
        table.add_column(header, justify="left" if header in ("file", "method", "list") else "right", no_wrap=True)
    return table
