"""Layer dropping attached to a training loop that is not ours, whatever calls it: Megatron-LM's, Megatron-Bridge's.

The loop builds model, optimizer and parameter scheduler; this makes the layers switchable, begins each iteration, and
keeps what a resumed run needs in the scheduler's state dict, the only state that such loops save and hand to others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sbld.controller import CHECKPOINT_KEY, DropController
from megatron_sbld.growth import growth_text
from megatron_sbld.mcore import (
    freeze_dropped_layers,
    fuse_residual,
    grow_in_stages,
    make_switchable,
    warm_up_after_growth,
)
from megatron_sbld.megatron_lm.observer import LossObserver
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.in_force import dropped_update, drops, stage_warmup_iters, updates_sensitivity
from megatron_sbld.method.tokens import TokenDrop

logger = logging.getLogger(__name__)


_RATE = "rate"
"""In the drop state, where layer-tokens drive the learning rate."""


class RateState(Protocol):
    """What a run that goes on needs of a learning rate by layer-tokens."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any] | None) -> None: ...


class AttachedDrops:
    """The drop section of one run, in force. Made on every rank, before the model is wrapped.

    Args:
        drop: checked, with its recipe filled in.
        num_layers: of the policy: those of the whole model, or of a HybridModel its units.
        train_iters: iterations of the run.
        micro_batch_size: samples of a microbatch.
        tokens: of granularity token.

    Raises:
        ValueError: naming the field of the section, its value and what is allowed.
    """

    def __init__(
        self,
        drop: DropConfig,
        num_layers: int,
        train_iters: int,
        micro_batch_size: int,
        tokens: TokenDrop | None = None,
    ) -> None:
        self.drop, self._num_layers, self._train_iters = drop, num_layers, train_iters
        self.controller = DropController(
            build_policy(drop, num_layers, train_iters),
            seed=drop.seed,
            scope=drop.decision_scope,
            sampler=drop.sampler,
            stages=drop.balance_stages,
            granularity=drop.granularity,
            num_samples=micro_batch_size if drop.granularity == "sample" else None,
            tokens=tokens,
            replicas="shared" if drop.policy == "none" else drop.replicas,
        )
        self._rate: RateState | None = None
        self._has_loaded = False  # the scheduler's state, of a run with layer dropping or without
        self._observer = LossObserver(drop, self.controller) if updates_sensitivity(drop) else None
        self._layers: list[int] = []
        self._chunks: list[torch.nn.Module] = []

    @property
    def drops(self) -> bool:
        """Whether layers or tokens are dropped; else the residual add alone is changed."""
        return drops(self.drop)

    def add(self, chunks: list[torch.nn.Module]) -> None:
        """Make chunks of the model on this rank switchable, once they are built."""
        if self.drop.residual == "fused":
            fuse_residual(chunks)
        if self.drops:
            self._layers += make_switchable(chunks, self.controller, unit=self.drop.unit)
        self._chunks += chunks

    def attach(self, optimizer: Any, scheduler: Any, rate: Callable[[], RateState] | None = None) -> None:
        """Attend to the optimizer, and let the scheduler's state dict hold the drop state. Collective.

        Call it once both are built, before a checkpoint is loaded.

        Args:
            optimizer: Megatron's.
            scheduler: Megatron's, of the learning rate.
            rate: makes what lets layer-tokens drive the scheduler, where they do, once the stages are known.
        """
        if not self.drops:
            return
        self.controller.replica = parallel_state.get_data_parallel_rank()
        if self.drop.sampler == "balanced" and self.drop.balance_stages is None:
            self.controller.stages = self._layers_of_pipeline_ranks()
        if self.drop.policy != "none" and dropped_update(self.drop) == "freeze":
            freeze_dropped_layers(self._chunks, optimizer)
        if self.controller.policy.stages is not None:
            self._attend_to_stages(optimizer, scheduler)
        if rate is not None:
            self._rate = rate()
        state_dict, load_state_dict = scheduler.state_dict, scheduler.load_state_dict
        scheduler.state_dict = lambda: {**state_dict(), CHECKPOINT_KEY: self._state_dict()}

        def load(state: dict[str, Any]) -> None:
            load_state_dict(state)
            self._load_state_dict(state.get(CHECKPOINT_KEY))

        scheduler.load_state_dict = load

    def check_resumed(self, iteration: int) -> bool:
        """Whether a run that goes on after `iteration` (0: it begins) knows its state; call it before the next one.

        Raises:
            ValueError: it does not, and has stages: nobody knows which layers have begun.
        """
        lost = iteration > 0 and self.drops and not self._has_loaded
        if lost and self.controller.policy.stages is not None:
            raise ValueError(
                f"drop.stages = {self.drop.stages} is not allowed: the run goes on after iteration {iteration}, and "
                "which layers have begun is in the parameter scheduler's state, which was not loaded; load it, or "
                "leave drop.stages out"
            )
        return not lost

    def begin(self, iteration: int, num_microbatches: int) -> str:
        """Decide for an iteration, before its step, on every rank. Returns a line if layers begin in it, or ''."""
        begun = self.controller.growth.begun
        self.controller.begin_iteration(iteration, num_microbatches)
        entering = self.controller.growth.begun - begun
        return growth_text(iteration, entering, begun, self.drop.stage_init) if entering else ""

    def observe(self, losses: dict[str, torch.Tensor]) -> None:
        """What an iteration's losses say of the layers, where the section asks for that. Collective.

        losses: the reduced ones, empty but on the last pipeline stage.
        """
        if self._observer is not None:
            self._observer.observe(losses)

    def _attend_to_stages(self, optimizer: Any, scheduler: Any) -> None:
        ranks = self._layers_of_pipeline_ranks()
        policy = build_policy(self.drop, self._num_layers, self._train_iters, ranks=ranks)
        assert policy.stages is not None, "asked for with stages alone"
        self.controller.set_stages(policy.stages)
        grow_in_stages(
            self._chunks,
            optimizer,
            self.controller,
            self.drop.stage_init,
            copy_moments=self.drop.stage_copy_moments,
        )
        if self.drop.stage_warmup:
            warm_up_after_growth(scheduler, self.controller, stage_warmup_iters(self.drop, self._train_iters))

    def _layers_of_pipeline_ranks(self) -> list[list[int]]:
        """The layers of each pipeline rank, as they were built. Collective."""
        own = (parallel_state.get_pipeline_model_parallel_rank(), self._layers)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
        layers = dict(found)
        return [sorted(layers[rank]) for rank in sorted(layers)]

    def _state_dict(self) -> dict[str, Any]:
        sensitivity = None if self._observer is None else self._observer.state_dict()
        rate = {} if self._rate is None else {_RATE: self._rate.state_dict()}
        return {"drop": self.controller.state_dict(), "sensitivity": sensitivity, **rate}

    def _load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._has_loaded = True
        self._load_rate(state)
        controller = self.controller
        if state is None:  # a checkpoint of a run without layer dropping, in which every layer has begun
            controller.policy, line = controller.growth.load_state_dict(None, controller.policy, next_iteration=1)
            differences = [line] * bool(line)
        else:
            tokens = controller.tokens
            differences = controller.load_state_dict(state["drop"])
            if self.drop.token_strata is not None:
                controller.tokens = tokens
            if self._observer is not None and state["sensitivity"] is not None:
                differences += self._observer.load_state_dict(state["sensitivity"])
        if dist.get_rank() == 0:
            for difference in differences:
                logger.warning("%s", difference)

    def _load_rate(self, state: dict[str, Any] | None) -> None:
        """Refuse to go on with a schedule that has counted otherwise; without layer dropping both counts are one."""
        if state is not None and (_RATE in state) != (self._rate is not None):
            saved, present = ("layer_tokens", "iterations") if self._rate is None else ("iterations", "layer_tokens")
            raise ValueError(
                f"lr_schedule_by (--sbld-lr-schedule-by in Megatron-LM) = {present!r} is not allowed: the parameter "
                f"scheduler that is loaded has counted by {saved}; give {saved}, or start from the weights alone"
            )
        if self._rate is not None:
            self._rate.load_state_dict(None if state is None else state[_RATE])
