"""Consumed layer-tokens: their count, and the learning rate that they drive (`optimizer.lr_schedule_by: layer_tokens`).

The schedule is Megatron's own, which is told layer-tokens in place of samples: those of a sample that every layer
processes are 1 (docs/method.md, section 5). The warm-up keeps its number, so it takes more iterations where layers are
dropped. The ends of the decay, of WSD's last part and of the weight decay's increase are what the run is forecast to
have consumed there (forecast/layer_tokens.py). That is planned once, kept in the checkpoint, and planned anew from
where a run goes on with other drops, another length or another rate.

A run consumes slightly more or less than its forecast, and with dynamic sensitivity, whose changes no forecast knows,
maybe clearly so. If more, the last iterations have min_lr; if less, the decay is not quite over when the run ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sbld.checkpoint.resume import LENGTH_FIELDS, Change, SavedRun, check_layer_tokens
from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config
from megatron_sbld.controller import DropController
from megatron_sbld.forecast.layer_tokens import LayerTokenForecast, RateInSamples

_PLAN = "lr_plan"
_PLANNED_WITH = (
    *LENGTH_FIELDS,
    "model.seq_length",
    "optimizer.lr_schedule_by",
    "optimizer.lr_decay_style",
    "optimizer.lr_decay_iters",
    "optimizer.lr_decay_samples",
    "optimizer.lr_wsd_decay_iters",
)
"""Beside the drop section."""


class LayerTokens:
    """Of one run; made on every rank, once the scheduler is built, and the same on all.

    Args:
        config: the run.
        length: of the run.
        controller: says what an iteration is expected to consume.
        scheduler: planned in samples.
    """

    def __init__(
        self, config: Config, length: RunLength, controller: DropController, scheduler: OptimizerParamScheduler
    ) -> None:
        self._config, self._length, self._controller, self._scheduler = config, length, controller, scheduler
        self._per_sample = config.model.num_layers * config.model.seq_length
        self.consumed: int | None = 0
        """Summed over layers; None in a run that goes on from one that did not count them."""
        self.drives_rate = config.optimizer.lr_schedule_by == "layer_tokens"
        self._samples = RateInSamples.of(scheduler)
        self._plan: dict[str, float] = {}

    def begin(self) -> None:
        """Plan a run that begins; one that goes on is restored instead.

        Raises:
            ValueError: the warm-up would last longer than the run is forecast to.
        """
        if self.drives_rate:
            self._plan_from(0, 0, 0.0)

    def count(self, layer_tokens: int, global_batch_size: int) -> float:
        """Count those of an iteration; returns what a step in it tells the scheduler."""
        if self.consumed is not None:
            self.consumed += layer_tokens
        return layer_tokens / self._per_sample if self.drives_rate else global_batch_size

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs, JSON-able."""
        return {"consumed_layer_tokens": self.consumed, **({_PLAN: self._plan} if self.drives_rate else {})}

    def restore(self, saved: SavedRun, changes: Iterable[Change], samples: int) -> str:
        """Go on where a run was saved, once scheduler and controller are restored; returns a line if it plans anew.

        Args:
            saved: the checkpoint.
            changes: what the config has otherwise than it.
            samples: that its run had read.

        Raises:
            ValueError: as `begin`, or what check_layer_tokens refuses.
        """
        check_layer_tokens(saved, self._config)
        self.consumed = saved.consumed_layer_tokens
        plan = saved.train_state.get(_PLAN)
        if not self.drives_rate:
            if plan is not None:
                self._set_steps(samples)
            return ""
        if plan is None:
            assert self.consumed is not None, "check_layer_tokens refuses it"
            self._set_steps(self.consumed / self._per_sample)
        elif not any(_replans(change) for change in changes):
            self._put_in_force(dict(plan))
            return ""
        self._plan_from(saved.iteration, samples, float(self._scheduler.num_steps))
        return f"the learning rate by layer-tokens is planned anew from iteration {saved.iteration + 1} on"

    def text(self) -> str:
        """How far the run is forecast to come, in a line."""
        share = self._plan["wd_incr_steps"] / self._length.train_samples
        line = f"learning rate by layer-tokens: the run is forecast to consume {share:.1%} of the undropped run's"
        if self._samples.warmup:
            line += f"; {self._samples.warmup / self._plan['wd_incr_steps']:.1%} of them are warm-up"
        return line

    def _plan_from(self, iteration: int, samples: int, consumed: float) -> None:
        """Plan the rest of the run, of which so much is done.

        Raises:
            ValueError: what is forecast of the decay leaves no room for the warm-up.
        """
        forecast = LayerTokenForecast(
            lambda t: float(self._controller.expected_shares(t).mean()),
            self._length,
            self._length.iterations_to_read(self._samples.end),
            iteration=iteration,
            samples=samples,
            consumed=consumed,
        )
        try:
            plan = self._samples.in_layer_tokens(forecast)
        except ValueError as error:
            unit = "iters" if self._config.training.train_samples is None else "samples"
            value = getattr(self._config.optimizer, f"lr_warmup_{unit}")
            raise ValueError(f"optimizer.lr_warmup_{unit} = {value}: {error}") from error
        self._put_in_force(plan)

    def _put_in_force(self, plan: dict[str, float]) -> None:
        self._plan = plan
        for name, steps in plan.items():
            setattr(self._scheduler, name, steps)
        self._scheduler.step(0)

    def _set_steps(self, steps: float) -> None:
        """Let the schedule be where so many layer-tokens or samples bring it."""
        self._scheduler.num_steps = steps
        self._scheduler.step(0)


def _replans(change: Change) -> bool:
    planned = change.field.startswith("drop.") or change.field in _PLANNED_WITH
    return planned and change.without_effect is None
