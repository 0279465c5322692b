"""The study's page: tables of losses and savings, and the plot of loss against FLOPs, all from the rows.

Prose that a person writes is in header.md, which comes first on the page and is left alone; without one the page
begins with a sentence that the figures choose.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import plots
from benchmarks.study.data import ROOT
from benchmarks.study.methods import METHODS
from benchmarks.study.plan import LAST, SECOND
from benchmarks.study.rows import Point, Results, loss_of
from benchmarks.study.saving import Estimate, saving, seed_deviation, share_needed
from benchmarks.study.settings import LAYERS, VOCABULARY, iteration_flops, parameters

HEADER = Path(__file__).resolve().parent / "header.md"
PAGE = ROOT / "benchmarks" / "results" / "study.md"
GOALS = {SECOND: 0.65, LAST: 0.90}
"""Share of the undropped FLOPs, by tokens a parameter, with which a method should reach the undropped loss."""


def write(rows: Sequence[dict[str, Any]], page: Path = PAGE, header: Path = HEADER) -> Path:
    """Write the page and its plot. Raises ValueError where there is nothing to report."""
    text = next((text for text, _ in Counter(row["text"] for row in rows).most_common(1)), None)
    used = [row for row in rows if row["text"] == text]
    results = Results(used)
    widths = sorted({row["width"] for row in results.of()})
    if not widths:
        raise ValueError("there are no rows yet: `run.py run` makes them")
    page.parent.mkdir(parents=True, exist_ok=True)
    plot = page.with_name(f"{page.stem}_loss.svg")
    plots.draw(results, widths, plot)
    own = header.read_text(encoding="utf-8").rstrip() if header.exists() else f"**{verdict(results, widths)}**"
    parts = ["# Loss against compute: which way of skipping layers pays", own]
    parts += [f"![loss against training FLOPs]({plot.name})", _facts(used, len(rows) - len(used))]
    for width in widths:
        parts += _width_section(results, width)
    parts += _decay_section(results, widths) + _epochs_section(results)
    parts += [*_tokens_section(results, page.with_name(f"{page.stem}_tokens.svg")), _negative(results, widths)]
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return page


def verdict(results: Results, widths: Sequence[int]) -> str:
    """For whom dropping layers pays, as far as the rows say: one sentence for each width."""
    sentences = []
    for width in widths:
        found = []
        for budget, goal in GOALS.items():
            best = _best_share(results, width, budget)
            if best is None:
                continue
            name, share = best
            beyond = share.high is not None and share.high < 1.0
            reaches = "reached" if share.high is not None and share.high <= goal else "missed"
            figure = (
                f"At width {width} (hidden size) and {budget:g} tokens a parameter, {name} needs {_percent(share)} of "
                "the undropped run's FLOPs to reach its loss"
            )
            if beyond:
                found.append(f"{figure} (goal: at most {goal:.0%}, whole interval; {reaches}).")
            else:
                found.append(f"{figure}, which is not beyond its interval.")
        sentences += found or [
            f"Width {width} (hidden size): no method has reached an undropped loss of the claims yet."
        ]
    return " ".join(sentences)


def _best_share(results: Results, width: int, budget: float) -> tuple[str, Estimate] | None:
    """The method that reaches the undropped loss of a budget with the smallest share of its FLOPs."""
    undropped = results.point(width=width, method="undropped", budget=budget)
    if undropped is None:
        return None
    deviation = _deviation(results, width)
    shares = {}
    for name in METHODS:
        share = None
        if name != "undropped":
            share = share_needed(results.points(width, name), undropped, deviation)
        if share is not None:
            shares[name] = share
    if not shares:
        return None
    best = min(shares, key=lambda name: shares[name].value)
    return best, shares[best]


def _deviation(results: Results, width: int) -> float | None:
    return seed_deviation([point for name in METHODS for point in results.points(width, name)])


def _facts(rows: Sequence[dict[str, Any]], left_out: int) -> str:
    dates = sorted(row["date"][:10] for row in rows)
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    hours = sum(row["cpu_s"] for row in rows) / 3600
    shown = {row["method"] for row in rows}
    lines = [
        "- Command: `python benchmarks/study/run.py run`, then `report`; every row of the study is a line of "
        "`benchmarks/study/rows.jsonl`",
        f"- Commits: {', '.join(commits)}",
        f"- Dates: {dates[0]} to {dates[-1]}; {len(rows)} runs, {hours:.1f} core hours",
        f"- Hardware: {'; '.join(dict.fromkeys(row['hardware'] for row in rows))}",
        f"- Seeds: {', '.join(map(str, sorted({row['seed'] for row in rows})))}, of weights, data order and decisions",
        f"- Models: {LAYERS} layers, 4 heads, sequence 128; "
        + "; ".join(
            f"width {width} (hidden size): vocabulary {VOCABULARY[width]}, {parameters(width):,} parameters, layers "
            f"{1 - iteration_flops(width, 0) / iteration_flops(width, LAYERS):.0%} of the FLOPs"
            for width in sorted({row["width"] for row in rows})
        ),
        "- Protocol: equal training FLOPs, counted from the layers that ran, logits included; AdamW, WSD with a linear "
        "decay over the last fifth; a learning rate for each method from 2e-3, 4e-3, 8e-3, and higher ones while the "
        "highest is the best, by successive halving at 1.3 and 5 tokens a parameter; each novel is read once. Loss: "
        "nats a token at full depth, of about 200,000 tokens of other novels, each with at least half of the context",
        "- Saving: 1 - FLOPs / FLOPs of undropped training to the same loss, interpolated over undropped runs that "
        "each have their own decay (PCHIP of log FLOPs over loss). Share: FLOPs of the method to the undropped loss, "
        "interpolated likewise over the method's own runs. The two differ where the curves bend between runs",
        "- Intervals are 95 %: each loss is drawn anew with the standard deviation between seeds, which is pooled over "
        "all points that have several seeds and taken for those that have one. The claimed methods were chosen by "
        "their first seed, which is one of the three",
        "- At equal FLOPs a run that skips layers takes more iterations and reads more text than the undropped run, "
        "whose tokens a parameter the tables give",
        "- Methods: " + "; ".join(f"{name}: {METHODS[name].says}" for name in METHODS if name in shown),
    ]
    return "\n".join([*lines, f"- Left out: {left_out} rows of other texts"] if left_out else lines)


def _width_section(results: Results, width: int) -> list[str]:
    frontier, deviation = results.points(width, "undropped"), _deviation(results, width)
    lines = [
        "| method | tokens a parameter, undropped | FLOPs | learning rate | seeds | loss | change | saving |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for budget in sorted({row["budget"] for row in results.of(width=width)}):
        undropped = results.point(width=width, method="undropped", budget=budget)
        for name in METHODS:
            point = results.point(width=width, method=name, budget=budget)
            if point is not None:
                lines.append(_row(point, undropped, frontier, deviation))
    shares = _share_table(results, width, deviation)
    between = "" if deviation is None else f"Standard deviation between seeds, pooled: {deviation:.4f}."
    return [f"## Width {width}", "\n".join(lines), between, shares]


def _row(point: Point, undropped: Point | None, frontier: Sequence[Point], deviation: float | None) -> str:
    change, saved = "", ""
    if point.method != "undropped":
        change = "" if undropped is None else f"{point.loss - undropped.loss:+.4f}"
        estimate = saving(point, frontier, deviation) if len(frontier) > 1 else None
        saved = "-" if estimate is None else _percent(estimate, "at least ")
    cells = [point.method, f"{point.budget:g}", f"{point.flops:.3g}", f"{point.lr:g}", str(len(point.losses))]
    return f"| {' | '.join([*cells, f'{point.loss:.4f}', change, saved])} |"


def _share_table(results: Results, width: int, deviation: float | None) -> str:
    """Which share of the undropped FLOPs each method needs for the undropped loss at the claims' budgets."""
    lines = []
    for name in METHODS:
        cells = []
        for budget in GOALS:
            undropped = results.point(width=width, method="undropped", budget=budget)
            share = None
            if undropped is not None and name != "undropped":
                share = share_needed(results.points(width, name), undropped, deviation)
            cells.append("-" if share is None else _percent(share, "at most "))
        if cells != ["-"] * len(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if not lines:
        return ""
    goals = " | ".join(f"{budget:g} tokens a parameter (goal {goal:.0%})" for budget, goal in GOALS.items())
    head = [f"| share of the undropped FLOPs to the undropped loss | {goals} |", "| :--- | ---: | ---: |"]
    return "\n".join(head + lines)


def _decay_section(results: Results, widths: Sequence[int]) -> list[str]:
    """The same points with a cosine in place of WSD."""
    lines = []
    for width in widths:
        for row in sorted(results.of(width=width, decay="cosine"), key=lambda row: (row["budget"], row["name"])):
            wsd = results.loss(width=width, method=row["method"], budget=row["budget"], lr=row["lr"], seed=row["seed"])
            if row["loss"] is not None and wsd is not None:
                cells = [str(width), row["method"], f"{row['budget']:g}", f"{row['loss']:.4f}", f"{wsd:.4f}"]
                lines.append(f"| {' | '.join(cells)} |")
    head = ["| width | method | tokens a parameter | cosine | WSD |", "| ---: | :--- | ---: | ---: | ---: |"]
    return ["## With a cosine, first seed", "\n".join(head + lines)] if lines else []


def _epochs_section(results: Results) -> list[str]:
    rows = sorted(results.of(regime="epochs"), key=lambda row: (row["budget"], row["loss"] or math.inf))
    if not rows:
        return []
    lines = [
        "| method | tokens a parameter, undropped | dropout | weight decay | iterations | stopped at | loss |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        cells = [row["method"], f"{row['budget']:g}", f"{row['dropout']:g}", f"{row['weight_decay']:g}"]
        cells += [f"{row['iterations']:,}", str(row["stopped_at"]), loss]
        lines.append(f"| {' | '.join(cells)} |")
    return ["## Many epochs of a small text, one seed, early stopping", "\n".join(lines)]


def _tokens_section(results: Results, plot: Path) -> list[str]:
    """Token dropping: all runs, their difference from the undropped mean, and loss against FLOPs as they train."""
    rows = results.of(regime="tokens")
    if not rows:
        return []
    undropped = [loss_of(row) for row in rows if row["method"] == "undropped"]
    lines = [
        "| method | equal | rate by | seed | iterations | FLOPs | loss | change |",
        "| :--- | :--- | :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        shared = ["-", "-"] if row["method"] == "undropped" else [row["equal"], row["lr_by"].replace("_", "-")]
        loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        change = ""
        if undropped and row["loss"] is not None and row["method"] != "undropped":
            change = f"{row['loss'] - statistics.fmean(undropped):+.4f}"
        cells = [
            row["method"],
            *shared,
            str(row["seed"]),
            f"{row['iterations']:,}",
            f"{row['flops']:.3g}",
            loss,
            change,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    plots.draw_curves(rows, plot)
    (width,) = {row["width"] for row in rows}
    layers = 1 - iteration_flops(width, 0, seq_length=512) / iteration_flops(width, LAYERS, seq_length=512)
    noise = ""
    if len(undropped) > 1:
        noise = f" Standard deviation between the seeds of the undropped run: {statistics.stdev(undropped):.4f}."
    about = (
        f"Width {width}, samples of 512 tokens, iterations of as many tokens as above; layers {layers:.0%} of FLOPs. "
        f"One learning rate, {rows[0]['lr']:g}, for all. Change: from the undropped mean.{noise}"
    )
    return ["## Token dropping", about, "\n".join(lines), f"![loss while training]({plot.name})"]


def _negative(results: Results, widths: Sequence[int]) -> str:
    """Methods that lose to undropped training of equal compute, beyond the interval of two means."""
    lines = []
    for width in widths:
        deviation = _deviation(results, width)
        if deviation is None:
            continue
        for budget in GOALS:
            undropped = results.point(width=width, method="undropped", budget=budget)
            for name in METHODS if undropped is not None else ():
                point = results.point(width=width, method=name, budget=budget)
                if point is None or undropped is None or name == "undropped":
                    continue
                worse = point.loss - undropped.loss
                noise = 1.96 * deviation * math.sqrt(1 / len(point.losses) + 1 / len(undropped.losses))
                if worse > noise:
                    said = f"{worse:+.4f} +- {noise:.4f} at width {width} and {budget:g} tokens a parameter"
                    lines.append(f"- {name} ({METHODS[name].says}): {said}")
    return "\n".join(["## Negative: worse than undropped training of equal FLOPs", "", *lines]) if lines else ""


def _percent(estimate: Estimate, bound: str = "") -> str:
    interval = "" if estimate.low is None else f" ({estimate.low:.0%} to {estimate.high:.0%})"
    return f"{bound if estimate.is_bound else ''}{estimate.value:.0%}{interval}"
