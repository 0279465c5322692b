"""A comparison as a table on the console, as markdown, CSV and JSON. It formats figures and computes none."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megatron_sbld.report.summary import Comparison, RunSummary

_MISSING = "-"
_TFLOPS = "TFLOP/s\nper GPU"
_UNBOUNDED = 10_000  # columns; more than any table needs


def print_table(comparison: Comparison, console: Console) -> None:
    """Prints the comparison and its footnotes."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    columns = _columns(comparison)
    for position, (header, _) in enumerate(columns):
        table.add_column(header, justify="left" if position == 0 else "right", no_wrap=True, vertical="bottom")
    for row in comparison.rows:
        table.add_row(*(cell(row) for _, cell in columns))
    print_wide(table, console)
    for note in comparison.notes:
        console.print(Padding(Text(note, style="dim"), (0, 0, 0, 2)))


def print_wide(table: Table, console: Console) -> None:
    """Prints a table with an empty line before and after, over the console's width rather than shortened.

    rich would shorten figures to fit a narrow or piped console; a line that runs over is the smaller evil.
    """
    needed = Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum
    wide = Console(file=console.file, width=max(needed, console.width))
    wide.print("", table, "", sep="\n")


def write_markdown(comparison: Comparison, file: Path) -> None:
    """Writes the table as markdown, with its footnotes below."""
    columns = _columns(comparison)
    lines = [" | ".join(header.replace("\n", " ") for header, _ in columns)]
    lines.append(" | ".join([":---"] + ["---:"] * (len(columns) - 1)))
    lines += [" | ".join(cell(row) for _, cell in columns) for row in comparison.rows]
    table = "\n".join(f"| {line} |" for line in lines)
    file.write_text(table + "\n\n" + "\n".join(f"- {note}" for note in comparison.notes) + "\n")


def write_csv(comparison: Comparison, file: Path) -> None:
    """Writes the unrounded figures of the rows, one a line; what is unknown is empty."""
    _write_lines([dataclasses.asdict(row) for row in comparison.rows], file)


def write_runs_csv(comparison: Comparison, file: Path) -> None:
    """Writes the unrounded figures of the runs behind the rows, one a line; what is unknown is empty."""
    _write_lines([dataclasses.asdict(run) for run in comparison.runs], file)


def write_json(comparison: Comparison, file: Path) -> None:
    """Writes the unrounded figures of rows and runs, and the footnotes; what is unknown is null."""
    file.write_text(json.dumps(dataclasses.asdict(comparison), indent=2) + "\n")


def _columns(comparison: Comparison) -> list[tuple[str, Callable[[RunSummary], str]]]:
    """Headers, and how a row's cell is written below each. Seeds are shown where a row has several."""
    stderr = "s.e."
    columns: list[tuple[str, Callable[[RunSummary], str]]] = [
        ("run", lambda row: row.label),
        ("seeds", lambda row: str(row.num_seeds)),
        ("valid.\nloss", lambda row: _number(row.valid_loss, ".4f")),
        (stderr, lambda row: _number(row.valid_loss_stderr, ".4f")),
        ("change", lambda row: _number(row.valid_loss_change, "+.4f")),
        (stderr, lambda row: _number(row.valid_loss_change_stderr, ".4f")),
        ("tokens/s", lambda row: _number(row.tokens_per_s, ",.0f")),
        (_TFLOPS, lambda row: _number(row.model_tflops_per_gpu, ".1f")),
        ("mean\nkeep_prob", lambda row: _number(row.mean_keep_prob, ".3f")),
        ("layers\nrun", lambda row: _number(row.kept_fraction, ".1%")),
        ("ideal\ngain", lambda row: _number(row.ideal_gain, "+.1%")),
        ("realised\ngain", lambda row: _number(row.realised_gain, "+.1%")),
        ("real./\nideal", lambda row: _number(row.gain_ratio, ".2f")),
        ("time to\nbaseline\nloss", lambda row: _number(row.time_to_baseline_loss, ".1%")),
        ("train\ntime", lambda row: _duration(row.train_time_s)),
    ]
    left_out = set()
    if all(row.num_seeds == 1 for row in comparison.rows):
        left_out |= {"seeds", stderr}
    if all(row.model_tflops_per_gpu is None for row in comparison.rows):
        left_out.add(_TFLOPS)
    return [column for column in columns if column[0] not in left_out]


def _number(value: float | None, form: str) -> str:
    return _MISSING if value is None else format(value, form)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def _write_lines(lines: Sequence[dict[str, Any]], file: Path) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
