"""The rule that picks the Block and Allow lists from measured gaps (docs/method.md 2; SBLD, "Block/Allow Lists")."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from megatron_sbld.checks import check_number

SIGNIFICANT_STDERRS = 2.0
"""A gap above this many of its standard errors is positive: leaving the layer out hurt."""


def choose_lists(
    gap: ArrayLike, gap_stderr: ArrayLike, block_fraction: float = 0.15, allow_fraction: float = 0.15
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Block and Allow lists of 1-based layer numbers, each in ascending order.

    gap: loss without the layer minus the baseline's, [L].  gap_stderr: its standard error, [L].
    Block: the floor(block_fraction L) layers of largest gap. Allow: the floor(allow_fraction L) layers of smallest gap,
    less those whose gap is significantly positive. Of equal gaps, the lower layer number comes first.

    Raises ValueError if the lengths differ, a value is not finite, or the fractions ask for more layers than there are.

    >>> choose_lists(gap=[0.3, 0.0, 0.2, -0.1], gap_stderr=[0.01] * 4, block_fraction=0.25, allow_fraction=0.5)
    ((1,), (2, 4))
    """
    gaps, stderrs = np.asarray(gap, dtype=np.float64), np.asarray(gap_stderr, dtype=np.float64)
    if gaps.ndim != 1 or gaps.shape != stderrs.shape or not gaps.size:
        raise ValueError(f"gap and gap_stderr have shapes {gaps.shape} and {stderrs.shape}: they must be [num_layers]")
    if not (np.isfinite(gaps).all() and np.isfinite(stderrs).all() and (stderrs >= 0).all()):
        raise ValueError("gap and gap_stderr must be finite, and gap_stderr not negative")
    num_layers = len(gaps)
    num_block = layers_of_fraction(check_number("block_fraction", block_fraction, "[0, 1]"), num_layers)
    num_allow = layers_of_fraction(check_number("allow_fraction", allow_fraction, "[0, 1]"), num_layers)
    if num_block + num_allow > num_layers:
        raise ValueError(
            f"block_fraction = {block_fraction} and allow_fraction = {allow_fraction} ask for {num_block} and "
            f"{num_allow} of {num_layers} layers: together they may be at most 1"
        )
    # Stable sorts keep the order of layers among equal gaps; Allow then takes the first of what Block leaves.
    block = np.argsort(-gaps, kind="stable")[:num_block]
    rest = [layer for layer in np.argsort(gaps, kind="stable") if layer not in block]
    allow = [layer for layer in rest[:num_allow] if gaps[layer] <= SIGNIFICANT_STDERRS * stderrs[layer]]
    return tuple(sorted(int(layer) + 1 for layer in block)), tuple(sorted(int(layer) + 1 for layer in allow))


def layers_of_fraction(fraction: float, num_layers: int) -> int:
    """How many layers the rule counts to a list: floor(fraction L)."""
    # Rounded before it is floored, because 0.29 * 100 is 28.999999999999996.
    return math.floor(round(fraction * num_layers, 6))
