"""How a layer's two branches come back to the residual stream: what stands for Megatron's bias-dropout-add functions.

A TransformerLayer asks its self_attn_bda and mlp_bda for a function at each call, a MambaLayer its mamba_bda.
Megatron's own is left in place unless branches are scaled, or `drop.residual: fused` asks for the fused add; evaluation
always has Megatron's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityFuncOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sbld.residual import residual_skip_add

BiasDropoutAdd = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]
"""((x [s, b, h], bias [h] or None), residual [s, b, h], dropout probability) -> residual + dropout(x + bias)."""

_NAMES = ("self_attn_bda", "mlp_bda", "mamba_bda")


class _InPlaceOfMegatrons:
    """Stands for a function of the layer; `_branch_scale` of a switchable layer is its present scale."""

    def __init__(self, layer: TransformerLayer, stock: Callable[[bool, bool], BiasDropoutAdd]) -> None:
        self.layer = layer
        self.stock = stock

    @property
    def scale(self) -> float:
        return getattr(self.layer, "_branch_scale", 1.0)


class _Scaled(_InPlaceOfMegatrons):
    """residual + scale * dropout(x + bias); scale 1 is the stock one."""

    def __call__(self, training: bool, fused: bool) -> BiasDropoutAdd:
        stock, scale = self.stock(training, fused), self.scale
        if not training or scale == 1.0:
            return stock

        def scaled(
            x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float
        ) -> torch.Tensor:
            x, bias = x_with_bias  # dropout is linear, so both can be scaled before it
            return stock((x * scale, None if bias is None else bias * scale), residual, prob)

        return scaled


class _Fused(_InPlaceOfMegatrons):
    """residual + scale * dropout(x + bias) in one pass over memory, with random numbers of its own."""

    def __call__(self, training: bool, fused: bool) -> BiasDropoutAdd:
        return self._add if training else self.stock(training, fused)

    def _add(
        self, x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float
    ) -> torch.Tensor:
        x, bias = x_with_bias
        # Megatron's own also returns x's dtype where fp32_residual_connection makes the residual fp32.
        return residual_skip_add(x, residual.to(x.dtype), bias, prob, self.scale)


def scale_branches(layer: TransformerLayer, scaled: bool) -> None:
    """Let the layer's branches be multiplied by its `_branch_scale`, or no longer. Fused ones always are."""
    for name, present in _present(layer):
        if not isinstance(present, _Fused):
            stock = getattr(present, "stock", present)
            setattr(layer, name, _Scaled(layer, stock) if scaled else stock)


def fuse_branches(layer: TransformerLayer) -> None:
    """Let the fused add take the layer's branches back to the residual stream in training."""
    for name, present in _present(layer):
        setattr(layer, name, _Fused(layer, getattr(present, "stock", present)))


def are_fused(layer: TransformerLayer) -> bool:
    return any(isinstance(function, _Fused) for _, function in _present(layer))


def _present(layer: TransformerLayer) -> list[tuple[str, Any]]:
    """The layer's functions by name, without those that a layer does not have."""
    functions = [(name, getattr(layer, name)) for name in _NAMES if hasattr(layer, name)]
    return [(name, function) for name, function in functions if not isinstance(function, IdentityFuncOp)]
