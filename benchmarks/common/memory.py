"""Peaks of memory: measuring the one of a call, and the arithmetic of activation_memory.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch.profiler import ProfilerActivity, profile


def measure_peak(run: Callable[[], Any]) -> int:
    """The most bytes that a call has allocated at one time, above what was allocated before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return peak_of_allocations([event.nbytes() for event in events])


def spread(num_kept: int, num_layers: int) -> NDArray[np.bool_]:
    """Which of the layers are kept, bool [L], evenly spread."""
    steps = np.arange(num_layers + 1) * num_kept // num_layers
    return np.diff(steps) > 0


def fit_line(kept: Sequence[int], peak: Sequence[int]) -> tuple[float, float, float]:
    """(fixed bytes, bytes of a layer, largest deviation in bytes) of peak = fixed + layer * kept."""
    layer, fixed = np.polyfit(kept, peak, 1)
    return float(fixed), float(layer), float(np.abs(fixed + layer * np.array(kept) - np.array(peak)).max())


def peak_of_allocations(sizes: Sequence[int]) -> int:
    """The most bytes alive at one time, from allocations (positive) and releases (negative) in order."""
    return int(max(np.cumsum(np.asarray(sizes, dtype=np.int64)).max(initial=0), 0))


def depth_of_run(keep_prob: float, num_layers: int, iterations: int) -> tuple[float, float, int]:
    """What independent decisions of one keep_prob do to the depth in a run of so many iterations.

    Returns (probability that an iteration keeps every layer, that any of the run does, the kept layers that the deepest
    iteration of the run does not exceed with a probability of at least one half).
    """
    full = keep_prob**num_layers
    any_full = -np.expm1(iterations * np.log1p(-full))
    median_deepest = binom.ppf(0.5 ** (1 / iterations), num_layers, keep_prob)
    return full, float(any_full), int(median_deepest)
