"""Megatron's tensor-parallel linear layers for machines without Transformer Engine, as torch's own on a single rank.

With one tensor-parallel rank there is nothing to communicate, but megatron-core still goes through an autograd function
in Python and adds the bias in an operation of its own: 6 % of an iteration of a small model on a CPU
(benchmarks/results/peers_cpu.md). With more ranks these are megatron-core's layers, unchanged.

Parameters, their initialisation and the names in checkpoints are Megatron's. Results agree with its layers' up to the
rounding of the bias.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.utils import get_pg_size


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """x W^T + b, constructed and called as Megatron's of this name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_plain = _is_plain(self)
        # The activation's fused function requires the bias as an argument.
        self._returns_bias = self.skip_bias_add and self.config.bias_activation_fusion

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output [s, b, out], bias [out] that the caller must add or None); input_ is [s, b, in]."""
        if not self._is_plain:
            return super().forward(input_, weight, runtime_gather_output)
        return _linear(input_, self.weight if weight is None else weight, self.bias, self._returns_bias)


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """x W^T + b, constructed and called as Megatron's of this name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_plain = _is_plain(self)
        self._returns_bias = self.skip_bias_add and self.config.bias_dropout_fusion  # which adds it for nothing

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output [s, b, out], bias [out] that the caller must add or None); input_ is [s, b, in]."""
        if not self._is_plain:
            return super().forward(input_)
        return _linear(input_, self.weight, self.bias, self._returns_bias)


def _linear(
    input_: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, returns_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (F.linear(input_, weight), bias) if returns_bias else (F.linear(input_, weight, bias), None)


def _is_plain(layer: Any) -> bool:
    """Whether the layer is the product alone: no communication, no accumulation of its weight's gradient in Megatron's
    own function."""
    return get_pg_size(layer.tp_group) == 1 and not layer.gradient_accumulation_fusion
