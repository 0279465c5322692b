"""Placements of the layers on which a drop section gains more than on the config's own.

The search begins with the better of the config's placement and the one that evens the expected work (placement.py), and
moves layers across one cut at a time while the drawn decisions of the section's own sampler become faster in some of
the run's iterations; as many as for any prediction decide in the end. Where recompute_method uniform cuts stages into
pieces, whole pieces are moved. What validation refuses is not proposed; what does not fit into memory where the
config's own placement does is returned as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_sbld.config.sections import Config
from megatron_sbld.config.stages import placement_problems, recomputed_layers_problems
from megatron_sbld.layout.placement import Placement, best_placement
from megatron_sbld.method.config import DropConfig
from megatron_sbld.predict.gain import Prediction, Predictor
from megatron_sbld.predict.iteration import IterationModel
from megatron_sbld.predict.memory import RankMemory, rank_memory

_LEAST_GAIN = 0.001  # of throughput, for a proposal
_SEARCHED_ITERATIONS = 128
_SEARCHED_PLACEMENTS = 64
_SEARCHED_PASSES = 2**18  # that are simulated at most; of large pipelines few placements are searched


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A placement on which a drop section gains more."""

    placement: Placement
    prediction: Prediction
    worst: RankMemory
    """Of the stage that needs the most memory."""
    fits: bool
    """False: `worst` needs more than a GPU has, and no stage of the config's placement does."""


def propose_placement(predictor: Predictor, drop: DropConfig) -> Proposal | None:
    """None without stages, with more of them than layers, for interleaved ones, or where none gains more.

    drop: with the sampler that the placement is for; policy none proposes for the undropped model.
    """
    own = predictor.setup.placement
    pieces = predictor.setup.config.model.num_layers // _piece(predictor.setup.config)
    if own.num_ranks == 1 or own.is_interleaved or own.num_ranks > pieces:
        return None
    even = _even_work(predictor, drop)
    candidates = [even, _search(predictor, drop, even)]
    predictions = {
        placement: predictor.predict(drop, placement)
        for placement in dict.fromkeys(candidates)
        if placement != own and _is_allowed(predictor.setup.config, placement)
    }
    if not predictions:
        return None
    found, prediction = max(predictions.items(), key=lambda item: item[1].gain)
    if prediction.gain < predictor.predict(drop).gain + _LEAST_GAIN:
        return None
    capacity = predictor.setup.hardware.memory_gb
    worst, own_worst = (worst_stage(model) for model in (predictor.on(found), predictor.model))
    fits = worst.total <= capacity or own_worst.total > capacity
    return Proposal(placement=found, prediction=prediction, worst=worst, fits=fits)


def worst_stage(model: IterationModel) -> RankMemory:
    """The stage that needs the most memory with every layer kept."""
    return max(rank_memory(model), key=lambda rank: rank.total)


def _search(predictor: Predictor, drop: DropConfig, even: Placement) -> Placement:
    """The fastest placement that is found, by the decisions of some of the run's iterations.

    even: the placement that evens the expected work.
    """
    setup = predictor.setup
    sampled = predictor.sampled(drop)
    iterations = sampled[:: max(1, len(sampled) // _SEARCHED_ITERATIONS)]
    passes = 2 * setup.num_microbatches * setup.placement.num_ranks * predictor.distinct_replicas(drop)
    most = max(2, min(_SEARCHED_PLACEMENTS, _SEARCHED_PASSES // passes))
    seconds: dict[Placement, float] = {}

    def faster(candidate: Placement, than: Placement) -> bool:
        for placement in (than, candidate):
            if placement not in seconds:
                seconds[placement] = predictor.iteration_s(drop, placement, iterations)
        return seconds[candidate] < seconds[than] * (1.0 - 1e-6)

    best = setup.placement
    if _is_allowed(setup.config, even) and faster(even, best):
        best = even
    moved = True
    while moved:
        moved = False
        for candidate in _neighbours(best, _piece(setup.config)):
            if len(seconds) >= most:
                return best
            if candidate not in seconds and _is_allowed(setup.config, candidate) and faster(candidate, best):
                best, moved = candidate, True
                break
    return best


def _even_work(predictor: Predictor, drop: DropConfig) -> Placement:
    """The placement that evens the expected work of the stages."""
    policy, piece = predictor.policy(drop), _piece(predictor.setup.config)
    work = predictor.work(drop, policy)
    keep_probs = np.mean([work.flops(iteration) for iteration in predictor.sampled(drop)], axis=0)
    costs = predictor.model.costs
    layer = costs.layer_forward.total + float(predictor.model.layer_backward.mean())
    output = (costs.output_forward + costs.output_backward).total / layer
    in_pieces = keep_probs.reshape(-1, piece).sum(axis=1)
    placement = best_placement(in_pieces, predictor.setup.placement.num_ranks, output)
    return Placement(tuple(piece * count for count in placement.layers_per_chunk), placement.num_ranks)


def _piece(config: Config) -> int:
    """How many layers can only be moved together."""
    training = config.training
    uniform = training.recompute_granularity == "full" and training.recompute_method == "uniform"
    return (training.recompute_num_layers or 1) if uniform else 1


def _neighbours(placement: Placement, piece: int) -> Iterator[Placement]:
    """Every placement with one piece of a stage moved to the stage before or after it."""
    counts = placement.layers_per_chunk
    for left in range(len(counts) - 1):
        for moved in (piece, -piece):
            changed = list(counts)
            changed[left] += moved
            changed[left + 1] -= moved
            if min(changed) >= 0:
                yield Placement(tuple(changed), placement.num_ranks)


def _is_allowed(config: Config, placement: Placement) -> bool:
    """Whether training takes the config with this placement."""
    training = config.training
    parallel = dataclasses.replace(config.parallel, pipeline_model_parallel_layout=placement.layout)
    changed = dataclasses.replace(config, parallel=parallel)
    if placement_problems(changed):
        return False
    method, number = training.recompute_method, training.recompute_num_layers
    if training.recompute_granularity != "full" or method is None or number is None:
        return True
    return not recomputed_layers_problems(changed, method, number)
