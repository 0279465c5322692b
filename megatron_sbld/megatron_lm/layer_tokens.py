"""`--sbld-lr-schedule-by layer_tokens`: consumed layer-tokens drive Megatron-LM's learning rate (docs/method.md 5).

Its scheduler is told layer-tokens in place of samples, those of a sample that every layer processes being 1, and the
ends of its decays are what the run is forecast to have consumed there, from its first iteration on. training/ does the
same for the trainer, and says what follows.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import TrainingConfig
from megatron_sbld.controller import DropController
from megatron_sbld.forecast.layer_tokens import LayerTokenForecast, RateInSamples

BY_LAYER_TOKENS = "layer_tokens"


class LayerTokenRate:
    """Of one run, on every rank: changes a scheduler once, before a checkpoint is loaded.

    Args:
        args: Megatron-LM's.
        controller: of the run.
        scheduler: Megatron's, as Megatron-LM built it.

    Raises:
        ValueError: naming the arguments of a warm-up that outlasts the run's forecast.
    """

    def __init__(self, args: Namespace, controller: DropController, scheduler: Any) -> None:
        self._controller, self._scheduler = controller, scheduler
        self._seq_length = args.seq_length
        self._is_loading = False
        self.consumed = 0
        """Layer-tokens, summed over layers."""
        length, samples = _length(args), RateInSamples.of(scheduler)
        forecast = LayerTokenForecast(
            lambda t: float(controller.expected_shares(t).mean()), length, length.iterations_to_read(samples.end)
        )
        try:
            plan = samples.in_layer_tokens(forecast)
        except ValueError as error:
            raise ValueError(f"--lr-warmup-iters, -samples or -fraction: {error}") from error
        for name, steps in plan.items():
            setattr(scheduler, name, steps)
        self._step, self._load = scheduler.step, scheduler.load_state_dict
        scheduler.step, scheduler.load_state_dict = self._step_by_layer_tokens, self._load_steps

    def count(self, global_batch_size: int) -> None:
        """Count an iteration, which the controller is still at."""
        self.consumed += self._layer_tokens(global_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs beside the scheduler's own state."""
        return {"consumed_layer_tokens": self.consumed}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved state; None is of a run without layer dropping, whose every layer ran what was read."""
        if state is None:
            self.consumed = round(self._scheduler.num_steps) * self._seq_length * self._controller.num_layers
        else:
            self.consumed = int(state["consumed_layer_tokens"])

    def _layer_tokens(self, samples: int) -> int:
        # A whole number, but for rounding that may differ where replicas run different layers.
        return round(self._controller.layer_tokens(samples * self._seq_length))

    def _step_by_layer_tokens(self, increment: int) -> None:
        """Megatron's step, which tells the samples of an iteration, and on loading where the schedule is."""
        if increment and not self._is_loading:
            self._step(self._layer_tokens(increment) / (self._controller.num_layers * self._seq_length))
        else:
            self._step(increment)

    def _load_steps(self, state: dict[str, Any]) -> None:
        self._is_loading = True
        try:
            self._load(state)
        finally:
            self._is_loading = False


def _length(args: Namespace) -> RunLength:
    ramp = getattr(args, "rampup_batch_size", None)
    training = TrainingConfig(
        global_batch_size=args.global_batch_size,
        rampup_batch_size=None if ramp is None else [int(value) for value in ramp],
        train_iters=None if args.train_samples else args.train_iters,
        train_samples=args.train_samples or None,
    )
    return RunLength(training)
