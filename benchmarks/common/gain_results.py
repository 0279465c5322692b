"""The committed results of realised_gain.py, read for predict_check.py: what was measured and dropped when."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from benchmarks.common.gain_plan import Case, all_cases, plan_rounds
from benchmarks.common.layouts import FIRST_STAGE, SAMPLERS, TOKENS
from benchmarks.common.report import RESULTS

MEASURED = (
    "realised_gain_gpu.md",
    "realised_gain_cpu_1_process.md",
    "realised_gain_cpu.md",
    "realised_gain_distributed_cpu.md",
)
GPUS = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100"}
"""Those of MEASURED, as torch and as predict name them."""
SEED = 1234  # of all of them


@dataclass(frozen=True)
class Row:
    """A measured row. Gains less 1."""

    file: str
    layout: str
    keep_prob: float
    sampler: str
    kept: float
    critical_path: float
    """Ideal gain on the critical path, by the measured times of its layers."""
    realised: float
    low: float
    high: float


@dataclass(frozen=True)
class Section:
    """A layout of a result file."""

    title: str
    gpu: str | None
    """Its name in predict, None on CPUs."""
    samplers: tuple[str, ...]
    iteration: float
    """Seconds of an undropped one."""
    layers: float
    """Share that all layers have on the critical path, of an iteration in which they are timed."""
    rounds: int
    """As many as were done: fewer than asked for where time ran out."""
    rows: list[Row]


def read_results(file: str) -> tuple[dict[str, Any], list[Section]]:
    """The command's options, and the layouts."""
    text = (RESULTS / file).read_text(encoding="utf-8")
    words = shlex.split(re.search(r"Command: `(.*)`", text)[1])  # type: ignore[index]
    gpu = re.search(r"Hardware: 1 x ([^;]*);", text)
    options: dict[str, Any] = {"keep_probs": [0.9, 0.8, 0.7, 0.5], "block_iterations": 3, "warmup": 6}
    for name, kind in (("--block-iterations", int), ("--warmup", int)):
        if name in words:
            options[name[2:].replace("-", "_")] = kind(words[words.index(name) + 1])
    if "--keep-probs" in words:
        after = words[words.index("--keep-probs") + 1 :]
        options["keep_probs"] = [float(word) for word in after[: [w[:2] == "--" for w in after].index(True)]]
    sections = []
    for part in text.split("\n## ")[1:]:
        title = part.splitlines()[0]
        rows = [read_row(file, title, line) for line in part.splitlines() if re.match(r"\| [\d.]+ \|", line)]
        seconds = float(re.search(r"Undropped iteration: ([\d.]+) ms", part)[1]) / 1e3  # type: ignore[index]
        share = float(re.search(r"all layers on the critical path: ([\d.]+)%", part)[1]) / 100  # type: ignore[index]
        if "Of an iteration, all layers" in part:  # a timed one's seconds over those of one that was not
            share /= 1 + float(re.search(r"([+-][\d.]+)% when its layers are timed", part)[1]) / 100  # type: ignore[index]
        rounds = int(re.search(r"^- (\d+) rounds of ", part, re.MULTILINE)[1])  # type: ignore[index]
        samplers = tuple(dict.fromkeys(row.sampler for row in rows))
        rows = [row for row in rows if row.keep_prob < 1]
        sections.append(Section(title, GPUS[gpu[1]] if gpu else None, samplers, seconds, share, rounds, rows))
    return options, sections


def read_row(file: str, title: str, line: str) -> Row:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    sampler = cells.pop(1) if cells[1] in (*SAMPLERS, FIRST_STAGE, TOKENS) else "bernoulli"
    percent = [float(number) / 100 for number in re.findall(r"[+-]?[\d.]+(?=%)", " | ".join(cells))]
    # kept, then one ideal gain or (even, critical path), then realised with its limits; ratios have no percent sign.
    kept, *ideals, realised, low, high = percent
    return Row(file, title, float(cells[0]), sampler, kept, ideals[-1], realised, low, high)


def dropped_iterations(options: dict[str, Any], rounds: int, samplers: tuple[str, ...]) -> dict[Case, list[int]]:
    """In which iterations of a run each case dropped layers."""
    cases = all_cases(options["keep_probs"], samplers)
    lengths = {name: options[name] for name in ("block_iterations", "warmup")}
    found: dict[Case, list[int]] = {case: [] for case in cases}
    for pairs in plan_rounds(cases, rounds, **lengths, seed=SEED):
        for pair in pairs:
            found[pair.case] += pair.dropped
    return found
