"""The runs of a sensitivity measurement: what all methods share, and training without each layer (docs/method.md 3)."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_sbld.checkpoint.start import planned_length
from megatron_sbld.config.validate import train_iterations
from megatron_sbld.mcore import make_switchable
from megatron_sbld.mcore.rng_state import reseed
from megatron_sbld.measure.plan import AFFORDABLE_FRACTION, MeasurePlan
from megatron_sbld.measure.progress import MeasurementProgress
from megatron_sbld.measure.state import RunSnapshot
from megatron_sbld.method.choices import ResidualScale
from megatron_sbld.method.policy import FullDepthPolicy, Policy
from megatron_sbld.method.schedule import Constant
from megatron_sbld.ranks import on_rank_0
from megatron_sbld.sensitivity.early_stop import Neighbours, is_look, settled_neighbours, spread_order
from megatron_sbld.sensitivity.measurement import LayerRun, MeasurementFolder
from megatron_sbld.sensitivity.stats import Estimate
from megatron_sbld.training.model import loss_weights_text
from megatron_sbld.training.processes import seed_everything
from megatron_sbld.training.run import Run, build_controller
from megatron_sbld.training.stop import StopFlag

logger = logging.getLogger(__name__)


class OneLayerPolicy(Policy):
    """Drops one layer with a constant probability and keeps all others.

    >>> OneLayerPolicy(4, layer=2, drop_prob=0.9).keep_probs(1).round(2).tolist()
    [1.0, 0.1, 1.0, 1.0]
    """

    def __init__(
        self, num_layers: int, *, layer: int, drop_prob: float, residual_scale: ResidualScale = "none"
    ) -> None:
        super().__init__(Constant(1.0), num_layers, residual_scale=residual_scale)
        self.layer = layer
        self.drop_prob = drop_prob

    def _keep_probs(self, theta: float) -> NDArray[np.float64]:
        keep_probs = np.ones(self.num_layers)
        keep_probs[self.layer - 1] = 1.0 - self.drop_prob
        return keep_probs


class Measurement(ABC):
    """The runs of a measurement, and how far they have come. The same on every rank, but for the files."""

    def __init__(self, plan: MeasurePlan, folder: MeasurementFolder, stop: StopFlag) -> None:
        self.plan = plan
        self.folder = folder
        self.stop = stop
        self.stopping = False
        self._built: Run | None = None
        self.iterations_done = 0  # in this process's life
        order = spread_order(plan.layers) if plan.early_stop else plan.layers
        self.runs: list[int | None] = [None, *order]
        """None is the baseline."""
        wanted = list(itertools.product(plan.seeds, self.runs))
        self.results: dict[tuple[int, int | None], LayerRun] = on_rank_0(
            lambda: {key: run for key in wanted if (run := folder.run(*key)) is not None}
        )
        self.progress = MeasurementProgress(
            plan.config.logging,
            runs=len(wanted),
            runs_done=len(self.results),
            steps=sum(self.passes_to_come(seed) for seed in plan.seeds),
            shown=dist.get_rank() == 0,
        )

    def run(self) -> bool:
        """Make all runs that are not there yet; False if it was asked to stop."""
        self._announce()
        for seed in self.plan.seeds:
            if not self.missing(seed):
                continue
            try:
                done = self.measure(seed)
            finally:
                self._close()
            gc.collect()  # the model of this seed, before that of the next is built
            if not done:
                self.progress.note("stopped on request; start again to continue with the run that is missing")
                return False
        return True

    @abstractmethod
    def measure(self, seed: int) -> bool:
        """Make the runs with a seed that are not there yet; False if it was asked to stop."""

    @abstractmethod
    def passes_to_come(self, seed: int) -> int:
        """Iterations and evaluated batches that a seed still needs, if no run ends early."""

    def missing(self, seed: int) -> list[int | None]:
        """Runs with a seed that are not there yet, in their order."""
        return [layer for layer in self.runs if (seed, layer) not in self.results]

    def _announce(self) -> None:
        plan, cost = self.plan, self.plan.cost_iterations
        total = train_iterations(plan.config)
        if plan.note is not None:
            self.progress.note(plan.note)
        weights = loss_weights_text(plan.config)
        if weights is not None:
            self.progress.note(weights)
        self.progress.note(
            f"{plan.method}: {len(plan.layers)} layers and a baseline, {len(plan.seeds)} seed(s), {plan.iterations} "
            f"iterations: costs {cost:,.0f} iterations, {cost / total:.1%} of a training run of {total:,}"
        )
        if cost <= AFFORDABLE_FRACTION * total or dist.get_rank() > 0:
            return
        advice = "reduce --iterations, --batches or --seeds"
        if plan.method == "train":
            runs = (len(plan.layers) + 1) * len(plan.seeds)
            fitting = int(AFFORDABLE_FRACTION * total / runs)
            advice = f"--iterations {fitting} would fit" if fitting > 1 else "no number of iterations would fit"
        logger.warning("measuring costs %.1f %% of the training run, above 5 %%: %s", 100 * cost / total, advice)

    def build(self, seed: int) -> Run:
        """The model with its initial weights, or what the checkpoint has, and the data."""
        plan = self.plan
        seed_everything(seed)
        config, policy = plan.config_of(seed), FullDepthPolicy(plan.num_layers)
        length = planned_length(config, plan.start)
        run = self._built = Run(config, plan.tokenizer, plan.data, policy, plan.start, length)
        if run.iteration and seed != plan.config.training.seed:
            reseed(seed, run.iteration)  # another seed's dropout is not the checkpoint's
        return run

    def _close(self) -> None:
        if self._built is not None:
            self._built.close()
            self._built = None

    def iterate(self, run: Run) -> None:
        """One training iteration; notes whether it was to be the last."""
        asked = run.iterate(self.stop)
        self.iterations_done += 1
        limit = self.plan.config.training.exit_after_iterations
        self.stopping = asked or (limit is not None and self.iterations_done >= limit)

    def use_policy(self, run: Run, layer: int | None) -> None:
        """Train on without `layer`, or at full depth."""
        plan = self.plan
        policy: Policy = FullDepthPolicy(plan.num_layers)
        if layer is not None:
            scale = plan.config.drop.residual_scale or "none"
            policy = OneLayerPolicy(plan.num_layers, layer=layer, drop_prob=plan.drop_prob, residual_scale=scale)
        run.controller = build_controller(run.config, policy)
        make_switchable(run.chunks, run.controller)
        for chunk in run.chunks:
            chunk.train()

    def add(self, seed: int, layer: int | None, result: LayerRun, steps_saved: int = 0) -> None:
        """Keep and store a finished run, and show its gap."""
        self.results[seed, layer] = result

        def store() -> Estimate | None:
            self.folder.add(seed, layer, result)
            return None if layer is None else self.folder.gap(seed, layer)

        gap = on_rank_0(store)
        ended = f", ended early after {len(result.values)} iterations" if result.neighbours is not None else ""
        text = f"{run_name(layer)}, loss {np.mean(result.values[-self.plan.window :]):.4f}"
        if gap is not None:
            text = f"{run_name(layer)}, gap {gap.mean:+.4f} +- {gap.stderr:.4f}{ended}"
        self.progress.run_done(text, steps_saved)


class TrainedRuns(Measurement):
    """The paper's procedure: the same training anew without each layer."""

    def measure(self, seed: int) -> bool:
        """The baseline and every layer with one seed, on one model."""
        run = self.build(seed)
        snapshot = RunSnapshot(run)
        for layer in self.missing(seed):
            if self.stopping:
                return False
            snapshot.restore(run)
            with _named(layer):
                finished = self._train_layer(run, seed, layer)
            if not finished:
                return False
        return True

    def passes_to_come(self, seed: int) -> int:
        """Iterations that a seed still needs, if no run ends early."""
        return len(self.missing(seed)) * self.plan.iterations

    def _train_layer(self, run: Run, seed: int, layer: int | None) -> bool:
        """One run of N iterations, fewer if its rank is settled before; False if it was asked to stop within."""
        plan, began = self.plan, time.monotonic()
        self.use_policy(run, layer)
        losses: list[float] = []
        neighbours: Neighbours | None = None
        while len(losses) < plan.iterations and neighbours is None:
            if self.stopping:
                return False
            self.iterate(run)
            losses.append(run.last_loss)
            neighbours = self._settled(seed, layer, losses)
            what = run_name(layer) if len(plan.seeds) == 1 else f"{run_name(layer)} seed {seed}"
            self.progress.step(what, len(losses), plan.iterations, self._so_far(seed, layer, losses))
        result = LayerRun(
            values=losses,
            cost_iterations=float(len(losses)),
            seconds=time.monotonic() - began,
            neighbours=None if neighbours is None else list(neighbours),
        )
        self.add(seed, layer, result, plan.iterations - len(losses))
        return True

    def _settled(self, seed: int, layer: int | None, losses: list[float]) -> Neighbours | None:
        """Whether the run may end here; rank 0 decides, because the last bits of a sum may differ between ranks."""
        plan = self.plan
        if layer is None or not plan.early_stop or not is_look(len(losses), plan.iterations, plan.window):
            return None
        finished = {
            other: run.values
            for (of, other), run in self.results.items()
            if of == seed and other is not None and run.neighbours is None
        }
        return on_rank_0(
            lambda: settled_neighbours(
                losses, finished, plan.window, num_allow=plan.num_allow, num_block=plan.num_block
            )
        )

    def _so_far(self, seed: int, layer: int | None, losses: list[float]) -> str:
        """The loss of a baseline; a layer's gap over the last iterations."""
        if layer is None:
            return f"loss {losses[-1]:.4f}"
        baseline = self.results[seed, None].values[: len(losses)]
        gap = np.mean(np.subtract(losses, baseline)[-self.plan.window :])
        return f"gap so far {gap:+.4f}"


def run_name(layer: int | None) -> str:
    """What a run is called; None is the baseline."""
    return "baseline" if layer is None else f"layer {layer}"


@contextlib.contextmanager
def _named(layer: int | None) -> Iterator[None]:
    """Say which run it was whose loss is no longer finite."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{run_name(layer)}: {error}") from error
