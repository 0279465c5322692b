"""Calls of a compiled library on tensors: addresses, shapes, workspace and stream for csrc/residual.h."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from megatron_sbld.residual.native import ABI, Args, Library

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def forward(
    library: Library,
    x: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor | None,
    seed: torch.Tensor | None,
    multiplier: float,
    threshold: int,
    dim: int,
    out: torch.Tensor,
) -> None:
    """Write residual + multiplier * mask * (x + bias) to `out`, which may be the residual; all contiguous."""
    bias = None if bias is None else bias.contiguous()
    args = _args(x.shape, x.dtype, residual, index, seed, multiplier, threshold, dim)
    args.x, args.residual, args.y = x.data_ptr(), residual.data_ptr(), out.data_ptr()
    if bias is not None:
        args.bias = bias.data_ptr()
    workspace = None if index is None else _workspace(args, library.forward_workspace(args), x.device)
    library.forward(args)
    del workspace, bias  # needed until the call is queued; torch's allocator keeps the stream's order afterwards


def backward(
    library: Library,
    d_y: torch.Tensor,
    index: torch.Tensor | None,
    seed: torch.Tensor | None,
    multiplier: float,
    threshold: int,
    dim: int,
    x_shape: Sequence[int],
    x_dtype: torch.dtype,
    d_x: torch.Tensor | None,
    d_bias: torch.Tensor | None,
) -> None:
    """Write the gradients of x and of the bias, those that are given; all contiguous."""
    args = _args(tuple(x_shape), x_dtype, d_y, index, seed, multiplier, threshold, dim)
    args.d_y = d_y.data_ptr()
    if d_x is not None:
        args.d_x = d_x.data_ptr()
    workspace = None
    if d_bias is not None:
        args.d_bias = d_bias.data_ptr()
        workspace = _workspace(args, library.backward_workspace(args), d_y.device)
    library.backward(args)
    del workspace


def _args(
    x_shape: tuple[int, ...],
    x_dtype: torch.dtype,
    residual: torch.Tensor,
    index: torch.Tensor | None,
    seed: torch.Tensor | None,
    multiplier: float,
    threshold: int,
    dim: int,
) -> Args:
    """The fields that forward and backward share."""
    device = residual.get_device()  # -1 on a CPU
    index_shape = None if index is None else index.shape
    args = Args.from_buffer_copy(_shapes(x_shape, x_dtype, residual.shape, residual.dtype, device, index_shape, dim))
    args.drop_threshold, args.multiplier = threshold, multiplier
    if index is not None:
        index = index.contiguous()
        args.index = index.data_ptr()
        args._index = index  # lives as long as its address is used
    if seed is not None:
        args.seed = seed.data_ptr()
    if device >= 0:
        args.stream = torch.cuda.current_stream(device).cuda_stream
    return args


@functools.lru_cache(maxsize=1024)
def _shapes(
    x_shape: tuple[int, ...],
    x_dtype: torch.dtype,
    residual_shape: tuple[int, ...],
    residual_dtype: torch.dtype,
    device: int,
    index_shape: tuple[int, ...] | None,
    dim: int,
) -> Args:
    """What calls of equal shapes have in common, to be copied: to make it anew takes longer than a small kernel."""
    (rows0, rows1), (x_rows0, x_rows1) = _rows(residual_shape), _rows(x_shape)
    stride0, stride1 = (1, 0) if dim == 0 else (0, 1)
    if index_shape is not None and len(index_shape) == 2:
        # [b, k]: position i of sample j for dim 0; [s, k]: position j of row i for dim 1
        stride0, stride1 = (1, index_shape[1]) if dim == 0 else (index_shape[1], 1)
    sizes = (rows0, rows1, residual_shape[-1], x_rows0, x_rows1, stride0, stride1)
    return Args(ABI, _DTYPES[x_dtype], _DTYPES[residual_dtype], dim, max(device, 0), 0, 0.0, 0, *sizes)


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) == 3:
        return shape[0], shape[1]
    return math.prod(shape[:-1]), 1


def _workspace(args: Args, num_bytes: int, device: torch.device) -> torch.Tensor | None:
    """Memory that the caller keeps until the call."""
    if num_bytes == 0:
        return None
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    args.workspace = workspace.data_ptr()
    return workspace
