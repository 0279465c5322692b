"""Measuring layers at evaluation: leaving one out, and how far each turns the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray

from megatron_sbld.mcore.skip.decoder import decoder_layers
from megatron_sbld.mcore.skip.switchable import SwitchableLayer


@contextmanager
def layer_left_out(chunks: Sequence[torch.nn.Module], layer_number: int) -> Iterator[None]:
    """Replace a layer (1-based) by the identity, at evaluation too; on ranks that do not hold it, nothing happens.

    chunks: this rank's model chunks, made switchable.
    """
    held = [layer for chunk in chunks for layer in decoder_layers(chunk) if layer._drop_number == layer_number]
    for layer in held:
        layer.forward = _identity_of(layer)
    try:
        yield
    finally:
        for layer in held:
            del layer.forward  # the class's own again


def _identity_of(layer: SwitchableLayer) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        # The skip of training, because a pipeline stage may not send on its very input.
        return layer._returned(layer._skip(args[0] if args else kwargs["hidden_states"]), kwargs)

    return forward


class BlockInfluence:
    """1 - mean cosine similarity of a layer's input and output, over tokens (ShortGPT, arXiv 2403.03853, eq. 1).

    A context: while it is entered, every forward pass is added up on the rank that holds the layer.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], num_layers: int) -> None:
        """chunks: this rank's model chunks.  num_layers: of the whole model."""
        self._layers = [layer for chunk in chunks for layer in decoder_layers(chunk)]
        self._handles: list[Any] = []
        device = next(chunks[0].parameters()).device
        self._sums = torch.zeros(2, num_layers, dtype=torch.float64, device=device)  # similarities, tokens

    def __enter__(self) -> BlockInfluence:
        self._handles = [layer.register_forward_hook(self._add, with_kwargs=True) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> NDArray[np.float64]:
        """The influence of each layer, [L], over what was added since the last call, of all ranks. Collective.

        Ranks that share tokens (tensor parallel without sequence parallelism) count them alike, which leaves the mean.
        """
        totals = self._sums.clone()
        self._sums.zero_()
        dist.all_reduce(totals)
        similarity: NDArray[np.float64] = (totals[0] / totals[1]).cpu().numpy()
        return 1.0 - similarity

    @torch.no_grad()
    def _add(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]  # [s, b, h], a rank's part of s
        similarity = F.cosine_similarity(hidden_states.float(), output[0].float(), dim=-1)  # [s, b]
        self._sums[0, layer.layer_number - 1] += similarity.double().sum()
        self._sums[1, layer.layer_number - 1] += similarity.numel()
