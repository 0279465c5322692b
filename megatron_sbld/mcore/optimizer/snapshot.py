"""An optimizer's whole state in host memory, and back in place, bit for bit, as often as one likes.

Megatron's own state dicts leave out what a distributed optimizer holds in its shards, and torch's loading casts and
shares tensors. So this copies what is there: parameter groups (rate, weight decay, step), the optimizer's own copies of
the parameters (fp32 masters, shards), the state of each, and the loss scale.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_sbld.mcore.optimizer.state import parts_with_parameters


@dataclass(frozen=True)
class _PartSnapshot:
    """One optimizer's: by group, and by group and parameter."""

    groups: list[dict[str, Any]]
    params: list[list[torch.Tensor]]
    states: list[list[dict[str, Any]]]
    loss_scale: dict[str, Any] | None


class OptimizerSnapshot:
    """The state of an optimizer at the moment when this is made. Local to the rank: no communication."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._parts = [_take(part) for part in parts_with_parameters(optimizer)]

    @torch.no_grad()
    def restore(self, optimizer: MegatronOptimizer) -> None:
        """Put it back into the optimizer that it was taken from. Tensors are written in place, later ones removed."""
        for part, saved in zip(parts_with_parameters(optimizer), self._parts, strict=True):
            _restore(part, saved)


def to_host(value: Any) -> Any:
    """A copy that shares nothing with the value; tensors are copied to host memory."""
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _take(part: MegatronOptimizer) -> _PartSnapshot:
    inner = part.optimizer
    scaler = getattr(part, "grad_scaler", None)
    return _PartSnapshot(
        groups=[{key: to_host(value) for key, value in group.items() if key != "params"} for group in _groups(part)],
        params=[[to_host(param) for param in group["params"]] for group in _groups(part)],
        states=[
            # Not inner.state[param]: asking a defaultdict would give the parameter a state.
            [{key: to_host(value) for key, value in inner.state.get(param, {}).items()} for param in group["params"]]
            for group in _groups(part)
        ],
        loss_scale=None if scaler is None else {key: to_host(value) for key, value in scaler.state_dict().items()},
    )


def _restore(part: MegatronOptimizer, saved: _PartSnapshot) -> None:
    inner = part.optimizer
    for group, values, params, states in zip(_groups(part), saved.groups, saved.params, saved.states, strict=True):
        for key in group.keys() - values.keys() - {"params"}:
            del group[key]
        group.update({key: copy.deepcopy(value) for key, value in values.items()})
        for param, saved_param, saved_state in zip(group["params"], params, states, strict=True):
            param.data.copy_(saved_param)
            if saved_state:
                _restore_param_state(inner.state[param], saved_state)
            else:
                inner.state.pop(param, None)
    if saved.loss_scale is not None:
        part.grad_scaler.load_state_dict({key: to_host(value) for key, value in saved.loss_scale.items()})


def _restore_param_state(state: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in state.keys() - saved.keys():
        del state[key]
    for key, value in saved.items():
        if isinstance(value, torch.Tensor):
            state[key].copy_(value)
        else:
            state[key] = copy.deepcopy(value)


def _groups(part: MegatronOptimizer) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = part.optimizer.param_groups
    return groups
