"""The GPT's transformer block as a Megatron spec: with Transformer Engine where it can be used, else without.

Without it, the layers are megatron-core's local ones, with torch's fused attention in place of the unfused softmax,
with linear layers that are torch's own where nothing is to be communicated, and with norms that also work under
sequence parallelism. The block's final norm is part of what is returned, because Megatron's own choice for it refuses
sequence parallelism and is misled by the package named apex on PyPI.
"""

from __future__ import annotations

import functools
import logging
from typing import get_args

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sbld.checks import check_choice
from megatron_sbld.layout.placement import Placement
from megatron_sbld.mcore.compat import nvidia_apex_available, submodules_of, transformer_engine_available
from megatron_sbld.mcore.local.attention import SDPACoreAttention
from megatron_sbld.mcore.local.linear import ColumnParallelLinear, RowParallelLinear
from megatron_sbld.mcore.local.norm import norm_class
from megatron_sbld.words import TransformerImpl

logger = logging.getLogger(__name__)


def gpt_block_spec(
    config: TransformerConfig, transformer_impl: str = "auto", vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers and the final norm of this pipeline stage, for GPTModel's `transformer_layer_spec`.

    Args:
        config: of the whole model; Megatron's parallel state must be initialised.
        transformer_impl: auto, local or transformer_engine (see `choose_transformer_impl`).
        vp_stage: model chunk of this rank under the interleaved schedule, else None.

    Raises:
        ValueError: an unknown transformer_impl, or Transformer Engine is asked for and cannot be used.
    """
    chosen, reason = choose_transformer_impl(transformer_impl)
    _log_once(f"transformer_impl: {chosen} ({reason})")
    if chosen == "transformer_engine":
        layer, norm = _transformer_engine_layer()
    else:
        layer, norm = local_layer(config.normalization)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def uneven_layout(config: TransformerConfig) -> str | None:
    """The layout of a model whose pipeline stages hold unequal numbers of layers, in placement.py's notation."""
    given = config.pipeline_model_parallel_layout
    if given is None:
        return None
    ranks, chunks_per_rank = given.pipeline_model_parallel_size, given.virtual_pipeline_model_parallel_size
    counts = [
        given.layout[rank][chunk].count(LayerType.decoder) for chunk in range(chunks_per_rank) for rank in range(ranks)
    ]
    placement = Placement(tuple(counts), ranks)
    return None if placement.is_even else placement.layout


def choose_transformer_impl(transformer_impl: str) -> tuple[str, str]:
    """(local or transformer_engine, why): auto takes Transformer Engine where it and a GPU are there.

    Raises:
        ValueError: an unknown name, or Transformer Engine is asked for and cannot be used.
    """
    check_choice("model.transformer_impl", transformer_impl, get_args(TransformerImpl))
    if transformer_impl == "local":
        return "local", "as configured"
    if not torch.cuda.is_available():
        obstacle = "Transformer Engine needs a CUDA device"
    elif not transformer_engine_available():
        obstacle = "Transformer Engine cannot be imported"
    else:
        return "transformer_engine", "it is installed" if transformer_impl == "auto" else "as configured"
    if transformer_impl == "transformer_engine":
        raise ValueError(f"model.transformer_impl=transformer_engine: {obstacle}; use auto or local")
    return "local", obstacle


def _transformer_engine_layer() -> tuple[ModuleSpec, type[torch.nn.Module]]:
    from megatron.core.extensions.transformer_engine import TENorm

    return get_gpt_layer_with_transformer_engine_spec(), TENorm


def local_layer(normalization: str) -> tuple[ModuleSpec, type[torch.nn.Module]]:
    """megatron-core's local layer with the attention, the linear layers and the norms of this package."""
    norm = local_norm(normalization)
    layer = get_gpt_layer_local_spec(normalization=normalization)
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    attention, mlp = submodules_of(layer.submodules.self_attention), submodules_of(layer.submodules.mlp)
    attention.core_attention = SDPACoreAttention
    attention.linear_qkv = mlp.linear_fc1 = ColumnParallelLinear
    attention.linear_proj = mlp.linear_fc2 = RowParallelLinear
    return layer, norm


def local_norm(normalization: str) -> type[torch.nn.Module]:
    """Apex's fused layer norm where it can run, as Megatron would choose; it has no RMSNorm."""
    if normalization == "LayerNorm" and torch.cuda.is_available() and nvidia_apex_available():
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        return FusedLayerNorm
    return norm_class(normalization)


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
