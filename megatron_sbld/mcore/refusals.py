"""Megatron switches under which a drop would be wrong or silently ignored, each refused by name with the reason."""

from __future__ import annotations

import torch
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.torch_fully_sharded_data_parallel import TorchFullyShardedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig

SHARDED_WRAPPERS = (FullyShardedDataParallel, TorchFullyShardedDataParallel)

_REASONS = {
    "cuda_graph_impl": "a captured graph would repeat the decision it was captured with",
    "overlap_moe_expert_parallel_comm": "it bypasses the layer's forward, so that drops would be ignored",
    "fine_grained_activation_offloading": "its groups count layers that ran, and a skipped one does not",
    "cpu_offloading": "its prefetch order assumes that every layer runs",
    "delay_wgrad_compute": "gradients are then reported by other hooks than the ones a skip stands in for",
    "fp8_recipe": "delayed scaling keeps a history for each layer that a skip would leave stale",
}


def refuse_unsupported_switches(config: TransformerConfig, *, microbatch_scope: bool) -> None:
    """Check a built model's config.

    Raises:
        ValueError: naming the switch, its value, what is allowed and why.
    """
    found: dict[str, object] = {
        name: getattr(config, name)
        for name in (
            "overlap_moe_expert_parallel_comm",
            "fine_grained_activation_offloading",
            "cpu_offloading",
            "delay_wgrad_compute",
        )
        if getattr(config, name, False)
    }
    if getattr(config, "cuda_graph_impl", "none") != "none":
        found["cuda_graph_impl"] = config.cuda_graph_impl
    if config.fp8 and config.fp8_recipe == "delayed":
        found["fp8_recipe"] = "delayed"
    for name, value in found.items():
        raise ValueError(f"{name} = {value!r} does not work with layer dropping: {_REASONS[name]}; switch it off")
    if microbatch_scope and config.fp8 and config.recompute_granularity == "full":
        raise ValueError(
            "decisions per microbatch do not work with fp8 and recompute_granularity = 'full': Transformer Engine's "
            "recomputation does not tell its passes apart; use decision scope 'iteration'"
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
