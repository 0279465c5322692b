"""What realised_gain.py writes: figures of the measured layouts as markdown, with everything needed to repeat them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.gain import Gain, Interval
from benchmarks.common.gain_plan import Case
from benchmarks.common.report import gain_text, number_text, run_lines

OVERHEAD_TARGET = 0.005  # of an iteration, at keep_prob 1


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


def report(results: Sequence[LayoutResult], config_lines: Sequence[str], seed: int) -> list[str]:
    """Markdown."""
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
        *run_lines(seed),
        *(f"- {line}" for line in config_lines),
    ]
    return header + [line for result in results for line in _section(result)]


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
            f"| {gain_text(gain.realised)} | {_or_dash(gain.ratio)} |"
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
            f"| {gain.ideal - 1:+.2%} | {_or_dash(gain.even_share)} | {gain_text(gain.realised)} "
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


def _or_dash(ratio: Interval | None) -> str:
    return "-" if ratio is None else number_text(ratio)
