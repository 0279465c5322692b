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
from rich.table import Table
from rich.text import Text

from megatron_sbld.report.evaluation import METRIC_NAMES, EvaluationFigure
from megatron_sbld.report.summary import Comparison, RunFigures, RunSummary

_Column = tuple[str, Callable[[RunSummary], str]]

_MISSING = "-"
_STDERR = "s.e."
_FLOPS = "training\nFLOPs"
_TFLOPS = "TFLOP/s\nper GPU"
_OF_TWO_RUNS_TIMES = ("realised\ngain", "real./\nideal", "time to\nbaseline\nloss")
_UNBOUNDED = 10_000  # columns; more than any table needs


def print_table(comparison: Comparison, console: Console, realised: bool = True) -> None:
    """Prints the comparison and its footnotes; `realised` as in `compare`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    columns = _columns(comparison, realised)
    for position, (header, _) in enumerate(columns):
        table.add_column(header, justify="left" if position == 0 else "right", no_wrap=True, vertical="bottom")
    for row in comparison.rows:
        table.add_row(*(Text(cell(row)) for _, cell in columns))
    print_wide(table, console)
    for note in comparison.notes:
        print_line(f"  {note}", console, style="dim")


def print_wide(table: Table, console: Console) -> None:
    """Prints a table with an empty line before and after, over the console's width rather than shortened.

    rich would shorten figures to fit a narrow or piped console; a line that runs over is the smaller evil.
    """
    needed = Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum
    wide = Console(file=console.file, width=max(needed, console.width))
    wide.print("", table, "", sep="\n")


def print_line(text: str, console: Console, style: str | None = None) -> None:
    """Prints text as it is and in one line: a path or command broken over two could not be copied."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def cells(comparison: Comparison, realised: bool = True) -> tuple[list[str], list[list[str]]]:
    """Headers, which may have line breaks, and the text of each row's cells; `realised` as in `compare`."""
    columns = _columns(comparison, realised)
    return [header for header, _ in columns], [[cell(row) for _, cell in columns] for row in comparison.rows]


def write_markdown(comparison: Comparison, file: Path, realised: bool = True) -> None:
    """Writes the table as markdown, with its footnotes below; `realised` as in `compare`."""
    headers, rows = cells(comparison, realised)
    lines = [" | ".join(header.replace("\n", " ") for header in headers)]
    lines.append(" | ".join([":---"] + ["---:"] * (len(headers) - 1)))
    lines += [" | ".join(row) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    file.write_text(table + "\n\n" + "\n".join(f"- {note}" for note in comparison.notes) + "\n")


def write_csv(comparison: Comparison, file: Path) -> None:
    """Writes the unrounded figures of the rows, one a line; what is unknown is empty."""
    _write_lines([_flat(row) for row in comparison.rows], file)


def write_runs_csv(comparison: Comparison, file: Path) -> None:
    """Writes the unrounded figures of the runs behind the rows, one a line; what is unknown is empty."""
    _write_lines([_flat(run) for run in comparison.runs], file)


def write_json(comparison: Comparison, file: Path) -> None:
    """Writes the unrounded figures of rows and runs, and the footnotes; what is unknown is null."""
    file.write_text(json.dumps(dataclasses.asdict(comparison), indent=2) + "\n")


def _flat(figures: RunSummary | RunFigures) -> dict[str, Any]:
    """The fields by name; of evaluations one for every figure, named after its series and metric."""
    fields = dataclasses.asdict(figures)
    del fields["evaluations"]
    for figure in figures.evaluations:
        name = f"{figure.series} {figure.metric}"
        fields |= {name: figure.value, f"{name}_stderr": figure.stderr}
        if isinstance(figures, RunSummary):
            fields |= {f"{name}_change": figure.change, f"{name}_change_stderr": figure.change_stderr}
    return fields


def _columns(comparison: Comparison, realised: bool) -> list[_Column]:
    """Headers, and how a row's cell is written below each. Seeds are shown where a row has several.

    Evaluations stand beside the losses, and with them the change of training time, as in the paper's Table 3.
    """
    several = any(row.num_seeds > 1 for row in comparison.rows)
    losses: list[_Column] = [
        ("run", lambda row: row.label),
        ("seeds", lambda row: str(row.num_seeds)),
        ("valid.\nloss", lambda row: _number(row.valid_loss, ".4f")),
        (_STDERR, lambda row: _number(row.valid_loss_stderr, ".4f")),
        ("change", lambda row: _number(row.valid_loss_change, "+.4f")),
        (_STDERR, lambda row: _number(row.valid_loss_change_stderr, ".4f")),
    ]
    compute: list[_Column] = [
        (_FLOPS, lambda row: _number(row.training_flops, ".3g")),
        ("change", lambda row: _number(row.flops_change, "+.1%")),
        ("FLOPs to\nbaseline\nloss", lambda row: _number(row.flops_to_baseline_loss, ".1%")),
    ]
    evaluations = _evaluation_columns(comparison, several)
    speed: list[_Column] = [
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
    if evaluations and realised:
        speed.append(("change", lambda row: _number(row.train_time_change, "+.1%")))
    if not several:
        losses = [column for column in losses if column[0] not in ("seeds", _STDERR)]
    if all(row.model_tflops_per_gpu is None for row in comparison.rows):
        speed = [column for column in speed if column[0] != _TFLOPS]
    if not realised:
        speed = [column for column in speed if column[0] not in _OF_TWO_RUNS_TIMES]
    if all(row.training_flops is None for row in comparison.rows):
        compute = compute[:1]  # that they are not known is worth a column
    return [*losses, *evaluations, *compute, *speed]


def _evaluation_columns(comparison: Comparison, several: bool) -> list[_Column]:
    """A column for every metric that some row has, its standard error, and for accuracy the change.

    Perplexity is that of words where some row has it, else that of tokens, which depends on the tokenizer.
    """
    columns: list[_Column] = []
    shown = [figure for figure in comparison.rows[0].evaluations if _is_shown(figure, comparison)]
    for figure in shown:
        form, scale = (".4f", 1.0) if figure.metric == "bits_per_byte" else ("#.4g", 1.0)
        if figure.metric == "accuracy":
            form, scale = ".2f", 100.0
        wanted = ["value"] + (["stderr"] if figure.metric == "accuracy" or several else [])
        if figure.metric == "accuracy":
            wanted += ["change"] + (["change_stderr"] if several else [])
        headers = {
            "value": f"{figure.series}\n{METRIC_NAMES[figure.metric].replace(' ', chr(10), 1)}",
            "stderr": _STDERR,
            "change": "change",
            "change_stderr": _STDERR,
        }
        columns += [(headers[field], _figure_cell(figure, field, form, scale)) for field in wanted]
    return columns


def _is_shown(figure: EvaluationFigure, comparison: Comparison) -> bool:
    known = {
        other.metric
        for row in comparison.rows
        for other in row.evaluations
        if other.series == figure.series and other.value is not None
    }
    return figure.metric in known and not (figure.metric == "token_perplexity" and "word_perplexity" in known)


def _figure_cell(figure: EvaluationFigure, field: str, form: str, scale: float) -> Callable[[RunSummary], str]:
    form = "+" + form if field == "change" else form

    def cell(row: RunSummary) -> str:
        found = next(other for other in row.evaluations if (other.series, other.metric) == key)
        value = getattr(found, field)
        return _number(None if value is None else scale * value, form)

    key = (figure.series, figure.metric)
    return cell


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
