"""Values of each layer: keep probabilities, sensitivities."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def check_layer_values(name: str, values: ArrayLike, each: str | None = None) -> NDArray[np.float64]:
    """A copy of one value in [0, 1] for each layer, float64 [L]; ValueError for anything else.

    name: of the list in errors.  each: of one value; None is the same.
    """
    checked = np.array(values, dtype=np.float64)
    if checked.ndim != 1 or checked.size == 0:
        raise ValueError(f"{name} has shape {checked.shape}: it must be a list of one value for each layer")
    outside = np.flatnonzero(~((checked >= 0.0) & (checked <= 1.0)))
    if outside.size:
        layer = int(outside[0]) + 1
        raise ValueError(
            f"{each or name} of layer {layer} = {checked[outside[0]]!r} is not allowed: it must be in [0, 1]"
        )
    return checked
