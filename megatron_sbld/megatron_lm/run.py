"""One training run of Megatron-LM with layer dropping: what happens at each of the places where it is hooked in."""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, get_num_microbatches

from megatron_sbld.controller import CHECKPOINT_KEY, DropController
from megatron_sbld.growth import growth_text
from megatron_sbld.mcore import (
    freeze_dropped_layers,
    fuse_residual,
    grow_in_stages,
    make_switchable,
    warm_up_after_growth,
)
from megatron_sbld.megatron_lm.arguments import drop_config, named_as_arguments, policy_layers
from megatron_sbld.megatron_lm.checks import check_arguments
from megatron_sbld.megatron_lm.observer import LossObserver
from megatron_sbld.megatron_lm.scalars import Scalars
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.in_force import dropped_update, stage_warmup_iters, updates_sensitivity

logger = logging.getLogger(__name__)


class LayerDropping:
    """Made once the arguments are known and before the model is built, on every rank.

    Args:
        args: Megatron-LM's.
        train_iters: iterations of the run, also where it is counted in samples.
        training: the module megatron.training.training.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(self, args: Namespace, train_iters: int, training: Any) -> None:
        self._args, self._train_iters = args, train_iters
        self._drop = drop_config(args)
        check_arguments(args, train_iters, self._drop)
        with named_as_arguments():
            policy = build_policy(self._drop, policy_layers(args, self._drop), train_iters)
        drop = self._drop
        self.controller = DropController(
            policy,
            seed=drop.seed,
            scope=drop.decision_scope,
            sampler=drop.sampler,
            stages=drop.balance_stages,
            granularity=drop.granularity,
            num_samples=args.micro_batch_size if drop.granularity == "sample" else None,
            replicas="shared" if drop.policy == "none" else drop.replicas,
        )
        self._observer = LossObserver(drop, self.controller) if updates_sensitivity(drop) else None
        self._scalars = Scalars(args, self.controller, training, drop.unit)
        self._layers: list[int] = []
        self._chunks: list[torch.nn.Module] = []

    @property
    def drops(self) -> bool:
        """Whether there is a policy; without one the residual add alone is changed."""
        return self._drop.policy != "none"

    def add(self, chunks: list[torch.nn.Module]) -> None:
        """Make chunks of the model on this rank switchable, once they are built."""
        if self._drop.residual == "fused":
            fuse_residual(chunks)
        if self.drops:
            self._layers += make_switchable(chunks, self.controller, unit=self._drop.unit)
        self._chunks += chunks

    def get_optimizer_param_scheduler(
        self, stock: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The stock scheduler, whose state dict holds the drop state as well. Model and optimizer are built by now."""
        scheduler = stock(optimizer)
        if not self.drops:
            return scheduler
        self.controller.replica = parallel_state.get_data_parallel_rank()
        if self._drop.sampler == "balanced" and self._drop.balance_stages is None:
            self.controller.stages = self._layers_of_pipeline_ranks()
        if dropped_update(self._drop) == "freeze":
            freeze_dropped_layers(self._chunks, optimizer)
        if self._drop.stages is not None:
            self._attend_to_stages(optimizer, scheduler)
        state_dict, load_state_dict = scheduler.state_dict, scheduler.load_state_dict
        scheduler.state_dict = lambda: {**state_dict(), CHECKPOINT_KEY: self._state_dict()}

        def load(state: dict[str, Any]) -> None:
            load_state_dict(state)
            self._load_state_dict(state.get(CHECKPOINT_KEY))

        scheduler.load_state_dict = load
        return scheduler

    def _attend_to_stages(self, optimizer: Any, scheduler: Any) -> None:
        with named_as_arguments():
            ranks = self._layers_of_pipeline_ranks()
            policy = build_policy(self._drop, self.controller.num_layers, self._train_iters, ranks=ranks)
            assert policy.stages is not None, "asked for with stages alone"
            self.controller.set_stages(policy.stages)
            grow_in_stages(
                self._chunks,
                optimizer,
                self.controller,
                self._drop.stage_init,
                copy_moments=self._drop.stage_copy_moments,
            )
            if self._drop.stage_warmup:
                warm_up_after_growth(scheduler, self.controller, stage_warmup_iters(self._drop, self._train_iters))

    def train_step(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An iteration: decisions on every rank, the stock step, and what its loss says of the layers."""
        began = time.perf_counter()
        iteration, begun = self._args.curr_iteration + 1, self.controller.growth.begun
        self.controller.begin_iteration(iteration, get_num_microbatches())
        if entering := self.controller.growth.begun - begun:
            self._scalars.note_growth(growth_text(iteration, entering, begun, self._drop.stage_init))
        result = stock(*args, **kwargs)
        self._scalars.note_step(time.perf_counter() - began, get_current_global_batch_size())
        if self._observer is not None:
            self._observer.observe(result[0])
        return result

    def training_log(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Megatron-LM's log of an iteration, then ours."""
        result = stock(*args, **kwargs)
        self._scalars.write()
        return result

    def _layers_of_pipeline_ranks(self) -> list[list[int]]:
        """The layers of each pipeline rank, as they were built. Collective."""
        own = (parallel_state.get_pipeline_model_parallel_rank(), self._layers)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
        layers = dict(found)
        return [sorted(layers[rank]) for rank in sorted(layers)]

    def _state_dict(self) -> dict[str, Any]:
        sensitivity = None if self._observer is None else self._observer.state_dict()
        return {"drop": self.controller.state_dict(), "sensitivity": sensitivity}

    def _load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is None:  # a checkpoint of a run without layer dropping
            return
        differences = self.controller.load_state_dict(state["drop"])
        if self._observer is not None and state["sensitivity"] is not None:
            differences += self._observer.load_state_dict(state["sensitivity"])
        if dist.get_rank() == 0:
            for difference in differences:
                logger.warning("%s", difference)
