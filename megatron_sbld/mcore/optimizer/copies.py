"""The copies around an optimizer step in a few operations, instead of some for each parameter.

Before the torch optimizer steps, Megatron gives it each gradient, and afterwards copies what became of its fp32
parameters to the model's, one at a time; a distributed optimizer looks up each shard's place for that, twice a step
(distrib_optimizer.py:2386 and :2429). The host does this while the device waits: the gradients' norm has just been read
from it. Values are the same, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer import optimizer as mcore_optimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.utils import local_multi_tensor_scale

from megatron_sbld.mcore.optimizer.state import parts_with_parameters

Tensors = list[torch.Tensor]


def copy_in_groups(optimizer: MegatronOptimizer) -> None:
    """Replace the copying methods of an optimizer that get_megatron_optimizer built, after DDP has made its buffers.

    Parts that store their parameters in another way (fp8, precision-aware, FSDP) keep Megatron's methods.
    """
    for part in parts_with_parameters(optimizer):
        if type(part) is DistributedOptimizer:
            _copy_shards_in_groups(part)
        elif type(part) is Float16OptimizerWithFloat16Params and _copies_one_by_one(part):
            part._copy_main_params_to_model_params = functools.partial(
                _copy, _flat(part.float16_groups), _flat(part.fp32_from_float16_groups)
            )


def _copies_one_by_one(part: Float16OptimizerWithFloat16Params) -> bool:
    """In bf16 always, in fp16 where neither Transformer Engine nor Apex has a kernel for it."""
    return part._dummy_overflow_buf is None or mcore_optimizer.multi_tensor_scale_impl is local_multi_tensor_scale


def _copy_shards_in_groups(part: DistributedOptimizer) -> None:
    if part.ddp_config.use_megatron_fsdp or part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        return
    model_params = _flat(part.model_float16_groups) + _flat(part.model_fp32_groups)
    main_params = _flat(part.shard_fp32_from_float16_groups) + _flat(part.shard_fp32_groups)
    targets, sources = _flat(part.shard_float16_groups), _flat(part.shard_fp32_from_float16_groups)
    # Shards of fp32 parameters are the model's own memory, so nothing is to be copied; fp8 has no shards.
    own = zip(targets + _flat(part.shard_fp32_groups), model_params, strict=True)
    if any(shard is None or shard.data_ptr() != _place_in_buffer(part, param).data_ptr() for shard, param in own):
        return
    grads = [_gradient_shard(part, param) for param in model_params]
    if all(grad.dtype == torch.float32 for grad in grads):
        part._copy_model_grads_to_main_grads = functools.partial(_give_gradients, main_params, grads)
    part._copy_main_params_to_model_params = functools.partial(_copy, targets, sources)


def _gradient_shard(part: DistributedOptimizer, param: Any) -> torch.Tensor:
    """Where the reduction leaves this rank's part of a parameter's gradient, [elements]."""
    place = part._get_model_param_range_map(param)["param"]
    return param.main_grad.view(-1)[place.start : place.end]


def _place_in_buffer(part: DistributedOptimizer, param: Any) -> torch.Tensor:
    """Where the all-gather takes this rank's part of a parameter from, [elements]."""
    buffer, _, bucket = part.model_param_gbuf_map[param]
    place = part._get_model_param_range_map(param)["gbuf_world_in_bucket"]
    return part.buffers[buffer].buckets[bucket].param_data.view(-1)[place.start : place.end]


def _give_gradients(main_params: Tensors, grads: Tensors) -> None:
    for param, grad in zip(main_params, grads, strict=True):
        param.grad = grad


@torch.no_grad()
def _copy(targets: Tensors, sources: Tensors) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _flat(groups: Sequence[Tensors]) -> Tensors:
    return [tensor for group in groups for tensor in group]
