"""Switches and wrappers under which a drop would be wrong or silently ignored, each refused by name with the reason.

What does not work together is in method/combinations.py. docs/compatibility_evidence.md lists all of it beside the
switches that are supported; a test keeps them equal.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as TorchDDP

from megatron_sbld.controller import DropController

_STREAMS = "a layer mixes several residual streams, and what a skip must pass on has not been tested"
_KITCHEN = "its recipes may keep something of a layer from pass to pass; that has not been tested"
_WEIGHT_CHAIN = "each weight fetches the next one that ran before it, and a skip breaks the chain"

REASONS = {
    "cuda_graph_impl": "a captured graph would repeat the decision it was captured with",
    "overlap_moe_expert_parallel_comm": "it bypasses the layer's forward, so that drops would be ignored",
    "fine_grained_activation_offloading": "its groups count layers that ran, and a skipped one does not",
    "cpu_offloading": "its prefetch order assumes that every layer runs",
    "delay_wgrad_compute": "gradients are then reported by other hooks than the ones a skip stands in for",
    "fp8_recipe": "delayed scaling keeps a history for each layer that a skip would leave stale",
    "qk_clip": "it reads every layer's attention logits after the step, and a dropped one has none",
    "log_max_attention_logit": "it reads every layer's attention logits after the step, and a dropped one has none",
    "moe_enable_routing_replay": "it replays a recorded routing of every layer, and a dropped one records none",
    "experimental_attention_variant": "it has not been tested, and its losses are logged over all layers",
    "hybrid_context_parallel": "its schedule gives ranks different numbers of microbatches",
    "num_microbatches_with_partial_activation_checkpoints": "whether decisions survive it has not been tested",
    "use_kitchen": _KITCHEN,
    "use_kitchen_attention": _KITCHEN,
    "enable_mhc_connections": _STREAMS,
    "enable_hyper_connections": _STREAMS,
    "tensor_parallel_num_weight_shards": _WEIGHT_CHAIN,
    "expert_tensor_parallel_num_weight_shards": _WEIGHT_CHAIN,
    "gtp_weight_remat_size": _WEIGHT_CHAIN,
    "expert_gtp_weight_remat_size": _WEIGHT_CHAIN,
    "moe_router_load_balancing_type": "with quantile_balancing, a router that no microbatch ran forgets its bias",
    "moe_paged_stash": "it repeats the order of layers of the first iteration, and a skipped one breaks it",
    "overlap_dispatch_backward_with_experts_wgrad": (
        "gradients are then reported by other hooks than the ones a skip stands in for"
    ),
}
"""Why each switch of TransformerConfig is refused when it is on, of all versions of megatron-core."""

_MORE_THAN: dict[str, str | None] = {
    "tensor_parallel_num_weight_shards": "tensor_model_parallel_size",
    "expert_tensor_parallel_num_weight_shards": "expert_tensor_parallel_size",
    "gtp_weight_remat_size": None,
    "expert_gtp_weight_remat_size": None,
}
"""Numbers that are on above another field's value, or above 1."""

_SHARDED = "it gathers and frees a layer's parameters around a forward pass that a skip leaves out"
_REDUCER = "it counts the gradients of every layer, and a skipped one has none"
_COMPILED = "decisions would become part of a compiled graph"

WRAPPERS = {
    "torch DistributedDataParallel": _REDUCER,
    "torch DataParallel": "its threads run copies of the layers, and what a layer notes is lost with its copy",
    "torch FullyShardedDataParallel": _SHARDED,
    "torch FSDPModule": _SHARDED,
    "torch OptimizedModule": _COMPILED,
    "megatron FullyShardedDataParallel": _SHARDED,
    "megatron TorchFullyShardedDataParallel": _SHARDED,
    "megatron MegatronFSDP": _SHARDED,
    "megatron_fsdp MegatronFSDP": _SHARDED,
    "deepspeed DeepSpeedEngine": _REDUCER,
    "apex DistributedDataParallel": _REDUCER,
}
"""Why each module around a model is refused, by package and class."""


