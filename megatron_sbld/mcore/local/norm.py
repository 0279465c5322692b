"""torch's LayerNorm and RMSNorm for Megatron's layer specs, also under sequence parallelism.

The arithmetic and the state-dict keys are those of megatron.core's WrappedTorchNorm, which builds the same torch
modules but refuses sequence parallelism. There each tensor-parallel rank normalises its part of the sequence, so the
weights' gradients must be summed over the ranks; Megatron does that for parameters marked `sequence_parallel`, and
these mark theirs.
"""

from __future__ import annotations

from typing import get_args

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sbld.checks import check_choice
from megatron_sbld.words import Normalization


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalisation over the last dimension, constructed as Megatron's norms are (config, hidden_size, eps)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        _check_config(config, "LayerNorm")
        super().__init__(hidden_size, eps=eps)
        _mark_sequence_parallel(self, config)


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square normalisation over the last dimension, constructed as Megatron's norms are."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        _check_config(config, "RMSNorm")
        super().__init__(hidden_size, eps=eps)
        _mark_sequence_parallel(self, config)


def norm_class(normalization: str) -> type[LayerNorm | RMSNorm]:
    """The norm for TransformerConfig's `normalization`: LayerNorm or RMSNorm."""
    check_choice("normalization", normalization, get_args(Normalization))
    return LayerNorm if normalization == "LayerNorm" else RMSNorm


def _check_config(config: TransformerConfig, normalization: str) -> None:
    """Raise for what the config asks of a norm and torch's does not do."""
    if config.normalization != normalization:
        raise ValueError(f"normalization={config.normalization!r}, but the layer spec has {normalization}")
    for name in ("layernorm_zero_centered_gamma", "persist_layer_norm", "memory_efficient_layer_norm"):
        if getattr(config, name):
            raise ValueError(f"{name}=True needs Apex or Transformer Engine; it must be False")


def _mark_sequence_parallel(norm: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
