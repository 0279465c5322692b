"""`residual_skip_add`: where a layer's branch meets the residual stream, as one torch operator with a gradient.

Nothing of the branch is kept for backward: the dropout mask is drawn again from its seed, which is itself drawn from
torch's current generator, so that Megatron's rules for it hold (equal on tensor-parallel ranks, each rank's own under
sequence parallelism) and a recomputed forward pass draws it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import Library as Operators

from megatron_sbld.residual import call as launch
from megatron_sbld.residual import eager
from megatron_sbld.residual.choice import library_for
from megatron_sbld.residual.extension import bindings

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def residual_skip_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout_prob: float = 0.0,
    scale: float = 1.0,
    index: torch.Tensor | None = None,
    dim: int = 0,
    training: bool = True,
) -> torch.Tensor:
    """residual, and on the rows that x has, residual + scale * dropout(x + bias).

    Computed in fp32 in one pass over memory; rows that x does not have are copied.

    Args:
        x: what a layer's branch made: [..., hidden], fp32, bf16, fp16 (or fp64, in eager torch).
        residual: [..., hidden], of x's dtype or fp32.
        bias: [hidden], of x's dtype.
        dropout_prob: in [0, 1), rounded to a multiple of 2^-16.
        scale: of the branch.
        index: int64, which positions of the residual along `dim` the positions of x are; they must differ. [k] for
            x [k, b, hidden] (dim 0) or [s, k, hidden] (dim 1), the same positions everywhere. Or [b, k] for dim 0,
            positions of each sample (random-LTD), and [s, k] for dim 1. None: x has all rows.
        dim: 0 or 1, the dimension of rows that index chooses from.
        training: whether to drop.

    Returns:
        A new tensor of the residual's shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a probability or an index is out of range. (On a GPU a
            wrong index is an error of the device, as with torch's own indexing.)
        RuntimeError: MEGATRON_SBLD_RESIDUAL asks for what cannot be used.
    """
    if not torch.compiler.is_compiling() and (extension := bindings()) is not None:
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        made: torch.Tensor | None = extension.residual_skip_add(
            x, residual, bias, dropout_prob, scale, index, dim, training, stream
        )
        if made is not None:
            return made
    _check_numbers(dropout_prob, scale)
    _check(x, residual, bias, index, dim, training)
    random = _draw(dropout_prob if training else 0.0, scale, x.device)
    return torch.ops.megatron_sbld.residual_skip_add(x, residual, bias, index, *random, dim)


def residual_skip_add_(
    x: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout_prob: float = 0.0,
    scale: float = 1.0,
    index: torch.Tensor | None = None,
    dim: int = 0,
    training: bool = True,
) -> torch.Tensor:
    """`residual_skip_add` into the residual's own storage: rows that x does not have are not even read.

    The residual must be contiguous, share no memory with x, and its values be no longer needed: where another operator
    has saved it for backward (the norm at the head of a branch does), torch raises at backward.
    """
    _check_numbers(dropout_prob, scale)
    _check(x, residual, bias, index, dim, training)
    if not residual.is_contiguous():
        raise ValueError("residual must be contiguous to be written in place")
    random = _draw(dropout_prob if training else 0.0, scale, x.device)
    result: torch.Tensor = _InPlace.apply(x, residual, bias, index, *random, dim)
    return result


def _draw(dropout_prob: float, scale: float, device: torch.device) -> tuple[torch.Tensor | None, float, int]:
    """(seed of the mask, multiplier of what it keeps, its threshold); without dropout no seed is drawn."""
    threshold = eager.drop_threshold(dropout_prob)
    seed = torch.randint(2**63 - 1, (1,), device=device) if threshold else None
    return seed, eager.multiplier(scale, threshold), threshold


def _check_numbers(dropout_prob: float, scale: float) -> None:
    for name, value in (("dropout_prob", dropout_prob), ("scale", scale)):
        if value is None or isinstance(value, (torch.Tensor, str)):
            raise ValueError(f"{name} is {value!r}: must be a number (a tensor would get no gradient)")


def _check(
    x: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor | None,
    dim: int,
    training: bool,
) -> None:
    if training is not True and training is not False:
        raise ValueError(f"training is {training!r}: must be True or False")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}: must be one of {', '.join(map(str, _DTYPES))}")
    if x.dim() < 1 or x.size(-1) == 0:
        raise ValueError(f"x is {list(x.shape)}: must be [..., hidden] with hidden > 0")
    if residual.dtype != x.dtype and (residual.dtype != torch.float32 or x.dtype == torch.float64):
        raise ValueError(f"residual is {residual.dtype} and x {x.dtype}: must be of x's dtype or float32")
    if bias is not None and (bias.shape != x.shape[-1:] or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}: must be of x's dtype {x.dtype} and [{x.size(-1)}]")
    for name, tensor in (("residual", residual), ("bias", bias), ("index", index)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: must be on one device")
    if dim not in (0, 1):
        raise ValueError(f"dim is {dim}: must be 0 or 1")
    if index is None:
        if x.shape != residual.shape:
            raise ValueError(f"x is {list(x.shape)}, residual {list(residual.shape)}: must be equal without an index")
        return
    if index.dtype != torch.int64:
        raise ValueError(f"index is {index.dtype}: must be int64")
    if x.dim() != 3 or residual.dim() != 3 or index.dim() not in (1, 2):
        raise ValueError(
            f"x is {list(x.shape)}, residual {list(residual.shape)}, index {list(index.shape)}: with an index x and "
            "residual have 3 dimensions, and index has 1 or 2"
        )
    if index.size(-1) > residual.size(dim):
        raise ValueError(f"index has {index.size(-1)} positions of {residual.size(dim)}: it names one twice")
    others = residual.size(1 - dim)
    expected = [index.size(-1), others, residual.size(2)] if dim == 0 else [others, index.size(-1), residual.size(2)]
    if list(x.shape) != expected or (index.dim() == 2 and index.size(0) != others):
        raise ValueError(
            f"x is {list(x.shape)}, residual {list(residual.shape)}, index {list(index.shape)}, dim {dim}: x must be "
            f"{expected} and index [{index.size(-1)}] or [{others}, {index.size(-1)}]"
        )


# ----------------------------------------------------------------------------------------------------------------------
# The operators

# Inductor's cache on disk knows an operator by its name: one whose arguments change after a release needs another.
_operators = Operators("megatron_sbld", "DEF")
_operators.define(
    "residual_skip_add(Tensor x, Tensor residual, Tensor? bias, Tensor? index, Tensor? seed, float multiplier, "
    "int threshold, int dim) -> Tensor"
)
_operators.define(
    "residual_skip_add_(Tensor x, Tensor(a!) residual, Tensor? bias, Tensor? index, Tensor? seed, float multiplier, "
    "int threshold, int dim) -> ()"
)
_operators.define(
    "residual_skip_add_backward(Tensor d_y, Tensor? index, Tensor? seed, float multiplier, int threshold, int dim, "
    "SymInt[] x_shape, ScalarType x_dtype, bool with_x, bool with_bias) -> (Tensor, Tensor)"
)


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor | None,
    seed: torch.Tensor | None,
    multiplier: float,
    threshold: int,
    dim: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    residual = residual.contiguous()
    _check_index(index, residual, dim)
    if x.numel() == 0:  # an empty index has no address to tell a library
        return residual.clone() if out is None else out
    library = library_for(x.device, x.dtype)
    if library is None:
        hidden = x.size(-1)
        rows = _rows(index, residual.shape, dim)
        flat_out = None if out is None else out.view(-1, hidden)
        flat = x.reshape(-1, hidden), residual.view(-1, hidden)
        y = eager.forward(*flat, bias, rows, seed, multiplier, threshold, flat_out)
        # Not view: an autograd function's result that is a view cannot be written in place.
        return torch.ops.aten._unsafe_view(y, residual.shape) if out is None else out
    out = torch.empty_like(residual) if out is None else out
    launch.forward(library, x.contiguous(), residual, bias, index, seed, multiplier, threshold, dim, out)
    return out


def _forward_in_place(x: torch.Tensor, residual: torch.Tensor, *args: Any) -> None:
    if _share_memory(x, residual):  # a row would be read after it is written
        raise ValueError("x shares memory with residual, which cannot be written in place then")
    _forward(x, residual, *args, out=residual)


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors do; of others copies are made."""
    (a_begin, a_end), (b_begin, b_end) = ((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (a, b))
    return a.is_contiguous() and a_begin < b_end and b_begin < a_end


def _backward(
    d_y: torch.Tensor,
    index: torch.Tensor | None,
    seed: torch.Tensor | None,
    multiplier: float,
    threshold: int,
    dim: int,
    x_shape: list[int],
    x_dtype: torch.dtype,
    with_x: bool,
    with_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(d_x, d_bias) in x's dtype; what is not asked for is None."""
    d_y, hidden = d_y.contiguous(), x_shape[-1]
    library = library_for(d_y.device, x_dtype)
    if library is None:
        rows = _rows(index, d_y.shape, dim)
        d_x, d_bias = eager.backward(
            d_y.view(-1, hidden), rows, seed, multiplier, threshold, x_dtype, with_x, with_bias
        )
        return None if d_x is None else d_x.view(x_shape), d_bias
    d_x = d_y.new_empty(x_shape, dtype=x_dtype) if with_x else None
    d_bias = d_y.new_empty(hidden, dtype=x_dtype) if with_bias else None
    if 0 in x_shape:  # an empty index has no address to tell a library
        return d_x, None if d_bias is None else d_bias.zero_()
    launch.backward(library, d_y, index, seed, multiplier, threshold, dim, x_shape, x_dtype, d_x, d_bias)
    return d_x, d_bias


def _backward_operator(d_y: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`_backward` as an operator, which can return no None: what is not asked for is empty."""
    d_x, d_bias = _backward(d_y, *args)
    nothing = d_y.new_empty(0, dtype=args[-3])
    return nothing if d_x is None else d_x, nothing.clone() if d_bias is None else d_bias


def _rows(index: torch.Tensor | None, shape: torch.Size, dim: int) -> torch.Tensor | None:
    """The row of the flattened residual [s, b, hidden] that each row of the flattened x belongs to."""
    if index is None:
        return None
    others = torch.arange(shape[1 - dim], device=index.device)
    positions = index.expand(len(others), -1)  # [b, k] for dim 0, [s, k] for dim 1
    if dim == 0:
        return (positions * shape[1] + others[:, None]).t().flatten()
    return (others[:, None] * shape[1] + positions).flatten()


def _check_index(index: torch.Tensor | None, residual: torch.Tensor, dim: int) -> None:
    """On a CPU, where it costs no synchronisation; the GPU's kernel finds what is out of range itself."""
    if index is None or index.is_cuda or index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= residual.size(dim):
        raise ValueError(f"index has values from {low} to {high}: must be in [0, {residual.size(dim)})")
    in_order = index.sort(dim=-1).values
    if bool((in_order.diff(dim=-1) == 0).any()):
        raise ValueError("index names a position twice")


def _fake_forward(x: torch.Tensor, residual: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


def _fake_forward_in_place(*args: Any) -> None:
    """The residual keeps shape and dtype."""


def _fake_backward(d_y: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x_shape, x_dtype, with_x, with_bias = args[-4:]
    d_x = d_y.new_empty(x_shape if with_x else 0, dtype=x_dtype)
    return d_x, d_y.new_empty(x_shape[-1] if with_bias else 0, dtype=x_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, residual, _, index, seed, ctx.multiplier, ctx.threshold, ctx.dim = inputs
    ctx.save_for_backward(index, seed)
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.plain_sum = index is None and (ctx.threshold, ctx.multiplier) == (0, 1.0) and x.dtype == residual.dtype


@torch.autograd.function.once_differentiable
def _gradients(ctx: Any, d_y: torch.Tensor) -> tuple[Any, ...]:
    index, seed = ctx.saved_tensors
    needs_x, _, with_bias, *_ = ctx.needs_input_grad
    with_x = needs_x and not ctx.plain_sum
    d_x = d_y if ctx.plain_sum else None  # the same tensor for both operands, as of torch's own sum
    d_bias = None
    if with_x or with_bias:
        made_x, made_bias = torch.ops.megatron_sbld.residual_skip_add_backward(
            *(d_y, index, seed, ctx.multiplier, ctx.threshold, ctx.dim, ctx.x_shape, ctx.x_dtype, with_x, with_bias)
        )
        d_x, d_bias = made_x if with_x else d_x, made_bias if with_bias else None
    return d_x, d_y, d_bias, None, None, None, None, None


class _InPlace(torch.autograd.Function):
    """A custom operator that writes into its input can have no gradient; an autograd function can."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        residual: torch.Tensor = inputs[1]
        _save(ctx, inputs)
        ctx.mark_dirty(residual)
        torch.ops.megatron_sbld.residual_skip_add_(*inputs)
        return residual

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[Any, ...]:
        return _gradients(ctx, d_y)


for _device in ("CPU", "CUDA"):
    _operators.impl("residual_skip_add", _forward, _device)
    _operators.impl("residual_skip_add_", _forward_in_place, _device)
    _operators.impl("residual_skip_add_backward", _backward_operator, _device)
torch.library.register_autograd(
    "megatron_sbld::residual_skip_add",
    _gradients,
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs),
    lib=_operators,
)
torch.library.register_fake("megatron_sbld::residual_skip_add", _fake_forward, lib=_operators)
torch.library.register_fake("megatron_sbld::residual_skip_add_", _fake_forward_in_place, lib=_operators)
torch.library.register_fake("megatron_sbld::residual_skip_add_backward", _fake_backward, lib=_operators)
