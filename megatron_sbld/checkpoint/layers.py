"""Which layers of a checkpoint are taken, and where they go: of a run that is still growing, or into a deeper model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer

LAYERS = "decoder.layers."
"""What the names of the layers' tensors begin with."""


@dataclass(frozen=True)
class LayerMap:
    """places: layer of the model (1-based) -> layer of the checkpoint.  num_saved: layers of the checkpoint."""

    places: Mapping[int, int]
    num_saved: int

    @classmethod
    def of_begun(cls, begun: Sequence[int], num_saved: int) -> LayerMap | None:
        """Of a model of the layers that have begun alone; None where that is all of them."""
        if len(begun) == num_saved:
            return None
        return cls(dict(enumerate(sorted(begun), start=1)), num_saved)

    @classmethod
    def into(cls, layers: Collection[int], begun: Sequence[int], num_saved: int) -> LayerMap:
        """The checkpoint's layers that have begun, in order, to `layers` of a deeper model.

        Raises ValueError unless they are as many.
        """
        if len(layers) != len(begun):
            raise ValueError(
                f"drop.stages begin with {len(layers)} layers, {sorted(layers)}, but the checkpoint has {len(begun)}: "
                "the first stage must have as many (each pipeline rank runs at least one layer of it)"
            )
        return cls(dict(zip(sorted(layers), sorted(begun), strict=True)), num_saved)


def begun_layers(drop_state: Mapping[str, Any] | None, num_layers: int) -> list[int]:
    """The layers (1-based) that had begun when the drop state was saved: all, unless the run was still growing."""
    growth = (drop_state or {}).get("growth")
    return list(range(1, num_layers + 1)) if growth is None else list(growth["begun"])


def place_layers(chunk: GPTModel, state: dict[str, Any], layers: LayerMap, metadata: dict[str, Any]) -> None:
    """Let a chunk's sharded state ask for the layers of the map in their places in the checkpoint, and for no others.

    state: the chunk's sharded state dict, by local names; changed.
    metadata: as for the chunk's sharded_state_dict.
    """
    for name in [name for name in state if name.startswith(LAYERS)]:
        del state[name]
    for index, layer in enumerate(chunk.decoder.layers):
        saved = layers.places.get(layer.layer_number)
        if saved is not None:
            state.update(_state_of_layer(layer, index, saved, layers.num_saved, metadata))
    if dist.get_world_size() == 1:  # megatron-core then insists that all of a tensor is read
        for saved in set(range(1, layers.num_saved + 1)) - set(layers.places.values()):
            unread = _state_of_layer(chunk.decoder.layers[0], 0, saved, layers.num_saved, metadata)
            for name, item in unread.items():
                if isinstance(item, ShardedTensor | ShardedTensorFactory):
                    state[f"unread.{saved}.{name}"] = replace(item, data=torch.empty_like(item.data))


def _state_of_layer(
    layer: TransformerLayer, index: int, saved: int, num_saved: int, metadata: dict[str, Any]
) -> dict[str, Any]:
    """The sharded state of the chunk's layer at `index`, in the place of the checkpoint's layer `saved`."""
    prefix = f"{LAYERS}{index}."
    state: dict[str, Any] = layer.sharded_state_dict(prefix, [(0, saved - 1, num_saved)], metadata)
    replace_prefix_for_sharding(state, prefix, LAYERS)
    return state
