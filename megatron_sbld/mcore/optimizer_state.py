"""Optimizer state for checkpoints, mended where megatron-core 0.16 relies on Apex's or Transformer Engine's Adam.

With torch's own Adam, stock megatron-core

- cannot describe the state of an optimizer that has not stepped yet (distrib_optimizer.py:642 asserts one common step),
  as when a checkpoint is loaded, or saved while fp16 still searches its loss scale;
- loads one `step` tensor that all parameters share, so that each later step counts once for every parameter
  (distrib_optimizer.py:824); in the format dp_reshardable it holds the fresh optimizer's step, not the saved one;
- fails with KeyError 'step' on loading the format fully_reshardable (:2102 skips what :986 asks for).

`initialise_state` and `load_state` are called in the place of megatron-core's own; with Apex or Transformer Engine they
do what megatron-core does.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer


def initialise_state(optimizer: MegatronOptimizer) -> None:
    """Give parameters without optimizer state the one that their first step starts from: zero moments, step 0."""
    part = _holder(optimizer)
    part.init_state_fn(part.optimizer, part.config)
    if _is_torch_adam(part):
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take over optimizer state, as `optimizer.load_state_dict` does where Apex or Transformer Engine is installed.

    Args:
        optimizer: the optimizer, its state initialised.
        loaded: what dist_checkpointing.load made of `optimizer.sharded_state_dict(..., is_loading=True)`; consumed.
    """
    part = _holder(optimizer)
    if not _is_torch_adam(part):
        part.load_state_dict(loaded)
    elif isinstance(part, DistributedOptimizer):
        _load_distributed(part, loaded)
    else:
        adam_state = loaded.get("optimizer", loaded)["state"]
        adam_state.setdefault("common_step", torch.tensor(0.0))  # absent from before the first step
        part.load_state_dict(loaded)


def _load_distributed(optimizer: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Parameter groups and loss scale first, then the tensors, with `step` out of megatron-core's sight."""
    tensors, sharding = state.pop("param_state"), state.pop("param_state_sharding_type")
    step = state["optimizer"]["param_groups"][0]["step"]
    optimizer.load_state_dict(state)
    adam = optimizer.optimizer
    for param_state in adam.state.values():
        param_state.pop("step")
    if sharding == "dp_reshardable":
        optimizer.load_parameter_state_from_dp_reshardable(tensors)
    elif sharding == "fully_reshardable":
        optimizer.load_parameter_state_from_fully_reshardable(tensors)
    else:
        raise ValueError(f"format of the distributed optimizer's state is {sharding!r}: cannot be loaded")
    for param_state in adam.state.values():
        param_state["step"] = torch.tensor(float(step))


def _holder(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """The one optimizer that holds the parameters; get_megatron_optimizer wraps it. (Experts would have a second.)"""
    if not isinstance(optimizer, ChainedOptimizer):
        return optimizer
    if len(optimizer.chained_optimizers) != 1:
        raise ValueError(f"optimizer has {len(optimizer.chained_optimizers)} parts: only one can be saved and loaded")
    return optimizer.chained_optimizers[0]


def _is_torch_adam(optimizer: MegatronOptimizer) -> bool:
    return isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)
