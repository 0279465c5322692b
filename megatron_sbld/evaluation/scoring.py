"""Scores given tokens under a model on megatron-core's schedules: batched by length, on any parallel layout.

Requests of like lengths are padded on the right to a common one, which causal attention makes harmless, and run as the
microbatches of one call of Megatron's schedule for each length. Replicas share the microbatches of each call.

Probabilities are over the tokenizer's vocabulary: the rows that pad the word embeddings are never targets, in training
or here, and an exported model does not have them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_sbld.config.sections import ParallelConfig
from megatron_sbld.evaluation.requests import Request, Score
from megatron_sbld.health.watchdog import POSITION
from megatron_sbld.mcore.compat import batch_on_this_cp_rank
from megatron_sbld.ranks import this_device

_LENGTH_UNIT = 16
"""Inputs are padded to multiples of it: few lengths, so few pipelines to fill, and little padding."""

_MICROBATCHES_A_STAGE = 16
"""Of a part that is not interrupted, on a pipeline: filling and emptying it then costs a sixteenth at most."""

Batch = dict[str, torch.Tensor]
"""A microbatch: tokens, labels, position_ids, and requests (the request that a position is scored for, or -1), each
int64 [b, s]."""


class _Call(NamedTuple):
    """Microbatches of one shape, for one call of Megatron's schedule."""

    length: int
    rows: int
    microbatches: list[list[int]]
    """Indices of their requests; a last one may have fewer than `rows`."""


def score(
    parallel: ParallelConfig,
    chunks: Sequence[torch.nn.Module],
    requests: Sequence[Request],
    *,
    vocab_size: int,
    batch_tokens: int,
    on_progress: Callable[[float], None] = lambda share: None,
    interrupt: Callable[[], None] | None = None,
) -> list[Score]:
    """Score requests with a model in evaluation mode. Collective; the same result on every rank.

    Args:
        parallel: the layout that the chunks were built for.
        chunks: this rank's model chunks, wrapped or not.
        requests: what to score; none is longer than the model's context + 1.
        vocab_size: tokens of the tokenizer; rows of the word embeddings beyond it are left out.
        batch_tokens: most tokens of a microbatch, padding included, but always at least one request.
        on_progress: is told the share done, in (0, 1], after each microbatch of this rank.
        interrupt: is called before each microbatch, on a pipeline before each few of them, and may raise on all ranks
            to end the scoring.
    """
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    lengths = [len(request.tokens) - 1 for request in requests]
    planned = plan_calls(lengths, batch_tokens, replicas, _unit(parallel))
    if interrupt is not None:
        stages = parallel.pipeline_model_parallel_size
        planned = _in_parts(planned, replicas * (1 if stages == 1 else _MICROBATCHES_A_STAGE * stages))
    calls = [call._replace(microbatches=call.microbatches[replica::replicas]) for call in planned]
    totals = torch.zeros(len(requests), 2, dtype=torch.float64, device=this_device())
    steps = [call.length * call.rows for call in calls for _ in call.microbatches]
    shares = (done / sum(steps) for done in itertools.accumulate(steps))
    with torch.no_grad():
        for call in calls:
            if interrupt is not None:
                interrupt()
            _run(parallel, chunks, requests, call, totals, vocab_size, lambda: on_progress(next(shares)))
    # Scores arise on the last stage, the same on its tensor-parallel ranks, each position on one context-parallel rank.
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        totals.zero_()
    dist.all_reduce(totals)
    return [
        Score(log_likelihood, hits == request.num_targets)
        for (log_likelihood, hits), request in zip(totals.tolist(), requests, strict=True)
    ]


def _unit(parallel: ParallelConfig) -> int:
    """What input lengths must be a multiple of: sequence and context parallelism divide them."""
    tensor = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    context = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    return math.lcm(_LENGTH_UNIT, tensor * context)


