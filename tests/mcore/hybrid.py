"""A tiny HybridModel, or MambaModel of megatron-core before 0.18, whose weights are those of helpers.py's GPT.

    chunks = tiny_hybrid(tiny_config(num_layers=8), "*-*-*-*-")      # tiny_gpt(tiny_config(num_layers=4)) in 8 layers

Its parameters have the names of the GPT's layers that they are a part of (`global_name`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_sbld.layout.units import unit_numbers
from megatron_sbld.mcore.local.hybrid_specs import hybrid_stack_spec
from megatron_sbld.mcore.local.norm import norm_class
from tests.mcore.helpers import chunk_options, fill_parameters

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel as _MODEL
except ModuleNotFoundError:  # megatron-core before 0.18
    from megatron.core.models.mamba import MambaModel as _MODEL

_TAKEN = inspect.signature(_MODEL.__init__).parameters
_SPEC, _PATTERN = (
    next(name for name in names if name in _TAKEN)
    for names in (("hybrid_stack_spec", "mamba_stack_spec"), ("hybrid_layer_pattern", "hybrid_override_pattern"))
)


def tiny_hybrid(
    config: TransformerConfig,
    pattern: str,
    tied: bool = True,
    position_embedding_type: str = "learned_absolute",
    blocks: Sequence[int] | None = None,
    spec: ModuleSpec | None = None,
) -> list[Any]:
    """The model chunks of this rank, with parameters that depend on their names in a GPT alone.

    blocks: the GPT's layer (1-based) that each layer of the pattern is a part of; None counts blocks.
    spec: of the stack; None takes tiny_spec.
    """
    chunks = []
    num_chunks = config.virtual_pipeline_model_parallel_size
    for vp_stage in [None] if num_chunks is None else range(num_chunks):
        chunk = _MODEL(
            config=config,
            **{_SPEC: spec or tiny_spec(config), _PATTERN: pattern},
            **({} if vp_stage is None else {"vp_stage": vp_stage}),
            **chunk_options(vp_stage, tied, position_embedding_type),
        )
        chunk.gpt_layers = list(blocks or unit_numbers(pattern, "block"))
        chunk.to(torch.cuda.current_device())  # the norms are built on the CPU
        fill_parameters(chunk)
        chunks.append(chunk)
    return chunks


def tiny_spec(config: TransformerConfig) -> ModuleSpec:
    """This package's spec, with experts where the config has them, and stand-ins for the mixers that need a GPU."""
    spec = copy.deepcopy(hybrid_stack_spec)
    layers = spec.submodules
    norm = norm_class(config.normalization)
    layers.mamba_layer = ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(norm=norm, mixer=StandInMixer, mamba_bda=get_bias_dropout_add),
    )
    layers.gdn_layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm, self_attention=StandInMixer, self_attn_bda=get_bias_dropout_add
        ),
    )
    if config.num_moe_experts:
        experts = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)
        layers.moe_layer = copy.deepcopy(layers.mlp_layer)
        layers.moe_layer.module = TransformerLayer
        layers.moe_layer.submodules.mlp = experts.submodules.mlp
    return spec


class StandInMixer(MegatronModule):
    """In the place of Mamba's mixer or of a gated delta net: a sum over the positions before, and a linear map."""

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config)
        self.out_proj = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """[s, b, h] -> [s, b, h], no bias."""
        return self.out_proj(hidden_states.cumsum(0) / len(hidden_states)), None
