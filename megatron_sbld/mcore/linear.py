"""Megatron's tensor-parallel linear layers for machines without Transformer Engine, as torch's own on a single rank.

With one tensor-parallel rank there is nothing to communicate, but megatron-core still goes through an autograd function
in Python and adds the bias in an operation of its own: 6 % of an iteration of a small model on a CPU
(benchmarks/results/peers_cpu.md).

On any number of ranks the bias is returned to be added elsewhere only where Megatron fuses it with something there.
For nothing, that is the cause of an error: megatron-core's recomputation of the MLP takes a parameter that is handed
through it for one of its results, and its graph grows with each pass.

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

    skip_bias_add: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_bias_add = self.skip_bias_add and self.config.bias_activation_fusion
        self._is_plain = _is_plain(self)

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output [s, b, out], bias [out] that the caller must add or None); input_ is [s, b, in]."""
        if not self._is_plain:
            return super().forward(input_, weight, runtime_gather_output)
        return _linear(input_, self.weight if weight is None else weight, self.bias, self.skip_bias_add)


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """x W^T + b, constructed and called as Megatron's of this name."""

    skip_bias_add: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_bias_add = self.skip_bias_add and self.config.bias_dropout_fusion
        self._is_plain = _is_plain(self)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output [s, b, out], bias [out] that the caller must add or None); input_ is [s, b, in]."""
        if not self._is_plain:
            return super().forward(input_)
        return _linear(input_, self.weight, self.bias, self.skip_bias_add)


def _linear(
    input_: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, skip_bias_add: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (F.linear(input_, weight), bias) if skip_bias_add else (F.linear(input_, weight, bias), None)


def _is_plain(layer: Any) -> bool:
    """Whether the layer is the product alone: no communication, no accumulation of its weight's gradient in Megatron's
    own function."""
    return get_pg_size(layer.tp_group) == 1 and not layer.gradient_accumulation_fusion
