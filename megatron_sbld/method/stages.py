"""Stages: which layers have begun, as training goes on (docs/method.md 8; "zero/one-layer growth", arXiv 2511.04981).

A run starts with a few of its layers and lets the others begin later. Stage i ends after iteration
floor(round(f_i T, 6)); its set of layers A_i is part of the next one's, and the last one's is the whole model. The gate
of a layer is 1 once it has begun, else 0; a policy's keep probabilities are multiplied by it (policy.py). How a layer
that has not begun is kept from moving, and what it begins as, is mcore/skip/growth.py's.

Layers are numbered 1..L, iterations t = 1..T; t = 0 is the state before the first one, which has the first stage's set.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sbld.checks import check_integer, check_keys, check_layers, check_number
from megatron_sbld.method.choices import StageRule

StageLayers = StageRule | Sequence[int]
"""A rule, or layers in the order in which they begin."""


@dataclass(frozen=True)
class Stages:
    """Nested sets of layers and the iterations at which each one ends. Make it with `Stages.resolve`.

    ends: last iteration of each stage, ascending; a stage that ends before it starts (share 0) is passed over.
    sets: layers of each stage, ascending, each part of the next; the last has all L.
    asked: what they were resolved from: the numbers of layers, and a rule or list.
    begun_before: layers that had begun in a run that this one goes on from; they stay, whatever the stages say.
    """

    ends: tuple[int, ...]
    sets: tuple[tuple[int, ...], ...]
    asked: tuple[Any, ...] = ()
    begun_before: frozenset[int] = frozenset()

    @classmethod
    def resolve(
        cls,
        stages: Sequence[Sequence[float]],
        num_layers: int,
        train_iters: int,
        stage_layers: StageLayers = "spread",
        *,
        ranks: Sequence[Sequence[int]] | None = None,
        sensitivity: ArrayLike | None = None,
    ) -> Stages:
        """The stages of a run of T iterations.

        stages: [share of the iterations at which it ends, number of layers that run until then], for each stage; both
            ascend, and the last is [1.0, L].
        stage_layers: which layers begin first. `spread` thins the next stage's set evenly. Layers that a list leaves
            out begin in the last stage.
        ranks: layers of each pipeline rank. Each rank that has layers runs its share of each stage, at least one layer,
            so a stage has as many layers as there are such ranks, even where fewer are asked for. None is one rank.
        sensitivity: [L], for `stage_layers` sensitivity.

        Raises ValueError naming `stages` or `stage_layers`, the value and what is allowed.

        >>> Stages.resolve([[0.5, 1], [0.8, 3], [1.0, 6]], num_layers=6, train_iters=100).sets
        ((1,), (1, 3, 5), (1, 2, 3, 4, 5, 6))
        """
        checked = check_stages(stages, num_layers)
        check_integer("train_iters", train_iters, 1)
        counts = [count for _, count in checked]
        rule = _checked_rule(stage_layers, num_layers, counts)
        if rule == "sensitivity" and (sensitivity is None or np.shape(sensitivity) != (num_layers,)):
            raise ValueError("stage_layers = 'sensitivity' needs a sensitivity file: one value for each layer")
        held = [sorted(rank) for rank in ranks or [range(1, num_layers + 1)] if len(rank)]
        shares = [_shares(count, [len(rank) for rank in held]) for count in counts]
        picked = [
            _nested([share[index] for share in shares], rank, rule, sensitivity) for index, rank in enumerate(held)
        ]
        sets = tuple(tuple(sorted(layer for rank in picked for layer in rank[stage])) for stage in range(len(counts)))
        ends = tuple(math.floor(round(share * train_iters, 6)) for share, _ in checked)
        if any(end >= train_iters and len(layers) < num_layers for end, layers in zip(ends, sets, strict=True)):
            raise ValueError(
                f"stages = {stages!r} is not allowed: a stage ends with the {train_iters} iterations, and the layers "
                "that are left would never begin"
            )
        return cls(ends, sets, (tuple(counts), rule))

    @property
    def num_layers(self) -> int:
        """L of the whole model."""
        return len(self.sets[-1])

    @property
    def last_growth(self) -> int:
        """The first iteration at which every layer has begun."""
        whole = next(index for index, layers in enumerate(self.sets) if len(layers) == self.num_layers)
        return 1 if whole == 0 else self.ends[whole - 1] + 1

    def stage(self, iteration: int) -> int:
        """Index (0-based) of the stage that iteration t belongs to."""
        return min(bisect_left(self.ends, iteration), len(self.ends) - 1)

    def begun(self, iteration: int) -> frozenset[int]:
        """Layers (1-based) that run at iteration t."""
        return self._begun[self.stage(iteration)]

    def iterations_since_growth(self, iteration: int) -> int | None:
        """1 at the first iteration that runs layers that have just begun; None before any begin later than the run."""
        return next((iteration - end for end in reversed(self._last_before_growth) if end < iteration), None)

    @cached_property
    def _last_before_growth(self) -> list[int]:
        """The last iteration before each growth, ascending."""
        pairs = zip(self.ends[:-1], itertools.pairwise(self._begun), strict=True)
        return [end for end, (before, after) in pairs if end > 0 and before < after]

    def gate(self, iteration: int) -> NDArray[np.float64]:
        """1 for a layer that has begun at iteration t, else 0, float64 [L]; not to be changed."""
        return self._gates[self.stage(iteration)]

    @cached_property
    def _begun(self) -> list[frozenset[int]]:
        return [self.begun_before | set(layers) for layers in self.sets]

    @cached_property
    def _gates(self) -> NDArray[np.float64]:
        gates = np.array([[layer in begun for layer in range(1, self.num_layers + 1)] for begun in self._begun])
        return gates.astype(np.float64)

    def state_dict(self) -> dict[str, Any]:
        """What another layout needs to go on with the same sets, in plain lists and numbers."""
        return {"sets": [list(layers) for layers in self.sets], "asked": _plain(self.asked)}

    def continued(self, state: dict[str, Any], begun: Iterable[int]) -> Stages:
        """These stages in a run that goes on: the saved sets if the same were asked for, and no layer goes back.

        state: the saved run's state_dict.  begun: layers that had begun in it.
        Raises ValueError for a state of another number of layers, or a damaged one.
        """
        check_keys("the state of the stages", state, ("sets", "asked"))
        saved = tuple(check_layers("stages of the checkpoint", layers, self.num_layers) for layers in state["sets"])
        same = state["asked"] == _plain(self.asked) and len(saved) == len(self.sets)
        before = frozenset(check_layers("begun layers of the checkpoint", begun, self.num_layers))
        return replace(self, sets=saved if same else self.sets, begun_before=before)


def check_stages(stages: Any, num_layers: int) -> list[tuple[float, int]]:
    """[(share, number of layers), ...] of `stages`, or ValueError saying what is allowed."""
    advice = f"it must be a list of [share of the iterations, number of layers], ending with [1.0, {num_layers}]"
    if isinstance(stages, str) or not isinstance(stages, Sequence) or not stages:
        raise ValueError(f"stages = {stages!r} is not allowed: {advice}")
    checked = []
    for stage in stages:
        if isinstance(stage, str) or not isinstance(stage, Sequence) or len(stage) != 2:
            raise ValueError(f"stages entry = {stage!r} is not allowed: {advice}")
        share = check_number("stages share", stage[0], "[0, 1]")
        count = int(stage[1]) if isinstance(stage[1], float) and stage[1].is_integer() else stage[1]  # [0.6, 1.0]
        checked.append((share, check_integer("stages number of layers", count, 1, num_layers)))
    shares, counts = zip(*checked, strict=True)
    if list(shares) != sorted(set(shares)) or list(counts) != sorted(counts):
        raise ValueError(f"stages = {stages!r} is not allowed: shares and numbers of layers must ascend")
    if checked[-1] != (1.0, num_layers):
        raise ValueError(f"stages = {stages!r} is not allowed: {advice}")
    return checked


def nearest_running(layer: int, running: Iterable[int]) -> int:
    """The layer that `layer` is copied from: the nearest running one below it, else above."""
    running = sorted(running)
    below = [other for other in running if other < layer]
    return below[-1] if below else running[0]


def _checked_rule(stage_layers: StageLayers, num_layers: int, counts: Sequence[int]) -> str | tuple[int, ...]:
    if isinstance(stage_layers, str):
        if stage_layers not in get_args(StageRule):
            raise ValueError(
                f"stage_layers = {stage_layers!r} is not allowed: it must be one of {', '.join(get_args(StageRule))}, "
                "or a list of layers in the order in which they begin"
            )
        return stage_layers
    check_layers("stage_layers", stage_layers, num_layers)
    needed = max((count for count in counts if count < num_layers), default=0)
    if len(stage_layers) < needed:
        raise ValueError(
            f"stage_layers = {list(stage_layers)} is not allowed: it must name at least the {needed} layers that begin "
            "before the last stage"
        )
    return tuple(int(layer) for layer in stage_layers)


def _shares(count: int, sizes: Sequence[int]) -> list[int]:
    """How many layers each rank runs of `count`: at least one, the others in proportion to the layers that it has.

    By D'Hondt's rule, which never takes a layer from a rank when there are more to give.
    """
    given = [1] * len(sizes)
    for _ in range(count - len(sizes)):
        candidates = [index for index, size in enumerate(sizes) if given[index] < size]
        given[max(candidates, key=lambda index: (sizes[index] / (given[index] + 1), -index))] += 1
    return given


def _nested(
    counts: Sequence[int], layers: Sequence[int], rule: str | tuple[int, ...], sensitivity: ArrayLike | None
) -> list[list[int]]:
    """Which of a rank's layers each stage runs: counts[i] of them, each set part of the next."""
    if rule == "spread":
        sets = [list(layers)]
        for count in reversed(counts):
            sets.append([sets[-1][index * len(sets[-1]) // count] for index in range(count)])
        return sets[:0:-1]
    if rule == "sensitivity":
        values = np.asarray(sensitivity, dtype=np.float64)
        order = sorted(layers, key=lambda layer: (-values[layer - 1], layer))
    elif isinstance(rule, tuple):
        places = {layer: place for place, layer in enumerate(rule)}
        order = sorted(layers, key=lambda layer: (places.get(layer, len(places)), layer))
    else:
        order = list(layers) if rule == "first" else list(reversed(layers))
    return [order[:count] for count in counts]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
