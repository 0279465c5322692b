"""Optimizer state for checkpoints, mended where megatron-core 0.16 loses or refuses it.

With torch's own Adam, for which megatron-core has Apex's or Transformer Engine's in mind, stock megatron-core

- cannot describe the state of an optimizer that has not stepped yet (distrib_optimizer.py:642 asserts one common step),
  as when a checkpoint is loaded, or saved while fp16 still searches its loss scale;
- loads one `step` tensor that all parameters share, so that each later step counts once for every parameter
  (distrib_optimizer.py:824); in the format dp_reshardable it holds the fresh optimizer's step, not the saved one;
- fails with KeyError 'step' on loading the format fully_reshardable (:2102 skips what :986 asks for).

With any Adam, fully_reshardable saves the state of wrong elements when a buffer has several buckets, one of which is
padded to the data-parallel size: the buckets are joined without their padding (:1114), then cut at places that count it
(:1501). Sizes that are multiples of 128 hide it.

`sharded_state` and `load_state` are called in the place of megatron-core's `sharded_state_dict` and `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer

_GROUP_STATE = ("params", "step")
"""What of a parameter group is state; the rest is configured."""
_GROUP_KIND = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells the groups of one optimizer apart."""


def sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool = False
) -> dict[str, Any]:
    """`optimizer.sharded_state_dict`, of an optimizer that has not stepped yet as well. Collective.

    Args:
        optimizer: the optimizer; where it has no state yet, it is given that of step 0.
        model_state: the sharded state of the model chunks.
        metadata: Megatron's sharding metadata.
        is_loading: whether the result says what to read; else what to write.
    """
    part = _holder(optimizer)
    initialise(part)
    if not isinstance(part, DistributedOptimizer):
        state = optimizer.sharded_state_dict(model_state, metadata=metadata, is_loading=is_loading)
        adam_state = state.get("optimizer", state)["state"]
        if "common_step" in adam_state:
            adam_state["common_step"] = adam_state["common_step"].cpu()  # a checkpoint names no device
        return state
    with _padding_between_buckets(part):
        state = optimizer.sharded_state_dict(model_state, metadata=metadata, is_loading=is_loading)
    if state["param_state"] is None:  # gathered on another rank
        del state["param_state"]
    return state


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take over optimizer state, as `optimizer.load_state_dict` does where Apex or Transformer Engine is installed.

    What the parameter groups were configured with (rates, betas, epsilon, ...) stays. megatron-core would put the saved
    groups over it, where even its scheduler reads max_lr and min_lr.

    Args:
        optimizer: the optimizer whose `sharded_state` said what to read.
        loaded: what dist_checkpointing.load made of it; consumed.
    """
    part = _holder(optimizer)
    if not loaded.get("grad_scaler"):  # saved with a constant loss scale, which has no state
        loaded.pop("grad_scaler", None)
    configured = [
        {name: value for name, value in group.items() if name not in _GROUP_STATE}
        for group in part.optimizer.param_groups
    ]
    _configure(loaded.get("optimizer", loaded)["param_groups"], configured)
    if not is_torch_adam(part):
        part.load_state_dict(loaded)
    elif isinstance(part, DistributedOptimizer):
        _load_distributed(part, loaded)
    else:
        adam_state = loaded.get("optimizer", loaded)["state"]
        adam_state.setdefault("common_step", torch.tensor(0.0))  # absent from before the first step
        part.load_state_dict(loaded)
    for group, own in zip(part.optimizer.param_groups, configured, strict=True):
        group.update(own)
    if is_torch_adam(part):
        _place_steps(part.optimizer)


def _configure(saved: list[dict[str, Any]], configured: list[dict[str, Any]]) -> None:
    """Configure saved groups as those of their kind are here: megatron-core 0.19 looks for them by rate, too."""

    def kind(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(name, group.get(f"pre_{name}")) for name in _GROUP_KIND)

    by_kind = {kind(group): group for group in configured}
    for group in saved:
        group.update(by_kind.get(kind(group), {}))


def parts_with_parameters(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that hold parameters; a rank may have none of some kind."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if not part.is_stub_optimizer]


def fuse_adam(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam, where Megatron took it, make a step in one pass over memory; before its first step."""
    for part in parts_with_parameters(optimizer):
        if is_torch_adam(part):
            for group in part.optimizer.param_groups:
                group["fused"] = True


def _place_steps(adam: torch.optim.Optimizer) -> None:
    """Put each `step` where Adam reads it: a fused one on the parameter's device, another on the CPU."""
    for group in adam.param_groups:
        for param in group["params"]:
            state = adam.state.get(param, {})
            if "step" in state:
                state["step"] = state["step"].to(param.device if group["fused"] else "cpu")


def bucket_sizes(optimizer: MegatronOptimizer) -> list[list[int]]:
    """Elements of each gradient bucket of each buffer of a distributed optimizer on this rank, without padding."""
    return [[bucket.numel_unpadded for bucket in buffer.buckets] for buffer in _holder(optimizer).buffers]


def initialise(optimizer: MegatronOptimizer) -> None:
    """Give parameters without optimizer state the one that their first step starts from: zero moments, step 0."""
    if optimizer.init_state_fn is None:  # SGD's first step needs none
        return
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    if is_torch_adam(optimizer):
        for state in optimizer.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))
        _place_steps(optimizer.optimizer)


@contextmanager
def _padding_between_buckets(optimizer: DistributedOptimizer) -> Iterator[None]:
    """Let the optimizer gather its state with the padding that the positions of its parameters count."""
    gather = optimizer.get_parameter_state_dp_zero

    def gather_with_padding(*args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        state = gather(*args, **kwargs)
        if state is not None:
            for index, buffer in enumerate(optimizer.buffers):
                for tensors in state[index].values():
                    _insert_padding(tensors, buffer)
        return state

    optimizer.get_parameter_state_dp_zero = gather_with_padding
    try:
        yield
    finally:
        del optimizer.get_parameter_state_dp_zero  # the class's own again


def _insert_padding(tensors: dict[str, Any], buffer: _ParamAndGradBuffer) -> None:
    """Put each bucket's part of the gathered tensors, [buffer.numel_unpadded], at the bucket's offset, in place."""
    if buffer.numel == buffer.numel_unpadded:
        return
    sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
    for key, joined in tensors.items():
        if not isinstance(joined, torch.Tensor):
            continue
        padded = joined.new_zeros(buffer.numel)
        for bucket, part in zip(buffer.buckets, joined.split(sizes), strict=True):
            padded[bucket.offset : bucket.offset + len(part)] = part
        tensors[key] = padded


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


def is_torch_adam(optimizer: MegatronOptimizer) -> bool:
    return isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)
