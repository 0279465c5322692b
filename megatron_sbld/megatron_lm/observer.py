"""`--sbld-sensitivity-update dynamic` in Megatron-LM: the loss of each iteration, brought to the rank that observes.

Megatron-LM knows the loss on the last pipeline stage alone, and the estimate is rank 0's. So one number is broadcast
from the last rank, which is of the last stage, in each iteration.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_sbld.controller import DropController
from megatron_sbld.method.config import DropConfig
from megatron_sbld.ranks import this_device
from megatron_sbld.training.sensitivity_update import SensitivityUpdate

_LOSS = "lm loss"


class LossObserver:
    """Feeds SensitivityUpdate; made on every rank."""

    def __init__(self, drop: DropConfig, controller: DropController) -> None:
        self._update = SensitivityUpdate(drop, controller)

    def observe(self, losses: dict[str, torch.Tensor]) -> None:
        """Take in an iteration, and renew the policy if an update is due. Collective.

        losses: Megatron-LM's reduced losses, empty but on the last pipeline stage.
        Raises ValueError on every rank where there are losses but not Megatron-LM's own.
        """
        loss = torch.tensor([math.nan, float(bool(losses) and _LOSS not in losses)], device=this_device())
        if _LOSS in losses:
            loss[0] = losses[_LOSS].detach()
        dist.broadcast(loss, src=dist.get_world_size() - 1)
        value, is_missing = loss.tolist()
        if is_missing:
            found = f"; it has {', '.join(losses)}" if losses else ""
            raise ValueError(
                f"forward_step's loss function reports no {_LOSS!r}, from which sensitivity is computed{found}"
            )
        if dist.get_rank() == 0 and math.isfinite(value):
            self._update.observe(value)
        self._update.update_if_due()

    def state_dict(self) -> dict[str, Any]:
        """SensitivityUpdate's."""
        return self._update.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """SensitivityUpdate's."""
        return self._update.load_state_dict(state)
