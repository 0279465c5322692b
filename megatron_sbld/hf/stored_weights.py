"""Single weights in and out of checkpoints of the torch_dist format, without building a model or a process group.

megatron-core stores the same weight of all layers under one name, `decoder.layers.mlp.linear_fc1.weight`, with a first
axis of layers, in as many pieces as ranks wrote; a checkpoint with other names for some layers, or one whose layers
differ, has `decoder.layers.3.mlp.linear_fc1.weight`. Read here is one layer at a time from either, from any layout; in
memory is what was asked for and one stored piece.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sbld.checkpoint.shards import ShardWriter
from megatron_sbld.files.pickled_paths import read_paths_of_python_3_13

LAYERS = "decoder.layers."
_NOT_OF_THE_MODEL = ("optimizer", "chained_", "rng_state", "rerun_state_machine")

# Unfused norms go by other names where a layer spec does not map them to Transformer Engine's.
_OTHER_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


class StoredWeights:
    """The model's weights in a checkpoint, read one by one.

    Args:
        path: the checkpoint's own folder.

    Raises:
        ValueError: its table of contents cannot be read; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = dcp.FileSystemReader(path)
        read_paths_of_python_3_13()
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            self._tensors: dict[str, TensorStorageMetadata] = {
                name: entry
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata) and not name.startswith(_NOT_OF_THE_MODEL)
            }
        except Exception as error:  # a damaged pickle raises nearly anything
            raise ValueError(f"checkpoint {path}: .metadata cannot be read: {_reason(error)}") from error
        self._unread = {name for name in self._tensors if "_extra_state" not in name}

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a weight of this name."""
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, over all ranks. Raises ValueError if there is none of this name."""
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """As stored. Raises ValueError if there is none of this name."""
        return self._entry(name).properties.dtype

    def of_layer(self, name: str, layer: int, num_layers: int) -> tuple[str, int | None]:
        """Where a layer's weight is: the stored name, and its index in the axis of layers, None where there is none.

        Args:
            name: without `decoder.layers.`, as Transformer Engine's specs name it.
            layer: from 0.
            num_layers: of the model.

        Raises:
            ValueError: the checkpoint lacks it, or has another number of layers.
        """
        for candidate in _alternatives(name):
            if self.has(f"{LAYERS}{candidate}"):
                found = self.shape(f"{LAYERS}{candidate}")[0]
                if found != num_layers:
                    raise ValueError(
                        f"checkpoint {self.path}: {LAYERS}{candidate} has {found} layers, but the model {num_layers} "
                        "(model.num_layers)"
                    )
                return f"{LAYERS}{candidate}", layer
            if self.has(f"{LAYERS}{layer}.{candidate}"):
                return f"{LAYERS}{layer}.{candidate}", None
        raise ValueError(f"checkpoint {self.path}: lacks {LAYERS}{name} of layer {layer + 1}")

    def check(self, name: str, index: int | None, shape: Sequence[int]) -> None:
        """Note that a weight is going to be read, and refuse it unless it has this shape (of one layer with an index).

        Raises:
            ValueError: naming the weight, its shape and the expected one.
        """
        stored = self.shape(name)
        found = stored if index is None else stored[1:]
        if found != tuple(shape):
            raise ValueError(f"checkpoint {self.path}: {name} has the shape {list(found)}, expected {list(shape)}")
        self._unread.discard(name)

    def refuse_others(self) -> None:
        """Refuse a checkpoint with weights that nobody has checked: they are of a model that is not the one described.

        Raises:
            ValueError: naming them.
        """
        if self._unread:
            names = sorted(self._unread)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"checkpoint {self.path}: holds weights that the model described by its config does not have: "
                f"{', '.join(names[:5])}{more}"
            )

    def read(self, name: str, index: int | None = None, rows: int | None = None) -> torch.Tensor:
        """A weight, or its part at `index` of the leading axis, or its first `rows`, in memory of its own.

        Raises:
            ValueError: it is not there or a file is missing or damaged; names the file.
        """
        entry = self._entry(name)
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if index is not None:
            offsets[0], sizes[0] = index, 1
        elif rows is not None:
            sizes[0] = rows
        box = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        tensor = torch.empty(sizes, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(name, entry, [box])
        if sum(math.prod(item.lengths) for item in items) < tensor.numel():
            raise ValueError(f"checkpoint {self.path}: parts of {name} were never saved")
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in items:
            by_file[self._reader.storage_data[item.storage_index].relative_path].append(item)
        for file, of_file in by_file.items():
            try:
                self._reader.read_data(LoadPlan(of_file), _Target(tensor)).wait()
            except Exception as error:  # a damaged file raises nearly anything
                raise ValueError(f"checkpoint {self.path}: {file} cannot be read: {_reason(error)}") from error
        return tensor if index is None else tensor[0]

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._tensors:
            raise ValueError(f"checkpoint {self.path}: lacks {name}")
        return self._tensors[name]


@dataclass(frozen=True)
class Piece:
    """A part of a weight that is to be stored: all of it, or one layer of what is stored for all layers."""

    name: str
    shape: tuple[int, ...]
    """Of the piece, without an axis of layers."""
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    """Called once, when the piece is written."""
    layer: int | None = None
    """From 0; None for a weight that is not a layer's."""
    num_layers: int = 0
    """Of the model, where it is a layer's."""


def write_pieces(folder: Path, pieces: Iterable[Piece], advance: Callable[[], None]) -> None:
    """Write the weights of a checkpoint and the table of where each is, holding one piece in memory at a time.

    advance: called after each piece.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on saving without a process group
        dcp.save({}, storage_writer=ShardWriter(folder), planner=_Pieces(pieces, advance), no_dist=True)


class _Pieces(SavePlanner):
    """Writes pieces that are loaded when their turn comes."""

    def __init__(self, pieces: Iterable[Piece], advance: Callable[[], None]) -> None:
        self._advance = advance
        self._pieces = {(piece.name, piece.layer): piece for piece in pieces}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(piece) for piece in self._pieces.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        offset = write_item.index.offset
        assert offset is not None, "made by _write_item"
        assert write_item.tensor_data is not None, "made by _write_item"
        name = write_item.index.fqn
        layer = offset[0] if (name, None) not in self._pieces else None
        self._advance()
        return self._pieces[name, layer].load().reshape(write_item.tensor_data.chunk.sizes).contiguous()


def _write_item(piece: Piece) -> WriteItem:
    offsets, sizes, whole = [0] * len(piece.shape), list(piece.shape), list(piece.shape)
    if piece.layer is not None:
        offsets, sizes, whole = [piece.layer, *offsets], [1, *sizes], [piece.num_layers, *whole]
    chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
    return WriteItem(
        index=MetadataIndex(piece.name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=chunk, properties=TensorProperties(dtype=piece.dtype), size=torch.Size(whole)
        ),
    )


class _Target(LoadPlanner):
    """Puts what is read into its place in one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("the plan is made by StoredWeights.read")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise AssertionError("the plan is made by StoredWeights.read")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise AssertionError("the plan is made by StoredWeights.read")

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("weights are tensors")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = self._tensor
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            place = place.narrow(axis, start, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _alternatives(name: str) -> list[str]:
    return [name, *(other + name.removeprefix(own) for own, other in _OTHER_NAMES.items() if name.startswith(own))]


def _reason(error: Exception) -> str:
    # The text of an UnpicklingError advises to load without weights_only.
    text = "" if type(error).__name__ == "UnpicklingError" else str(error).split("\n", maxsplit=1)[0]
    return f"{type(error).__name__}: {text}" if text else f"damaged ({type(error).__name__})"
