"""HybridModel's layers as a Megatron spec without Transformer Engine: attention and MLP, as layer_specs.py has them.

A pattern of `*` and `-` is then a GPT whose parts are layers of their own, with the same arithmetic. Mamba layers,
gated delta nets and experts need Megatron's own spec, and Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules  # from 0.18 on names of HybridStack's
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_sbld.mcore.local.layer_specs import local_layer, local_norm


class LocalNorm:
    """The norm that the config names: a spec of hybrid layers does not know the config, as Megatron's does not."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]
        norm: torch.nn.Module = local_norm(config.normalization)(config=config, hidden_size=hidden_size, eps=eps)
        return norm


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
            self.final_norm = LocalNorm(config, config.hidden_size, config.layernorm_epsilon)


def _stack_spec() -> ModuleSpec:
    parts = local_layer("LayerNorm")[0].submodules
    saved_as = parts.sharded_state_dict_keys_map  # norms as Transformer Engine's layers have them
    attention = TransformerLayerSubmodules(
        input_layernorm=LocalNorm,
        self_attention=parts.self_attention,
        self_attn_bda=parts.self_attn_bda,
        sharded_state_dict_keys_map={"input_layernorm.": saved_as["input_layernorm."]},
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=LocalNorm,
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


hybrid_stack_spec = _stack_spec()
"""For HybridModel's `hybrid_stack_spec` (`mamba_stack_spec` of MambaModel before 0.18), and Megatron-LM's `--spec`."""
