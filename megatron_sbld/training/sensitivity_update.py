"""`drop.sensitivity_update: dynamic` in the trainer: observes each iteration, renews SBLD's sensitivity now and then.

Rank 0 alone observes: losses and decisions of all ranks are known there, at no communication and no waiting beyond what
an iteration does anyway. At an update it sends the sensitivity to the others, which thereby have the same one bit for
bit, whatever their machines' arithmetic. The estimate is sensitivity/dynamic.py's, the rule sensitivity/mixing.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike

from megatron_sbld.controller import DropController
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.policy import Policy, SBLDPolicy
from megatron_sbld.ranks import this_device
from megatron_sbld.sensitivity.dynamic import GapEstimator
from megatron_sbld.sensitivity.mixing import mixed_sensitivity, released_layers


class SensitivityUpdate:
    """Renews the policy of a controller; made on every rank, with the controller's policy as the prior."""

    def __init__(self, config: DropConfig, controller: DropController) -> None:
        assert isinstance(controller.policy, SBLDPolicy), "updates_sensitivity is false for other policies"
        self._controller = controller
        self._base = controller.policy
        self._interval = config.update_interval
        self._releases_block = config.release_block
        self._estimator = GapEstimator(controller.num_layers, config.update_memory)

    @property
    def needs_microbatch_losses(self) -> bool:
        """Whether microbatches are observed one by one, because each has its own decisions."""
        return self._controller.scope == "microbatch"

    def observe(self, loss: float, microbatch_losses: Sequence[float] = ()) -> None:
        """Take in the iteration that the controller is at; in the recovery nothing is dropped and nothing observed.

        Args:
            loss: of the iteration.
            microbatch_losses: of each microbatch, where they are needed.
        """
        controller = self._controller
        if dist.get_rank() != 0 or controller.iteration >= self._base.first_recovery_iteration:
            return
        if self.needs_microbatch_losses:
            self._estimator.observe(microbatch_losses, controller.plan, controller.keep_probs)
        else:
            self._estimator.observe([loss], controller.plan[:1], controller.keep_probs)

    def update_if_due(self) -> dict[str, Any] | None:
        """After every update_interval iterations, renew the policy; returns a row of metrics then, on rank 0.

        Collective: every rank must call it after each iteration.
        """
        iteration = self._controller.iteration
        if iteration % self._interval or iteration >= self._base.first_recovery_iteration:
            return None
        row = None
        in_force = np.zeros((2, self._controller.num_layers))  # sensitivity; 1 for a layer of the Block list
        if dist.get_rank() == 0:
            estimate = self._estimator.estimate()
            mixed = mixed_sensitivity(self._base.sensitivity, estimate)
            block = set(self._base.block_layers)
            if self._releases_block:
                block -= set(released_layers(self._base.sensitivity, mixed, block))
            in_force[0] = mixed
            in_force[1, [layer - 1 for layer in block]] = 1.0
            row = {
                "iteration": iteration,
                "gap": estimate.gap.tolist(),
                "gap_stderr": estimate.stderr.tolist(),
                "sensitivity": mixed.tolist(),
                "block_layers": sorted(block),
            }
        sensitivity, is_blocked = _broadcast(in_force)
        self._put_in_force(sensitivity, [int(index) + 1 for index in np.flatnonzero(is_blocked)])
        return row

    def state_dict(self) -> dict[str, Any]:
        """Of rank 0: what the estimate rests on, and the sensitivity in force with the prior that it came from."""
        return {
            "estimator": self._estimator.state_dict(),
            "base": _lists(self._base),
            "in_force": self._present_lists(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Go on from rank 0's saved state, on every rank; returns a line if the prior is another one now.

        Raises:
            ValueError: the state is of another number of layers, or damaged.
        """
        self._estimator.load_state_dict(state["estimator"])
        if state["base"] != _lists(self._base):
            return ["drop sensitivity or Block list differ from the saved ones; they apply until the next update"]
        self._put_in_force(**state["in_force"])
        return []

    def _put_in_force(self, sensitivity: ArrayLike, block_layers: Iterable[int]) -> None:
        policy: Policy = self._base.with_sensitivity(sensitivity, block_layers)
        if policy.stages is not None and self._controller.policy.stages is not None:
            policy = policy.with_stages(self._controller.policy.stages)  # those of the checkpoint
        assert isinstance(policy, SBLDPolicy)
        if _lists(policy) != self._present_lists():  # else ranks need not compare decisions anew
            self._controller.replace_policy(policy)

    def _present_lists(self) -> dict[str, list[Any]]:
        assert isinstance(self._controller.policy, SBLDPolicy)
        return _lists(self._controller.policy)


def _lists(policy: SBLDPolicy) -> dict[str, list[Any]]:
    return {"sensitivity": policy.sensitivity.tolist(), "block_layers": list(policy.block_layers)}


def _broadcast(values: np.ndarray) -> np.ndarray:
    """Rank 0's values, on every rank."""
    tensor = torch.from_numpy(values).to(this_device())
    dist.broadcast(tensor, src=0)
    return tensor.cpu().numpy()
