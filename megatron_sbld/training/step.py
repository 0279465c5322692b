"""One training iteration and one validation on megatron-core's schedules: batch, loss, optimizer step, report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sbld.config.sections import Config
from megatron_sbld.data.batches import Batch
from megatron_sbld.health.watchdog import POSITION
from megatron_sbld.mcore.compat import batch_on_this_cp_rank
from megatron_sbld.ranks import this_device


class StepResult(NamedTuple):
    """What a training iteration reports; the same on every rank, but for what the optimizer knows of its own stage."""

    loss: float
    grad_norm: float | None
    num_zeros: int | None
    update_successful: bool
    stop_requested: bool
    microbatch_losses: list[float]
    """Mean loss per token of each microbatch over all replicas, NaN where no token counts; empty unless asked for."""


def _forward_step(batches: Iterator[Batch], model: GPTModel) -> tuple[torch.Tensor, Any]:
    """Megatron's forward step: per-token losses [b, s] on the last stage, and the function that reduces them."""
    POSITION.microbatches += 1
    device = this_device()
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
    batch = batch_on_this_cp_rank(batch)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(_masked_loss, batch["loss_mask"])


def _masked_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses [b, s] of tokens that count, their number, and both for the report."""
    loss = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    # Cloned, because Megatron divides the loss in place.
    return loss, num_tokens, {"loss": loss.detach().clone(), "num_tokens": num_tokens}


def train_step(
    config: Config,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: Sequence[Iterator[Batch]],
    stop_requested: bool,
    report_microbatches: bool = False,
) -> StepResult:
    """Forward, backward and optimizer step over all microbatches of an iteration.

    Args:
        config: the run.
        chunks: this rank's model chunks.
        optimizer: Megatron's.
        batches: one iterator of microbatches for each chunk.
        stop_requested: whether this rank was asked to stop; the result says whether any was.
        report_microbatches: report the loss of each microbatch too; needed by all ranks or none.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    num_microbatches = get_num_microbatches()
    losses = _forward_backward(config, chunks, batches, num_microbatches, forward_only=False)
    update_successful, grad_norm, num_zeros = optimizer.step()
    loss_sum, num_tokens, stopping, microbatch_losses = _sum_over_ranks(
        losses, stop_requested, num_microbatches if report_microbatches else 0
    )
    return StepResult(
        loss=loss_sum / max(num_tokens, 1),
        grad_norm=None if grad_norm is None else float(grad_norm),
        num_zeros=None if num_zeros is None else int(num_zeros),
        update_successful=bool(update_successful),
        stop_requested=stopping > 0,
        microbatch_losses=microbatch_losses,
    )


class StopRequestedError(Exception):
    """A rank was asked to stop during a validation or task; raised on all of them."""


def validation_loss(
    config: Config,
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[Iterator[Batch]],
    num_microbatches: int,
    interrupt: Callable[[], None] | None = None,
) -> float:
    """Mean loss per token over `num_microbatches` microbatches a replica, at full depth and without dropout.

    `interrupt` is called before each microbatch, on a pipeline before as many as a training iteration has, and may
    raise on all ranks to end the validation.
    """
    POSITION.enter("validation")
    a_call = num_microbatches
    if interrupt is not None:
        a_call = 1
        if config.parallel.pipeline_model_parallel_size > 1:  # it is filled and emptied anew for each call
            replicas = parallel_state.get_data_parallel_world_size()
            a_call = config.training.global_batch_size // (config.training.micro_batch_size * replicas)
    losses: list[dict[str, torch.Tensor]] = []
    with evaluating(config, chunks):
        for _ in range(0, num_microbatches, a_call):
            if interrupt is not None:
                interrupt()
            losses += _forward_backward(config, chunks, batches, a_call, forward_only=True)
    loss_sum, num_tokens, _, _ = _sum_over_ranks(losses, False)
    return loss_sum / max(num_tokens, 1)


@contextmanager
def evaluating(config: Config, chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Evaluation mode; parameter gathers that training has in flight are finished first, as Megatron-LM does.

    Nothing is recorded for a backward pass: Megatron's schedules would do so also with forward_only.
    """
    overlap = config.parallel.overlap_param_gather
    for chunk in chunks:
        if overlap:
            chunk.disable_forward_pre_hook()
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in chunks:
            chunk.train()
            if overlap:
                chunk.enable_forward_pre_hook()


def _forward_backward(
    config: Config,
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[Iterator[Batch]],
    num_microbatches: int,
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    """Run Megatron's schedule for this layout; the reports of each microbatch, empty but on the last stage."""
    reports: list[dict[str, torch.Tensor]] = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=list(batches) if len(chunks) > 1 else batches[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=config.model.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
    )
    return reports


def _sum_over_ranks(
    losses: list[dict[str, torch.Tensor]], stop_requested: bool, num_microbatches: int = 0
) -> tuple[float, int, int, list[float]]:
    """(summed loss, tokens that count, ranks that were asked to stop, mean losses of the first `num_microbatches`
    microbatches) over all ranks, in one collective.

    Losses live on the last pipeline stage, the same on its tensor-parallel ranks: the first of these contributes.
    """
    totals = torch.zeros(3 + 2 * num_microbatches, dtype=torch.float64, device=this_device())
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        loss_sums = torch.stack([report["loss"] for report in losses])
        token_counts = torch.stack([report["num_tokens"] for report in losses])
        totals[0], totals[1] = loss_sums.double().sum(), token_counts.double().sum()
        if num_microbatches:
            totals[3:] = torch.cat([loss_sums.double(), token_counts.double()])
    totals[2] = float(stop_requested)
    dist.all_reduce(totals)
    loss_sum, num_tokens, stopping, *by_microbatch = totals.tolist()
    pairs = zip(by_microbatch[:num_microbatches], by_microbatch[num_microbatches:], strict=True)
    return loss_sum, int(num_tokens), int(stopping), [loss / tokens if tokens else math.nan for loss, tokens in pairs]
