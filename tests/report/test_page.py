"""The page that `compare` writes to send to others: what it holds, and that it loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_sbld.config.sections import DataConfig, TrainingConfig
from megatron_sbld.report.compare import compare
from megatron_sbld.report.table import cells
from tests.report.report_helpers import steady_run

HOSTILE = "pld<script>alert(1)<&script>"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser sees: tags with their attributes, and the text of each table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of three runs, the comparison, the page's text and the page."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = DataConfig(tokenizer='<img src="https://example.org/x.png">')
    runs = [
        steady_run(folder / "runs" / "full", 0.5, 1.0, "none", 2.0),
        steady_run(folder / "runs" / HOSTILE, 0.4, 0.5, "pld", 2.1, data=tokenizer),
        steady_run(folder / "runs" / "sbld", 0.4, 0.5, "sbld", 2.05, training=TrainingConfig(seed=7)),
    ]
    comparison = compare(runs, out=str(folder / "out"))
    text = (folder / "out" / "comparison.html").read_text(encoding="utf-8")
    return folder, comparison, text, Page(text)


def test_its_table_and_footnotes_are_those_of_the_comparison(written):
    _, comparison, _, page = written
    headers, rows = cells(comparison)
    assert page.tables[0] == [headers, *rows]
    assert all(note in page.text for note in comparison.notes)
    marked = [number for number, (tag, attrs) in enumerate(page.tags) if tag == "tr" and attrs == {"class": "baseline"}]
    assert len(marked) == 1


def test_what_compares_the_times_of_runs_can_be_left_out(written, tmp_path):
    folder, _, _, _ = written
    comparison = compare(
        [str(folder / "runs" / "full"), str(folder / "runs" / "sbld")], out=str(tmp_path), realised=False
    )
    page = Page((tmp_path / "comparison.html").read_text())
    assert page.tables[0][0] == cells(comparison, realised=False)[0]
    assert "realised" not in page.text


def test_it_loads_nothing(written):
    _, _, text, page = written
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"} == set()
    sources = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset", "style") if name in attrs]
    assert sources
    assert [source for source in sources if not source.startswith("data:image/png;base64,")] == []
    style = re.search("<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_what_comes_from_names_and_configs_is_text(written):
    _, _, text, page = written
    assert "<script" not in text
    assert HOSTILE in [row[0] for row in page.tables[0]]
    assert ["data.tokenizer", "byte", '<img src="https://example.org/x.png">', "byte"] in page.tables[1]


def test_it_shows_the_plots_that_are_saved(written):
    folder, _, _, page = written
    shown = {base64.b64decode(attrs["src"].partition(",")[2]) for tag, attrs in page.tags if tag == "img"}
    assert shown == {file.read_bytes() for file in (folder / "out").glob("*.png")}
    assert all(attrs["alt"] and int(attrs["width"]) > 700 for tag, attrs in page.tags if tag == "img")


def test_it_says_what_the_configs_differ_in(written):
    _, _, _, page = written
    header, *lines = page.tables[1]
    assert header == ["field", "full", HOSTILE, "sbld"]
    assert [line[0] for line in lines] == ["data.tokenizer", "training.seed", "drop.policy"]
    assert lines[-1][1:] == ["none", "pld", "sbld"]


def test_it_says_where_the_figures_are_from(written):
    folder, _, _, page = written
    lines = page.tables[2][1:]
    assert [line[1] for line in lines] == [str(folder / "runs" / name) for name in ("full", HOSTILE, "sbld")]
    metrics = Path(lines[2][1]) / "metrics.jsonl"
    assert lines[2][-1] == f"sha256 {hashlib.sha256(metrics.read_bytes()).hexdigest()[:16]}"
    assert lines[2][2:4] == ["7, 1234", "40"]


def test_seeds_of_a_row_are_listed_and_equal_configs_say_so(tmp_path):
    training = [TrainingConfig(seed=seed) for seed in (1, 2)]
    runs = [
        steady_run(tmp_path / f"{policy}-{kind.seed}", 0.5, 1.0, policy, 2.0, training=kind)
        for policy in ("none", "pld")
        for kind in training
    ]
    compare(runs, out=str(tmp_path / "out"))
    page = Page((tmp_path / "out" / "comparison.html").read_text())
    assert page.tables[1][1:] == [["training.seed", "1, 2", "1, 2"], ["drop.policy", "none", "pld"]]
    compare(runs[:1], out=str(tmp_path / "alone"))
    alone = Page((tmp_path / "alone" / "comparison.html").read_text())
    assert "Nothing but where the runs are written." in alone.text
    assert len(alone.tables) == 2
    assert json.loads((tmp_path / "alone" / "comparison.json").read_text())["baseline"] == "none-1"
