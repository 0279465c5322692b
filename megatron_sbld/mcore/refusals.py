"""Megatron switches under which a drop would be wrong or silently ignored, each refused by name with the reason.

docs/megatron_features.md lists them beside the switches that are supported; a test keeps the two equal.
"""

from __future__ import annotations

import torch
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.torch_fully_sharded_data_parallel import TorchFullyShardedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig

# Newer megatron-core puts a function in the place of a class whose dependencies are missing.
SHARDED_WRAPPERS = tuple(
    wrapper for wrapper in (FullyShardedDataParallel, TorchFullyShardedDataParallel) if isinstance(wrapper, type)
)

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
    "experimental_attention_variant": "nobody has shown it right, and its losses are logged over all layers",
    "hybrid_context_parallel": "its schedule gives ranks different numbers of microbatches",
    "num_microbatches_with_partial_activation_checkpoints": "nobody has shown that decisions survive it",
}
"""Why each switch of TransformerConfig is refused when it is on."""


def refuse_unsupported_switches(
    config: TransformerConfig, *, microbatch_scope: bool, sample_granularity: bool, distinct_replicas: bool
) -> None:
    """Check a built model's config.

    distinct_replicas: whether data-parallel replicas may run different layers.

    Raises:
        ValueError: naming the switch, its value, what is allowed and why.
    """
    for name, reason in REASONS.items():
        value = getattr(config, name, None)
        if is_on(config, name):
            raise ValueError(f"{name} = {value!r} does not work with layer dropping: {reason}; switch it off")
    if microbatch_scope and config.fp8 and config.recompute_granularity == "full":
        raise ValueError(
            "decisions per microbatch do not work with fp8 and recompute_granularity = 'full': Transformer Engine's "
            "recomputation does not tell its passes apart; use decision scope 'iteration'"
        )
    if sample_granularity:
        _refuse_fixed_number_of_samples(config)
    if distinct_replicas:
        _refuse_experts_of_distinct_replicas(config)


def is_on(config: TransformerConfig, name: str) -> bool:
    value = getattr(config, name, None)
    if name == "cuda_graph_impl":
        return value not in (None, "none")
    if name == "fp8_recipe":
        return bool(config.fp8) and value == "delayed"
    return bool(value)


def _refuse_fixed_number_of_samples(config: TransformerConfig) -> None:
    """What takes each pass of a layer to have as many samples as the one before."""
    if config.tp_comm_overlap:
        raise ValueError(
            "granularity 'sample' does not work with tp_comm_overlap = True: its buffers have room for whole "
            "microbatches alone; use granularity 'layer'"
        )
    if config.num_moe_experts is not None and "global_aux_loss" in config.moe_router_load_balancing_type:
        raise ValueError(
            "granularity 'sample' does not work with moe_router_load_balancing_type = 'global_aux_loss': it averages "
            "counts of tokens over passes as if all had as many; use granularity 'layer'"
        )


def _refuse_experts_of_distinct_replicas(config: TransformerConfig) -> None:
    """Data-parallel ranks exchange tokens, or counts of them, inside an MoE layer: all of them must run it or none."""
    if config.num_moe_experts is None:
        return
    if config.expert_model_parallel_size > 1:
        raise ValueError(
            f"replicas 'distinct' does not work with expert_model_parallel_size = {config.expert_model_parallel_size}: "
            "replicas exchange tokens inside a layer, so all must run it or none; use replicas 'shared'"
        )
    if "global_aux_loss" in config.moe_router_load_balancing_type:
        raise ValueError(
            "replicas 'distinct' does not work with moe_router_load_balancing_type = 'global_aux_loss': replicas count "
            "tokens together inside a layer, so all must run it or none; use replicas 'shared'"
        )


def refuse_sharded_wrapper(wrapper: torch.nn.Module) -> None:
    """Refuse FSDP wrappers, which gather and free a layer's parameters around a forward that a skip does not run.

    Raises:
        ValueError: naming the wrapper.
    """
    if isinstance(wrapper, SHARDED_WRAPPERS):
        raise ValueError(
            f"{type(wrapper).__module__}.{type(wrapper).__name__} does not work with layer dropping; wrap the model in "
            "megatron.core.distributed.DistributedDataParallel"
        )
