"""How long an iteration of a 1F1B pipeline takes, from the passes' times: arithmetic alone, without torch or Megatron.

The order of passes is that of Megatron's plain schedule (arXiv 2104.04473, section 2.2). Transfers between stages count
as free, and so does what follows the last backward pass. The interleaved schedule is not modelled.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int) -> list[tuple[str, int]]:
    """Order in which a stage (0-based) runs its passes: ("forward" or "backward", microbatch)."""
    warmup = min(num_stages - 1 - stage, num_microbatches)
    order = [("forward", microbatch) for microbatch in range(warmup)]
    for microbatch in range(num_microbatches - warmup):
        order += [("forward", warmup + microbatch), ("backward", microbatch)]
    return order + [("backward", microbatch) for microbatch in range(num_microbatches - warmup, num_microbatches)]


def schedule_time(forward: Floats, backward: Floats, num_microbatches: int) -> Floats:
    """Seconds from the first forward to the last backward pass of the 1F1B schedule, all microbatches alike.

    forward, backward: seconds of a microbatch on each stage, [..., p]. Returns [...].
    """
    return critical_path(
        *(
            np.broadcast_to(times[..., None, :], (*times.shape[:-1], num_microbatches, times.shape[-1]))
            for times in (forward, backward)
        )
    )


def critical_path(forward: Floats, backward: Floats) -> Floats:
    """Seconds from the first forward to the last backward pass of the 1F1B schedule.

    forward, backward: seconds of each microbatch on each stage, [..., m, p]. Returns [...].
    """
    *leading, num_microbatches, num_stages = forward.shape
    queues = [deque(one_f_one_b(stage, num_stages, num_microbatches)) for stage in range(num_stages)]
    free = [np.zeros(leading) for _ in range(num_stages)]  # when a stage has finished its last pass
    handed_on: dict[tuple[str, int, int], Floats] = {}  # pass, stage that waits for it, microbatch -> when it was done
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                name, microbatch = queue[0]
                step = 1 if name == "forward" else -1
                if 0 <= stage - step < num_stages:
                    if (name, stage, microbatch) not in handed_on:
                        break
                    free[stage] = np.maximum(free[stage], handed_on.pop((name, stage, microbatch)))
                free[stage] = free[stage] + (forward if name == "forward" else backward)[..., microbatch, stage]
                if 0 <= stage + step < num_stages:
                    handed_on[name, stage + step, microbatch] = free[stage]
                queue.popleft()
    return np.max(free, axis=0)
