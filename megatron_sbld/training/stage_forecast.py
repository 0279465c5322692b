"""What layer dropping will leave each pipeline stage to do, and a placement of the layers that evens it.

Times are counted in layers' worth: a kept layer is 1, a dropped one 0, and the output layer with its loss, on the last
stage, as many as its FLOPs are (equations.md section 7). What a placement is worth is not read off expectations: the
run's own decisions are drawn for some of its iterations, and each of them takes as long as the 1F1B schedule does with
them (pipeline.py), the bubble included. Drawn one by one (sampler bernoulli), some stage is late in most iterations,
whatever the placement; that costs the proposal as much as it costs the present one. Transfers, the embedding, the
optimizer and memory are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sbld.drop_config import DropConfig
from megatron_sbld.pipeline import Floats
from megatron_sbld.placement import Placement, best_placement, imbalance, iteration_times, stage_loads
from megatron_sbld.plan import draw_plan
from megatron_sbld.policy import Policy
from megatron_sbld.training.forecast import Forecast, Phase, spread_iterations

WORTH_SAYING = 0.01
"""Share of an iteration below which a better placement is not worth a line."""

_PROBED = 200  # iterations of a phase whose keep probabilities are averaged
_DRAWN = 256  # iterations of the run whose decisions are drawn
_DRAWN_ROWS = 2**15  # microbatches whose decisions are drawn, where each has its own
_WIDTH = 14  # characters for the numbers of a stage's layers


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The pipeline of a run."""

    placement: Placement
    num_microbatches: int
    output_layers: float | None
    """The output layer with its loss in layers' worth of time; None where the vocabulary is not known."""
    balanced: list[list[int]] | None = None
    """1-based layers of the stages that the balanced sampler evens where these are not the placement's."""


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """What each pipeline rank has to do, and how it could be spread more evenly."""

    layers: list[list[int]]
    """1-based, of each rank."""
    phases: list[str]
    """Names of the phases before the recovery."""
    kept: list[list[float]]
    """Expected number of kept layers, [phases, ranks]."""
    kept_in_run: list[float]
    """The same over the whole run, the recovery included, [ranks]."""
    imbalance: float
    """By how much the busiest rank's expected work exceeds the mean, relative to it; the output layer included."""
    output_layers: float | None
    num_microbatches: int
    interleaved: bool
    balances_others: bool
    """Whether the balanced sampler evens other stages than these."""
    proposal: str | None
    """A layout that would save more than WORTH_SAYING of the iterations' time; None without one."""
    saved: float
    """The share that it would save; 0 without one."""


def stage_forecast(policy: Policy, drop: DropConfig, outlook: Forecast, pipeline: Pipeline) -> StageForecast:
    """The forecast for the pipeline of the run that `outlook` is of."""
    placement, output_layers = pipeline.placement, pipeline.output_layers or 0.0
    keep_probs = np.array([_mean_keep_probs(policy, phase) for phase in outlook.phases])  # [phases, L]
    lengths = [phase.last - phase.first + 1 for phase in outlook.phases]
    in_run = np.average(keep_probs, axis=0, weights=lengths)
    dropping = [i for i, phase in enumerate(outlook.phases) if phase.first < policy.first_recovery_iteration]
    proposal, saved = None, 0.0
    if not placement.is_interleaved and placement.num_ranks <= policy.num_layers:
        best = best_placement(in_run, placement.num_ranks, output_layers)
        share = _saved_share(policy, drop, outlook.total.last, pipeline, best)
        if share > WORTH_SAYING:
            proposal, saved = best.layout, share
    return StageForecast(
        layers=placement.stages,
        phases=[outlook.phases[i].name for i in dropping],
        kept=stage_loads(keep_probs[dropping], placement.stages).tolist(),
        kept_in_run=stage_loads(in_run, placement.stages).tolist(),
        imbalance=imbalance(stage_loads(in_run, placement.stages, output_layers)),
        output_layers=pipeline.output_layers,
        num_microbatches=pipeline.num_microbatches,
        interleaved=placement.is_interleaved,
        balances_others=pipeline.balanced is not None,
        proposal=proposal,
        saved=saved,
    )


