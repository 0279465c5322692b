"""Which forward pass a recomputation belongs to.

Full recomputation runs a layer twice: in forward, and again in backward. Between the two, Megatron's schedules go on to
other microbatches (pipeline stages), and a loop may give microbatches up. So neither the present microbatch nor the
order of the passes tells which one comes back. The first pass is therefore noted in the autograd context that the
checkpoint has in both. A forward pass without a backward pass takes its note along when its graph is freed.

Others recompute as well (torch.utils.checkpoint, Transformer Engine's), and say nothing of what: there it is known
only that a layer runs in a backward pass.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel.random import CheckpointFunction

from megatron_sbld.controller import DropController

_FORWARD, _BACKWARD = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__


class ForwardPass(NamedTuple):
    """The pass of a layer that a checkpoint ran in forward."""

    controller: DropController
    begun: int  # the controller's
    microbatch: int


class Checkpoint(NamedTuple):
    """A checkpoint of Megatron's that is running."""

    context: Any  # autograd's
    recomputes: bool

    def remember(self, layer: torch.nn.Module, forward_pass: ForwardPass) -> None:
        """Keep a layer's pass for its recomputation."""
        if not hasattr(self.context, "drop_passes"):
            self.context.drop_passes = {}
        self.context.drop_passes[layer] = forward_pass

    def recall(self, layer: torch.nn.Module) -> ForwardPass | None:
        """The layer's pass in forward; None if it was not switchable then."""
        found: ForwardPass | None = getattr(self.context, "drop_passes", {}).get(layer)
        return found


def running_checkpoint() -> Checkpoint | None:
    """The innermost checkpoint that the caller runs in.

    Megatron's own flag (`is_checkpointing`) stays set when an error leaves a checkpoint, and does not say which it is.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _FORWARD or code is _BACKWARD:
            return Checkpoint(frame.f_locals["ctx"], recomputes=code is _BACKWARD)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def in_backward_pass() -> bool:
    """Whether autograd runs the caller, so that a forward pass is a recomputation, whoever wants it."""
    return bool(torch._C._current_graph_task_id() != -1)  # as torch.utils.checkpoint asks
