"""The study's rows: rows.jsonl, a line for each finished run, and what they say of a method at a budget."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "rows.jsonl"
_CURVE_DIGITS = 5
_THINNED = 24


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All rows. Raises ValueError for a line that is none: the file is committed, so it can be mended."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else (), start=1):
        try:
            row = json.loads(line)
            row["key"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}:{number}: no row of the study: {error}") from error
        rows.append(row)
    return rows


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Add a row, in one write."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def executed_flops(metrics: Iterable[dict[str, Any]], fixed: float, per_layer: float) -> list[float]:
    """Cumulated FLOPs after each iteration: of the layers that ran, by their `kept` shares, and all else."""
    flops, total = [], 0.0
    for row in metrics:
        if "kept" in row:
            total += fixed + per_layer * sum(row["kept"])
            flops.append(total)
    return flops


def curve(metrics: Sequence[dict[str, Any]], flops: Sequence[float]) -> list[list[float]]:
    """[FLOPs, validation loss] of each validation, thinned to at most _THINNED points, the last one included."""
    points = [[flops[row["iteration"] - 1], row["valid_loss"]] for row in metrics if "valid_loss" in row]
    step = max(1, math.ceil(len(points) / _THINNED))
    thinned = points[::-1][::step][::-1]
    return [[float(f"{x:.{_CURVE_DIGITS}g}"), round(y, _CURVE_DIGITS)] for x, y in thinned]


@dataclass(frozen=True)
class Point:
    """A method at a budget with its best learning rate: mean over seeds."""

    method: str
    budget: float
    lr: float
    flops: float
    losses: tuple[float, ...]
    """Of each seed."""

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


class Results:
    """Rows by what they are. Several rows of one name (of other settings) count as the newest one."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = {row["name"]: row for row in rows}

    def of(self, **wanted: Any) -> list[dict[str, Any]]:
        """Rows with these values; the usual regime and decay unless others are wanted."""
        wanted = {"regime": "once", "decay": "WSD", **wanted}
        return [row for row in self.rows.values() if all(row[name] == value for name, value in wanted.items())]

    def loss(self, **wanted: Any) -> float | None:
        """Of the one row with these values; infinity if it diverged, None if it has not run."""
        found = self.of(**wanted)
        return loss_of(found[0]) if found else None

    def point(self, **wanted: Any) -> Point | None:
        """The point of a method and budget: of its best learning rate by the first seed, over all seeds."""
        rows = [row for row in self.of(**wanted) if math.isfinite(loss_of(row))]
        first = [row for row in rows if row["seed"] == 1]
        if not first:
            return None
        best = min(first, key=loss_of)
        same = sorted((row for row in rows if row["lr"] == best["lr"]), key=lambda row: row["seed"])
        flops = statistics.fmean(row["flops"] for row in same)
        return Point(best["method"], best["budget"], best["lr"], flops, tuple(loss_of(row) for row in same))

    def points(self, width: int, method: str, **wanted: Any) -> list[Point]:
        """All points of a method, by budget."""
        budgets = sorted({row["budget"] for row in self.of(width=width, method=method, **wanted)})
        found = [self.point(width=width, method=method, budget=budget, **wanted) for budget in budgets]
        return [point for point in found if point is not None]


def loss_of(row: dict[str, Any]) -> float:
    """Final loss; infinity where the run diverged."""
    return math.inf if row["loss"] is None else row["loss"]
