"""Temporary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class HybridNames(NamedTuple):
    """What a version of megatron-core calls two arguments of its hybrid model."""

    spec: str
    pattern: str


def hybrid_model_class() -> tuple[Any, HybridNames]:
    """megatron-core's hybrid model: HybridModel, or MambaModel where it is older (0.16: layers alike, names not)."""
    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ModuleNotFoundError:
        from megatron.core.models.mamba import MambaModel

        return MambaModel, HybridNames("mamba_stack_spec", "hybrid_override_pattern")
    return HybridModel, HybridNames("hybrid_stack_spec", "hybrid_layer_pattern")


def hybrid_pattern(model: torch.nn.Module) -> str | None:
    """The pattern that a hybrid model was built with, of the whole model; None where it was built from ratios."""
    found = getattr(model, "hybrid_layer_pattern", None)
    return found or getattr(model, "hybrid_override_pattern", None)  # of MambaModel before 0.18
