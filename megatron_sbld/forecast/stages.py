"""What layer dropping will leave each pipeline stage to do, and a placement of the layers that evens it.

Times are counted in layers' worth: a kept layer is 1, a dropped one 0, one that some samples or tokens of a microbatch
run their share, and the output layer with its loss, on the last stage, as many as its FLOPs are (docs/method.md 7).
What a placement is worth is not read off expectations: the decisions that the run will take are drawn for some of its
iterations, and each of these takes as long as the 1F1B schedule does with them (pipeline.py), the bubble included. With
independent draws (sampler bernoulli) some stage is late in most iterations on any placement, so that even expectations
gain less. Transfers, the embedding, the optimizer and memory are not counted.

The stages of a run whose layers begin one after the other (method/stages.py) are phases here. Which layers they run is
shared out among the pipeline's ranks, so another placement would run others, and none is proposed; predict/ does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sbld.config.sections import Config
from megatron_sbld.config.stages import placement_of
from megatron_sbld.forecast.drops import Forecast, Phase, spread_iterations
from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.layout.placement import (
    Placement,
    best_placement,
    even_placement,
    imbalance,
    iteration_times,
    layer_ranges,
    stage_loads,
)
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.decisions import draw_sample_counts
from megatron_sbld.method.in_force import drops
from megatron_sbld.method.policy import Policy
from megatron_sbld.method.work import Work

WORTH_SAYING = 0.01
"""Share of an iteration below which a better placement is not worth a line."""

_PROBED = 200  # iterations of a phase whose keep probabilities are averaged
_DRAWN = 256  # iterations of the run whose decisions are drawn
_DRAWN_ROWS = 2**15  # microbatches whose decisions are drawn, where each has its own
_WIDTH = 14  # characters for the numbers of a stage's layers


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """What each pipeline rank has to do, and how it could be spread more evenly."""

    layers: list[list[int]]
    """1-based, of each rank."""
    phases: list[str]
    """Names of the phases before the recovery."""
    kept: list[list[float]]
    """Expected number of kept layers, [phases, ranks]."""
    begun: list[list[list[int]]] | None
    """Layers that have begun by the end of each phase, [phases, ranks, layers]; None without stages that begin one
    after the other."""
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


def stage_forecast(
    config: Config,
    policy: Policy,
    outlook: Forecast,
    phi: float | None,
    replicas: int = 1,
    balanced: int | Sequence[Sequence[int]] | None = None,
    work: Work | None = None,
) -> StageForecast | None:
    """The forecast for a run on several pipeline stages; None for one that has a single stage or drops nothing.

    Args:
        config: the run.
        policy: its policy.
        outlook: its forecast (drops.py).
        phi: the layers' share of an iteration (flops.layer_share), or None if it is not known.
        replicas: data-parallel size.
        balanced: what the balanced sampler evens; None is drop.balance_stages, or the pipeline's stages.
        work: of the policy, where tokens are dropped too: layers count by their share of the FLOPs then.
    """
    work = work or Work(policy)
    placement = placement_of(config)
    if placement.num_ranks == 1 or not drops(config.drop):
        return None
    keep_probs = np.array([_mean_flops(work, phase) for phase in outlook.phases])  # [phases, L]
    lengths = [phase.last - phase.first + 1 for phase in outlook.phases]
    in_run = np.average(keep_probs, axis=0, weights=lengths)
    dropping = [i for i, phase in enumerate(outlook.phases) if phase.first < policy.first_recovery_iteration]
    training = config.training
    run = _Run(
        drop=config.drop,
        work=work,
        train_iters=outlook.total.last,
        num_microbatches=max(1, training.global_batch_size // (training.micro_batch_size * replicas)),
        num_samples=training.micro_batch_size if config.drop.granularity == "sample" else 1,
        # As many as have the output layer's FLOPs (docs/method.md section 7).
        output_layers=None if phi is None else policy.num_layers * (1.0 - phi) / phi,
        balanced=_fixed_stages(config.drop, placement, balanced),
    )
    proposal, saved = _propose(run, placement, in_run)
    return StageForecast(
        layers=placement.stages,
        phases=[outlook.phases[i].name for i in dropping],
        kept=stage_loads(keep_probs[dropping], placement.stages).tolist(),
        begun=None if policy.stages is None else [_begun(policy, outlook.phases[i], placement) for i in dropping],
        kept_in_run=stage_loads(in_run, placement.stages).tolist(),
        imbalance=imbalance(stage_loads(in_run, placement.stages, run.output_layers or 0.0)),
        output_layers=run.output_layers,
        num_microbatches=run.num_microbatches,
        interleaved=placement.is_interleaved,
        balances_others=run.balanced not in (None, placement.stages),
        proposal=proposal,
        saved=saved,
    )


def stage_forecast_text(stages: StageForecast) -> str:
    """A line for each stage, and below what is worth saying about them."""
    # Where phases are called stages, what the pipeline has are ranks.
    piece = "stage" if stages.begun is None else "rank"
    width = max(8, *(len(name) + 1 for name in stages.phases)) if stages.phases else 8
    lines = [f"{'kept on':<11}{'of layers':>16}" + "".join(f"{name:>{width}}" for name in [*stages.phases, "run"])]
    columns = np.array([*stages.kept, stages.kept_in_run]).T  # [ranks, phases + 1]
    for number, (layers, kept) in enumerate(zip(stages.layers, columns, strict=True), start=1):
        counts = "".join(f"{value:{width}.2f}" for value in kept)
        lines.append(f"{f'{piece} {number}':<11}{_numbers(layers):>16}{counts}")
    if stages.balances_others:
        lines.append("The balanced sampler balances other stages: drop.balance_stages, or the run's first ones.")
    if stages.proposal is not None:
        lines += [
            f"The stages are uneven. This placement would save {stages.saved:.1%} of an iteration:",
            f'    parallel.pipeline_model_parallel_layout: "{stages.proposal}"',
            f"({stages.num_microbatches} microbatches; {_output(stages)}; a larger stage needs more memory)",
        ]
    elif (stages.interleaved or stages.begun is not None) and stages.imbalance > WORTH_SAYING:
        proposed = "No placement is proposed for interleaved stages."
        if not stages.interleaved:
            proposed = "`megatron-sbld predict` looks for a better placement."
        lines += [
            f"The {piece}s are uneven: the busiest has {stages.imbalance:.1%} more to do than the mean",
            f"({_output(stages)}). {proposed}",
        ]
    return "\n".join(lines)


def _mean_flops(work: Work, phase: Phase) -> Floats:
    """Mean expected share of each layer's FLOPs over a phase, [L]."""
    iterations = spread_iterations(phase.first, phase.last, _PROBED).tolist()
    return np.asarray(np.mean([work.flops(iteration) for iteration in iterations], axis=0))


