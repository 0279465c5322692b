"""HybridModel's layers as a Megatron spec without Transformer Engine: attention and MLP, as layer_specs.py has them.

A pattern of `*` and `-` is then a GPT whose parts are layers of their own, with the same arithmetic. Mamba layers,
gated delta nets and experts need Megatron's own spec, and Transformer Engine.
"""

from __future__ import annotations

from typing import Any

from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules  # from 0.18 on names of HybridStack's
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_sbld.mcore.local.layer_specs import local_layer


class LocalHybridStack(MambaStack):
    """Megatron's stack with this package's final norm; its own is Transformer Engine's, which cannot be built here."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaStackSubmodules,
        *,
        post_layer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            _, norm = local_layer(config.normalization)
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def hybrid_stack_spec(config: TransformerConfig) -> ModuleSpec:
    """For HybridModel's `hybrid_stack_spec` (`mamba_stack_spec` of MambaModel before 0.18), with layers `*` and `-`."""
    layer, _ = local_layer(config.normalization)
    parts = layer.submodules
    saved_as = parts.sharded_state_dict_keys_map  # norms as Transformer Engine's layers have them
    attention = TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm,
        self_attention=parts.self_attention,
        self_attn_bda=parts.self_attn_bda,
        sharded_state_dict_keys_map={"input_layernorm.": saved_as["input_layernorm."]},
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=parts.pre_mlp_layernorm,
        mlp=parts.mlp,
        mlp_bda=parts.mlp_bda,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": saved_as["pre_mlp_layernorm."]},
    )
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=MambaStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )
