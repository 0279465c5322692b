"""What a prediction finds out; computed by command.py, shown by report.py."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sbld.predict.gain import Prediction
from megatron_sbld.predict.iteration import Setup
from megatron_sbld.predict.memory import RankMemory
from megatron_sbld.predict.propose import Proposal
from megatron_sbld.predict.target import Target


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that the command found out."""

    setup: Setup
    assumed_mfu: float | None
    """None where a throughput was measured."""
    efficiency: float
    baseline_s: float
    baseline_imbalance: float
    tokens_per_s: float
    hours: float
    parts: dict[str, float]
    """Seconds of an undropped iteration on the busiest rank."""
    train_iters: int
    predictions: list[Prediction]
    """Of the config's drop section, with each sampler that there is a choice of, and on the placements proposed for
    them; policy none is the undropped model there."""
    proposals: list[Proposal]
    """Placements on which they gain more, also those that do not fit."""
    undropped_proposal: Proposal | None
    """A placement on which the undropped model gains."""
    compared: list[Prediction]
    memory: list[RankMemory]
    target: Target | None