def refuse_unsupported_switches(config: TransformerConfig, controller: DropController) -> None:
    """Check a built model's config: its switches by themselves, and together with what the controller does.

    Raises:
        ValueError: naming the switch, its value, what is allowed and why.
    """
    for name, reason in REASONS.items():
        value = getattr(config, name, None)
        if is_on(config, name):
            raise ValueError(f"{name} = {value!r} does not work with layer dropping: {reason}; switch it off")
    controller.refuse(vars(config))


def is_on(config: TransformerConfig, name: str) -> bool:
    value = getattr(config, name, None)
    if name == "cuda_graph_impl":
        return value not in (None, "none")
    if name == "fp8_recipe":
        return bool(config.fp8) and value == "delayed"
    if name == "moe_router_load_balancing_type":
        return value is not None and "quantile_balancing" in value  # one name, or a list of them
    if name in _MORE_THAN:
        least = getattr(config, _MORE_THAN[name] or "", None) or 1
        return value is not None and value > least
    return bool(value)


def is_refused_wrapper(module: torch.nn.Module) -> bool:
    """Whether the module is of one of WRAPPERS."""
    return _wrapper_name(module) is not None


def refuse_wrapper(module: torch.nn.Module) -> None:
    """Refuse a module that hands out a layer's parameters, or collects its gradients, in a way that a skip breaks.

    Raises:
        ValueError: naming it and the reason.
    """
    name = _wrapper_name(module)
    if name is not None:
        raise ValueError(_wrapper_message(f"{type(module).__module__}.{type(module).__name__}", WRAPPERS[name]))


def refuse_wrapped_layers(model: torch.nn.Module, layers: Iterable[torch.nn.Module]) -> None:
    """Refuse layers of a model that something other than Megatron's DistributedDataParallel owns or has compiled.

    Raises:
        ValueError: naming it and the reason.
    """
    layers = set(layers)
    for module in model.modules():
        if not _is_compiled(module):
            refuse_wrapper(module)
        elif not layers.isdisjoint(module.modules()):  # a compiled part of a layer does no harm
            refuse_wrapper(module)
            raise ValueError(_wrapper_message(f"compile() of a {type(module).__name__}", _COMPILED))
    for layer in layers:
        _refuse_sharded_parameters(layer)


def refuse_active_wrapper() -> None:
    """Refuse to run inside of the forward pass of torch's DistributedDataParallel, which leaves no trace on a model.

    Raises:
        ValueError: naming it and the reason.
    """
    wrapper = TorchDDP._get_active_ddp_module()
    if wrapper is not None:
        refuse_wrapper(wrapper)


def _refuse_sharded_parameters(layer: torch.nn.Module) -> None:
    for param in layer.parameters():
        if isinstance(param, DTensor):
            raise ValueError(_wrapper_message("a layer with DTensor parameters (fully_shard)", _SHARDED))
        if hasattr(param, "ds_id"):
            raise ValueError(_wrapper_message("a layer with parameters of DeepSpeed's ZeRO 3", _SHARDED))
        if hasattr(param, "_fsdp_flattened"):
            raise ValueError(_wrapper_message("a layer with parameters of torch's FullyShardedDataParallel", _SHARDED))


def _wrapper_message(found: str, reason: str) -> str:
    return (
        f"{found} does not work with layer dropping: {reason}; wrap the model in "
        "megatron.core.distributed.DistributedDataParallel"
    )


_wrapper_names: dict[type, str | None] = {}


def _wrapper_name(module: torch.nn.Module) -> str | None:
    """Which of WRAPPERS the module is. Asked for every module that is built."""
    cls = type(module)
    if cls not in _wrapper_names:
        # By name: a package need not be installed, and newer megatron-core puts functions in the place of classes.
        names = (f"{base.__module__.partition('.')[0]} {base.__name__}" for base in cls.__mro__)
        _wrapper_names[cls] = next((name for name in names if name in WRAPPERS), None)
    return _wrapper_names[cls]


def _is_compiled(module: torch.nn.Module) -> bool:
    return _wrapper_name(module) == "torch OptimizedModule" or module._compiled_call_impl is not None
