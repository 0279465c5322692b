"""What realised_gain.py writes: figures of the measured layouts as markdown, with everything needed to repeat them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _gain import Gain, Interval

OVERHEAD_TARGET = 0.005  # of an iteration, at keep_prob 1
ROOT = Path(__file__).resolve().parent.parent


def publish(text: str, out: Path) -> None:
    """Write a report into a file and show it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text, end="")
    print(f"written to {out}", file=sys.stderr)


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


@dataclass(frozen=True, order=True)
class Case:
    """What the dropped blocks of a pair do."""

    keep_prob: float
    sampler: str


@dataclass(frozen=True)
class LayoutResult:
    """What was measured on one parallel layout; times in seconds, of the undropped model unless said otherwise."""

    layout: str
    num_stages: int
    gains: dict[Case, Gain]
    """At keep_prob 1 the switchable layers against stock ones."""
    sampler_differences: dict[float, tuple[Interval, Interval]]
    """By keep_prob: how much higher the balanced sampler's realised / even is than bernoulli's, and its critical path /
    even; empty unless both were measured on several stages."""
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


def environment_lines(packages: Sequence[str] = ("torch", "megatron-core")) -> list[str]:
    """Commit, date, hardware and versions."""
    versions = {name: importlib.metadata.version(name) for name in packages}
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
    share, overhead = result.overhead.total / result.iteration, result.overhead
    verdict = "within" if share <= OVERHEAD_TARGET else "above"
    return [
        "",
        f"## {result.layout}",
        "",
        *(_table(result) if result.num_stages == 1 else _pipeline_table(result)),
        "",
        f"- Overhead at keep_prob 1, measured on the calls it adds: {overhead.total * 1e6:.0f} us an iteration = "
        f"{share:.3%} of it, {verdict} {OVERHEAD_TARGET:.1%} (begin_iteration {overhead.begin_iteration * 1e6:.0f} us, "
        f"{overhead.calls} decisions {overhead.decisions * 1e6:.0f} us).",
        f"- Undropped iteration: {result.iteration * 1e3:.1f} ms, {result.num_microbatches} microbatch(es) a replica; "
        f"{result.timed_iteration / result.iteration - 1:+.1%} when its layers are timed.",
        f"- A layer: {result.layer_forward * 1e3:.2f} ms forward, {result.layer_backward * 1e3:.2f} ms backward a "
        "microbatch. Of a timed iteration, all layers on the critical path: "
        f"{result.layers / result.timed_iteration:.1%}; forward and backward passes with embedding and "
        f"logits: {result.passes / result.timed_iteration:.1%}.",
        f"- {result.rounds} rounds of one pair of blocks of {result.block_iterations} iterations for each row; "
        f"load average {result.load_average[0]:.1f} before, {result.load_average[1]:.1f} after, this program's own "
        "processes included.",
    ]


def _table(result: LayoutResult) -> list[str]:
    """One stage: what is dropped is saved wherever it is, so the sampler plays no role for the ideal gain."""
    return [
        "| keep_prob | sampler | layers kept | ideal gain | realised gain | ratio |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {case.keep_prob:g} | {case.sampler} | {gain.kept_fraction:.1%} | {gain.ideal - 1:+.2%} "
            f"| {percent_text(gain.realised)} | {_or_dash(gain.ratio)} |"
            for case, gain in sorted(result.gains.items(), reverse=True)
        ),
    ]


def _pipeline_table(result: LayoutResult) -> list[str]:
    """Several stages: beside the wall time, what the critical path of the decisions leaves of an even spread's gain."""
    return [
        "| keep_prob | sampler | layers kept | ideal gain, kept layers spread evenly | ideal gain, critical path of "
        "the decisions | critical path / even | realised gain | realised / even | realised / critical path |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {case.keep_prob:g} | {case.sampler} | {gain.kept_fraction:.1%} | {gain.even_ideal - 1:+.2%} "
            f"| {gain.ideal - 1:+.2%} | {_or_dash(gain.even_share)} | {percent_text(gain.realised)} "
            f"| {_or_dash(gain.even_ratio)} | {_or_dash(gain.ratio)} |"
            for case, gain in sorted(result.gains.items(), reverse=True)
        ),
        *_sampler_lines(result),
        "",
        "Spread evenly: every stage would drop the same share of its layers' time. Critical path: the 1F1B schedule "
        "with the measured times of each stage's kept layers, which does not depend on whether processes share cores; "
        "the wall time, and with it the realised gain, does.",
    ]


def _sampler_lines(result: LayoutResult) -> list[str]:
    lines = [
        f"- keep_prob {keep_prob:g}, balanced less bernoulli: realised / even {number_text(realised, '+.3f')}, "
        f"critical path / even {number_text(path, '+.3f')}"
        for keep_prob, (realised, path) in sorted(result.sampler_differences.items(), reverse=True)
    ]
    return ["", *lines] if lines else []


def percent_text(gain: Interval) -> str:
    """A gain and its interval as percentages."""
    return f"{gain.value - 1:+.2%} [{gain.low - 1:+.2%}, {gain.high - 1:+.2%}]"


def number_text(ratio: Interval, form: str = ".3f") -> str:
    """A ratio and its interval."""
    return f"{ratio.value:{form}} [{ratio.low:{form}}, {ratio.high:{form}}]"


def _or_dash(ratio: Interval | None) -> str:
    return "-" if ratio is None else number_text(ratio)
