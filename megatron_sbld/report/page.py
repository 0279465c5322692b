"""A comparison as one HTML page to send to a colleague: table, footnotes, plots, the configs' differences, provenance.

The page holds everything itself and loads nothing; its policy forbids the browser to. ElementTree escapes whatever
comes from files.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from megatron_sbld import __version__
from megatron_sbld.report.groups import RunGroup
from megatron_sbld.report.plots import DPI
from megatron_sbld.report.runs import RunData
from megatron_sbld.report.summary import Comparison
from megatron_sbld.report.table import cells

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_CAPTIONS = {
    "loss.png": "Loss against iterations and against training time",
    "loss_compute.png": "Loss against the training FLOPs of what ran",
    "tradeoff.png": "Validation loss against mean keep probability and against training time",
    "keep_prob.png": "Keep probability of each layer in each iteration",
    "evaluations.png": "Evaluations of checkpoints",
}
"""Of the plots that a page shows, in its order."""
_SECTIONS = ("model", "parallel", "data", "optimizer", "training", "drop", "checkpoint")
"""Of a config; the logging section says only where a run is written and what is shown of it."""
_CSS_DPI = 96
_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --dim: #5c6370; --page: #fff; --line: #d5d9e0; --mark: #eef2f8 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e6ea; --dim: #a3aab5; --page: #16181c; --line: #3a3f47; --mark: #232830 }
}
body { margin: 0 auto; padding: 1rem; max-width: 90rem; color: var(--text); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p, li, figcaption { max-width: 60rem }
.dim, figcaption, li { color: var(--dim); font-size: .9rem }
li, .dim { overflow-wrap: anywhere }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100% }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { vertical-align: bottom; font-weight: 600 }
thead th { white-space: pre }
tr:last-child > * { border-bottom: 0 }
th:first-child { position: sticky; left: 0; text-align: left; background: var(--page) }
tr.baseline > * { background: var(--mark) }
.text th, .text td { text-align: left }
.text td { white-space: normal; overflow-wrap: anywhere; min-width: 7rem }
@media (max-width: 40rem) {
  th:first-child { min-width: 6rem; max-width: 9rem; overflow-wrap: anywhere; white-space: normal }
}
figure { margin: 1rem 0 }
figure .wide { background: #fff; max-width: max-content }
img { display: block; min-width: 40rem; max-width: 100%; height: auto }
"""


def write_page(
    comparison: Comparison, groups: Sequence[RunGroup], plots: Sequence[Path], file: Path, realised: bool = True
) -> None:
    """Writes the page.

    Args:
        groups: those that the rows of `comparison` are of, in their order.
        plots: PNG files; those that have a caption here are shown.
        file: the page.
        realised: as in `compare`.
    """
    names = [row.label for row in comparison.rows]
    title = f"{', '.join(names)}" if len(names) <= 4 else f"{len(names)} rows"
    body = _page(page := Element("html", lang="en"), f"Comparison of runs: {title}")
    _text(body, "h1", "Comparison of runs")
    count = len(comparison.runs)
    written = time.strftime("%Y-%m-%d %H:%M %Z")
    summary = f"{count} {'run' if count == 1 else 'runs'}; changes and gains are against {comparison.baseline}."
    _text(body, "p", f"{summary} Written on {written} by megatron-sbld {__version__}.", "dim")
    headers, rows = cells(comparison, realised)
    _table(body, headers, rows, marked=names.index(comparison.baseline))
    notes = SubElement(body, "ul")
    for note in comparison.notes:
        _text(notes, "li", note)
    _text(body, "h2", "Plots")
    by_name = {plot.name: plot for plot in plots}
    for name in (name for name in _CAPTIONS if name in by_name):
        _figure(body, by_name[name], _CAPTIONS[name])
    _text(body, "h2", "What the configs differ in")
    differences = _differences(groups)
    if differences:
        _table(body, ["field", *names], differences, "text")
    else:
        _text(body, "p", "Nothing but where the runs are written.", "dim")
    _text(body, "h2", "Where the figures are from")
    _text(body, "p", "The digest is of metrics.jsonl, from which the figures are computed.", "dim")
    _table(body, list(_PROVENANCE), [_provenance(group, run) for group in groups for run in group.runs], "text")
    markup = "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"
    file.write_text(markup, encoding="utf-8", errors="replace")


def _page(page: Element, title: str) -> Element:
    """Adds the head; the body."""
    head = SubElement(page, "head")
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY})
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    _text(head, "title", title)
    _text(head, "style", _STYLE)
    return SubElement(page, "body")


def _text(parent: Element, tag: str, text: str, style: str | None = None) -> Element:
    element = SubElement(parent, tag, {} if style is None else {"class": style})
    element.text = text
    return element


def _table(
    parent: Element, headers: Sequence[str], rows: Sequence[Sequence[str]], style: str = "figures", marked: int = -1
) -> None:
    """A table that scrolls sideways where the screen is narrow, all but its first column."""
    table = SubElement(SubElement(parent, "div", {"class": "wide"}), "table", {"class": style})
    head = SubElement(SubElement(table, "thead"), "tr")
    for header in headers:
        _text(head, "th", header)
    body = SubElement(table, "tbody")
    for number, row in enumerate(rows):
        line = SubElement(body, "tr", {"class": "baseline"} if number == marked else {})
        for column, cell in enumerate(row):
            _text(line, "td" if column else "th", cell)


def _figure(parent: Element, plot: Path, caption: str) -> None:
    figure = SubElement(parent, "figure")
    data = plot.read_bytes()
    width = int.from_bytes(data[16:20], "big") * _CSS_DPI // DPI  # a PNG's width in pixels is at these bytes
    source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    SubElement(SubElement(figure, "div", {"class": "wide"}), "img", src=source, alt=caption, width=str(width))
    _text(figure, "figcaption", caption)


def _differences(groups: Sequence[RunGroup]) -> list[list[str]]:
    """A line for each field in which configs differ: its name, then its values in each group."""
    sections = [[dataclasses.asdict(run.config) for run in group.runs] for group in groups]
    found = []
    for section in _SECTIONS:
        for field in sections[0][0][section]:
            shown = [list(dict.fromkeys(_value(config[section][field]) for config in configs)) for configs in sections]
            if len({value for values in shown for value in values}) > 1:
                found.append([f"{section}.{field}", *(", ".join(values) for values in shown)])
    return found


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


_PROVENANCE = ("row", "run folder", "seeds: weights and data, drops", "iterations", "last written", "digest")


def _provenance(group: RunGroup, run: RunData) -> list[str]:
    metrics = run.path / "metrics.jsonl"
    digest = sha256(metrics.read_bytes()).hexdigest()
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(metrics.stat().st_mtime))
    seeds = f"{run.seed}, {run.config.drop.seed}"
    return [group.label, str(run.path), seeds, f"{run.last_iteration:,}", written, f"sha256 {digest[:16]}"]
