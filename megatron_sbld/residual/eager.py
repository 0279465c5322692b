"""The residual add in plain torch operations: its specification, and what runs where no library does.

    y = residual, and for each row of x:  y[row] += scale * dropout(x[row] + bias)

Sums and products are made in fp32 (fp64 for fp64), in the order of csrc/residual_core.h, and rounded once, so that the
libraries equal this bit for bit. Dropout takes its random bits from Philox4x32-10 (Salmon et al. 2011), a block for
each 8 neighbouring elements, keyed on the seed and counted by the element's place in the residual stream: the mask does
not depend on which rows are chosen, in which order, or how the work is split. A drop probability is rounded to a
multiple of 2^-16, and kept elements are divided by exactly what is then kept.
"""

from __future__ import annotations

import numpy as np
import torch

GROUP = 8
"""Neighbouring elements that share a Philox block."""
THRESHOLDS = 1 << 16
"""Values of an element's random bits: it is dropped where they are below the threshold."""

_LANES, _MIN_LANE_ROWS, _MAX_CHUNKS, _SECTION_CHUNKS = 16, 4, 256, 16
_WORD = 0xFFFFFFFF


def drop_threshold(dropout_prob: float) -> int:
    """The number of 16-bit values that drop an element.

    Raises:
        ValueError: the probability is not in [0, 1), or so close to 1 that everything would be dropped.
    """
    if not 0.0 <= dropout_prob < 1.0:
        raise ValueError(f"dropout_prob must be in [0, 1), got {dropout_prob}")
    threshold = round(dropout_prob * THRESHOLDS)
    if threshold == THRESHOLDS:
        raise ValueError(
            f"dropout_prob = {dropout_prob} would drop everything: it must be below {1 - 0.5 / THRESHOLDS}"
        )
    return threshold


def multiplier(scale: float, threshold: int) -> float:
    """What a kept element is multiplied with: scale / (1 - drop probability)."""
    return scale / (1.0 - threshold / THRESHOLDS)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    multiplier: float,
    threshold: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [rows of residual, hidden], in the residual's dtype.

    Args:
        x: [rows of x, hidden].
        residual: [rows of residual, hidden], of x's dtype or fp32.
        bias: [hidden] of x's dtype, or None.
        rows: int64 [rows of x], the row of the residual stream that each row of x belongs to; None: all in order.
        seed: int64 [1]; needed if threshold > 0.
        multiplier: of what dropout keeps.
        threshold: of the 16 random bits; 0 is no dropout.
        out: the residual itself, to write its rows in place.
    """
    compute = _compute_dtype(residual.dtype)
    branch = x.to(compute) if bias is None else x.to(compute) + bias.to(compute)
    update = branch * _rounded(multiplier, compute)
    if threshold:
        update = torch.where(_kept(x, rows, seed, threshold), update, 0.0)
    if rows is None:
        y = (residual.to(compute) + update).to(residual.dtype)
        return y if out is None else out.copy_(y)
    chosen = (residual[rows].to(compute) + update).to(residual.dtype)
    return (residual.clone() if out is None else out).index_copy_(0, rows, chosen)


def backward(
    d_y: torch.Tensor,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    multiplier: float,
    threshold: int,
    x_dtype: torch.dtype,
    with_x: bool,
    with_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(d_x [rows of x, hidden], d_bias [hidden]) in x's dtype, or None; the residual's gradient is d_y itself."""
    compute = _compute_dtype(d_y.dtype)
    d_branch = (d_y if rows is None else d_y[rows]).to(compute) * _rounded(multiplier, compute)
    if threshold:
        d_branch = torch.where(_kept(d_branch, rows, seed, threshold), d_branch, 0.0)
    d_x = d_branch.to(x_dtype) if with_x else None
    return d_x, ordered_sum(d_branch).to(x_dtype) if with_bias else None


def ordered_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the rows, [n, hidden] -> [hidden], in an order that n alone decides, the same on every device.

    A lane of a chunk takes every 16th of its rows; then the lanes of a chunk, the chunks of a section and the sections
    are summed, each from the first to the last.
    """
    num_rows, hidden = values.shape
    if num_rows == 0:
        return values.new_zeros(hidden)
    lane_rows = max(_MIN_LANE_ROWS, -(-num_rows // (_MAX_CHUNKS * _LANES)))
    padded = torch.nn.functional.pad(values, (0, 0, 0, -num_rows % (_LANES * lane_rows)))
    by_lane = padded.view(-1, lane_rows, _LANES, hidden).transpose(1, 2).reshape(-1, hidden)
    sections = -(-num_rows // (_LANES * lane_rows * _SECTION_CHUNKS))
    for length in (lane_rows, _LANES, _SECTION_CHUNKS, sections):
        by_lane = _sum_in_order(by_lane, length)
    return by_lane[0]


def _sum_in_order(values: torch.Tensor, length: int) -> torch.Tensor:
    """Sums of `length` rows each, [n, hidden] -> [ceil(n / length), hidden]."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % length)).unflatten(0, (-1, length))
    total = torch.zeros_like(padded[:, 0])
    for position in range(length):
        total = total + padded[:, position]
    return total


def kept_mask(seed: torch.Tensor, rows: torch.Tensor, hidden: int, threshold: int) -> torch.Tensor:
    """Which elements dropout keeps: bool [rows, hidden].

    Args:
        seed: int64 [1].
        rows: int64 [rows], their numbers in the residual stream.
        hidden: elements of a row.
        threshold: an element is kept if its 16 bits are not below.
    """
    groups = torch.arange(-(-hidden // GROUP), device=rows.device)
    rows = rows[:, None]
    counter = torch.broadcast_tensors(groups, rows & _WORD, rows >> 32, torch.zeros_like(groups))
    words = torch.stack(philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD)), dim=-1)  # [rows, groups, 4]
    numbers = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)
    return numbers[:, :hidden] >= threshold


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10: four random 32-bit words for four counter words and two key words, all in int64 tensors."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(10):
        # The products wrap around at 2^64 as unsigned ones do; only the shift has to be kept from copying the sign.
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (
            (product1 >> 32 & _WORD) ^ x1 ^ key0,
            product1 & _WORD,
            (product0 >> 32 & _WORD) ^ x3 ^ key1,
            product0 & _WORD,
        )
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    return x0, x1, x2, x3


def _kept(x: torch.Tensor, rows: torch.Tensor | None, seed: torch.Tensor | None, threshold: int) -> torch.Tensor:
    assert seed is not None, "dropout needs a seed"
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    return kept_mask(seed, rows, x.size(1), threshold)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rounded(value: float, dtype: torch.dtype) -> float:
    return value if dtype == torch.float64 else float(np.float32(value))
