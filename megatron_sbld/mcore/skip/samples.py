"""A layer on some samples of a microbatch: `drop.granularity: sample`.

The kept samples are gathered out of the residual stream [s, b, h], the stock layer runs on them as on a smaller
microbatch [s, n, h], and its output takes their places in the stream; the other samples pass by unchanged. Which ones
they are the controller says, as many on every rank, so that collectives inside the layer pair. Their indices reach the
device in one copy an iteration that the host does not wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_sbld.controller import DropController
from megatron_sbld.method.choices import Granularity

_BATCH_DIMENSION = {"attention_mask": 0, "attention_bias": 0, "padding_mask": 0, "rotary_pos_emb": 1}
"""Where a layer's other inputs have the microbatch's samples: [b or 1, ...], or rotary embeddings [s, b or 1, ...]."""
_POSITIONAL = ("attention_mask",)
"""Arguments of a layer after hidden_states that Megatron may give by position."""


class SampleIndices:
    """The kept samples of each layer and microbatch, on the device. Shared by the layers of one model."""

    def __init__(self, controller: DropController) -> None:
        assert controller.num_samples is not None, "made for granularity sample alone"
        self._controller = controller
        self.whole = (1, controller.num_samples)
        """The dimension of hidden_states [s, b, h] that a layer runs a part of, and its whole size."""
        self._plan: np.ndarray | None = None
        """The plan whose indices are on the device."""
        self._indices = torch.empty(0, dtype=torch.int64)
        self._offsets: list[list[int]] = []

    def narrowed(
        self, forward: Callable[..., Any], layer_number: int, microbatch: int, hidden_states: torch.Tensor
    ) -> Callable[..., Any]:
        """A layer's forward on its kept samples; the stock one where it runs all of them."""
        samples = self.of(layer_number, microbatch, hidden_states)
        return forward if samples is None else partial(run_on_samples, forward, samples)

    def of(self, layer_number: int, microbatch: int, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Sorted indices of the samples that run a kept layer, int64 [n]; None where all of [s, b, h] do.

        Raises:
            RuntimeError: the microbatch has another number of samples than the controller was told of.
        """
        controller = self._controller
        if hidden_states.size(1) != controller.num_samples:
            raise RuntimeError(
                f"a microbatch has {hidden_states.size(1)} samples, and the controller was given num_samples = "
                f"{controller.num_samples}: it must be the micro_batch_size"
            )
        if not controller.runs_some_samples(layer_number, microbatch):
            return None
        if self._plan is not controller.sample_plan:
            self._upload(hidden_states.device)
        row = self._offsets[0 if controller.scope == "iteration" else microbatch]
        return self._indices[row[layer_number - 1] : row[layer_number]]

    def _upload(self, device: torch.device) -> None:
        plan = self._controller.sample_plan
        assert plan is not None, "granularity sample has a plan as soon as an iteration has begun"
        rows = plan[:1] if self._controller.scope == "iteration" else plan
        indices = torch.from_numpy(np.nonzero(rows)[2])
        if device.type == "cuda":
            indices = indices.pin_memory()  # from pageable memory the host would wait for the copy
        self._indices = indices.to(device, non_blocking=True)
        counts = rows.sum(axis=-1)  # [microbatches, L]
        ends = np.cumsum(counts).reshape(counts.shape)
        self._offsets = np.concatenate([ends[:, :1] - counts[:, :1], ends], axis=1).tolist()
        self._plan = plan


def run_on_samples(forward: Callable[..., Any], index: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A stock layer's (hidden_states [s, b, h], context), of which it computed the samples of `index` alone.

    A MambaLayer's hidden_states come alone.

    Args:
        forward: the layer's, with the arguments that follow.
        index: sorted samples, int64 [n].

    Raises:
        ValueError: an input that has the microbatch's samples in a way that is not known here.
    """
    kwargs = inputs_by_name("sample", args, kwargs)
    hidden_states = kwargs.pop("hidden_states")
    num_samples = hidden_states.size(1)
    selected = {name: _selected(name, value, index, num_samples) for name, value in kwargs.items()}
    result = forward(hidden_states=hidden_states.index_select(1, index), **selected)  # [s, n, h]
    if isinstance(result, torch.Tensor):
        return hidden_states.index_copy(1, index, result)
    output, context = result
    return hidden_states.index_copy(1, index, output), context


def inputs_by_name(granularity: Granularity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A layer's inputs, all by name. Raises ValueError for more by position than hidden_states and _POSITIONAL."""
    allowed = 1 + len(_POSITIONAL)
    if len(args) > allowed:
        raise ValueError(
            f"granularity {granularity!r} needs a layer's inputs by name, got {len(args)} by position: at most "
            f"{allowed}, hidden_states and {', '.join(_POSITIONAL)}"
        )
    return dict(zip(("hidden_states", *_POSITIONAL), args, strict=False)) | kwargs


def _selected(name: str, value: Any, index: torch.Tensor, num_samples: int) -> Any:
    """The kept samples of one of a layer's other inputs; one that all samples share, or that is None, as it is."""
    if value is None:
        return None
    dim = _BATCH_DIMENSION.get(name)
    if dim is None or not isinstance(value, torch.Tensor) or value.dim() <= dim:
        raise ValueError(
            f"granularity 'sample' does not work with {name} in training: only {', '.join(_BATCH_DIMENSION)} can be "
            "given for some samples of a microbatch; use granularity 'layer'"
        )
    if value.size(dim) == 1:
        return value
    if value.size(dim) != num_samples:
        raise ValueError(
            f"granularity 'sample' does not work with {name} of shape {list(value.shape)}: dimension {dim} must be 1 "
            f"or the {num_samples} samples of a microbatch; use granularity 'layer'"
        )
    return value.index_select(dim, index)
