"""Which runs there are, in the order of what is most worth knowing, as far as the rows so far decide it.

A method's learning rate is chosen by successive halving: the whole grid at 1.3 tokens a parameter, and on to higher
rates as long as the highest is the best; at 5 the best and the one below it, because longer runs want lower rates; at
20 the best. A variant of a method begins with the two rates of that method. The undropped run, against which all are
held, has two rates at 20 as well. What depends on rows that are not there
yet is a `Waiting`, so the plan grows while the study goes on; a run that it has named once stays the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.methods import (
    COMBINED,
    CORE,
    METHODS,
    PUBLISHED,
    REPLICAS,
    TOKENS,
    UNDROPPED,
    VARIANTS,
    Method,
)
from benchmarks.study.rows import Results
from benchmarks.study.settings import CURVE_BATCHES, CURVE_POINTS, LAYERS, Spec

GRID = (2e-3, 4e-3, 8e-3)
HIGHER = (1.6e-2, 3.2e-2)
FIRST, SECOND, LAST = 1.3, 5.0, 20.0
BETWEEN = (2.5, 10.0)
"""More lengths of the undropped frontier, and of the methods that are claimed."""
BEYOND = 30.0
"""An undropped run longer than all: a method that is better at LAST is held against it."""
SEEDS = (2, 3)
CLAIMED = 2
EPOCH_BUDGETS = (2.5, 5.0, 10.0)
TOKENS_BUDGET, TOKENS_LR = 10.0, 8e-3
"""Of token dropping: the undropped run's best rate of shorter samples at 20 tokens a parameter."""
DROPOUTS = (0.0, 0.1, 0.2)
WEIGHT_DECAYS = (0.3, 1.0)
_SECONDS = {32: (0.004, 0.0108), 64: (0.015, 0.0196)}
"""Of an iteration, by width: without layers, and of each layer; user CPU time of one thread (Intel Xeon, model 207)."""
_SECONDS_OF_LONG = (0.006, 0.0185)
"""The same at width 32 of samples of 512 tokens, from one short run beside others."""
_START_SECONDS = 7.0
_FINAL_BATCHES = 200  # forward passes alone, as those of the curve


@dataclass(frozen=True)
class Waiting:
    """Runs that cannot be named yet. count: how many they will be.  seconds: about how long they take together."""

    name: str
    reason: str
    count: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Measure:
    """The sensitivity of a width has to be measured next."""

    width: int

    @property
    def name(self) -> str:
        return f"sensitivity of width {self.width}"


Planned = Spec | Waiting | Measure


def seconds(spec: Spec) -> float:
    """About how long a run takes on one core, as it was measured before the study."""
    fixed, per_layer = _SECONDS_OF_LONG if spec.regime == "tokens" else _SECONDS[spec.width]
    finals = CURVE_POINTS if spec.regime == "epochs" else 1
    forward = (CURVE_POINTS * CURVE_BATCHES + finals * _FINAL_BATCHES) / 3 * (fixed + per_layer * LAYERS)
    return _START_SECONDS + forward + spec.iterations * (fixed + per_layer * spec.expected_layers)


