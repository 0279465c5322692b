"""What realised_gain.py writes: figures of the measured layouts as markdown, with everything needed to repeat them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _gain import Gain, Interval

OVERHEAD_TARGET = 0.005  # of an iteration, at keep_prob 1
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Overhead:
    """What layer dropping adds to an iteration on the busiest rank when it drops nothing, in seconds."""

    begin_iteration: float
    decisions: float
    """All calls of an iteration together."""
    calls: int

    @property
    def total(self) -> float:
        return self.begin_iteration + self.decisions


@dataclass(frozen=True)
class LayoutResult:
    """What was measured on one parallel layout; times in seconds, of the undropped model unless said otherwise."""

    layout: str
    gains: dict[float, Gain]
    """By keep_prob; at 1 the switchable layers against stock ones."""
    iteration: float
    timed_iteration: float
    """An iteration whose layers are timed one by one."""
    layer_forward: float
    """Mean over layers, one microbatch."""
    layer_backward: float
    passes: float
    """The schedule's time from the first forward to the last backward pass, computed from the measured durations."""
    layers: float
    """The part of `passes` that dropping every layer would save."""
    num_microbatches: int
    overhead: Overhead
    rounds: int
    block_iterations: int
    load_average: tuple[float, float]
    """Over the last minute, before and after."""


def report(results: Sequence[LayoutResult], config_lines: Sequence[str], command: str, seed: int) -> str:
    """The whole markdown file."""
    header = [
        "# Realised over ideal gain of dropping layers",
        "",
        "How much of the time of the dropped layers is really saved? One run alternates blocks of undropped iterations "
        "(stock Megatron layers) and of iterations with a constant keep_prob; in between, single undropped iterations "
        "are timed layer by layer. Ideal gain = T / (T - time of the dropped layers, on the critical path); realised "
        "gain = undropped over dropped block time; ratio = (realised - 1) / (ideal - 1). In brackets: 95 % "
        "confidence intervals by bootstrap over the rounds. Tokens are random. The method: docstring of "
        "`benchmarks/realised_gain.py`.",
        "",
        *(f"- {line}" for line in [f"Command: `{command}`", *environment_lines(), f"Seed: {seed}", *config_lines]),
    ]
    return "\n".join(header + [line for result in results for line in _section(result)]) + "\n"


def environment_lines() -> list[str]:
    """Commit, date, hardware and versions."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    return [
        f"Commit: {_commit()}",
        f"Date: {time.strftime('%Y-%m-%d')}",
        f"Hardware: {_hardware()}",
        f"Software: Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{commit} with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else commit


def _hardware() -> str:
    cores = f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) a process"
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}; host {cores}"
    return cores


def cpu_model() -> str:
    """The processor's name as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _section(result: LayoutResult) -> list[str]:
    lines = ["", f"## {result.layout}", ""]
    lines += [
        "| keep_prob | layers kept | ideal gain | realised gain | ratio |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {keep_prob:g} | {gain.kept_fraction:.1%} | {gain.ideal - 1:+.2%} | {_percent(gain.realised)} "
        f"| {'-' if gain.ratio is None else _number(gain.ratio)} |"
        for keep_prob, gain in sorted(result.gains.items(), reverse=True)
    ]
    share, overhead = result.overhead.total / result.iteration, result.overhead
    verdict = "within" if share <= OVERHEAD_TARGET else "above"
    return [
        *lines,
        "",
        f"- Overhead at keep_prob 1, measured on the calls it adds: {overhead.total * 1e6:.0f} us an iteration = "
        f"{share:.3%} of it, {verdict} {OVERHEAD_TARGET:.1%} (begin_iteration {overhead.begin_iteration * 1e6:.0f} us, "
        f"{overhead.calls} decisions {overhead.decisions * 1e6:.0f} us).",
        f"- Undropped iteration: {result.iteration * 1e3:.1f} ms, {result.num_microbatches} microbatch(es) a replica; "
        f"{result.timed_iteration / result.iteration - 1:+.1%} when its layers are timed.",
        f"- A layer: {result.layer_forward * 1e3:.2f} ms forward, {result.layer_backward * 1e3:.2f} ms backward a "
        f"microbatch. Of an iteration, all layers on the critical path: {result.layers / result.iteration:.1%}; "
        f"forward and backward passes with embedding and logits: {result.passes / result.iteration:.1%}.",
        f"- {result.rounds} rounds of one pair of blocks of {result.block_iterations} iterations for each keep_prob; "
        f"load average {result.load_average[0]:.1f} before, {result.load_average[1]:.1f} after, this program's own "
        "processes included.",
    ]


def _percent(interval: Interval) -> str:
    return f"{interval.value - 1:+.2%} [{interval.low - 1:+.2%}, {interval.high - 1:+.2%}]"


def _number(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
