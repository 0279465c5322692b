"""One training run of Megatron-LM with layer dropping: what happens at each of the places where it is hooked in."""

from __future__ import annotations

import functools
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, get_num_microbatches

from megatron_sbld.controller import DropController
from megatron_sbld.megatron_lm.arguments import drop_config, lr_schedule_by, named_as_arguments, policy_layers
from megatron_sbld.megatron_lm.attached import AttachedDrops
from megatron_sbld.megatron_lm.checks import check_arguments
from megatron_sbld.megatron_lm.layer_tokens import BY_LAYER_TOKENS, LayerTokenRate
from megatron_sbld.megatron_lm.scalars import Scalars
from megatron_sbld.method.build_tokens import build_tokens
from megatron_sbld.method.in_force import drops_tokens
from megatron_sbld.method.tokens import strata_needed


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
        self._args = args
        drop = drop_config(args)
        check_arguments(args, train_iters, drop)
        with named_as_arguments():
            num_layers = policy_layers(args, drop)
            tokens = None
            if drops_tokens(drop):
                tokens = build_tokens(drop, num_layers, train_iters, args.seq_length, strata_needed(args))
            self._drops = AttachedDrops(drop, num_layers, train_iters, args.micro_batch_size, tokens)
        self._rate: LayerTokenRate | None = None
        self._scalars = Scalars(args, self.controller, training, drop.unit)

    @property
    def controller(self) -> DropController:
        """That of the run."""
        return self._drops.controller

    def add(self, chunks: list[torch.nn.Module]) -> None:
        """Make chunks of the model on this rank switchable, once they are built."""
        self._drops.add(chunks)

    def get_optimizer_param_scheduler(
        self, stock: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The stock scheduler, whose state dict holds the drop state as well. Model and optimizer are built by now."""
        scheduler = stock(optimizer)
        with named_as_arguments():
            by_layer_tokens = lr_schedule_by(self._args) == BY_LAYER_TOKENS
            self._drops.attach(
                optimizer, scheduler, functools.partial(self._drive, scheduler) if by_layer_tokens else None
            )
        return scheduler

    def _drive(self, scheduler: Any) -> LayerTokenRate:
        self._rate = LayerTokenRate(self._args, self.controller, scheduler)
        return self._rate

    def train_step(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An iteration: decisions on every rank, the stock step, and what its loss says of the layers."""
        began = time.perf_counter()
        if not self.controller.begun:
            with named_as_arguments():
                self._drops.check_resumed(getattr(self._args, "iteration", 0))  # that of the checkpoint
        growth = self._drops.begin(self._args.curr_iteration + 1, get_num_microbatches())
        if growth:
            self._scalars.note_growth(growth)
        result = stock(*args, **kwargs)
        if self._rate is not None:
            self._rate.count(get_current_global_batch_size())
            self._scalars.note_layer_tokens(self._rate.consumed)
        self._scalars.note_step(time.perf_counter() - began, get_current_global_batch_size())
        self._drops.observe(result[0])
        return result

    def training_log(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Megatron-LM's log of an iteration, then ours."""
        result = stock(*args, **kwargs)
        self._scalars.write()
        return result
