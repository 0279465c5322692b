"""Times of the residual add's passes, in turns with a clone: one call at a time, with nothing of it in the caches.

A buffer larger than the caches is read before each call (writing it would leave lines that the call has to write back).
On a GPU the device then waits while the host queues the call: the events around it time the device alone, as in
training, where the host runs ahead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.common.gain import Interval, time_ratio
from benchmarks.common.memory import measure_peak
from benchmarks.common.residual_cases import Case, Implementation, Operands
from megatron_sbld.residual.choice import VARIABLE

HEAD_START = 5e-3  # seconds that the device waits for the host
CPU_FLUSH_BYTES = 32 << 20

Result = TypeVar("Result")


@dataclass
class Times:
    """Seconds of one implementation's passes, a number a round."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    peak: int = 0
    """Bytes allocated at one time in a forward and a backward pass, above what was there before."""


class Timer:
    """Times one call at a time."""

    def __init__(self, device: torch.device) -> None:
        self.calls = self.late = 0
        """late: calls that the host took longer to queue than the device waited; their time is the host's."""
        self.device = device
        self._on_gpu = device.type == "cuda"
        size = CPU_FLUSH_BYTES
        if self._on_gpu:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._cycles = self._cycles_of(HEAD_START)
        self._buffer = torch.zeros(size // 4, device=device)

    def __call__(self, function: Callable[[], Result]) -> tuple[float, Result]:
        """(seconds, what the function returned)."""
        self._buffer.sum()
        self.calls += 1
        if not self._on_gpu:
            began = time.perf_counter()
            result = function()
            return time.perf_counter() - began, result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began = time.perf_counter()
        torch.cuda._sleep(self._cycles)
        start.record()
        result = function()
        end.record()
        self.late += time.perf_counter() - began > HEAD_START
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, result

    def _cycles_of(self, seconds: float) -> int:
        """Clock cycles that take the device so long."""
        probe = 10_000_000
        torch.cuda._sleep(probe)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(probe)
        end.record()
        torch.cuda.synchronize()
        return round(probe * seconds / (start.elapsed_time(end) / 1e3))


class Measurement:
    """One case: its operands, and the times of its implementations and of a clone of the residual."""

    def __init__(self, case: Case, implementations: Sequence[Implementation], timer: Timer, seed: int) -> None:
        self.case = case
        self.implementations = [one for one in implementations if case.rows in one.rows]
        self.times = {one.name: Times() for one in self.implementations}
        self.clone: list[float] = []
        self._timer = timer
        self._operands = Operands(case, timer.device, seed)

    def run(self, rounds: int) -> None:
        """Compile and check, then time in turns whose order rotates with the rounds."""
        torch._dynamo.reset()  # compiled for this shape alone, as in a training run
        for one in self.implementations:
            with using(one.setting):
                for _ in range(2):
                    self._check(one)
                residual = self._residual(one)
                self.times[one.name].peak = measure_peak(lambda one=one, residual=residual: self._passes(one, residual))
        turns: list[Implementation | None] = [None, *self.implementations]  # None is the clone
        for round_ in range(rounds):
            for turn in range(len(turns)):
                self._turn(turns[(round_ + turn) % len(turns)])
        del self._operands

    def _turn(self, one: Implementation | None) -> None:
        operands = self._operands
        if one is None:
            self.clone.append(self._timer(operands.residual.detach().clone)[0])
            return
        with using(one.setting):
            residual = self._residual(one)
            forward, outputs = self._timer(lambda: one.call(operands, residual, self.case.dropout_prob))
            backward, _ = self._timer(lambda: self._backward(one, outputs))
        self.times[one.name].forward.append(forward)
        self.times[one.name].backward.append(backward)

    def _residual(self, one: Implementation) -> torch.Tensor:
        return self._operands.residual.clone() if one.in_place else self._operands.residual

    def _backward(self, one: Implementation, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        operands = self._operands
        inputs = [operands.x, operands.residual, *([operands.bias] if one.with_bias else [])]
        return torch.autograd.grad(outputs, inputs, [operands.gradient(output) for output in outputs])

    def _passes(self, one: Implementation, residual: torch.Tensor) -> Any:
        return self._backward(one, one.call(self._operands, residual, self.case.dropout_prob))

    def _check(self, one: Implementation) -> None:
        """The first passes, untimed: what is timed must compute the same."""
        outputs = one.call(self._operands, self._residual(one), self.case.dropout_prob)
        gradients = self._backward(one, outputs)  # also makes what comes back to the outputs
        if self.case.dropout_prob == 0:
            expected = self._operands.expected(one.with_bias)
            torch.testing.assert_close(outputs[0].float(), expected, atol=0.1, rtol=0.02, msg=f"{one.name} differs")
        if not all(bool(tensor.isfinite().all()) for tensor in (*outputs, *gradients)):
            raise RuntimeError(f"{one.name}: not finite, so its times would be those of another computation")

    def bandwidth(self) -> float:
        """Bytes a second of the clone."""
        return 2 * self.case.residual_bytes * self.case.elements / float(np.mean(self.clone))

    def share_of_clone(self, one: Implementation, pass_: str, seed: int) -> Interval | None:
        """Needed bytes over time, by the clone's; None where nothing has to be moved."""
        necessary = getattr(one.needed(self.case), pass_)
        if necessary == 0:
            return None
        ratio = necessary / (2 * self.case.residual_bytes)
        found = time_ratio(np.array(self.clone), np.array(getattr(self.times[one.name], pass_)), seed=seed)
        return Interval(*(ratio * value for value in (found.value, found.low, found.high)))


@contextmanager
def using(setting: str | None) -> Iterator[None]:
    """With MEGATRON_SBLD_RESIDUAL set so; None leaves it."""
    before = os.environ.get(VARIABLE)
    if setting is not None:
        os.environ[VARIABLE] = setting
    try:
        yield
    finally:
        if setting is not None:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before