def plan_calls(lengths: Sequence[int], batch_tokens: int, replicas: int, unit: int) -> list[_Call]:
    """Calls that cover all requests, longest first, so that what does not fit into memory fails at once.

    Args:
        lengths: input tokens of each request.
        batch_tokens: most tokens of a microbatch, padding included; one request may have more.
        replicas: they share a call's microbatches, so that few requests do not end up in one microbatch of one replica.
        unit: padded lengths are multiples of it.
    """
    padded = [-(-length // unit) * unit for length in lengths]
    order = sorted(range(len(lengths)), key=lambda index: (-padded[index], index))
    calls = []
    for length, group in itertools.groupby(order, key=lambda index: padded[index]):
        indices = list(group)
        rows = max(1, min(batch_tokens // length, -(-len(indices) // replicas)))
        microbatches = [indices[start : start + rows] for start in range(0, len(indices), rows)]
        calls.append(_Call(length, rows, microbatches))
    return calls


def _in_parts(calls: Sequence[_Call], microbatches: int) -> list[_Call]:
    """The same calls with so many microbatches each at most, of all replicas together."""
    return [
        call._replace(microbatches=call.microbatches[start : start + microbatches])
        for call in calls
        for start in range(0, len(call.microbatches), microbatches)
    ]


def _run(
    parallel: ParallelConfig,
    chunks: Sequence[torch.nn.Module],
    requests: Sequence[Request],
    call: _Call,
    totals: torch.Tensor,
    vocab_size: int,
    on_microbatch: Callable[[], None],
) -> None:
    """Run a call's microbatches and add their scores to `totals` [requests, (log-likelihood, hits)]."""
    microbatches = list(call.microbatches)
    if len(chunks) > 1:  # the interleaved schedule wants whole groups
        microbatches += [[]] * (-len(microbatches) % parallel.pipeline_model_parallel_size)
    if not microbatches:
        return

    def batches() -> Iterator[Batch]:
        for indices in microbatches:
            yield batch_on_this_cp_rank(_batch(requests, indices, call))
            if indices:
                on_microbatch()

    def forward_step(data: Iterator[Batch], model: GPTModel) -> tuple[torch.Tensor, object]:
        POSITION.microbatches += 1
        batch = next(data)
        output = model(batch["tokens"], batch["position_ids"], None)
        return output, partial(_add_scores, totals, batch, vocab_size)

    iterators = itertools.tee(batches(), len(chunks))
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(iterators) if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=call.length,
        micro_batch_size=call.rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    next(iterators[0], None)  # lets it report its last microbatch


def _batch(requests: Sequence[Request], indices: Sequence[int], call: _Call) -> Batch:
    shape = (call.rows, call.length)
    tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    scored = torch.full(shape, -1, dtype=torch.int64)
    for row, index in enumerate(indices):
        ids = torch.tensor(requests[index].tokens)
        inputs, targets = len(ids) - 1, requests[index].num_targets
        tokens[row, :inputs], labels[row, :inputs] = ids[:-1], ids[1:]
        scored[row, inputs - targets : inputs] = index
    # Padding may reach beyond the positions that the model has learned; nothing of it is scored.
    longest = max((len(requests[index].tokens) - 1 for index in indices), default=1)
    position_ids = torch.arange(call.length).clamp(max=longest - 1).expand(shape)
    batch = {"tokens": tokens, "labels": labels, "position_ids": position_ids, "requests": scored}
    return {name: tensor.to(this_device(), non_blocking=True) for name, tensor in batch.items()}


def _add_scores(totals: torch.Tensor, batch: Batch, vocab_size: int, logits: torch.Tensor, non_loss_data: bool) -> None:
    """Add what this rank's part of a microbatch scores.

    Args:
        totals: float64 [requests, 2], summed log-likelihoods and targets that are the argmax.
        batch: the microbatch.
        vocab_size: tokens of the tokenizer.
        logits: [b, s, V / tensor-parallel ranks].
        non_loss_data: Megatron's schedules always give it, here as True.
    """
    is_scored = batch["requests"] >= 0
    if not is_scored.any():
        return
    group = parallel_state.get_tensor_model_parallel_group()
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    scored = logits[is_scored].float()  # [n, V / ranks]
    first_id = rank * scored.shape[-1]
    scored[:, max(0, vocab_size - first_id) :] = -math.inf
    labels, requests = batch["labels"][is_scored], batch["requests"][is_scored]

    best, ids = scored.max(dim=-1)
    ids += first_id
    if ranks > 1:
        all_best, all_ids = ([torch.empty_like(tensor) for _ in range(ranks)] for tensor in (best, ids))
        dist.all_gather(all_best, best, group=group)
        dist.all_gather(all_ids, ids, group=group)
        # The first of equal values, and within a rank too: the lowest id.
        ids = torch.stack(all_ids).gather(0, torch.stack(all_best).argmax(dim=0, keepdim=True))[0]
    losses = vocab_parallel_cross_entropy(scored, labels)
    totals.index_add_(0, requests, torch.stack([-losses, (ids == labels).float()], dim=-1).double())
