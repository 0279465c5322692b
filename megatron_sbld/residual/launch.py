"""Calls of a compiled library on tensors: addresses, shapes, workspace and stream for csrc/residual.h."""

from __future__ import annotations

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
    args.bias = None if bias is None else bias.data_ptr()
    workspace = _workspace(args, library.forward_workspace(args), x.device)
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
    args = _args(x_shape, x_dtype, d_y, index, seed, multiplier, threshold, dim)
    args.d_y = d_y.data_ptr()
    args.d_x = None if d_x is None else d_x.data_ptr()
    args.d_bias = None if d_bias is None else d_bias.data_ptr()
    workspace = _workspace(args, library.backward_workspace(args), d_y.device)
    library.backward(args)
    del workspace


def _args(
    x_shape: Sequence[int],
    x_dtype: torch.dtype,
    residual: torch.Tensor,
    index: torch.Tensor | None,
    seed: torch.Tensor | None,
    multiplier: float,
    threshold: int,
    dim: int,
) -> Args:
    """The fields that forward and backward share."""
    (rows0, rows1), (x_rows0, x_rows1) = _rows(residual.shape), _rows(x_shape)
    stride0, stride1 = (1, 0) if dim == 0 else (0, 1)
    if index is not None:
        index = index.contiguous()
        if index.dim() == 2:  # [b, k]: position i of sample j for dim 0; [s, k]: position j of row i for dim 1
            stride0, stride1 = (1, index.size(1)) if dim == 0 else (index.size(1), 1)
    args = Args(
        ABI,
        _DTYPES[x_dtype],
        _DTYPES[residual.dtype],
        dim,
        residual.device.index or 0,
        threshold,
        multiplier,
        0,
        *(rows0, rows1, residual.size(-1), x_rows0, x_rows1, stride0, stride1),
    )
    if index is not None:
        args.index = index.data_ptr()
        args._index = index  # lives as long as its address is used
    if seed is not None:
        args.seed = seed.data_ptr()
    if residual.is_cuda:
        args.stream = torch.cuda.current_stream(residual.device).cuda_stream
    return args


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
