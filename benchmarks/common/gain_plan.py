"""The blocks of a run of realised_gain.py in their order, drawn from a seed: predict_check.py draws them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, order=True)
class Case:
    """What the dropped blocks of a pair do."""

    keep_prob: float
    sampler: str


@dataclass(frozen=True)
class Pair:
    """An undropped and a dropped block of the same length; an iteration whose layers are timed follows them."""

    case: Case
    undropped_first: bool
    dropped: range
    """The iterations of the dropped block."""


def all_cases(keep_probs: Sequence[float], samplers: Sequence[str]) -> list[Case]:
    """What has a pair of blocks in each round; without a drop there is nothing to sample."""
    return [Case(1.0, samplers[0])] + [Case(p, sampler) for p in keep_probs for sampler in samplers]


def count_iterations(cases: Sequence[Case], rounds: int, *, block_iterations: int, warmup: int) -> int:
    """Iterations of the whole run: warm-up, and in each round a pair of blocks and a timed iteration a case."""
    return warmup + rounds * len(cases) * (2 * block_iterations + 1)


def plan_rounds(
    cases: Sequence[Case], rounds: int, *, block_iterations: int, warmup: int, seed: int
) -> list[list[Pair]]:
    """The pairs of each round; fewer rounds are the beginning of more."""
    rng, iteration = np.random.default_rng(seed), warmup
    planned = []
    for number in range(rounds):
        undropped_first, pairs = number % 2 == 0, []
        for index in rng.permutation(len(cases)):
            start = iteration + 1 + (block_iterations if undropped_first else 0)
            pairs.append(Pair(cases[index], undropped_first, range(start, start + block_iterations)))
            iteration += 2 * block_iterations + 1
        planned.append(pairs)
    return planned
