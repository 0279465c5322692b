"""How many layer-tokens a run is going to consume (docs/method.md 5): what a LayerToken learning rate is planned with.

Layer-tokens are counted in samples here, as Megatron counts learning rates: those of one sample that every layer
processes are 1. Without dropped layers they are the samples that are read, exactly.

This is the expectation over the draws, from the keep probabilities of the schedule as they are when it is planned. With
independent draws in each of T iterations and L layers, what is drawn differs from it by a standard deviation of at most
sqrt(T / (4 L)) undropped iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sbld.config.run_length import RunLength

MOST_COMPUTED = 10_000
"""Iterations that are computed one by one; longer runs are computed from as many of their iterations."""


class LayerTokenForecast:
    """Consumed layer-tokens against samples read.

    Args:
        share: the share of an undropped iteration's layer-tokens that iteration t is expected to run.
        length: of the run.
        end: last iteration that is asked for.
        iteration: iterations that are done; the forecast begins behind them.
        samples: samples that they have read.
        consumed: what they have consumed; taken to have come evenly.
    """

    def __init__(
        self,
        share: Callable[[int], float],
        length: RunLength,
        end: int,
        *,
        iteration: int = 0,
        samples: int = 0,
        consumed: float = 0.0,
    ) -> None:
        count = max(0, end - iteration)
        stretches = min(count, MOST_COMPUTED)
        edges = iteration + np.arange(1, stretches + 1) * count // max(1, stretches)
        starts = np.concatenate([[iteration], edges])[:-1]
        shares = np.array([share(middle) for middle in ((starts + 1 + edges) // 2).tolist()])
        read = np.concatenate([[samples], length.samples_after_each(edges)])
        expected = consumed + np.concatenate([[0.0], np.cumsum(np.diff(read) * shares)])
        done = [0] if samples else []
        self._read = np.concatenate([done, read])
        self._consumed = np.concatenate([done, expected])

    def after(self, samples: int) -> float:
        """What will have been consumed once so many samples are read."""
        return float(np.interp(samples, self._read, self._consumed))


@dataclass(frozen=True)
class RateInSamples:
    """The parts of a learning rate's schedule in samples, as Megatron's OptimizerParamScheduler is built with them."""

    warmup: float
    decay: int
    wsd_decay: int | None
    wd_incr: int

    @classmethod
    def of(cls, scheduler: Any) -> RateInSamples:
        """A scheduler's, before anything is changed."""
        return cls(
            scheduler.lr_warmup_steps, scheduler.lr_decay_steps, scheduler.wsd_decay_steps, scheduler.wd_incr_steps
        )

    @property
    def end(self) -> int:
        """The last sample that is planned for."""
        return max(self.decay, self.wd_incr)

    def in_layer_tokens(self, forecast: LayerTokenForecast) -> dict[str, float]:
        """The scheduler's attributes that change: each part ends at what is forecast to be consumed where it ended.

        The warm-up keeps its number: it is over when as much is consumed as so many undropped samples are.

        Raises:
            ValueError: what is forecast leaves no room for the warm-up.
        """
        decay = forecast.after(self.decay)
        plan = {"lr_decay_steps": decay, "wd_incr_steps": forecast.after(self.wd_incr)}
        falls_from, what = decay, "decay ends"
        if self.wsd_decay is not None:
            falls_from, what = forecast.after(self.decay - self.wsd_decay), "last part of WSD begins"
            plan["wsd_decay_steps"] = decay - falls_from
        if self.warmup > falls_from or self.warmup >= decay:
            raise ValueError(
                f"with layer_tokens it lasts for the layer-tokens of {self.warmup:,} undropped samples, but by the "
                f"forecast those of {falls_from:,.0f} are consumed when the {what}; it must be shorter"
            )
        return plan
