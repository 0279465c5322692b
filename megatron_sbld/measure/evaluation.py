"""Cheaper estimates of sensitivity, at evaluation: the loss without each layer, and how far each turns its input.

Both look at a model that was trained with all of its layers, on batches that come next in the order of the run and that
it has not seen.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator

from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)

from megatron_sbld.data.batches import Batch
from megatron_sbld.mcore.skip.probes import BlockInfluence, layer_left_out
from megatron_sbld.measure.plan import FORWARD_COST
from megatron_sbld.measure.runs import Measurement, run_name
from megatron_sbld.ranks import any_rank
from megatron_sbld.sensitivity.measurement import LayerRun
from megatron_sbld.training.run import Run
from megatron_sbld.training.step import StopRequestedError, validation_loss


class EvaluatedRuns(Measurement):
    """leave_one_out and block_influence."""

    def measure(self, seed: int) -> bool:
        """Train at full depth, then evaluate batches that come next."""
        plan = self.plan
        began = time.monotonic()
        run = self.build(seed)
        self.use_policy(run, None)
        for number in range(1, plan.iterations + 1):
            if self.stopping:
                return False
            self.iterate(run)
            self.progress.step("training", number, plan.iterations, f"loss {run.last_loss:.4f}")
        batches = [self._next_batch(run) for _ in range(plan.batches)]
        training_s = time.monotonic() - began
        try:
            if plan.method == "leave_one_out":
                self._leave_out(run, seed, batches, training_s)
            else:
                self._measure_influence(run, seed, batches, training_s)
        except StopRequestedError:
            return False
        return True

    def passes_to_come(self, seed: int) -> int:
        """Iterations and evaluated batches that a seed still needs."""
        runs = len(self.missing(seed))
        if self.plan.method == "block_influence":
            runs = min(runs, 1)  # one pass shows all layers
        return self.plan.iterations + runs * self.plan.batches if runs else 0

    def _leave_out(self, run: Run, seed: int, batches: list[list[Batch]], training_s: float) -> None:
        plan = self.plan
        for layer in self.missing(seed):
            began = time.monotonic()
            with contextlib.nullcontext() if layer is None else layer_left_out(run.chunks, layer):
                losses = list(self._losses(run, batches, run_name(layer)))
            cost, seconds = FORWARD_COST * plan.batches, time.monotonic() - began
            if layer is None:
                cost, seconds = cost + plan.iterations, seconds + training_s
            self.add(seed, layer, LayerRun(values=losses, cost_iterations=cost, seconds=seconds))

    def _measure_influence(self, run: Run, seed: int, batches: list[list[Batch]], training_s: float) -> None:
        """All layers in one pass, so the baseline's file carries all of the cost."""
        plan, began = self.plan, time.monotonic()
        losses, influences = [], []
        with BlockInfluence(run.chunks, plan.num_layers) as probe:
            for loss in self._losses(run, batches, "all layers"):
                losses.append(loss)
                influences.append(probe.take())
        cost, seconds = plan.iterations + FORWARD_COST * plan.batches, training_s + time.monotonic() - began
        for layer in self.missing(seed):
            if layer is None:
                self.add(seed, None, LayerRun(values=losses, cost_iterations=cost, seconds=seconds))
            else:
                values = [float(influence[layer - 1]) for influence in influences]
                self.add(seed, layer, LayerRun(values=values, cost_iterations=0.0, seconds=0.0))

    def _losses(self, run: Run, batches: list[list[Batch]], what: str) -> Iterator[float]:
        """Loss at evaluation of each global batch, as the model is at this moment."""
        for number, batch in enumerate(batches, start=1):
            if any_rank(self.stop.requested):
                raise StopRequestedError
            iterators = itertools.tee(iter(batch), len(run.chunks))
            loss = validation_loss(run.config, run.chunks, iterators, len(batch))
            self.progress.step(what, number, len(batches), f"loss {loss:.4f}")
            yield loss

    def _next_batch(self, run: Run) -> list[Batch]:
        """This rank's microbatches of the next global batch in the run's order."""
        update_num_microbatches(run.consumed_samples, consistency_check=False)
        run.consumed_samples += get_current_global_batch_size()
        return list(run.data.train_batches(get_num_microbatches()))