class Plan:
    """All runs, given the rows so far and the sensitivity files that there are."""

    def __init__(self, results: Results, sensitivity: dict[int, Path]) -> None:
        self._results, self._sensitivity = results, sensitivity

    def all(self) -> list[Planned]:
        """In order, each once."""
        return list(dict.fromkeys(self._ordered()))

    def _ordered(self) -> Iterator[Planned]:
        yield from self._width(32, CORE)
        for group in (PUBLISHED, VARIANTS, COMBINED):
            for method in group:
                yield from self._halving(32, method)
        yield from self._claims(32)
        yield from self._width(64, CORE)
        for method in self._leading(32, excluded=CORE):
            yield from self._halving(64, method)
        yield from self._claims(64)
        yield from self._cosine(32)
        yield from self._epochs(32)
        yield from self._tokens(32)
        for method in REPLICAS:
            yield from self._halving(32, method)

    def _width(self, width: int, methods: Sequence[Method]) -> Iterator[Planned]:
        """The frontier, the core methods at each budget in turn, and the claims that they make."""
        yield from self._frontier(width, (FIRST, BETWEEN[0], SECOND))
        for budget in (FIRST, SECOND):
            for method in methods:
                yield from self._at(width, method, budget)
        yield from self._frontier(width, (BETWEEN[1], LAST))
        for method in methods:
            yield from self._at(width, method, LAST)
        yield from self._frontier(width, (BEYOND,))
        yield from self._claims(width)

    def _frontier(self, width: int, budgets: Iterable[float]) -> Iterator[Planned]:
        for budget in budgets:
            yield from self._at(width, UNDROPPED, budget)

    def _halving(self, width: int, method: Method) -> Iterator[Planned]:
        for budget in (FIRST, SECOND, LAST):
            yield from self._at(width, method, budget)

    def _at(self, width: int, method: Method, budget: float) -> Iterator[Planned]:
        """A method's runs at a budget, with the learning rates that it has left there."""
        if budget == FIRST:
            if method.head is None:
                yield from (self._spec(width, method, budget, lr) for lr in self._grid(width, method))
            return
        rates = self._rates(width, method, budget)
        if rates is not None:
            yield from (self._spec(width, method, budget, lr) for lr in rates)
            return
        count = 2 if budget <= SECOND or _two_at_last(method, budget) else 1
        name, cost = f"once/w{width}/{method.name}/{budget:g}", count * self._about(width, method, budget)
        yield Waiting(name, "learning rate not chosen yet", count, cost)

    def _rates(self, width: int, method: Method, budget: float) -> list[float] | None:
        """The learning rates that a method has left at a budget above FIRST; None while they are not decided."""
        head = METHODS[method.head] if method.head else method
        best = self._best(width, head, FIRST, self._grid(width, head))
        if best is None or (best == self._grid(width, head)[-1] and best != HIGHER[-1]):
            return None
        left = _with_lower(best)
        if budget <= SECOND:
            return left
        best = self._best(width, method, SECOND, left)
        if best is None:
            return None
        return _with_lower(best) if _two_at_last(method, budget) else [best]

    def _grid(self, width: int, method: Method) -> list[float]:
        """The learning rates at FIRST, as far as they have been found to be needed."""
        grid = list(GRID)
        for higher in HIGHER:
            if self._best(width, method, FIRST, grid) != grid[-1]:
                break
            grid.append(higher)
        return grid

    def _best(self, width: int, method: Method, budget: float, rates: Sequence[float]) -> float | None:
        """The best of some rates; None until all of them have run."""
        losses = {lr: self._results.loss(width=width, method=method.name, budget=budget, lr=lr, seed=1) for lr in rates}
        if None in losses.values():
            return None
        return min(losses, key=lambda lr: (losses[lr], lr))

    def _leading(self, width: int, excluded: Sequence[Method] = ()) -> list[Method]:
        """The methods of lowest loss by the first seed at LAST, one of each family, as many as are claimed."""
        losses = {}
        for method in METHODS.values():
            point = self._results.point(width=width, method=method.name, budget=LAST)
            if method is not UNDROPPED and method not in excluded and point is not None:
                losses[method.name] = point.losses[0]
        return [METHODS[name] for name in sorted(losses, key=lambda name: losses[name])[:CLAIMED]]

    def _claims(self, width: int) -> Iterator[Planned]:
        """More seeds of the undropped run and the leading methods, and their lengths in between."""
        leading = self._leading(width)
        if len(leading) < CLAIMED:
            count = 2 * len(SEEDS) * (1 + CLAIMED) + 2 * CLAIMED
            cost = len(SEEDS) * (1 + CLAIMED) * sum(self._about(width, UNDROPPED, b) for b in (SECOND, LAST))
            cost += CLAIMED * sum(self._about(width, UNDROPPED, budget) for budget in BETWEEN)
            yield Waiting(f"once/w{width}/claims", "the leading methods are not known yet", count, cost)
            return
        for budget in (SECOND, LAST):
            for method in (UNDROPPED, *leading):
                yield from self._again(width, method, budget)
        for method in leading:
            for budget in BETWEEN:
                yield from self._at(width, method, budget)

    def _again(self, width: int, method: Method, budget: float) -> Iterator[Planned]:
        point = self._results.point(width=width, method=method.name, budget=budget)
        if point is None:
            yield Waiting(f"once/w{width}/{method.name}/{budget:g}", "its first seed has not run", len(SEEDS))
            return
        for seed in SEEDS:
            yield self._spec(width, method, budget, point.lr, seed=seed)

    def _cosine(self, width: int) -> Iterator[Planned]:
        """The claimed points with a cosine in place of WSD."""
        for method in (UNDROPPED, *self._leading(width)):
            for budget in (SECOND, LAST):
                point = self._results.point(width=width, method=method.name, budget=budget)
                if point is not None:
                    yield self._spec(width, method, budget, point.lr, decay="cosine")

    def _epochs(self, width: int) -> Iterator[Planned]:
        """A small text many times: the undropped run tuned in dropout, weight decay and length, then the methods."""
        point = self._results.point(width=width, method="undropped", budget=SECOND)
        if point is None:
            yield Waiting(f"epochs/w{width}", "the undropped learning rate is not chosen yet", 19)
            return
        common: dict[str, Any] = {"regime": "epochs"}
        middle = EPOCH_BUDGETS[1]
        tried = [{"dropout": dropout, "weight_decay": 0.1} for dropout in DROPOUTS]
        yield from (self._spec(width, UNDROPPED, middle, point.lr, **common, **one) for one in tried)
        best = self._best_regular(width, middle, tried)
        if best is None:
            yield Waiting(f"epochs/w{width}/weight-decay", "dropout not chosen yet", 16)
            return
        tried += [{"dropout": best["dropout"], "weight_decay": decay} for decay in WEIGHT_DECAYS]
        yield from (self._spec(width, UNDROPPED, middle, point.lr, **common, **one) for one in tried)
        best = self._best_regular(width, middle, tried)
        if best is None:
            yield Waiting(f"epochs/w{width}/methods", "weight decay not chosen yet", 14)
            return
        for budget in EPOCH_BUDGETS:
            yield self._spec(width, UNDROPPED, budget, point.lr, **common, **best)
        for name in ("layerdrop", "sbld", "staged-half"):
            for regular in (best, {**best, "dropout": 0.0}):
                for budget in EPOCH_BUDGETS[1:]:
                    yield self._spec(width, METHODS[name], budget, point.lr, **common, **regular)

    def _tokens(self, width: int) -> Iterator[Planned]:
        """Token dropping, 12 runs with one learning rate: the undropped run, whose seeds say what noise is; then each
        method by both ways of driving the rate at equal FLOPs, and by layer-tokens at equal iterations.

        With nothing dropped both ways are one.
        """
        common: dict[str, Any] = {"regime": "tokens"}
        for seed in (1, *SEEDS):
            yield self._spec(width, UNDROPPED, TOKENS_BUDGET, TOKENS_LR, seed, **common)
        methods = (*TOKENS, METHODS["sbld"])
        for equal, lr_by in (("flops", "layer_tokens"), ("flops", "iterations"), ("iterations", "layer_tokens")):
            for method in methods:
                yield self._spec(width, method, TOKENS_BUDGET, TOKENS_LR, equal=equal, lr_by=lr_by, **common)

    def _about(self, width: int, method: Method, budget: float) -> float:
        """Seconds of one such run; of the undropped one where the method cannot be built yet."""
        spec = self._spec(width, method, budget, GRID[0])
        if not isinstance(spec, Spec):
            spec = Spec(width=width, method="undropped", budget=budget, lr=GRID[0], seed=1, drop=UNDROPPED.drop)
        return seconds(spec)

    def _best_regular(self, width: int, budget: float, tried: list[dict[str, float]]) -> dict[str, float] | None:
        losses = [
            self._results.loss(regime="epochs", width=width, method="undropped", budget=budget, **one) for one in tried
        ]
        known = [loss for loss in losses if loss is not None]
        return None if len(known) < len(losses) else tried[losses.index(min(known))]

    def _spec(self, width: int, method: Method, budget: float, lr: float, seed: int = 1, **more: Any) -> Planned:
        drop = dict(method.drop)
        if method.needs_sensitivity:
            if width not in self._sensitivity:
                return Measure(width)
            drop["sensitivity"] = str(self._sensitivity[width])
        processes = {"processes": method.processes}
        return Spec(width=width, method=method.name, budget=budget, lr=lr, seed=seed, drop=drop, **processes, **more)


def _with_lower(best: float) -> list[float]:
    """A rate and the one below it in the grid, or above it for the lowest."""
    ladder = (*GRID, *HIGHER)
    at = ladder.index(best)
    return [best, ladder[at - 1] if at else ladder[1]]


def _two_at_last(method: Method, budget: float) -> bool:
    return method is UNDROPPED and budget == LAST