def _begun(policy: Policy, phase: Phase, placement: Placement) -> list[list[int]]:
    begun = policy.begun_layers(phase.last)
    return [sorted(begun & set(layers)) for layers in placement.stages]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What decides how long iterations take, but for the placement."""

    drop: DropConfig
    work: Work
    train_iters: int
    num_microbatches: int
    num_samples: int
    """Of a microbatch, with granularity sample; else 1, which a layer runs or not."""
    output_layers: float | None
    balanced: list[list[int]] | None
    """Stages that the balanced sampler evens whatever the placement; None where it follows the placement."""


def _fixed_stages(
    drop: DropConfig, placement: Placement, balanced: int | Sequence[Sequence[int]] | None
) -> list[list[int]] | None:
    """What the balanced sampler will even on any placement: what the config or, resumed, the run's beginning says."""
    stages = drop.balance_stages if balanced is None else balanced
    if drop.sampler != "balanced" or stages is None:
        return None
    if isinstance(stages, int):
        return even_placement(sum(placement.layers_per_chunk), stages).stages
    as_lists = [list(stage) for stage in stages]
    return None if as_lists == placement.stages else as_lists


def _propose(run: _Run, placement: Placement, keep_probs: Floats) -> tuple[str | None, float]:
    """(layout, share of the run's time that it saves) where that is worth saying, else (None, 0)."""
    if placement.is_interleaved or placement.num_ranks > len(keep_probs) or run.work.policy.stages is not None:
        return None, 0.0
    best = best_placement(keep_probs, placement.num_ranks, run.output_layers or 0.0)
    if best == placement:
        return None, 0.0
    drawn = _DRAWN
    if run.drop.decision_scope == "microbatch":
        drawn = max(16, min(drawn, _DRAWN_ROWS // run.num_microbatches))
    iterations = spread_iterations(1, run.train_iters, drawn).tolist()
    present, other = (float(_iteration_times(run, iterations, stages).sum()) for stages in (placement, best))
    saved = 1.0 - other / present if present > 0.0 else 0.0
    return (best.layout, saved) if saved > WORTH_SAYING else (None, 0.0)


def _iteration_times(run: _Run, iterations: list[int], placement: Placement) -> Floats:
    """Times of the iterations with the decisions that the run will take, in layers' worth, [iterations]."""
    stages = run.balanced or placement.stages
    kept = [
        drawn_shares(
            run.drop, run.work.policy.keep_probs(iteration), iteration, run.num_microbatches, stages, run.num_samples
        )
        * run.work.flops_of(run.work.token_shares(iteration))
        for iteration in iterations
    ]
    return iteration_times(np.array(kept), placement.stages, run.output_layers or 0.0)


def drawn_shares(
    drop: DropConfig,
    keep_probs: Floats,
    iteration: int,
    num_microbatches: int,
    stages: list[list[int]],
    num_samples: int = 1,
    replica: int = 0,
) -> Floats:
    """What share of each microbatch each layer runs, with the decisions that a run takes, [m, L].

    stages: layers that the balanced sampler balances.  num_samples: of a microbatch; 1 unless granularity is sample.
    replica: with replicas distinct, whose decisions.
    """
    counts = draw_sample_counts(
        keep_probs,
        num_samples=num_samples,
        seed=drop.seed,
        iteration=iteration,
        num_microbatches=num_microbatches,
        scope=drop.decision_scope,
        sampler=drop.sampler,
        stages=stages if drop.sampler == "balanced" else None,
        replica=replica,
    )
    return counts / num_samples


def _numbers(layers: list[int]) -> str:
    """The layers of a stage: 1-3, 7-9; how many where that is too long."""
    text = layer_ranges(layers)
    return text if layers and len(text) <= _WIDTH else f"{len(layers)} layers"


def _output(stages: StageForecast) -> str:
    counted = "not counted" if stages.output_layers is None else f"= {stages.output_layers:.1f} layers"
    return f"output layer {counted}"
