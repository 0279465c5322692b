"""Training a tiny GPT with frozen layers, and everything that the optimizer holds of each parameter, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

from megatron_sbld.method.policy import Policy
from megatron_sbld.method.schedule import Constant
from tests.mcore.helpers import GLOBAL_MICROBATCHES, forward_backward, global_name, mean_loss

State = dict[str, torch.Tensor]


class Patterns(Policy):
    """Which layers run by iteration, as strings of 0 and 1, over and over again."""

    def __init__(self, *patterns: str) -> None:
        super().__init__(Constant(1.0), len(patterns[0]))
        self.patterns = patterns

    def keep_probs(self, iteration: int) -> np.ndarray:
        return np.array([float(bit) for bit in self.patterns[(iteration - 1) % len(self.patterns)]])

    def _keep_probs(self, theta: float) -> np.ndarray:
        raise NotImplementedError


def step(
    models: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    iteration: int,
    controller: Any = None,
    *,
    training: bool = True,
) -> tuple[bool, float, int]:
    """One iteration, in training or evaluation mode: whether the update was made, the gradients' norm and how many of
    them are zero."""
    num_microbatches = GLOBAL_MICROBATCHES // parallel_state.get_data_parallel_world_size()
    for model in models:
        model.train(training)
        model.zero_grad_buffer()
    optimizer.zero_grad()
    if controller is not None:
        controller.begin_iteration(iteration, num_microbatches)
    forward_backward(models, iteration, num_microbatches)
    return optimizer.step()


def iterate(
    models: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, controller: Any, iteration: int
) -> tuple[float, float]:
    """One iteration in training mode: its mean loss, and the gradients' norm."""
    num_microbatches = GLOBAL_MICROBATCHES // parallel_state.get_data_parallel_world_size()
    for model in models:
        model.train()
        model.zero_grad_buffer()
    optimizer.zero_grad()
    controller.begin_iteration(iteration, num_microbatches)
    loss = mean_loss(forward_backward(models, iteration, num_microbatches))
    return loss, float(optimizer.step()[1])


def finish_gathers(models: Sequence[DistributedDataParallel]) -> None:
    """Wait for the parameters that are still under way."""
    for model in models:
        if model.use_forward_hook:
            model.disable_forward_pre_hook()


def states(models: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[str, State]:
    """By global name: copies of this rank's weight (`weight`), of what the optimizer steps (`main`: the weight itself,
    its fp32 copy, or this rank's shard), and of the optimizer's state of that (exp_avg, step, ...)."""
    found: dict[str, State] = {}
    for model in models:
        for name, param in model.module.named_parameters():
            main, state = _held(optimizer, param)
            tensors = {"weight": param, **({} if main is None else {"main": main}), **state}
            copies = {key: tensor.detach().clone() for key, tensor in tensors.items() if tensor is not None}
            found[global_name(_gpt(model), name.removeprefix("module."))] = copies
    return found


def _gpt(model: DistributedDataParallel) -> Any:
    return getattr(model.module, "module", model.module)


def _held(optimizer: Any, param: torch.nn.Parameter) -> tuple[torch.Tensor | None, State]:
    """As Megatron itself looks it up when it saves; (None, {}) for a parameter that other ranks hold."""
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            if param not in part.model_param_group_index_map:
                continue
            group, order = part.model_param_group_index_map[param]
            main = part.optimizer.param_groups[group]["params"][order]
        else:
            main = getattr(param, "main_param", param)
        if any(main is other for group in part.optimizer.param_groups for other in group["params"]):
            return main, part.optimizer.state.get(main, {})
    return None, {}


def layer_of(name: str) -> int | None:
    """The 1-based number of the layer that a parameter belongs to."""
    _, found, rest = name.partition("decoder.layers.")
    return int(rest.partition(".")[0]) + 1 if found else None


def assert_frozen(before: dict[str, State], after: dict[str, State], dropped: set[int]) -> None:
    """Parameters of the dropped layers are as they were, moments included; those of others have moved."""
    for name, state in after.items():
        if layer_of(name) not in dropped:
            moved = [key for key in ("main", "exp_avg", "exp_avg_sq") if key in state]
            assert all(not torch.equal(state[key], before[name].get(key, torch.zeros(()))) for key in moved), name
            continue
        for key, tensor in state.items():
            if key != "step":
                # Before its first step a parameter has no moments, which is zero ones.
                assert torch.equal(tensor, before[name].get(key, torch.zeros_like(tensor))), (name, key)


def steps(found: dict[str, State]) -> set[float]:
    """Adam's counts over all parameters."""
    return {float(state["step"]) for state in found.values() if "step" in state}