def output_layers(phi: float | None, num_layers: int) -> float | None:
    """The output layer in layers' worth of FLOPs, from the layers' share phi of an iteration (flops.layer_share)."""
    return None if phi is None else num_layers * (1.0 - phi) / phi


def stage_forecast_text(stages: StageForecast) -> str:
    """A line for each stage, and below what is worth saying about them."""
    lines = [f"{'kept layers':<11}{'of':>16}" + "".join(f"{name:>8}" for name in [*stages.phases, "run"])]
    columns = np.array([*stages.kept, stages.kept_in_run]).T  # [ranks, phases + 1]
    for number, (layers, kept) in enumerate(zip(stages.layers, columns, strict=True), start=1):
        lines.append(f"{f'stage {number}':<11}{_numbers(layers):>16}" + "".join(f"{value:8.2f}" for value in kept))
    if stages.balances_others:
        lines.append("The balanced sampler evens other stages: drop.balance_stages, or those the run began with.")
    assumed = _assumptions(stages)
    if stages.proposal is not None:
        lines += [
            f"The stages are uneven. This placement of the layers would save {stages.saved:.1%} of an iteration:",
            f'    parallel.pipeline_model_parallel_layout: "{stages.proposal}"',
            f"({assumed}; a stage with more layers needs more memory)",
        ]
    elif stages.interleaved and stages.imbalance > WORTH_SAYING:
        lines += [
            f"The stages are uneven: the busiest has {stages.imbalance:.1%} more to do than the mean. No placement is "
            "proposed for",
            f"the interleaved schedule. ({assumed})",
        ]
    return "\n".join(lines)


def _mean_keep_probs(policy: Policy, phase: Phase) -> Floats:
    """Mean keep probability of each layer over a phase, [L]."""
    iterations = spread_iterations(phase.first, phase.last, _PROBED).tolist()
    return np.mean([policy.keep_probs(iteration) for iteration in iterations], axis=0)


def _saved_share(policy: Policy, drop: DropConfig, train_iters: int, pipeline: Pipeline, best: Placement) -> float:
    """Share of the run's time that another placement would save, with the decisions that the run will take."""
    if best == pipeline.placement:
        return 0.0
    drawn = _DRAWN
    if drop.decision_scope == "microbatch":
        drawn = max(16, min(drawn, _DRAWN_ROWS // pipeline.num_microbatches))
    iterations = spread_iterations(1, train_iters, drawn).tolist()
    present, other = (
        float(_iteration_times(policy, drop, iterations, pipeline, placement).sum())
        for placement in (pipeline.placement, best)
    )
    return 1.0 - other / present if present > 0.0 else 0.0


def _iteration_times(
    policy: Policy, drop: DropConfig, iterations: list[int], pipeline: Pipeline, placement: Placement
) -> Floats:
    """Times of the iterations in layers' worth, [iterations]."""
    stages = (pipeline.balanced or placement.stages) if drop.sampler == "balanced" else None
    kept = [
        draw_plan(
            policy.keep_probs(iteration),
            drop.seed,
            iteration,
            pipeline.num_microbatches,
            drop.decision_scope,
            drop.sampler,
            stages,
        )
        for iteration in iterations
    ]
    return iteration_times(np.array(kept), placement.stages, pipeline.output_layers or 0.0)


def _numbers(layers: list[int]) -> str:
    """The layers of a stage: 1-3, 7-9; how many where that is too long."""
    begins = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    pieces = [f"{begin}-{end}" if begin < end else f"{begin}" for begin, end in zip(begins, ends, strict=True)]
    text = ", ".join(pieces)
    return text if layers and len(text) <= _WIDTH else f"{len(layers)} layers"


def _assumptions(stages: StageForecast) -> str:
    if stages.output_layers is None:
        output = "the output layer is not counted"
    else:
        output = f"the output layer counts as {stages.output_layers:.1f} layers, by its FLOPs"
    return f"{output}; {stages.num_microbatches} microbatches"
