"""A pipeline's iteration, pass by pass: Megatron's plain and interleaved 1F1B schedules with every pass's own duration.

The plain schedule's order is pipeline.py's, the interleaved one's that of megatron-core 0.16.1 (schedules.py:738, :798;
arXiv 2104.04473, section 2.2). Chunk k of the model lies on rank k % p, as in placement.py. With free transfers and one
chunk a rank the end is `pipeline.critical_path`. All arrays have leading dimensions [n], the iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_sbld.layout.pipeline import Floats, one_f_one_b


class Pass(NamedTuple):
    """A forward or backward pass of a microbatch through a chunk of the model, both from 0."""

    is_forward: bool
    microbatch: int
    chunk: int


@dataclass(frozen=True)
class Event:
    """A pass with the seconds at which it began and ended, [n]."""

    rank: int
    what: Pass
    start: Floats
    end: Floats


@dataclass(frozen=True)
class Run:
    """What became of a schedule."""

    end: Floats
    """Seconds from the first forward to the last backward pass, [n]."""
    busy: Floats
    """Seconds of each rank's passes, [n, p]."""
    sent: Floats
    """Seconds for which each rank was held by its transfers, [p]."""
    last_backward: list[tuple[Floats, Floats]]
    """When each chunk's last backward pass began and ended."""
    events: list[Event] = field(default_factory=list)
    """All passes, where asked for."""


def pass_order(rank: int, num_ranks: int, num_microbatches: int, chunks_per_rank: int = 1) -> list[Pass]:
    """In which order a pipeline rank runs its passes. Interleaved, microbatches go in groups of num_ranks."""
    if chunks_per_rank == 1:
        plain = one_f_one_b(rank, num_ranks, num_microbatches)
        return [Pass(name == "forward", microbatch, rank) for name, microbatch in plain]
    table = [
        (microbatch, chunk)
        for first in range(0, num_microbatches, num_ranks)
        for chunk in range(chunks_per_rank)
        for microbatch in range(first, min(first + num_ranks, num_microbatches))
    ]
    forwards = [Pass(True, microbatch, chunk * num_ranks + rank) for microbatch, chunk in table]
    backwards = [
        Pass(False, microbatch, (chunks_per_rank - 1 - chunk) * num_ranks + rank) for microbatch, chunk in table
    ]
    warmup = min(2 * (num_ranks - 1 - rank) + (chunks_per_rank - 1) * num_ranks, len(table))
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(table) - warmup :]


def run_schedule(
    forward: Floats,
    backward: Floats,
    num_ranks: int,
    *,
    transfer: float = 0.0,
    holds: bool = True,
    first_forward: Callable[[int, Floats], Floats] | None = None,
    record: bool = False,
) -> Run:
    """Runs a schedule.

    forward, backward: seconds of each pass, [n, m, chunks].
    transfer: seconds from one rank to another.
    holds: whether it keeps the sender from computing (the plain schedule) or runs beside it (overlap_p2p_comm).
    first_forward: (chunk, start) -> end of the first microbatch's forward pass, where it waits for parameters.
    record: keep every pass.
    """
    num_microbatches, num_chunks = forward.shape[-2:]
    orders = [pass_order(rank, num_ranks, num_microbatches, num_chunks // num_ranks) for rank in range(num_ranks)]
    clock = _Clock(forward, backward, num_ranks, transfer=transfer, holds=holds, first_forward=first_forward)
    events: list[Event] = []
    positions = [0] * num_ranks
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while positions[rank] < len(order) and clock.can_run(order[positions[rank]]):
                event = clock.run(rank, order[positions[rank]])
                if record:
                    events.append(event)
                positions[rank] += 1
                moved = True
    assert all(at == len(order) for at, order in zip(positions, orders, strict=True)), "the schedule waits for itself"
    return Run(
        end=np.max([end for _, end in clock.last_backward], axis=0),
        busy=np.stack(clock.busy, axis=-1),
        sent=clock.sent,
        last_backward=clock.last_backward,
        events=events,
    )


class _Clock:
    """When each rank is free and each pass's input is there; arguments as in run_schedule."""

    def __init__(
        self,
        forward: Floats,
        backward: Floats,
        num_ranks: int,
        *,
        transfer: float,
        holds: bool,
        first_forward: Callable[[int, Floats], Floats] | None,
    ) -> None:
        leading, self._num_chunks = forward.shape[:-2], forward.shape[-1]
        self._forward, self._backward = forward, backward
        self._transfer = transfer
        self._holds = holds and num_ranks > 1
        self._first_forward = first_forward
        self._free = [np.zeros(leading) for _ in range(num_ranks)]
        self._arrived: dict[Pass, Floats] = {}  # by the pass that waits for it
        self.busy = [np.zeros(leading) for _ in range(num_ranks)]
        self.sent = np.zeros(num_ranks)
        self.last_backward: list[tuple[Floats, Floats]] = [(self._free[0], self._free[0])] * self._num_chunks

    def can_run(self, what: Pass) -> bool:
        """Whether the pass has its input."""
        return self._begins(what) or what in self._arrived

    def run(self, rank: int, what: Pass) -> Event:
        """Run a pass that has its input, as soon as its rank is free, and send on what it makes."""
        is_forward, microbatch, chunk = what
        start = self._free[rank]
        if not self._begins(what):
            start = np.maximum(start, self._arrived.pop(what))
        seconds = (self._forward if is_forward else self._backward)[..., microbatch, chunk]
        end = start + seconds
        if is_forward and microbatch == 0 and self._first_forward is not None:
            end = self._first_forward(chunk, start)
        self.busy[rank] = self.busy[rank] + seconds
        self._free[rank] = end
        after = chunk + (1 if is_forward else -1)
        if 0 <= after < self._num_chunks:
            self._arrived[Pass(is_forward, microbatch, after)] = end + self._transfer
            if self._holds:
                self._free[rank] = end + self._transfer
                self.sent[rank] += self._transfer
        if not is_forward:
            self.last_backward[chunk] = (start, end)
        return Event(rank, what, start, end)

    def _begins(self, what: Pass) -> bool:
        """Whether no other pass comes before."""
        return what.chunk == (0 if what.is_forward else self._num_chunks - 1)


def most_in_flight(amounts: Floats, rank: int, num_ranks: int, num_microbatches: int) -> tuple[Floats, int]:
    """The most that a rank holds at one time of what forward passes leave for the backward passes.

    amounts: what a pass through each chunk leaves, [n, m or 1, chunks].
    Returns the most, [n], and how many passes are in flight at most.
    """
    chunks = amounts.shape[-1]
    held = np.zeros(amounts.shape[:-2])
    most, passes, most_passes = held, 0, 0
    for is_forward, microbatch, chunk in pass_order(rank, num_ranks, num_microbatches, chunks // num_ranks):
        amount = amounts[..., min(microbatch, amounts.shape[-2] - 1), chunk]
        held = held + amount if is_forward else held - amount
        passes += 1 if is_forward else -1
        most, most_passes = np.maximum(most, held), max(most_passes, passes)
    return most, most_passes
