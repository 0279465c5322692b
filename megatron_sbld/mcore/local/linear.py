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
    added, returned = (None, bias) if skip_bias_add else (bias, None)
    # In a compiled graph (mcore/local/compiled.py) a backward pass may not change a buffer that is no argument of it.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and _adds_to_main_grad(weight):
        return _AccumulatingLinear.apply(input_, weight, added), returned
    return F.linear(input_, weight, added), returned


def _adds_to_main_grad(weight: torch.Tensor) -> bool:
    """Whether Megatron's DistributedDataParallel gave the weight a gradient buffer that a product can be added to."""
    main_grad = getattr(weight, "main_grad", None)
    return (
        main_grad is not None
        and main_grad.dtype == weight.dtype
        and weight.requires_grad
        and hasattr(weight, "grad_added_to_main_grad")
    )


class _AccumulatingLinear(torch.autograd.Function):
    """x W^T + b, whose product for the weight's gradient is added to `main_grad` as it is made.

    Megatron's gradient_accumulation_fusion, for which it has a CUDA extension of Apex's. Else the gradient would be
    written to memory, read again and added, for each microbatch.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input_: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(input_)
        ctx.weight, ctx.has_bias = weight, bias is not None
        return F.linear(input_, weight, bias)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        (input_,) = ctx.saved_tensors
        weight, rows = ctx.weight, grad_output.flatten(0, -2)
        grad_input = grad_output.matmul(weight) if ctx.needs_input_grad[0] else None
        weight.main_grad.addmm_(rows.t(), input_.flatten(0, -2))
        weight.grad_added_to_main_grad = True
        # Its hook wants to see a gradient, and then throws it away: one that nobody writes costs no memory traffic.
        return grad_input, torch.empty_like(weight), rows.sum(dim=0) if ctx.has_bias else None


def _is_plain(layer: Any) -> bool:
    """Whether the layer is the product alone: no communication, no accumulation of its weight's gradient in Megatron's
    own function."""
    return get_pg_size(layer.tp_group) == 1 and not layer.gradient_accumulation_fusion
