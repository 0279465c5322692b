"""The state of a run in host memory, so that many runs can start from it without building the model again."""

from __future__ import annotations

import copy

import torch

from megatron_sbld.mcore.optimizer.params import gather_params
from megatron_sbld.mcore.optimizer.snapshot import OptimizerSnapshot, to_host
from megatron_sbld.mcore.rng_state import own_state, set_own_state
from megatron_sbld.training.run import Run


class RunSnapshot:
    """All that the further course of a run depends on, but for the drop policy: weights, optimizer, learning-rate
    schedule, loss scale, random states of this rank, and the position in the data.

    Host memory, on each rank: what its weights and optimizer state take on the device.
    """

    def __init__(self, run: Run) -> None:
        """Copy the state of this moment. Collective with overlap_param_gather, else local."""
        gather_params(run.chunks)
        self._weights = [to_host(tensor) for tensor in _weights(run)]
        self._optimizer = OptimizerSnapshot(run.optimizer)
        self._scheduled_steps = run.scheduler.num_steps
        self._random_states = copy.deepcopy(own_state())
        self._position = run.iteration, run.consumed_samples, run.train_time_s

    @torch.no_grad()
    def restore(self, run: Run) -> None:
        """Take the run back to that moment, bit for bit; call between iterations.

        With overlap_param_gather no gather is under way there: Megatron starts them in the forward pass, which waits
        for all of them, and the next one gathers what is restored here.
        """
        self._optimizer.restore(run.optimizer)
        for tensor, saved in zip(_weights(run), self._weights, strict=True):
            tensor.copy_(saved)
        run.scheduler.num_steps = self._scheduled_steps  # the groups' rates and decays are the optimizer's
        run.iteration, run.consumed_samples, run.train_time_s = self._position
        run.data.go_to(run.consumed_samples)
        set_own_state(copy.deepcopy(self._random_states))


def _weights(run: Run) -> list[torch.Tensor]:
    """Parameters and buffers of this rank's chunks."""
    modules = [chunk.module for chunk in run.chunks]  # the wrapper's own `buffers` are those of its gradients
    return [tensor.data for module in modules for tensor in (*module.parameters(), *module.buffers())]
