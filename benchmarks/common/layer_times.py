"""Timing the forward and backward passes of single layers inside of a training iteration.

Hooks mark four moments of a layer's pass, without changing what is computed: its forward begins and ends (module
hooks), the gradient of its output is complete (its backward begins) and the gradient of its input is complete (its
backward has ended; autograd runs a layer's nodes between these two, and the accumulation of its weights' gradients as
soon as they are there). A layer that is recomputed passes a second time, during backward, and that counts as backward.
The optimizer's share and the reduction of gradients over replicas lie outside of these moments, as they should: a
dropped layer does not save them. Where communication overlaps with computation it does lie within: parameters are
gathered during the first microbatch's forward pass, gradients reduced during the last one's backward pass, and both
slow the layers that run meanwhile. There a layer's time is taken from the other microbatches.

On a GPU the moments are CUDA events on the stream, on a CPU readings of the clock. Only iterations that are timed layer
by layer carry the hooks; the blocks that gains are computed from run without.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing

Moment = Any
"""A reading of time.perf_counter, or a recorded CUDA event."""


def _now() -> Moment:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Moment, end: Moment) -> float:
    return begin.elapsed_time(end) / 1000 if torch.cuda.is_available() else end - begin


class _Pass:
    """The moments of one microbatch's way through a module."""

    def __init__(self) -> None:
        self.recomputed = is_checkpointing() and torch.is_grad_enabled()
        self.forward_begins = _now()
        self.forward_ends: Moment = None
        self.backward_begins: Moment = None
        self.backward_ends: Moment = None

    def ends_forward(self) -> None:
        self.forward_ends = _now()

    def begins_backward(self, gradient: torch.Tensor) -> None:
        self.backward_begins = _now()

    def ends_backward(self, gradient: torch.Tensor | None = None) -> None:
        self.backward_ends = _now()

    def ends_backward_with_the_graph(self, gradient: torch.Tensor) -> None:
        """At the end of the whole backward call: what a module whose input has no gradient needs."""
        self.begins_backward(gradient)
        torch.autograd.Variable._execution_engine.queue_callback(self.ends_backward)

    def times(self) -> tuple[float, float]:
        """Seconds of forward and of backward, the latter 0 for a pass that keeps no graph."""
        forward, backward = _seconds(self.forward_begins, self.forward_ends), 0.0
        if self.backward_begins is not None:
            backward = _seconds(self.backward_begins, self.backward_ends)
        return (0.0, forward + backward) if self.recomputed else (forward, backward)


class ModuleTimer:
    """Times all passes of a module while it is used as a context.

    Args:
        module: takes hidden_states [s, b, h] by position or name if it is a layer; returns a tensor, or a tuple that
            begins with one.
        is_layer: whether the input's gradient ends the backward pass; for a whole model chunk the end of the backward
            call does.
    """

    def __init__(self, module: torch.nn.Module, is_layer: bool) -> None:
        self._module = module
        self._is_layer = is_layer
        self._passes: list[_Pass] = []
        self._handles: list[Any] = []

    def __enter__(self) -> ModuleTimer:
        self._passes = []
        self._handles = [
            self._module.register_forward_pre_hook(self._before, with_kwargs=True),
            self._module.register_forward_hook(self._after),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def times(self, *, gathers: bool = False, reduces: bool = False) -> tuple[float, float]:
        """Summed seconds of forward and backward over all passes since it was entered; on a GPU, once synchronised.

        Args:
            gathers: parameters are gathered during the first microbatch's forward pass: let another's stand for it.
            reduces: gradients are reduced during the last microbatch's backward pass: let another's stand for it.
        """
        times = [one.times() for one in self._passes]
        forward = [seconds for seconds, _ in times if seconds]
        backward = [seconds for _, seconds in times if seconds]
        if gathers and len(forward) > 1:
            forward[0] = sum(forward[1:]) / len(forward[1:])
        if reduces and len(backward) > 1:
            backward[-1] = sum(backward[:-1]) / len(backward[:-1])
        return sum(forward), sum(backward)

    def _before(self, module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        present = _Pass()
        self._passes.append(present)
        if self._is_layer and torch.is_grad_enabled():
            hidden_states = args[0] if args else kwargs["hidden_states"]
            hidden_states.register_hook(present.ends_backward)

    def _after(self, module: torch.nn.Module, args: Sequence[Any], output: Any) -> None:
        present = self._passes[-1]
        present.ends_forward()
        if torch.is_grad_enabled():
            result = output[0] if isinstance(output, tuple) else output
            result.register_hook(present.begins_backward if self._is_layer else present.ends_backward_with_the_graph)
